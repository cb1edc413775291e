"""How training scales over processes and hosts, and how it would over more of them than there are here.

    sudo make scale                                        all of it: half an hour, on a quiet machine
    .venv/bin/python benchmarks/scale.py --rounds 1 --steps 4     a trial; with --output DIR, to look at only

Root is needed, for hosts: network namespaces that send at a limited rate over a wire of some length. Every
round measures every configuration once, so that whatever else the machine does falls on all alike. A model
of the time of a step is fitted to what was seen, and tried on what it was not shown. The results go to
scale.json, scale.png and, between two marks, SCALE.md.

More hosts than cores cannot compute side by side, but they can wait: there, computing is replaced by
sleeping for as long as it takes one undisturbed process, in the places where a step computes.
"""

import argparse
import json
import logging
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import mnist
from benchmarks.reporting import processor, replace_between

ROOT = Path(__file__).resolve().parents[1]
BATCH, IMAGES = 64, 60_000
PARAMETERS = 1_199_882
SIZES = {"large": PARAMETERS, "middle": 40_000, "small": 1}  # of the all-reduces that are measured
# DDP's buckets with its defaults: the linear layers, whose gradients are the first, and the convolutions.
BUCKETS = (4 * 1_181_066, 4 * 18_816)
AGREEMENT = 8  # bytes: mnist.py agrees at every step on whether to stop
PORT = 5001  # of the plain transfer that measures a link


@dataclass(frozen=True)
class Link:
    """So many hosts, each of which sends at a rate in Mbit/s; a frame is under way for `delay` seconds."""

    hosts: int
    rate: int
    delay: float = 0

    def __str__(self):
        rate = f"{self.rate // 1000} Gbit/s" if self.rate % 1000 == 0 else f"{self.rate} Mbit/s"
        return f"{self.hosts} hosts, {rate}" + (f", {self.delay * 1000:g} ms" if self.delay else "")


# With a delay, all hosts together can have no more than 3 Gbit/s: that is what delay.py hands on.
FITTED = [
    Link(2, 10_000),
    *(Link(2, rate, delay) for rate in (1000, 100) for delay in (0, 0.001, 0.01)),
    Link(3, 10_000),
    Link(3, 100, 0.001),
    Link(3, 300, 0.01),
    Link(4, 1000),
    Link(4, 100),
    Link(4, 300, 0.001),
    Link(4, 300, 0.01),
]
HELD_OUT = [Link(3, 1000), Link(2, 300, 0.005), Link(4, 100, 0.005), Link(8, 100, 0.001), Link(8, 300, 0.01)]
# Where processes compute in earnest too: the last with more of them than cores, to see what that does.
IN_EARNEST = [Link(2, 10_000), Link(2, 1000), Link(2, 100), Link(2, 1000, 0.001), Link(4, 1000)]
VARIED = [Link(2, 100), Link(2, 1000), Link(2, 1000, 0.01)]
VARIANTS = {
    "default": {},
    "buckets of 1 MB": {"bucket_cap_mb": 1},
    "buckets of 5 MB": {"bucket_cap_mb": 5},
    "buckets of 25 MB": {"bucket_cap_mb": 25},
    "bfloat16": {},
}
PREDICTED = [2**power for power in range(11)]
NETWORKS = {"10 Gbit/s": (10_000, 0.0001), "1 Gbit/s": (1000, 0.0001)}


# --- The model ----------------------------------------------------------------------------------


@dataclass
class Pace:
    """The seconds of a step that computes: up to the backward pass, to fc1's gradients, to the last."""

    rest: float
    head: float
    tail: float

    @property
    def step(self):
        return self.rest + self.head + self.tail


