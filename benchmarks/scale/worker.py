"""A process that is measured, alone or as one of a job.

python benchmarks/scale/worker.py TASK        started by measure.py; the task is JSON, see work()
"""

import json
import os
import socket
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mnist
from benchmarks.reporting import time_epoch
from benchmarks.scale.model import Pace
from benchmarks.scale.plan import BATCH, PARAMETERS, SIZES, VARIANTS

DATA = Path(__file__).parents[2] / "datasets"
PORT = 5001  # of the plain transfer that measures a link


class Pause(torch.autograd.Function):
    """Layers that sleep instead of computing, and whose gradients are 0."""

    @staticmethod
    def forward(ctx, signal, forward, backward, *parameters):
        ctx.save_for_backward(*parameters)
        ctx.pause = backward
        time.sleep(forward)
        return signal.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(ctx.pause)
        return gradient, None, None, *(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


class Sleeper(nn.Module):
    """The parameters of mnist.Net, with gradients that come when those of mnist.Net would."""

    def __init__(self, pace):
        super().__init__()
        self.net, self.pace = mnist.Net(), pace

    def forward(self, signal):
        net, pace = self.net, self.pace
        convolutions = [*net.conv1.parameters(), *net.conv2.parameters()]
        linear = [*net.fc1.parameters(), *net.fc2.parameters()]
        signal = Pause.apply(signal, pace.rest, pace.tail, *reversed(convolutions))
        return Pause.apply(signal, 0, pace.head, *reversed(linear))


def distribute(model, variant):
    """Return the model with its gradients averaged in one of the VARIANTS."""
    shared = DistributedDataParallel(model, **VARIANTS[variant])
    if variant == "bfloat16":
        shared.register_comm_hook(None, default_hooks.bf16_compress_hook)
    return shared


def bench_in_earnest(job, variant, data):
    """Return a function that trains for so many steps, and returns how long it took; and the model."""
    mnist.settle_in()
    trainer = mnist.Trainer(mnist.Hyperparameters(), job)
    if job.world_size > 1:
        trainer.network = distribute(trainer.learner, variant)

    def run(steps):
        samples = steps * BATCH * job.world_size
        return time_epoch(trainer, *(tensor[:samples] for tensor in data))

    return run, trainer.network


def bench_asleep(job, variant, pace):
    """Do as bench_in_earnest, but sleep where that computes."""
    model = distribute(Sleeper(pace), variant)
    signal = torch.ones(1, requires_grad=True)

    def run(steps):
        begin = time.perf_counter()
        for _ in range(steps):
            job.stop_if_asked()
            model.zero_grad()
            model(signal).sum().backward()
        return time.perf_counter() - begin

    return run, model


def measure_steps(job, run, model, steps):
    """Return the seconds of a step, all together and each on its own, and the bytes in DDP's buckets."""
    agree, several = job.stop_if_asked, job.world_size > 1
    run(2)  # to warm up; and DDP settles its buckets after the first step
    job.sum(0)  # a barrier
    result = {"together": run(steps) / steps}
    if several:
        job.sum(0)
        job.stop_if_asked = lambda: None
        with model.no_sync():
            result["alone"] = run(steps) / steps
        job.stop_if_asked = agree
        logged = model._get_ddp_logging_data()
        result["buckets"] = logged.get("rebuilt_bucket_sizes") or logged.get("bucket_sizes")
    return result


def measure_pace(run, model, steps):
    """Return the Pace of a process that trains alone."""
    moments = []
    stamp = lambda *_: moments.append(time.perf_counter())  # noqa: E731
    handles = [
        model.register_forward_hook(stamp),
        model.fc1.weight.register_post_accumulate_grad_hook(stamp),
        model.conv1.weight.register_post_accumulate_grad_hook(stamp),
    ]
    whole = run(steps) / steps
    for handle in handles:
        handle.remove()
    head = statistics.median(b - a for a, b in zip(moments[::3], moments[1::3], strict=True))
    tail = statistics.median(b - a for a, b in zip(moments[1::3], moments[2::3], strict=True))
    return asdict(Pace(whole - head - tail, head, tail))


def measure_all_reduce(job, elements, times):
    """Return the low quartile, median and high quartile of the seconds of so many all-reduces of float32."""
    tensor, seconds = torch.zeros(elements), []
    job.sum(0)  # a barrier; none in between, which some would leave before others
    for _ in range(times + 1):
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        seconds.append(time.perf_counter() - begin)
    return np.percentile(seconds[1:], [25, 50, 75]).tolist()


def measure_link(job, size):
    """Return Mbit/s of a plain TCP transfer from rank 1 to rank 0, and the seconds of a round trip."""
    pieces = None
    if job.rank == 0:
        listener = socket.create_server(("0.0.0.0", PORT))
        job.sum(0)  # now it listens
        connection, _ = listener.accept()
        with listener, connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pieces = [(ping(connection), receive(connection, size)) for _ in range(4)]
    else:
        job.sum(0)
        if job.rank == 1:
            with socket.create_connection((os.environ["MASTER_ADDR"], PORT)) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for _ in range(4):
                    connection.sendall(connection.recv(1))
                    connection.recv(1)
                    connection.sendall(bytes(size))
    job.sum(0)
    if pieces:
        trips, transfers = zip(*pieces, strict=True)
        # The first transfers find out how fast the link is.
        return {"mbit": size * 8e-6 / statistics.median(transfers[1:]), "round_trip": min(trips)}


def ping(connection):
    """Return the seconds until a byte is back."""
    begin = time.perf_counter()
    connection.sendall(b"?")
    connection.recv(1)
    return time.perf_counter() - begin


def receive(connection, size):
    """Ask for `size` bytes. Returns the seconds until all are here."""
    begin = time.perf_counter()
    connection.sendall(b"!")
    while size > 0:
        size -= len(connection.recv(1 << 20))
    return time.perf_counter() - begin


def bytes_sent():
    return int(Path("/sys/class/net/eth0/statistics/tx_bytes").read_text())


def work(task):
    """Measure what `task` says, as one of the processes of a job. Rank 0 writes the results down."""
    job, steps, result = mnist.Job.from_environment(), task["steps"], {"steps": {}}
    with job.connected("gloo", 120):
        if rate := task.get("rate"):
            result["link"] = measure_link(job, int(max(2e6, rate * 1e6 / 8 * 0.3)))
            before = bytes_sent()
            result["large"] = measure_all_reduce(job, SIZES["large"], steps)
            result["sent"] = (bytes_sent() - before) / (1 + steps) / (4 * PARAMETERS)
            result["middle"] = measure_all_reduce(job, SIZES["middle"], 3 * steps)
            result["small"] = measure_all_reduce(job, SIZES["small"], 10 * steps)
            pace = Pace(**task["pace"])
            for variant in task["variants"]:
                run, model = bench_asleep(job, variant, pace)
                result["steps"][f"asleep, {variant}"] = measure_steps(job, run, model, steps)
        if task["in_earnest"]:
            data, _ = mnist.load_mnist(DATA)
            run, model = bench_in_earnest(job, "default", data)
            result["steps"]["in earnest"] = measure_steps(job, run, model, steps)
            if job.world_size == 1:
                result["pace"] = measure_pace(run, model, steps)
        job.sum(0)  # a barrier: no one leaves early
    if job.rank == 0:
        Path(task["output"]).write_text(json.dumps(result))


if __name__ == "__main__":
    work(json.loads(sys.argv[1]))
