"""Programs that a test needs, starts or serves."""

import os
import shutil
import socket
import subprocess
import sys
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from threading import Thread

import pytest


def need(program, package):
    """Skip the test where `program` is missing, and say which package has it."""
    if not shutil.which(program):
        skip(f"{program} is missing: install {package}")


def skip(reason):
    """Skip the test, or fail it where MNIST_REQUIRE is set: in CI everything has to be there."""
    (pytest.fail if os.environ.get("MNIST_REQUIRE") else pytest.skip)(reason)


def clean_environment(**changes):
    """Return this process's environment without anything that would make the trainer part of a job."""
    ours = (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
        "PET_",
        "TORCHELASTIC_",
        "SLURM_",
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return environment | {"PYTHONUNBUFFERED": "1"} | {k: str(v) for k, v in changes.items()}


def free_port():
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(handler):
    """Serve HTTP on loopback with a class of handlers, which say nothing, and yield the address."""
    quiet = type("Quiet", (handler,), {"log_message": lambda *_: None})
    server = ThreadingHTTPServer(("127.0.0.1", 0), quiet)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def start(folder, *command, **changes):
    """Start `python command…` in `folder`; standard output and error come as one text stream."""
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env=clean_environment(**changes),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(folder, *command, timeout=120, **changes):
    """Run `python command…` in `folder`. Returns (exit code, all that it printed)."""
    process = start(folder, *command, **changes)
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        pytest.fail(f"{command} still ran after {timeout} s; it printed:\n{process.communicate()[0]}")
    return process.returncode, output
