"""docker/append.py keeps to docker's rules: for names, passwords, certificates and lines of any kind."""

import base64
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event

import pytest

from rig.images import APPEND, append, digest_of, layer, line_to, pulled, push_image, running_registry
from rig.processes import clean_environment, need, serving, start
from rig.project import ROOT

ENTRYPOINT = ["dumb-init", "--", "python"]
DIGITS = "MNIST/raw/train-images-idx3-ubyte"
# append.py, with a second for each of its minutes.
HURRIED = f"""
import requests, runpy, sys
ask = requests.Session.request
def hurried(*arguments, timeout, **options):
    timeout = [seconds / 60 for seconds in timeout] if isinstance(timeout, tuple) else timeout
    return ask(*arguments, timeout=tuple(timeout) if isinstance(timeout, list) else timeout, **options)
requests.Session.request = hurried
sys.path.insert(0, {str(ROOT / "docker")!r})
sys.argv[0] = {str(APPEND)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("rules") / "images"


@pytest.fixture(scope="module")
def registry(tmp_path_factory, images):
    with running_registry(tmp_path_factory.mktemp("rules") / "registry", images) as address:
        yield address


@pytest.fixture(scope="module")
def base(registry):
    """A base as the Dockerfile makes it, of a few bytes."""
    files = {"app": None, "app/output": None, "app/mnist.py": b"print()"}
    return push_image(registry, "you/mnist:1", [layer(**files)], Entrypoint=ENTRYPOINT)


@pytest.fixture
def project(tmp_path):
    (tmp_path / "mnist.py").write_text("print('changed')")
    return tmp_path


@pytest.fixture
def client(monkeypatch):
    """The module docker/registry.py."""
    monkeypatch.syspath_prepend(ROOT / "docker")
    return importlib.import_module("registry")


def pushes(folder, base, image, *more, **environment):
    code, output = append(folder, base, image, *more, **environment)
    assert code == 0 and re.fullmatch(rf"{re.escape(image)}@sha256:\w{{64}}\n", output), output


def sentence(folder, base, image, *more, **environment):
    code, output = append(folder, base, image, *more, **environment)
    assert code == 1 and output.startswith("append.py: ") and output.count("\n") == 1, output
    return output


# --- Names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mnist", ("docker.io", "library/mnist", "latest")),
        ("you/mnist:1", ("docker.io", "you/mnist", "1")),
        ("index.docker.io/mnist", ("docker.io", "library/mnist", "latest")),
        ("localhost/mnist:1", ("localhost", "mnist", "1")),
        ("localhost:5000/a/b_c/d--e.f", ("localhost:5000", "a/b_c/d--e.f", "latest")),
        ("[::1]:5000/mnist:V_1.0-x", ("[::1]:5000", "mnist", "V_1.0-x")),
        (f"Reg.Example.org/x:1@{digest_of(b'')}", ("Reg.Example.org", "x", digest_of(b""))),
    ],
)
def test_a_name_is_split_as_docker_does(name, parts, client):
    assert tuple(client.parse(name))[1:] == parts


BAD = ["You/mnist", "reg.io/You/mnist:2", "you/mnist:1:2", "reg.io/mnist:", "reg.io/", "a//b", "a___b", "-a"]
BAD += ["user:pw@reg.io/a", "mnist@sha256:12", "a" * 256, "", "mnist :1", f"mnist:{'1' * 129}"]


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_no_engine_takes_is_refused(name, client):
    with pytest.raises(ValueError, match="is no image's name"):
        client.parse(name)


def test_nothing_is_pushed_under_a_name_that_nobody_can_pull(base, project, registry, images):
    assert "is no image's name" in sentence(project, base, f"{registry}/You/mnist:2")
    assert not list(images.rglob("You"))


# --- What is made -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trainer", "path"),
    [("examples/other/train.py", "app/examples/other/train.py"), ("/srv/train.py", "srv/train.py")],
)
def test_the_text_stands_where_the_base_says_that_its_trainer_is(trainer, path, registry, project):
    base = push_image(registry, "you/other:1", [], Entrypoint=ENTRYPOINT, Env=[f"TRAINER={trainer}"])
    pushes(project, base, f"{registry}/you/other:2", "--trainer", "mnist.py")
    config, files = pulled(f"{registry}/you/other:2")
    assert f"TRAINER={trainer}" in config["config"]["Env"]
    assert files[path] == b"print('changed')" and "app/mnist.py" not in files
    assert all(str(folder) in files for folder in Path(path).parents[:-1])  # or only root could look there


def test_settings_of_the_base_that_would_end_or_judge_it_otherwise_are_gone(registry, project):
    settings = {"StopSignal": "SIGINT", "Healthcheck": {"Test": ["CMD", "false"]}, "Cmd": ["x"], "User": "7"}
    base = push_image(registry, "you/own:1", [], Entrypoint=ENTRYPOINT, **settings)
    pushes(project, base, f"{registry}/you/own:2")
    made = pulled(f"{registry}/you/own:2")[0]["config"]
    assert (made["StopSignal"], made["Healthcheck"]) == ("SIGTERM", {"Test": ["NONE"]})
    assert (made["Cmd"], made["User"]) == (None, "1000:0")
    stage = (ROOT / "Dockerfile").read_text().partition(" AS trainer")[2]
    assert "\nSTOPSIGNAL SIGTERM\n" in stage and "\nHEALTHCHECK NONE\n" in stage


def test_only_the_digits_of_a_folder_of_data_are_sent(base, registry, project):
    digits = {"MNIST/raw/SHA256SUMS", f"{DIGITS}.gz", DIGITS}
    for name in (*digits, "kaggle.json", ".cache/token", "MNIST/raw/key"):
        (project / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (project / "data" / name).write_text(name)
    (project / "data/MNIST/processed").mkdir()
    pushes(project, base, f"{registry}/you/mnist:data", "--data", "data")
    sent = {name for name, contents in pulled(f"{registry}/you/mnist:data")[1].items() if contents}
    assert sent == {"app/mnist.py", *(f"app/datasets/{name}" for name in digits)}


@pytest.mark.parametrize("link", ["app", "app/output"])
def test_a_folder_that_is_a_link_is_refused_because_a_layer_would_hide_it(link, registry, project):
    layers = [layer(**{"srv/app": None, link: "/srv/app"}), layer(etc=None)]
    base = push_image(registry, "you/link:1", layers, Entrypoint=ENTRYPOINT)
    assert f"/{link} is a symbolic link in {base}" in sentence(project, base, f"{registry}/you/link:2")
    again = push_image(registry, "you/link:1", [*layers, layer(**{link: None})], Entrypoint=ENTRYPOINT)
    pushes(project, again, f"{registry}/you/link:2")


def test_an_init_for_another_machine_is_never_put_in(registry, project):
    base = push_image(registry, "you/bare:1", [], architecture="riscv64")
    image = f"{registry}/you/bare:2"
    said = sentence(project, base, image, "--platform", "linux/riscv64")
    assert "has no dumb-init, and there is none for linux/riscv64 here" in said


@pytest.mark.parametrize("platform", ["linux/arm64/v8", "linux/aarch64", "linux/ARM64"])
def test_a_platform_may_be_written_as_docker_prints_it(platform, registry, project):
    base = push_image(registry, "you/arm:1", [], architecture="arm64", Entrypoint=ENTRYPOINT)
    pushes(project, base, f"{registry}/you/arm:2", "--platform", platform)


def test_a_layer_that_the_base_lacks_is_named(registry, project, images):
    lost = layer(lost=b"lost")
    base = push_image(registry, "you/lost:1", [lost], Entrypoint=ENTRYPOINT)
    (next(images.rglob(digest_of(lost).removeprefix("sha256:"))) / "link").unlink()
    for image in ("you/lost:2", "you/found:2"):
        assert digest_of(lost) in sentence(project, base, f"{registry}/{image}")


# --- Passwords ----------------------------------------------------------------------------------


def helper(folder, script):
    """Write a program that keeps passwords for docker."""
    (folder / "docker-credential-x").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "docker-credential-x").chmod(0o755)


def configured(folder, **settings):
    (folder / "config.json").write_text(json.dumps(settings))
    return {"DOCKER_CONFIG": str(folder)}


LOGIN = {"auth": base64.b64encode(b"you:secret").decode()}
PLACES = ["HOST", "https://HOST/v2/", "https://HOST/v1/", "HOST/", "http://HOST", "https://HOST"]
PLACES = [(place.replace("HOST", "r.org:5000"), "r.org:5000/mnist") for place in PLACES]
PLACES.append(("https://index.docker.io/v1/", "you/mnist"))  # Docker Hub's


@pytest.mark.parametrize(("place", "image"), PLACES)
@pytest.mark.parametrize("login", [LOGIN, {"username": "you", "password": "secret"}], ids=["auth", "words"])
def test_a_password_is_found_under_any_address_on_its_host(
    place, image, login, client, tmp_path, monkeypatch
):
    auths = {"other.org": {"username": "x", "password": "x"}, place: login}
    monkeypatch.setenv("DOCKER_CONFIG", configured(tmp_path, auths=auths)["DOCKER_CONFIG"])
    host = client.parse(image).host
    found = client.find_login(host)
    assert (found["username"], found["password"]) == ("you", "secret")
    assert not any(client.find_login(other) for other in {"r.org", "docker.io"} - {host})


HELPERS = [
    ('echo \'{"Username": "you", "Secret": "secret"}\'', {"username": "you", "password": "secret"}),
    ('echo \'{"Username": "<token>", "Secret": "secret"}\'', {"identitytoken": "secret"}),
    ("echo 'credentials not found'; exit 1", {"why": "; docker-credential-x: credentials not found"}),
    ("kill -9 $$", {}),
]


@pytest.mark.parametrize(("script", "known"), HELPERS, ids=["password", "token", "none", "killed"])
@pytest.mark.parametrize("where", [{"credsStore": "x"}, {"credHelpers": {"r.org": "x"}}], ids=list)
def test_docker_s_keeper_of_passwords_is_asked(script, known, where, client, tmp_path, monkeypatch):
    helper(tmp_path, f"read host; [ $host = r.org ] || exit 9\n{script}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_CONFIG", configured(tmp_path, **where)["DOCKER_CONFIG"])
    found = client.find_login("r.org")
    assert known.items() <= found.items() and found.keys() - known.keys() <= {"username", "why"}


@pytest.mark.parametrize(
    ("settings", "script"),
    [
        ({"credsStore": "x"}, 'echo \'{"Username": "you"}\''),
        ({"credsStore": "x"}, "true"),
        ({"credsStore": "x"}, "echo []"),
        ({"auths": {"HOST": "x"}}, ""),
        ({"auths": ["HOST"]}, ""),
        ({"auths": {"HOST": {"auth": "=="}}}, ""),
    ],
)
def test_a_configuration_that_makes_no_sense_is_one_sentence(settings, script, base, registry, project):
    helper(project, script)
    settings = json.loads(json.dumps(settings).replace("HOST", registry))
    environment = configured(project, **settings) | {"PATH": f"{project}:{os.environ['PATH']}"}
    said = sentence(project, base, f"{registry}/you/mnist:none", **environment)
    assert re.search("(docker-credential-x|config.json) has no password in docker's form: ", said)


def test_a_keeper_that_is_missing_is_silent_until_a_password_is_asked_for(base, registry, project, images):
    environment = configured(project, credsStore="missing")
    pushes(project, base, f"{registry}/you/mnist:open", **environment)
    (project / "users").write_text("somebody:$2b$04$X9G5cSq0gtquHrCNLUkJEuuYVZ2V9T9grZOidurk/lbQvYBWpBQtW\n")
    auth = {"realm": "here", "path": str(project / "users")}
    with running_registry(project / "registry", images, htpasswd=auth) as address:
        said = sentence(project, f"{address}/you/mnist:1", f"{address}/you/mnist:2", **environment)
        assert (
            f"docker login {address} may help; docker-credential-missing: " in said and "No such file" in said
        )


# --- Certificates, and who needs none -----------------------------------------------------------


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A file with a certificate that nobody knows, for an address that is not loopback but leads there."""
    need("openssl", "openssl")
    file = tmp_path_factory.mktemp("certificate") / "certificate"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tests"]
    command += ["-addext", "subjectAltName=IP:0.0.0.0", "-keyout", f"{file}.key", "-out", file]
    subprocess.run(command, check=True, capture_output=True)
    file.write_text(file.read_text() + Path(f"{file}.key").read_text())
    return file


