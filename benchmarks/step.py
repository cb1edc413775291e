"""Show what each line of a training step costs, compared with the most that the processor can do.

python benchmarks/step.py --write                one thread; renews the table in benchmarks/README.md
python benchmarks/step.py --threads 2 --bf16     only prints it, for two threads and in bfloat16

The limit is the speed at which this machine multiplies large matrices, by the faster of PyTorch's two
libraries for that. It is measured between blocks of steps, so other work on the machine slows both alike.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import mnist
from benchmarks.reporting import processor, replace_between, time_epoch

PAGE = Path(__file__).parent / "README.md"
BLOCKS, STEPS, BATCH = 20, 20, mnist.Hyperparameters.batch_size
SIZE = 1024  # rows and columns of the matrices

# The lines of a step: a title, the name in PyTorch's profiler, and a shape where several share that name.
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
    ("ReLU and its gradients", "aten::relu", None),
    ("ReLU and its gradients", "aten::threshold_backward", None),
    ("the optimiser", "Optimizer.step#SGD.step", None),
    ("distorting the digits", "aten::affine_grid_generator", None),
    ("distorting the digits", "aten::grid_sampler", None),
    ("averaging the weights", "aten::lerp_", None),
    ("other types of numbers: bytes to float32, and in bfloat16 to and from that", "aten::_to_copy", None),
)


def measure_blocks(trainer, images, labels):
    """Return, for each block, the seconds per step and the matrix operations per second."""
    matrix = torch.rand(SIZE, SIZE).to(torch.bfloat16 if trainer.hyperparameters.bf16 else torch.float32)
    ways = [lambda: matrix @ matrix]  # by MKL, which uses AVX-512 on Intel's processors only
    if torch.backends.mkldnn.is_available() and matrix.dtype == torch.float32:  # bfloat16 always goes there
        of_onednn = matrix.to_mkldnn()  # by oneDNN, as convolutions are
        ways.append(lambda: F.linear(of_onednn, of_onednn))
    steps, peaks = [], []
    for _ in range(BLOCKS):
        steps.append(time_epoch(trainer, images, labels) / STEPS)
        peaks.append(max(map(operations_per_second, ways)))
    return steps, peaks


def operations_per_second(multiply):
    """Return the speed of a function that multiplies two matrices of SIZE."""
    multiply()
    begin = time.perf_counter()
    for _ in range(10):
        multiply()
    return 10 * 2 * SIZE**3 / (time.perf_counter() - begin)


def shares_of_lines(trainer, images, labels):
    """Return each line's share of the time of a step, by title."""
    # The profiler's own notes take memory between the tensors. Without 1 GB that was used before, the tensors
    # would move to new memory at each step, and the kernel's work for that would count as theirs.
    torch.zeros(2**28)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        seconds = time_epoch(trainer, images, labels)
    events, shares = seen.key_averages(group_by_input_shape=True), {}
    for title, name, shape in LINES:
        found = [event for event in events if event.key == name and shape in (None, *event.input_shapes)]
        if not found:
            raise ValueError(f"this PyTorch knows no {name} with {shape}")
        spent = sum(event.cpu_time_total for event in found) / 1e6
        shares[title] = shares.get(title, 0) + spent / seconds
    return shares | {"the rest: the batch, normalising, dropout, loss, clipping": 1 - sum(shares.values())}


def count_operations():
    """Return the multiplications and additions in the convolutions and matrix products of a step, by title.

    A forward pass takes two for each weight and each place where it is used. The gradients of the weights
    take as many again, and so do those of a layer's inputs. The images need no gradients.
    """
    weights = {"convolution 1": 9 * 32 * 26**2, "convolution 2": 9 * 32 * 64 * 24**2}
    weights |= {"linear layer 1": 9216 * 128, "linear layer 2": 128 * 10}
    operations = {title: 2 * BATCH * count for title, count in weights.items()}
    gradients = {f"gradients of {title}": 2 * count for title, count in operations.items()}
    return operations | gradients | {"gradients of convolution 1": operations["convolution 1"]}


def table(steps, peaks, shares, operations):
    """Return the results as Markdown."""
    step, peak, total = statistics.median(steps), statistics.median(peaks), sum(operations.values())
    low, _, high = statistics.quantiles(peaks, n=4)
    threads = "one thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    lines = [
        f"{processor()}, {threads}, batches of {BATCH}, torch {torch.__version__}; medians of {BLOCKS} "
        f"blocks of {STEPS} steps. Matrices are multiplied at {peak / 1e9:.0f} GFLOP/s (quartiles "
        f"{low / 1e9:.0f} to {high / 1e9:.0f}).",
        "",
        "| part of a step | ms | share | operations, GFLOP | of the limit |",
        "|---|--:|--:|--:|--:|",
    ]
    for title, share in shares.items():
        count = operations.get(title)
        cells = f"{count / 1e9:.2f} | {count / (share * step) / peak:.0%}" if count else " | "
        lines.append(f"| {title} | {1000 * share * step:.2f} | {share:.1%} | {cells} |")
    whole = f"**{total / 1e9:.2f}** | **{total / step / peak:.0%}**"
    return "\n".join([*lines, f"| **a step** | **{1000 * step:.2f}** | | {whole} |"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bf16", action="store_true", help="multiply in bfloat16")
    parser.add_argument("--write", action="store_true", help="renew the table in benchmarks/README.md")
    args = parser.parse_args()
    mnist.settle_in()
    torch.set_num_threads(args.threads)
    training_set, _ = mnist.load_mnist("datasets")
    images, labels = (tensor[: STEPS * BATCH] for tensor in training_set)
    trainer = mnist.Trainer(mnist.Hyperparameters(bf16=args.bf16))
    time_epoch(trainer, images, labels)  # to warm up
    steps, peaks = measure_blocks(trainer, images, labels)
    found = table(steps, peaks, shares_of_lines(trainer, images, labels), count_operations())
    print(found)
    if args.write:
        mark = "step-bf16" if args.bf16 else "step"
        PAGE.write_text(replace_between(PAGE.read_text(), mark, found))


if __name__ == "__main__":
    main()
