"""A new image without an engine: docker/append.py and the notebook's cells, with a real registry."""

import base64
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from rig.api_server import ApiServer
from rig.engine import BASE_IMAGE, with_packages
from rig.guide import run_chapter, with_more
from rig.images import MANIFEST, append, running_registry, upload
from rig.processes import free_port, need, serving
from rig.project import ROOT, make_small_project
from rig.tutorial import ON_A_SLICE, PARTS, WITHOUT_TRAINING, submit_in

# One line of the log, changed.
BEFORE, CHANGED = "Test accuracy: ", "Accuracy in the test: "


def stored(folder):
    """Return how many bytes a registry has stored."""
    return sum(path.stat().st_size for path in folder.rglob("data") if path.is_file())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("registry") / "registry"


@pytest.fixture(scope="module")
def registry(folder):
    with running_registry(folder) as address:
        yield address


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project, with few digits, and with a list of packages in which there are none."""
    folder = make_small_project(tmp_path_factory.mktemp("project") / "project")
    for path in ("Dockerfile", ".dockerignore", "LICENSE", "requirements.txt", "docker"):
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, folder / path)
    (folder / "requirements-none.in").write_text("")
    return folder


@pytest.fixture(scope="module")
def base(engine, registry, project):
    """The trainer's image in the registry, built without PyTorch: it is mounted when the image is run."""
    name = f"{registry}/you/mnist:1"
    engine.build(name, "--build-arg=REQUIREMENTS=requirements-none.in", context=project)
    engine.must("push", name)
    return name


@pytest.fixture(scope="module")
def bare(engine, registry):
    """An image in the registry with Python and nothing else."""
    name = f"{registry}/python:bare"
    engine.must("tag", BASE_IMAGE, name)
    engine.must("push", name)
    return name


@pytest.fixture
def changed(tmp_path):
    """A folder with another trainer, which starts at once."""
    (tmp_path / "mnist.py").write_text(f"print({CHANGED!r})")
    return tmp_path


def pushed(folder, base, image, *more, **environment):
    """The same, for one that succeeds. Returns the image's digest."""
    code, output = append(folder, base, image, *more, **environment)
    assert code == 0, output
    assert re.fullmatch(rf"{image}@sha256:\w{{64}}\n", output)
    return output.split("@")[1].strip()


def log_of(engine, image, *arguments):
    """Pull an image, run it with this environment's PyTorch, and return its log."""
    engine("image", "rm", image)
    engine.must("pull", image)
    options = ("--rm", "--network=none", "--cap-drop=ALL", *with_packages(engine))
    return engine.must("run", *options, image, *arguments)


def look(engine, image):
    """Return what an image starts, and the files of its /app with modes and owners."""
    config = json.loads(engine.must("image", "inspect", image))[0]["Config"]
    find = ("--entrypoint=find", image, "/app", "/usr/local/bin/dumb-init", "-printf", "%p %M %u:%g\n")
    files = engine.must("run", "--rm", *find)
    settings = {name: config[name] for name in ("User", "WorkingDir", "Entrypoint", "Cmd")}
    return settings | {"Env": sorted(config["Env"])}, set(files.splitlines())


# --- What it makes ------------------------------------------------------------------------------


def test_an_engine_pulls_the_image_and_the_changed_line_is_in_its_log(engine, base, changed):
    image = f"{base}-changed"
    pushed(changed, base, image)
    assert log_of(engine, image) == f"{CHANGED}\n"


def test_on_a_bare_image_it_makes_what_the_dockerfile_makes(engine, bare, base, project):
    image = f"{base}-bare"
    pushed(project, bare, image, "--data", project / "datasets")
    log = log_of(engine, image, "--epochs", 1)
    assert "Test accuracy: " in log
    (settings, files), (built, built_files) = look(engine, image), look(engine, base)
    assert settings == built
    assert {line for line in built_files if not re.search("requirements|LICENSE", line)} == files


def test_the_same_input_has_the_same_digest(base, changed, tmp_path_factory):
    first = pushed(changed, base, f"{base}-first")
    again = shutil.copytree(changed, tmp_path_factory.mktemp("again"), dirs_exist_ok=True)
    (again / "mnist.py").chmod(0o600)
    os.utime(again / "mnist.py", (0, 0))
    assert pushed(again, base, f"{base}-second") == first
    (again / "mnist.py").write_text("print()")
    assert pushed(again, base, f"{base}-third") != first


def test_a_change_takes_seconds_and_sends_the_trainer_alone(base, folder, changed):
    before, clock = stored(folder), time.monotonic()
    pushed(changed, base, f"{base}-measured")
    assert time.monotonic() - clock < 15
    assert stored(folder) - before < 100_000