def test_a_company_s_certificate_is_trusted_where_ssl_cert_file_names_it(certificate, images, project, base):
    with running_registry(project / "registry", images, tls=certificate) as address:
        far = address.replace("127.0.0.1", "0.0.0.0")
        old, new, options = f"{far}/you/mnist:1", f"{far}/you/mnist:tls", {"NO_PROXY": "*"}
        said = sentence(project, old, new, **options)
        assert "certificate verify failed" in said and "see SSL_CERT_FILE and --tls-verify" in said
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            pushes(project, old, new, **options, **{name: certificate})
        pushes(project, old, new, "--tls-verify=false", **options)
        # Docker's rule for loopback: https first, with any certificate.
        pushes(project, f"{address}/you/mnist:1", f"{address}/you/mnist:tls", **options)


def test_plain_http_beyond_loopback_is_a_flag(registry, project, base):
    far = registry.replace("127.0.0.1", "0.0.0.0")
    old, new = f"{far}/you/mnist:1", f"{far}/you/mnist:http"
    assert "see SSL_CERT_FILE and --tls-verify" in sentence(project, old, new, NO_PROXY="*")
    pushes(project, old, new, "--tls-verify=false", NO_PROXY="*")


# --- Lines --------------------------------------------------------------------------------------


def start_hurried(folder, line):
    """Let append.py send three megabytes over a line, and return its process."""
    (folder / "hurried.py").write_text(HURRIED)
    (folder / "data" / DIGITS).parent.mkdir(parents=True)
    (folder / "data" / DIGITS).write_bytes(os.urandom(3_000_000))
    names = ("--base", f"{line}/you/mnist:1", "--image", f"{line}/you/mnist:sent")
    return start(folder, "hurried.py", *names, "--data", "data")


