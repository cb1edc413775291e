"""What the operators make of a manifest: its pods, and what they find in their environment.

This is how Training Operator v1.9.4 (PyTorchJob) and Kubeflow Trainer v2.3.0 (TrainJob) go about it, seen
in clusters and read in their sources.
"""

from dataclasses import dataclass

PORT = 23456
PORT_OF_TRAINER_2 = 29500


@dataclass
class Pod:
    """A pod: its container is the manifest's, with the variables that the operator adds, and they win."""

    name: str  # it knows itself by this
    service: str  # the others know it by this
    variables: dict
    spec: dict

    @property
    def container(self):
        (container,) = self.spec["containers"]
        return container


def pods_of(job):
    """Return the pods that the operator makes of a manifest, first the one that the others look for."""
    return {"PyTorchJob": pytorchjob_pods, "TrainJob": trainjob_pods}[job["kind"]](job)


def pytorchjob_pods(job):
    name, spec = job["metadata"]["name"], job["spec"]
    replicas, elastic = spec["pytorchReplicaSpecs"], spec.get("elasticPolicy")
    processes = spec.get("nprocPerNode", "auto")
    roles = [role for role in ("Master", "Worker") if role in replicas]
    places = [(role, index) for role in roles for index in range(replicas[role]["replicas"])]
    pods = []
    for rank, (role, index) in enumerate(places):
        variables = {"PYTHONUNBUFFERED": "1", "PET_NPROC_PER_NODE": processes}
        if "Master" in replicas:
            variables["MASTER_ADDR"] = variables["PET_MASTER_ADDR"] = f"{name}-master-0"
            variables["MASTER_PORT"] = variables["PET_MASTER_PORT"] = str(PORT)
            variables["WORLD_SIZE"] = str(len(places) * (1 if processes == "auto" else int(processes)))
            variables["RANK"] = variables["PET_NODE_RANK"] = str(rank)  # the pod's, not a process's
            variables["PET_NNODES"] = str(len(places))
        if elastic:
            variables["PET_RDZV_BACKEND"] = elastic.get("rdzvBackend", "c10d")
            variables["PET_RDZV_ENDPOINT"] = f"{name}-worker-0:{PORT}"
            variables["PET_NNODES"] = f"{elastic['minReplicas']}:{elastic['maxReplicas']}"
            variables["PET_MAX_RESTARTS"] = str(elastic["maxRestarts"])
        pod = f"{name}-{role.lower()}-{index}"
        pods.append(Pod(pod, pod, variables, replicas[role].get("template", {}).get("spec", {})))
    return pods


def trainjob_pods(job):
    """The runtime torch-distributed has one kind of pod, which the manifest completes."""
    name, trainer = job["metadata"]["name"], job["spec"]["trainer"]
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    spec = node["template"]["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    container |= {field: trainer[field] for field in ("image", "command", "args", "env") if field in trainer}
    container["resources"] = trainer["resourcesPerNode"]
    names = [f"{name}-node-0-{index}" for index in range(trainer["numNodes"])]
    variables = {
        "PET_NNODES": str(len(names)),
        "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
        "PET_MASTER_ADDR": f"{names[0]}.{name}",
        "PET_MASTER_PORT": str(PORT_OF_TRAINER_2),
    }
    spec = spec | {"containers": [container]}
    ranks = [{"PET_NODE_RANK": str(rank)} for rank in range(len(names))]
    return [Pod(n, f"{n}.{name}", variables | rank, spec) for n, rank in zip(names, ranks, strict=True)]


def backoff_limit(job):
    """Return how many restarts of all pods together are one too many, None if there is no limit."""
    if job["kind"] == "TrainJob":
        return 6  # of the Job that Trainer 2 makes; a TrainJob cannot change it
    return job["spec"].get("runPolicy", {}).get("backoffLimit")


def state_of(job, succeeded, restarts):
    """Return Running, Succeeded or Failed: which pods have succeeded, and their restarts, in their order."""
    enough = any if "elasticPolicy" in job["spec"] else all
    with_master = "Master" in job["spec"].get("pytorchReplicaSpecs", {})
    if enough(succeeded[:1] if with_master else succeeded):
        return "Succeeded"
    limit = backoff_limit(job)
    count = sum(n for n, ended in zip(restarts, succeeded, strict=True) if not ended)
    return "Failed" if limit is not None and count >= max(1, limit) else "Running"
