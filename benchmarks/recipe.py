"""Measure how accurate the trainer is after each epoch: mean and spread over several seeds.

python benchmarks/recipe.py                        on the test images
python benchmarks/recipe.py --validate --lr 0.1    to tune: on the last 10,000 training images

All other flags are mnist.py's own. Each processor trains one seed at a time, with one thread. A choice made
by the test images would make the result on them too good. So with --validate they are not used at all, and
training uses only the first 50,000 images.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
from dataclasses import fields
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import mnist

HELD_OUT = 10_000


def learn(seed, args, validate):
    """Return the accuracy after each epoch, in per cent."""
    mnist.settle_in()
    torch.set_num_threads(1)
    training_set, test_set = mnist.load_mnist(args.data_dir)
    if validate:
        test_set = [tensor[-HELD_OUT:] for tensor in training_set]
        training_set = [tensor[:-HELD_OUT] for tensor in training_set]
    args.bf16 = mnist.choose_bf16(torch.device("cpu"), args.bf16)
    chosen = {field.name: getattr(args, field.name) for field in fields(mnist.Hyperparameters)}
    trainer = mnist.Trainer(mnist.Hyperparameters(**chosen | {"seed": seed}))
    accuracies = []
    for _ in range(args.epochs):
        for _ in trainer.train(*training_set):
            pass
        trainer.next_epoch()
        _, correct = mnist.test(trainer.averaged_model, *test_set, args.test_batch_size)
        accuracies.append(100 * correct / len(test_set[0]))
    print(f"seed {seed}:", *(f"{accuracy:.2f}" for accuracy in accuracies), flush=True)
    return accuracies


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--validate", action="store_true", help="on the last 10,000 training images")
    ours, flags = parser.parse_known_args()
    args = mnist.parse_arguments(flags)
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        runs = pool.starmap(learn, [(seed, args, ours.validate) for seed in ours.seeds], chunksize=1)
    print(f"torch {torch.__version__}, {len(runs)} seed(s), mean ± standard deviation, in per cent:")
    for epoch, accuracies in enumerate(zip(*runs, strict=True), start=1):
        spread = f" ± {statistics.stdev(accuracies):.3f}" if len(runs) > 1 else ""
        print(f"after epoch {epoch}: {statistics.mean(accuracies):.3f}{spread}")


if __name__ == "__main__":
    main()
