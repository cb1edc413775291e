"""The benchmark of how training scales: its model, its page, and the links that it measures on."""

import shutil
import time

import numpy as np
import pytest
import torch

import mnist
from benchmarks.reporting import replace_between
from benchmarks.scale import __main__
from benchmarks.scale.measure import FITTED, measure_hosts
from benchmarks.scale.model import ALL_REDUCES, BUCKETS, TAIL, Link, Model, fit
from benchmarks.scale.worker import Sleeper
from rig.processes import need
from rig.project import ROOT

TRUE = Model(np.array([0.15, 1.5e-6, 1.04]), ddp=4)


def test_the_fit_finds_what_the_times_were_made_of():
    sizes = ALL_REDUCES.values()
    all_reduces = [(link, size, TRUE.all_reduce(link, size)) for link in FITTED for size in sizes]
    found = fit(all_reduces, [(link, 60, TRUE.step(link, 60)) for link in FITTED])
    assert found.costs == pytest.approx(TRUE.costs, rel=1e-6)
    assert found.ddp == pytest.approx(TRUE.ddp, rel=1e-6)


def test_computing_hides_the_first_bucket_but_not_the_second():
    only_the_wire = Model(np.array([0, 0, 1]))
    # Both hosts send as much as there is, at 10 Gbit/s.
    first, second = (8e-6 * size / 10 for size in BUCKETS)
    assert only_the_wire.step(Link(2, 10), 60) == pytest.approx(60 + second)
    assert only_the_wire.step(Link(2, 10), 1) == pytest.approx(1 + first - TAIL)


def test_the_buckets_are_those_of_the_network():
    net = mnist.Net()
    buckets = (net.fc1, net.fc2), (net.conv1, net.conv2)
    numbers = [sum(weights.numel() for layer in each for weights in layer.parameters()) for each in buckets]
    assert (4 * numbers[0], 4 * numbers[1]) == BUCKETS


def test_a_sleeper_has_its_gradients_when_the_network_would():
    sleeper, moments = Sleeper(0.5), {"fc": [], "co": []}
    for name, weights in sleeper.named_parameters():
        note = moments[name[:2]].append
        weights.register_post_accumulate_grad_hook(lambda _, note=note: note(time.monotonic() - begin))
    begin = time.monotonic()
    sleeper(torch.zeros(1)).backward()
    assert [len(kind) for kind in moments.values()] == [4, 4]
    assert min(moments["fc"]) >= (1 - TAIL) * 0.5
    assert max(moments["fc"]) < 0.5 <= min(moments["co"])


def test_the_stored_times_give_the_stored_page(tmp_path, monkeypatch):
    for name in ("README.md", "scale.json"):
        shutil.copy(ROOT / "benchmarks/scale" / name, tmp_path)
    page = tmp_path / "README.md"
    stored = page.read_text()
    page.write_text(replace_between(stored, "scale", "old"))
    monkeypatch.setattr("sys.argv", ["scale", "--again", "--output", str(tmp_path)])
    __main__.main()
    assert page.read_text() == stored
    assert (tmp_path / "scale.png").stat().st_size > 10_000


def test_a_slow_link_takes_about_what_the_model_says(hosts, tmp_path):
    need("tc", "iproute2")
    link = Link(2, 0.1)
    seen = measure_hosts(link, tmp_path, steps=2, seconds=0.02)
    assert 0.8 < 1000 * seen["large"] / TRUE.all_reduce(link, ALL_REDUCES["large"]) < 2
    assert 0.8 < 1000 * seen["step"] / TRUE.step(link, 20) < 2
    assert 0.02 <= seen["compute"] < 0.2
