"""`make gpu` says that there is no GPU, tries on a CPU what it can, and names what fails."""

import json
import re
import shutil

import pytest
import torch

import mnist
from benchmarks.gpu import Checks
from rig.processes import fork, need, run
from rig.project import ROOT

PROGRAM = "benchmarks/gpu.py"
ON_A_CPU = ("--device", "cpu", "--images", 1000)
# bf16 is float32 with a flag, kills is sigterm with another signal, and test_benchmarks.py runs the peers.
# What devices and processes add to sigterm and to test_trainer.py needs a GPU.
NEEDS = {"float32": "all images", "nccl": "two GPUs"} | dict.fromkeys(("model", "waits", "speed"), "a GPU")
STATES = {"sigterm": "held", "model": "failed", "nccl": "not tried"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_a_sentence():
    code, output = fork(ROOT, ROOT / PROGRAM)
    sentence = "PyTorch finds no NVIDIA GPU here: --device cpu tries what can be tried without one"
    assert (code, output) == (1, f"gpu.py: {sentence}\n")


@pytest.mark.parametrize("check", NEEDS)
def test_a_cpu_tries_what_it_can_and_leaves_the_rest_to_a_gpu(small, check):
    code, output = fork(small, ROOT / PROGRAM, *ON_A_CPU, "--check", check, OMP_NUM_THREADS=1)
    assert code == 1 and output.splitlines()[-1].startswith(f"not tried: needs {NEEDS[check]}"), output


def test_one_other_bit_in_a_checkpoint_is_no_longer_the_same(tmp_path, monkeypatch):
    """The trainings are left out: their checkpoints are there already."""
    for folder, weight in {"SIGTERM": 1.0, "undisturbed": 1 + 2**-23}.items():
        (tmp_path / folder).mkdir()
        torch.save(dict.fromkeys(mnist.STATES, torch.tensor([weight])), tmp_path / folder / "checkpoint.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Checks, "_train", lambda *_, **__: [])
    with pytest.raises(AssertionError, match="Tensor-likes are not equal"):
        Checks(images=1000).sigterm()


def test_what_holds_what_fails_and_what_was_not_tried_is_said(tmp_path):
    """In a copy of the project whose trainer saves a model that has forgotten what it learned."""
    for path in (PROGRAM, "rig/__init__.py", "rig/project.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    trainer, saved = (ROOT / "mnist.py").read_text(), "trainer.averaged_model.cpu()"
    assert trainer.count(saved) == 1
    (tmp_path / "mnist.py").write_text(trainer.replace(saved, "Net()"))
    need("timeout", "coreutils")
    how = {"timeout": 600, "TMPDIR": tmp_path, "OMP_NUM_THREADS": 1}
    code, output = run(tmp_path, PROGRAM, *ON_A_CPU, "--only", *STATES, **how)
    assert code == 1, output
    checks = {row["check"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["checks"]}
    assert all(f"| {' | '.join(map(str, row.values()))} |\n" in output for row in checks.values())
    assert {name: row["state"] for name, row in checks.items()} == STATES
    assert checks["sigterm"]["seen"].startswith("the same bits, interrupted after ")
    assert re.match(r"\d+\.\d\d% without a GPU, \d+\.\d\d% where it was trained", checks["model"]["seen"])
    assert "\nmodel: Traceback" in output
