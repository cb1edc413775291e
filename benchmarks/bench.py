"""Compare mnist.py with its peers: the same network on the same digits, on the same cores, in one run.

python benchmarks/bench.py                                   what `make bench` does: all of it
python benchmarks/bench.py --images 512 --rounds 1 --cap 2   a trial of minutes; it prints the table only
python benchmarks/bench.py --gpu --epochs 5                  on an NVIDIA GPU, those that use PyTorch
python benchmarks/bench.py --render                          only the pages and the picture, from results.json

In each round every contender trains and evaluates in a process of its own. They take turns, in another
order in each round, so that whatever else the machine does falls on all alike. Then each trains once more,
for 5 epochs or more, until it has got 99 % of the test images right, or had --cap epochs. All is timed by
this program, when a contender's lines arrive.
"""

import argparse
import json
import os
import platform
import shlex
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

from benchmarks.reporting import processor, replace_between

# Nothing large is imported up here: the peak memory of a child is never less than this process has.

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "benchmarks" / "README.md"
PAGES = (PAGE, ROOT / "README.md")
PICTURE = ROOT / "docs" / "bench.png"
RESULTS = ROOT / "benchmarks" / "results.json"
GPU_RESULTS = ROOT / "benchmarks" / "results-gpu.json"
IMAGES = 60_000
GOAL = 0.99
FINAL = 5  # epochs after which accuracies are compared: mnist.py's default
LIMIT = 3600  # seconds until a contender is taken to hang
NOTHING = "—"  # in the table, where nothing was measured
PACKAGES = ("torch", "torchvision", "lightning", "pytorch-ignite", "keras", "flax", "jax")


@dataclass(frozen=True)
class Contender:
    """One row of the table. `flags` are those of mnist.py where there is no `script` of a peer."""

    key: str  # for --only, and in results.json
    title: str
    script: str = ""
    flags: tuple = ()

    @property
    def own(self):
        """Whether it has a network of its own: then its epochs are other work, and not compared."""
        return "--own" in self.flags

    @property
    def on_gpu(self):
        """Whether it can use a GPU here: of JAX, the build for CPUs is installed."""
        return self.script not in ("with_keras.py", "with_flax.py")

    def command(self, epochs, threads, images, gpu, output):
        """Return the arguments for Python."""
        if self.script:
            few = ("--images", images) if images else ()
            return (
                f"benchmarks/peers/{self.script}",
                "--epochs",
                epochs,
                "--threads",
                threads,
                *few,
                *(("--gpu",) if gpu else ()),
                *self.flags,
            )
        ours = ("benchmarks/peers/ours_on_few.py", images) if images else ("mnist.py",)
        device = () if gpu else ("--no-cuda",)
        return (*ours, "--epochs", epochs, *device, "--output-dir", output, *self.flags)


OURS = Contender("ours", "**mnist.py**")
# The peers' optimiser and schedule. What has no flag stays: averaged weights, and less dropout.
PEERS_RECIPE = tuple(
    shlex.split("--optimizer adadelta --lr 1.0 --gamma 0.7 --no-augment --label-smoothing 0")
)
CONTENDERS = (
    OURS,
    Contender("ours_adadelta", "mnist.py, with the others' recipe", flags=PEERS_RECIPE),
    Contender("pytorch_example", "PyTorch's example", "pytorch_example.py"),
    Contender("seed", "the tutorial it descends from", "seed.py"),
    Contender("lightning", "Lightning", "with_lightning.py"),
    Contender("ignite", "Ignite", "with_ignite.py"),
    Contender("keras", "Keras on JAX", "with_keras.py"),
    Contender("flax", "Flax", "with_flax.py"),
    Contender("ignite_own", "Ignite, its example's network", "with_ignite.py", ("--own",)),
    Contender("keras_own", "Keras on JAX, its example's network", "with_keras.py", ("--own",)),
    Contender("flax_own", "Flax, its example's network", "with_flax.py", ("--own",)),
)
KEYS = [contender.key for contender in CONTENDERS]


# --- Running --------------------------------------------------------------------------------------


