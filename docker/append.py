"""Add a trainer to an image in a registry, and push the result, within seconds, without an engine or root.

An image is a list of layers, which are tar files, and a configuration that says what to start. So one more
layer and a changed configuration make a new image: https://github.com/opencontainers/image-spec
"""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath
from posixpath import normpath
from tempfile import TemporaryDirectory

from registry import Client, parse

OCI, DOCKER = "application/vnd.oci.image", "application/vnd.docker.distribution.manifest"
KINDS = f"{OCI}.manifest.v1+json, {OCI}.index.v1+json, {DOCKER}.v2+json, {DOCKER}.list.v2+json"
SAME = [("x86_64", "amd64"), ("aarch64", "arm64"), ("arm64/v8", "arm64"), ("armv7l|arm$", "arm/v7")]
# The same as in the Dockerfile: a test compares them.
ENTRYPOINT = ["dumb-init", "--single-child", "--", "sh", "-c", 'exec python "$TRAINER" "$@"', "sh"]
SETTINGS = {"Entrypoint": ENTRYPOINT, "Cmd": None, "User": "1000:0", "WorkingDir": "/app"}
SETTINGS |= {"StopSignal": "SIGTERM", "Healthcheck": {"Test": ["NONE"]}}
VARIABLES = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1"}
INIT = Path(sys.executable).with_name("dumb-init")
# Only MNIST's own files, because an image shows everybody what is in it.
DATA = r"app/datasets(/README.md|/MNIST(/raw(/SHA256SUMS|/(train|t10k)-\w+-idx[13]-ubyte(.gz)?)?)?)?"


def runs_on(system, machine, variant=""):
    """Return a platform's name as docker has it: linux/arm64, however it is written."""
    name = f"{system}/{machine}/{variant or ''}".lower().strip("/")
    for other, ours in SAME:
        name = re.sub(other, ours, name)
    return name


HERE = runs_on("linux", platform.machine())


def read(registry, image, reference, wanted):
    """Return an image's manifest and configuration, for the wanted platform if there are several."""
    manifest = registry.read("GET", f"{image.path}/manifests/{reference}", headers={"Accept": KINDS})
    config, entries = manifest.get("config"), manifest.get("manifests", [])
    config = registry.read("GET", f"{image.path}/blobs/{config['digest']}") if config else {}
    for found in [config, *({**(each.get("platform") or {}), **each} for each in entries)]:
        if runs_on(found.get("os"), found.get("architecture"), found.get("variant")) == wanted:
            return read(registry, image, found["digest"], wanted) if "digest" in found else (manifest, config)
    raise ValueError(f"{image.text} is not for {wanted}: see --platform")


def refuse_links(registry, base, layers, folders):
    """Raise ValueError if a folder is a link in the base: a layer would hide what is behind it."""
    entries = {}
    for layer in layers:  # a layer that makes a link is small
        if layer["size"] < 1_000_000 and not layer["mediaType"].endswith("zstd"):
            content = registry.send("GET", f"{base.path}/blobs/{layer['digest']}").content
            with tarfile.open(fileobj=BytesIO(content)) as tar:
                entries |= {normpath(f"/{entry.name}")[1:]: entry.issym() for entry in tar}
    for folder in filter(entries.get, folders):
        raise ValueError(f"/{folder} is a symbolic link in {base.text}, and must be a folder")


def share(registry, base, image, layers):
    """Let the image have the layers of the base, which the registry may know as the base's alone."""
    for layer in layers:
        kind, digest = layer["mediaType"], layer["digest"]
        layer["mediaType"] = kind.replace("docker.image.rootfs.diff.tar.", "oci.image.layer.v1.tar+")
        mount = f"{image.path}/blobs/uploads/?mount={digest}&from={base.path}"
        there = registry.send("HEAD", f"{image.path}/blobs/{digest}").ok
        if not there and registry.send("POST", mount).status_code != 201:
            hint = "push it again, or let --image be another tag of it"
            raise ValueError(f"{base.host} has no layer {digest} of {base.text} to share: {hint}")


