"""What a step of training costs, line by line, against what the processor could do at best.

python benchmarks/step.py                one thread; writes the table in benchmarks/README.md
python benchmarks/step.py --threads 2    prints it only

The limit is the speed at which this machine multiplies large matrices, measured between blocks of steps, so
that both have the same neighbours.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch.profiler import ProfilerActivity, profile

import mnist
from benchmarks.reporting import processor, replace_between, time_epoch

PAGE = Path(__file__).parent / "README.md"
BLOCKS, STEPS, BATCH = 20, 20, mnist.Hyperparameters.batch_size
SIZE = 1024  # rows and columns of the matrices that are multiplied

# The lines of a step: the name that PyTorch's profiler has for each, and what tells it from its namesakes.
LINES = (
    ("convolution 1", "aten::conv2d", [32, 1, 3, 3]),
    ("convolution 2", "aten::conv2d", [64, 32, 3, 3]),
    ("max-pooling", "aten::max_pool2d", None),
    ("linear layer 1", "aten::linear", [128, 9216]),
    ("linear layer 2", "aten::linear", [10, 128]),
    ("gradients of linear layer 2", "AddmmBackward0", [64, 10]),
    ("gradients of linear layer 1", "AddmmBackward0", [64, 128]),
    ("gradient of max-pooling", "aten::max_pool2d_with_indices_backward", None),
    ("gradients of convolution 2", "aten::convolution_backward", [64, 32, 3, 3]),
    ("gradients of convolution 1", "aten::convolution_backward", [32, 1, 3, 3]),
    ("ReLU, and its gradients", "aten::relu", None),
    ("ReLU, and its gradients", "aten::threshold_backward", None),
    ("the optimiser", "Optimizer.step#SGD.step", None),
    ("distorting the digits", "aten::affine_grid_generator", None),
    ("distorting the digits", "aten::grid_sampler", None),
    ("averaging the weights", "aten::_foreach_lerp_", None),
)


def blocks_of_steps(trainer, images, labels):
    """Return the seconds of a step, and multiplications and additions per second, of each block."""
    matrix = torch.rand(SIZE, SIZE)
    steps, peaks = [], []
    for _ in range(BLOCKS):
        steps.append(time_epoch(trainer, images, labels) / STEPS)
        begin = time.perf_counter()
        for _ in range(10):
            matrix @ matrix
        peaks.append(10 * 2 * SIZE**3 / (time.perf_counter() - begin))
    return steps, peaks


def cost_of_lines(trainer, images, labels):
    """Return the share of each line in a step's time, as a dict."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        seconds = time_epoch(trainer, images, labels)
    events, shares = seen.key_averages(group_by_input_shape=True), {}
    for title, name, shape in LINES:
        found = [
            event.cpu_time_total
            for event in events
            if event.key == name and (shape is None or shape in event.input_shapes)
        ]
        if not found:
            raise ValueError(f"this PyTorch knows no {name} with {shape}")
        shares[title] = shares.get(title, 0) + sum(found) / 1e6 / seconds
    shares["the rest: the batch, normalisation, dropout, the loss"] = 1 - sum(shares.values())
    return shares


def table(steps, peaks, shares, operations):
    """Return what was found as Markdown."""
    step, peak = statistics.median(steps), statistics.median(peaks)
    low, _, high = statistics.quantiles(peaks, n=4)
    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    lines = [
        f"{processor()}, {threads}, batches of {BATCH}, torch {torch.__version__}; medians "
        f"of {BLOCKS} blocks of {STEPS} steps. Multiplying matrices: {peak / 1e9:.0f} GFLOP/s (quartiles "
        f"{low / 1e9:.0f} to {high / 1e9:.0f}).",
        "",
        "| what a step does | ms | share | operations, GFLOP | of the limit |",
        "|---|--:|--:|--:|--:|",
    ]
    for title, share in shares.items():
        count = operations.get(title)
        cells = (f"{count / 1e9:.2f}", f"{count / (share * step) / peak:.0%}") if count else ("", "")
        lines.append(f"| {title} | {1000 * share * step:.2f} | {share:.1%} | {cells[0]} | {cells[1]} |")
    total = sum(operations.values())
    lines.append(
        f"| **a step** | **{1000 * step:.2f}** | | **{total / 1e9:.2f}** | **{total / step / peak:.0%}** |"
    )
    return "\n".join(lines)


def count_operations():
    """Return the multiplications and additions of a step's matrix products and convolutions, by line.

    Each forward pass costs 2 for each weight and place; backward, as much for the weights' gradients and
    as much for the inputs'. The images need none.
    """
    pixels = {"convolution 1": (9 * 32) * 26**2, "convolution 2": (9 * 32 * 64) * 24**2}
    weights = {"linear layer 1": 9216 * 128, "linear layer 2": 128 * 10}
    operations = {}
    for title, products in (pixels | weights).items():
        operations[title] = 2 * products * BATCH
        passes = 1 if title == "convolution 1" else 2
        operations[f"gradients of {title}"] = passes * operations[title]
    return operations


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    mnist.settle_in()
    torch.set_num_threads(threads)
    (images, labels), _ = mnist.load_mnist("datasets")
    images, labels = (tensor[: STEPS * BATCH] for tensor in (images, labels))
    trainer = mnist.Trainer(mnist.Hyperparameters())
    time_epoch(trainer, images, labels)  # to warm up
    steps, peaks = blocks_of_steps(trainer, images, labels)
    shares = cost_of_lines(trainer, images, labels)
    found = table(steps, peaks, shares, count_operations())
    print(found)
    if threads == 1:
        PAGE.write_text(replace_between(PAGE.read_text(), "step", found))


if __name__ == "__main__":
    main()