def test_a_slow_line_is_waited_for_as_long_as_something_goes_through(registry, base, project):
    with line_to(registry, per_second=1_000_000) as slow:
        clock = time.monotonic()
        process = start_hurried(project, slow)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert time.monotonic() - clock > 3  # seconds, where one counts as a minute


def test_a_line_that_stalls_is_said_to(registry, base, project):
    with line_to(registry, at_most=100_000) as stalled:
        process = start_hurried(project, stalled)
        output = process.communicate(timeout=60)[0]
    assert (process.returncode, output.count("\n")) == (1, 1), output
    assert f"{stalled}: it stalls: in a minute, nothing went through" in output


def test_an_interrupted_upload_is_one_sentence(registry, base, project):
    busy = Event()
    with line_to(registry, per_second=300_000, busy=busy) as slow:
        process = start_hurried(project, slow)
        assert busy.wait(60)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert output == "append.py: interrupted, and nothing is pushed under this name\n"
    assert process.returncode == 1


def test_memory_does_not_grow_with_the_data(registry, base, project):
    (project / "data" / DIGITS).parent.mkdir(parents=True)
    with open(project / "data" / DIGITS, "wb") as file:
        file.truncate(150_000_000)
    command = [sys.executable, APPEND, "--base", base, "--image", f"{registry}/you/mnist:large"]
    limited = ["bash", "-c", 'ulimit -v 150000; exec "$@"', "bash", *command, "--data", "data"]
    run = subprocess.run(limited, cwd=project, env=clean_environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


PAGE = (200, "text/html", b"<html>Please log in")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (PAGE, "answers as a proxy or a login page does, not a registry"),
        ((200, "application/json", b"[]"), "answers as a proxy or a login page does, not a registry"),
        ((200, "application/json", b'{"schemaVersion": 1}'), "is not for linux/"),
        ((502, "text/html", b"<html>Bad gateway"), "says of a:1: 502 Bad Gateway"),
        ((403, "text/plain", b"no"), "says of a:1: 403 Forbidden; docker login "),
        ((302, "", b""), "answers as a proxy or a login page does, not a registry"),
        (None, "no registry answers at "),
    ],
)
def test_whatever_a_proxy_answers_is_one_sentence(answer, said, project):
    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self):
            if answer is None and "manifests" in self.path:
                self.connection.close()
                return
            code, kind, body = PAGE if answer is None or self.path == "/page" else answer
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Location", "/page")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_HEAD = do_POST = do_PUT = do_GET

    with serving(Proxy) as address:
        host = address.removeprefix("http://")
        assert said in sentence(project, f"{host}/a:1", f"{host}/a:2")
