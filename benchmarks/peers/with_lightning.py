"""The method of Lightning's image classifier example: a LightningModule, and a Trainer that runs it.

That example (pl_examples/basic_examples/mnist_examples) had this very network and recipe, so there is no
--own. What would cost time and is not asked for here, checkpoints, loggers and the progress bar, is off.
"""

import logging
import warnings

import lightning
import torch
import torch.nn.functional as F
from shared import Reports, parse_arguments
from shared_torch import Net, adadelta, loaders
from torchmetrics import Accuracy


class Classifier(lightning.LightningModule):
    """The network, with what to do at a step."""

    def __init__(self, reports):
        super().__init__()
        self.model, self.reports = Net(), reports
        self.accuracy = Accuracy(task="multiclass", num_classes=10)

    def forward(self, images):
        return self.model(images)

    def training_step(self, batch, index):
        images, labels = batch
        return F.nll_loss(self(images), labels)

    def validation_step(self, batch, index):
        images, labels = batch
        output = self(images)
        self.accuracy(output, labels)
        self.log("accuracy", self.accuracy)
        self.log("loss", F.nll_loss(output, labels))

    def configure_optimizers(self):
        optimizer, scheduler = adadelta(self.model)
        return [optimizer], [scheduler]

    def on_train_start(self):
        self.reports.ready()

    def on_validation_epoch_end(self):
        self.reports.finished_epoch(self.accuracy.compute())


def main():
    args = parse_arguments(__doc__, gpu=True)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")  # advice about workers and loggers
    torch.set_num_threads(args.threads)
    lightning.seed_everything(1, verbose=False)
    training_set, test_set = loaders(args.images, shuffle=True, gpu=args.gpu)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="gpu" if args.gpu else "cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(Classifier(Reports()), training_set, test_set)


if __name__ == "__main__":
    main()
