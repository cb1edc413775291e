"""What is measured, and the hosts and processes for it."""

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.scale.model import Link
from rig.hosts import PyTorchJob
from rig.processes import clean_environment
from rig.project import ROOT

WORKER = ["-m", "benchmarks.scale.worker"]
# On this machine, without hosts: how many processes, with how many threads each.
ONE = "1 process, 1 thread"
HERE = {ONE: (1, 1), "1 process, 2 threads": (1, 2), "2 processes, 1 thread each": (2, 1)}
HERE_LONGER = 5  # times as many steps as on hosts
# The model is fitted to some links, and tried on others that have more hosts.
FITTED = [Link(2, 10), Link(2, 1), Link(2, 0.1), Link(3, 10), Link(3, 1)]
HELD_OUT = [Link(4, 1), Link(4, 0.1)]


def measure(steps, folder):
    """Return the seconds that were seen of every configuration, by its name."""
    seen = {name: measure_here(*how, folder, HERE_LONGER * steps) for name, how in HERE.items()}
    for link in FITTED + HELD_OUT:
        print(f"{time.strftime('%X')} {link}", flush=True)
        seen[str(link)] = measure_hosts(link, folder, steps, seen[ONE]["step"])
    return seen


def measure_here(processes, threads, folder, steps):
    """Return what is seen by so many processes that train here, with so many threads each."""
    output = Path(folder, "seen.json")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
    command += [f"--nproc-per-node={processes}", *WORKER, output, str(steps)]
    subprocess.run(command, check=True, cwd=ROOT, env=clean_environment(OMP_NUM_THREADS=threads))
    return json.loads(output.read_text())


def measure_hosts(link, folder, steps, seconds):
    """Return what is seen by a process on each host, which sleeps for so long where a step computes."""
    output = Path(folder, "seen.json")
    with PyTorchJob(folder, workers=link.hosts - 1) as job:
        for host in job.hosts:
            # The burst must exceed the 64 KB in which Linux hands streams on, or these would not pass at all.
            limit = ["tbf", "rate", f"{link.rate}gbit", "burst", "128kb", "limit", "8mb"]
            subprocess.run(["tc", "-n", host.name, "qdisc", "add", "dev", "eth0", "root", *limit], check=True)
        for process in job.start(*WORKER, output, str(steps), str(seconds), PYTHONPATH=ROOT):
            code, printed = process.end(600)
            assert code == 0, printed
    return json.loads(output.read_text())
