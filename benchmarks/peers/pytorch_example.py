"""The method of PyTorch's own example (pytorch/examples, mnist): a plain loop over a DataLoader.

Like there, the images are shuffled on a GPU only.
"""

import torch
import torch.nn as nn
from shared import Reports, parse_arguments
from shared_torch import Net, adadelta, device, evaluate, loaders, train


def main(description=__doc__, dropout=nn.Dropout, shuffle_on_gpu=True, shuffle_test=False):
    args = parse_arguments(description, gpu=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    training_set, test_set = loaders(args.images, args.gpu and shuffle_on_gpu, shuffle_test, args.gpu)
    model = Net(dropout).to(device(args))
    optimizer, scheduler = adadelta(model)
    reports = Reports()
    reports.ready()
    for _ in range(args.epochs):
        train(model, training_set, optimizer)
        reports.finished_epoch(evaluate(model, test_set))
        scheduler.step()


if __name__ == "__main__":
    main()
