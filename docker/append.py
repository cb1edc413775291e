"""Add a trainer to an image in a registry, and push the result, within seconds, without an engine or root.

    python docker/append.py --base registry.example.org/you/mnist:1 --image registry.example.org/you/mnist:2

An image is a list of layers, which are tar files, and a configuration that says what to start. So one more
layer and a changed configuration make a new image. The layers below it stay in the registry. The formats:
https://github.com/opencontainers/image-spec
"""

import argparse
import hashlib
import json
import os
import platform
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

try:
    from oras.oci import NewLayer
    from registry import Client, parse
except ModuleNotFoundError as error:
    sys.exit(f"append.py: {error}: try {sys.executable} -m pip install oras dumb-init")

MACHINES = {"x86_64": "amd64", "AMD64": "amd64", "aarch64": "arm64"}
PLATFORM = f"linux/{MACHINES.get(platform.machine(), platform.machine())}"
# The same as in the Dockerfile: a test compares them.
VARIABLES = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", "TRAINER": "mnist.py"}
ENTRYPOINT = ["dumb-init", "--single-child", "--", "sh", "-c", 'exec python "$TRAINER" "$@"', "sh"]
SETTINGS = {"Entrypoint": ENTRYPOINT, "Cmd": None, "User": "1000:0", "WorkingDir": "/app"}
INIT = Path(sys.executable).with_name("dumb-init")


def read(registry, image, wanted):
    """Return an image's manifest and configuration, for the wanted platform if there are several."""
    manifest = registry.get_manifest(image)
    for each in manifest.get("manifests", []):
        runs_on = each.get("platform") or {}
        if f"{runs_on.get('os')}/{runs_on.get('architecture')}" == wanted:
            image.digest = each["digest"]
            return read(registry, image, wanted)
    config = registry.get_blob(image, manifest["config"]["digest"]).json() if "config" in manifest else {}
    if f"{config.get('os')}/{config.get('architecture')}" != wanted:
        raise ValueError(f"{image} is not for {wanted}: see --platform")
    config["config"] = config.get("config") or {}
    return manifest, config


def settle(entry):
    """Give an entry of a tar file to root, and date it 1970, so the same files make the same layer."""
    entry.mode = 0o775 if entry.name == "app/output" else 0o755 if entry.mode & 0o100 else 0o644
    entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime = 0, 0, "", "", 0
    return entry


def change(config, digest):
    """Add a layer and the trainer's settings to a configuration."""
    settings = config["config"]
    variables = dict(each.partition("=")[::2] for each in settings.get("Env") or []) | VARIABLES
    settings.update(SETTINGS, Env=[f"{name}={value}" for name, value in variables.items()])
    layers = config["rootfs"]["diff_ids"]
    config["history"] = config.get("history") or [{} for _ in layers]
    config["history"].append({"created": config.get("created"), "created_by": "docker/append.py"})
    layers.append(digest)


def append(registry, base, image, wanted, files):
    """Push `image`: `base` and {name: file, folder, or None for an empty folder}. Returns its digest."""
    manifest, config = read(registry, base, wanted)
    mount = f"{registry.address}v2/{image.api_prefix}/blobs/uploads/?from={base.api_prefix}&mount="
    for layer in manifest["layers"]:  # the registry has it, but perhaps only under another name
        kind = layer["mediaType"].replace("docker.image.rootfs.diff", "oci.image.layer.v1")
        layer["mediaType"] = kind.replace("tar.", "tar+")
        there = registry.blob_exists(layer, image)
        if not there and registry.do_request(mount + layer["digest"], "POST").status_code != 201:
            raise ValueError(f"{image.registry} shares no layers: let --image be another tag of {base}")
    if "dumb-init" not in (config["config"].get("Entrypoint") or []):
        if not INIT.exists():
            raise ValueError(f"{base} has no dumb-init, nor has this Python: pip install dumb-init")
        files["usr/local/bin/dumb-init"] = INIT
    with TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/layer", "w", dereference=True) as tar:
            for name, source in files.items():
                tar.add(source or folder, name, recursive=bool(source), filter=settle)
        manifest["layers"].append(NewLayer(f"{folder}/layer", "application/vnd.oci.image.layer.v1.tar"))
        registry.upload_blob(f"{folder}/layer", image, manifest["layers"][-1])
        change(config, manifest["layers"][-1]["digest"])
        Path(folder, "config").write_text(json.dumps(config))
        manifest["config"] = NewLayer(f"{folder}/config", "application/vnd.oci.image.config.v1+json")
        registry.upload_blob(f"{folder}/config", image, manifest["config"])
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    pushed = registry.upload_manifest(manifest, image).request.body  # last, so the tag is never half an image
    return f"sha256:{hashlib.sha256(pushed).hexdigest()}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, type=parse, help="image with Python and PyTorch")
    parser.add_argument(
        "--image", required=True, type=parse, help="name of the new one, in the same registry"
    )
    parser.add_argument("--trainer", default="mnist.py", help="(default: %(default)s)")
    parser.add_argument("--data", help="folder of the digits, if the base has none")
    parser.add_argument("--platform", default=PLATFORM, help="of the base's variants (default: %(default)s)")
    args = parser.parse_args()
    if args.base.registry != args.image.registry:
        parser.error(f"{args.base} and {args.image} are not in the same registry")
    if args.image.digest:
        parser.error("--image takes a name and a tag: the digest comes out")
    files = {"app": None, "app/output": None, "app/mnist.py": args.trainer, "app/datasets": args.data}
    try:
        Path(args.trainer).read_bytes(), args.data and os.listdir(args.data)  # must be a file, and a folder
        digest = append(Client(args.image.registry), args.base, args.image, args.platform, files)
        print(f"{args.image}@{digest}")
    except (OSError, ValueError) as error:
        sys.exit(f"append.py: {error}")