def environment(threads, gpu):
    """Return the environment of all contenders: so many threads, and a GPU if it is asked for."""
    threads = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return os.environ | threads | hidden | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def events(line, is_first):
    """Return what a line of a contender's output says: a dict with "begin", "step" or "accuracy".

    mnist.py begins with its first line, before it reads the data, and shows a loss only after a step: so
    reading counts as a part of its first epoch, and the first step as a part of its start.
    """
    if line.startswith("{"):
        said = json.loads(line)
        return {"begin": True, "step": True} if "ready" in said else {"accuracy": said["accuracy"]}
    if is_first:
        return {"begin": True}
    if line.startswith("Epoch:"):
        return {"step": True}
    if line.startswith("accuracy="):
        return {"accuracy": float(line.removeprefix("accuracy="))}
    return {}


def run(contender, epochs, threads, images=None, gpu=False, enough=lambda epochs: False):
    """Train and evaluate once, until the epochs so far are `enough`. Returns what was seen, as a dict."""
    seen = {"contender": contender.key, "start_up": None, "epochs": [], "error": None}
    with tempfile.TemporaryDirectory() as output, tempfile.TemporaryFile("w+") as errors:
        start = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, contender.command(epochs, threads, images, gpu, output))],
            cwd=ROOT,
            env=environment(threads, gpu),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        hanging = threading.Timer(LIMIT, process.kill)
        hanging.start()
        cpu_times = psutil.Process(process.pid).cpu_times
        clock, cpu, stopped = start, 0.0, False
        for number, line in enumerate(process.stdout):
            event, now = events(line, is_first=number == 0), time.perf_counter()
            if event.get("step") and seen["start_up"] is None:
                seen["start_up"] = now - start
            if "accuracy" in event and not stopped:
                spent = sum(cpu_times()[:2]) - cpu  # of user and system
                seen["epochs"].append(
                    {"seconds": now - clock, "cpu_seconds": spent, "accuracy": event["accuracy"]}
                )
                if stopped := enough(seen["epochs"]):
                    process.terminate()
            if "begin" in event or "accuracy" in event:
                clock, cpu = now, sum(cpu_times()[:2])
        _, status, usage = os.wait4(process.pid, 0)  # Popen's own wait() does not tell the memory
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
    if kind in ("ModuleNotFoundError", "ImportError"):
        return f"not installed: {message}"
    return f"failed: {last}"


def compare(contenders, args, keep):
    """Run all, in rounds and then for long. Calls `keep` with what was seen of each run."""
    broken = set()

    def turn(contender, number, *rest, **options):
        if contender.key in broken:
            return
        where = {"threads": args.threads, "images": args.images, "gpu": args.gpu}
        seen = {"round": number, **run(contender, *rest, **where, **options)}
        if seen["error"]:
            broken.add(contender.key)
        keep(seen)

    for number in range(1, args.rounds + 1):
        same_work = [contender for contender in contenders if not contender.own]
        first = (number - 1) * len(same_work) // args.rounds
        for contender in same_work[first:] + same_work[:first]:
            turn(contender, number, args.epochs)

    def enough(epochs):
        return len(epochs) >= min(FINAL, args.cap) and max(epoch["accuracy"] for epoch in epochs) >= GOAL

    for contender in contenders if args.cap else ():
        turn(contender, None, args.cap, enough=enough)  # belongs to no round


def gpu_name():
    """Return the name of the GPU that PyTorch would use; the program ends where there is none."""
    # In a process of its own, for torch is large.
    ask = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    answer = subprocess.run([sys.executable, "-c", ask], stdout=subprocess.PIPE, text=True, check=True)
    return answer.stdout.strip() or sys.exit("bench.py: PyTorch finds no NVIDIA GPU here: leave out --gpu")


