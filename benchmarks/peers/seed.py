"""The method of the tutorial that this one descends from.

It is PyTorch's own example but for two things: its dropout leaves out whole channels of the images, and it
shuffles the test set. Like there, the training set is not shuffled.
"""

import warnings

import torch.nn as nn
from pytorch_example import main

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="dropout2d")  # it also uses it on what are no images any more
    main(__doc__, dropout=nn.Dropout2d, shuffle_on_gpu=False, shuffle_test=True)
