"""What all peers share: their flags, what they print, and the digits. It imports none of their libraries.

python benchmarks/peers/NAME.py --epochs N [--images N] [--own] [--gpu] [--autocast]

A peer prints what the runner also looks for in the log of mnist.py: a line with "Epoch:" when training
begins, and accuracy=0.9834 after each epoch. The runner sets the number of threads in the environment.
"""

import argparse
from pathlib import Path

DATA = Path(__file__).parents[2] / "datasets"
PARAMETERS = 1_199_882
# All peers train as PyTorch's own example does.
BATCH, TEST_BATCH = 64, 1000
RATE, GAMMA, RHO, EPSILON = 1.0, 0.7, 0.9, 1e-6  # of Adadelta; the last two are PyTorch's defaults
MEAN, STD = 0.1307, 0.3081


def parse_arguments(description, *switches):
    """Return the values of the flags. `switches` are those that not all peers have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--images", type=int, help="train on this many images, and test on as many")
    for switch in switches:
        parser.add_argument(switch, action="store_true")
    return parser.parse_args()


def begin():
    print("Epoch: 1", flush=True)


def report(accuracy):
    print(f"accuracy={float(accuracy)}", flush=True)


def arrays(images=None, normalise=True):
    """Return the training set and the test set, each as (float32 [N, 28, 28, 1], int32 [N])."""
    import numpy as np

    def read(name, header, *shape):
        contents = np.frombuffer((DATA / "MNIST" / "raw" / name).read_bytes(), np.uint8, offset=header)
        return contents.reshape(-1, *shape)[:images]

    def digits(part):
        pixels = read(f"{part}-images-idx3-ubyte", 16, 28, 28, 1).astype("float32") / 255
        return (pixels - MEAN) / STD if normalise else pixels

    return [
        (digits(part), read(f"{part}-labels-idx1-ubyte", 8).astype("int32")) for part in ("train", "t10k")
    ]
