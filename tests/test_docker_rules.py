"""docker/append.py keeps to docker's rules: for names, passwords, certificates and lines of any kind."""

import base64
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from threading import Event
from urllib.parse import parse_qs, urlsplit

import pytest
import requests

from rig.images import (
    APPEND,
    MANIFEST,
    append,
    digest_of,
    layer,
    line_to,
    pulled,
    push_image,
    pushed,
    put_manifest,
    running_registry,
    sentence,
)
from rig.processes import clean_environment, free_port, need, serving, start
from rig.project import ROOT

ENTRYPOINT = ["dumb-init", "--", "python"]
DIGITS = "MNIST/raw/train-images-idx3-ubyte"


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


class Server(BaseHTTPRequestHandler):
    """Answers whatever it is asked as its method `reply` says, (code, body, headers), or not at all."""

    def do_GET(self):
        if (answer := self.reply()) is None:
            return
        code, body, headers = answer
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_GET


@pytest.fixture
def client(monkeypatch):
    """The module docker/registry.py."""
    monkeypatch.syspath_prepend(ROOT / "docker")
    return importlib.import_module("registry")


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


# --- What is made of what -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_name", "image", "more", "code", "said"),
    [
        ("HOST/you/none:7", "HOST/you/new:1", [], 1, "HOST says of you/none:7: manifest unknown; docker"),
        ("HOST/you/mnist:1", "HOST/you/new:1", ["--trainer", "none.py"], 1, "none.py"),
        ("HOST/you/mnist:1", "HOST/you/new:1", ["--data", "mnist.py"], 1, "Not a directory: 'mnist.py'"),
        ("HOST/you/mnist:1", "HOST/You/new:1", [], 1, "is no image's name"),
        ("localhost:1/you/mnist:1", "localhost:1/you/new:1", [], 1, "no registry answers at localhost:1"),
        ("HOST/a:1", "other.org/a:1", [], 2, "HOST/a:1 and other.org/a:1 are not in the same registry"),
    ],
)
def test_what_is_not_there_or_cannot_be_is_said(base_name, image, more, code, said, base, project, registry):
    names = (name.replace("HOST", registry) for name in (base_name, image))
    ended, output = append(project, *names, *more)
    *usage, last = output.splitlines()
    assert (ended, bool(usage)) == (code, code == 2)
    assert last.startswith("append.py: ") and said.replace("HOST", registry) in last
    assert requests.get(f"http://{registry}/v2/you/new/manifests/1").status_code == 404


def test_the_same_input_has_the_same_digest(base, project):
    first = pushed(project, base, f"{base}-first")
    (project / "mnist.py").chmod(0o600)
    os.utime(project / "mnist.py", (0, 0))
    assert pushed(project, base, f"{base}-second") == first
    (project / "mnist.py").write_text("print()")
    assert pushed(project, base, f"{base}-third") != first


def test_of_an_image_for_several_machines_the_wanted_one_is_taken_however_docker_writes_it(registry, project):
    url, entries = f"http://{registry}/v2/you/several", []
    for machine in ("riscv64", "arm64"):
        push_image(registry, f"you/several:{machine}", [], machine, Entrypoint=ENTRYPOINT)
        manifest = requests.get(f"{url}/manifests/{machine}", headers={"Accept": MANIFEST}).json()
        entries.append(put_manifest(url, machine, MANIFEST, manifest))
        entries.append(entries[-1] | {"platform": {"os": "linux", "architecture": machine}})
    kind = "application/vnd.docker.distribution.manifest.list.v2+json"
    several = {"schemaVersion": 2, "mediaType": kind, "manifests": entries}
    put_manifest(url, "all", kind, several)
    put_manifest(url, "others", kind, several | {"manifests": entries[:3]})
    name = f"{registry}/you/several"
    for platform in ("linux/riscv64", "linux/arm64/v8", "linux/aarch64", "linux/ARM64"):
        pushed(project, f"{name}:all", f"{name}:new", "--platform", platform)
        found = pulled(f"{name}:new")[0]["architecture"]
        assert found == ("riscv64" if "riscv64" in platform else "arm64")
    for tag in ("others", "riscv64"):
        said = sentence(project, f"{name}:{tag}", f"{name}:none", "--platform", "linux/arm64")
        assert f"{name}:{tag} is not for linux/arm64" in said