@dataclass
class Model:
    """What communication costs, in seconds where nothing else is said."""

    start: float  # once in an all-reduce
    hop: float  # a piece that is waited for, on its way to the next worker of the ring
    trips: float  # how many of the wire's delays that takes
    asks: float  # how many more where a worker has to be ready for the piece before it is sent
    byte: float  # to copy and add up a byte
    frames: float  # the bytes on the wire for each byte: headers are sent too
    bucket: float = 0.0  # to DDP, for each of its buckets

    @property
    def costs(self):
        return np.array([self.start, self.hop, self.trips, self.asks, self.byte, self.frames])

    def all_reduce(self, workers, size, rate, delay):
        """Return the seconds for `size` bytes, where each worker sends at `rate` Mbit/s."""
        return float(max(bounds(workers, size, rate, delay) @ self.costs))

    def step(self, pace, workers, rate, delay, buckets=BUCKETS):
        """Return the seconds of a step: agreement, computing, and what computing does not hide of the rest.

        A bucket is sent when its gradients are there. gloo sends two at a time, so they wait for the wire's
        delay together, but share its bandwidth.
        """
        if workers == 1:
            return pace.step
        agreement = self.all_reduce(workers, AGREEMENT, rate, delay)
        ready = [agreement + pace.rest + pace.head, agreement + pace.step][-len(buckets) :]
        ends = [
            there + self.all_reduce(workers, size, rate, delay)
            for size, there in zip(buckets, ready, strict=True)
        ]
        busy = max(bounds(workers, sum(buckets), rate, delay)[:2] @ self.costs)
        return float(max(*ends, ready[0] + busy)) + self.bucket * len(buckets)


def bounds(workers, size, rate, delay):
    """Return what an all-reduce has of each of the Model's costs, in rows: it takes as long as the longest.

    gloo cuts the bytes into pieces, two or more for each worker and of no more than 1 MB, and passes them
    around a ring, first to add them up and then to tell the sums. Two are under way at a time. So either the
    wire is always busy, or the processor is, or each piece waits until the one two before it is there.
    """
    if workers == 1:
        return np.zeros((1, 6))
    if size <= AGREEMENT:
        # A number is a single piece. Who sent it first has the sum after a whole round, and starts the next
        # all-reduce while the others are still told of this one; they then have to be ready for it.
        return np.array([[1, workers, workers * delay, 2 * (workers > 2) * delay, 0, 0]])
    pieces = math.ceil(max(2 * workers, size / 2**20) / workers) * workers
    passed, piece = pieces - pieces // workers, size / pieces  # in each half
    pairs = math.ceil(passed / 2)
    wire, processor = 2 * passed * piece * 8e-6 / rate, 2 * passed * piece
    waited = (pairs + (passed % 2 == 0)) / passed  # the part of this that falls between waiting and waiting
    return np.array(
        [
            [1, 2, 2 * delay, 2 * delay, 0, wire],
            [1, 2, 2 * delay, 2 * delay, processor, 0],
            [1, 2 * pairs, 2 * pairs * delay, 2 * pairs * delay, waited * processor, waited * wire],
        ]
    )


def least_squares(matrix, sums):
    """Return costs, none of them below 0, with which the rows come to about these sums."""
    used = list(range(matrix.shape[1]))
    while True:
        scale = np.linalg.norm(matrix[:, used], axis=0) + 1e-300  # for their sizes lie far apart
        costs = np.linalg.lstsq(matrix[:, used] / scale, sums, rcond=None)[0]
        if min(costs) >= 0:
            break
        del used[int(np.argmin(costs))]
    found = np.zeros(matrix.shape[1])
    found[used] = costs / scale
    return found.tolist()


def fit(all_reduces, steps=()):
    """Return the Model whose errors are least, as ratios to what was measured.

    `all_reduces` are (workers, bytes, rate, delay, seconds), `steps` (pace, workers, rate, delay, seconds).
    """
    seconds = np.array([row[-1] for row in all_reduces])
    rows = [bounds(*row[:-1]) for row in all_reduces]
    model = Model(start=0, hop=1e-4, trips=1, asks=1, byte=2e-9, frames=1.05)
    for _ in range(50):  # which of its bounds an all-reduce keeps to depends on the costs that are looked for
        matrix = np.array([each[np.argmax(each @ model.costs)] for each in rows]) / seconds[:, None]
        # Not the squares of the errors count but their sizes: a few odd measurements must not spoil the rest.
        weights = np.maximum(abs(matrix @ model.costs - 1), 0.01) ** -0.5
        model = Model(*least_squares(matrix * weights[:, None], weights))
    if steps:
        squares = np.array([seconds**-2 for *_, seconds in steps])
        missing = np.array([seconds - model.step(*place) for *place, seconds in steps])
        model.bucket = max(0.0, float((squares * missing).sum() / squares.sum()) / len(BUCKETS))
    return model


