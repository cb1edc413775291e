"""The trainer of this repository on the first few images, for trials.

    python benchmarks/peers/ours_on_few.py IMAGES FLAGS…      the flags are those of mnist.py

The benchmark itself starts mnist.py as everybody does.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import mnist

load_mnist = mnist.load_mnist


def load_few(*args, **kwargs):
    return tuple((images[:few], labels[:few]) for images, labels in load_mnist(*args, **kwargs))


if __name__ == "__main__":
    few = int(sys.argv[1])
    mnist.load_mnist = load_few
    mnist.main(sys.argv[2:])
