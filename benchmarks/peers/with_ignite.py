"""The method of PyTorch Ignite's MNIST example: a trainer engine, an evaluator engine, and handlers.

The example also evaluates the training set after each epoch; here that is left out. With --own it has the
example's smaller network, and SGD.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from ignite.engine import Events, create_supervised_evaluator, create_supervised_trainer
from ignite.metrics import Accuracy, Loss
from shared import Reports, parse_arguments
from shared_torch import Net, adadelta, device, loaders


def own_net():
    return nn.Sequential(
        nn.Conv2d(1, 10, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, 5),
        nn.Dropout2d(),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 50),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(50, 10),
        nn.LogSoftmax(dim=1),
    )


def main():
    args = parse_arguments(__doc__, own=True, gpu=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    training_set, test_set = loaders(args.images, shuffle=True, gpu=args.gpu)
    if args.own:
        model, scheduler = own_net().to(device(args)), None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
    else:
        model = Net().to(device(args))
        optimizer, scheduler = adadelta(model)
    trainer = create_supervised_trainer(model, optimizer, F.nll_loss, device(args))
    metrics = {"accuracy": Accuracy(), "loss": Loss(F.nll_loss)}
    evaluator = create_supervised_evaluator(model, metrics, device(args))
    reports = Reports()

    @trainer.on(Events.STARTED)
    def start():
        reports.ready()

    @trainer.on(Events.EPOCH_COMPLETED)
    def evaluate():
        evaluator.run(test_set)
        reports.finished_epoch(evaluator.state.metrics["accuracy"])
        if scheduler:
            scheduler.step()

    trainer.run(training_set, max_epochs=args.epochs)


if __name__ == "__main__":
    main()
