"""Find what is wrong with a manifest before a cluster does, or where a cluster would say nothing.

Schemas know which fields there are, and of what types. They are Kubernetes' own, Katib's in its package for
Python, and the other operators' resource definitions, as JSON, where MNIST_CRD_DIR names a folder with them:
https://github.com/kubeflow/trainer, manifests/base/crds, of the versions in kubernetes/README.md.

Rules are about fields that must fit each other, the operator or the trainer. Where they do not, a cluster
says so late or never: the job is created, and no pod comes, or one that forgets, or one that never ends.
"""

import copy
import io
import json
import os
import re
from contextlib import redirect_stderr
from decimal import Decimal
from functools import cache
from pathlib import Path, PurePosixPath

import kubernetes_validate
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match
from kubeflow_katib_api.models import V1beta1Experiment

import mnist
from rig.operators import pods_of
from rig.project import ROOT

KUBERNETES = ROOT / "kubernetes"
JOB, POD = ROOT / "pytorchjob-mnist.yaml", KUBERNETES / "pod-mnist.yaml"
ELASTIC, TRAINJOB = KUBERNETES / "pytorchjob-mnist-elastic.yaml", KUBERNETES / "trainjob-mnist.yaml"
EXPERIMENT, CLAIM = KUBERNETES / "experiment-mnist.yaml", KUBERNETES / "volume-claim.yaml"
CRDS = os.environ.get("MNIST_CRD_DIR")


def load(path):
    """Return the manifest in a YAML file as a cluster gets it: as JSON, without anchors."""
    return json.loads(json.dumps(yaml.safe_load(Path(path).read_text())))


def change(manifest, field, value):
    """Return a copy of the manifest with another value of a field, such as spec.containers[0].image."""
    manifest = owner = copy.deepcopy(manifest)
    *parents, last = [int(step) if step.isdigit() else step for step in re.findall(r"[^.[\]]+", field)]
    for parent in parents:
        owner = owner[parent]
    owner[last] = value
    return manifest


def containers(job):
    """Return the containers of a PyTorchJob, one for each kind of pod: first the master's, if it has one."""
    replicas = job["spec"]["pytorchReplicaSpecs"].values()
    return [replica["template"]["spec"]["containers"][0] for replica in replicas]


# The operators name pods and services after the job and append up to ten letters: "-worker-12".
NAME = re.compile(r"(?=.{1,53}$)[a-z]([-a-z0-9]*[a-z0-9])?")


def check(manifest):
    """Check a manifest against its schema and our rules. Raises an error that says what is wrong."""
    check_schema(manifest)
    assert NAME.fullmatch(manifest["metadata"]["name"]), "the name is no DNS label, or too long"
    if manifest["kind"] in RULES:
        RULES[manifest["kind"]](manifest)


# --- Schemas ------------------------------------------------------------------------------------

OPERATORS = {
    "PyTorchJob": "kubeflow.org/v1",
    "TrainJob": "trainer.kubeflow.org/v1alpha1",
    "Experiment": "kubeflow.org/v1beta1",
}


def check_schema(manifest):
    """Check that a manifest has the fields that it must have, of the right types, and no unknown ones."""
    kind, version = manifest["kind"], manifest["apiVersion"]
    if kind in OPERATORS:
        assert version == OPERATORS[kind], f"the version of {kind} is not {OPERATORS[kind]}"
        if error := best_match(operators_validator(kind).iter_errors(manifest)):
            raise error
    else:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)


