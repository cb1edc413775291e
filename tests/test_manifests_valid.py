"""The manifests are right, and what is wrong in one is refused with the path of the field.

MNIST_CRD_DIR may name a folder with the operators' own resource definitions, as JSON; then they are
applied as well: https://github.com/kubeflow/trainer, manifests/base/crds, of the versions in
kubernetes/README.md.
"""

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.rig.manifests import (
    GONE,
    SIDECAR,
    below,
    change,
    load,
    operator_schema,
    parse,
    problems,
    read_by_katib,
    schema_problems,
    trial,
)
from tests.rig.processes import run
from tests.rig.project import ROOT

JOB = ROOT / "pytorchjob-mnist.yaml"
FILES = [JOB, *sorted((ROOT / "kubernetes").glob("*.yaml"))]
ELASTIC, TRAINJOB, EXPERIMENT, CLAIM = (
    ROOT / "kubernetes" / name
    for name in (
        "pytorchjob-mnist-elastic.yaml",
        "trainjob-mnist.yaml",
        "experiment-mnist.yaml",
        "volume-claim.yaml",
    )
)

CRDS = os.environ.get("MNIST_CRD_DIR")
needs_crds = pytest.mark.skipif(not CRDS, reason="MNIST_CRD_DIR is not set")
schemas = pytest.mark.parametrize(
    "crds", [pytest.param(None, id="our-schemas"), pytest.param(CRDS, id="the-operators", marks=needs_crds)]
)


def container(job):
    """Return the first container of a PyTorchJob."""
    replicas = job["spec"]["pytorchReplicaSpecs"]
    return replicas.get("Master", replicas.get("Worker"))["template"]["spec"]["containers"][0]


# --- The committed manifests --------------------------------------------------------------------


@schemas
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_committed_manifest_has_no_problems(path, crds):
    assert problems(load(path), crds) == []


def test_the_job_is_the_one_that_the_tutorial_describes():
    spec = load(JOB)["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    assert {name: replica["replicas"] for name, replica in replicas.items()} == {"Master": 1, "Worker": 2}
    assert {replica["restartPolicy"] for replica in replicas.values()} == {"OnFailure"}
    assert spec["nprocPerNode"] == "1" and spec["runPolicy"]["cleanPodPolicy"] == "Running"
    args = parse(container(load(JOB))["args"])
    assert (args.epochs, args.seed, args.log_interval, args.resume) == (15, 7, 256, True)


def test_the_job_outlives_five_lost_pods():
    spec = load(JOB)["spec"]
    pods = sum(replica["replicas"] for replica in spec["pytorchReplicaSpecs"].values())
    assert spec["runPolicy"]["backoffLimit"] == 5 * pods + 1


def test_all_manifests_name_the_same_image():
    images = re.findall(r"^ *image: (\S+)", "\n".join(path.read_text() for path in FILES), re.MULTILINE)
    assert len(images) == 5 and len(set(images)) == 1


def test_the_job_and_its_variants_train_alike():
    jobs = [container(load(JOB)), container(load(ELASTIC)), load(TRAINJOB)["spec"]["trainer"]]
    assert [job["args"] for job in jobs] == [jobs[0]["args"]] * 3
    resources = [jobs[0]["resources"], jobs[1]["resources"], jobs[2]["resourcesPerNode"]]
    assert resources == [container(trial(load(EXPERIMENT), "min"))["resources"]] * 3


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (JOB, "spec.nprocPerNode", "2"),
        (ELASTIC, "spec.nprocPerNode", "2"),
        (TRAINJOB, "spec.trainer.numProcPerNode", 2),
    ],
    ids=lambda value: getattr(value, "stem", None),
)
def test_several_processes_a_pod_are_the_change_of_one_number(path, field, value):
    assert problems(change(load(path), field, value)) == []


