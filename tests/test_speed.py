"""The trainer stays fast, compared with the older tutorial in the same run.

The two take turns on one thread, and the processor's time counts, so other work hardly matters.
"""

import statistics
import sys
import time

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mnist
from benchmarks.reporting import time_epoch, unpack
from rig.project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
import shared_torch


@pytest.fixture(scope="module")
def digits():
    unpack(ROOT / "datasets")
    training_set, _ = mnist.load_mnist(ROOT / "datasets")
    return training_set


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    mnist.settle_in()  # as the program does; now the other keeps freed memory, too
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def trainer():
    """The trainer with the older tutorial's optimiser. It also distorts, normalises and averages."""
    return mnist.Trainer(mnist.Hyperparameters(optimizer="adadelta", lr=1.0))


def median_ratio(one, other, pairs):
    """Return the processor's time for `one` divided by that for `other`. They take turns."""

    def spent(work):
        begin = time.process_time()
        work()
        return time.process_time() - begin

    one(), other()  # to warm up
    return statistics.median(spent(one) / spent(other) for _ in range(pairs))


@pytest.mark.filterwarnings("ignore:dropout2d")
def test_a_step_of_training_is_no_slower_than_in_the_older_tutorial(digits, one_thread, trainer):
    images, labels = (tensor[: 4 * 64] for tensor in digits)

    model = shared_torch.Net(nn.Dropout2d)
    optimizer, _ = shared_torch.adadelta(model)
    batches = ((images[:, None] / 255 - mnist.MEAN) / mnist.STD).split(64)  # decoding is not compared here

    def older():
        for batch, its_labels in zip(batches, labels.split(64), strict=True):
            optimizer.zero_grad()
            F.nll_loss(model(batch), its_labels).backward()
            optimizer.step()

    # On a busy machine it was 0.98 to 1.02, although the trainer does more.
    assert median_ratio(lambda: time_epoch(trainer, images, labels), older, pairs=8) < 1.25


def test_convolutions_get_channels_last(digits, trainer):
    """The layout saves a tenth of a step, too little for a ratio to show reliably."""
    seen = []
    trainer.model.conv2.register_forward_hook(lambda layer, inputs, output: seen.extend((*inputs, output)))
    next(trainer.train(*(tensor[:64] for tensor in digits)))
    assert [each.is_contiguous(memory_format=torch.channels_last) for each in seen] == [True, True]


class NoNetwork(nn.Linear):
    """Gives the same output for every image, and costs next to nothing."""

    def forward(self, images):
        return self.bias.expand(len(images), 10)


def test_images_come_from_memory(digits, one_thread, trainer):
    """A step without its network takes less time than decoding as many images one by one."""
    images, labels = (tensor[: 20 * 64] for tensor in digits)
    loader, _ = shared_torch.loaders(20 * 64)
    # The average takes time to read all weights, so this network has hardly any.
    trainer.ddp_model = trainer.model = trainer.averaged_model = NoNetwork(1, 10)
    # On busy machines it was 0.39 to 0.48, though images are distorted, too.
    assert median_ratio(lambda: time_epoch(trainer, images, labels), lambda: list(loader), pairs=8) < 0.65