def test_layers_of_another_repository_are_not_sent_again(engine, registry, base, folder, changed):
    before = stored(folder)
    pushed(changed, base, f"{registry}/somebody/else:1")
    assert stored(folder) - before < 100_000
    assert CHANGED in log_of(engine, f"{registry}/somebody/else:1")


def test_the_notebook_puts_a_changed_trainer_into_an_image_without_an_engine(engine, base, tmp_path):
    """Its cells, with submit=True, on a machine where kubectl is the only program."""
    programs = tmp_path / "bin"
    programs.mkdir()
    need("kubectl", "kubernetes-client")
    (programs / "kubectl").symlink_to(shutil.which("kubectl"))
    image = f"{base}-from-the-notebook"
    with ApiServer() as cluster:
        code, output = submit_in(
            tmp_path,
            names=[name for name in ON_A_SLICE if name in PARTS or name in WITHOUT_TRAINING],
            change=(BEFORE, CHANGED),
            parameters=[("base_image", base), ("image", image)],
            PATH=programs,
            KUBECONFIG=cluster.kubeconfig(tmp_path),
        )
    assert code == 0, output
    assert "No Docker engine answers here.\n" in output
    (job,) = [each for each in cluster.created if each["kind"] == "PyTorchJob"]
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert replica["template"]["spec"]["containers"][0]["image"] == image
    assert CHANGED in log_of(engine, image, "--dry-run")


# --- The guide ----------------------------------------------------------------------------------


@pytest.mark.parametrize("chapter", ["Share", "Without an engine"])
def test_every_command_of_the_guide_works_with_a_registry(chapter, engine, registry, base, bare, project):
    for name in ("podman", "skopeo"):
        need(name, name)
    images = tempfile.mkdtemp(prefix="podman.", dir="/var/tmp")
    docker, podman, skopeo = map(shutil.which, (engine.program, "podman", "skopeo"))
    podman += f" --root {images}/root --runroot {images}/run"
    plain = "--tls-verify=false"
    build = f"{plain} --network=host --build-arg=BASE_IMAGE={bare}"
    build += " --build-arg=REQUIREMENTS=requirements-none.in"
    programs = {
        "docker": with_more(docker, {"run": " ".join(with_packages(engine))}),
        "podman": with_more(podman, {"build": build, "push": plain}),
        "python": with_more(sys.executable, {}),
        "skopeo": with_more(skopeo, {"inspect": plain, "list-tags": plain}),
    }
    engine.must("tag", base, "mnist")
    engine.must("tag", bare, f"{registry}/you/pytorch:1")
    engine.must("push", f"{registry}/you/pytorch:1")
    try:
        log = run_chapter(chapter, project, programs, engine.environment, ("registry.example.org", registry))
    finally:
        subprocess.run(["umount", f"{images}/root/overlay"], capture_output=True)  # after a build that failed
        shutil.rmtree(images)
    if chapter == "Share":
        assert re.search(r"^accuracy=0\.\d+$", log, re.M), log
        assert f'"Name": "{registry}/you/mnist"' in log
    else:
        engine.must("pull", f"{registry}/you/mnist:2")
        for image in ("digits:2", "mnist:3"):  # the former is made of digits:1
            assert "Test accuracy: " in log_of(engine, f"{registry}/you/{image}", "--dry-run")


# --- What it says -------------------------------------------------------------------------------


def sentence(folder, base, image, *more, **environment):
    """Run docker/append.py where it must fail, and return the only line that it prints."""
    code, output = append(folder, base, image, *more, **environment)
    assert code == 1
    assert output.startswith("append.py: ") and output.count("\n") == 1, output
    return output


def test_a_base_that_is_not_there_is_named(registry, changed):
    said = sentence(changed, f"{registry}/you/none:7", f"{registry}/you/mnist:7")
    assert f"{registry} says of you/none:7: manifest unknown; docker login {registry} may help" in said


def test_a_registry_that_is_not_there_is_named_at_once(changed):
    clock = time.monotonic()
    address = f"localhost:{free_port()}"
    assert f"no registry answers at {address}" in sentence(changed, f"{address}/a:1", f"{address}/a:2")
    assert time.monotonic() - clock < 15


def test_a_trainer_that_is_not_there_is_named_and_nothing_is_pushed(engine, base, changed):
    assert "none.py" in sentence(changed, base, f"{base}-none", "--trainer", "none.py")
    assert engine("pull", f"{base}-none")[0] != 0


def test_data_that_are_no_folder_are_named(base, changed):
    assert "Not a directory: 'mnist.py'" in sentence(changed, base, f"{base}-none", "--data", "mnist.py")


