"""A stand-in for a cluster: an API server with as much as kubectl and Kubeflow's SDK ask for to run a job.

    with ApiServer() as cluster:
        subprocess.run(["kubectl", …], env=os.environ | {"KUBECONFIG": cluster.kubeconfig(folder)})

It keeps what is created, and plays the operators that take each PyTorchJob and TrainJob to its end. It
checks nothing: rig/manifests.py does.
"""

import copy
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

from rig.operators import pods_of
from rig.processes import serving

TRAINER = "trainer.kubeflow.org/v1alpha1"
KINDS = {  # by their plural: the version of the API that has them, and their name
    "persistentvolumeclaims": ("v1", "PersistentVolumeClaim"),
    "pods": ("v1", "Pod"),
    "events": ("v1", "Event"),
    "pytorchjobs": ("kubeflow.org/v1", "PyTorchJob"),
    "trainjobs": (TRAINER, "TrainJob"),
    "trainingruntimes": (TRAINER, "TrainingRuntime"),
    "clustertrainingruntimes": (TRAINER, "ClusterTrainingRuntime"),
}


def root(version):
    """Return the path below which a version of the API has its kinds."""
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


ROOTS = {root(version): version for version, _ in KINDS.values()}
# Finds the plural of an object's kind in its path, its name, and what of it is asked for.
PATH = re.compile(r"(?:/api|/apis/[^/]+)/\w+(?:/namespaces/[^/]+)?/([^/]+)/?([^/]*)/?([^/]*)")
# How kubectl learns that the server checks the fields itself, so that it need not do so.
OPENAPI = {
    "openapi": "3.0.0",
    "info": {"title": "stand-in", "version": "1"},
    "paths": {
        f"{root(version)}/{plural}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "x-kubernetes-group-version-kind": {
                    "group": version.rpartition("/")[0],
                    "version": version.rpartition("/")[2],
                    "kind": kind,
                },
            }
        }
        for plural, (version, kind) in [*KINDS.items(), ("namespaces", ("v1", "Namespace"))]
    },
}
# Kubeflow Trainer's own runtime, as far as the SDK looks at it.
NODE = {
    "metadata": {"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}},
    "spec": {"template": {"spec": {"containers": [{"name": "node", "image": "stand-in"}]}}},
}
RUNTIME = {
    "kind": "ClusterTrainingRuntime",
    "apiVersion": TRAINER,
    "metadata": {"name": "torch-distributed", "labels": {"trainer.kubeflow.org/framework": "torch"}},
    "spec": {
        "mlPolicy": {"numNodes": 1, "torch": {}},
        "template": {"spec": {"replicatedJobs": [{"name": "node", "template": NODE}]}},
    },
}
ENDS = {"Succeeded": "Complete", "Failed": "Failed"}  # what a TrainJob calls them; it has no other state
TIME = "2026-11-24T08:00:00Z"


class ApiServer:
    """The server. `end` is what becomes of a job, once `running` queries have found it running.

    `refused` is what may not be created, by its plural. `warnings` are events about the job, {reason:
    message}: with each query there is one more, after one about an earlier job of the same name.
    """

    def __init__(self, end="Succeeded", log="", refused=(), running=2, warnings=()):
        self.log, self.refused, self.warnings = log, refused, dict(warnings)
        # What is true of a job, and what no longer is, one query after the other: `describe` makes two.
        self.states = ["Created"] * 2 + ["Created Running"] * running + [f"Created -Running {end}"]
        # By their path.
        self.objects = {f"{root(TRAINER)}/clustertrainingruntimes/torch-distributed": RUNTIME}
        self.queries = Counter()  # of each
        self.created = []
        self.changes = []  # the verbs and kinds of the requests that change something

    def __enter__(self):
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self):
                url = urlsplit(self.path)
                length = int(self.headers.get("Content-Length", 0))
                body = json.loads(self.rfile.read(length)) if length else None
                query = parse_qs(url.query) | {"table": "as=Table" in self.headers.get("Accept", "")}
                code, said = cluster.answer(self.command, url.path, query, body)
                text = isinstance(said, str)
                said = said.encode() if text else json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Type", "text/plain" if text else "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_DELETE = do_PATCH = answer

        self.server = serving(Handler)
        self.address = self.server.__enter__()
        return self

    def __exit__(self, *error):
        self.server.__exit__(*error)

    def kubeconfig(self, folder):
        """Write the file with which kubectl finds this server, and return its path."""
        return write_kubeconfig(folder, self.address)

    def names(self, plural):
        """Return the names of the objects of a kind."""
        return [path.rsplit("/", 1)[1] for path in self.objects if f"/{plural}/" in path]

    def pods(self):
        """Return the pods, which are there as long as their jobs."""
        return [pod for path, job in self.objects.items() for pod in listed_pods(job, self.state(path))]

    def answer(self, verb, path, query, body):
        """Return (code, JSON object or text) for a request."""
        if path in ("/api", "/apis", *ROOTS):
            return 200, discovery(path)
        if path == "/openapi/v3":
            return 200, {"paths": {at[1:]: {"serverRelativeURL": f"{path}{at}"} for at in ROOTS}}
        if path.startswith("/openapi/v3/"):
            return 200, OPENAPI
        if path == "/version":
            return 200, {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        found = PATH.fullmatch(path)
        plural, name, part = found.groups() if found else ("", "", "")
        if verb != "GET":
            self.changes.append(f"{verb} {plural}")
        if plural not in KINDS:
            return 404, status(404, "NotFound", f"the stand-in has no {path}")
        if verb == "POST":
            return self.create(f"{path}/{body['metadata']['name']}", plural, body)
        if not name:
            return 200, self.list(path, plural, query)
        pods = {pod["metadata"]["name"]: pod for pod in self.pods()} if plural == "pods" else {}
        if path not in self.objects and name not in pods:
            return 404, status(404, "NotFound", f'{plural} "{name}" not found')
        if part == "log":
            lines = self.log.splitlines(keepends=True)
            return 200, "".join(lines[-int(query.get("tailLines", "0")[0]) :])
        if verb == "DELETE":
            del self.objects[path]
            return 200, status(200, "", "deleted", "Success")
        return 200, pods.get(name) or self.objects[path] | self.status(path)

    def create(self, path, plural, body):
        name = body["metadata"]["name"]
        if plural in self.refused:
            return 403, status(403, "Forbidden", f"{plural} is forbidden")
        if path in self.objects:
            return 409, status(409, "AlreadyExists", f'{plural} "{name}" already exists')
        self.created.append(copy.deepcopy(body))
        body["metadata"] |= {"namespace": "default", "uid": "1-2-3", "creationTimestamp": TIME}
        self.objects[path] = body
        return 201, body

    def state(self, path):
        """Return what is true of a job since it was last asked for: its last word is the state it is in."""
        return self.states[min(max(self.queries[path], 1), len(self.states)) - 1]

    def status(self, path):
        """Return an object's status: a job is one state further each time, as an operator takes it."""
        kind = self.objects[path]["kind"]
        if kind not in ("PyTorchJob", "TrainJob"):
            return {}
        self.queries[path] += 1
        words = self.state(path).split()
        if kind == "TrainJob":
            words = [ENDS[word] for word in words if word in ENDS]
        more = {"reason": "StandIn", "message": "", "lastTransitionTime": TIME}
        conditions = [more | {"type": word.strip("-"), "status": str(word[0] != "-")} for word in words]
        return {"status": {"conditions": conditions}} if conditions else {}

    def list(self, path, plural, query):
        """Return the objects of a kind, if need be as the table that `kubectl get` prints of pods."""
        version, kind = KINDS[plural]
        if plural == "events":
            self.queries[path] += 1
            events = [event("earlier", "Old", "of an earlier job")]
            events += [event("1-2-3", *warning) for warning in self.warnings.items()][: self.queries[path]]
            items = [each for each in events if has_fields(each, *query.get("fieldSelector", []))]
            return {"kind": "EventList", "apiVersion": "v1", "metadata": {}, "items": items}
        items = [item for at, item in self.objects.items() if at.startswith(f"{path}/")]
        (selector,) = query.get("labelSelector", [""])
        items = [item for item in items + self.pods() * (plural == "pods") if selects(selector, item)]
        if plural == "pods" and query["table"]:
            return table(items)
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items}


