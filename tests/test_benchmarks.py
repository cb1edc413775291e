"""The comparison with peers runs, writes its page, and lists what is not installed.

Nothing here needs the packages of the peers.
"""

import json
import os
import re

import pytest
import torch

from benchmarks import bench
from benchmarks.reporting import replace_between
from rig.processes import run
from rig.project import ROOT

# --- the runner


def test_contenders_run_and_leave_all_figures(tmp_path):
    names = ["ours", "pytorch_example_bf16", "older_tutorial"]
    flags = ("--images", 256, "--epochs", 1, "--rounds", 1, "--cap", 0, "--threads", 1)
    few = ("--results", tmp_path / "results.json", "--only", *names)
    code, output = run(ROOT, "benchmarks/bench.py", *flags, *few, timeout=600)
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


def test_a_missing_gpu_is_reported_in_a_sentence(monkeypatch):
    monkeypatch.setattr(bench, "prepare", lambda: "")  # it finds none
    with pytest.raises(SystemExit, match=r"^bench\.py: PyTorch finds no NVIDIA GPU here: leave out --gpu$"):
        bench.main(["--gpu", "--images", "256"])


def test_all_but_jax_use_the_gpu_if_asked_to():
    able = [contender for contender in bench.CONTENDERS if contender.on_gpu]
    unable = {contender.key for contender in bench.CONTENDERS if contender not in able}
    assert unable == {"keras", "flax", "keras_own", "flax_own"}
    for contender in able:
        here, there = (contender.command(1, "output", gpu=gpu) for gpu in (False, True))
        assert set(here) ^ set(there) == ({"--gpu"} if contender.peer else {"--no-cuda"})
    assert "CUDA_VISIBLE_DEVICES" not in bench.environment(1, True).keys() - os.environ.keys()
    assert bench.environment(1, False)["CUDA_VISIBLE_DEVICES"] == ""


def peer(folder, program):
    (folder / "peer.py").write_text(program)
    return bench.Contender("peer", "Peer", os.path.relpath(folder / "peer.py", ROOT / "benchmarks" / "peers"))


def test_a_contender_that_is_not_installed_is_listed(tmp_path, monkeypatch):
    missing = peer(tmp_path, "import no_such_library")
    seen = {"round": 1, **bench.run(missing, 1, threads=1)}
    monkeypatch.setattr(bench, "CONTENDERS", (bench.OURS, missing))
    results = some_results("ours", "peer", runs=[seen])
    assert "| Peer | not installed: No module named 'no_such_library' |" in bench.table(results)


def test_a_contender_that_has_done_enough_is_stopped(tmp_path):
    program = "import time; print('Epoch: 1'); print('accuracy=0.99'); time.sleep(30); open('{}', 'w')"
    slow = peer(tmp_path, program.format(tmp_path / "not stopped"))
    seen = bench.run(slow, 9, threads=1, enough=lambda epochs: True)
    assert seen["error"] is None and [epoch["accuracy"] for epoch in seen["epochs"]] == [0.99]
    assert not (tmp_path / "not stopped").exists()


def test_a_peers_first_epoch_begins_when_it_is_ready_and_that_of_mnist_when_it_prints(tmp_path, monkeypatch):
    program = "import time; print('hello'); time.sleep(1); print('Epoch: 1'); print('accuracy=0.9')"
    of_peer = bench.run(peer(tmp_path, program), 1, threads=1)
    monkeypatch.setattr(bench.Contender, "command", lambda self, *rest: [tmp_path / "peer.py"])
    of_ours = bench.run(bench.OURS, 1, threads=1)
    assert of_peer["epochs"][0]["seconds"] < 0.5 <= of_ours["epochs"][0]["seconds"]
    assert min(of_peer["start_up"], of_ours["start_up"]) > 0.9


# --- what it writes


def some_results(*contenders, runs):
    about = {"date": "2026-01-31", "cpu": "a processor", "python": "3.11.7"}
    about |= {"packages": {"torch": "2.15.0", "flax": None}, "threads": 2, "images": 60_000}
    return about | {"rounds": 2, "cap": 6, "contenders": list(contenders), "runs": runs}


