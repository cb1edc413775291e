"""The set-up: one source of truth for what is installed, however it is installed."""

import re
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT


def packages(file):
    """Return the names in a requirements file."""
    lines = (ROOT / file).read_text().splitlines()
    return [re.split(r"[ =<>;\[]", line)[0] for line in lines if re.match(r"[a-z]", line)]


def test_conda_names_no_package_of_its_own_but_python_and_pip():
    *own, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [re.split("[=<>]", name)[0] for name in own] == ["python", "pip"]
    assert pip == {"pip": ["-r requirements.txt"]}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev"])
def test_everything_asked_for_is_pinned_exactly(name):
    assert set(packages(f"{name}.in")) <= set(packages(f"{name}.txt"))
    pins = [line for line in (ROOT / f"{name}.txt").read_text().splitlines() if re.match(r"\w", line)]
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in pins)


def test_what_the_person_asked_for_is_there():
    asked = {"torch", "torchvision", "matplotlib", "numpy", "papermill", "jupyterlab", "ipython"}
    assert asked <= set(packages("requirements.in"))


def test_pins_exist_for_linux_macos_and_windows():
    pins = (ROOT / "requirements.txt").read_text()
    assert "sys_platform == 'win32'" in pins and "sys_platform == 'darwin'" in pins
    assert re.search(r"^torch==\S+ ; python_full_version < '3.11'", pins, re.M), "the pins of Python 3.10"


def test_the_trainer_imports_only_what_comes_with_torch_and_torchvision():
    imported = re.findall(r"^(?:import|from) (\w+)", (ROOT / "mnist.py").read_text(), re.M)
    others = {name for name in imported if name not in sys.stdlib_module_names}
    assert others == {"torch", "torchvision", "filelock"}  # torch itself requires filelock


def test_no_file_is_bound_to_one_registry():
    """Whoever has a mirror must be able to use it."""
    for file in [
        *ROOT.glob("requirements*"),
        ROOT / "Makefile",
        ROOT / "Dockerfile",
        ROOT / "environment.yml",
    ]:
        assert not re.search(r"index-url|https?://\S*(pypi|whl)", file.read_text()), file


def test_every_link_to_a_file_leads_somewhere():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md")]:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.relative_to(ROOT)} links to {link}"


def test_the_layout_in_the_readme_is_that_of_the_repository():
    layout = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    names = [name for line in layout.strip().splitlines() for name in line.split("  ")[0].split(", ")]
    missing = [name for name in names if "*" not in name and not Path(ROOT, name).exists()]
    assert not missing
