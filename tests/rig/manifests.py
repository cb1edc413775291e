"""Say what is wrong with a manifest before a cluster does, or where a cluster would say nothing.

A misspelt field or a mount without its volume is refused by some API server late, or by none: the job
is created, and no pod ever comes. So this is stricter than a cluster, and it knows the trainer too.
"""

import copy
import io
import json
import re
from contextlib import redirect_stderr
from decimal import Decimal
from functools import cache
from pathlib import Path, PurePosixPath

import jsonschema
import kubernetes_validate
import yaml

import mnist


def load(path):
    """Return the manifest in a YAML file as a cluster gets it: as JSON, without anchors."""
    return json.loads(json.dumps(yaml.safe_load(Path(path).read_text())))


GONE = object()


def change(manifest, field, value):
    """Return a copy of the manifest in which the field at the path has another value, or is GONE."""
    manifest = copy.deepcopy(manifest)
    steps = re.findall(r'\["([^"]+)"\]|\[(\d+)\]|([^.[]+)', field)
    *parents, last = [int(index) if index else quoted or name for quoted, index, name in steps]
    owner = manifest
    for parent in parents:
        owner = owner[parent]
    if value is GONE:
        del owner[last]
    else:
        owner[last] = value
    return manifest


def problems(manifest, crds=None):
    """Return all that is wrong with a manifest, each as "path: sentence".

    `crds` is a folder of the operators' own schemas, which are then applied on top of ours.
    """
    kind = str(manifest.get("kind"))
    if kind not in SCHEMAS:
        return [f"kind: {kind} is none of {', '.join(SCHEMAS)}"]
    found = [*empty_problems("", manifest), *schema_problems("", manifest, SCHEMAS[kind])]
    if crds and (schema := operator_schema(crds, kind)):
        found += schema_problems("", manifest, schema)
    if not found:  # what follows relies on the fields being there, and of the right types
        found += RULES[kind](manifest)
    return list(dict.fromkeys(found))


# --- Fields and their types ---------------------------------------------------------------------


def below(at, *steps):
    """Return the path that leads from the path `at` on by names and indices."""
    for step in steps:
        if isinstance(step, int):
            at += f"[{step}]"
        else:
            at += f'["{step}"]' if "." in step else f".{step}" if at else step
    return at


def empty_problems(at, value):
    """Yield the fields that were left without a value: a cluster takes them as not there."""
    if value is None:
        yield f"{at}: has no value"
    elif isinstance(value, (dict, list)):
        for step, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from empty_problems(below(at, step), inner)


def fields(*required, **properties):
    """Return the schema of an object that has these fields and no others."""
    return {
        "type": "object",
        "required": list(required),
        "properties": properties,
        "additionalProperties": False,
    }


def one_of(*values):
    return {"enum": list(values)}


def list_of(items):
    return {"type": "array", "items": items, "minItems": 1}


