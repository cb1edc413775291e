"""What the peers that use PyTorch share: the network, its optimiser, and torchvision's digits."""

import torch
import torch.nn as nn
import torch.nn.functional as F
from shared import BATCH, DATA, GAMMA, MEAN, PARAMETERS, RATE, STD, TEST_BATCH
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms


class Net(nn.Module):
    """The network of PyTorch's own example, for normalised images [N, 1, 28, 28]."""

    def __init__(self, dropout=nn.Dropout):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3)
        self.conv2 = nn.Conv2d(32, 64, 3)
        self.dropout1 = dropout(0.25)
        self.dropout2 = dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, 10)
        assert sum(p.numel() for p in self.parameters()) == PARAMETERS

    def forward(self, x):
        x = F.relu(self.conv2(F.relu(self.conv1(x))))
        x = self.dropout1(F.max_pool2d(x, 2)).flatten(1)
        x = self.dropout2(F.relu(self.fc1(x)))
        return F.log_softmax(self.fc2(x), dim=1)


def adadelta(model):
    """Return the optimiser, and the schedule that lowers its rate after each epoch."""
    optimizer = torch.optim.Adadelta(model.parameters(), lr=RATE)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=GAMMA)


def loaders(images=None, shuffle=False, shuffle_test=False, gpu=False):
    """Return loaders of the training set and the test set. They decode the images one by one.

    For a GPU, a second process decodes them, as in PyTorch's own example.
    """
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    sets = [datasets.MNIST(DATA, train=train, transform=transform) for train in (True, False)]
    training_set, test_set = [Subset(digits, range(images)) for digits in sets] if images else sets
    workers = {"num_workers": 1, "persistent_workers": True, "pin_memory": True} if gpu else {}
    return (
        DataLoader(training_set, batch_size=BATCH, shuffle=shuffle, **workers),
        DataLoader(test_set, batch_size=TEST_BATCH, shuffle=shuffle_test, **workers),
    )
