"""Python programs in forks of a process that has PyTorch already, which takes seconds to load at each start.

This module is loaded in each fork, so it loads little itself.
"""

import multiprocessing
import os
import runpy
import sys

FORKS = multiprocessing.get_context("forkserver")
# The trainer's imports, and what its optimiser brings in. None starts a thread, which a fork would lack.
FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "filelock"])


def become(command, log, folder, environment):
    """Let this fork be `python command…` in a folder, with an environment, printing to a file."""
    import torch

    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), stream)
    sys.stdout.reconfigure(line_buffering=True)
    if "OMP_NUM_THREADS" in environment:  # PyTorch reads it only when it is loaded
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv[:], sys.path[0] = command, folder
    runpy.run_path(command[0], run_name="__main__")