def test_a_base_may_say_little_of_itself(registry, project):
    base = push_image(registry, "you/little:1", [layer(etc=None)])
    pushed(project, base, f"{registry}/you/little:2")
    config = pulled(f"{registry}/you/little:2")[0]
    assert config["config"]["User"] == "1000:0"
    assert len(config["history"]) == len(config["rootfs"]["diff_ids"]) == 2


@pytest.mark.parametrize("trainer", ["examples/other/train.py", "/srv/train.py"])
def test_the_text_stands_where_the_base_says_that_its_trainer_is(trainer, registry, project):
    base = push_image(registry, "you/other:1", [], Entrypoint=ENTRYPOINT, Env=[f"TRAINER={trainer}"])
    pushed(project, base, f"{registry}/you/other:2", "--trainer", "mnist.py")
    config, files = pulled(f"{registry}/you/other:2")
    assert f"TRAINER={trainer}" in config["config"]["Env"]
    path = str(Path("/app", trainer).relative_to("/"))
    assert files[path] == b"print('changed')" and "app/mnist.py" not in files
    assert all(str(folder) in files for folder in Path(path).parents[:-1])  # or only root could look there


def test_settings_of_the_base_that_would_end_or_judge_it_otherwise_are_gone(registry, project):
    settings = {"StopSignal": "SIGINT", "Healthcheck": {"Test": ["CMD", "false"]}, "Cmd": ["x"], "User": "7"}
    base = push_image(registry, "you/own:1", [], Entrypoint=ENTRYPOINT, **settings)
    pushed(project, base, f"{registry}/you/own:2")
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
    pushed(project, base, f"{registry}/you/mnist:data", "--data", "data")
    sent = {name for name, contents in pulled(f"{registry}/you/mnist:data")[1].items() if contents}
    assert sent == {"app/mnist.py", *(f"app/datasets/{name}" for name in digits)}


@pytest.mark.parametrize("link", ["app", "app/output"])
def test_a_folder_that_is_a_link_is_refused_because_a_layer_would_hide_it(link, registry, project):
    layers = [layer(**{"srv/app": None, link: "/srv/app"}), layer(etc=None)]
    base = push_image(registry, "you/link:1", layers, Entrypoint=ENTRYPOINT)
    assert f"/{link} is a symbolic link in {base}" in sentence(project, base, f"{registry}/you/link:2")
    again = push_image(registry, "you/link:1", [*layers, layer(**{link: None})], Entrypoint=ENTRYPOINT)
    pushed(project, again, f"{registry}/you/link:2")


def test_an_init_for_another_machine_is_never_put_in(registry, project):
    base = push_image(registry, "you/bare:1", [], architecture="riscv64")
    image = f"{registry}/you/bare:2"
    said = sentence(project, base, image, "--platform", "linux/riscv64")
    assert "has no dumb-init, and there is none for linux/riscv64 here" in said


def test_a_layer_that_the_base_lacks_is_named(registry, project, images):
    lost = layer(lost=b"lost")
    base = push_image(registry, "you/lost:1", [lost], Entrypoint=ENTRYPOINT)
    (next(images.rglob(digest_of(lost).removeprefix("sha256:"))) / "link").unlink()
    for image in ("you/lost:2", "you/found:2"):
        assert digest_of(lost) in sentence(project, base, f"{registry}/{image}")


# --- Passwords ----------------------------------------------------------------------------------


def configured(folder, **settings):
    """Return variables by which docker's own configuration file, in this folder, says something."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    return {"DOCKER_CONFIG": str(folder)}


def login(user):
    return {"auth": base64.b64encode(f"{user}:secret".encode()).decode()}


@pytest.fixture
def find_login(client, tmp_path, monkeypatch):
    """A function that returns what append.py finds in docker's settings, whose helper x is such a script."""

    def find(host, script="", **settings):
        (tmp_path / "docker-credential-x").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "docker-credential-x").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("DOCKER_CONFIG", configured(tmp_path, **settings)["DOCKER_CONFIG"])
        return client.find_login(host)

    return find


