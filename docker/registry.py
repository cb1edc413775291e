"""A client for registries of images, with docker's rules: github.com/opencontainers/distribution-spec."""

import base64
import hashlib
import json
import os
import re
import socket
import ssl
from collections import namedtuple
from pathlib import Path
from subprocess import SubprocessError, run
from urllib.parse import urljoin, urlsplit

import requests

HUB = ("docker.io", "registry-1.docker.io", "index.docker.io")  # in names, on the network, in configurations
WORD = "[a-z0-9]+(?:(?:[.]|__?|-+)[a-z0-9]+)*"
NAME = rf"(?:([\w.:[\]-]+)/)?({WORD}(?:/{WORD})*)(?::(\w[\w.-]{{0,127}}))?(?:@(sha256:[0-9a-f]{{64}}))?"
Image = namedtuple("Image", "text host path reference")  # the reference is a digest, or else a tag


def parse(text):
    """Split an image's name as docker does. Raises ValueError."""
    elsewhere = re.match("localhost/|[^/]*[.:][^/]*/", text)
    found = re.fullmatch(NAME, text if elsewhere else f"{HUB[0]}/{text}", re.ASCII)
    if not found or len(found[2]) > 255:
        raise ValueError(f"{text!r} is no image's name: it has the form HOST/you/mnist:1, without capitals")
    host, path, tag, digest = found.groups()
    host, path = (HUB[0], path if "/" in path else f"library/{path}") if host in HUB else (host, path)
    return Image(text, host, path, digest or tag or "latest")


def find_login(host):
    """Return what docker knows of you: username, password, identitytoken, why not. Raises ValueError."""
    source, login = Path(os.getenv("DOCKER_CONFIG") or Path.home() / ".docker", "config.json"), {}
    try:
        config = json.loads(source.read_text("utf-8-sig")) if source.exists() else {}
        known = [config.get("auths") or {}, config.get("credHelpers") or {}]  # under any address on a host
        known = [{re.sub("^https?://|/.*", "", key): part[key] for key in part} for part in known]
        names = HUB if host in HUB else [host]
        login, helper = (next(filter(None, map(part.get, names)), {}) for part in known)
        login, helper = dict(login), helper or config.get("credsStore")
        if login.get("auth"):
            user, _, password = base64.b64decode(login["auth"], validate=True).decode().partition(":")
            login |= {"username": user, "password": password.strip("\0")}
        if helper:
            source, asked = f"docker-credential-{helper}", f"https://{HUB[2]}/v1/" if host in HUB else host
            said = run([source, "get"], input=asked, capture_output=True, text=True, timeout=60, check=True)
            user, secret = (json.loads(said.stdout)[name] for name in ("Username", "Secret"))
            login |= {"identitytoken" if user == "<token>" else "password": secret, "username": user}
        return login
    except (OSError, SubprocessError) as error:
        return login | {"why": f"; {source}: {' '.join(str(getattr(error, 'output', '') or error).split())}"}
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{source} has no password in docker's form: {error!r}") from error


class Client(requests.Session):
    """The registry at `host`; its methods raise ValueError, with a sentence, if it refuses something."""

    def __init__(self, host, verify=True):
        super().__init__()
        loopback = re.fullmatch(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?", host)
        self.host, self.login, self.authorization = host, find_login(host), {}
        self.trust_env, self.auth = not loopback, lambda request: request  # no proxy there; never ~/.netrc
        known = os.getenv("REQUESTS_CA_BUNDLE") or ssl.get_default_verify_paths().cafile or True
        self.verify = not loopback and verify and known
        context = ssl.create_default_context()  # trusts SSL_CERT_FILE, or else what the system trusts
        context.check_hostname = bool(self.verify)
        for file in Path("/etc/docker/certs.d", host).glob("*.crt"):
            context.load_verify_locations(file)
        brief = [(socket.SOL_SOCKET, socket.SO_SNDBUF, 250_000)]  # what is sent is nearly there
        for scheme in ("http://", "https://"):
            self.get_adapter(scheme).init_poolmanager(9, 9, ssl_context=context, socket_options=brief)
        self.address = f"https://{HUB[1] if host in HUB else host}/v2/"
        if not self.verify:  # docker's rule for loopback: any certificate will do, or none and http
            requests.packages.urllib3.disable_warnings()
            try:
                self.get(self.address, timeout=10, verify=False)
            except requests.RequestException:
                self.address = self.address.replace("https", "http", 1)

    def ask(self, method, url, data=None, limit=60, again=True, headers=None, **options):
        """Send a request, to the registry or where it says. Returns the answer: to HEAD, 404 is one."""
        url = urljoin(self.address, url)
        own = self.authorization if url.startswith(self.address) else {}  # nobody else sees a password
        options |= {"headers": own | (headers or {}), "verify": self.verify, "timeout": (60, limit)}
        if hasattr(data, "seek"):
            data.seek(0)  # sent piece by piece; the first limit is for each
        try:
            answer = self.request(method, url, data=data, **options)
        except requests.RequestException as error:
            while error.__context__:
                error = error.__context__  # the first cause
            why = "it stalls: in a minute, nothing went through" if isinstance(error, TimeoutError) else error
            hint = "; see SSL_CERT_FILE and --tls-verify" if isinstance(error, ssl.SSLError) else ""
            raise ValueError(f"no registry answers at {urlsplit(url).netloc}: {why}{hint}") from error
        if (code := answer.status_code) == 401 and again and answer.url.startswith(self.address):
            self.authorization = self.authorize(answer.headers.get("Www-Authenticate", ""))
            return self.ask(method, url, data, limit, False, headers)
        if code < 400 or (method, code) == ("HEAD", 404):
            return answer
        why = ", ".join(re.findall(r'"message": *"([^"]+)', answer.text)) or f"{code} {answer.reason}"
        why += f"; docker login {self.host} may help{self.login.get('why', '')}" if 400 < code < 405 else ""
        name = re.sub(r"^https?://|\?.*", "", answer.url).replace("/v2/", " says of ")
        raise ValueError(f"{name.replace('/manifests/', ':')}: {why}")

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
            form["scope"] = " ".join(form["scope"])
            given = self.ask("POST", asked.get("realm"), form, again=False).json()
        else:
            given = self.ask("GET", asked.get("realm"), again=False, headers=basic, params=form).json()
        return {"Authorization": f"Bearer {given.get('token') or given['access_token']}"}

    def push(self, image, file, kind):
        """Upload an open file as an image's blob or manifest, and return its descriptor."""
        hashed = hashlib.sha256()
        for piece in iter(lambda: file.read(1 << 20), b""):
            hashed.update(piece)
        digest, size = f"sha256:{hashed.hexdigest()}", file.tell()
        is_blob, url = "manifest" not in kind, f"{image.path}/manifests/{image.reference}"
        there = is_blob and self.ask("HEAD", f"{image.path}/blobs/{digest}").ok
        if is_blob and not there:
            answer = self.ask("POST", f"{image.path}/blobs/uploads/")
            url = urljoin(answer.url, answer.headers["Location"])
            url += f"{'&' if '?' in url else '?'}digest={digest}"
        if not there:  # when all is sent, up to a megabyte may still be on its way
            self.ask("PUT", url, file, 60 + min(size, 1e6) / 1e4, headers={"Content-Type": kind})
        return {"mediaType": kind, "digest": digest, "size": size}
