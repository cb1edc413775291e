"""The method of PyTorch's own example (pytorch/examples, mnist): a plain loop over a DataLoader.

As in that example, the training images are shuffled only on a GPU. --autocast lets PyTorch multiply in
bfloat16 where it finds that safe (https://docs.pytorch.org/docs/stable/amp.html).
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from shared import begin, parse_arguments, report
from shared_torch import Net, adadelta, loaders


def train(model, loader, optimizer, device, autocast):
    """Train for an epoch, and show the loss at every tenth step."""
    model.train()
    for step, (images, labels) in enumerate(loader):
        images, labels = images.to(device), labels.to(device)
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = F.nll_loss(model(images), labels)
        loss.backward()
        optimizer.step()
        if step % 10 == 0:
            print(f"{step / len(loader):6.1%} - Loss: {loss.item()}", file=sys.stderr)


@torch.no_grad()
def evaluate(model, loader, device, autocast):
    """Return the share of right answers. Like the example, it also computes the mean loss."""
    model.eval()
    loss, correct = 0.0, 0
    for images, labels in loader:
        images, labels = images.to(device), labels.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            output = model(images)
            loss += F.nll_loss(output, labels, reduction="sum").item()
        correct += (output.argmax(dim=1) == labels).sum().item()
    return correct / len(loader.dataset)


def main(description=__doc__, dropout=nn.Dropout, shuffle_on_gpu=True, shuffle_test=False):
    args = parse_arguments(description, "--gpu", "--autocast")
    torch.manual_seed(1)
    training_set, test_set = loaders(args.images, args.gpu and shuffle_on_gpu, shuffle_test, args.gpu)
    device = torch.device("cuda" if args.gpu else "cpu")
    model = Net(dropout).to(device)
    optimizer, scheduler = adadelta(model)
    begin()
    for _ in range(args.epochs):
        train(model, training_set, optimizer, device, args.autocast)
        report(evaluate(model, test_set, device, args.autocast))
        scheduler.step()


if __name__ == "__main__":
    main()
