"""The batch script on a real Slurm: the same file, killed, out of time, and never the worse for it."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from rig.engine import BASE_IMAGE, running_engine
from rig.processes import need
from rig.project import ROOT
from rig.slurm import Job, Slurm, need_slurm
from rig.training import OPTIONS, metrics, weights

pytestmark = pytest.mark.cluster

SCRIPT = "slurm/mnist.sbatch"
FLAGS = (*OPTIONS, "--epochs", 1)
LONGER = (*FLAGS, "--batch-size", 6)  # for a job to which something happens: on a fast machine, too
# What a shell has that an interactive allocation gave it, of another size than the job's.
OUTER = {"SLURM_NTASKS": 9, "SLURM_NNODES": 5, "SLURM_TASKS_PER_NODE": 5, "SLURM_CPUS_PER_TASK": 8}
OUTER |= {"SLURM_GPUS": 5, "SLURM_GPUS_ON_NODE": 5, "SLURM_CPU_BIND": "quiet,mask_cpu:0x2"}
OUTER |= {"SLURM_MEM_PER_CPU": 5, "SLURM_MEM_PER_NODE": 7, "SLURM_HINT": "nomultithread"}


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    """A folder with the file system of the Dockerfile's base image, and this environment's packages."""
    need_slurm()
    need("ch-run", "charliecloud")
    folder, archive = tmp_path_factory.mktemp("container"), os.environ.get("MNIST_BASE_IMAGE_TAR")
    if not archive:
        archive = folder / "base.tar"
        with running_engine() as engine:
            container = engine.must("create", BASE_IMAGE).split()[-1]
            engine.must("export", "--output", archive, container)
    subprocess.run(["ch-convert", "-i", "tar", "-o", "dir", archive, folder / "image"], check=True)
    for mounted in ("app", "packages"):
        (folder / "image" / mounted).mkdir()
    packages = Path(pytest.__file__).parents[1]
    subprocess.run(["mount", "--bind", packages, folder / "image/packages"], check=True)
    yield folder / "image"
    subprocess.run(["umount", folder / "image/packages"], check=True)


@pytest.fixture(scope="module")
def slurm(image, tmp_path_factory):
    """A cluster, which is started after the image is there: its nodes do not see later mounts."""
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def clone(small_template, tmp_path_factory):
    """A small project with the script and an environment, at a path with a space."""
    folder = shutil.copytree(small_template, tmp_path_factory.mktemp("user") / "my clone")
    shutil.copytree(ROOT / "slurm", folder / "slurm")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@pytest.fixture(scope="module")
def submit(slurm, clone):
    return partial(slurm.sbatch, clone)


@pytest.fixture(scope="module")
def meanwhile():
    """Where fixtures do what takes long, while other tests run."""
    with ThreadPoolExecutor() as pool:
        yield pool.submit


@pytest.fixture(scope="module", autouse=True)
def slow(submit, slurm, meanwhile):
    """A job that is out of time, then requeued."""
    options = ("--nodelist=node[1-2]", "--time=2", "--job-name=slow")
    job = submit("--nodes=2", *options, SCRIPT, *OPTIONS, "--timeout", 120)

    def disturb():
        job.hold("node2", "Epoch: 1 ( 29")  # until its time is over
        job.hold("node2", "- Loss: ", starts=2)
        slurm("scontrol", "requeue", job.number)

    return job, meanwhile(disturb)


@pytest.fixture(scope="module", autouse=True)
def lost(submit, slurm, meanwhile):
    """A job that loses its second node, which then comes back."""
    job = submit("--nodes=2", "--nodelist=node[3-4]", "--job-name=lost", SCRIPT, *LONGER)

    def disturb():
        job.hold("node4", "Epoch: 1 ( 11")
        slurm.nodes["node4"].kill()
        slurm.wait(lambda: "Node failure on node4" in job.log)
        slurm.start_node("node4")

    return job, meanwhile(disturb)


def test_the_linter_finds_nothing_in_a_script_of_forty_lines():
    linter = Path(sys.executable).with_name("shellcheck")
    need(linter, "the packages of requirements-dev.txt")
    found = subprocess.run([linter, ROOT / SCRIPT], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")
    assert len((ROOT / SCRIPT).read_text().splitlines()) <= 40
    assert len((ROOT / "slurm/README.md").read_text().splitlines()) <= 90


def test_each_gpu_has_a_process_whatever_an_outer_allocation_had(submit, clone):
    folder = "output/by the flag"
    job = submit("--nodes=1", "--partition=gpus", SCRIPT, *FLAGS, "--output-dir", folder, **OUTER)
    assert job.ended() == ("COMPLETED", 0), job.log
    assert job.log.startswith("Started by a batch system: rank 0 of 2, ") and ", 1 thread, " in job.log
    assert len(metrics(clone / folder)) == 1


def test_jobs_of_an_array_share_nodes_do_not_meet_and_have_a_rate_and_a_folder_each(submit, slurm, clone):
    flags = (*FLAGS, "--lr", "%ae-2")
    last = submit("--array=3,10", "--nodes=2", "--partition=crowded", "--job-name=lr", SCRIPT, *flags)
    jobs = [Job(slurm, clone, f"{last.number}_{index}") for index in (3, 10)]
    jobs[1].printed("Epoch: ")
    assert [job.ended() for job in jobs] == [("COMPLETED", 0)] * 2, jobs[0].log + jobs[1].log
    assert {job.shown("NodeList") for job in jobs} == {"wide[1-2]"}
    assert max(job.shown("StartTime") for job in jobs) <= min(job.shown("EndTime") for job in jobs)
    assert [metrics(clone / f"output/lr-{index}")[0]["learning_rate"] for index in (3, 10)] == [0.03, 0.1]


def test_a_wrong_flag_fails_once(submit):
    job = submit("--nodes=1", "--partition=wide", "--job-name=wrong", SCRIPT, "--epocs", 3)
    assert job.ended() == ("FAILED", 2)
    assert "mnist.py: error: unrecognized arguments: --epocs 3" in job.log
    assert job.shown("Restarts") == "0"


def test_what_is_missing_is_one_sentence(submit, slurm, clone, tmp_path):
    elsewhere = slurm.sbatch(tmp_path, "--nodes=1", "--partition=wide", clone / SCRIPT)
    python = submit("--nodes=1", "--partition=wide", SCRIPT, PYTHON="/gone/python")
    assert (elsewhere.ended(), python.ended()) == (("FAILED", 1),) * 2
    assert elsewhere.log.startswith(f"slurm/mnist.sbatch: {tmp_path} has no mnist.py: ")
    assert python.log.startswith("slurm/mnist.sbatch: there is no /gone/python: ")
    assert elsewhere.log.count("\n") == python.log.count("\n") == 1


def test_a_killed_process_fails_the_job_and_the_next_one_goes_on_in_a_container(submit, image):
    command = ("--nodes=2", "--partition=wide", "--job-name=killed", SCRIPT, *LONGER)
    job = submit(*command)
    for trainer in job.hold("wide2", "Epoch: 1 ( 11"):
        trainer.kill()
    assert job.ended() == ("FAILED", 137), job.log
    assert "rank 0 of 2 (meeting at wide1:" in job.log
    assert job.shown("Restarts") == "0"
    job = submit(*command, IMAGE=image, USER="root", PYTHONPATH="/packages")
    assert job.ended() == ("COMPLETED", 0), job.log
    assert "Resuming in epoch 1" in job.log


def test_a_process_alone_uses_all_cpus_and_has_saved_when_its_job_is_cancelled(submit, slurm, clone):
    job = submit("--nodes=1", "--partition=wide", "--export=NONE", "--job-name=cancelled", SCRIPT, *LONGER)
    job.hold("wide1", "Epoch: 1 ( 11")
    slurm("scancel", job.number)
    assert job.ended()[0] == "CANCELLED"
    slurm.wait(lambda: "Stopped by a signal. " in job.log)
    assert job.log.startswith("Started by a batch system: rank 0 of 1, ")
    assert f", {min(2, os.cpu_count())} threads" in job.log
    assert (clone / "output/cancelled/checkpoint.pt").exists()
    assert str(job.number) not in slurm("squeue", "--noheader", "--format=%i").split()


def test_a_job_whose_time_is_too_short_to_begin_with_ends_with_a_sentence(submit, slurm):
    job = submit("--nodes=1", "--partition=wide", "--job-name=short", SCRIPT, *FLAGS)
    slurm.wait(lambda: job.trainers("wide1"))
    slurm("scancel", "--signal=TERM", job.number)  # what Slurm does, too, when time is short
    assert job.ended() == ("FAILED", 143)
    assert "slurm/mnist.sbatch: stopped before it had saved anything new" in job.log
    assert job.shown("Restarts") == "0"


def test_a_preempted_job_makes_room_and_goes_on_afterwards(submit):
    job = submit("--nodes=1", "--partition=wide", "--job-name=preempted", SCRIPT, *LONGER)
    job.hold("wide1", "Epoch: 1 ( 11")
    urgent = submit("--nodes=2", "--partition=urgent", "--exclusive", "--wrap=true")
    assert urgent.ended() == ("COMPLETED", 0)
    assert job.ended() == ("COMPLETED", 0), job.log
    assert job.shown("Restarts") == "1" and "Resuming in epoch " in job.log


def test_a_job_that_loses_a_node_is_started_again_by_slurm(lost):
    job, disturbed = lost
    disturbed.result()
    assert job.ended() == ("COMPLETED", 0), job.log
    assert job.shown("Restarts") == "1" and "Resuming in epoch 1" in job.log


def test_a_job_out_of_time_and_requeued_ends_with_the_bits_of_one_that_nobody_disturbed(slow, project, clone):
    job, disturbed = slow
    disturbed.result()
    assert job.ended() == ("COMPLETED", 0), job.log
    assert job.log.count("Stopped by a signal") == int(job.shown("Restarts")) == 2, job.log
    assert weights(clone / "output/slow") == project.reference(2)[0]
