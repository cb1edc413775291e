"""The method of the tutorial that this one descends from.

It is PyTorch's own example but for two things: its dropout leaves out whole channels of the images, and it
shuffles the test set. Like there, the training set is not shuffled.
"""

import warnings

import torch
import torch.nn as nn
from shared import Reports, parse_arguments
from shared_torch import Net, adadelta, evaluate, loaders, train


def main():
    args = parse_arguments(__doc__)
    warnings.filterwarnings("ignore", message="dropout2d")  # it also uses it on what are no images any more
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    training_set, test_set = loaders(args.images, shuffle_test=True)
    model = Net(nn.Dropout2d)
    optimizer, scheduler = adadelta(model)
    reports = Reports()
    reports.ready()
    for _ in range(args.epochs):
        train(model, training_set, optimizer)
        reports.finished_epoch(evaluate(model, test_set))
        scheduler.step()


if __name__ == "__main__":
    main()