def test_images_of_two_registries_are_bad_usage(changed):
    code, output = append(changed, "one.example.org/a:1", "other.example.org/a:2")
    assert code == 2
    assert "one.example.org/a:1 and other.example.org/a:2 are not in the same registry\n" in output


def push_as(base, tag, **changes):
    """Give an image in a registry another tag, and changes to its configuration. Returns an index's entry."""
    address, name, of_base = re.fullmatch(r"([^/]+)/(.+):(.+)", base).groups()
    url = f"http://{address}/v2/{name}"
    manifest = requests.get(f"{url}/manifests/{of_base}", headers={"Accept": MANIFEST}).json()
    config = requests.get(f"{url}/blobs/{manifest['config']['digest']}").json() | changes
    manifest["config"] |= upload(url, json.dumps(config).encode())
    runs_on = {name: config[name] for name in ("os", "architecture")}
    return put_manifest(url, tag, MANIFEST, manifest) | {"platform": runs_on}


def put_manifest(url, tag, kind, manifest):
    """Upload a manifest, and return what an index says of it."""
    body = json.dumps(manifest).encode()
    answer = requests.put(f"{url}/manifests/{tag}", data=body, headers={"Content-Type": kind})
    answer.raise_for_status()
    return {"mediaType": kind, "size": len(body), "digest": answer.headers["Docker-Content-Digest"]}


def test_of_an_image_for_several_machines_the_one_for_this_machine_is_taken(engine, registry, base, changed):
    ours = json.loads(engine.must("image", "inspect", base))[0]["Architecture"]
    images = [push_as(base, name, architecture=name) for name in ("riscv64", ours)]
    images.insert(0, {name: value for name, value in images[0].items() if name != "platform"})
    kind = "application/vnd.docker.distribution.manifest.list.v2+json"
    several = {"schemaVersion": 2, "mediaType": kind, "manifests": images}
    url = f"http://{registry}/v2/you/mnist"
    put_manifest(url, "several", kind, several)
    put_manifest(url, "others", kind, several | {"manifests": images[:2]})
    name = f"{registry}/you/mnist"
    pushed(changed, f"{name}:several", f"{name}:ours")
    assert CHANGED in log_of(engine, f"{name}:ours")
    for tag in ("others", "riscv64"):
        assert f"{name}:{tag} is not for linux/{ours}" in sentence(changed, f"{name}:{tag}", f"{name}:none")
    pushed(changed, f"{name}:several", f"{name}:theirs", "--platform", "linux/riscv64")
    engine.must("pull", f"{name}:theirs")
    assert json.loads(engine.must("image", "inspect", f"{name}:theirs"))[0]["Architecture"] == "riscv64"


def test_a_base_may_say_little_of_itself(engine, registry, bare, changed):
    push_as(bare, "little", config=None, history=None, created=None)
    image = f"{registry}/you/mnist:little"
    pushed(changed, f"{registry}/python:little", image)
    assert CHANGED in log_of(engine, image)


# --- Who may do what ----------------------------------------------------------------------------


def docker_config(folder, address, user, **login):
    """Return variables by which docker's own configuration file holds somebody's password."""
    login = login or {"auth": base64.b64encode(f"{user}:secret".encode()).decode()}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"auths": {address: login}}))
    return {"DOCKER_CONFIG": folder}


def test_a_registry_that_wants_a_password_gets_the_one_of_docker(folder, base, changed, tmp_path):
    """The same images, behind a password; made by `htpasswd -nbB somebody secret`."""
    (tmp_path / "users").write_text("somebody:$2b$04$X9G5cSq0gtquHrCNLUkJEuuYVZ2V9T9grZOidurk/lbQvYBWpBQtW\n")
    auth = {"realm": "here", "path": str(tmp_path / "users")}
    with running_registry(tmp_path / "registry", folder / "images", htpasswd=auth) as address:
        old, new = f"{address}/you/mnist:1", f"{address}/you/mnist:new"
        for user in ("nobody", "somebody"):
            variables = docker_config(tmp_path / user, address, user)
            if user == "somebody":
                # Nothing else counts, wherever else this person has passwords.
                docker_config(tmp_path / ".docker", address, "nobody")
                (tmp_path / ".netrc").write_text("default login nobody password secret\n")
                pushed(changed, old, new, HOME=tmp_path, **variables)
            else:
                assert f"docker login {address} may help" in sentence(changed, old, new, **variables)
        assert f"docker login {address} may help" in sentence(changed, old, new, DOCKER_CONFIG=tmp_path)


def encoded(contents):
    """Return bytes, or what becomes JSON, in the letters of a token."""
    contents = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return base64.urlsafe_b64encode(contents).rstrip(b"=")


