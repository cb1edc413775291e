"""Put a trainer on top of an image that a registry has, and push the result: no engine, no root, seconds."""

import argparse
import json
import os
import platform
import sys
import tarfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from oras.container import Container
from oras.oci import NewLayer
from oras.provider import Registry

PLATFORM = "linux/" + {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
# What the Dockerfile sets for its trainer: a test compares.
VARIABLES = {"HOME": "/tmp", "PYTHONUNBUFFERED": "1", "TRAINER": "mnist.py"}
ENTRYPOINT = ["dumb-init", "--single-child", "--", "sh", "-c", 'exec python "$TRAINER" "$@"', "sh"]
SETTINGS = {"Entrypoint": ENTRYPOINT, "Cmd": None, "User": "1000:0", "WorkingDir": "/app"}
# What a manifest calls a layer: docker's word, and the one of https://github.com/opencontainers/image-spec.
DOCKER_TO_OCI = ("docker.image.rootfs.diff.tar.", "oci.image.layer.v1.tar+")


class Client(Registry):
    """The registry of an image, with docker's credentials for it. Raises ValueError where it says no."""

    def __init__(self, image):
        super().__init__(insecure=image.registry.startswith(("localhost:", "127.")))  # docker's own rule
        self.session.request = partial(self.session.request, timeout=60)
        self.auth.authenticate_request = self.authenticate
        config = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
        self.auth.load_configs(image, [str(config)] if config.exists() else [])
        known = self.auth._auth_config["auths"]  # Docker Hub by its address, the others by their host
        known |= {name.split("/")[2]: password for name, password in known.items() if "://" in name}
        self.auth.load_configs(image)

    def authenticate(self, answer, headers, refresh=True):
        """Show what is asked for: the password itself, or a token that is good for this very request."""
        if answer.headers.get("Www-Authenticate", "").startswith("Basic "):
            return {**headers, "Authorization": f"Basic {getattr(self.auth, '_basic_auth', '')}"}, True
        return type(self.auth).authenticate_request(self.auth, answer, headers, refresh=True)[0], True

    def do_request(self, url, method="GET", **options):
        """Ask once; oras would go on for two minutes."""
        host, _, name = url.split("://")[1].split("?")[0].replace("/manifests/", ":").partition("/v2/")
        try:
            answer = Registry.do_request.__wrapped__(self, url, method, **options)
        except OSError as error:
            raise ValueError(f"no registry answers at {host}: {error}") from error
        if answer.status_code >= 400 and method != "HEAD":
            reason = "has no" if answer.status_code == 404 else "refuses"
            raise ValueError(f"{host} {reason} {name} ({answer.reason}); docker login {host} may help")
        return answer

    def read(self, image):
        """Return an image's manifest and configuration; of several, those for this machine's platform."""
        manifest = self.get_manifest(image)
        for each in manifest.get("manifests", []):
            if "{os}/{architecture}".format(**each["platform"]) == PLATFORM:
                image.digest = each["digest"]
                return self.read(image)
        config = self.get_blob(image, manifest["config"]["digest"]).json() if "config" in manifest else {}
        if f"{config.get('os')}/{config.get('architecture')}" != PLATFORM:
            raise ValueError(f"{image} is not for {PLATFORM}")
        return manifest, config


def settle(entry):
    """Make an entry of a tar file root's, and of 1970: the same files make the same layer."""
    mode = 0o775 if entry.name == "app/output" else 0o755 if entry.mode & 0o100 else 0o644
    return entry.replace(mode=mode, uid=0, gid=0, uname="", gname="", mtime=0, deep=False)


def append(registry, base, image, files):
    """Push `image`: `base` with {name: file, folder, or None for an empty one} on top. Returns its digest."""
    manifest, config = registry.read(base)
    mount = f"{registry.prefix}://{image.upload_blob_url()}?from={base.api_prefix}&mount="
    for layer in manifest["layers"]:  # the registry has them, but perhaps under another name only
        layer["mediaType"] = layer["mediaType"].replace(*DOCKER_TO_OCI)
        there = registry.blob_exists(layer, image)
        if not there and registry.do_request(mount + layer["digest"], "POST").status_code != 201:
            raise ValueError(f"{image.registry} shares no layers: let --image be another tag of {base}")
    settings = config["config"]
    if "dumb-init" not in (settings.get("Entrypoint") or []):
        files["usr/local/bin/dumb-init"] = Path(sys.executable).with_name("dumb-init")
    variables = dict(each.split("=", 1) for each in settings.get("Env") or []) | VARIABLES
    settings.update(SETTINGS, Env=[f"{name}={value}" for name, value in variables.items()])
    with TemporaryDirectory() as folder:
        with tarfile.open(f"{folder}/layer", "w", dereference=True) as tar:
            for name, source in files.items():
                tar.add(source or folder, name, recursive=bool(source), filter=settle)
        layer = NewLayer(f"{folder}/layer", "application/vnd.oci.image.layer.v1.tar")
        registry.upload_blob(f"{folder}/layer", image, layer)
        manifest["layers"].append(layer)
        config["rootfs"]["diff_ids"].append(layer["digest"])
        config.setdefault("history", []).append({"created": config.get("created"), "created_by": "append.py"})
        Path(folder, "config").write_text(json.dumps(config))
        manifest["config"] = NewLayer(f"{folder}/config", "application/vnd.oci.image.config.v1+json")
        registry.upload_blob(f"{folder}/config", image, manifest["config"])
    manifest["mediaType"] = "application/vnd.oci.image.manifest.v1+json"
    return registry.upload_manifest(manifest, image).headers["Docker-Content-Digest"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--base", required=True, help="image with Python and PyTorch, in the same registry")
    parser.add_argument("--image", required=True, help="name of the new image")
    parser.add_argument("--trainer", default="mnist.py", help="(default: %(default)s)")
    parser.add_argument("--data", help="folder of the digits, if the base has none")
    args = parser.parse_args()
    base, image = (Container(name, "index.docker.io") for name in (args.base, args.image))
    if base.registry != image.registry:
        parser.error(f"{base} and {image} are not in the same registry")
    files = {"app": None, "app/output": None, "app/mnist.py": args.trainer, "app/datasets": args.data}
    try:
        print(f"{args.image}@{append(Client(image), base, image, files)}")
    except (OSError, ValueError) as error:
        sys.exit(f"append.py: {error}")
