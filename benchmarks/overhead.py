"""Measure what two safeguards cost: agreeing at every step on whether to stop, and saving a checkpoint.

python benchmarks/overhead.py                                       one process
torchrun --standalone --nproc-per-node 2 benchmarks/overhead.py     two

Blocks of steps with and without the agreement take turns, so other work on the machine slows both alike.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import mnist
from benchmarks.reporting import time_epoch

PAIRS, STEPS, BATCH = 80, 20, mnist.Hyperparameters.batch_size


def main():
    mnist.settle_in()
    job = mnist.Job.from_environment()
    with tempfile.TemporaryDirectory() as folder, job.connected("gloo", timeout=60):
        (images, labels), _ = mnist.load_mnist("datasets")
        trainer = mnist.Trainer(mnist.Hyperparameters(), job)
        if job.world_size > 1:
            trainer.ddp_model = job.distribute(trainer.model)
        agree, samples = job.stop_if_asked, STEPS * BATCH * job.world_size

        def block(stop_if_asked):
            """Return the seconds that a block of steps takes."""
            job.stop_if_asked = stop_if_asked
            job.all_reduce(0)  # all processes begin together
            return time_epoch(trainer, images[:samples], labels[:samples])

        block(agree)  # to warm up
        pairs = [(block(agree), block(lambda: None)) for _ in range(PAIRS)]
        begin = time.perf_counter()
        mnist.save(trainer, folder)
        saving = time.perf_counter() - begin

    if job.rank == 0:
        low, middle, high = statistics.quantiles([careful / careless for careful, careless in pairs], n=4)
        step = statistics.median(careless for _, careless in pairs) / STEPS
        epoch = step * len(images) / BATCH / job.world_size
        print(f"{job.world_size} process(es), {PAIRS} pairs of {STEPS} steps of {BATCH} images")
        print(f"with the agreement / without: median {middle:.4f}, quartiles {low:.4f} to {high:.4f}")
        print(f"a checkpoint takes {saving / epoch:.2%} of an epoch's steps")


if __name__ == "__main__":
    main()