@contextmanager
def token_server(folder, rights):
    """Give out tokens as `rights` allow, {user: actions}; yields a registry's settings, and what was asked.

    See https://distribution.github.io/distribution/spec/auth/jwt.
    """
    need("openssl", "openssl")
    key, certificate = folder / "key", folder / "certificate"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    pem = "".join(certificate.read_text().splitlines()[1:-1])
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            query = parse_qs(urlsplit(self.path).query)
            password = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
            self.give(query, password.decode().partition(":")[0], "token")

        def do_POST(self):
            """Somebody swaps a token, as `az acr login` leaves one, for another."""
            query = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            assert (query["grant_type"], query["service"]) == (["refresh_token"], ["here"])
            query["scope"] = query["scope"][0].split()
            self.give(query, query["refresh_token"][0].removeprefix("identity of "), "access_token")

        def give(self, query, user, field):
            asked.append((user, *query["scope"]))
            access = []
            for scope in query["scope"]:
                kind, name, actions = scope.split(":")
                allowed = [action for action in actions.split(",") if action in rights.get(user, ())]
                access.append({"type": kind, "name": name, "actions": allowed})
            now = int(time.time())
            claims = {"iss": "tests", "sub": user, "aud": "here", "access": access}
            claims |= {"nbf": now - 9, "exp": now + 99}
            token = encoded({"typ": "JWT", "alg": "RS256", "x5c": [pem]}) + b"." + encoded(claims)
            sign = ["openssl", "dgst", "-sha256", "-sign", key]
            signature = subprocess.run(sign, input=token, check=True, capture_output=True).stdout
            answer = json.dumps({field: (token + b"." + encoded(signature)).decode()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    with serving(Handler) as address:
        settings = {"realm": f"{address}/token", "service": "here", "issuer": "tests"}
        yield settings | {"rootcertbundle": str(certificate)}, asked


def test_a_registry_that_wants_tokens_gets_one_for_each_thing_that_is_done(folder, base, changed, tmp_path):
    """Reading, mounting and pushing need different ones; a reader may not push, nobody may not even read."""
    rights = {"reader": ("pull",), "writer": ("pull", "push")}
    with (
        token_server(tmp_path, rights) as (settings, asked),
        running_registry(tmp_path / "registry", folder / "images", token=settings) as address,
    ):
        old, new = f"{address}/you/mnist:1", f"{address}/team/mnist:1"
        writer, reader = (docker_config(tmp_path / user, address, user) for user in ("writer", "reader"))
        nobody = base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode()
        identity = {"auth": nobody, "identitytoken": "identity of writer"}
        swapper = docker_config(tmp_path / "swapper", address, "", **identity)
        pushed(changed, old, f"{new}-swapped", **swapper)
        assert {user for user, *_ in asked} == {"writer"}
        asked.clear()
        pushed(changed, old, new, **writer)
        asked_for = [scope.split(":") for _, *scopes in asked for scope in scopes]
        scopes = {(name, *sorted(actions.split(","))) for _, name, actions in asked_for}
        assert {("you/mnist", "pull"), ("team/mnist", "pull", "push")} <= scopes
        said = sentence(changed, old, f"{address}/others/mnist:1", **reader)
        assert f"{address} says of others/mnist/blobs/uploads/: authentication required; docker" in said
        said = sentence(changed, old, new, DOCKER_CONFIG=tmp_path)
        assert f"{address} says of you/mnist:1: authentication required; docker login {address} may" in said


@pytest.mark.parametrize("challenge", ['Basic realm="here"', 'Bearer realm="{}/token",service="here"'])
def test_no_other_host_is_shown_a_password_or_a_token(challenge, tmp_path, monkeypatch):
    """Registries may say that something is uploaded elsewhere, and who is there may ask for anything."""
    seen = []

    class Elsewhere(BaseHTTPRequestHandler):
        def do_PUT(self):
            seen.append(self.headers.get("Authorization"))
            self.send_response(401)
            self.send_header("Www-Authenticate", challenge.format(address))
            self.end_headers()

        do_GET = do_PUT

    registry = f"127.0.0.1:{free_port()}"
    for name, value in docker_config(tmp_path, registry, "somebody").items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.syspath_prepend(ROOT / "docker")
    client = importlib.import_module("registry").Client(registry)
    assert client.login["password"]  # it knows the password, and has had a token
    client.authorization = {"Authorization": "Bearer secret"}
    with serving(Elsewhere) as address, pytest.raises(ValueError, match="401"):
        client.ask("PUT", f"{address}/v2/upload", io.BytesIO())
    assert seen and set(seen) == {None}