TEXT = {"type": "string", "minLength": 1}
# As Kubernetes' own IsDomainPrefixedPath has it.
LABEL = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
WITH_DOMAIN = {"type": "string", "pattern": rf"^{LABEL}(\.{LABEL})*/[A-Za-z0-9/\-._~%!$&'()*+,;=:]+$"}
COUNT = {"type": "integer", "minimum": 1}
FROM_ZERO = {"type": "integer", "minimum": 0}
OBJECT = {"type": "object"}
# The operators name pods and services after the job and append up to ten letters: "-worker-12".
NAME = {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$", "maxLength": 53}
METADATA = fields("name", name=NAME, namespace=TEXT, labels=OBJECT, annotations=OBJECT)
TEMPLATE = fields("metadata", "spec", metadata=OBJECT, spec=OBJECT)  # of a pod, checked as one

REPLICA = fields(
    "replicas",
    "restartPolicy",
    "template",
    replicas=COUNT,
    restartPolicy=one_of("Always", "ExitCode", "Never", "OnFailure"),
    template=TEMPLATE,
)
PYTORCHJOB_SPEC = fields(
    "nprocPerNode",
    "runPolicy",
    "pytorchReplicaSpecs",
    nprocPerNode={"type": "string", "pattern": "^[1-9][0-9]*$"},  # auto is one per CPU of the node
    elasticPolicy=fields(
        "minReplicas",
        "maxReplicas",
        "maxRestarts",
        minReplicas=COUNT,
        maxReplicas=COUNT,
        maxRestarts=FROM_ZERO,
        rdzvBackend=one_of("c10d", "etcd", "etcd-v2"),
    ),
    runPolicy=fields(
        "backoffLimit",
        "cleanPodPolicy",
        activeDeadlineSeconds=COUNT,
        backoffLimit=FROM_ZERO,
        cleanPodPolicy=one_of("All", "None", "Running"),
        ttlSecondsAfterFinished=FROM_ZERO,
    ),
    pytorchReplicaSpecs=fields(Master=REPLICA, Worker=REPLICA),
)
JOB_PATCH = fields("spec", spec=fields("template", template=TEMPLATE))
JOB_PATCHES = list_of(fields("name", "template", name=one_of("node"), template=JOB_PATCH))
RUNTIME_PATCH = fields(
    "template", template=fields("spec", spec=fields("replicatedJobs", replicatedJobs=JOB_PATCHES))
)
TRAINJOB_SPEC = fields(
    "runtimeRef",
    "trainer",
    "runtimePatches",
    runtimeRef=fields("name", name=one_of("torch-distributed")),
    trainer=fields(
        "numNodes",
        "numProcPerNode",
        "image",
        "args",
        "resourcesPerNode",
        numNodes=COUNT,
        numProcPerNode=COUNT,
        image=TEXT,
        command=list_of(TEXT),
        args=list_of(TEXT),
        env=list_of({"type": "object", "required": ["name"], "properties": {"name": TEXT}}),
        resourcesPerNode=fields("requests", "limits", requests=OBJECT, limits=OBJECT),
    ),
    runtimePatches=list_of(
        fields("manager", "trainingRuntimeSpec", manager=WITH_DOMAIN, trainingRuntimeSpec=RUNTIME_PATCH)
    ),
)
METRIC = one_of("accuracy", "loss")  # what mnist.py prints
EXPERIMENT_SPEC = fields(
    "objective",
    "metricsCollectorSpec",
    "algorithm",
    "maxTrialCount",
    "parallelTrialCount",
    "parameters",
    "trialTemplate",
    objective=fields(
        "type",
        "objectiveMetricName",
        type=one_of("maximize", "minimize"),
        goal={"type": "number"},
        objectiveMetricName=METRIC,
        additionalMetricNames=list_of(METRIC),
        metricStrategies=list_of(fields("name", "value", name=METRIC, value=one_of("max", "min", "latest"))),
    ),
    metricsCollectorSpec=fields("collector", collector=fields("kind", kind=one_of("StdOut"))),
    algorithm=fields("algorithmName", algorithmName=TEXT),
    maxTrialCount=COUNT,
    parallelTrialCount=COUNT,
    maxFailedTrialCount=FROM_ZERO,
    parameters=list_of(
        fields(
            "name",
            "parameterType",
            "feasibleSpace",
            name=TEXT,
            parameterType=one_of("double", "int"),
            feasibleSpace=fields("min", "max", min=TEXT, max=TEXT),
        )
    ),
    trialTemplate=fields(
        "primaryContainerName",
        "primaryPodLabels",
        "trialParameters",
        "trialSpec",
        primaryContainerName=TEXT,
        primaryPodLabels=one_of({"training.kubeflow.org/job-role": "master"}),
        trialParameters=list_of(fields("name", "reference", name=TEXT, description=TEXT, reference=TEXT)),
        trialSpec=fields(
            "apiVersion",
            "kind",
            "spec",
            apiVersion=one_of("kubeflow.org/v1"),
            kind=one_of("PyTorchJob"),
            spec=PYTORCHJOB_SPEC,
        ),
    ),
)
CLAIM_SPEC = fields(
    "accessModes",
    "resources",
    accessModes=list_of(one_of("ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod")),
    resources=fields("requests", requests=fields("storage", storage=TEXT)),
    storageClassName=TEXT,
)


def resource(version, kind, spec):
    """Return the schema of a whole manifest."""
    required = ("apiVersion", "kind", "metadata", "spec")
    return fields(*required, apiVersion=one_of(version), kind=one_of(kind), metadata=METADATA, spec=spec)


SCHEMAS = {
    "Pod": resource("v1", "Pod", OBJECT),
    "PersistentVolumeClaim": resource("v1", "PersistentVolumeClaim", CLAIM_SPEC),
    "PyTorchJob": resource("kubeflow.org/v1", "PyTorchJob", PYTORCHJOB_SPEC),
    "TrainJob": resource("trainer.kubeflow.org/v1alpha1", "TrainJob", TRAINJOB_SPEC),
    "Experiment": resource("kubeflow.org/v1beta1", "Experiment", EXPERIMENT_SPEC),
}


@cache
def operator_schema(folder, kind):
    """Return the strict schema of a kind from the operator's resource definition, None if not there."""
    files = sorted(Path(folder).glob(f"{kind.lower()}s.*.json"))
    if not files:
        return None
    return strict(json.loads(files[-1].read_text())["spec"]["versions"][0]["schema"]["openAPIV3Schema"])


def strict(schema):
    """Return a schema that also refuses the fields which it does not name."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema["additionalProperties"] = False
    return schema


def schema_problems(at, value, schema):
    """Yield where `value` is not as its JSON schema wants it."""
    for error in jsonschema.Draft202012Validator(schema).iter_errors(value):
        yield from located(at, error)


def core_problems(at, manifest):
    """Yield the first place where something of Kubernetes' own kinds is not as its schema wants it."""
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except jsonschema.ValidationError as error:
        yield from located(at, error)


def located(at, error):
    """Yield a schema's error with the path of the very field: an unknown or a missing one included."""
    at = below(at, *error.absolute_path)
    if error.validator == "additionalProperties":
        for name in sorted(set(error.instance) - set(error.schema.get("properties", ()))):
            yield f"{below(at, name)}: no such field"
    elif error.validator == "required":
        for name in error.validator_value:
            if name not in error.instance:
                yield f"{below(at, name)}: is missing"
    else:
        yield f"{at}: {error.message}"


# --- Pods ---------------------------------------------------------------------------------------

SIDECAR = "sidecar.istio.io/inject"
SAFE_POD = {
    "runAsNonRoot": True,
    "runAsUser": 1000,
    "fsGroup": 1000,
    "seccompProfile": {"type": "RuntimeDefault"},
}
SAFE_CONTAINER = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def pod_problems(at, template):
    """Yield what is wrong with a pod's template, whatever runs in it."""
    if found := list(core_problems(at, {"apiVersion": "v1", "kind": "Pod", **template})):
        yield from found
        return
    spec = template["spec"]
    if template["metadata"].get("annotations", {}).get(SIDECAR) != "false":
        where = below(at, "metadata", "annotations", SIDECAR)
        yield f'{where}: must be "false", or the job never ends where Istio is'
    if spec.get("terminationGracePeriodSeconds", 0) < 30:
        yield f"{at}.spec.terminationGracePeriodSeconds: must be 30 or more: to save may take the trainer 20"
    yield from security_problems(f"{at}.spec", spec, SAFE_POD)
    for i, container in enumerate(spec["containers"]):
        yield from security_problems(f"{at}.spec.containers[{i}]", container, SAFE_CONTAINER)
    yield from volume_problems(f"{at}.spec", spec)


def security_problems(at, owner, safe):
    for name, value in safe.items():
        if owner.get("securityContext", {}).get(name) != value:
            yield f"{at}.securityContext.{name}: must be {json.dumps(value)}"


def volume_problems(at, spec):
    """Yield mounts without a volume, volumes without a mount, and places taken twice."""
    volumes = [volume["name"] for volume in spec.get("volumes", [])]
    mounted = set()
    for i, container in enumerate(spec["containers"]):
        places = set()
        for j, mount in enumerate(container.get("volumeMounts", [])):
            where = f"{at}.containers[{i}].volumeMounts[{j}]"
            if mount["name"] not in volumes:
                yield f"{where}.name: there is no volume {mount['name']}"
            if mount["mountPath"] in places:
                yield f"{where}.mountPath: {mount['mountPath']} is taken"
            mounted.add(mount["name"])
            places.add(mount["mountPath"])
    for i, volume in enumerate(volumes):
        if volume in volumes[:i]:
            yield f"{at}.volumes[{i}].name: there is a volume {volume} already"
        if volume not in mounted:
            yield f"{at}.volumes[{i}].name: nothing mounts the volume {volume}"


SUFFIXES = {"": 1, "n": "1e-9", "u": "1e-6", "m": "1e-3", "k": "1e3", "M": "1e6", "G": "1e9", "T": "1e12"}
SUFFIXES |= {f"{letter}i": 1024**power for power, letter in enumerate("KMGTPE", 1)}


def quantity(value):
    """Return an amount such as 2, "500m" or "1.5Gi" as a number, None if it is none."""
    match = re.fullmatch(r"(\d+\.?\d*|\.\d+)([a-zA-Z]*)", str(value))
    if not match or isinstance(value, float) or match[2] not in SUFFIXES:
        return None
    return Decimal(match[1]) * Decimal(SUFFIXES[match[2]])


def resource_problems(at, resources):
    """Yield amounts that are none, that miss, or of which more is requested than allowed."""
    for group in ("requests", "limits"):
        for name in ("cpu", "memory"):
            if name not in resources.get(group, {}):
                yield f"{at}.{group}.{name}: is missing"
        for name, value in resources.get(group, {}).items():
            where, amount = below(f"{at}.{group}", name), quantity(value)
            requested = quantity(resources.get("requests", {}).get(name, 0))
            if amount is None:
                yield f"{where}: {value!r} is no quantity"
            elif "/" in name and amount % 1:
                yield f"{where}: {value!r} is not a whole number"
            elif group == "limits" and requested is not None and requested > amount:
                yield f"{where}: {value} is less than what is requested, {resources['requests'][name]}"


# --- The trainer in its pod ---------------------------------------------------------------------


THREADS = {"name": "OMP_NUM_THREADS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}

NEW_STORE = {"name": "TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "value": "1"}


def trainer_problems(at, trainer, wrapped=False):
    """Yield what is wrong with how mnist.py is started: `trainer` is its container, or a TrainJob's.

    Only a command that Katib wraps must be named. The image's own starts an init first.
    """
    command = trainer.get("command")
    if command is None and wrapped:
        yield f"{at}.command: is missing: Katib has to wrap it"
    elif command is not None and not wrapped:
        yield f"{at}.command: must not be there: the image starts mnist.py, which starts torchrun if need be"
    elif command not in (None, ["python", "mnist.py"]):
        yield f"{at}.command: {command} starts something else than mnist.py"
    if THREADS not in trainer.get("env", []):
        yield f"{at}.env: OMP_NUM_THREADS must be limits.cpu, or each CPU of the node gets a thread"
    try:
        parse(trainer.get("args", []))
    except ValueError as error:
        yield f"{at}.args: mnist.py says: {error}"


def parse(args):
    """Parse arguments as mnist.py does. Raises ValueError with what it says against them."""
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return mnist.parse_arguments(args)
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1].removeprefix("mnist.py: error: ")) from None


def folder_problems(at, args, spec, i, writes):
    """Yield folders that the trainer in the pod's container `i` needs, and cannot write to or find again."""
    try:
        args = parse(args)
    except ValueError:
        return  # trainer_problems has said so
    mounts = {PurePosixPath(m["mountPath"]): m["name"] for m in spec["containers"][i].get("volumeMounts", [])}
    where = f"{at}.containers[{i}]"
    if PurePosixPath("/tmp") not in mounts:
        yield f"{where}.volumeMounts: nothing is mounted at /tmp, where torch needs to write"
    output = PurePosixPath("/app", args.output_dir)
    name = next((mounts[folder] for folder in (output, *output.parents) if folder in mounts), None)
    if name is None:
        yield f"{where}.volumeMounts: nothing is mounted at --output-dir {args.output_dir}: it is read-only"
    for j, volume in enumerate(spec.get("volumes", [])):
        if volume["name"] != name or not writes:
            continue
        if args.resume and "persistentVolumeClaim" not in volume:
            claim = f"{at}.volumes[{j}].persistentVolumeClaim"
            yield f"{claim}: is missing: --resume in a new pod would find nothing"
        if "persistentVolumeClaim" in volume and not args.resume:
            yield f"{where}.args: --resume is missing: a restarted pod would start from zero"


# --- The rules of each kind ---------------------------------------------------------------------


def pytorchjob_problems(job, at="spec", wrapped=False):
    spec = job["spec"]
    replicas, elastic = spec["pytorchReplicaSpecs"], spec.get("elasticPolicy")
    specs = f"{at}.pytorchReplicaSpecs"
    found = [
        p for name, r in replicas.items() for p in pod_problems(f"{specs}.{name}.template", r["template"])
    ]
    if found:
        yield from found
        return
    if elastic:
        yield from elastic_problems(at, elastic, replicas)
    elif "Master" not in replicas:
        yield f"{specs}.Master: is missing: the workers could not find each other"
    elif replicas["Master"]["replicas"] != 1:
        yield f"{specs}.Master.replicas: must be 1"
    pods = sum(replica["replicas"] for replica in replicas.values())
    if spec["runPolicy"]["backoffLimit"] <= pods:
        yield f"{at}.runPolicy.backoffLimit: must be above {pods}: one lost pod makes all of them restart"
    first = {}
    for name, replica in replicas.items():
        pod, where = replica["template"]["spec"], f"{specs}.{name}.template.spec"
        names = [container["name"] for container in pod["containers"]]
        if "pytorch" not in names:
            yield f"{where}.containers[0].name: must be pytorch, which the operator looks for"
            continue
        i = names.index("pytorch")
        container = pod["containers"][i]
        if not container.get("image"):
            yield f"{where}.containers[{i}].image: is missing"
        for field in ("image", "command", "args", "resources"):
            if container.get(field) != first.setdefault(field, container.get(field)):
                yield f"{where}.containers[{i}].{field}: is not the master's: all must train alike"
        yield from resource_problems(f"{where}.containers[{i}].resources", container.get("resources", {}))
        yield from trainer_problems(f"{where}.containers[{i}]", container, wrapped)
        if elastic and NEW_STORE not in container.get("env", []):
            yield f"{where}.containers[{i}].env: {NEW_STORE['name']} must be 1, or a restart finds ghosts"
        writes = name == "Master" or elastic  # an elastic job's writer may be any worker
        yield from folder_problems(where, container.get("args", []), pod, i, writes)


def elastic_problems(at, elastic, replicas):
    low, high = elastic["minReplicas"], elastic["maxReplicas"]
    if "Master" in replicas:
        yield f"{at}.pytorchReplicaSpecs.Master: must not be there: an elastic job has workers alone"
    if low > high:
        yield f"{at}.elasticPolicy.minReplicas: {low} is more than maxReplicas, {high}"
    elif not low <= replicas.get("Worker", {}).get("replicas", 0) <= high:
        yield f"{at}.pytorchReplicaSpecs.Worker.replicas: must be from {low} to {high}, as elasticPolicy says"


def trainjob_problems(job):
    trainer, at = job["spec"]["trainer"], "spec.trainer"
    yield from resource_problems(f"{at}.resourcesPerNode", trainer["resourcesPerNode"])
    yield from trainer_problems(at, trainer)
    for i, variable in enumerate(trainer.get("env", [])):
        if variable["name"].startswith("PET_"):
            yield f"{at}.env[{i}].name: {variable['name']} is the operator's to set"
    template = job["spec"]["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]
    template = template["replicatedJobs"][0]["template"]["spec"]["template"]
    at = "spec.runtimePatches[0].trainingRuntimeSpec.template.spec.replicatedJobs[0].template.spec.template"
    if found := list(pod_problems(at, template)):
        yield from found
        return
    if template["spec"]["containers"][0]["name"] != "node":
        yield f"{at}.spec.containers[0].name: must be node, as in the runtime"
    yield from folder_problems(f"{at}.spec", trainer["args"], template["spec"], 0, writes=True)


def claim_problems(claim):
    yield from core_problems("", claim)
    if quantity(storage := claim["spec"]["resources"]["requests"]["storage"]) is None:
        yield f"spec.resources.requests.storage: {storage!r} is no quantity"


PLACEHOLDER = re.compile(r"\$\{trialParameters\.(\w+)\}")


def experiment_problems(experiment):
    spec, template, at = experiment["spec"], experiment["spec"]["trialTemplate"], "spec.trialTemplate"
    if spec["parallelTrialCount"] > spec["maxTrialCount"]:
        yield "spec.parallelTrialCount: is more than maxTrialCount"
    for i, parameter in enumerate(spec["parameters"]):
        space, where = parameter["feasibleSpace"], f"spec.parameters[{i}].feasibleSpace"
        for bound in ("min", "max"):
            if quantity(space[bound]) is None:
                yield f"{where}.{bound}: {space[bound]!r} is no number"
                return
        if quantity(space["min"]) >= quantity(space["max"]):
            yield f"{where}.min: {space['min']} is not below max, {space['max']}"
    names = [parameter["name"] for parameter in spec["parameters"]]
    for i, parameter in enumerate(template["trialParameters"]):
        if parameter["reference"] not in names:
            yield f"{at}.trialParameters[{i}].reference: there is no parameter {parameter['reference']}"
            return
    given = {parameter["name"] for parameter in template["trialParameters"]}
    used = set(PLACEHOLDER.findall(json.dumps(template["trialSpec"])))
    if given != used:
        yield f"{at}.trialParameters: {sorted(given)} are given, but {sorted(used)} used"
        return
    for bound in ("min", "max"):
        yield from pytorchjob_problems(trial(experiment, bound), f"{at}.trialSpec.spec", wrapped=True)
    for replica in template["trialSpec"]["spec"]["pytorchReplicaSpecs"].values():
        containers = replica["template"]["spec"]["containers"]
        if template["primaryContainerName"] not in [container["name"] for container in containers]:
            yield f"{at}.primaryContainerName: no container has it"


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
    "Pod": lambda pod: core_problems("", pod),
    "PersistentVolumeClaim": claim_problems,
    "PyTorchJob": pytorchjob_problems,
    "TrainJob": trainjob_problems,
    "Experiment": experiment_problems,
}