@cache
def operators_validator(kind):
    """Return what knows the schema of an operator's kind; without MNIST_CRD_DIR, it may allow everything."""
    schema = {}
    if kind == "Experiment":  # Katib's resource definition describes no field
        schema = V1beta1Experiment.model_json_schema()
    elif CRDS:
        (file,) = Path(CRDS).glob(f"{kind.lower()}s.*.json")
        schema = json.loads(file.read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return Draft202012Validator(strict(schema))


def strict(schema):
    """Return a schema that also refuses the fields which it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema:
        schema["additionalProperties"] = False
    return schema


# --- Rules --------------------------------------------------------------------------------------

SAFE_POD = {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000}
SAFE_POD |= {"seccompProfile": {"type": "RuntimeDefault"}}
SAFE_CONTAINER = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True}
SAFE_CONTAINER |= {"capabilities": {"drop": ["ALL"]}}
THREADS = {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}


def check_pod(template, name, saves=True):
    """Check a pod that trains in a container of this name, and may be the one that saves the results."""
    check_schema({"apiVersion": "v1", "kind": "Pod", **template})
    spec, (container,) = template["spec"], template["spec"]["containers"]
    assert container["name"] == name, f"the container is not called {name}"
    sidecar = template["metadata"].get("annotations", {}).get("sidecar.istio.io/inject")
    assert sidecar == "false", "a sidecar would go on running, and the pod never end"
    assert spec["securityContext"] == SAFE_POD, "the pod is not as safe as it can be"
    assert container["securityContext"] == SAFE_CONTAINER, "the container is not as safe as it can be"
    if name != "node":  # a TrainJob's patches have no such field
        assert spec.get("automountServiceAccountToken") is False, "the pod has a key to the cluster"
    folders = [volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume]
    assert all(quantity(folder.get("sizeLimit")) for folder in folders), "a folder could fill its node"
    assert spec["terminationGracePeriodSeconds"] >= 30, "to save may take the trainer 20 seconds"
    assert THREADS in container["env"], "each CPU of the node would get a thread"
    check_resources(**container["resources"])
    check_folders(spec, container, parse(container["args"]), saves)


def check_resources(requests, limits):
    """Check that all amounts are there, and that no more is requested than allowed."""
    for name in ("cpu", "memory"):
        least, most = quantity(requests.get(name)), quantity(limits.get(name))
        assert least and most, f"{name} is not a quantity in both requests and limits"
        assert least <= most, f"more {name} is requested than allowed"
    assert str(limits.get("nvidia.com/gpu", 0)).isdigit(), "a pod gets whole GPUs only"


SUFFIXES = {"": 1, "m": "1e-3", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12"}
SUFFIXES |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGT", 1)}


def quantity(value):
    """Return an amount such as 2, "500m" or "1.5Gi" as a number, None if it is none."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([a-zA-Z]*)", str(value))
    return Decimal(match[1]) * Decimal(SUFFIXES[match[2]]) if match and match[2] in SUFFIXES else None


