"""The set-up: one source of truth for what is installed, however it is installed."""

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from functools import partial
from pathlib import Path

import pip
import pytest
import yaml

from rig.processes import need, skip
from rig.project import RAW, ROOT


def test_conda_names_no_package_of_its_own_but_python_and_pip():
    *own, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert [re.split("[=<>]", name)[0] for name in own] == ["python", "pip"]
    assert pip == {"pip": ["-r requirements.txt"]}


@pytest.mark.parametrize("name", ["requirements", "requirements-dev", "requirements-bench"])
def test_everything_asked_for_is_pinned_exactly(name):
    asked, pins = (re.findall(r"^\w.*", (ROOT / f"{name}.{end}").read_text(), re.M) for end in ("in", "txt"))
    assert all(re.match(r"[\w.-]+==[\w.]+( ; .+)?$", pin) for pin in pins)
    names = [{re.split(r"[ =<>;\[]", line)[0] for line in lines} for lines in (asked, pins)]
    assert names[0] <= names[1]


def test_pins_exist_for_linux_macos_and_windows():
    pins = (ROOT / "requirements.txt").read_text()
    assert "sys_platform == 'win32'" in pins and "sys_platform == 'darwin'" in pins
    assert re.search(r"^torch==\S+ ; python_full_version < '3.11'", pins, re.M), "the pins of Python 3.10"


def test_the_trainer_imports_only_what_comes_with_torch_and_torchvision():
    imported = re.findall(r"^(?:import|from) (\w+)", (ROOT / "mnist.py").read_text(), re.M)
    others = {name for name in imported if name not in sys.stdlib_module_names}
    assert others == {"torch", "filelock"}  # torch itself requires filelock


def test_no_file_is_bound_to_one_registry():
    """Whoever has a mirror must be able to use it."""
    others = [ROOT / name for name in ("Makefile", "Dockerfile", "environment.yml")]
    for file in [*ROOT.glob("requirements*"), *others]:
        assert not re.search(r"index-url[= ]|https?://\S*(pypi|whl)", file.read_text()), file


def test_every_link_to_a_file_leads_somewhere():
    pages = [*ROOT.glob("*.md"), *ROOT.glob("[!.]*/**/*.md"), ROOT / "notebooks" / "mnist.ipynb"]
    for page in pages:
        text = re.sub(r'<img src="([^"]+)"', r"](\1)", page.read_text())
        for link, title in re.findall(r"\]\((?!https?:|#)([^)#\\]+)#?([^)]*)\)", text):
            target = page.parent / link
            assert target.exists(), f"{page.relative_to(ROOT)} links to {link}"
            if title and target.suffix == ".md":
                titles = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
                known = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in titles}
                assert title in known, f"{page.relative_to(ROOT)} links to {link}#{title}"


def test_the_layout_in_the_readme_is_that_of_the_repository():
    layout = (ROOT / "README.md").read_text().split("## What is where")[1].split("```")[1]
    names = [name for line in layout.strip().splitlines() for name in line.split("  ")[0].split(", ")]
    missing = [name for name in names if "*" not in name and not Path(ROOT, name).exists()]
    assert not missing


# --- make ---------------------------------------------------------------------------------------


def with_makefile(folder):
    """Make `folder` a project in which make has done nothing yet; Pythons find pip without a copy of it."""
    need("make", "make")
    (folder / "modules").mkdir()
    (folder / "modules/pip").symlink_to(Path(pip.__file__).parent)
    for name in ("Makefile", "requirements.in", "requirements.txt"):
        shutil.copy(ROOT / name, folder)


def make_begun(folder):
    """Make `folder` a project in which make has got as far as uv: next, it installs packages."""
    with_makefile(folder)
    venv.create(folder / ".venv")
    shutil.copy(Path(sys.executable).with_name("uv"), folder / ".venv/bin/uv")
    (folder / ".venv/uv").touch()


def make(folder, *arguments, within=(), **variables):
    """Run make, perhaps within another command, with none of the settings of pip and uv but these."""
    command = [*within, "make", "--no-print-directory", *arguments]  # for make may have started the tests
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment |= {"PYTHONPATH": f"{folder}/modules"} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)


# Runs the arguments where there is no network but an index, which is empty and prints what it is asked for.
MIRROR = """
import http.server, subprocess, sys, threading
subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.exit(subprocess.run(sys.argv[1:]).returncode)
"""


