"""The benchmark of how training scales: its model, its tables, and the links that it measures on."""

import json
from dataclasses import asdict

import pytest

import mnist
from benchmarks.reporting import replace_between
from benchmarks.scale import __main__, plan, report
from benchmarks.scale.measure import measure_hosts
from benchmarks.scale.model import BUCKETS, Model, Pace, fit
from benchmarks.scale.plan import Link
from tests.rig.hosts import need_hosts
from tests.rig.processes import need

TRUE = Model(start=3e-4, hop=1e-4, trips=1.1, asks=0.9, byte=1.5e-9, frames=1.05, bucket=2e-4)
PACE = Pace(rest=0.008, head=0.004, tail=0.008)


def all_reduces(model):
    """Return what the benchmark would measure if this model were the truth."""
    links = [
        (link.hosts, size, link.rate, link.delay) for link in plan.FITTED for size in (4, 160_000, 4_800_000)
    ]
    return [(*place, model.all_reduce(*place)) for place in links]


def steps(model):
    places = [(PACE, link.hosts, link.rate, link.delay) for link in plan.FITTED]
    return [(*place, model.step(*place)) for place in places]


def a_round(model):
    """Return a round of the benchmark as this model would have it."""
    pace = asdict(PACE)
    done = {name: {"steps": {"in earnest": {"together": PACE.step}}, "pace": pace} for name in plan.HERE}
    for link in dict.fromkeys([*plan.FITTED, *plan.HELD_OUT]):
        place = (link.hosts, link.rate, link.delay)
        step = {"together": model.step(PACE, *place), "alone": PACE.step, "buckets": "4724264, 75264"}
        done[str(link)] = {
            "link": {"mbit": link.rate, "round_trip": 2 * link.delay},
            **{kind: [model.all_reduce(place[0], 4 * n, *place[1:])] * 3 for kind, n in plan.SIZES.items()},
            "steps": dict.fromkeys(["in earnest", *(f"asleep, {name}" for name in plan.VARIANTS)], step),
        }
    return json.loads(json.dumps(done))


def test_the_fit_finds_what_the_times_were_made_of():
    found = fit(all_reduces(TRUE), steps(TRUE))
    assert vars(found) == pytest.approx(vars(TRUE), rel=1e-6)


def test_the_fit_finds_no_cost_below_zero():
    noisy = [
        (*place, seconds * (0.9 if n % 2 else 1.2)) for n, (*place, seconds) in enumerate(all_reduces(TRUE))
    ]
    noisy += [(2, 4_800_000, 10_000, 0, 1e-4)]  # faster than the rest allows
    assert min(vars(fit(noisy)).values()) >= 0


def test_more_workers_never_step_faster_and_more_bandwidth_never_slower():
    predicted = report.predict([a_round(TRUE)] * 2)
    fast, slow = (([step[1] for _, step in predicted[name]]) for name in ("10 Gbit/s", "1 Gbit/s"))
    assert fast == sorted(fast)
    assert slow == sorted(slow)
    assert all(a <= b for a, b in zip(fast, slow, strict=True))
    assert fast[0] == pytest.approx(PACE.step)


def test_computing_hides_the_buckets_that_are_done_before_it_ends():
    model = Model(start=0, hop=0, trips=1, asks=1, byte=0, frames=1)
    assert model.step(PACE, 2, 10**9, 0) == pytest.approx(PACE.step)
    # 10 Gbit/s: 3.8 ms for the linear layers, hidden by the 8 ms for the convolutions; theirs are not.
    assert model.step(PACE, 2, 10_000, 0) == pytest.approx(PACE.step + 8 * BUCKETS[1] / 10e9, rel=1e-3)
    whole = [sum(BUCKETS)]
    assert model.step(PACE, 2, 10_000, 0, whole) == pytest.approx(PACE.step + 8 * whole[0] / 10e9, rel=1e-3)


def test_the_buckets_are_those_of_the_network():
    net = mnist.Net()
    linear = sum(tensor.numel() for layer in (net.fc1, net.fc2) for tensor in layer.parameters())
    assert sum(tensor.numel() for tensor in net.parameters()) == plan.PARAMETERS
    assert (4 * linear, 4 * (plan.PARAMETERS - linear)) == BUCKETS


def test_the_tables_keep_the_rest_of_the_page(tmp_path, monkeypatch):
    page, raw = tmp_path / "README.md", tmp_path / "scale.json"
    page.write_text("# Before\n\n<!-- scale -->\nold\n<!-- /scale -->\n\nAfter, | with | bars |\n")
    about = {"torch": "2", "cpu": "none", "tcp": "none", "steps": 1}
    raw.write_text(json.dumps({"about": about, "rounds": [a_round(TRUE)] * 2}))
    monkeypatch.setattr("sys.argv", ["scale", "--again", "--output", str(tmp_path)])
    __main__.main()
    first = page.read_text()
    assert first.startswith("# Before\n\n<!-- scale -->\n\n")
    assert first.endswith("\n\n<!-- /scale -->\n\nAfter, | with | bars |\n")
    assert "old" not in first
    assert "| 1024 | 1 |" in first
    assert "| 3 hosts, 1 Gbit/s | " in first
    assert (tmp_path / "scale.png").stat().st_size > 10_000
    __main__.main()
    assert page.read_text() == first


def test_a_page_without_the_marks_is_refused():
    with pytest.raises(ValueError, match="scale"):
        replace_between("# Nothing\n", "scale", "new")


def test_a_slow_link_takes_about_what_the_model_says(tmp_path):
    need_hosts()
    need("tc", "iproute2")
    rate, delay = 100, 0.01
    link = Link(2, rate, delay)
    task = {"steps": 2, "pace": asdict(PACE), "variants": ["default"], "in_earnest": False}
    result = measure_hosts(link, tmp_path, **task)
    expected = TRUE.all_reduce(2, 4 * plan.PARAMETERS, rate, delay)
    assert expected / 2 < sorted(result["large"])[1] < expected * 2
    assert 0.7 * rate < result["link"]["mbit"] < rate
    assert 2 * delay <= result["link"]["round_trip"] < 2 * delay + 0.02
    assert result["sent"] == pytest.approx(1, rel=0.15)  # half of the numbers to add up, half of the sums