def machine(args):
    """Return what the results depend on."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "date": date.today().isoformat(),
        "cpu": processor(),
        "python": platform.python_version(),
        "packages": versions,
        "contenders": [
            contender.key
            for contender in CONTENDERS
            if contender.key in (args.only or KEYS) and (contender.on_gpu or not args.gpu)
        ],
        "gpu": gpu_name() if args.gpu else None,
        "threads": args.threads,
        "images": args.images or IMAGES,
        "rounds": args.rounds,
        "cap": args.cap,
    }


# --- What it amounts to ---------------------------------------------------------------------------


def summarise(results):
    """Return a dict for each contender, with medians over its rounds and what its long run showed."""
    return [summary(contender, results) for contender in CONTENDERS if contender.key in results["contenders"]]


def summary(contender, results):
    """Return one row: seconds, bytes, accuracies; None where there is nothing to say."""
    runs = [run for run in results["runs"] if run["contender"] == contender.key]
    row = {"title": contender.title, "key": contender.key, "own": contender.own}
    row["error"] = next((run["error"] for run in runs if run["error"]), None)
    rounds = [run for run in runs if run["round"] and not run["error"]]
    long = next((run for run in runs if not run["round"] and not run["error"]), None)
    measured = rounds or ([long] if long else [])
    epochs = [epoch for run in measured for epoch in run["epochs"]]

    def median(numbers):
        return statistics.median(numbers) if numbers else None

    row["seconds"] = median([epoch["seconds"] for epoch in epochs])
    row["cpu_seconds"] = median([epoch["cpu_seconds"] for epoch in epochs])
    row["images_per_second"] = results["images"] / row["seconds"] if epochs else None
    row["peak_memory"] = median([run["peak_memory"] for run in measured])
    row["start_up"] = median([run["start_up"] for run in measured])
    # A ratio within each round: both had the same neighbours then.
    ours = {run["round"]: run for run in results["runs"] if run["contender"] == OURS.key and not run["error"]}
    ratios = [epoch_time(run) / epoch_time(ours[run["round"]]) for run in rounds if run["round"] in ours]
    row["ratio"] = median(ratios)
    row["to_goal"] = row["epochs_to_goal"] = row["final"] = None
    if long:
        right = [epoch["accuracy"] for epoch in long["epochs"]]
        row["final"] = right[min(FINAL, len(right)) - 1]
        if max(right) >= GOAL:
            row["epochs_to_goal"] = next(n for n, share in enumerate(right, 1) if share >= GOAL)
            row["to_goal"] = sum(epoch["seconds"] for epoch in long["epochs"][: row["epochs_to_goal"]])
    return row


def epoch_time(run):
    """Return the seconds of an epoch; of several, the median, for the first may have a GPU's start in it."""
    return statistics.median(epoch["seconds"] for epoch in run["epochs"])


