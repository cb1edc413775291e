"""What it costs to agree on stopping at every step, and to save a checkpoint.

python benchmarks/overhead.py                                          one process
torchrun --standalone --nproc-per-node 2 benchmarks/overhead.py        two

Blocks of steps with and without the agreement take turns, on the real digits, so that whatever else the
machine does falls on both alike. Rank 0 prints the ratio of each pair's times and what they have in common.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

import mnist

PAIRS, STEPS = 80, 20


def main():
    job = mnist.Job.from_environment()
    args = mnist.parse_arguments(["--log-interval", "999999"])
    with tempfile.TemporaryDirectory() as args.output_dir, job.connected("gloo", args.timeout):
        if job.local_rank == 0:
            mnist.unpack_mnist(args.data_dir)
        job.sum(0)  # a barrier: now all is unpacked
        (images, labels), _ = mnist.load_mnist(args.data_dir)
        trainer = mnist.Trainer(args, job, torch.device("cpu"))
        model = job.distribute(trainer.learner, images[:1])
        agree, samples = job.stop_if_asked, STEPS * args.batch_size * job.world_size

        def block(stop_if_asked):
            """Return the seconds that so many steps take."""
            job.stop_if_asked = stop_if_asked
            trainer.begin(trainer.epoch + 1)  # in another order
            job.sum(0)  # a barrier
            trainer.train(model, images[:samples], labels[:samples])
            assert trainer.optimizer.state, "the optimiser had nothing to do"
            return trainer.seconds

        block(agree)  # to warm up
        pairs = [(block(agree), block(lambda: None)) for _ in range(PAIRS)]
        begin = time.perf_counter()
        trainer.save()
        saving = time.perf_counter() - begin

    if job.rank == 0:
        ratios = [careful / careless for careful, careless in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4)
        step = statistics.median(careless for _, careless in pairs) / STEPS
        epoch = step * len(images) / args.batch_size / job.world_size
        print(f"{job.world_size} process(es), {PAIRS} pairs of {STEPS} steps of {args.batch_size} images")
        print(f"with the agreement / without: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}")
        print(f"a checkpoint takes {saving / epoch:.2%} of an epoch's steps")


if __name__ == "__main__":
    main()
