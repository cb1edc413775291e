"""The method of Lightning's image classifier example: a LightningModule, and a Trainer that runs it.

That example (pl_examples/basic_examples/mnist_examples) had this very network and recipe, so there is no
--own. Checkpoints, loggers and the progress bar are switched off: they cost time, and no other peer has them.
"""

import logging
import warnings

import lightning
import torch.nn.functional as F
from shared import begin, parse_arguments, report
from shared_torch import Net, adadelta, loaders
from torchmetrics import Accuracy


class Classifier(lightning.LightningModule):
    """The network, and what to do at each step."""

    def __init__(self):
        super().__init__()
        self.model, self.accuracy = Net(), Accuracy(task="multiclass", num_classes=10)

    def training_step(self, batch, index):
        images, labels = batch
        return F.nll_loss(self.model(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        output = self.model(images)
        self.accuracy(output, labels)
        self.log("accuracy", self.accuracy)
        self.log("loss", F.nll_loss(output, labels))

    def configure_optimizers(self):
        optimizer, scheduler = adadelta(self.model)
        return [optimizer], [scheduler]

    def on_train_start(self):
        begin()

    def on_validation_epoch_end(self):
        report(self.accuracy.compute())


def main():
    args = parse_arguments(__doc__, "--gpu")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # advice about workers and loggers
    lightning.seed_everything(1, verbose=False)
    training_set, test_set = loaders(args.images, shuffle=True, gpu=args.gpu)
    unused = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="gpu" if args.gpu else "cpu",
        devices=1,
        num_sanity_val_steps=0,
        **dict.fromkeys(unused, False),
    )
    trainer.fit(Classifier(), training_set, test_set)


if __name__ == "__main__":
    main()
