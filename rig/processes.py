"""Programs that a test needs, starts or serves."""

import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from http.server import ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest
import torch

from rig.forks import FORKS, become


def need(program, package):
    """Skip the test where `program` is missing, and say which package has it."""
    if not shutil.which(program):
        skip(f"{program} is missing: install {package}")


def skip(reason):
    """Skip the test, or fail it where MNIST_REQUIRE is set: in CI everything has to be there."""
    (pytest.fail if os.environ.get("MNIST_REQUIRE") else pytest.skip)(reason)


def clean_environment(**changes):
    """Return this process's environment without anything that would make the trainer part of a job."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "PET_", "TORCHELASTIC_", "SLURM_")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    return environment | {"PYTHONUNBUFFERED": "1"} | {k: str(v) for k, v in changes.items()}


def shared_state():
    """Return, by name, what all code of this process shares, but the log's handlers: pytest changes those."""
    numbers, log = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT), logging.getLogger()
    return {
        "variables": dict(os.environ),
        "folder": os.getcwd(),
        "log": (log.level, log.manager.disable),
        "signals": [signal.getsignal(number) for number in numbers],
        "threads": torch.get_num_threads(),
    }


def free_port():
    """Return a port of this machine that nobody listens on."""
    # None of those that the system gives to whoever asks for any: it would not stay free.
    for port in random.sample(range(20000, 32000), 100):
        with suppress(OSError), socket.socket() as listener:
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


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


class Watched:
    """A process that is watched while it runs: what it prints goes to the file `log`."""

    @property
    def output(self):
        return self.log.read_text(errors="replace")

    def until(self, happened, timeout=90, pause=0.005):
        """Wait until `happened()`, or until a text is printed. Returns False if the process ends before."""
        wanted = (lambda: happened in self.output) if isinstance(happened, str) else happened
        limit = time.monotonic() + timeout
        while not wanted():
            if self.poll() is not None:
                return bool(wanted())
            assert time.monotonic() < limit, f"waited {timeout} s for {happened}; printed:\n{self.output}"
            time.sleep(pause)
        return True

    def end(self, timeout=120):
        """Wait for the end. Returns (exit code, all that was printed)."""
        try:
            return self.wait(timeout), self.output
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still runs after {timeout} s; printed:\n{self.output}") from None

    def family(self):
        """Return this process and those that it started, eldest first."""
        with suppress(psutil.NoSuchProcess):
            eldest = psutil.Process(self.pid)
            return [eldest, *eldest.children(recursive=True)]
        return []

    def kill_all(self):
        """Kill the process and all that it started, as a power cut would."""
        for process in self.family():
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.wait()


class Process(Watched, subprocess.Popen):
    """A command, watched."""

    def __init__(self, command, log, **how):
        self.log = Path(log)
        with open(self.log, "wb") as file:
            command = [str(word) for word in command]
            super().__init__(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, **how)


class Fork(Watched):
    """`python command…` as a fork, watched. Whose start or end is tested must be a Process instead."""

    def __init__(self, command, log, cwd, env, host=None):
        self.log = Path(log)
        self.log.write_bytes(b"")
        arguments = ([str(word) for word in command], self.log, str(cwd), env, host)
        self.process = FORKS.Process(target=become, args=arguments, daemon=True)
        self.process.start()
        self.pid = self.process.pid

    def poll(self):
        return self.process.exitcode

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.process.kill()


def fork(folder, *command, timeout=120, **changes):
    """Do what `run` does, sooner, with a Python file that needs no start of its own."""
    with tempfile.NamedTemporaryFile() as log:
        process = Fork(command, log.name, folder, clean_environment(**changes))
        try:
            return process.end(timeout)
        finally:
            process.kill_all()