def test_katib_alone_is_told_how_the_trainer_starts():
    assert [path for path in FILES if '"command"' in json.dumps(load(path))] == [EXPERIMENT]
    trainer = re.search("^ARG TRAINER=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    assert container(trial(load(EXPERIMENT), "min"))["command"] == ["python", trainer]


def test_every_claim_that_a_pod_mounts_is_the_one_in_kubernetes():
    names = re.findall(r"claimName: (\S+)", "\n".join(path.read_text() for path in FILES))
    assert names == [load(CLAIM)["metadata"]["name"]] * 4


@pytest.mark.parametrize("path", [p for p in FILES if p != CLAIM], ids=lambda path: path.name)
def test_without_the_line_of_the_gpu_it_is_a_manifest_for_cpus(path, tmp_path):
    lines = path.read_text().splitlines(keepends=True)
    marked = [line for line in lines if "# take this line out to train on CPUs" in line]
    assert len(marked) == 1 and "nvidia.com/gpu" in marked[0]
    (tmp_path / "cpu.yaml").write_text("".join(line for line in lines if line not in marked))
    manifest = load(tmp_path / "cpu.yaml")
    assert problems(manifest) == [] and "nvidia.com/gpu" not in json.dumps(manifest)


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not on the path")
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_kubectl_reads_what_we_read(path):
    command = ["kubectl", "label", "--local", "-o", "json", "-f", path, "read=yes"]
    read = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    assert read["metadata"].pop("labels") == {"read": "yes"}
    assert read == load(path)


def test_the_readme_names_every_manifest():
    readme = (ROOT / "kubernetes" / "README.md").read_text()
    assert [path.name for path in FILES if f"{path.name})" not in readme] == []


@needs_crds
def test_the_readme_names_the_versions_that_are_checked_against():
    versions = [re.search(r"-(v[\d.]+)\.json", name)[1] for name in os.listdir(CRDS) if ".json" in name]
    readme = (ROOT / "kubernetes" / "README.md").read_text()
    assert versions and [version for version in versions if version not in readme] == []


# --- Broken ones --------------------------------------------------------------------------------

SPECS = "spec.pytorchReplicaSpecs"
MASTER, WORKER = f"{SPECS}.Master", f"{SPECS}.Worker"
POD = f"{MASTER}.template.spec"
BOX = f"{POD}.containers[0]"
WORKER_POD = f"{WORKER}.template.spec"
WORKER_BOX = f"{WORKER_POD}.containers[0]"
ON_MASTER, ON_WORKER = (
    f'{replica}.template.metadata.annotations["{SIDECAR}"]' for replica in (MASTER, WORKER)
)

# What is wrong: the field, its new value, and the path in the message where it is another.
BROKEN_JOB = {
    "api version of 2018": ("apiVersion", "kubeflow.org/v1beta2"),
    "kind misspelt": ("kind", "PytorchJob"),
    "no name": ("metadata.name", GONE),
    "name in capitals": ("metadata.name", "MNIST"),
    "name that begins with a digit": ("metadata.name", "1-mnist"),
    "name too long for its pods": ("metadata.name", "m" * 60),
    "no spec": ("spec", GONE),
    "unknown field": ("spec.pytorchReplicaSpec", {}),
    "field in the wrong place": ("spec.backoffLimit", 3),
    "processes per pod as a number": ("spec.nprocPerNode", 1),
    "a process per CPU of the node": ("spec.nprocPerNode", "auto"),
    "clean-up policy unknown": ("spec.runPolicy.cleanPodPolicy", "Sometimes"),
    "no clean-up policy": ("spec.runPolicy.cleanPodPolicy", GONE),
    "back-off limit as text": ("spec.runPolicy.backoffLimit", "16"),
    "back-off limit that one lost pod exceeds": ("spec.runPolicy.backoffLimit", 3),
    "elastic with a master": (
        "spec.elasticPolicy",
        {"minReplicas": 1, "maxReplicas": 2, "maxRestarts": 1},
        MASTER,
    ),
    "no replicas at all": (SPECS, GONE),
    "replica type in lower case": (f"{SPECS}.worker", {}),
    "no master": (MASTER, GONE),
    "two masters": (f"{MASTER}.replicas", 2),
    "number of masters left out": (f"{MASTER}.replicas", GONE),
    "number of workers as text": (f"{WORKER}.replicas", "2"),
    "no workers, but said to be there": (f"{WORKER}.replicas", 0),
    "restart policy in lower case": (f"{MASTER}.restartPolicy", "onfailure"),
    "no template": (f"{WORKER}.template", GONE),
    "no annotation on the master": (ON_MASTER, GONE),
    "sidecar allowed on the workers": (ON_WORKER, "true"),
    "annotation that is no text": (ON_WORKER, False),
    "no container": (f"{POD}.containers", GONE),
    "container with another name": (f"{BOX}.name", "trainer"),
    "no image": (f"{BOX}.image", GONE),
    "workers with another image": (f"{WORKER_BOX}.image", "mnist-trainer:0.9"),
    "started without the image's init": (f"{BOX}.command", ["python", "mnist.py"]),
    "argument that is no text": (f"{BOX}.args[1]", 15),
    "flag misspelt": (f"{BOX}.args[0]", "--epoch", f"{BOX}.args"),
    "value that the trainer refuses": (f"{BOX}.args[1]", "0", f"{BOX}.args"),
    "workers with another seed": (f"{WORKER_BOX}.args[3]", "8", f"{WORKER_BOX}.args"),
    "restarted pod starts from zero": (f"{BOX}.args[6]", "--no-cuda", f"{BOX}.args"),
    "no number of threads": (f"{BOX}.env", GONE),
    "field of a container misspelt": (f"{BOX}.volumeMount", []),
    "field of a pod misspelt": (f"{POD}.node_selector", {}),
    "output that is on no volume": (f"{BOX}.args[8]", "/results", f"{BOX}.volumeMounts"),
    "mount without a volume": (f"{BOX}.volumeMounts[0].name", "outputs"),
    "volume that nothing mounts": (f"{POD}.volumes[1].name", "scratch"),
    "two mounts in one place": (f"{BOX}.volumeMounts[1].mountPath", "/output"),
    "two volumes of one name": (f"{POD}.volumes[1].name", "output"),
    "checkpoint that goes with the pod": (f"{POD}.volumes[0].persistentVolumeClaim", GONE),
    "claim without a name": (f"{POD}.volumes[0].persistentVolumeClaim.claimName", GONE),
    "no folder for temporary files": (f"{BOX}.volumeMounts[1].mountPath", "/temp", f"{BOX}.volumeMounts"),
    "memory that is no quantity": (f"{BOX}.resources.limits.memory", "4 GB"),
    "memory in unknown units": (f"{BOX}.resources.requests.memory", "1536MiB"),
    "more requested than allowed": (f"{BOX}.resources.requests.cpu", "4", f"{BOX}.resources.limits.cpu"),
    "no memory requested": (f"{BOX}.resources.requests.memory", GONE),
    "half a GPU": (f'{BOX}.resources.limits["nvidia.com/gpu"]', "0.5"),
    "limits left empty": (f"{BOX}.resources.limits", None),
    "less time to save than it takes": (f"{POD}.terminationGracePeriodSeconds", 10),
    "root allowed": (f"{POD}.securityContext.runAsNonRoot", False),
    "user left to the image": (f"{POD}.securityContext.runAsUser", GONE),
    "system calls unconfined": (f"{POD}.securityContext.seccompProfile", {"type": "Unconfined"}),
    "root file system writable": (f"{BOX}.securityContext.readOnlyRootFilesystem", False),
    "privileges may grow": (f"{BOX}.securityContext.allowPrivilegeEscalation", GONE),
    "capabilities kept": (f"{BOX}.securityContext.capabilities", GONE),
}

BROKEN_ELASTIC = {
    "more at least than at most": ("spec.elasticPolicy.minReplicas", 4),
    "no worker at least": ("spec.elasticPolicy.minReplicas", 0),
    "more workers than at most": (f"{WORKER}.replicas", 4),
    "unknown way to meet": ("spec.elasticPolicy.rdzvBackend", "redis"),
    "torchrun as of old": (f"{WORKER_BOX}.command", ["torchrun", "mnist.py"]),
    "old addresses after a restart": (f"{WORKER_BOX}.env[1]", GONE, f"{WORKER_BOX}.env"),
    "never restarted by torchrun": ("spec.elasticPolicy.maxRestarts", GONE),
}

TRAINER = "spec.trainer"
MANAGER = "spec.runtimePatches[0].manager"
PATCH = "spec.runtimePatches[0].trainingRuntimeSpec.template.spec.replicatedJobs[0]"
PATCH_POD = f"{PATCH}.template.spec.template"
BROKEN_TRAINJOB = {
    "torchrun as of old": (f"{TRAINER}.command", ["torchrun", "mnist.py"]),
    "manager without a domain": (MANAGER, "mnist-tutorial"),
    "manager that is a domain alone": (MANAGER, "example.com/"),
    "manager in a domain in capitals": (MANAGER, "Example.com/mnist-tutorial"),
    "processes per node as text": (f"{TRAINER}.numProcPerNode", "1"),
    "number of nodes as in version 1": (f"{TRAINER}.replicas", 3),
    "runtime unknown": ("spec.runtimeRef.name", "pytorch"),
    "another job of the runtime": (f"{PATCH}.name", "launcher"),
    "container with the name of version 1": (f"{PATCH_POD}.spec.containers[0].name", "pytorch"),
    "variable of the operator's": (f"{TRAINER}.env[0].name", "PET_NNODES"),
    "mount without a volume": (f"{PATCH_POD}.spec.containers[0].volumeMounts[0].name", "outputs"),
    "no annotation": (f'{PATCH_POD}.metadata.annotations["{SIDECAR}"]', GONE),
    "memory that is no quantity": (f"{TRAINER}.resourcesPerNode.limits.memory", "lots"),
}

TRIALS = "spec.trialTemplate"
TRIAL_BOX = f"{TRIALS}.trialSpec.{BOX}"
BROKEN_EXPERIMENT = {
    "metric that the trainer does not print": ("spec.objective.objectiveMetricName", "Accuracy"),
    "range upside down": ("spec.parameters[0].feasibleSpace.min", "3.0"),
    "range as a number": ("spec.parameters[0].feasibleSpace.min", 0.1),
    "value that the trainer refuses": ("spec.parameters[1].feasibleSpace.max", "1.5", f"{TRIAL_BOX}.args"),
    "parameter that is not tuned": (f"{TRIALS}.trialParameters[0].reference", "momentum"),
    "parameter that is not used": (f"{TRIAL_BOX}.args[5]", "1.0", f"{TRIALS}.trialParameters"),
    "flag misspelt": (f"{TRIAL_BOX}.args[4]", "--learning-rate", f"{TRIAL_BOX}.args"),
    "container that is not there": (f"{TRIALS}.primaryContainerName", "training-container"),
    "log of a pod that prints nothing": (
        f'{TRIALS}.primaryPodLabels["training.kubeflow.org/job-role"]',
        "worker",
        f"{TRIALS}.primaryPodLabels",
    ),
    "command left to the image": (f"{TRIAL_BOX}.command", GONE),
    "something else started": (f"{TRIAL_BOX}.command", ["bash", "-c", "python mnist.py"]),
    "more trials at once than at all": ("spec.parallelTrialCount", 20),
    "trials that share a checkpoint": (f"{TRIAL_BOX}.args[6]", "--resume", f"{TRIAL_BOX}.args"),
}

BROKEN_CLAIM = {
    "access mode misspelt": ("spec.accessModes[0]", "ReadWriteAll"),
    "size that is no quantity": ("spec.resources.requests.storage", "1 GB"),
}

BROKEN = {JOB: BROKEN_JOB, ELASTIC: BROKEN_ELASTIC, TRAINJOB: BROKEN_TRAINJOB}
BROKEN |= {EXPERIMENT: BROKEN_EXPERIMENT, CLAIM: BROKEN_CLAIM}


@schemas
@pytest.mark.parametrize(
    ("path", "field", "value", "where"),
    [
        pytest.param(path, field, value, *(where or [field]), id=f"{path.stem}: {name}")
        for path, variants in BROKEN.items()
        for name, (field, value, *where) in variants.items()
    ],
)
def test_a_broken_manifest_is_refused_with_the_path_of_the_field(path, field, value, where, crds):
    found = problems(change(load(path), field, value), crds)
    assert [problem for problem in found if problem.startswith(f"{where}: ")], found


def paths(value, at=""):
    """Yield the paths of all fields of a manifest."""
    for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield below(at, step)
        if isinstance(inner, (dict, list)):
            yield from paths(inner, below(at, step))


def test_no_field_of_the_job_can_be_left_out_unnoticed_but_these():
    job = load(JOB)
    assert [field for field in paths(job) if not problems(change(job, field, GONE))] == [
        f"{POD}.volumes[1].emptyDir",  # a cluster adds it
        WORKER,  # a job of the master alone
        f"{WORKER_POD}.volumes[0].emptyDir",
        f"{WORKER_POD}.volumes[1].emptyDir",
    ]


@needs_crds
@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        (JOB, f"{BOX}.volumeMount", []),
        (JOB, f"{MASTER}.replicas", "1"),
        (JOB, f"{BOX}.args[1]", 15),
        (TRAINJOB, f"{PATCH_POD}.spec.node_selector", {}),
        (TRAINJOB, f"{TRAINER}.numNodes", "3"),
    ],
)
def test_the_operators_own_schemas_refuse_what_is_unknown_or_mistyped(path, field, value):
    manifest = load(path)
    schema = operator_schema(CRDS, manifest["kind"])
    assert list(schema_problems("", manifest, schema)) == []
    (problem,) = schema_problems("", change(manifest, field, value), schema)
    assert problem.startswith(f"{field}: ")


# --- Katib --------------------------------------------------------------------------------------


def test_katib_reads_each_epoch_s_loss_and_accuracy_and_nothing_else(small):
    code, log = run(small, "mnist.py", "--epochs", "1", "--log-interval", "1")
    code_again, log_again = run(small, "mnist.py", "--epochs", "3", "--log-interval", "1", "--resume")
    assert (code, code_again) == (0, 0), log + log_again
    read = read_by_katib(load(EXPERIMENT), log + log_again)
    epochs = [json.loads(line) for line in (small / "output" / "metrics.jsonl").read_text().splitlines()]
    written = [(e["test_loss"], e["accuracy"]) for e in epochs]
    assert len(written) == 3
    assert read == [
        pair
        for loss, accuracy in written
        for pair in (("loss", f"{loss:.4f}"), ("accuracy", f"{accuracy:.4f}"))
    ]


@pytest.mark.parametrize("bound", ["min", "max"])
def test_katib_s_parameters_arrive_in_the_trainer(bound):
    experiment = load(EXPERIMENT)
    args = parse(container(trial(experiment, bound))["args"])
    for parameter in experiment["spec"]["parameters"]:
        assert vars(args)[parameter["name"]] == float(parameter["feasibleSpace"][bound])