# --- A process that is measured -----------------------------------------------------------------


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
    args = mnist.parse_arguments(["--log-interval", "999999"])
    trainer = mnist.Trainer(args, job, torch.device("cpu"))
    model = trainer.learner if job.world_size == 1 else distribute(trainer.learner, variant)

    def run(steps):
        samples = steps * BATCH * job.world_size
        trainer.begin(trainer.epoch + 1)  # in another order
        trainer.train(model, *(tensor[:samples] for tensor in data))
        assert trainer.optimizer.state, "the optimiser had nothing to do"
        return trainer.seconds

    return run, model


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
            data, _ = mnist.load_mnist(ROOT / "datasets")
            run, model = bench_in_earnest(job, "default", data)
            result["steps"]["in earnest"] = measure_steps(job, run, model, steps)
            if job.world_size == 1:
                result["pace"] = measure_pace(run, model, steps)
        job.sum(0)  # a barrier: no one leaves early
    if job.rank == 0:
        Path(task["output"]).write_text(json.dumps(result))


# --- The processes and their hosts --------------------------------------------------------------


@contextmanager
def linked(link, folder):
    """Make the hosts of a Link. Returns them as a PyTorchJob."""
    from tests.hosts import Process, PyTorchJob, ip  # not at the top: who is measured does without pytest

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
        delay = Path(__file__).with_name("delay.py")
        command = ["ip", "netns", "exec", job.bridge, sys.executable, delay, link.delay, *ports]
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
        processes = job.start(__file__, "--work", json.dumps(task))
        for process in processes:
            code, printed = process.end(600)
            assert code == 0, printed
    return json.loads(output.read_text())


def measure_here(processes, threads, folder, **task):
    """Return what so many processes of this machine measure, with so many threads each."""
    from tests.conftest import clean_environment

    output = Path(folder, "result.json")
    task = {"output": str(output), "in_earnest": True} | task
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--local-addr=localhost"]
        command += [f"--nproc-per-node={processes}"]
    command += [__file__, "--work", json.dumps(task)]
    subprocess.run(command, check=True, env=clean_environment(OMP_NUM_THREADS=threads))
    return json.loads(output.read_text())


HERE = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}


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


# --- What it comes to ----------------------------------------------------------------------------


def middle(rounds, *path):
    """Return the low quartile, median and high quartile over the rounds of what is at `path` in each."""
    values = []
    for value in rounds:
        for key in path:
            value = value[key]
        values.append(np.median(value))
    return np.percentile(values, [25, 50, 75])


def observed(rounds, link):
    """Return the medians for a Link: what fit() takes of all-reduces, and of a step."""
    name, place = str(link), (link.hosts, link.rate, link.delay)
    workers, *wire = place
    all_reduces = [
        (workers, 4 * elements, *wire, middle(rounds, name, kind)[1]) for kind, elements in SIZES.items()
    ]
    pace = Pace(
        *(middle(rounds, "1 process, 1 thread", "pace", part)[1] for part in ("rest", "head", "tail"))
    )
    steps = ("steps", "asleep, default")
    pace.rest += middle(rounds, name, *steps, "alone")[1] - pace.step  # one oversleeps
    return all_reduces, (pace, *place, middle(rounds, name, *steps, "together")[1])


def fit_rounds(rounds):
    """Return the Model of what these rounds have measured."""
    rows = [observed(rounds, link) for link in FITTED]
    return fit([row for all_reduces, _ in rows for row in all_reduces], [step for _, step in rows])


def predict(rounds):
    """Return {network: [(workers, quartiles of the seconds of a step)]}, a Model fitted to each round."""
    models = [(fit_rounds([one]), Pace(**one["1 process, 1 thread"]["pace"])) for one in rounds]
    return {
        name: [
            (workers, np.percentile([m.step(pace, workers, *wire) for m, pace in models], [25, 50, 75]))
            for workers in PREDICTED
        ]
        for name, wire in NETWORKS.items()
    }