def test_pips_index_is_also_uvs(tmp_path):
    """A company's mirror, an empty one here, is the only way out of a machine without any other network."""
    need("unshare", "util-linux")
    need("ip", "iproute2")
    if os.geteuid():
        skip("root is missing, and without it no network can be taken away")
    make_begun(tmp_path)
    within = ["unshare", "--net", "--pid", "--fork", "--kill-child", sys.executable, "-c", MIRROR]
    index = {"PIP_INDEX_URL": "http://127.0.0.1:8000/simple", "UV_HTTP_RETRIES": "0"}
    made = make(tmp_path, ".venv/notebook", within=within, **index)
    assert '"GET /simple/torch/ HTTP/1.1" 404' in made.stderr, made.stderr
    assert made.returncode == 2 and "torch was not found in the package registry" in made.stderr, made.stderr


def test_uv_goes_into_the_environment_or_make_stops_whatever_pips_settings_say(tmp_path):
    """Pip finds a package named uv, a stand-in, in a folder."""
    wheel, about = tmp_path / "index" / "uv-0.13.8-py3-none-any.whl", "uv-0.13.8.dist-info/"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        program = zipfile.ZipInfo("uv-0.13.8.data/scripts/uv")
        program.external_attr = 0o100755 << 16
        archive.writestr(program, "#!/bin/sh\nexit 0\n")
        archive.writestr(about + "METADATA", "Metadata-Version: 2.1\nName: uv\nVersion: 0.13.8\n")
        archive.writestr(about + "WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(about + "RECORD", "")
    with_makefile(tmp_path)
    settings = tmp_path / "pip.conf"
    settings.write_text(f"[install]\ntarget = {tmp_path / 'elsewhere'}\n")
    index = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheel.parent)}
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@" --without-pip\n')  # -m venv .venv
    python.chmod(0o755)
    made = partial(make, tmp_path, f"PYTHON={python}", ".venv/uv", **index)
    stopped = made(PIP_CONFIG_FILE=str(settings))
    assert stopped.returncode == 2 and not (tmp_path / ".venv/uv").exists()
    assert "pip has put uv elsewhere: its settings (pip config list) must not say where.\n" in stopped.stderr
    done = made(PIP_TARGET=str(tmp_path / "elsewhere"), PIP_USER="1")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / ".venv/bin/uv").exists() and (tmp_path / ".venv/uv").exists()


def test_a_python_that_is_gone_is_one_sentence(tmp_path):
    make_begun(tmp_path)
    for python in (tmp_path / ".venv/bin").glob("python*"):
        python.unlink()
    (tmp_path / ".venv/bin/python").symlink_to(tmp_path / "gone")
    made = make(tmp_path, "notebook")
    assert made.returncode == 2 and made.stdout == ""
    assert re.fullmatch(r"Makefile:\d+: \*\*\* The Python .* is gone: remove \.venv, .*\n", made.stderr)


def test_a_project_that_is_moved_keeps_what_was_installed(tmp_path):
    (tmp_path / "before").mkdir()
    make_begun(tmp_path / "before")
    moved = (tmp_path / "before").rename(tmp_path / "moved")
    shown = make(moved, "--eval=show:; $(BIN)/python -c 'import sys; print(sys.prefix)'", "show")
    assert shown.returncode == 0 and str(moved / ".venv") in shown.stdout, shown.stderr
    programs = re.findall(r"\$\(BIN\)/([\w-]+)", (ROOT / "Makefile").read_text())
    assert set(programs) == {"python", "uv"}  # scripts have the old place in their first line


def test_a_clone_has_the_same_line_ends_whatever_git_is_set_to(tmp_path):
    need("git", "git")
    clone = ["git", "clone", "--quiet", "--config", "core.autocrlf=true", "--depth=1", f"file://{ROOT}"]
    subprocess.run([*clone, tmp_path / "clone"], check=True)
    for name in ("docker/run.sh", "mnist.py", "notebooks/mnist.ipynb", str(RAW / "SHA256SUMS"), "Makefile"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes(), name
    for archive in (ROOT / RAW).glob("*.gz"):
        assert (tmp_path / "clone" / RAW / archive.name).read_bytes() == archive.read_bytes()
