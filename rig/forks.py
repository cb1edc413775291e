"""Python programs in forks of a process that has PyTorch already, which takes seconds to load at each start.

This module is loaded in each fork, so it loads little itself.
"""

import ctypes
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")


def preload(*more):
    """Let forks have the trainer's imports, what its optimiser brings in, and more, from the first fork on.

    None may start a thread, which a fork would lack.
    """
    FORKS.set_forkserver_preload(["torch._dynamo", "torch.distributed.run", "filelock", *more])


preload()


def enter(host):
    """Move this process to a host of hosts.py, as `ip netns exec` and `unshare --uts` do."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(name, *arguments):
        arguments = (each.encode() if isinstance(each, str) else each for each in arguments)
        if getattr(libc, name)(*arguments):
            raise OSError(ctypes.get_errno(), name)

    with open(f"/run/netns/{host}") as namespace:
        call("setns", namespace.fileno(), 0)
    call("unshare", 0x04020000)  # mounts and the host's name
    call("mount", "", "/", "none", 0x84000, None)  # all mounts are this process's own from here on
    call("umount2", "/sys", 2)
    call("mount", host, "/sys", "sysfs", 0, None)
    for path in Path("/etc/netns", host).iterdir():
        call("mount", str(path), f"/etc/{path.name}", "none", 0x1000, None)
    socket.sethostname(host)


def become(command, log, folder, environment, host=None):
    """Let this fork be `python command…` in a folder, on a host, with an environment, printing to a file."""
    import torch

    os.setsid()
    if host:
        enter(host)
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
