"""Compare mnist.py with its peers: the same network on the same digits, on the same cores, in one run.

python benchmarks/bench.py                                   everything, as `make bench` does
python benchmarks/bench.py --images 512 --rounds 1 --cap 2   a trial of minutes, which leaves the page alone
python benchmarks/bench.py --gpu --epochs 5                  on an NVIDIA GPU, those that use PyTorch
python benchmarks/bench.py --render                          only the page and the picture, from results.json

Each contender trains and evaluates in a process of its own. They take turns, in a different order in each
round, so other work on the machine slows all of them alike. Then each trains once more, for at least 5
epochs, until it gets 99 % of the test images right or reaches --cap epochs. This program does the timing:
it notes when each line of a contender's output arrives.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.reporting import processor, replace_between, unpack

# Nothing large is imported up here: a child's peak memory is never less than that of this process.

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "peers.md"
PICTURE = ROOT / "docs" / "bench.png"
RESULTS = ROOT / "benchmarks" / "results.json"
GPU_RESULTS = ROOT / "benchmarks" / "results-gpu.json"
IMAGES = 60_000
GOAL = 0.99  # share of the test images
FINAL = 5  # accuracies are compared after this many epochs, mnist.py's default
LIMIT = 3600  # seconds after which a contender counts as hanging
NOTHING = "—"  # in the table, where nothing was measured
PACKAGES = ("torch", "torchvision", "lightning", "pytorch-ignite", "keras", "flax", "jax")


@dataclass(frozen=True)
class Contender:
    """One row of the table: a program in peers/, or mnist.py with these flags."""

    key: str  # in results.json, and for --only
    title: str
    peer: str = ""
    flags: tuple = ()

    @property
    def own(self):
        """Whether it trains a network of its own. That is different work, so its epochs are not compared."""
        return "--own" in self.flags

    @property
    def on_gpu(self):
        """Whether it can use a GPU here: the installed build of JAX cannot."""
        return self.peer not in ("with_keras.py", "with_flax.py")

    def command(self, epochs, output, images=None, gpu=False):
        """Return the arguments for Python."""
        flags = ("--epochs", epochs, *self.flags)
        if self.peer:
            few = ("--images", images) if images else ()
            return (f"benchmarks/peers/{self.peer}", *flags, *few, *(("--gpu",) if gpu else ()))
        program = ("benchmarks/peers/ours_on_few.py", images) if images else ("mnist.py",)
        return (*program, *flags, "--output-dir", output, *(() if gpu else ("--no-cuda",)))


# All compute in float32 but the two that say otherwise, on every processor.
OURS = Contender("ours", "**mnist.py**", flags=("--no-bf16",))
# The peers' optimiser and schedule. The averaged weights and the weaker dropout have no flag, so they stay.
PEERS_RECIPE = "--no-bf16 --optimizer adadelta --lr 1.0 --gamma 0.7 --no-augment --label-smoothing 0"
CONTENDERS = (
    OURS,
    Contender("ours_bf16", "mnist.py in bfloat16", flags=("--bf16",)),
    Contender("ours_adadelta", "mnist.py with the peers' recipe", flags=tuple(PEERS_RECIPE.split())),
    Contender("pytorch_example", "PyTorch's example", "pytorch_example.py"),
    Contender("pytorch_example_bf16", "PyTorch's example in bfloat16", "pytorch_example.py", ("--autocast",)),
    Contender("older_tutorial", "the older tutorial", "older_tutorial.py"),
    Contender("lightning", "Lightning", "with_lightning.py"),
    Contender("ignite", "Ignite", "with_ignite.py"),
    Contender("keras", "Keras on JAX", "with_keras.py"),
    Contender("flax", "Flax", "with_flax.py"),
    Contender("ignite_own", "Ignite, its own network", "with_ignite.py", ("--own",)),
    Contender("keras_own", "Keras on JAX, its own network", "with_keras.py", ("--own",)),
    Contender("flax_own", "Flax, its own network", "with_flax.py", ("--own",)),
)
KEYS = [contender.key for contender in CONTENDERS]


# --- Running --------------------------------------------------------------------------------------


def environment(threads, gpu):
    """Return the environment of all contenders: the number of threads, and a GPU only if asked for."""
    threads = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | threads | hidden | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def run(contender, epochs, threads, images=None, gpu=False, enough=lambda epochs: False):
    """Train and evaluate, and stop early when `enough` says so. Returns the measurements as a dict.

    The first epoch of mnist.py begins with its first line, before it reads the data, and its start-up ends
    with the loss of its first step. Peers print a line when they have read the data, which marks both.
    """
    seen = {"contender": contender.key, "start_up": None, "epochs": [], "error": None}
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        command = [sys.executable, *map(str, contender.command(epochs, output, images, gpu))]
        streams = {"stdout": subprocess.PIPE, "stderr": errors, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment(threads, gpu), **streams)
        hanging = threading.Timer(LIMIT, process.kill)
        hanging.start()
        cpu_times = psutil.Process(process.pid).cpu_times
        clock, cpu, stopped = start, 0.0, False
        for number, line in enumerate(process.stdout):
            now, (what, _, value) = time.perf_counter(), line.partition("=")
            ready, done = line.startswith("Epoch:"), what == "accuracy"
            if ready and seen["start_up"] is None:
                seen["start_up"] = now - start
            if done and not stopped:
                spent = {"seconds": now - clock, "cpu_seconds": sum(cpu_times()[:2]) - cpu}  # user and system
                seen["epochs"].append({**spent, "accuracy": float(value)})
                if stopped := enough(seen["epochs"]):
                    process.terminate()
            if done or (ready if contender.peer else number == 0):
                clock, cpu = now, sum(cpu_times()[:2])
        _, status, usage = os.wait4(process.pid, 0)  # unlike Popen.wait(), this reports memory
        process.returncode = os.waitstatus_to_exitcode(status)
        hanging.cancel()
        seen["peak_memory"] = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if not stopped and (process.returncode or len(seen["epochs"]) != epochs):
            errors.seek(0)
            seen["error"] = reason(errors.read(), process.returncode)
    return seen


def reason(errors, code):
    """Return in a few words why a contender failed, from what it wrote to standard error."""
    last = (errors.strip().splitlines() or [f"exit code {code}"])[-1]
    kind, _, message = last.partition(": ")
    missing = kind in ("ModuleNotFoundError", "ImportError")
    return f"not installed: {message}" if missing else f"failed: {last}"


def schedule(contenders, rounds, epochs, cap):
    """Yield (round, contender, options of `run`) for each run. The long runs at the end have no round."""
    same_work = [contender for contender in contenders if not contender.own]
    for number in range(1, rounds + 1):
        first = (number - 1) * len(same_work) // rounds
        for contender in same_work[first:] + same_work[:first]:
            yield number, contender, {"epochs": epochs}

    def enough(epochs):
        return len(epochs) >= min(FINAL, cap) and max(epoch["accuracy"] for epoch in epochs) >= GOAL

    for contender in contenders if cap else ():
        yield None, contender, {"epochs": cap, "enough": enough}


def prepare():
    """Unpack the digits for the peers. Returns the name of the GPU that PyTorch finds, or an empty string."""
    unpack(ROOT / "datasets")
    # In a process of its own, because torch is large. It downloads what was not there to be unpacked.
    code = (
        "import torch; from torchvision.datasets import MNIST; MNIST('datasets', download=True); "
        "print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    )
    return subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).splitlines()[-1]


# --- What the results say -------------------------------------------------------------------------


def summarise(results):
    """Return a dict for each contender: medians over its rounds, and the outcome of its long run."""
    return [summary(contender, results) for contender in CONTENDERS if contender.key in results["contenders"]]


def summary(contender, results):
    """Return one contender's seconds, bytes and accuracies, each None if it was not measured."""
    runs = [run for run in results["runs"] if run["contender"] == contender.key]
    rounds = [run for run in runs if run["round"] and not run["error"]]
    long = [run for run in runs if not run["round"] and not run["error"]]
    measured = rounds or long
    epochs = [epoch for run in measured for epoch in run["epochs"]]
    # The ratio is taken within each round, when other work on the machine slowed both alike.
    ours = {run["round"]: run for run in results["runs"] if run["contender"] == OURS.key and not run["error"]}
    ratios = [epoch_time(run) / epoch_time(ours[run["round"]]) for run in rounds if run["round"] in ours]
    right = [epoch["accuracy"] for run in long for epoch in run["epochs"]]
    count = next((number for number, share in enumerate(right, 1) if share >= GOAL), None)
    to_goal = [epoch["seconds"] for run in long for epoch in run["epochs"][:count]]
    return {
        "contender": contender,
        "error": next((run["error"] for run in runs if run["error"]), None),
        "seconds": median(epoch["seconds"] for epoch in epochs),
        "cpu_seconds": median(epoch["cpu_seconds"] for epoch in epochs),
        "peak_memory": median(run["peak_memory"] for run in measured),
        "start_up": median(run["start_up"] for run in measured),
        "ratio": median(ratios),
        "final": right[min(FINAL, len(right)) - 1] if right else None,
        "epochs_to_goal": count,
        "to_goal": sum(to_goal) if count else None,
    }


