"""Add a trainer to an image in a registry, and push the result, within seconds, without an engine or root."""

import argparse
import json
import platform
import re
import sys
import tarfile
from io import BytesIO
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from registry import Client, parse

OCI, DOCKER = "application/vnd.oci.image", "application/vnd.docker.distribution.manifest"
KINDS = {"Accept": f"{OCI}.index.v1+json, {OCI}.manifest.v1+json, {DOCKER}.list.v2+json, {DOCKER}.v2+json"}
PLATFORM = ("os", "architecture", "variant")
SAME = {"x86_64": "amd64", "aarch64": "arm64", "/v8": "", "armv7l": "arm/v7", "arm": "arm/v7"}
ENTRYPOINT = ["dumb-init", "--single-child", "--", "sh", "-c", 'exec python "$TRAINER" "$@"', "sh"]
SETTINGS = {"Entrypoint": ENTRYPOINT, "Cmd": None, "User": "1000:0", "WorkingDir": "/app"}
SETTINGS |= {"StopSignal": "SIGTERM", "Healthcheck": {"Test": ["NONE"]}}  # all as in the Dockerfile
INIT = Path(sys.executable).with_name("dumb-init")
PUBLIC = r"app/datasets(/README.md|/MNIST(/raw(/SHA256SUMS|/(train|t10k)-\w+-idx[13]-ubyte(.gz)?)?)?)?"


def runs_on(found):
    """Return a platform's name as docker has it: linux/arm64 for linux/aarch64 and for linux/arm64/v8."""
    name = "/".join(found[key] for key in PLATFORM if found.get(key)).lower()
    return re.sub("x86_64|aarch64|/v8|armv7l|arm$", lambda match: SAME[match[0]], name)


def share(registry, base, image, layers):
    """Let the image have the base's layers, too. Returns the symbolic links in all that are small."""
    links = {}
    for layer in layers:
        kind, digest = layer["mediaType"], layer["digest"]
        layer["mediaType"] = kind.replace("docker.image.rootfs.diff.tar.", "oci.image.layer.v1.tar+")
        mount = f"{image.path}/blobs/uploads/?mount={digest}&from={base.path}"
        blob = f"{image.path}/blobs/{digest}"
        if not registry.ask("HEAD", blob).ok and registry.ask("POST", mount).status_code != 201:
            raise ValueError(f"{base.host} has no layer {digest} for {image.text}: push {base.text} again")
        if layer["size"] < 1_000_000 and not kind.endswith("zstd"):
            with tarfile.open(fileobj=BytesIO(registry.ask("GET", blob).content)) as tar:
                links |= {entry.name.strip("./"): entry.issym() for entry in tar}
    return {name for name, is_link in links.items() if is_link}


def settle(entry):
    """Give an entry of a layer to root, and date it 1970. Of data, only the public files may be in it."""
    entry.mode = 0o775 if entry.name == "app/output" else 0o755 if entry.mode & 0o100 else 0o644
    entry.uid, entry.gid, entry.uname, entry.gname, entry.mtime = 0, 0, "", "", 0
    return entry if re.fullmatch(PUBLIC, entry.name) or not entry.name.startswith("app/datasets") else None


def append(registry, base, image, wanted, trainer, data):
    """Push `image`: the base with a trainer in place of its own, and with data. Returns its digest."""
    manifest = registry.ask("GET", f"{base.path}/manifests/{base.reference}", headers=KINDS).json()
    for each in manifest.get("manifests", []):
        if runs_on(each.get("platform") or {}) == wanted:
            manifest = registry.ask("GET", f"{base.path}/manifests/{each['digest']}", headers=KINDS).json()
    blob = manifest.get("config") and f"{base.path}/blobs/{manifest['config']['digest']}"
    config = registry.ask("GET", blob).json() if blob else {}
    if runs_on(config) != wanted:
        raise ValueError(f"{base.text} is not for {wanted}: see --platform")
    settings, layers = config.get("config") or {}, manifest["layers"]
    variables = dict(each.partition("=")[::2] for each in ["TRAINER=mnist.py", *(settings.get("Env") or [])])
    variables |= {"HOME": "/tmp", "PYTHONUNBUFFERED": "1"}
    path = PurePosixPath("/app", variables["TRAINER"]).relative_to("/")
    files = dict.fromkeys([*map(str, path.parents[-2::-1]), "app/output"])
    for folder in share(registry, base, image, layers) & files.keys():
        raise ValueError(f"/{folder} is a symbolic link in {base.text}: a layer would hide what is behind it")
    files |= {str(path): trainer or variables["TRAINER"]} | ({"app/datasets": data} if data else {})
    Path(files[str(path)]).read_bytes(), data and list(Path(data).iterdir())  # must be a file, and a folder
    if "dumb-init" not in (settings.get("Entrypoint") or []):
        if not INIT.exists() or wanted != runs_on({"os": "linux", "architecture": platform.machine()}):
            raise ValueError(f"{base.text} has no dumb-init, and there is none for {wanted} here")
        files["usr/local/bin/dumb-init"] = INIT
    with TemporaryDirectory() as folder, open(f"{folder}/layer", "w+b") as file:
        with tarfile.open(fileobj=file, mode="w", dereference=True) as tar:
            for name, source in files.items():
                tar.add(source or folder, name, recursive=name == "app/datasets", filter=settle)
        file.seek(0)
        layers.append(registry.push(image, file, f"{OCI}.layer.v1.tar"))
    config["history"] = (config.get("history") or [{}] * (len(layers) - 1)) + [{"created_by": "append.py"}]
    config["rootfs"]["diff_ids"].append(layers[-1]["digest"])
    config["config"] = settings | SETTINGS | {"Env": [f"{key}={value}" for key, value in variables.items()]}
    manifest["config"] = registry.push(image, BytesIO(json.dumps(config).encode()), f"{OCI}.config.v1+json")
    manifest["mediaType"] = f"{OCI}.manifest.v1+json"  # last, so the tag is never half an image
    return registry.push(image, BytesIO(json.dumps(manifest).encode()), manifest["mediaType"])["digest"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="image with Python and PyTorch")
    parser.add_argument("--image", required=True, help="name of the new one, in the same registry")
    parser.add_argument("--trainer", help="(default: the file that the base's TRAINER names, or mnist.py)")
    parser.add_argument("--data", help="folder of the digits, if the base has none")
    parser.add_argument("--platform", default=f"linux/{platform.machine()}", help="of the base's variants")
    parser.add_argument("--tls-verify", choices=["true", "false"], help="false: any certificate, or http")
    args = parser.parse_args()
    try:
        base, image = parse(args.base), parse(args.image)
        if base.host != image.host:
            parser.error(f"{base.text} and {image.text} are not in the same registry")
        registry = Client(base.host, args.tls_verify != "false")
        wanted = runs_on(dict(zip(PLATFORM, args.platform.split("/"), strict=False)))
        print(f"{args.image}@{append(registry, base, image, wanted, args.trainer, args.data)}")
    except (AttributeError, LookupError, TypeError, json.JSONDecodeError, tarfile.TarError) as error:
        sys.exit(f"append.py: {base.host} answers as a proxy or a login page does, not a registry: {error!r}")
    except (OSError, ValueError, KeyboardInterrupt) as error:
        sys.exit(f"append.py: {str(error) or 'interrupted, and nothing is pushed under this name'}")
