"""What pytest gives to the tests of all modules: a small project to train in."""

import shutil

import pytest

from tests.rig.engine import running_engine
from tests.rig.faults import Project
from tests.rig.project import make_small_project


@pytest.fixture(scope="session")
def small_template(tmp_path_factory):
    return make_small_project(tmp_path_factory.mktemp("small"))


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