def settle(entry):
    """Give an entry of a tar file to root, and date it 1970, so the same files make the same layer."""
    entry.mode = 0o775 if entry.name == "app/output" else 0o755 if entry.mode & 0o100 else 0o644
    entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime = 0, 0, "", "", 0
    return entry if re.fullmatch(DATA, entry.name) or not entry.name.startswith("app/datasets") else None


def append(registry, base, image, wanted, trainer, data):
    """Push `image`: the base with a trainer in place of its own, and with data. Returns its digest."""
    manifest, config = read(registry, base, base.reference, wanted)
    settings, layers = config.get("config") or {}, manifest["layers"]
    variables = dict(each.partition("=")[::2] for each in settings.get("Env") or [])
    variables = {"TRAINER": "mnist.py"} | variables | VARIABLES
    path = PurePosixPath(normpath(f"/app/{variables['TRAINER']}")[1:])
    files = dict.fromkeys([*map(str, path.parents[-2::-1]), "app/output"])
    refuse_links(registry, base, layers, files)
    files |= {str(path): trainer or variables["TRAINER"]} | ({"app/datasets": data} if data else {})
    Path(files[str(path)]).read_bytes(), data and os.listdir(data)  # must be a file, and a folder
    if "dumb-init" not in (settings.get("Entrypoint") or []):
        if wanted != HERE or not INIT.exists():
            raise ValueError(f"{base.text} has no dumb-init, and there is none for {wanted} here")
        files["usr/local/bin/dumb-init"] = INIT
    share(registry, base, image, layers)
    with TemporaryDirectory() as folder, open(f"{folder}/layer", "w+b") as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            for name, source in files.items():
                tar.add(source or folder, name, recursive=name == "app/datasets", filter=settle)
        file.seek(0)
        layers.append(registry.push(image, file, f"{OCI}.layer.v1.tar"))
    config["history"] = config.get("history") or [{} for _ in layers[1:]]
    config["history"].append({"created": config.get("created"), "created_by": "docker/append.py"})
    config["rootfs"]["diff_ids"].append(layers[-1]["digest"])
    config["config"] = settings | SETTINGS | {"Env": [f"{key}={value}" for key, value in variables.items()]}
    manifest["config"] = registry.push(image, BytesIO(json.dumps(config).encode()), f"{OCI}.config.v1+json")
    manifest["mediaType"] = kind = f"{OCI}.manifest.v1+json"
    body = json.dumps(manifest).encode()  # last, so the tag is never half an image
    registry.send("PUT", f"{image.path}/manifests/{image.reference}", body, headers={"Content-Type": kind})
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, type=parse, help="image with Python and PyTorch")
    parser.add_argument("--image", required=True, type=parse, help="name of the new one, in its registry")
    parser.add_argument("--trainer", help="(default: the file that the base's TRAINER names, or mnist.py)")
    parser.add_argument("--data", help="folder of the digits, if the base has none")
    parser.add_argument("--platform", default=HERE, help="of the base's variants (default: %(default)s)")
    parser.add_argument("--tls-verify", choices=["true", "false"], help="false: any certificate, or http")
    args = parser.parse_args()
    if args.base.host != args.image.host:
        parser.error(f"{args.base.text} and {args.image.text} are not in the same registry")
    try:
        registry = Client(args.base.host, args.tls_verify != "false")
        wanted = runs_on(*args.platform.split("/"))
        print(f"{args.image.text}@{append(registry, args.base, args.image, wanted, args.trainer, args.data)}")
    except KeyboardInterrupt:
        sys.exit(f"append.py: interrupted: {args.image.text} is as it was")
    except (OSError, ValueError, tarfile.TarError) as error:
        sys.exit(f"append.py: {error}")
