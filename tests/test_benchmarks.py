"""The comparison with peers runs, writes its pages and lists what is missing. And mnist.py stays fast.

Nothing here needs the peers' packages. Speed is tested in ratios, of the processor's time on one thread and
in turns, so that neither the machine nor what else it does decides.
"""

import importlib.util
import json
import os
import re
import sys

import pytest
import torch

from tests.rig.processes import run
from tests.rig.project import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))


def load_bench():
    spec = importlib.util.spec_from_file_location("bench", ROOT / "benchmarks" / "bench.py")
    sys.modules["bench"] = module = importlib.util.module_from_spec(spec)  # dataclasses look it up there
    spec.loader.exec_module(module)
    return module


bench = load_bench()


# --- the runner


def test_contenders_run_and_leave_all_figures(tmp_path):
    names = ["ours", "pytorch_example", "seed"]
    code, output = run(
        ROOT,
        *("benchmarks/bench.py", "--images", 256, "--epochs", 1, "--rounds", 1, "--cap", 0),
        *("--threads", 1, "--results", tmp_path / "results.json", "--only", *names),
    )
    assert code == 0, output
    results = json.loads((tmp_path / "results.json").read_text())
    assert [seen["contender"] for seen in results["runs"]] == names
    for seen in results["runs"]:
        assert seen.keys() == {"round", "contender", "start_up", "epochs", "error", "peak_memory"}
        assert seen["error"] is None and seen["start_up"] > 0 and seen["peak_memory"] > 100 * 2**20
        (epoch,) = seen["epochs"]
        assert epoch["seconds"] > 0 and epoch["cpu_seconds"] > 0 and 0.2 < epoch["accuracy"] < 1
    assert results["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert (results["images"], results["threads"]) == (256, 1) and results["cpu"] and results["date"]
    assert f"{bench.table(results)}\n" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_a_sentence():
    code, output = run(ROOT, "benchmarks/bench.py", "--gpu", "--images", 256)
    assert (code, output) == (1, "bench.py: PyTorch finds no NVIDIA GPU here: leave out --gpu\n")


def test_on_a_gpu_those_that_can_use_it_do():
    able = [contender for contender in bench.CONTENDERS if contender.on_gpu]
    assert [contender.key for contender in bench.CONTENDERS if contender not in able] == [
        *("keras", "flax", "keras_own", "flax_own")
    ]
    for contender in able:
        here, there = (contender.command(1, 1, None, gpu, "output") for gpu in (False, True))
        assert set(here) ^ set(there) == ({"--gpu"} if contender.script else {"--no-cuda"})
    assert "CUDA_VISIBLE_DEVICES" not in bench.environment(1, True).keys() - os.environ.keys()
    assert bench.environment(1, False)["CUDA_VISIBLE_DEVICES"] == ""


def test_contender_that_cannot_be_imported_is_listed(tmp_path, monkeypatch):
    (tmp_path / "peer.py").write_text("import no_such_library\n")
    path = os.path.relpath(tmp_path / "peer.py", ROOT / "benchmarks" / "peers")
    missing = bench.Contender("missing", "Missing", path)
    seen = {"round": 1, **bench.run(missing, 1, threads=1)}
    monkeypatch.setattr(bench, "CONTENDERS", (bench.OURS, missing))
    results = some_results("ours", "missing", runs=[seen])
    assert "| Missing | not installed: No module named 'no_such_library' |" in bench.table(results)


def test_contender_that_has_done_enough_is_stopped(tmp_path):
    script = (
        'import time\nprint(\'{"ready": true}\')\nprint(\'{"epoch": 1, "accuracy": 0.99}\')\ntime.sleep(60)\n'
    )
    (tmp_path / "peer.py").write_text(script)
    path = os.path.relpath(tmp_path / "peer.py", ROOT / "benchmarks" / "peers")
    seen = bench.run(bench.Contender("slow", "Slow", path), 9, threads=1, enough=lambda epochs: True)
    assert seen["error"] is None and [epoch["accuracy"] for epoch in seen["epochs"]] == [0.99]


# --- what it writes


def some_results(*contenders, runs):
    return {
        "date": "2026-01-31",
        "cpu": "a processor",
        "python": "3.11.7",
        "packages": {"torch": "2.15.0", "flax": None},
        "contenders": list(contenders),
        "threads": 2,
        "images": 60_000,
        "rounds": 2,
        "cap": 6,
        "runs": runs,
    }


def some_run(contender, number, *seconds_and_accuracies):
    epochs = [{"seconds": s, "cpu_seconds": 2 * s, "accuracy": a} for s, a in seconds_and_accuracies]
    run = {"contender": contender, "round": number, "start_up": 3.0, "error": None}
    return {**run, "epochs": epochs, "peak_memory": 2**30}


@pytest.fixture
def results():
    ours = [some_run("ours", 1, (20, 0.98)), some_run("ours", 2, (40, 0.98))]
    peer = [
        some_run("flax", 1, (30, 0.97)),
        some_run("flax", 2, (80, 0.97)),
    ]  # twice as slow, in median: 1.75
    long = [
        some_run("ours", None, (20, 0.98), (20, 0.99), (20, 0.985), (20, 0.991), (20, 0.9915)),
        some_run("flax", None, *[(30, 0.98)] * 6),
    ]
    return some_results("ours", "flax", runs=ours + peer + long)


def test_table_has_medians_and_ratios_of_the_same_round(results):
    ours, flax = bench.table(results).splitlines()[-2:]
    assert (
        ours
        == "| **mnist.py** | 30.0 s | 1.00 | 2,000 | 60.0 s | 1.00 GiB | 3.0 s | 40 s (2 epochs) | 99.15 % |"
    )
    assert flax == "| Flax | 55.0 s | 1.75 | 1,091 | 110.0 s | 1.00 GiB | 3.0 s | not in 6 epochs | 98.00 % |"


def test_figures_of_a_gpu_have_a_table_of_their_own(results, tmp_path, monkeypatch):
    page = tmp_path / "README.md"
    page.write_text("<!-- bench -->\nold\n<!-- /bench --><!-- bench-gpu -->\nold\n<!-- /bench-gpu -->\n")
    monkeypatch.setattr(bench, "PAGE", page)
    bench.render(results | {"gpu": "a GPU"}, [], tmp_path / "no.png")
    text = page.read_text()
    assert text.startswith(
        "<!-- bench -->\nold\n<!-- /bench --><!-- bench-gpu -->\n\na GPU beside a processor"
    )
    assert "| 30.00 s | 1.00 |" in text and list(tmp_path.iterdir()) == [page]


def test_pages_change_between_the_markers_only(results, tmp_path):
    pages = [tmp_path / "README.md", tmp_path / "benchmarks" / "README.md"]
    pages[1].parent.mkdir()
    for page in pages:
        page.write_text("# Before\n\n<!-- bench -->\n\nold\n\n<!-- /bench -->\n\nAfter\n")
    for _ in range(2):  # the second time over what the first has written
        bench.render(results, pages, tmp_path / "docs.png")
    for page, picture in zip(pages, ["docs.png", "../docs.png"], strict=True):
        before, written, after = re.split(r"<!-- /?bench -->", page.read_text())
        assert (before, after) == ("# Before\n\n", "\n\nAfter\n")
        assert bench.table(results) in written and f"({picture})" in written and "old" not in written
    assert (tmp_path / "docs.png").read_bytes().startswith(b"\x89PNG")


def test_page_without_markers_is_left_alone(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("<!-- bench --> only\n")
    with pytest.raises(ValueError, match="must have"):
        bench.write_between_markers(page, "text")
    assert page.read_text() == "<!-- bench --> only\n"


def test_pages_show_the_stored_results():
    stored = bench.RESULTS.exists()
    expected = bench.table(json.loads(bench.RESULTS.read_text())) if stored else "Not measured yet."
    for page in bench.PAGES:
        _, written, _ = re.split(r"<!-- /?bench -->", page.read_text())
        assert written.strip().startswith(expected), page


def test_packages_of_the_peers_are_pinned_as_the_others_are():
    def pins(name):
        lines = (ROOT / name).read_text().splitlines()
        return {line for line in lines if re.match(r"\w", line)}

    peers = pins("requirements-bench.txt")
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in peers)
    assert pins("requirements-bench.in") <= {pin.partition("==")[0] for pin in peers}
    both = [{pin for pin in file if pin.startswith("torch==")} for file in (peers, pins("requirements.txt"))]
    assert both[0] == both[1], "one environment serves all"