def event(uid, reason, message):
    """Return an event about the job with an ID."""
    about = {"kind": "PyTorchJob", "name": "pytorchjob-mnist", "namespace": "default", "uid": uid}
    metadata = {"name": reason.lower(), "namespace": "default", "creationTimestamp": TIME}
    said = {"type": "Warning", "reason": reason, "message": message}
    return {"metadata": metadata, "involvedObject": about} | said


def has_fields(item, selector=""):
    """Return whether an object has the values of a selector such as "type=Warning,involvedObject.uid=1"."""
    for path, value in re.findall(r"([^,=]+)=([^,]*)", selector):
        found = item
        for step in path.split("."):
            found = found.get(step, {})
        if found != value:
            return False
    return True


def selects(selector, item):
    """Return whether a selector such as "a=b,c in (d, e)" selects an object."""
    labels = item["metadata"].get("labels", {})
    for key, value, values in re.findall(r"([^\s,=]+)(?:=([^,]*)| in \(([^)]*)\))", selector):
        if labels.get(key) not in (values.split(", ") if values else [value]):
            return False
    return True


def listed_pods(job, state):
    """Return the pods of a job in a state; one that has failed takes them, and their logs, along."""
    name = job["metadata"]["name"]
    if state.endswith("Failed"):
        return []
    if job["kind"] == "PyTorchJob":
        labels = {"training.kubeflow.org/job-name": name}
        return [pod(each.name, "pytorch", "Running", labels) for each in pods_of(job)]
    if job["kind"] == "TrainJob":
        phase = state.split()[-1].replace("Created", "Pending")
        labels = {"jobset.sigs.k8s.io/jobset-name": name, "jobset.sigs.k8s.io/replicatedjob-name": "node"}
        index = "batch.kubernetes.io/job-completion-index"
        return [
            pod(f"{name}-node-0-{i}-x7k2p", "node", phase, labels | {index: str(i)})
            for i in range(job["spec"]["trainer"]["numNodes"])
        ]
    return []


