"""A client for registries of images, with docker's rules: github.com/opencontainers/distribution-spec."""

import base64
import hashlib
import json
import os
import re
import ssl
import subprocess
from argparse import ArgumentTypeError
from collections import namedtuple
from pathlib import Path
from urllib.parse import urljoin, urlsplit

import requests

HUB = ("docker.io", "registry-1.docker.io", "index.docker.io")  # in names, on the network, in configurations
WORD, LABEL = "[a-z0-9]+(?:(?:[.]|__?|-+)[a-z0-9]+)*", "[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
HOST = rf"((?:{LABEL}(?:[.]{LABEL})*|\[[0-9a-fA-F:]+\])(?::\d+)?)/"
PATH = rf"({WORD}(?:/{WORD})*)(?::(\w[\w.-]{{0,127}}))?(?:@(sha256:[0-9a-f]{{64}}))?"
Image = namedtuple("Image", "text host path reference")  # the reference is a digest, or else a tag


def parse(text):
    """Split an image's name as docker does. Raises argparse's ArgumentTypeError."""
    first, slash, _ = text.partition("/")
    elsewhere = slash and (first == "localhost" or set(first) & set(".:"))
    found = re.fullmatch((HOST if elsewhere else "()") + PATH, text, re.ASCII)
    if not found or len(found[2]) > 255:
        raise ArgumentTypeError(f"{text!r} is not an image's name, as HOST/you/mnist:1 is; nor are capitals")
    host, path, tag, digest = found.groups()
    if not host or host in HUB:
        host, path = HUB[0], path if "/" in path else f"library/{path}"
    return Image(text, host, path, digest or tag or "latest")


def find_login(host):
    """Return what docker knows of you: username, password, identitytoken, why not. Raises ValueError."""
    source = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker", "config.json")
    names = HUB if host in HUB else [host]

    def entry(part):  # its key may be any address on the host
        known = {re.sub("^https?://|/.*", "", key): value for key, value in (config.get(part) or {}).items()}
        return next(filter(None, map(known.get, names)), {})

    try:
        config = json.loads(source.read_text("utf-8-sig")) if source.exists() else {}
        login, helper = dict(entry("auths")), entry("credHelpers") or config.get("credsStore")
        if login.get("auth"):
            user, _, password = base64.b64decode(login["auth"], validate=True).decode().partition(":")
            login |= {"username": user, "password": password.strip("\0")}
        if helper:
            source, address = f"docker-credential-{helper}", f"https://{HUB[2]}/v1/" if host in HUB else host
            run = subprocess.run([source, "get"], input=address, capture_output=True, text=True, timeout=60)
            if run.returncode:
                return login | {"why": f"; {source}: {' '.join((run.stdout or run.stderr).split())[:200]}"}
            user, secret = (json.loads(run.stdout)[name] for name in ("Username", "Secret"))
            login = {"identitytoken": secret} if user == "<token>" else {"username": user, "password": secret}
        return login
    except (OSError, subprocess.TimeoutExpired) as error:
        return login | {"why": f"; {error}"}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has no password in docker's form: {error!r}") from error


def explain(error, host):
    """Return a sentence with the first cause of an error."""
    while error.__context__:
        error = error.__context__
    if isinstance(error, ssl.SSLError):
        hint = "SSL_CERT_FILE may name its certificate's file, and --tls-verify=false takes any, or http"
        return f"{host} has no https that is trusted here: {error}; {hint}"
    if isinstance(error, TimeoutError):
        return f"{host} has stalled: for a minute or more, nothing was sent or said"
    return f"no registry answers at {host}: {error}"


