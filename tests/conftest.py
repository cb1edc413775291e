"""What pytest gives to the tests of all modules: an order, small projects to train in, a container engine."""

import os
import shutil
import signal
import urllib.request

# Tests share two processors. A thread that waits for another must leave its own to them, not spin.
# PyTorch reads this when it is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

import mnist
from rig.engine import running_engine
from rig.hosts import need_hosts
from rig.processes import shared_state
from rig.project import make_small_project
from rig.training import TEST, TRAIN, Project

# The longest modules begin first, so the workers end at about the same time. Those that mostly wait, slurm
# and lost_workers, run beside others that need the processors.
LONG = ["notebook", "image", "slurm", "question_answering", "manifests_run", "lost_workers", "browser"]
LONG += ["recovery", "registry", "gpu", "several_hosts", "trainer"]
LONG = [f"test_{name}" for name in LONG]


def pytest_configure():
    """Hear Ctrl-C, which some tests send: what a shell starts in the background is deaf to it.

    And take as many threads as the trainer would: it does not give them back.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(min(torch.get_num_threads(), mnist.count_processors()))


@pytest.hookimpl(tryfirst=True)  # -m then finds the marks
def pytest_collection_modifyitems(items):
    """Begin with what is long; mark what has the fixture `engine` or `hosts`."""
    for item in items:
        for name in {"engine", "hosts"} & set(item.fixturenames):
            item.add_marker(name)
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(autouse=True)
def nothing_is_left():
    """A test gives back what all tests of its process share; otherwise a later one fails, in some orders."""

    def shared():
        state = shared_state()
        for name in ("PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"):  # pytest's and PyTorch's own
            state["variables"].pop(name, None)
        return state

    urllib.request.install_opener(None)  # it keeps the proxies of the process's first download
    before = shared()
    yield
    assert shared() == before


@pytest.fixture(scope="session")
def small_template(tmp_path_factory):
    return make_small_project(tmp_path_factory.mktemp("small"), TRAIN, TEST)


@pytest.fixture
def small(small_template, tmp_path):
    """A fresh project of 1,000 training and 500 test images: an epoch takes about a second."""
    return shutil.copytree(small_template, tmp_path / "project")


@pytest.fixture(scope="session")
def project(small_template, tmp_path_factory):
    """A small project that remembers how a training ends to which nothing happens."""
    return Project(shutil.copytree(small_template, tmp_path_factory.mktemp("trained") / "project"))


@pytest.fixture(scope="module")
def engine():
    """A container engine that has the Dockerfile's base image."""
    with running_engine() as engine:
        yield engine


@pytest.fixture(scope="session")
def hosts():
    """The right and the tools to make hosts: see rig/hosts.py."""
    need_hosts()
