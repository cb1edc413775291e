"""A client for registries of images: that of the library oras, with docker's passwords and docker's rules."""

import json
import os
import re
from functools import partial
from pathlib import Path

from oras.auth.utils import parse_auth_header
from oras.container import Container
from oras.provider import Registry

HUB = "registry-1.docker.io"  # where Docker Hub answers; docker's configuration calls it index.docker.io


def parse(name):
    """Split an image's name into its parts, as docker does. Raises ValueError."""
    image = Container(name, HUB)
    if image.registry in ("docker.io", "index.docker.io", HUB):
        image.registry, image.namespace = HUB, image.namespace or "library"
    return image


def read_config():
    """Return the passwords of docker's configuration file, in oras's form. Raises ValueError."""
    path = Path(os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker"), "config.json")
    try:
        known = json.loads(path.read_text()) if path.exists() else {}
        passwords = {name: known.get(name) or {} for name in ("auths", "credHelpers")}
        return passwords | {"credsStore": known.get("credsStore")}
    except (AttributeError, ValueError) as error:
        raise ValueError(f"{path} is not docker's configuration: {error}") from error


class Client(Registry):
    """The registry at `host`. Its methods raise ValueError, with a sentence, if it refuses something."""

    def __init__(self, host):
        loopback = re.fullmatch(r"(localhost|127(\.\d+){3})(:\d+)?", host)
        super().__init__(insecure=bool(loopback))  # docker's own rule: no https is needed on loopback
        self.address = f"{self.prefix}://{host}/"
        self.session.trust_env = not loopback  # a proxy is only for other hosts
        self.session.auth = lambda request: request  # and ~/.netrc is never read
        self.session.request = partial(self.session.request, timeout=60)
        self.auth.authenticate_request, self.auth.load_configs = self.authenticate, lambda *_: None
        self.auth._auth_config = read_config()
        name = "index.docker.io" if host == HUB else host
        any(self.auth._load_auth(each) for each in (name, f"https://{name}", f"https://{name}/v1/"))

    def authenticate(self, answer, headers, refresh=True):
        """Give this registry, and no other, what it asks for: the password, or a token for this request."""
        if not answer.url.startswith(self.address):
            return headers, True
        challenge = answer.headers.get("Www-Authenticate", "")
        password = getattr(self.auth, "_basic_auth", None)
        if challenge.lower().startswith("basic "):
            headers = {**headers, "Authorization": f"Basic {password}"}
        elif "realm=" in challenge:
            ask = self.auth.request_token if password else self.auth.request_anonymous_token
            self.auth.token = ask(parse_auth_header(challenge))
            headers = {**headers, "Authorization": f"Bearer {self.auth.token}"}
        return headers, True

    def do_request(self, url, method="GET", headers=None, **options):
        """Send a request once (oras would retry for two minutes), and return the answer."""
        host, _, name = url.split("://")[1].split("?")[0].replace("/manifests/", ":").partition("/v2/")
        if not url.startswith(self.address):  # an upload elsewhere needs no token, and must not see it
            self.auth.token = None
        headers = {key: value for key, value in (headers or {}).items() if key != "Authorization"}
        try:
            answer = Registry.do_request.__wrapped__(self, url, method, headers=headers, **options)
        except OSError as error:
            raise ValueError(f"no registry answers at {host}: {error}") from error
        if answer.status_code >= 400 and method != "HEAD":
            hint = f"; docker login {host} may help" if answer.status_code in (401, 403, 404) else ""
            raise ValueError(f"{host} says of {name}: {reason(answer)}{hint}")
        return answer


def reason(answer):
    """Return why a registry refuses something, in its own words if it has any."""
    try:
        return ", ".join(error["message"] for error in answer.json()["errors"])
    except (LookupError, TypeError, ValueError):
        return f"{answer.status_code} {answer.reason}"