def table(results):
    """Return the results as Markdown."""
    few = "" if results["images"] == IMAGES else f", {results['images']:,} images only"
    versions = ", ".join(f"{name} {version}" for name, version in results["packages"].items() if version)
    gpu = f"{results['gpu']} beside " if results.get("gpu") else ""
    seconds = "{:.2f} s" if gpu else "{:.1f} s"
    lines = [
        f"{gpu}{results['cpu']}, {plural(results['threads'], 'thread')}{few}; {results['date']}; "
        f"Python {results['python']}, {versions}. Medians of {plural(results['rounds'], 'round')}.",
        "",
        "| trainer | an epoch | ratio to mnist.py | images a second | CPU time | peak memory | start "
        f"| to {percent(GOAL, 0)} | after {plural(min(FINAL, results['cap']), 'epoch')} |",
        "|---|" + "--:|" * 8,
    ]
    for row in summarise(results):
        if row["error"]:
            lines.append(f"| {row['title']} | {row['error'].replace('|', '/')} |" + " |" * 7)
            continue
        goal = f"not in {plural(results['cap'], 'epoch')}" if row["final"] else NOTHING
        if row["to_goal"]:
            to_goal = f"{row['to_goal']:.1f}" if gpu else f"{row['to_goal']:.0f}"
            goal = f"{to_goal} s ({plural(row['epochs_to_goal'], 'epoch')})"
        cells = (
            row["title"],
            show(row["seconds"], seconds),
            show(row["ratio"], "{:.2f}"),
            show(row["images_per_second"], "{:,.0f}"),
            show(row["cpu_seconds"], seconds),
            show(row["peak_memory"], "{:.2f} GiB", 2**30),
            show(row["start_up"], "{:.1f} s"),
            goal,
            percent(row["final"]) if row["final"] else NOTHING,
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(number, form, unit=1):
    return NOTHING if number is None else form.format(number / unit)


def percent(share, digits=2):
    return f"{100 * share:.{digits}f} %"


def plural(number, thing):
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def write_between_markers(page, text, mark="bench"):
    """Put `text` between the markers of a page, and leave the rest of it as it is."""
    page.write_text(replace_between(page.read_text(), mark, text))


def draw(results, picture):
    """Draw an epoch's time as a ratio to mnist.py's, and the time to the goal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ours, peers, other = "#0072B2", "#E69F00", "#BBBBBB"  # told apart by the colour-blind, and in grey
    rows = [row for row in summarise(results) if not row["error"]][::-1]

    def bars(axes, rows, values, labels):
        longest = max((value for value in values if value), default=1)
        for place, (row, value, label) in enumerate(zip(rows, values, labels, strict=True)):
            colour = ours if row["key"].startswith("ours") else other if row["own"] else peers
            axes.barh(place, value or 0, color=colour, height=0.7)
            axes.text((value or 0) + longest * 0.02, place, label, va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [row["title"].strip("*") for row in rows])
        axes.set_xlim(0, longest * 1.3)
        axes.spines[["top", "right"]].set_visible(False)

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    same = [row for row in rows if row["ratio"]]
    bars(left, same, [row["ratio"] for row in same], [f"{row['ratio']:.2f}" for row in same])
    left.axvline(1, color="black", linewidth=0.8)
    left.set_title("Time of an epoch, as a ratio to mnist.py (less is better)", fontsize=10)
    texts = [
        f"{row['to_goal']:.0f} s, {plural(row['epochs_to_goal'], 'epoch')}"
        if row["to_goal"]
        else f"not in {plural(results['cap'], 'epoch')}"
        for row in rows
    ]
    bars(right, rows, [row["to_goal"] for row in rows], texts)
    right.set_title(f"Seconds to {percent(GOAL, 0)} of the test set (grey: a smaller network)", fontsize=10)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def render(results, pages=PAGES, picture=PICTURE):
    """Write the table into the pages, and the picture; of a GPU, only the table into this folder's page."""
    if results.get("gpu"):
        return write_between_markers(PAGE, table(results), "bench-gpu")
    draw(results, picture)
    for page in pages:
        path = os.path.relpath(picture, page.parent)
        alt = "Bars: time of an epoch as a ratio to mnist.py, and time to 99 %, for each trainer in the table"
        write_between_markers(page, f"{table(results)}\n\n![{alt}]({path})")


# --- The command line -----------------------------------------------------------------------------


def parse_arguments(argv):
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--rounds", type=int, default=3, help="how often each trains for --epochs (default: 3)")
    add("--epochs", type=int, default=1, help="of a contender in a round (default: 1)")
    add("--cap", type=int, default=10, help="epochs in which to reach 99 %%; 0: do not try (default: 10)")
    add("--threads", type=int, default=len(cores), help="of each contender (default: all cores)")
    add("--images", type=int, help="a trial on so many images; prints the table only")
    add("--only", nargs="+", choices=KEYS, metavar="NAME", help=f"a trial with some of {', '.join(KEYS)}")
    add("--gpu", action="store_true", help="on an NVIDIA GPU; only those that use PyTorch")
    add("--results", type=Path, help="where the raw results go (default: in benchmarks/)")
    add("--render", action="store_true", help="run nothing, write pages and picture from the results")
    args = parser.parse_args(argv)
    if args.gpu and (lost := [c.key for c in CONTENDERS if c.key in (args.only or ()) and not c.on_gpu]):
        parser.error(f"JAX's build for CPUs is installed: {', '.join(lost)} cannot run with --gpu")
    args.trial = bool(args.images or args.only)
    args.results = args.results or (
        ROOT / "output" / "bench-trial.json" if args.trial else GPU_RESULTS if args.gpu else RESULTS
    )
    if hasattr(os, "sched_setaffinity"):  # JAX has no other way to limit its threads; children inherit this
        os.sched_setaffinity(0, cores[: args.threads])
    return args


def main(argv=None):
    args = parse_arguments(argv)
    if args.render:
        return render(json.loads(args.results.read_text()))
    # In a process of its own, for torch is large.
    unpack = "from torchvision.datasets import MNIST; MNIST('datasets', download=True)"
    subprocess.run([sys.executable, "-c", unpack], cwd=ROOT, check=True)
    results = {**machine(args), "runs": []}
    args.results.parent.mkdir(parents=True, exist_ok=True)

    def keep(seen):
        results["runs"].append(seen)
        args.results.write_text(json.dumps(results, indent=1) + "\n")  # at once: the next may take long
        what = seen["error"] or ", ".join(
            f"{epoch['seconds']:.1f} s {percent(epoch['accuracy'])}" for epoch in seen["epochs"]
        )
        name = f"round {seen['round']}" if seen["round"] else "long run"
        print(f"{name}, {seen['contender']}: {what}", flush=True)

    compare([contender for contender in CONTENDERS if contender.key in results["contenders"]], args, keep)
    print(f"\n{table(results)}")
    if not args.trial:
        render(results)


if __name__ == "__main__":
    main()
