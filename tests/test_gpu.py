"""`make gpu` says that there is no GPU, tries on a CPU what it can, and names what fails."""

import json
import shutil

import pytest
import torch

from rig.processes import need, run
from rig.project import ROOT

ON_A_CPU = ("benchmarks/gpu.py", "--device", "cpu", "--images", 1000, "--only")
# bf16 is float32 with a flag, kills is sigterm with another signal, and test_benchmarks.py runs the peers.
CHECKS = ("float32", "sigterm", "devices", "model", "processes", "nccl", "waits", "speed")


def rows(folder, output):
    """Return the rows in gpu.json by their check, after comparing them with the printed table."""
    found = json.loads((folder / "gpu.json").read_text())["checks"]
    for row in found:
        assert f"| {' | '.join(map(str, row.values()))} |\n" in output
    return {row["check"]: row for row in found}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_in_a_sentence():
    code, output = run(ROOT, "benchmarks/gpu.py")
    sentence = "PyTorch finds no NVIDIA GPU here: --device cpu tries what can be tried without one"
    assert (code, output) == (1, f"gpu.py: {sentence}\n")


def test_a_cpu_holds_what_it_can_and_leaves_the_rest_to_a_gpu(tmp_path):
    need("timeout", "coreutils")
    code, output = run(ROOT, *ON_A_CPU, *CHECKS, timeout=600, TMPDIR=tmp_path, OMP_NUM_THREADS=1)
    assert code == 0, output
    checks = rows(tmp_path, output)
    assert {name: row["seen"][:9] for name, row in checks.items() if row["state"] == "not tried"} == {
        "float32": "needs all",
        **dict.fromkeys(("devices", "model", "processes", "waits", "speed"), "needs a G"),
        "nccl": "needs two",
    }
    assert tuple(checks) == CHECKS and checks["sigterm"]["state"] == "held"
    assert checks["sigterm"]["seen"].startswith("the same bits, interrupted after ")


@pytest.fixture
def broken(tmp_path):
    """A copy of the project whose trainer forgets its momentum and learning rate when it resumes."""
    for path in ("benchmarks/gpu.py", "rig/__init__.py", "rig/project.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    trainer, loop = (ROOT / "mnist.py").read_text(), "        for name in STATES:\n"
    assert trainer.count(loop) == 1
    (tmp_path / "mnist.py").write_text(trainer.replace(loop, loop.replace("STATES", "STATES[:2]")))
    return tmp_path


def test_what_fails_is_named_and_hides_nothing(broken):
    need("timeout", "coreutils")
    command = (*ON_A_CPU, "sigterm", "nccl")
    code, output = run(broken, *command, TMPDIR=broken, OMP_NUM_THREADS=1)
    assert code == 1, output
    checks = rows(broken, output)
    assert {name: row["state"] for name, row in checks.items()} == {"sigterm": "failed", "nccl": "not tried"}
    assert checks["sigterm"]["seen"].startswith("Tensor-likes are not equal!")
    assert "\nsigterm: Traceback" in output
