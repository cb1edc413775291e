"""Engines for which a person has another number inside a container than outside."""

import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from rig.processes import need, skip
from rig.project import ROOT

PERSON = 1234
# How each is started. The files in /etc, which say whose numbers are whose, are seen in this script only.
DAEMON = "dockerd --host unix://$PWD/run/socket --group 1234 --pidfile $PWD/run/pid --bridge=none"
DAEMON += " --data-root $PWD/home/data --exec-root $PWD/run/exec --iptables=false --ip-forward=false"
OWN = "rm -f /run/docker /run/containerd"  # links to those of the machine
LOG = ">$PWD/run/log 2>&1"
ROOTLESS = "rootlesskit --net=host --copy-up=/etc --copy-up=/run --state-dir=$PWD/run/kit"
ENGINES = {
    "docker without root": f'person {ROOTLESS} sh -c "{OWN}; exec {DAEMON} {LOG}" &',
    "docker with other users": f"{DAEMON} --userns-remap=person {LOG} &",
    "podman called docker": "printf '#!/bin/sh\nexec podman \"$@\"\n' >bin/docker; chmod 755 bin/docker",
}
SCRIPT = """
for name in passwd group subuid subgid; do mount --bind $name /etc/$name; done
person() {
    setpriv --reuid 1234 --regid 1234 --clear-groups env HOME=$home XDG_RUNTIME_DIR=$home/../run \\
        DOCKER_HOST=unix://$home/../run/socket PATH="$home/../bin:/usr/sbin:/usr/bin:/sbin:/bin" "$@"
}
home=$PWD/home
ENGINE
for _ in $(seq 150); do ! person docker info >/dev/null 2>&1 || break; sleep 0.2; done
person docker import --change 'USER 1000:0' tiny.tar localhost/tiny >run/import 2>&1 || cat run/import run/log
cd project
person "$@"
"""
PODMANS = """
[containers]
netns = "host"
default_ulimits = ["nofile=4096:4096", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
events_logger = "file"
"""


def run_where_numbers_differ(engine, *command, timeout=120):
    """Run a command as a person, in a folder with docker/run.sh, where docker is the engine of this name.

    It knows an image localhost/tiny with a shell and ls. Returns (exit code, all that was printed, the
    numbers of the owners of all that is in the folder output).
    """
    need("rootlesskit", "rootlesskit")
    need("newuidmap", "uidmap")
    need("podman" if engine.startswith("podman") else "dockerd", "docker.io and podman")
    if os.geteuid():
        skip("root is missing, and without it nobody gets other numbers")
    folder = Path(tempfile.mkdtemp(prefix="users.", dir="/var/tmp"))
    try:
        folder.chmod(0o711)
        for name in ("home/.config/containers", "run", "bin", "project"):
            (folder / name).mkdir(parents=True)
        shutil.copytree(ROOT / "docker", folder / "project/docker")
        (folder / "home/.config/containers/containers.conf").write_text(PODMANS)
        more = {"passwd": f"person:x:1234:1234::{folder}/home:/bin/sh\n", "group": "person:x:1234:\n"}
        for name in ("passwd", "group", "subuid", "subgid"):
            (folder / name).write_text(more.get(name, "person:200000:65536\n"))
        for name in more:
            (folder / name).write_text(Path("/etc", name).read_text() + more[name])
        make_tiny_image(folder / "tiny.tar")
        for name in ("home", "run", "bin", "project"):
            subprocess.run(["chown", "--recursive", "1234:1234", folder / name], check=True)
        world = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-euc"]
        run = subprocess.run(
            [*world, SCRIPT.replace("ENGINE", ENGINES[engine]), "bash", *command],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
        )
        return (
            run.returncode,
            run.stdout,
            {path.stat().st_uid for path in folder.rglob("project/output/**/*")},
        )
    finally:
        shutil.rmtree(folder)


def make_tiny_image(path):
    """Write a file system with a shell and ls, and what they need, to a tar file."""
    programs = ["/bin/sh", "/bin/ls"]
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=True).stdout
    libraries = [word for word in listed.split() if word.startswith("/") and not word.endswith(":")]
    with tarfile.open(path, "w", dereference=True) as tar:
        for name in sorted({*programs, *libraries}):
            tar.add(name)
