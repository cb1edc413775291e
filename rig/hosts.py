"""Hosts to test on: network namespaces with their own address, name and /etc/hosts, on a bridge of their own.

    with PyTorchJob(folder, workers=2) as job:
        master, worker_0, worker_1 = job.hosts
        processes = job.start("mnist.py", "--epochs", 1)
        worker_0.cut()

What starts on one finds the environment variables that the operator of a PyTorchJob gives to its pods.
Needs root and iproute2; the network of the machine itself stays untouched.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from rig.operators import pods_of
from rig.processes import Fork, Process, need, skip


def ip(*words):
    """Run iproute2's `ip`. Returns what it prints."""
    command = ["ip", *map(str, words)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


class Host:
    """A network namespace with its own address and host name; `environment` is what processes on it find.

    Others may know it by another name than it does itself: that of its service.
    """

    def __init__(self, name, number, bridge, service=None):
        self.name, self.bridge, self.link = name, bridge, f"v{number}"
        self.service = service or name
        self.address = f"10.77.0.{10 + number}"
        self.environment = {"PATH": os.environ["PATH"], "HOME": "/root", "HOSTNAME": name}
        self.etc = Path("/etc/netns", name)  # `ip netns exec` mounts its files over those in /etc

    def __enter__(self):
        with ExitStack() as undo:
            ip("netns", "add", self.name)
            undo.callback(self.remove)
            ip("-n", self.bridge, "link", "add", self.link, "type", "veth",
               "peer", "name", "eth0", "netns", self.name)  # fmt: skip
            ip("-n", self.bridge, "link", "set", self.link, "master", "br0", "up")
            ip("-n", self.name, "addr", "add", f"{self.address}/24", "dev", "eth0")
            ip("-n", self.name, "link", "set", "lo", "up")
            ip("-n", self.name, "link", "set", "eth0", "up")
            self.etc.mkdir(parents=True)
            (self.etc / "nsswitch.conf").write_text("hosts: files\n")
            self.know([self])
            undo.pop_all()
        return self

    def __exit__(self, *_):
        self.kill()
        self.remove()

    def remove(self):
        """Take the namespace and its files away."""
        ip("netns", "del", self.name)
        for path in self.etc.glob("*"):
            path.unlink()
        with suppress(FileNotFoundError):
            self.etc.rmdir()

    def know(self, hosts):
        """Let this host find these hosts by name, and no others."""
        lines = ["127.0.0.1 localhost", f"{self.address} {self.name}"]
        lines += [f"{host.address} {host.service}" for host in hosts]
        (self.etc / "hosts").write_text("\n".join(dict.fromkeys(lines)) + "\n")

    def cut(self):
        """Pull the network cable."""
        ip("-n", self.bridge, "link", "set", self.link, "down")

    def kill(self):
        """Kill all that runs on this host, as a power cut would."""
        for pid in ip("netns", "pids", self.name).split():
            with suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def start(self, folder, *command, **changes):
        """Start `python command…` in `folder` on this host."""
        # A pod knows itself by its own name; gloo looks it up to find the network that it should use.
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"', self.name]
        command = ["ip", "netns", "exec", self.name, *named, sys.executable, *command]
        return Process(command, **self.place(folder, changes))

    def fork(self, folder, *command, **changes):
        """Do the same, sooner: it is no program of its own."""
        return Fork(command, **self.place(folder, changes), host=self.name)

    def place(self, folder, changes):
        """Return where a process writes and is, and its environment."""
        log = Path(folder, f"{self.name}.{secrets.token_hex(2)}.log")
        return {"log": log, "cwd": folder, "env": self.environment | {k: str(v) for k, v in changes.items()}}


class Network:
    """Hosts on a bridge of their own, which find each other by name."""

    def __init__(self, name, pods):
        self.name, self.bridge = name, f"{name}-bridge"
        self.hosts = [Host(pod.name, number, self.bridge, pod.service) for number, pod in enumerate(pods, 1)]
        for host, pod in zip(self.hosts, pods, strict=True):
            host.environment |= pod.variables

    def __enter__(self):
        with ExitStack() as undo:
            ip("netns", "add", self.bridge)
            undo.callback(ip, "netns", "del", self.bridge)
            ip("-n", self.bridge, "link", "add", "br0", "type", "bridge")
            ip("-n", self.bridge, "link", "set", "br0", "up")
            for host in self.hosts:
                undo.enter_context(host)
            for host in self.hosts:
                host.know(self.hosts)
            self.undo = undo.pop_all()
        return self

    def __exit__(self, *error):
        return self.undo.__exit__(*error)


def need_hosts():
    """Skip the test where no hosts can be made, and say what is missing."""
    need("ip", "iproute2")
    need("unshare", "util-linux")
    if os.geteuid():
        skip("root is missing, and without it no network namespace can be made")
    try:
        with PyTorchJob("/", workers=0):
            pass
    except subprocess.CalledProcessError as error:
        skip(f"the right to make network namespaces is missing: {error.stderr}")


def new_name():
    """Return a name for a job that no other has, so that tests can run beside each other."""
    return f"mnist-{secrets.token_hex(3)}"


class PyTorchJob(Network):
    """The pods of a PyTorchJob: a master and workers, or workers alone if the job is elastic.

    `elastic` is (fewest workers, most workers, restarts).
    """

    def __init__(self, folder, workers=2, elastic=None, processes_per_node="auto"):
        replicas = {"Worker": {"replicas": workers}}
        spec = {"nprocPerNode": processes_per_node, "pytorchReplicaSpecs": replicas}
        if elastic:
            names = ("minReplicas", "maxReplicas", "maxRestarts")
            spec["elasticPolicy"] = dict(zip(names, elastic, strict=True))
        else:
            replicas["Master"] = {"replicas": 1}
        name = new_name()
        super().__init__(name, pods_of({"kind": "PyTorchJob", "metadata": {"name": name}, "spec": spec}))
        self.folder = folder

    def start(self, *command, **changes):
        """Start `python command…` in every pod. Returns the processes."""
        return [host.start(self.folder, *command, OMP_NUM_THREADS=1, **changes) for host in self.hosts]

    def fork(self, *command, **changes):
        """Do the same, sooner: they are no programs of their own."""
        return [host.fork(self.folder, *command, OMP_NUM_THREADS=1, **changes) for host in self.hosts]


def end(processes, timeout=120):
    """Wait for all. Returns (their exit codes, what each printed)."""
    limit = time.monotonic() + timeout
    codes, printed = zip(*(p.end(max(0.1, limit - time.monotonic())) for p in processes), strict=True)
    return list(codes), list(printed)
