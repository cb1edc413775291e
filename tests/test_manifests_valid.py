"""The manifests are right, and a mistake in one is found: see rig/manifests.py."""

import json
import os
import re
import subprocess

import pytest

from rig import operators
from rig.manifests import (
    CLAIM,
    CRDS,
    ELASTIC,
    EXPERIMENT,
    JOB,
    KUBERNETES,
    POD,
    TRAINJOB,
    check,
    containers,
    load,
    parse,
    read_by_katib,
    trial,
)
from rig.processes import fork, need
from rig.replay import dockerfile

FILES = [JOB, *sorted(KUBERNETES.glob("*.yaml"))]
README = (KUBERNETES / "README.md").read_text()
each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
needs_schemas = pytest.mark.skipif(not CRDS, reason="MNIST_CRD_DIR names no folder with operators' schemas")


def in_all_files(pattern):
    return re.findall(pattern, "\n".join(path.read_text() for path in FILES), re.MULTILINE)


# --- The committed manifests --------------------------------------------------------------------


@each_file
def test_a_committed_manifest_is_right(path):
    check(load(path))


@each_file
def test_kubectl_reads_what_we_read(path):
    need("kubectl", "the package kubernetes-client")
    command = ["kubectl", "label", "--local", "-o", "json", "-f", path, "read=yes"]
    read = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert read["metadata"].pop("labels") == {"read": "yes"}
    assert read == load(path)


