"""The committed manifests, run as their operators would run them, on real digits: see rig/replay.py."""

import json
import re
import sys
from pathlib import Path

import pytest

from rig.hosts import need_hosts
from rig.manifests import ELASTIC, EXPERIMENT, JOB, TRAINJOB, change, load, read_by_katib, trial
from rig.processes import need
from rig.project import make_small_project
from rig.replay import Replay
from rig.training import metrics

pytestmark = pytest.mark.cluster

EPOCHS = 15  # as the manifests have it


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    need_hosts()
    need("runc", "runc")
    need(Path(sys.executable).with_name("dumb-init"), "the packages of requirements.txt")
    return make_small_project(tmp_path_factory.mktemp("job") / "project", train=400, test=200)


def on_two_cpus(job, pods=None):
    """Return a manifest with so many pods (default: as before), which get a CPU each: here they share two."""
    job = json.loads(json.dumps(job).replace('"cpu": "2"', '"cpu": "1"'))
    if pods is None:
        return job
    if job["kind"] == "TrainJob":
        return change(job, "spec.trainer.numNodes", pods)
    roles = job["spec"]["pytorchReplicaSpecs"]
    if "elasticPolicy" in job["spec"]:
        job = change(job, "spec.elasticPolicy.maxReplicas", pods)  # or they would wait for more
    return change(job, "spec.pytorchReplicaSpecs.Worker.replicas", pods - len(roles) + 1)


def trained(log):
    """Return the epochs that were begun, in their order."""
    return sorted(int(epoch) for epoch in re.findall(r"^Epoch: (\d+) \(  0.0%\)", log, re.MULTILINE))


def check_results(job):
    """Check that each epoch was reported once, and that the claim has what a trainer that learned leaves."""
    assert job.log.count("Test accuracy: ") == job.log.count("\naccuracy=") == EPOCHS, job.log
    assert [each["epoch"] for each in metrics(job.claim())] == list(range(1, EPOCHS + 1))
    assert metrics(job.claim())[-1]["accuracy"] > 0.7
    model = job.claim() / "mnist_model.pt"
    assert (model.stat().st_uid, model.stat().st_size > 4_000_000) == (1000, True)


def test_the_job_succeeds(project):
    with Replay(on_two_cpus(load(JOB)), project) as job:
        assert job.run() == "Succeeded", job.log
    assert job.restarts == 0
    master, *workers = job.pods
    assert [pod.process.returncode for pod in job.pods] == [0, 0, 0]
    assert master.log.startswith("Started in a pod of a PyTorchJob: rank 0 of 3, ")
    assert [worker.log for worker in workers] == ["", ""]
    assert trained(job.log) == list(range(1, EPOCHS + 1))
    check_results(job)
    assert [list((worker.folder / "output").iterdir()) for worker in workers] == [[], []]


@pytest.mark.parametrize("path", [JOB, ELASTIC, TRAINJOB], ids=lambda path: path.stem)
def test_a_job_that_loses_a_worker_goes_on_from_the_checkpoint_and_succeeds(path, project):
    with Replay(on_two_cpus(load(path), pods=2), project) as job:
        assert job.run_until("Epoch: 5 ") == "Running", job.log  # so the checkpoint of the fourth is complete
        assert "rank 0 of 2" in job.log and job.restarts == 0, job.log
        job.pods[1].kill()
        begun = trained(job.log)[-1]  # on a fast machine, the sixth
        assert job.run() == "Succeeded", job.log
    assert job.pods[1].processes[0].returncode == 128 + 9
    assert job.pods[1].restarts == 1
    assert job.restarts == 2 if path != ELASTIC else job.restarts <= 2  # its torchrun may go on
    epochs = trained(job.log)
    assert set(epochs) == set(range(1, EPOCHS + 1))
    again = [epoch for epoch in set(epochs) if epochs.count(epoch) > 1]
    assert again in ([], [begun]), f"trained again: {again}\n{job.log}"
    check_results(job)


@pytest.mark.parametrize(
    "path, pods, field, processes",
    [
        (JOB, 2, "nprocPerNode", "1"),
        (JOB, 1, "nprocPerNode", "2"),
        (TRAINJOB, 1, "trainer.numProcPerNode", 2),
    ],
)
def test_a_deleted_job_saves_and_ends_with_143(path, pods, field, processes, project):
    with Replay(change(on_two_cpus(load(path), pods), f"spec.{field}", processes), project) as job:
        assert job.run_until("Epoch: 2 ") == "Running", job.log
        for pod in job.pods:
            pod.process.terminate()  # runc hands it on to the init
        for pod in job.pods:
            pod.wait_or_kill()
    assert re.match("Started .*: rank 0 of 2, ", job.log), job.log
    assert [pod.process.returncode for pod in job.pods] == [143] * pods, job.log
    assert job.log.count("Stopped by a signal") == 1 and "Traceback" not in job.log, job.log
    assert (job.claim() / "checkpoint.pt").exists()


def test_a_trial_of_the_experiment_runs_and_katib_reads_its_metrics_and_nothing_else(project):
    experiment = load(EXPERIMENT)
    with Replay(on_two_cpus(trial(experiment, "min") | {"metadata": {"name": "trial"}}), project) as job:
        assert job.run() == "Succeeded", job.log
    assert job.log.startswith("Started in a pod of a PyTorchJob: rank 0 of 1, ")
    epochs = metrics(job.pods[0].folder / "output")
    written = [(("loss", each["test_loss"]), ("accuracy", each["accuracy"])) for each in epochs]
    assert len(epochs) == 5
    read = read_by_katib(experiment, job.log)
    assert read == [(name, f"{value:.4f}") for pair in written for name, value in pair]