def some_run(contender, number, *seconds_and_accuracies):
    epochs = [{"seconds": s, "cpu_seconds": 2 * s, "accuracy": a} for s, a in seconds_and_accuracies]
    run = {"contender": contender, "round": number, "start_up": 3.0, "error": None}
    return {**run, "epochs": epochs, "peak_memory": 2**30}


@pytest.fixture
def results():
    ours = [some_run("ours", 1, (20, 0.98)), some_run("ours", 2, (40, 0.98))]
    flax = [some_run("flax", 1, (30, 0.97)), some_run("flax", 2, (80, 0.97))]  # 1.5 and 2 times as slow
    long = [some_run("ours", None, (20, 0.98), (20, 0.99), (20, 0.985), (20, 0.991), (20, 0.9915))]
    long += [some_run("flax", None, *[(30, 0.98)] * 6)]
    return some_results("ours", "flax", runs=ours + flax + long)


def test_table_has_medians_and_ratios_of_the_same_round(results):
    ours, flax = bench.table(results).splitlines()[-2:]
    figures = "30.0 s | 1.00 | 2,000 | 60.0 s | 1.00 GiB | 3.0 s | 40 s (2 epochs) | 99.15 %"
    assert ours == f"| **mnist.py** | {figures} |"
    assert flax == "| Flax | 55.0 s | 1.75 | 1,091 | 110.0 s | 1.00 GiB | 3.0 s | not in 6 epochs | 98.00 % |"


def test_figures_of_a_gpu_have_a_table_of_their_own(results, tmp_path):
    page, before = tmp_path / "peers.md", "<!-- bench -->\nold\n<!-- /bench -->\n<!-- bench-gpu -->\n"
    page.write_text(f"{before}old\n<!-- /bench-gpu -->\n")
    bench.render(results | {"gpu": "a GPU"}, page, tmp_path / "no.png")
    text = page.read_text()
    assert text.startswith(f"{before}\na GPU with a processor") and "| 30.00 s | 1.00 |" in text
    assert list(tmp_path.iterdir()) == [page]


def between(page, mark):
    """Return the text of a page before, between and after two markers."""
    return re.split(f"<!-- /?{mark} -->", page.read_text())


def test_the_page_changes_between_the_markers_only(results, tmp_path):
    page = tmp_path / "peers.md"
    page.write_text("# Before\n\n<!-- bench -->\n\nold\n\n<!-- /bench -->\n\nAfter\n")
    for _ in range(2):  # the second time over what the first has written
        bench.render(results, page, tmp_path / "picture.png")
    before, written, after = between(page, "bench")
    assert (before, after) == ("# Before\n\n", "\n\nAfter\n")
    assert bench.table(results) in written and "(picture.png)" in written and "old" not in written
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


UNPAIRED = ["none", "<!-- a --> only", "<!-- /a --><!-- a -->", "<!-- a --><!-- a --><!-- /a -->"]


@pytest.mark.parametrize("page", UNPAIRED)
def test_a_page_whose_markers_are_not_a_pair_is_refused(page):
    with pytest.raises(ValueError, match="once each, in this order"):
        replace_between(page, "a", "text")


@pytest.mark.parametrize("mark, file", [("bench", bench.RESULTS), ("bench-gpu", bench.GPU_RESULTS)])
def test_the_page_shows_the_stored_results(mark, file):
    expected = bench.table(json.loads(file.read_text())) if file.exists() else "Not measured"
    assert between(bench.PAGE, mark)[1].strip().startswith(expected)


def test_the_peers_have_the_projects_own_torch():
    files = (ROOT / name for name in ("requirements.txt", "requirements-bench.txt"))
    pins = [re.findall(r"^torch==.+$", file.read_text(), re.MULTILINE) for file in files]
    assert pins[0] == pins[1] != [], "one environment serves all"
