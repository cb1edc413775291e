"""The method of PyTorch Ignite's MNIST example: a trainer engine, an evaluator engine, and handlers.

The example also evaluates the training set after each epoch, which is left out here. With --own it trains
the example's smaller network, with SGD.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy, Loss
from shared import begin, parse_arguments, report
from shared_torch import Net, adadelta, loaders


def own_net():
    return nn.Sequential(
        *(nn.Conv2d(1, 10, 5), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Conv2d(10, 20, 5), nn.Dropout2d(), nn.MaxPool2d(2), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(320, 50), nn.ReLU(), nn.Dropout()),
        *(nn.Linear(50, 10), nn.LogSoftmax(dim=1)),
    )


def main():
    args = parse_arguments(__doc__, "--own", "--gpu")
    torch.manual_seed(1)
    training_set, test_set = loaders(args.images, shuffle=True, gpu=args.gpu)
    device = torch.device("cuda" if args.gpu else "cpu")
    model = (own_net() if args.own else Net()).to(device)
    if args.own:
        optimizer, scheduler = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5), None
    else:
        optimizer, scheduler = adadelta(model)
    trainer = create_supervised_trainer(model, optimizer, F.nll_loss, device)
    metrics = {"accuracy": Accuracy(), "loss": Loss(F.nll_loss)}
    evaluator = create_supervised_evaluator(model, metrics, device)

    trainer.add_event_handler(Events.STARTED, begin)

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        evaluator.run(test_set)
        report(evaluator.state.metrics["accuracy"])
        if scheduler:
            scheduler.step()

    trainer.run(training_set, max_epochs=args.epochs)


if __name__ == "__main__":
    main()
