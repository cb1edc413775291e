"""The tables and the picture; all times are in milliseconds."""

from statistics import median

import numpy as np
from matplotlib.figure import Figure

from benchmarks.scale.measure import FITTED, HELD_OUT, HERE, HERE_LONGER, ONE
from benchmarks.scale.model import ALL_REDUCES, Link, fit

BATCH = 64
HOSTS, RATES = np.array([2**power for power in range(1, 11)]), (10, 1)  # for these, a step is predicted


def evaluate(rounds):
    """Return the median over the rounds of each time that was seen, and the Model that fits them."""
    seen = {
        name: {what: 1000 * median(one[name][what] for one in rounds) for what in times}
        for name, times in rounds[0].items()
    }
    fitted = [(link, seen[str(link)]) for link in FITTED]
    all_reduces = [(link, size, times[name]) for link, times in fitted for name, size in ALL_REDUCES.items()]
    return seen, fit(all_reduces, [(link, times["compute"], times["step"]) for link, times in fitted])


def predict(seen, model):
    """Return the time of a step on each number of HOSTS, in an array for each of the RATES."""
    compute = seen[ONE]["step"]
    return [np.array([model.step(Link(hosts, rate), compute) for hosts in HOSTS]) for rate in RATES]


def report(results, seen, model):
    """Return the tables, in Markdown."""
    text = "Medians of {} round(s) of {steps} steps (on this machine alone, {}) on torch {torch}, {cpu}, "
    text += "TCP with {tcp}."
    here = HERE_LONGER * results["about"]["steps"]
    about = text.format(len(results["rounds"]), here, **results["about"])
    tables = here_table(seen), links_table(seen, model), prediction_table(seen, model)
    return "\n\n".join([about, *tables])


def table(head, rows):
    """Return a table; all columns but the first are numbers."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def here_table(seen):
    rows = []
    for name, (processes, _) in HERE.items():
        step = seen[name]["step"]
        rows.append([name, f"{step:.1f}", f"{1000 * BATCH * processes / step:,.0f}"])
    return table(["this machine", "step, ms", "images/s"], rows)


def links_table(seen, model):
    rows = []
    for link in FITTED + HELD_OUT:
        name = f"{link}, kept from the fit" if link in HELD_OUT else link
        large, *_, compute, step = seen[str(link)].values()
        times = [large, model.all_reduce(link, ALL_REDUCES["large"]), step, model.step(link, compute)]
        rows.append([name, *(f"{time:.1f}" for time in times), f"{compute / step:.0%}"])
    return table(["hosts", "all-reduce, ms", "model", "step, ms", "model", "efficiency"], rows)


def prediction_table(seen, model):
    rows = []
    for hosts, *steps in zip(HOSTS, *predict(seen, model), strict=True):
        efficiencies = [f"{seen[ONE]['step'] / step:.0%}" for step in steps]
        rows.append([hosts, *(f"{step:.1f}" for step in steps), *efficiencies])
    head = [f"{what} at {rate} Gbit/s" for what in ("step in ms", "efficiency") for rate in RATES]
    return table(["hosts", *head], rows)


def draw(path, seen, model):
    """Draw how right the model is, and what it predicts."""
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    checked, left, right = figure.subplots(1, 3)
    draw_check(checked, seen, model)
    alone = np.full(len(HOSTS), seen[ONE]["step"])
    labels = [*(f"{rate} Gbit/s" for rate in RATES), "without communication"]
    for steps, style, label in zip([*predict(seen, model), alone], ("o-", "s--", "k:"), labels, strict=True):
        left.loglog(HOSTS, steps, style, label=label)
        right.loglog(HOSTS, 1000 * BATCH * HOSTS / steps, style, label=label)
    left.set(title="A step: the model", ylabel="milliseconds")
    right.set(title="Throughput: the model", ylabel="images per second")
    for axes in (left, right):
        axes.minorticks_off()
        axes.set(xlabel="hosts, each with a batch of 64", xticks=HOSTS, xticklabels=HOSTS)
    left.set(yticks=(50, 100, 200, 400), yticklabels=(50, 100, 200, 400))
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def draw_check(axes, seen, model):
    """Draw what the model says of each all-reduce over what was seen."""
    for links, style, label in ((FITTED, "o", "fitted"), (HELD_OUT, "D", "kept from the fit")):
        kinds = [(link, name, size) for link in links for name, size in ALL_REDUCES.items()]
        measured = [seen[str(link)][name] for link, name, _ in kinds]
        axes.loglog(measured, [model.all_reduce(link, size) for link, _, size in kinds], style, label=label)
    axes.axline((1, 1), (10, 10), color="k", linestyle=":", label="no error")
    axes.set(title="All-reduces: is the model right?", xlabel="milliseconds measured", ylabel="by the model")