def test_the_job_is_the_one_that_the_tutorial_describes():
    spec = load(JOB)["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    assert spec["nprocPerNode"] == "1" and spec["runPolicy"]["backoffLimit"] == 16  # five lost pods, and one
    args = parse(containers(load(JOB))[0]["args"])
    assert (args.epochs, args.seed, args.log_interval, args.resume) == (15, 7, 256, True)


def test_all_manifests_name_the_same_image():
    images = in_all_files(r"^ *image: (\S+)")
    assert len(images) == 5 and len(set(images)) == 1


def test_every_claim_that_a_pod_mounts_is_the_one_in_kubernetes():
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


def edited(path, old, new, folder):
    """Return a manifest as it is with a text of its file replaced."""
    assert old in path.read_text()
    (folder / path.name).write_text(path.read_text().replace(old, new))
    return load(folder / path.name)


@pytest.mark.parametrize("path", [path for path in FILES if path != CLAIM], ids=lambda path: path.stem)
def test_without_the_line_of_the_gpu_it_is_a_manifest_for_cpus(path, tmp_path):
    manifest = edited(path, "nvidia.com/gpu: 1  # take this line out to train on CPUs\n", "\n", tmp_path)
    check(manifest)
    assert "nvidia.com/gpu" not in json.dumps(manifest)


# What is replaced in the file, by what, and a word of the sentence that the mistake is found with.
BROKEN = {
    POD: [
        ("volumeMounts:", "volumeMount:", "'volumeMount' was unexpected"),
        ('--epochs, "5"', "--epochs, 5", "5 is not of type 'string'"),
        ("name: pod-mnist", "name: 1-mnist", "the name is"),
        ("name: pod-mnist", f"name: {'m' * 54}", "the name is"),
        ("name: mnist\n", "name: trainer\n", "not called mnist"),
        ('inject: "false"', 'inject: "true"', "sidecar"),
        ("runAsNonRoot: true", "runAsNonRoot: false", "the pod is not as safe"),
        ("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false", "the container is not as safe"),
        ("PeriodSeconds: 30", "PeriodSeconds: 10", "20 seconds"),
        ("limits.cpu", "requests.cpu", "each CPU of the node"),
        ("memory: 2Gi", "", "memory is not a quantity"),
        ("memory: 4Gi", "memory: 4 GB", "memory is not a quantity"),
        ('cpu: "1"', 'cpu: "2500m"', "more cpu is requested"),
        ("gpu: 1", 'gpu: "0.5"', "whole GPUs"),
        ("{name: tmp,", "{name: temp,", "each volume needs"),
        ("mountPath: /tmp", "mountPath: /output", "each volume needs"),
        ("mountPath: /tmp", "mountPath: /temp", "nothing is mounted at /tmp"),
        ("/output/pod", "/results", "nothing is mounted at --output-dir /results"),
        ("--resume, ", "", "starts from zero"),
        (
            "persistentVolumeClaim:\n        claimName: mnist-output",
            "emptyDir: {sizeLimit: 1Gi}",
            "from zero",
        ),
        ("Token: false", "Token: true", "has a key to the cluster"),
        ("{sizeLimit: 1Gi}", "{}", "could fill its node"),
        ("--epochs", "--epoch", "unrecognized arguments: --epoch"),
        ("restartPolicy: OnFailure", "restartPolicy: Never", "restartPolicy"),
    ],
    JOB: [
        ("kubeflow.org/v1", "kubeflow.org/v1beta2", "not kubeflow.org/v1"),
        ("volumeMounts:", "volumeMount:", "'volumeMount' was unexpected"),
        ("replicas: 1", "replicas: 2", "more than one master"),
        ("    Worker:", "    worker:", "no such pods"),
        ('nprocPerNode: "1"', 'nprocPerNode: "auto"', "each CPU of the node"),
        ("cleanPodPolicy: Running", "cleanPodPolicy: Sometimes", "cleanPodPolicy"),
        ("backoffLimit: 16", "backoffLimit: 3", "backoffLimit"),
        ("restartPolicy: OnFailure", "restartPolicy: onfailure", "restartPolicy"),
        ("name: pytorch ", "name: trainer ", "not called pytorch"),
    ],
    ELASTIC: [
        ("    Worker:", "    Master:", "workers only"),
        ("minReplicas: 1", "minReplicas: 4", "too many or too few"),
        (" replicas: 3", " replicas: 4", "too many or too few"),
        ("_STORE\n", "_SHOP\n", "one that is gone"),
        ("- --resume", "- --no-cuda", "starts from zero"),
    ],
    TRAINJOB: [
        ("manager: example.com/mnist-tutorial", "manager: mnist-tutorial", "begins with a domain"),
        ("manager: example.com/mnist-tutorial", "manager: example.com/", "begins with a domain"),
        ("name: torch-distributed", "name: pytorch", "no such runtime"),
        ("name: node\n                template", "name: launcher\n                template", "no such job"),
        ("OMP_NUM_THREADS", "PET_NNODES", "the operator's to set"),
        ("                    - name: node", "                    - name: pytorch", "not called node"),
    ],
    EXPERIMENT: [
        ("maxTrialCount", "maxTrials", "'maxTrials' was unexpected"),
        ('min: "0.01"', "min: 0.01", "0.01 is not valid"),
        ("parallelTrialCount: 2", "parallelTrialCount: 20", "at once"),
        ("ContainerName: pytorch", "ContainerName: training-container", "not find the container"),
        ("job-role: master", "job-role: worker", "prints nothing"),
        ("reference: gamma", "reference: momentum", "not reach the trainer"),
        ("${trialParameters.lr}", '"1.0"', "not reach the trainer"),
        ("- --gamma", "- --momentum", "another flag"),
        ('min: "0.01"', 'min: "3.0"', "not below max"),
        ('max: "1.0"', 'max: "1.5"', "--gamma"),
        ('- --seed\n                      - "7"', "- --resume", "starts from zero"),
    ],
}
BROKEN_FOR_ITS_OPERATOR = {
    JOB: [
        ("backoffLimit: 16", 'backoffLimit: "16"', "'16' is not of type 'integer'"),
        ("  restartPolicy:", "  restart:", "'restart' was unexpected"),
    ],
    TRAINJOB: [
        ("numNodes: 3", "replicas: 3", "'replicas' was unexpected"),
        ("securityContext:\n  ", "security:\n  ", "'security' was unexpected"),
    ],
    EXPERIMENT: [("nprocPerNode:", "procPerNode:", "'procPerNode' was unexpected")],
}
CASES = [
    pytest.param(path, *case, marks=marks, id=f"{path.stem}: {case[-1]}")
    for table, marks in ((BROKEN, ()), (BROKEN_FOR_ITS_OPERATOR, needs_schemas))
    for path, cases in table.items()
    for case in cases
]


@pytest.mark.parametrize(("path", "old", "new", "said"), CASES)
def test_a_mistake_is_found(path, old, new, said, tmp_path):
    with pytest.raises(Exception, match=re.escape(said)):
        check(edited(path, old, new, tmp_path))


def test_katib_reads_each_epoch_s_loss_and_accuracy_and_nothing_else(small):
    code, log = fork(small, "mnist.py", "--epochs", "1", "--log-interval", "1")
    code_again, log_again = fork(small, "mnist.py", "--epochs", "3", "--log-interval", "1", "--resume")
    assert (code, code_again) == (0, 0), log + log_again
    epochs = [json.loads(line) for line in (small / "output" / "metrics.jsonl").read_text().splitlines()]
    assert len(epochs) == 3
    read = read_by_katib(load(EXPERIMENT), log + log_again)
    written = [(("loss", e["test_loss"]), ("accuracy", e["accuracy"])) for e in epochs]
    assert read == [(name, f"{value:.4f}") for pair in written for name, value in pair]
