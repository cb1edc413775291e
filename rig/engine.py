"""A container engine for the tests: the one that runs here, or else one of our own while they last."""

import os
import shutil
import subprocess
import tempfile
import time
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

import pytest

from rig.processes import skip
from rig.project import ROOT

BASE_IMAGE = "python:3.11-slim"  # the Dockerfile's default
DISK_SPACE = 20e9  # bytes: both images, what is built on the way, and some air
BUILD = ("--network=host", "--build-arg=UV_TORCH_BACKEND")  # of which this environment knows the value
# No thread of a container spins either, as in tests/conftest.py, and none waits for another.
SHARING = ("--env=OMP_WAIT_POLICY=PASSIVE", "--env=OMP_NUM_THREADS=1")
PERSON = 1234  # who uses an engine of our own, for people seldom are root


class Engine:
    """The command line of docker or podman, and who uses it: options for subprocess."""

    def __init__(self, program, person=None, **environment):
        self.program = program
        self.person = person or {}
        self.environment = os.environ | {"DOCKER_BUILDKIT": "1"} | environment

    def works(self):
        """Return whether there is such an engine, and it answers."""
        return shutil.which(self.program) is not None and self("info")[0] == 0

    def start(self, *arguments, **options):
        """Start the engine's program; standard output and error come as one text stream."""
        return subprocess.Popen(
            [self.program, *map(str, arguments)],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )

    def __call__(self, *arguments, timeout=300, **options):
        """Run the engine's program. Returns (exit code, all that it printed)."""
        with self.start(*arguments, **options) as process:
            try:
                output, _ = process.communicate(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                output, _ = process.communicate()
                pytest.fail(f"{arguments} still ran after {timeout} s; it printed:\n{output}")
        return process.returncode, output

    def must(self, *arguments, **options):
        """Run the engine's program and return what it printed; the test fails if the program does."""
        code, output = self(*arguments, **options)
        assert code == 0, output
        return output

    def build(self, tag, *arguments, context):
        """Build an image."""
        self.must("build", *BUILD, "--tag", tag, *arguments, context, timeout=900)


@contextmanager
def running_engine():
    """Yield an engine that has the Dockerfile's base image; skip where neither can be had.

    The engine is the docker that runs here, one of our own, or podman. MNIST_BASE_IMAGE_TAR names a
    file system to use as base image where no registry can be reached.
    """
    with ExitStack() as stack:
        if Engine("docker").works():
            engine = Engine("docker")
        elif shutil.which("dockerd") and os.geteuid() == 0:
            engine = stack.enter_context(own_docker())
        elif Engine("podman").works():
            engine = Engine("podman")
        else:
            skip("no container engine runs here: install docker.io, and be root, or podman")
        get_base_image(engine)
        yield engine


@contextmanager
def own_docker():
    """Start a Docker engine that keeps to a folder and a bridge of its own, and leaves the firewall alone."""
    folder = Path(tempfile.mkdtemp(prefix="engine.", dir="/var/tmp"))  # not /tmp: that may be in memory
    folder.chmod(0o711)
    socket = f"unix://{folder}/socket"
    data, disk = folder / "data", folder / "disk"
    command = ["dockerd", "--host", socket, "--group", str(PERSON), "--pidfile", folder / "pid"]
    command += ["--data-root", data, "--exec-root", folder / "exec"]
    command += ["--iptables=false", "--ip-forward=false"]
    # Not docker0: tests in another file may have an engine, too, and delete its bridge when they end.
    bridge, address = f"engine{os.getpid()}", f"10.99.{os.getpid() % 256}.1/24"
    command += ["--bridge", bridge]
    try:
        if shutil.disk_usage(folder).free < DISK_SPACE:
            skip(f"images need {DISK_SPACE / 1e9:.0f} GB of free disk space in {folder.parent}")
        # Where that can be, all images are in one file: a hundred thousand may take minutes to remove.
        data.mkdir()
        if shutil.which("mkfs.ext4"):
            disk.touch()
            os.truncate(disk, 2 * int(DISK_SPACE))
            subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", disk])
            subprocess.run(["mount", "-o", "loop,noatime,noinit_itable", disk, data])
        subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], check=True)
        subprocess.run(["ip", "address", "add", address, "dev", bridge], check=True)
        with open(folder / "log", "w") as log, subprocess.Popen(command, stdout=log, stderr=log) as daemon:
            try:
                # The package's own client: another that comes first on the path may lack what builds need.
                person = {"user": PERSON, "group": PERSON, "extra_groups": []}
                engine = Engine("/usr/bin/docker", person, DOCKER_HOST=socket)
                deadline = time.monotonic() + 60
                while not engine.works():
                    if daemon.poll() is not None or time.monotonic() > deadline:
                        pytest.fail("dockerd does not start:\n" + (folder / "log").read_text())
                    time.sleep(0.2)
                yield engine
            finally:
                daemon.terminate()
    finally:
        for mount in reversed(mounts_below(folder)):
            subprocess.run(["umount", mount])
        subprocess.run(["ip", "link", "delete", bridge], capture_output=True)
        subprocess.run(["rm", "-rf", folder])  # rmtree takes half a minute


@contextmanager
def persons_project(engine):
    """Yield a copy of the project, which belongs to a person who is not root if that can be arranged."""
    folder = Path(tempfile.mkdtemp(prefix="person.", dir="/var/tmp"))
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in filter(None, names.stdout.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    (folder / "output").mkdir()
    give(engine, folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def give(engine, folder):
    """Give a folder to the person who uses the engine, if that is somebody else."""
    if engine.person:
        subprocess.run(["chown", "--recursive", f"{PERSON}:{PERSON}", folder], check=True)


@cache
def with_packages(engine):
    """Return options that give a container this environment's packages, for an image built without any."""
    packages = Path(pytest.__file__).parents[1]
    there = engine.must("run", "--rm", "--network=none", "--entrypoint=ls", BASE_IMAGE, "/usr/local/lib")
    if packages.parent.name not in there.split():
        pytest.skip(f"{BASE_IMAGE} has another Python than {packages}")
    return f"--volume={packages}:/packages:ro", "--env=PYTHONPATH=/packages", *SHARING


def mounts_below(folder):
    """Return the mount points that the engine has left below `folder`."""
    points = (line.split()[1] for line in Path("/proc/mounts").read_text().splitlines())
    return [point for point in points if point.startswith(f"{folder}/")]


def get_base_image(engine):
    """Import or pull the base image, unless it is there."""
    if engine("image", "inspect", BASE_IMAGE)[0] == 0:
        return
    if archive := os.environ.get("MNIST_BASE_IMAGE_TAR"):
        path = "PATH=/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
        engine.must("import", "--change", "ENV LANG=C.UTF-8", "--change", f"ENV {path}", archive, BASE_IMAGE)
    elif engine("pull", BASE_IMAGE)[0] != 0:
        skip(f"{BASE_IMAGE} cannot be pulled, and MNIST_BASE_IMAGE_TAR names no substitute")
