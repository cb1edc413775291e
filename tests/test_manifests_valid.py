"""The manifests are right, and a mistake in one is found: see rig/manifests.py."""

import json
import os
import re
import subprocess

import pytest

from rig import operators
from rig.manifests import CLAIM, CRDS, ELASTIC, EXPERIMENT, JOB, POD, TRAINJOB, check, containers, load, trial
from rig.processes import need
from rig.replay import dockerfile

KUBERNETES = POD.parent
FILES = [JOB, *sorted(KUBERNETES.glob("*.yaml"))]
README = (KUBERNETES / "README.md").read_text()
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
needs_schemas = pytest.mark.skipif(not CRDS, reason="MNIST_CRD_DIR names no folder with operators' schemas")


def in_all_files(pattern):
    return re.findall(pattern, "\n".join(path.read_text() for path in FILES), re.MULTILINE)


# --- The committed manifests --------------------------------------------------------------------


def edited(path, old, new, folder):
    """Return a manifest as it is with a text of its file replaced."""
    assert old in path.read_text()
    (folder / path.name).write_text(path.read_text().replace(old, new))
    return load(folder / path.name)


@each_file
def test_a_committed_manifest_is_right_also_without_the_line_of_the_gpu(path, tmp_path):
    check(load(path))
    if path != CLAIM:
        for_cpus = edited(path, "nvidia.com/gpu: 1  # take this line out to train on CPUs\n", "\n", tmp_path)
        check(for_cpus)
        assert "nvidia.com/gpu" not in json.dumps(for_cpus)


def test_all_manifests_name_the_same_image_and_claim():
    images = in_all_files(r"^ *image: (\S+)")
    assert len(images) == 5 and len(set(images)) == 1
    assert in_all_files(r"claimName: (\S+)") == [load(CLAIM)["metadata"]["name"]] * 4


def test_the_master_its_workers_and_the_job_s_variants_train_alike():
    master, worker = containers(load(JOB))
    (elastic,), (tuned,) = containers(load(ELASTIC)), containers(trial(load(EXPERIMENT), "min"))
    trainer = load(TRAINJOB)["spec"]["trainer"]
    assert master == worker
    assert master["args"] == elastic["args"] == trainer["args"]
    assert master["resources"] == elastic["resources"] == trainer["resourcesPerNode"] == tuned["resources"]


def test_katib_alone_is_told_how_the_trainer_starts():
    assert [path for path in FILES if '"command"' in json.dumps(load(path))] == [EXPERIMENT]
    python, trainer = containers(trial(load(EXPERIMENT), "min"))[0]["command"]
    assert python == "python" and f"TRAINER={trainer}" in dockerfile("ARG")


def test_the_readme_names_every_manifest():
    assert [path.name for path in FILES if f"{path.name})" not in README] == []


def test_on_a_cluster_of_one_s_own_the_job_is_right_and_fits_on_two_cpus(tmp_path):
    """The line of the guide that changes the manifest does what the guide says; kubectl knows the others."""
    block = re.search(r"^kind create cluster.*?(?=^```)", README, re.MULTILINE | re.DOTALL)[0]
    (changed,) = re.findall(r"^(sed .+) \| kubectl create -f -$", block, re.MULTILINE)
    made = subprocess.check_output(["bash", "-c", changed], cwd=JOB.parent)
    (tmp_path / "job.yaml").write_bytes(made)
    check(load(tmp_path / "job.yaml"))
    for container in containers(load(tmp_path / "job.yaml")):
        assert container["resources"]["requests"] == {"cpu": "200m", "memory": "1Gi"}
        assert "nvidia.com/gpu" not in container["resources"]["limits"]
    need("kubectl", "the package kubernetes-client")
    for command in re.findall(r"^kubectl (\S+ .+)$", block, re.MULTILINE):
        shell = ["bash", "-c", f"kubectl {command} --help"]
        assert subprocess.run(shell, capture_output=True).returncode == 0, command


