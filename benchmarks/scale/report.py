"""The tables and the picture."""

import math

import numpy as np

from benchmarks.scale.model import AGREEMENT, Pace, fit
from benchmarks.scale.plan import (
    BATCH,
    FITTED,
    HELD_OUT,
    HERE,
    IMAGES,
    IN_EARNEST,
    NETWORKS,
    PREDICTED,
    SIZES,
    VARIANTS,
    VARIED,
)


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
        cells = [workers, math.ceil(IMAGES / BATCH / workers)]
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
    """Return what stands in README.md: all tables."""
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
    """Return a sentence on how long the agreement of many workers is under way."""
    costs = [f"{model.all_reduce(PREDICTED[-1], AGREEMENT, *wire) * 1000:.0f}" for wire in NETWORKS.values()]
    times = " and ".join(f"{cost} ms at {name}" for cost, name in zip(costs, NETWORKS, strict=True))
    return f"Within a step of {PREDICTED[-1]:,} workers, their agreement on whether to stop takes {times}."


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
