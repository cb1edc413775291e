"""`make gpu` says that there is no GPU, tries on a CPU what it can, and names what fails."""

import json
import shutil

import pytest
import torch

from rig.processes import fork, need, run
from rig.project import ROOT

PROGRAM = "benchmarks/gpu.py"
ON_A_CPU = ("--device", "cpu", "--images", 1000)
# bf16 is float32 with a flag, kills is sigterm with another signal, and test_benchmarks.py runs the peers.
# devices resumes twice, as sigterm does once: what it adds needs a GPU.
NEEDS = {"float32": "all images", "nccl": "two GPUs"}
NEEDS |= dict.fromkeys(("model", "processes", "waits", "speed"), "a GPU")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_a_sentence():
    code, output = fork(ROOT, ROOT / PROGRAM)
    sentence = "PyTorch finds no NVIDIA GPU here: --device cpu tries what can be tried without one"
    assert (code, output) == (1, f"gpu.py: {sentence}\n")


@pytest.mark.parametrize("check", NEEDS)
def test_a_cpu_tries_what_it_can_and_leaves_the_rest_to_a_gpu(small, check):
    code, output = fork(small, ROOT / PROGRAM, *ON_A_CPU, "--check", check, OMP_NUM_THREADS=1)
    assert code == 1 and output.splitlines()[-1].startswith(f"not tried: needs {NEEDS[check]}"), output


def test_what_holds_is_said(small):
    code, output = fork(small, ROOT / PROGRAM, *ON_A_CPU, "--check", "sigterm", OMP_NUM_THREADS=1)
    assert code == 0 and output.startswith("held: the same bits, interrupted after "), output


def test_what_fails_is_named_and_hides_nothing(tmp_path):
    """In a copy of the project whose trainer forgets its momentum and learning rate when it resumes."""
    for path in (PROGRAM, "rig/__init__.py", "rig/project.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    trainer, loop = (ROOT / "mnist.py").read_text(), "        for name in STATES:\n"
    assert trainer.count(loop) == 1
    (tmp_path / "mnist.py").write_text(trainer.replace(loop, loop.replace("STATES", "STATES[:2]")))
    need("timeout", "coreutils")
    program = (PROGRAM, *ON_A_CPU, "--only", "sigterm", "nccl")
    code, output = run(tmp_path, *program, TMPDIR=tmp_path, OMP_NUM_THREADS=1)
    assert code == 1, output
    checks = {row["check"]: row for row in json.loads((tmp_path / "gpu.json").read_text())["checks"]}
    assert all(f"| {' | '.join(map(str, row.values()))} |\n" in output for row in checks.values())
    assert {name: row["state"] for name, row in checks.items()} == {"sigterm": "failed", "nccl": "not tried"}
    assert checks["sigterm"]["seen"].startswith("Tensor-likes are not equal!")
    assert "\nsigterm: Traceback" in output