def check_folders(spec, container, args, saves):
    """Check that the trainer can write to the folders that it needs, and finds them again."""
    volumes = [volume["name"] for volume in spec["volumes"]]
    claims = [volume["name"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert sorted(volumes) == sorted(mounts.values()), "each volume needs a place, each place a volume"
    assert "/tmp" in mounts, "nothing is mounted at /tmp, where torch needs to write"
    output = PurePosixPath("/app", args.output_dir)
    volume = next((mounts[str(at)] for at in (output, *output.parents) if str(at) in mounts), None)
    assert volume, f"nothing is mounted at --output-dir {args.output_dir}, so it is read-only"
    if saves:
        assert (volume in claims) == args.resume, "without --resume and a claim, a new pod starts from zero"


def parse(args):
    """Parse arguments as mnist.py does. Raises ValueError with what it says against them."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return mnist.parse_arguments(args)
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1].removeprefix("mnist.py: error: ")) from None


def check_single_pod(pod):
    """Check a pod without an operator. One with a command of its own does not train, and is free."""
    if "command" not in pod["spec"]["containers"][0]:
        assert pod["spec"]["restartPolicy"] == "OnFailure", "restartPolicy: a lost pod would be the end"
        check_pod(pod, "mnist")


NEW_STORE = {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}


def check_pytorchjob(job):
    spec, replicas = job["spec"], job["spec"]["pytorchReplicaSpecs"]
    pods = sum(replica["replicas"] for replica in replicas.values())
    elastic = spec.get("elasticPolicy")
    if elastic:
        variables = containers(job)[0]["env"]
        assert NEW_STORE in variables, "after a restart, workers would wait for one that is gone"
        assert list(replicas) == ["Worker"], "an elastic job has workers only"
        assert 1 <= elastic["minReplicas"] <= pods <= elastic["maxReplicas"], "too many or too few workers"
    else:
        assert set(replicas) in ({"Master"}, {"Master", "Worker"}), "the operator knows no such pods"
        assert replicas["Master"]["replicas"] == 1, "there is more than one master"
    assert spec["nprocPerNode"].isdigit(), "auto would be a process for each CPU of the node"
    assert spec["runPolicy"]["cleanPodPolicy"] == "Running", "cleanPodPolicy: logs would go, or pods stay"
    assert spec["runPolicy"]["backoffLimit"] > pods, "backoffLimit: one lost pod restarts them all"
    for role, replica in replicas.items():
        assert replica["restartPolicy"] == "OnFailure", "restartPolicy: a lost pod would be the end"
        check_pod(replica["template"], "pytorch", saves=role == "Master" or elastic)


def check_trainjob(job):
    spec, (patch,) = job["spec"], job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    manager = re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?/\S+", patch["manager"])
    assert manager, "manager is not a path that begins with a domain"
    assert spec["runtimeRef"]["name"] == "torch-distributed", "the operator brings no such runtime"
    assert node["name"] == "node", "the runtime has no such job"
    pod = pods_of(copy.deepcopy(job))[0]
    ours = {variable["name"] for variable in spec["trainer"]["env"]}
    assert ours.isdisjoint(pod.variables), "a variable is the operator's to set"
    check_pod(node["template"]["spec"]["template"] | {"spec": pod.spec}, "node")


PLACEHOLDER = re.compile(r"\$\{trialParameters\.(\w+)\}")


def check_experiment(experiment):
    spec, template = experiment["spec"], experiment["spec"]["trialTemplate"]
    assert spec["parallelTrialCount"] <= spec["maxTrialCount"], "more trials run at once than at all"
    assert template["primaryContainerName"] == "pytorch", "Katib would not find the container"
    role = template["primaryPodLabels"]["training.kubeflow.org/job-role"]
    assert role == "master", "Katib would read the log of a pod that prints nothing"
    tuned = {parameter["name"] for parameter in spec["parameters"]}
    given = {parameter["name"]: parameter["reference"] for parameter in template["trialParameters"]}
    used = set(PLACEHOLDER.findall(json.dumps(template["trialSpec"])))
    assert set(given.values()) == tuned and set(given) == used, "a parameter would not reach the trainer"
    for bound in ("min", "max"):
        job = trial(experiment, bound) | {"metadata": {"name": "trial"}}
        check(job)
        args = vars(parse(containers(job)[0]["args"]))
        for parameter in spec["parameters"]:
            space = parameter["feasibleSpace"]
            assert float(space["min"]) < float(space["max"]), "min is not below max"
            assert args[parameter["name"]] == float(space[bound]), "a parameter would reach another flag"


def trial(experiment, bound):
    """Return the job that Katib makes for a trial with every parameter at its "min" or "max"."""
    template = experiment["spec"]["trialTemplate"]
    spaces = {parameter["name"]: parameter["feasibleSpace"] for parameter in experiment["spec"]["parameters"]}
    values = {p["name"]: spaces[p["reference"]][bound] for p in template["trialParameters"]}
    return json.loads(PLACEHOLDER.sub(lambda match: values[match[1]], json.dumps(template["trialSpec"])))


# What Katib's collector looks for, where an experiment gives no filter of its own.
KATIBS_FILTER = re.compile(r"([\w|-]+)\s*=\s*([+-]?\d*(\.\d+)?([Ee][+-]?\d+)?)")


def read_by_katib(experiment, log):
    """Return the metrics that Katib finds in a log, as pairs of name and value."""
    objective = experiment["spec"]["objective"]
    wanted = {objective["objectiveMetricName"], *objective.get("additionalMetricNames", [])}
    return [(name, value) for name, value, *_ in KATIBS_FILTER.findall(log) if name in wanted]


RULES = {
    "Pod": check_single_pod,
    "PyTorchJob": check_pytorchjob,
    "TrainJob": check_trainjob,
    "Experiment": check_experiment,
}