PLACES = ["HOST", "https://HOST/v2/", "https://HOST/v1/", "HOST/", "http://HOST", "https://HOST"]
PLACES = [(place.replace("HOST", "r.org:5000"), "r.org:5000") for place in PLACES]
PLACES.append(("https://index.docker.io/v1/", "docker.io"))  # Docker Hub's


@pytest.mark.parametrize(("place", "host"), PLACES)
@pytest.mark.parametrize("known", [login("you"), {"username": "you", "password": "secret"}], ids=len)
def test_a_password_is_found_under_any_address_on_its_host(place, host, known, find_login):
    auths = {"other.org": {"username": "x", "password": "x"}, place: known}
    found = find_login(host, auths=auths)
    assert (found["username"], found["password"]) == ("you", "secret")
    assert not any(find_login(other, auths=auths) for other in {"r.org", "docker.io"} - {host})


HELPERS = [
    ('echo \'{"Username": "you", "Secret": "secret"}\'', {"username": "you", "password": "secret"}),
    ('echo \'{"Username": "<token>", "Secret": "secret"}\'', {"identitytoken": "secret"}),
    ("echo 'credentials not found'; exit 1", {"why": "; docker-credential-x: credentials not found"}),
    ("kill -9 $$", {}),
]


@pytest.mark.parametrize(("script", "known"), HELPERS, ids=["password", "token", "none", "killed"])
@pytest.mark.parametrize("where", [{"credsStore": "x"}, {"credHelpers": {"r.org": "x"}}], ids=list)
def test_docker_s_keeper_of_passwords_is_asked(script, known, where, find_login):
    found = find_login("r.org", f"read host; [ $host = r.org ] || exit 9\n{script}", **where)
    assert known.items() <= found.items() and found.keys() - known.keys() <= {"username", "why"}


SENSELESS = [({"auths": {"r.org": "x"}}, ""), ({"auths": ["r.org"]}, "")]
SENSELESS += [({"auths": {"r.org": {"auth": "=="}}}, ""), ({"credsStore": "x"}, "true")]
SENSELESS += [({"credsStore": "x"}, "echo []"), ({"credsStore": "x"}, 'echo \'{"Username": "you"}\'')]


@pytest.mark.parametrize(("settings", "script"), SENSELESS)
def test_settings_that_make_no_sense_are_a_sentence(settings, script, find_login):
    with pytest.raises(ValueError, match=r"(credential-x|config\.json) has no password in docker's form: "):
        find_login("r.org", script, **settings)


def test_a_registry_that_wants_a_password_gets_docker_s_and_no_other(registry, base, images, project):
    """The same images, behind a password; made by `htpasswd -nbB you secret`."""
    (project / "users").write_text("you:$2b$04$X9G5cSq0gtquHrCNLUkJEuuYVZ2V9T9grZOidurk/lbQvYBWpBQtW\n")
    auth = {"realm": "here", "path": str(project / "users")}
    with running_registry(project / "registry", images, htpasswd=auth) as address:
        names = f"{address}/you/mnist:1", f"{address}/you/mnist:new"
        nobody = {"auths": {address: login("nobody")}}
        configured(project / ".docker", **nobody)
        (project / ".netrc").write_text("default login nobody password secret\n")
        yours = configured(project / "yours", auths={address: login("you")})
        pushed(project, *names, HOME=project, **yours)
        missing, why = {"credsStore": "missing"}, "; docker-credential-missing: [Errno 2] No such file"
        for settings, more in ((nobody, "\n"), ({}, "\n"), (missing, why)):
            said = sentence(project, *names, **configured(project / "other", **settings))
            assert f"docker login {address} may help{more}" in said
    # On a registry that asks for none, nobody misses it.
    pushed(project, base, f"{registry}/you/mnist:open", **configured(project, **missing))


def encoded(contents):
    """Return bytes, or what becomes JSON, in the letters of a token."""
    contents = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return base64.urlsafe_b64encode(contents).rstrip(b"=")


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


