"""What all peers share: their flags, their reports, and the digits. Imports no library of any of them.

A peer is started as `python benchmarks/peers/NAME.py --epochs N --threads N [--images N] [--own] [--gpu]`.
It prints JSON lines to standard output: {"ready": true} when all is set up and training begins, and after
each epoch {"epoch": 1, "seconds": 30.1, "accuracy": 0.9834}, where the seconds are those of training and
evaluation.
"""

import argparse
import json
import time
from pathlib import Path

DATA = Path(__file__).parents[2] / "datasets"
PARAMETERS = 1_199_882
# The same work for all: the method of PyTorch's own example.
BATCH, TEST_BATCH = 64, 1000
RATE, GAMMA, RHO, EPSILON = 1.0, 0.7, 0.9, 1e-6  # of Adadelta; the last two are PyTorch's defaults
MEAN, STD = 0.1307, 0.3081


def parse_arguments(description, own=False, gpu=False):
    """Return the flags' values.

    `own` says that the library's own example has a network of its own, `gpu` that it can use a GPU here.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, help="only so many for training, and for evaluation")
    if own:
        parser.add_argument("--own", action="store_true", help="the example's own network and recipe")
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="train on the GPU")
    return parser.parse_args()


class Reports:
    """Prints the lines that the runner reads."""

    def __init__(self):
        self.epoch = 0

    def ready(self):
        print(json.dumps({"ready": True}), flush=True)
        self.begin = time.perf_counter()

    def finished_epoch(self, accuracy):
        """Report an epoch: it began when the one before was reported."""
        now = time.perf_counter()
        self.epoch += 1
        line = {"epoch": self.epoch, "seconds": now - self.begin, "accuracy": float(accuracy)}
        print(json.dumps(line), flush=True)
        self.begin = now


def arrays(images=None):
    """Return the training set and the test set, each as (uint8 [N, 28, 28], int64 [N]), for numpy users."""
    import numpy as np

    def read(name, header, *shape):
        contents = np.frombuffer((DATA / "MNIST" / "raw" / name).read_bytes(), np.uint8, offset=header)
        return contents.reshape(-1, *shape)[:images]

    return [
        (
            read(f"{part}-images-idx3-ubyte", 16, 28, 28),
            read(f"{part}-labels-idx1-ubyte", 8).astype("int64"),
        )
        for part in ("train", "t10k")
    ]
