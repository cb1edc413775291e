"""A stand-in for a cluster: an API server with as much as the real kubectl asks for when it runs the job.

    with ApiServer() as cluster:
        subprocess.run(["kubectl", …], env=os.environ | {"KUBECONFIG": cluster.kubeconfig(folder)})

It keeps what is created, and plays an operator that takes each PyTorchJob to its end. It checks nothing:
tests/test_manifests.py does.
"""

import copy
import json
import re
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import parse_qs, urlsplit

LABEL = "training.kubeflow.org/job-name"
KINDS = {  # by their plural
    "persistentvolumeclaims": ("/api/v1", "", "PersistentVolumeClaim"),
    "pods": ("/api/v1", "", "Pod"),
    "events": ("/api/v1", "", "Event"),
    "pytorchjobs": ("/apis/kubeflow.org/v1", "kubeflow.org", "PyTorchJob"),
}
ROOTS = {root for root, _, _ in KINDS.values()}
# How kubectl learns that the server checks the fields itself, so that it need not do so.
OPENAPI = {
    "openapi": "3.0.0",
    "info": {"title": "stand-in", "version": "1"},
    "paths": {
        f"{root}/{plural}": {
            "patch": {
                "parameters": [{"name": "fieldValidation", "in": "query"}],
                "x-kubernetes-group-version-kind": {"group": group, "version": "v1", "kind": kind},
            }
        }
        for plural, (root, group, kind) in [*KINDS.items(), ("namespaces", ("/api/v1", "", "Namespace"))]
    },
}
STATES = {  # what is true of a job, and what no longer is, one query after the other: `describe` makes two
    "Succeeded": ("Created", "Created", *["Created Running"] * 2, "Created -Running Succeeded"),
    "Failed": ("Created", "Created", "Created Running", "Created -Running Failed"),
}


class ApiServer:
    """The server. `end` is what becomes of a job; `refused` is what may not be created, by its plural."""

    def __init__(self, end="Succeeded", log="", refused=()):
        self.states, self.log, self.refused = STATES[end], log, refused
        self.objects = {}  # by their path
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
                code, said = cluster.answer(self.command, url.path, parse_qs(url.query), body)
                text = isinstance(said, str)
                said = said.encode() if text else json.dumps(said).encode()
                self.send_response(code)
                self.send_header("Content-Type", "text/plain" if text else "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            do_GET = do_POST = do_DELETE = do_PATCH = answer

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def kubeconfig(self, folder):
        """Write the file with which kubectl finds this server, and return its path."""
        address = f"http://127.0.0.1:{self.server.server_port}"
        return write_kubeconfig(folder, address)

    def names(self, plural):
        """Return the names of the objects of a kind."""
        return [path.rsplit("/", 1)[1] for path in self.objects if f"/{plural}/" in path]

    def pods(self):
        """Return the names of the pods, which are there as long as their jobs."""
        roles = ("master-0", "worker-0", "worker-1")
        return [f"{job}-{role}" for job in self.names("pytorchjobs") for role in roles]

    def answer(self, verb, path, query, body):
        """Return (code, JSON object or text) for a request."""
        if path in ("/api", "/apis", *ROOTS):
            return 200, discovery(path)
        if path == "/openapi/v3":
            return 200, {"paths": {root[1:]: {"serverRelativeURL": f"{path}{root}"} for root in ROOTS}}
        if path.startswith("/openapi/v3/"):
            return 200, OPENAPI
        if path == "/version":
            return 200, {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        plural, *rest = path.split("/namespaces/default/", 1)[-1].split("/")
        if verb != "GET":
            self.changes.append(f"{verb} {plural}")
        if plural not in KINDS:
            return 404, status(404, "NotFound", f"the stand-in has no {path}")
        if rest[1:] == ["log"]:
            return 200, self.log
        if verb == "POST":
            return self.create(f"{path}/{body['metadata']['name']}", plural, body)
        if not rest:
            return 200, self.list(path, plural, query)
        if plural == "pods" and rest[0] in self.pods():
            return 200, pod(rest[0])
        if path not in self.objects:
            return 404, status(404, "NotFound", f'{plural} "{rest[0]}" not found')
        if verb == "DELETE":
            del self.objects[path]
            return 200, status(200, "", "deleted", "Success")
        return 200, self.objects[path] | self.status(path)

    def create(self, path, plural, body):
        name = body["metadata"]["name"]
        if plural in self.refused:
            return 403, status(403, "Forbidden", f"{plural} is forbidden")
        if path in self.objects:
            return 409, status(409, "AlreadyExists", f'{plural} "{name}" already exists')
        self.created.append(copy.deepcopy(body))
        body["metadata"] |= {
            "namespace": "default",
            "uid": "1-2-3",
            "creationTimestamp": "2026-11-24T08:00:00Z",
        }
        self.objects[path] = body
        return 201, body

    def status(self, path):
        """Return an object's status: a job is one state further each time, as an operator takes it."""
        if "/pytorchjobs/" not in path:
            return {}
        words = self.states[min(self.queries[path], len(self.states) - 1)].split()
        self.queries[path] += 1
        conditions = [{"type": word.strip("-"), "status": str(word[0] != "-")} for word in words]
        return {"status": {"conditions": conditions}}

    def list(self, path, plural, query):
        """Return what `kubectl get` lists: pods as the table that it prints, the rest as they are."""
        if plural != "pods":
            items = [item for at, item in self.objects.items() if at.startswith(f"{path}/")]
            return {"kind": f"{KINDS[plural][2]}List", "apiVersion": "v1", "metadata": {}, "items": items}
        wanted = dict(part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part)
        names = [name for name in self.pods() if wanted in ({}, {LABEL: re.sub(r"-\w+-\d+$", "", name)})]
        columns = [
            {"name": name, "type": "string"} for name in ("Name", "Ready", "Status", "Restarts", "Age")
        ]
        rows = [{"cells": [name, "1/1", "Running", "0", "34s"], "object": pod(name)} for name in names]
        return {"kind": "Table", "apiVersion": "meta.k8s.io/v1", "columnDefinitions": columns, "rows": rows}


def pod(name):
    spec = {"containers": [{"name": "pytorch", "image": "stand-in"}]}
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": {"name": name, "namespace": "default"},
        "spec": spec,
    }


def status(code, reason, message, verdict="Failure"):
    said = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": verdict}
    return said | {"code": code, "reason": reason, "message": message}


def discovery(path):
    """Return which groups there are, or which kinds a version of one has."""
    if path == "/api":
        return {"kind": "APIVersions", "versions": ["v1"]}
    if path == "/apis":
        version = {"groupVersion": "kubeflow.org/v1", "version": "v1"}
        group = {"name": "kubeflow.org", "versions": [version], "preferredVersion": version}
        return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [group]}
    resources = [
        {
            "name": plural,
            "singularName": kind.lower(),
            "namespaced": True,
            "kind": kind,
            "verbs": ["create", "delete", "get", "list", "patch"],
        }
        for plural, (root, _, kind) in KINDS.items()
        if root == path
    ]
    group_version = path.split("/", 2)[2]
    return {"kind": "APIResourceList", "groupVersion": group_version, "resources": resources}


def write_kubeconfig(folder, address):
    """Write a file with which kubectl looks for its server at `address`, and return its path."""
    cluster = {"name": "c", "cluster": {"server": address}}
    context = {"name": "c", "context": {"cluster": "c", "user": ""}}
    path = folder / "kubeconfig"
    path.write_text(json.dumps({"clusters": [cluster], "contexts": [context], "current-context": "c"}))
    return path
