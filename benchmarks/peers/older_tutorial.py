"""The method of D2iQ's tutorial for KUDO for Kubeflow, from which this project's descends.

It differs from PyTorch's own example in three ways: its dropout drops whole channels, it shuffles the test
set, and it never shuffles the training set.
"""

import warnings

import torch.nn as nn
from pytorch_example import main

if __name__ == "__main__":
    warnings.filterwarnings("ignore", message="dropout2d")  # one of them follows a linear layer
    main(__doc__, dropout=nn.Dropout2d, shuffle_on_gpu=False, shuffle_test=True)
