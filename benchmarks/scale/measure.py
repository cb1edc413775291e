"""Starts the processes that are measured, on this machine and on hosts of its own; collects what they saw."""

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from benchmarks.scale.plan import FITTED, HELD_OUT, HERE, IN_EARNEST, VARIANTS, VARIED
from tests.conftest import clean_environment
from tests.hosts import Process, PyTorchJob, ip

WORKER = Path(__file__).resolve().with_name("worker.py")
SWITCH = WORKER.with_name("delay.py")


@contextmanager
def linked(link, folder):
    """Make the hosts of a Link. Returns them as a PyTorchJob."""
    with PyTorchJob(folder, workers=link.hosts - 1) as job:
        for host in job.hosts:
            # What may pass at once has to be more than the 64 KB in which Linux hands streams on.
            limit = ["tbf", "rate", f"{link.rate}mbit", "burst", "128kb", "limit", "8mb"]
            command = ["tc", "-n", host.name, "qdisc", "add", "dev", "eth0", "root", *limit]
            subprocess.run(command, check=True)
        if not link.delay:
            yield job
            return
        ports = [host.link for host in job.hosts]
        for port in ports:
            ip("-n", job.bridge, "link", "set", port, "nomaster")  # off its bridge, on to our switch
        command = ["ip", "netns", "exec", job.bridge, sys.executable, SWITCH, link.delay, *ports]
        switch = Process(command, Path(folder, "switch.log"))
        try:
            assert switch.until("ready"), switch.output
            yield job
        finally:
            switch.kill_all()


def measure_hosts(link, folder, **task):
    """Return what the processes on these hosts measure."""
    output = Path(folder, "result.json")
    task = {"output": str(output), "rate": link.rate} | task
    with linked(link, folder) as job:
        processes = job.start(WORKER, json.dumps(task))
        for process in processes:
            code, printed = process.end(600)
            assert code == 0, printed
    return json.loads(output.read_text())


def measure_here(processes, threads, folder, **task):
    """Return what so many processes of this machine measure, with so many threads each."""
    output = Path(folder, "result.json")
    task = {"output": str(output), "in_earnest": True} | task
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        command += [f"--nproc-per-node={processes}"]
    command += [WORKER, json.dumps(task)]
    subprocess.run(command, check=True, env=clean_environment(OMP_NUM_THREADS=threads))
    return json.loads(output.read_text())


def measure(steps, folder):
    """Return the results of every configuration, by its name."""
    results = {}
    for name, how in HERE.items():
        results[name] = measure_here(*how, folder, steps=5 * steps)
    pace = results["1 process, 1 thread"]["pace"]
    for link in [*FITTED, *HELD_OUT]:
        print(f"{time.strftime('%X')} {link}", flush=True)
        variants = list(VARIANTS) if link in VARIED else ["default"]
        task = {"steps": steps, "pace": pace, "variants": variants, "in_earnest": link in IN_EARNEST}
        results[str(link)] = measure_hosts(link, folder, **task)
    return results