@contextmanager
def token_server(certificate, rights):
    """Give out tokens as `rights` allow, {user: actions}; yields a registry's settings, and what was asked.

    See https://distribution.github.io/distribution/spec/auth/jwt.
    """
    pem = "".join(certificate.read_text().partition("-----END")[0].splitlines()[1:])
    asked = []

    class Handler(Server):
        def reply(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
            query = parse_qs(body or urlsplit(self.path).query)
            if body:  # somebody swaps a token, as `az acr login` leaves one, for another
                assert (query["grant_type"], query["service"]) == (["refresh_token"], ["here"])
                user, field = query["refresh_token"][0].removeprefix("identity of "), "access_token"
            else:
                password = base64.b64decode(self.headers.get("Authorization", "").removeprefix("Basic "))
                user, field = password.decode().partition(":")[0], "token"
            access = []
            for scope in " ".join(query["scope"]).split():
                kind, name, actions = scope.split(":")
                asked.append((user, name, *sorted(actions.split(","))))
                allowed = [action for action in actions.split(",") if action in rights.get(user, ())]
                access.append({"type": kind, "name": name, "actions": allowed})
            now = int(time.time())
            claims = {"iss": "tests", "sub": user, "aud": "here", "access": access}
            claims |= {"nbf": now - 9, "exp": now + 99}
            token = encoded({"typ": "JWT", "alg": "RS256", "x5c": [pem]}) + b"." + encoded(claims)
            sign = ["openssl", "dgst", "-sha256", "-sign", certificate]
            signature = subprocess.run(sign, input=token, check=True, capture_output=True).stdout
            return 200, json.dumps({field: (token + b"." + encoded(signature)).decode()}).encode(), {}

    with serving(Handler) as address:
        settings = {"realm": f"{address}/token", "service": "here", "issuer": "tests"}
        yield settings | {"rootcertbundle": str(certificate)}, asked


def test_a_registry_that_wants_tokens_gets_one_for_each_thing(certificate, images, base, project):
    """Reading, mounting and pushing need different ones; a reader may not push, nobody may not even read."""
    rights = {"reader": ("pull",), "writer": ("pull", "push")}
    with (
        token_server(certificate, rights) as (settings, asked),
        running_registry(project / "registry", images, token=settings) as address,
    ):
        old, new = f"{address}/you/mnist:1", f"{address}/team/mnist:1"
        reader, writer = (configured(project / user, auths={address: login(user)}) for user in rights)
        nobody = base64.b64encode(b"00000000-0000-0000-0000-000000000000:").decode()
        identity = {"auth": nobody, "identitytoken": "identity of writer"}
        pushed(project, old, f"{new}-swapped", **configured(project / "swapper", auths={address: identity}))
        assert {user for user, *_ in asked} == {"writer"}
        asked.clear()
        pushed(project, old, new, **writer)
        assert {("writer", "you/mnist", "pull"), ("writer", "team/mnist", "pull", "push")} <= set(asked)
        said = sentence(project, old, f"{address}/others/mnist:1", **reader)
        assert f"{address} says of others/mnist/blobs/uploads/: authentication required; docker" in said
        said = sentence(project, old, new, DOCKER_CONFIG=project)
        assert f"{address} says of you/mnist:1: authentication required; docker login {address} may" in said


@pytest.mark.parametrize("challenge", ['Basic realm="here"', 'Bearer realm="{}/token",service="here"'])
def test_no_other_host_is_shown_a_password_or_a_token(challenge, client, tmp_path, monkeypatch):
    """Registries may say that something is uploaded elsewhere, and who is there may ask for anything."""
    seen = []

    class Elsewhere(Server):
        def reply(self):
            seen.append(self.headers.get("Authorization"))
            return 401, b"", {"Www-Authenticate": challenge.format(address)}

    registry = f"127.0.0.1:{free_port()}"
    settings = configured(tmp_path, auths={registry: login("somebody")})
    monkeypatch.setenv("DOCKER_CONFIG", settings["DOCKER_CONFIG"])
    session = client.Client(registry)
    assert session.login["password"]  # it knows the password, and has had a token
    session.authorization = {"Authorization": "Bearer secret"}
    with serving(Elsewhere) as address, pytest.raises(ValueError, match="401"):
        session.ask("PUT", f"{address}/v2/upload", io.BytesIO())
    assert seen and set(seen) == {None}


# --- Certificates and lines ---------------------------------------------------------------------


def test_a_company_s_certificate_is_trusted_where_ssl_cert_file_names_it(certificate, images, project, base):
    with running_registry(project / "registry", images, tls=certificate) as address:
        far = address.replace("127.0.0.1", "0.0.0.0")
        old, new, options = f"{far}/you/mnist:1", f"{far}/you/mnist:tls", {"NO_PROXY": "*"}
        said = sentence(project, old, new, **options)
        assert "certificate verify failed" in said and "see SSL_CERT_FILE and --tls-verify" in said
        for name in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
            pushed(project, old, new, **options, **{name: certificate})
        pushed(project, old, new, "--tls-verify=false", **options)
        # Docker's rule for loopback: https first, with any certificate.
        pushed(project, f"{address}/you/mnist:1", f"{address}/you/mnist:tls", **options)


def test_plain_http_beyond_loopback_is_a_flag(registry, project, base):
    far = registry.replace("127.0.0.1", "0.0.0.0")
    old, new = f"{far}/you/mnist:1", f"{far}/you/mnist:http"
    assert "see SSL_CERT_FILE and --tls-verify" in sentence(project, old, new, NO_PROXY="*")
    pushed(project, old, new, "--tls-verify=false", NO_PROXY="*")


@pytest.fixture
def hurried(monkeypatch):
    """Let append.py wait a second and a half for each of its minutes."""
    ask = requests.Session.request

    def request(*arguments, timeout=None, **options):
        timeout = tuple(limit / 40 for limit in timeout) if isinstance(timeout, tuple) else timeout
        return ask(*arguments, timeout=timeout, **options)

    monkeypatch.setattr(requests.Session, "request", request)


@pytest.fixture
def data(project):
    """An open file of the digits to send."""
    (project / "data" / DIGITS).parent.mkdir(parents=True)
    with open(project / "data" / DIGITS, "w+b") as file:
        yield file


def test_a_slow_line_is_waited_for_as_long_as_something_goes_through(registry, base, project, data, hurried):
    data.truncate(3_000_000)
    with line_to(registry, per_second=500_000) as slow:
        clock = time.monotonic()
        pushed(project, f"{slow}/you/mnist:1", f"{slow}/you/mnist:sent", "--data", "data")
    assert time.monotonic() - clock > 4.5  # three minutes


def test_a_line_that_stalls_is_said_to(registry, base, project, data, hurried):
    data.truncate(2_000_000)
    with line_to(registry, at_most=100_000) as stalled:
        said = sentence(project, f"{stalled}/you/mnist:1", f"{stalled}/you/mnist:sent", "--data", "data")
    assert f"{stalled}: it stalls: in a minute, nothing went through" in said


def test_an_interrupted_upload_is_one_sentence(registry, base, project, data):
    data.truncate(4_000_000)
    busy = Event()
    with line_to(registry, per_second=300_000, busy=busy) as slow:
        names = ("--base", f"{slow}/you/mnist:1", "--image", f"{slow}/you/mnist:sent")
        process = start(project, APPEND, *names, "--data", "data")
        assert busy.wait(60)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
    assert output == "append.py: interrupted, and nothing is pushed under this name\n"
    assert process.returncode == 1


def test_memory_does_not_grow_with_the_data(registry, base, project, data):
    data.truncate(150_000_000)
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
    class Proxy(Server):
        def reply(self):
            if answer is None and "manifests" in self.path:
                return None
            code, kind, body = PAGE if answer is None or self.path == "/page" else answer
            return code, body, {"Content-Type": kind, "Location": "/page"}

    with serving(Proxy) as address:
        host = address.removeprefix("http://")
        assert said in sentence(project, f"{host}/a:1", f"{host}/a:2")