def pod(name, container, phase, labels):
    metadata = {"name": name, "namespace": "default", "labels": labels}
    spec = {"containers": [{"name": container, "image": "stand-in"}]}
    return {"kind": "Pod", "apiVersion": "v1", "metadata": metadata, "spec": spec, "status": {"phase": phase}}


def table(pods):
    """Return pods as the table that kubectl prints."""
    columns = [{"name": name, "type": "string"} for name in ("Name", "Ready", "Status", "Restarts", "Age")]
    cells = [[pod["metadata"]["name"], "1/1", pod["status"]["phase"], "0", "34s"] for pod in pods]
    rows = [{"cells": each, "object": pod} for each, pod in zip(cells, pods, strict=True)]
    return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "columnDefinitions": columns, "rows": rows}


def status(code, reason, message, verdict="Failure"):
    said = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": verdict}
    return said | {"code": code, "reason": reason, "message": message}


def discovery(path):
    """Return which groups there are, or which kinds a version of one has."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        groups = [
            {"name": version.split("/")[0], "versions": [offer], "preferredVersion": offer}
            for version in ROOTS.values()
            if "/" in version
            for offer in [{"groupVersion": version, "version": version.split("/")[1]}]
        ]
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
    verbs = ["create", "delete", "get", "list", "patch"]
    resources = [
        {"name": plural, "kind": kind, "verbs": verbs, "namespaced": not plural.startswith("cluster")}
        for plural, (version, kind) in KINDS.items()
        if version == ROOTS[path]
    ]
    return {"kind": "APIResourceList", "groupVersion": ROOTS[path], "resources": resources}


def write_kubeconfig(folder, address):
    """Write a file with which kubectl looks for its server at `address`, and return its path."""
    cluster = {"name": "c", "cluster": {"server": address}}
    context = {"name": "c", "context": {"cluster": "c", "user": ""}}
    path = folder / "kubeconfig"
    path.write_text(json.dumps({"clusters": [cluster], "contexts": [context], "current-context": "c"}))
    return path
