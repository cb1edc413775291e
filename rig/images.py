"""A registry on loopback, and images in it that no engine has made."""

import gzip
import hashlib
import io
import json
import os
import re
import runpy
import socket
import sys
import tarfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from threading import Thread
from unittest.mock import patch

import requests

from rig.processes import Process, clean_environment, free_port, need
from rig.project import ROOT

APPEND = ROOT / "docker" / "append.py"
MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"


@contextmanager
def running_registry(folder, images=None, tls=None, **auth):
    """Start Debian's registry on loopback, and yield its address. `images`: where it keeps them.

    `tls` is a file with a certificate and its key.
    """
    need("docker-registry", "docker-registry")
    folder.mkdir(parents=True)
    address = f"127.0.0.1:{free_port()}"
    storage = {"filesystem": {"rootdirectory": str(images or folder / "images")}}
    http = {"addr": address} | ({"tls": {"certificate": str(tls), "key": str(tls)}} if tls else {})
    settings = {"version": 0.1, "storage": storage, "http": http, "auth": auth}
    (folder / "config.yml").write_text(json.dumps(settings))  # which is YAML, too
    process = Process(["docker-registry", "serve", folder / "config.yml"], folder / "log")
    try:
        assert process.until("listening on"), process.output
        yield address
    finally:
        process.kill_all()


def append(folder, base, image, *more, **environment):
    """Run docker/append.py in `folder`, in this process. Returns (exit code, all that it printed)."""
    arguments = [str(word) for word in (APPEND, "--base", base, "--image", image, *more)]
    said, here = io.StringIO(), os.getcwd()
    with (
        redirect_stdout(said),
        redirect_stderr(said),
        patch.dict(os.environ, clean_environment(**environment), clear=True),
        patch.object(sys, "argv", arguments),
        patch.object(sys, "path", [str(APPEND.parent), *sys.path]),
    ):
        os.chdir(folder)
        try:
            runpy.run_path(str(APPEND), run_name="__main__")
            return 0, said.getvalue()
        except SystemExit as end:
            if isinstance(end.code, int):
                return end.code, said.getvalue()
            return 1, f"{said.getvalue()}{end}\n"
        finally:
            os.chdir(here)


def pushed(folder, base, image, *more, **environment):
    """Run docker/append.py where it must succeed, and return the digest of what it has pushed."""
    code, output = append(folder, base, image, *more, **environment)
    assert code == 0 and re.fullmatch(rf"{re.escape(image)}@sha256:\w{{64}}\n", output), output
    return output.partition("@")[2].strip()


def sentence(folder, base, image, *more, **environment):
    """Run docker/append.py where it must fail, and return the only line that it prints."""
    code, output = append(folder, base, image, *more, **environment)
    assert code == 1 and output.startswith("append.py: ") and output.count("\n") == 1, output
    return output


def layer(**entries):
    """Return a layer, gzipped: {name: contents, the target of a link as text, or None for a folder}."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name, contents in entries.items():
            entry = tarfile.TarInfo(name)
            entry.type = tarfile.DIRTYPE if contents is None else tarfile.REGTYPE
            if isinstance(contents, str):
                entry.type, entry.linkname, contents = tarfile.SYMTYPE, contents, None
            entry.size = len(contents or b"")
            tar.addfile(entry, io.BytesIO(contents or b""))
    return gzip.compress(archive.getvalue(), mtime=0)


def digest_of(contents):
    return f"sha256:{hashlib.sha256(contents).hexdigest()}"


def upload(url, contents):
    """Upload a blob below the address of a repository, and return its descriptor."""
    place = requests.post(f"{url}/blobs/uploads/").headers["Location"]
    requests.put(place, params={"digest": digest_of(contents)}, data=contents).raise_for_status()
    return {"digest": digest_of(contents), "size": len(contents)}


def put_manifest(url, tag, kind, manifest):
    """Upload a manifest below the address of a repository, and return what an index says of it."""
    body = json.dumps(manifest).encode()
    answer = requests.put(f"{url}/manifests/{tag}", data=body, headers={"Content-Type": kind})
    answer.raise_for_status()
    return {"mediaType": kind, "size": len(body), "digest": digest_of(body)}


def push_image(address, name, layers, architecture="amd64", **settings):
    """Push an image with these layers and settings, and return its full name."""
    path, tag = name.split(":")
    url = f"http://{address}/v2/{path}"
    diffs = [digest_of(gzip.decompress(each)) for each in layers]
    config = {"os": "linux", "architecture": architecture, "config": settings or None}
    config["rootfs"] = {"type": "layers", "diff_ids": diffs}
    kind = "application/vnd.docker.container.image.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST}
    manifest["config"] = {"mediaType": kind} | upload(url, json.dumps(config).encode())
    manifest["layers"] = [{"mediaType": LAYER} | upload(url, each) for each in layers]
    put_manifest(url, tag, MANIFEST, manifest)
    return f"{address}/{name}"


def pulled(image):
    """Return the configuration of an image that append.py has pushed, and the files of its last layer."""
    address, _, name = image.partition("/")
    path, _, tag = name.rpartition(":")
    url = f"http://{address}/v2/{path}"
    accept = {"Accept": "application/vnd.oci.image.manifest.v1+json"}
    manifest = requests.get(f"{url}/manifests/{tag}", headers=accept).json()
    config = requests.get(f"{url}/blobs/{manifest['config']['digest']}").json()
    last = requests.get(f"{url}/blobs/{manifest['layers'][-1]['digest']}").content
    assert digest_of(last) == config["rootfs"]["diff_ids"][-1]
    with tarfile.open(fileobj=io.BytesIO(last)) as tar:
        files = {entry.name: entry.isfile() and tar.extractfile(entry).read() for entry in tar}
    return config, files


@contextmanager
def line_to(address, per_second=None, at_most=None, busy=None):
    """Yield the address of a line to a server: a slow one, or one that stops after so many bytes.

    `busy` is an Event, which is set when 500 kB have gone through.
    """
    host, port = address.split(":")
    listener = socket.create_server(("127.0.0.1", 0))
    ends = [listener]

    def pump(source, target, slow):
        sent = 0
        try:
            while data := source.recv(16384):
                if slow and per_second:
                    time.sleep(len(data) / per_second)
                sent += len(data)
                if slow and busy and sent > 500_000:
                    busy.set()
                if slow and at_most and sent > at_most:
                    time.sleep(600)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve():
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            server = socket.create_connection((host, int(port)))
            ends.extend((client, server))
            for pair in ((client, server, True), (server, client, False)):
                Thread(target=pump, args=pair, daemon=True).start()

    Thread(target=serve, daemon=True).start()
    try:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    finally:
        for each in ends:
            each.close()
