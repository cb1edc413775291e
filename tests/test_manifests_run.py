"""The committed manifests, run as their operators would run them, on real digits: see rig/replay.py."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from rig.hosts import need_hosts
from rig.manifests import ELASTIC, EXPERIMENT, JOB, TRAINJOB, change, load, read_by_katib, trial
from rig.operators import backoff_limit, pods_of
from rig.processes import need
from rig.project import make_small_project
from rig.replay import Replay
from rig.training import weights

pytestmark = pytest.mark.cluster

EPOCHS = 15  # as the manifests have it
TRAIN, TEST = 400, 200


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    need_hosts()
    need("runc", "runc")
    need(Path(sys.executable).with_name("dumb-init"), "the packages of requirements.txt")
    return make_small_project(tmp_path_factory.mktemp("job") / "project", TRAIN, TEST)


def trainer_paths(manifest):
    """Return the paths of the containers' descriptions in a manifest."""
    if manifest["kind"] == "TrainJob":
        return ["spec.trainer"]
    roles = manifest["spec"]["pytorchReplicaSpecs"]
    return [f"spec.pytorchReplicaSpecs.{role}.template.spec.containers[0]" for role in roles]


def on_one_cpu(job, **changes):
    """Return a manifest with changes to its trainer, which gets one CPU: here three pods share two."""
    for trainer in trainer_paths(job):
        resources = "resourcesPerNode" if job["kind"] == "TrainJob" else "resources"
        job = change(job, f"{trainer}.{resources}.limits.cpu", "1")
        for field, value in changes.items():
            job = change(job, f"{trainer}.{field}", value)
    return job


def of_two_pods(job):
    """Return a manifest for a pod less, where two show the same."""
    if job["kind"] == "TrainJob":
        return change(job, "spec.trainer.numNodes", 2)
    if "elasticPolicy" not in job["spec"]:
        return change(job, "spec.pytorchReplicaSpecs.Worker.replicas", 1)
    job = change(job, "spec.elasticPolicy.maxReplicas", 2)  # or the two would wait for a third
    return change(job, "spec.pytorchReplicaSpecs.Worker.replicas", 2)


def trained(log):
    """Return the epochs that were begun, in their order."""
    return sorted(int(epoch) for epoch in re.findall(r"^Epoch: (\d+) \(  0.0%\)", log, re.MULTILINE))


