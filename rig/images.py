"""A registry on loopback, and images in it that no engine has made."""

import gzip
import hashlib
import io
import json
import socket
import subprocess
import tarfile
import time
from contextlib import contextmanager
from threading import Thread

import requests

from rig.processes import free_port, need, run
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
    command = ["docker-registry", "serve", folder / "config.yml"]
    with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            for _ in range(100):
                if "listening on" in (folder / "log").read_text():
                    break
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()


def append(folder, base, image, *more, **environment):
    """Run docker/append.py in `folder`. Returns (exit code, all that it printed)."""
    return run(folder, APPEND, "--base", base, "--image", image, *more, **environment)


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


def push_image(address, name, layers, architecture="amd64", **settings):
    """Push an image with these layers and settings, and return its full name."""
    path, tag = name.split(":")
    url = f"http://{address}/v2/{path}"
    diffs = [digest_of(gzip.decompress(each)) for each in layers]
    config = {"os": "linux", "architecture": architecture, "config": settings}
    config["rootfs"] = {"type": "layers", "diff_ids": diffs}
    kind = "application/vnd.docker.container.image.v1+json"
    manifest = {"schemaVersion": 2, "mediaType": MANIFEST}
    manifest["config"] = {"mediaType": kind} | upload(url, json.dumps(config).encode())
    manifest["layers"] = [{"mediaType": LAYER} | upload(url, each) for each in layers]
    headers = {"Content-Type": MANIFEST}
    requests.put(f"{url}/manifests/{tag}", json.dumps(manifest), headers=headers).raise_for_status()
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