@needs_schemas
def test_the_readme_names_the_versions_that_are_checked_against():
    versions = [re.search(r"-(v[\d.]+)\.json", name)[1] for name in os.listdir(CRDS) if ".json" in name]
    assert versions and [version for version in versions if version not in README] == []


def test_the_imitated_operators_are_of_the_versions_that_the_guides_name():
    """Whoever names a newer one reads its sources first, and changes rig/operators.py."""
    named = lambda text: set(re.findall(r"\bv\d+\.\d+\.\d+\b", text))  # noqa: E731
    assert named(README + (KUBERNETES / "clouds.md").read_text()) == named(operators.__doc__)


# --- Edited ones --------------------------------------------------------------------------------

# What is replaced in a file, by what, and a word of the sentence that the mistake is found with.
BROKEN = [
    (POD, "volumeMounts:", "volumeMount:", "'volumeMount' was unexpected"),
    (POD, "name: pod-mnist", f"name: {'m' * 54}", "the name is"),
    (POD, "memory: 4Gi", "memory: 4 GB", "memory is not a quantity"),
    (POD, 'cpu: "1"', 'cpu: "2500m"', "more cpu is requested"),
    (POD, "{name: tmp,", "{name: temp,", "each volume needs"),
    (POD, "mountPath: /tmp", "mountPath: /temp", "nothing is mounted at /tmp"),
    (POD, "/output/pod", "/results", "nothing is mounted at --output-dir /results"),
    (POD, "--resume, ", "", "starts from zero"),
    (POD, "persistentVolumeClaim:\n        claimName: mnist-output", "emptyDir: {sizeLimit: 1Gi}", "zero"),
    (POD, "{sizeLimit: 1Gi}", "{}", "could fill its node"),
    (POD, "readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "the container is not as safe"),
    (POD, 'inject: "false"', 'inject: "true"', "sidecar"),
    (POD, "PeriodSeconds: 30", "PeriodSeconds: 10", "20 seconds"),
    (POD, "--epochs", "--epoch", "unrecognized arguments: --epoch"),
    (JOB, "volumeMounts:", "volumeMount:", "'volumeMount' was unexpected"),
    (JOB, "backoffLimit: 16", "backoffLimit: 3", "backoffLimit"),
    (JOB, 'nprocPerNode: "1"', 'nprocPerNode: "auto"', "each CPU of the node"),
    (ELASTIC, "_STORE\n", "_SHOP\n", "one that is gone"),
    (ELASTIC, "minReplicas: 1", "minReplicas: 4", "too many or too few"),
    (ELASTIC, "- --resume", "- --no-cuda", "starts from zero"),
    (TRAINJOB, "manager: example.com/mnist-tutorial", "manager: mnist-tutorial", "begins with a domain"),
    (TRAINJOB, "OMP_NUM_THREADS", "PET_NNODES", "the operator's to set"),
    (EXPERIMENT, "maxTrialCount", "maxTrials", "'maxTrials' was unexpected"),
    (EXPERIMENT, "reference: gamma", "reference: momentum", "not reach the trainer"),
    (EXPERIMENT, "${trialParameters.lr}", '"1.0"', "not reach the trainer"),
    (EXPERIMENT, "- --gamma", "- --momentum", "another flag"),
    (EXPERIMENT, 'max: "1.0"', 'max: "1.5"', "--gamma"),
]
BROKEN_FOR_ITS_OPERATOR = [
    (JOB, "  restartPolicy:", "  restart:", "'restart' was unexpected"),
    (TRAINJOB, "numNodes: 3", "replicas: 3", "'replicas' was unexpected"),
    (EXPERIMENT, "nprocPerNode:", "procPerNode:", "'procPerNode' was unexpected"),
]
BROKEN += [pytest.param(*case, marks=needs_schemas) for case in BROKEN_FOR_ITS_OPERATOR]


@pytest.mark.parametrize("path, old, new, said", BROKEN)
def test_a_mistake_is_found(path, old, new, said, tmp_path):
    with pytest.raises(Exception, match=re.escape(said)):
        check(edited(path, old, new, tmp_path))