def table(head, rows):
    """Return a table in Markdown; all columns but the first are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(quartiles, factor=1.0, form=".1f"):
    """Return "median (quartile to quartile)"."""
    low, mid, high = sorted(float(value) * factor for value in quartiles)
    return f"{mid:{form}} ({low:{form}} to {high:{form}})"


def here_table(rounds):
    rows = []
    for name, (processes, _) in HERE.items():
        step = 1 / middle(rounds, name, "steps", "in earnest", "together")
        rows.append([name, spread(step), spread(step, BATCH * processes, ".0f")])
    return table(["this machine", "steps/s", "images/s"], rows)


def links_table(rounds, model):
    rows = []
    for link in FITTED:
        name = str(link)
        (reduced, *_), (pace, *_, together) = observed(rounds, link)
        error = model.all_reduce(*reduced[:-1]) / reduced[-1] - 1
        rows.append(
            [
                name,
                f"{middle(rounds, name, 'link', 'mbit')[1]:.0f}",
                f"{middle(rounds, name, 'link', 'round_trip')[1] * 1000:.2f}",
                spread(middle(rounds, name, "large"), 1000),
                f"{error:+.0%}",
                spread(middle(rounds, name, "steps", "asleep, default", "together"), 1000),
                f"{1 - pace.step / together:.0%}",
                f"{pace.step / together:.0%}",
            ]
        )
    head = ["hosts and their links", "Mbit/s seen", "round trip, ms", "all-reduce, ms", "model's error"]
    return table([*head, "step, ms", "of it communication", "efficiency"], rows)


def earnest_table(rounds):
    rows = []
    for link in IN_EARNEST:
        cells = []
        for how in ("in earnest", "asleep, default"):
            together, alone = (
                middle(rounds, str(link), "steps", how, part) for part in ("together", "alone")
            )
            cells += [spread(together, 1000), f"{1 - alone[1] / together[1]:.0%}"]
        rows.append([link, *cells])
    head = ["computing in earnest, or asleep", "step, ms", "of it communication"]
    return table([*head, "asleep, ms", "of it communication"], rows)


def variants_table(rounds):
    rows = []
    for variant in VARIANTS:
        steps = ("steps", f"asleep, {variant}")
        buckets = rounds[0][str(VARIED[0])][steps[0]][steps[1]]["buckets"]
        cells = [spread(middle(rounds, str(link), *steps, "together"), 1000) for link in VARIED]
        rows.append([variant, buckets, *cells])
    return table(["ms per step", "DDP's buckets, bytes", *VARIED], rows)


def held_out_table(rounds, model):
    rows = []
    for link in HELD_OUT:
        (large, _, small), (*place, together) = observed(rounds, link)
        cells = [link]
        for seen, predicted in (
            (large[-1], model.all_reduce(*large[:-1])),
            (small[-1], model.all_reduce(*small[:-1])),
            (together, model.step(*place)),
        ):
            cells += [f"{seen * 1000:.1f}", f"{predicted * 1000:.1f}", f"{predicted / seen - 1:+.0%}"]
        rows.append(cells)
    head = ["kept from the fit"]
    for what in ("all-reduce", "of one number", "step"):
        head += [f"{what}, ms", "model", "error"]
    return table(head, rows)


def prediction_table(predicted):
    rows = []
    for number, workers in enumerate(PREDICTED):
        cells = [workers, max(1, round(IMAGES / BATCH / workers))]
        for steps in predicted.values():
            step, one = steps[number][1], steps[0][1][1]
            cells += [spread(step, 1000), f"{BATCH * workers / step[1]:,.0f}", f"{one / step[1]:.0%}"]
        rows.append(cells)
    head = ["workers", "steps of an epoch"]
    for name in predicted:
        head += [f"{name}: step, ms", "images/s", "efficiency"]
    return table(head, rows)


def costs_table(models):
    what = {
        "start": ("an all-reduce, µs", 1e6),
        "hop": ("a hop, µs", 1e6),
        "trips": ("a hop, in delays of the wire", 1),
        "asks": ("to be ready for it, in delays of the wire", 1),
        "byte": ("a byte that is moved, ns", 1e9),
        "frames": ("a byte that is moved, bytes on the wire", 1),
        "bucket": ("one of DDP's buckets, µs", 1e6),
    }
    rows = []
    for name, (meaning, factor) in what.items():
        values = np.percentile([getattr(model, name) for model in models], [25, 50, 75])
        rows.append([meaning, spread(values, factor, ".3g")])
    return table(["the model: what it costs", "fitted to each round"], rows)


def report(rounds, about):
    """Return what stands in SCALE.md: all tables."""
    model = fit_rounds(rounds)
    how = f"{len(rounds)} round(s) of {about['steps']} steps"
    where = f"torch {about['torch']}, {about['cpu']}, TCP with {about['tcp']}"
    seen = f"Seen in {how} on {where}. Medians, with quartiles of the rounds in parentheses."
    tables = [
        here_table(rounds),
        links_table(rounds, model),
        earnest_table(rounds),
        variants_table(rounds),
        costs_table([fit_rounds([one]) for one in rounds]),
        held_out_table(rounds, model),
        prediction_table(predict(rounds)),
        agreement_note(model),
    ]
    return "\n\n".join([seen, *tables])


def agreement_note(model):
    """Return a sentence on what it costs many workers to agree at every step."""
    costs = [f"{model.all_reduce(PREDICTED[-1], AGREEMENT, *wire) * 1000:.0f}" for wire in NETWORKS.values()]
    times = " and ".join(f"{cost} ms at {name}" for cost, name in zip(costs, NETWORKS, strict=True))
    return f"Of a step of {PREDICTED[-1]:,} workers, the agreement on whether to stop takes {times}."


def draw(rounds, path):
    """Draw what is predicted, and what was seen, over the number of workers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot, ticker

    pyplot.rcParams["font.size"] = 11
    figure, (checked, left, right) = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    draw_errors(rounds, checked)
    styles = zip(predict(rounds).items(), ("#0072B2", "#D55E00"), ("o-", "s--"), strict=True)
    for (name, steps), colour, line in styles:
        workers = np.array([number for number, _ in steps])
        low, mid, high = np.array([seconds for _, seconds in steps]).T
        left.plot(workers, mid * 1000, line, color=colour, label=name)
        left.fill_between(workers, low * 1000, high * 1000, color=colour, alpha=0.25, linewidth=0)
        right.plot(workers, workers * BATCH / mid, line, color=colour, label=name)
    left.axhline(mid[0] * 1000, color="0.4", linestyle=":", label="computing alone")
    right.plot(workers, workers * BATCH / mid[0], color="0.4", linestyle=":", label="without communication")
    left.set(title="A step: the model", ylabel="milliseconds")
    right.set(title="Throughput: the model", ylabel="images per second")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set(xlabel="workers, each with a batch of 64", xticks=PREDICTED[::2], xticklabels=PREDICTED[::2])
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    left.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    left.yaxis.set_minor_formatter(ticker.NullFormatter())
    for axis in (left.yaxis, checked.xaxis, checked.yaxis):
        axis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_errors(rounds, axes):
    """Draw what the model says of each all-reduce over what was measured."""
    model = fit_rounds(rounds)
    groups = (("fitted", FITTED, "#0072B2", "o"), ("kept from the fit", HELD_OUT, "#D55E00", "D"))
    for label, links, colour, marker in groups:
        rows = [row for link in links for row in observed(rounds, link)[0]]
        seen, said = [row[-1] * 1000 for row in rows], [model.all_reduce(*row[:-1]) * 1000 for row in rows]
        axes.scatter(seen, said, color=colour, marker=marker, label=label, alpha=0.8)
    ends = np.array(axes.get_xlim())
    ends[0] = 0.05
    axes.plot(ends, ends, color="0.4", linestyle=":", label="no error")
    axes.set(title="All-reduces: is the model right?", xscale="log", yscale="log")
    axes.set(xlabel="milliseconds measured", ylabel="milliseconds by the model")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", metavar="N", type=int, default=5)
    parser.add_argument("--steps", metavar="N", type=int, default=10, help="in a row (default: 10)")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path(__file__).parent)
    parser.add_argument("--again", action="store_true", help="measure nothing, read DIR/scale.json")
    parser.add_argument("--work", help=argparse.SUPPRESS)  # a process that is measured
    args = parser.parse_args()
    logging.disable(logging.INFO)
    if args.work:
        work(json.loads(args.work))
        return
    raw, page = args.output / "scale.json", args.output / "SCALE.md"
    if args.again:
        results = json.loads(raw.read_text())
    else:
        mnist.unpack_mnist(ROOT / "datasets")
        about = {
            "torch": torch.__version__,
            "cpu": f"{os.cpu_count()} cores of {processor()}",
            "steps": args.steps,
        }
        about["tcp"] = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        results = {"about": about, "rounds": []}
        args.output.mkdir(parents=True, exist_ok=True)
        for number in range(1, args.rounds + 1):
            print(f"round {number} of {args.rounds}")
            with tempfile.TemporaryDirectory() as folder:
                results["rounds"].append(measure(args.steps, folder))
            raw.write_text(json.dumps(results, indent=1) + "\n")  # now, lest a later round should fail
    draw(results["rounds"], args.output / "scale.png")
    text = page.read_text() if page.exists() else "<!-- scale -->\n<!-- /scale -->\n"
    page.write_text(replace_between(text, "scale", report(results["rounds"], results["about"])))


if __name__ == "__main__":
    main()