def check_results(job, epochs=EPOCHS):
    """Check that each epoch was reported once, and that the claim has what a trainer that learned leaves."""
    assert job.log.count("Test accuracy: ") == job.log.count("\naccuracy=") == epochs, job.log
    lines = (job.claim() / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == list(range(1, epochs + 1))
    assert json.loads(lines[-1])["accuracy"] > (0.7 if epochs == EPOCHS else 0.1)
    model = job.claim() / "mnist_model.pt"
    assert (model.stat().st_uid, model.stat().st_size > 4_000_000) == (1000, True)


@pytest.fixture(scope="module")
def uninterrupted(project):
    """The job as committed, after its end, with nothing done to it."""
    with Replay(on_one_cpu(load(JOB)), project) as job:
        job.run()
    return job


def test_the_job_succeeds(uninterrupted):
    job = uninterrupted
    assert job.state == "Succeeded", job.log
    assert job.restarts == 0
    master, *workers = job.pods
    assert [pod.process.returncode for pod in job.pods] == [0, 0, 0]
    assert master.log.startswith("Started in a pod of a PyTorchJob: rank 0 of 3, ")
    assert [worker.log for worker in workers] == ["", ""]
    assert trained(job.log) == list(range(1, EPOCHS + 1))
    check_results(job)
    assert [list((worker.folder / "output").iterdir()) for worker in workers] == [[], []]


@pytest.mark.parametrize("path", [JOB, ELASTIC, TRAINJOB], ids=lambda path: path.stem)
def test_a_job_that_loses_a_worker_goes_on_from_the_checkpoint_and_succeeds(path, project, uninterrupted):
    with Replay(on_one_cpu(load(path)), project) as job:
        assert job.run_until("Epoch: 5 ") == "Running", job.log  # so the checkpoint of the fourth is complete
        assert "rank 0 of 3" in job.log and job.restarts == 0, job.log
        job.pods[1].kill()
        assert job.run() == "Succeeded", job.log
    assert job.pods[1].processes[0].returncode == 128 + 9
    assert job.pods[1].restarts == 1
    assert job.restarts == 3 if path != ELASTIC else job.restarts <= 3  # torchrun's agents may go on
    assert job.restarts < backoff_limit(job.manifest)
    epochs = trained(job.log)
    assert set(epochs) == set(range(1, EPOCHS + 1))
    again = sorted(epoch for epoch in set(epochs) if epochs.count(epoch) > 1)
    assert again in ([], [5]), f"trained again: {again}\n{job.log}"
    check_results(job)
    if path != ELASTIC:  # which goes on with fewer for a while
        assert weights(job.claim()) == weights(uninterrupted.claim())


SHORT = ["--epochs", "1", "--resume", "--output-dir", "/output", "--save-model", "--batch-size", "16"]


def test_two_pods_of_two_processes_make_a_world_of_four(project):
    manifest = of_two_pods(on_one_cpu(load(JOB), args=SHORT))
    with Replay(change(manifest, "spec.nprocPerNode", "2"), project) as job:
        assert job.run() == "Succeeded", job.log
        assert {pod.pod.variables["WORLD_SIZE"] for pod in job.pods} == {"4"}
    assert job.log.count("Started by torchrun: rank 0 of 4, ") == 1
    check_results(job, epochs=1)


@pytest.mark.parametrize("processes", [1, "auto"])
def test_a_trainjob_of_one_node_has_as_many_processes_as_it_asks_for(project, processes):
    """Its pod has nothing but PET_… to go by; without a GPU, auto is one for each CPU of the machine."""
    manifest = change(on_one_cpu(load(TRAINJOB), args=SHORT), "spec.trainer.numNodes", 1)
    with Replay(change(manifest, "spec.trainer.numProcPerNode", processes), project) as job:
        assert all(name.startswith("PET_") for pod in job.pods for name in pod.pod.variables)
        assert job.run() == "Succeeded", job.log
    world = os.cpu_count() if processes == "auto" else processes
    assert job.log.startswith(f"Started by torchrun: rank 0 of {world}, "), job.log
    check_results(job, epochs=1)


@pytest.mark.parametrize("path", [JOB, ELASTIC, TRAINJOB], ids=lambda path: path.stem)
def test_a_job_that_is_deleted_saves_and_each_of_its_pods_ends_with_143(path, project):
    with Replay(of_two_pods(on_one_cpu(load(path))), project) as job:
        assert job.run_until("Epoch: 2 ") == "Running", job.log
        for pod in job.pods:
            pod.process.terminate()  # runc hands it on to the init
        for pod in job.pods:
            pod.wait_or_kill()
    assert [pod.process.returncode for pod in job.pods] == [143] * 2, job.log
    assert job.log.count("Stopped by a signal") == 1 and "Traceback" not in job.log, job.log
    assert (job.claim() / "checkpoint.pt").exists()


def test_a_trial_of_the_experiment_runs_and_katib_reads_its_log(project):
    experiment = load(EXPERIMENT)
    with Replay(on_one_cpu(trial(experiment, "min") | {"metadata": {"name": "trial"}}), project) as job:
        assert job.run() == "Succeeded", job.log
    assert job.log.startswith("Started in a pod of a PyTorchJob: rank 0 of 1, ")
    assert [name for name, _ in read_by_katib(experiment, job.log)] == ["loss", "accuracy"] * 5


# --- The replay itself: it fails where a cluster does -------------------------------------------


def test_a_job_fails_when_its_restarts_reach_the_backoff_limit(project):
    with Replay(change(on_one_cpu(load(JOB)), "spec.runPolicy.backoffLimit", 3), project) as job:
        for pod in job.pods:
            pod.kill()
        assert job.state == "Running"
        assert job.run_until("never") == "Failed"
        assert job.restarts == 3


def test_a_job_whose_pods_are_never_restarted_fails_with_the_first(project):
    manifest = change(on_one_cpu(load(JOB)), "spec.pytorchReplicaSpecs.Worker.restartPolicy", "Never")
    with Replay(manifest, project) as job:
        job.pods[1].kill()
        assert (job.state, job.restarts) == ("Failed", 0)


def test_a_container_can_write_to_its_volumes_only_and_is_not_root(project):
    script = """
import os, pathlib, tempfile
print(os.getuid(), os.getgid(), os.listdir("/output"))
for folder in ("/output", "/tmp", "/app", "/app/datasets", "/"):
    try:
        print(folder, tempfile.TemporaryFile(dir=folder).close())
    except OSError as error:
        print(folder, error.strerror)
"""
    with Replay(on_one_cpu(load(JOB), command=["python", "-c", script], args=[]), project) as job:
        assert job.run() == "Succeeded"
    assert job.pods[0].log.splitlines() == [
        "1000 0 []",
        "/output None",
        "/tmp None",
        "/app Read-only file system",
        "/app/datasets Read-only file system",
        "/ Read-only file system",
    ]


# --- What the operators set, as it was seen in clusters -----------------------------------------


def test_an_elastic_job_gets_what_torchrun_needs_to_meet():
    pods = pods_of(load(ELASTIC))
    assert [pod.name for pod in pods] == [f"pytorchjob-mnist-elastic-worker-{index}" for index in range(3)]
    for pod in pods:
        assert pod.variables == {
            "PYTHONUNBUFFERED": "1",
            "PET_RDZV_BACKEND": "c10d",
            "PET_RDZV_ENDPOINT": "pytorchjob-mnist-elastic-worker-0:23456",
            "PET_NNODES": "1:3",
            "PET_NPROC_PER_NODE": "1",
            "PET_MAX_RESTARTS": "10",
        }


def test_a_trainjob_gets_variables_of_torchrun_alone():
    for rank, pod in enumerate(pods_of(load(TRAINJOB))):
        assert pod.service == f"trainjob-mnist-node-0-{rank}.trainjob-mnist"
        assert pod.variables == {
            "PET_MASTER_ADDR": "trainjob-mnist-node-0-0.trainjob-mnist",
            "PET_MASTER_PORT": "29500",
            "PET_NNODES": "3",
            "PET_NODE_RANK": str(rank),
            "PET_NPROC_PER_NODE": "1",
        }
