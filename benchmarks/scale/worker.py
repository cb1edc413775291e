"""A process that is measured, alone or as one of a job; measure.py starts it.

python -m benchmarks.scale.worker OUTPUT STEPS            trains
python -m benchmarks.scale.worker OUTPUT STEPS SECONDS    sleeps for so long where a step computes
"""

import json
import sys
import time
import timeit
from pathlib import Path
from statistics import mean, median

import torch
import torch.distributed as dist

import mnist
from benchmarks.reporting import time_epoch
from benchmarks.scale.model import ALL_REDUCES, TAIL


class Sleeper(mnist.Net):
    """Sleeps for as long as mnist.Net computes, and has its gradients when that would have them."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep((1 - TAIL) * self.seconds)
        weights = list(self.parameters())
        convolutions = sum(tensor.sum() for tensor in weights[:4])  # two layers, each with weights and biases
        # The backward pass starts at the end, so it comes here after the linear layers.
        convolutions.register_hook(lambda _: time.sleep(TAIL * self.seconds))
        return convolutions + sum(tensor.sum() for tensor in weights[4:])


def train(job, steps):
    """Return the seconds of a step of the trainer."""
    mnist.settle_in()
    trainer = mnist.Trainer(mnist.Hyperparameters(), job)
    if job.world_size > 1:
        trainer.ddp_model = job.distribute(trainer.model)
    samples = steps * trainer.hyperparameters.batch_size * job.world_size
    images, labels = (tensor[:samples] for tensor in mnist.load_mnist("datasets")[0])
    time_epoch(trainer, images, labels)  # to warm up
    job.all_reduce(0)  # a barrier
    return {"step": time_epoch(trainer, images, labels) / steps}


def sleep(job, steps, seconds):
    """Return the seconds of the all-reduces, and of a step without communication and with it."""
    seen = {}
    for name, size in ALL_REDUCES.items():
        seen[name] = median(clock(job, steps, dist.all_reduce, torch.zeros(size // 4)))
    sleeper = Sleeper(seconds)
    seen["compute"] = mean(clock(job, steps, step, sleeper, lambda: None))
    seen["step"] = mean(clock(job, steps, step, job.distribute(sleeper), job.stop_if_asked))
    return seen


def step(network, stop_if_asked):
    """Do what the trainer does in a step, but for the optimiser."""
    stop_if_asked()
    network.zero_grad()
    network(torch.zeros(1)).backward()


def clock(job, times, function, *arguments):
    """Return the seconds of each of so many calls."""
    function(*arguments)  # to warm up
    job.all_reduce(0)  # a barrier; none between the calls, because some would leave it before others
    return timeit.repeat(lambda: function(*arguments), number=1, repeat=times)


if __name__ == "__main__":
    output, steps, *seconds = sys.argv[1:]
    job = mnist.Job.from_environment()
    with job.connected("gloo", timeout=120):
        seen = sleep(job, int(steps), float(*seconds)) if seconds else train(job, int(steps))
        job.all_reduce(0)  # a barrier: nobody leaves early
    if job.rank == 0:
        Path(output).write_text(json.dumps(seen))