class Client:
    """The registry at `host`; its methods raise ValueError, with a sentence, if it refuses something."""

    def __init__(self, host, verify=True):
        self.host, self.login, self.authorization = host, find_login(host), {}
        loopback = re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", host)
        self.session = requests.Session()
        self.session.trust_env = not loopback  # a proxy is only for other hosts
        self.session.auth = lambda request: request  # and ~/.netrc is never read
        trusted = [*Path("/etc/docker/certs.d", host).glob("*.crt"), os.environ.get("REQUESTS_CA_BUNDLE")]
        trusted += [*ssl.get_default_verify_paths()[:2], True]  # SSL_CERT_FILE, or else the system's
        self.verify = not loopback and verify and next(filter(None, trusted))
        self.address = f"https://{HUB[1] if host in HUB else host}/v2/"
        if not self.verify:  # docker's rule for loopback: any certificate will do, or none and http
            requests.packages.urllib3.disable_warnings()
            try:
                self.session.get(self.address, timeout=10, verify=False)
            except requests.RequestException:
                self.address = self.address.replace("https", "http", 1)

    def send(self, method, url, data=None, limit=60, again=True, headers=None, **options):
        """Send a request, to the registry or where it says. Returns the answer: to HEAD, 404 is one."""
        url = urljoin(self.address, url)
        own = self.authorization if url.startswith(self.address) else {}  # nobody else sees a password
        options |= {"headers": own | (headers or {}), "verify": self.verify, "timeout": (60, limit)}
        if hasattr(data, "seek"):
            data.seek(0)  # sent piece by piece; the first limit is for each
        try:
            answer = self.session.request(method, url, data=data, **options)
        except requests.RequestException as error:
            raise ValueError(explain(error, urlsplit(url).netloc)) from error
        code, where = answer.status_code, urlsplit(answer.url)
        if code == 401 and again and answer.url.startswith(self.address):
            self.authorization = self.authorize(answer.headers.get("Www-Authenticate", ""))
            return self.send(method, url, data, limit, False, headers)
        if code < 400 or (method, code) == ("HEAD", 404):
            return answer
        try:
            why = ", ".join(error.get("message") or error["code"] for error in answer.json()["errors"])
        except (AttributeError, LookupError, TypeError, ValueError):
            why = f"{code} {answer.reason}"
        hint = f"; docker login {self.host} may help{self.login.get('why', '')}" if 400 < code < 405 else ""
        path = where.path.removeprefix("/v2/").replace("/manifests/", ":")
        raise ValueError(f"{where.netloc} says of {path}: {' '.join(why.split())[:300]}{hint}")

    def read(self, method, url, *arguments, **options):
        """Send a request, and return the JSON object in the answer."""
        answer = self.send(method, url, *arguments, **options)
        try:
            return dict(answer.json())
        except (TypeError, ValueError) as error:
            host, kind = urlsplit(answer.url).netloc, answer.headers.get("Content-Type") or "nothing"
            raise ValueError(f"{host} sends {kind} where JSON should be: a proxy's page?") from error

    def authorize(self, challenge):
        """Return the header that is asked for: with the password, or with a token for this request."""
        user, password, token = map(self.login.get, ("username", "password", "identitytoken"))
        basic = {"Authorization": f"Basic {base64.b64encode(f'{user}:{password}'.encode()).decode()}"}
        basic, asked = basic if password else {}, dict(re.findall(r'(\w+)="([^"]*)"', challenge))
        if "bearer " not in challenge.lower():
            return basic
        form = {"service": asked.get("service"), "scope": asked.get("scope", "").split()}
        if token:  # it is swapped for one that is valid for minutes
            form |= {"grant_type": "refresh_token", "refresh_token": token, "client_id": "append.py"}
            form["scope"] = asked.get("scope")
            given = self.read("POST", asked.get("realm"), form, again=False)
        else:
            given = self.read("GET", asked.get("realm"), again=False, headers=basic, params=form)
        return {"Authorization": f"Bearer {given.get('token') or given.get('access_token')}"}

    def push(self, image, file, kind):
        """Upload an open file, unless the registry has it, and return its descriptor."""
        hashed = hashlib.sha256()
        for piece in iter(lambda: file.read(1 << 20), b""):
            hashed.update(piece)
        digest, size = f"sha256:{hashed.hexdigest()}", file.tell()
        if not self.send("HEAD", f"{image.path}/blobs/{digest}").ok:
            answer = self.send("POST", f"{image.path}/blobs/uploads/")
            url = urljoin(answer.url, answer.headers.get("Location"))
            # A line may still hold much when all is sent, and a registry has to store it before it answers.
            self.send("PUT", f"{url}{'&' if '?' in url else '?'}digest={digest}", file, 60 + size / 50_000)
        return {"mediaType": kind, "digest": digest, "size": size}