def epoch_time(run):
    """Return the median time of its epochs, because the first may include the start of a GPU."""
    return median(epoch["seconds"] for epoch in run["epochs"])


def median(numbers):
    numbers = list(numbers)
    return statistics.median(numbers) if numbers else None


def table(results):
    """Return the results as Markdown."""
    few = "" if results["images"] == IMAGES else f", only {results['images']:,} images"
    versions = ", ".join(f"{name} {number}" for name, number in results["packages"].items() if number)
    gpu = f"{results['gpu']} with " if results.get("gpu") else ""
    seconds = "{:.2f} s" if gpu else "{:.1f} s"
    lines = [
        f"{gpu}{results['cpu']}, {plural(results['threads'], 'thread')}{few}; {results['date']}; "
        f"Python {results['python']}, {versions}. Medians of {plural(results['rounds'], 'round')}.",
        "",
        "| trainer | epoch | ratio to mnist.py | images per second | CPU time | peak memory | start-up "
        f"| to 99 % | after {plural(min(FINAL, results['cap']), 'epoch')} |",
        "|---|" + "--:|" * 8,
    ]
    for row in summarise(results):
        title = row["contender"].title
        if row["error"]:
            lines.append(f"| {title} | {row['error'].replace('|', '/')} |" + " |" * 7)
            continue
        cells = (
            title,
            show(row["seconds"], seconds),
            show(row["ratio"], "{:.2f}"),
            show(row["seconds"] and results["images"] / row["seconds"], "{:,.0f}"),
            show(row["cpu_seconds"], seconds),
            show(row["peak_memory"], "{:.2f} GiB", 2**30),
            show(row["start_up"], "{:.1f} s"),
            time_to_goal(row, results),
            show(row["final"], "{:.2f} %", 0.01),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def time_to_goal(row, results):
    """Return it in words."""
    if not row["to_goal"]:
        return f"not in {plural(results['cap'], 'epoch')}" if row["final"] else NOTHING
    digits = 1 if results.get("gpu") else 0
    return f"{row['to_goal']:.{digits}f} s ({plural(row['epochs_to_goal'], 'epoch')})"


def show(number, form, unit=1):
    return NOTHING if number is None else form.format(number / unit)


def plural(number, thing):
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def draw(results, picture):
    """Draw the ratios to mnist.py's time for an epoch, and the times to the goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours, peers, other = "#0072B2", "#E69F00", "#BBBBBB"  # told apart by the colour-blind, and in grey

    def bars(axes, title, rows, key, label):
        contenders = [row["contender"] for row in rows]
        names = [contender.title.strip("*") for contender in contenders]
        colours = [other if each.own else peers if each.peer else ours for each in contenders]
        drawn = axes.barh(names, [row[key] or 0 for row in rows], color=colours, height=0.7)
        axes.bar_label(drawn, [label(row) for row in rows], padding=4, fontsize=9)
        axes.margins(x=0.35)  # room for the labels
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(title, fontsize=10)

    rows = [row for row in summarise(results) if not row["error"]][::-1]
    same = [row for row in rows if row["ratio"]]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    title = "Time for an epoch, relative to mnist.py (less is better)"
    bars(left, title, same, "ratio", lambda row: f"{row['ratio']:.2f}")
    left.axvline(1, color="lightgrey", zorder=0)  # behind the labels
    title = "Seconds to 99 % accuracy (grey: a smaller network)"
    bars(right, title, rows, "to_goal", lambda row: time_to_goal(row, results))
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def render(results, page=PAGE, picture=PICTURE):
    """Write the table into the page, and the picture beside it. Results of a GPU get no picture."""
    mark, text = "bench", table(results)
    if results.get("gpu"):
        mark = "bench-gpu"
    else:
        draw(results, picture)
        alt = "Bars: time for an epoch relative to mnist.py, and time to 99 %, for each trainer in the table"
        text += f"\n\n![{alt}]({os.path.relpath(picture, page.parent)})"
    page.write_text(replace_between(page.read_text(), mark, text))


# --- The command line -----------------------------------------------------------------------------


def parse_arguments(argv):
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="default: 3")
    add("--epochs", type=int, default=1, help="how long a contender trains in a round (default: 1)")
    add("--cap", type=int, default=10, help="epochs allowed to reach 99 %%; 0: do not try (default: 10)")
    add("--threads", type=int, default=len(cores), help="of each contender (default: all cores)")
    add("--images", type=int, help="a trial with this many images; leaves the page alone")
    add("--only", nargs="+", choices=KEYS, metavar="NAME", help=f"a trial with some of {', '.join(KEYS)}")
    add("--gpu", action="store_true", help="use an NVIDIA GPU; only for those that use PyTorch")
    add(
        "--results", type=Path, help="file for raw results (default: in benchmarks/, or a trial's in output/)"
    )
    add("--render", action="store_true", help="run nothing, write page and picture from the results")
    args = parser.parse_args(argv)
    args.contenders = [contender for contender in CONTENDERS if contender.key in (args.only or KEYS)]
    if args.gpu:
        able = [contender for contender in args.contenders if contender.on_gpu]
        if args.only and able != args.contenders:
            parser.error("JAX is installed without support for GPUs: leave out Keras and Flax with --gpu")
        args.contenders = able
    args.trial = bool(args.images or args.only)
    args.results = args.results or (
        ROOT / "output" / "bench-trial.json" if args.trial else GPU_RESULTS if args.gpu else RESULTS
    )
    if hasattr(os, "sched_setaffinity"):  # children inherit it; JAX's threads cannot be limited otherwise
        os.sched_setaffinity(0, cores[: args.threads])
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.render:
        return render(json.loads(args.results.read_text()))
    gpu = prepare()
    if args.gpu and not gpu:
        sys.exit("bench.py: PyTorch finds no NVIDIA GPU here: leave out --gpu")
    installed = {found.name: found.version for found in metadata.distributions()}
    results = {
        "date": date.today().isoformat(),
        "cpu": processor(),
        "python": platform.python_version(),
        "packages": {package: installed.get(package) for package in PACKAGES},
        "contenders": [contender.key for contender in args.contenders],
        "gpu": gpu if args.gpu else None,
        "threads": args.threads,
        "images": args.images or IMAGES,
        "rounds": args.rounds,
        "cap": args.cap,
        "runs": [],
    }
    args.results.parent.mkdir(parents=True, exist_ok=True)
    broken = set()
    for number, contender, options in schedule(args.contenders, args.rounds, args.epochs, args.cap):
        if contender in broken:
            continue
        seen = run(contender, threads=args.threads, images=args.images, gpu=args.gpu, **options)
        results["runs"].append({"round": number, **seen})
        args.results.write_text(json.dumps(results, indent=1) + "\n")  # at once: the next may take long
        if seen["error"]:
            broken.add(contender)
        epochs = (f"{epoch['seconds']:.1f} s {epoch['accuracy']:.2%}" for epoch in seen["epochs"])
        name = f"round {number}" if number else "long run"
        print(f"{name}, {contender.key}: {seen['error'] or ', '.join(epochs)}", flush=True)
    print(f"\n{table(results)}")
    if not args.trial:
        render(results)


if __name__ == "__main__":
    main()
