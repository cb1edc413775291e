"""A new image without an engine: docker/append.py and the notebook's cells, with a registry and an engine."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time

import pytest

from rig.api_server import ApiServer
from rig.engine import BASE_IMAGE, with_packages
from rig.guide import run_chapter, with_more
from rig.images import pushed, running_registry
from rig.processes import need
from rig.project import ROOT, make_small_project
from rig.tutorial import ON_A_SLICE, PARTS, WITHOUT_TRAINING, submit_in

# One line of the log, changed.
BEFORE, CHANGED = "Test accuracy: ", "Accuracy in the test: "
FEW = "--build-arg=REQUIREMENTS=requirements-few.in"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("registry") / "registry"


@pytest.fixture(scope="module")
def registry(folder):
    with running_registry(folder) as address:
        yield address


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The project, with few digits, and with a list of packages in which there is hardly one."""
    folder = make_small_project(tmp_path_factory.mktemp("project") / "project", 200, 100)
    for path in ("Dockerfile", ".dockerignore", "LICENSE", "requirements.txt", "docker"):
        (shutil.copytree if (ROOT / path).is_dir() else shutil.copy)(ROOT / path, folder / path)
    (folder / "requirements-few.in").write_text("filelock\n")
    return folder


@pytest.fixture(scope="module")
def base(engine, registry, project, tmp_path_factory):
    """The trainer's image in the registry, built on Debian's Python. PyTorch is mounted where it trains."""
    marker = "$(python3 -c 'import sysconfig; print(sysconfig.get_path(\"stdlib\"))')/EXTERNALLY-MANAGED"
    change = f'printf "[externally-managed]\\n" > "{marker}" && rm "$(command -v python)"'
    debian, name = tmp_path_factory.mktemp("debian"), f"{registry}/you/mnist:1"
    (debian / "Dockerfile").write_text(f"FROM {BASE_IMAGE}\nRUN {change}\n")
    engine.build("debian-python", context=debian)
    engine.build(name, "--build-arg=BASE_IMAGE=debian-python", FEW, context=project)
    engine.must("push", name)
    return name


def look(engine, image):
    """Pull an image, and return what it starts, and the files of its /app with sizes, modes and owners."""
    engine.must("pull", image)
    config = json.loads(engine.must("image", "inspect", image))[0]["Config"]
    find = ("--entrypoint=find", image, "/app", "/usr/local/bin/dumb-init", "-printf", "%p %s %M %u:%g\n")
    files = engine.must("run", "--rm", *find)
    settings = {name: config[name] for name in ("User", "WorkingDir", "Entrypoint", "Cmd")}
    return settings | {"Env": sorted(config["Env"])}, set(files.splitlines())


def test_debian_s_own_python_is_a_base_too(engine, base):
    """It takes packages from apt alone unless told otherwise, and is called python3."""
    engine.must("run", "--rm", "--network=none", "--entrypoint=python", base, "-c", "import filelock")


@pytest.mark.parametrize("name", ["you/mnist:changed", "somebody/else:1"])
def test_a_change_is_sent_alone_within_seconds_and_runs(name, engine, registry, base, folder, tmp_path):
    """Into the base's repository, and into another."""

    def stored():
        return sum(path.stat().st_size for path in folder.rglob("data") if path.is_file())

    (tmp_path / "mnist.py").write_text(f"print({CHANGED!r})")
    before, clock = stored(), time.monotonic()
    pushed(tmp_path, base, f"{registry}/{name}")
    assert time.monotonic() - clock < 15
    assert stored() - before < 100_000
    engine.must("pull", f"{registry}/{name}")
    assert engine.must("run", "--rm", "--network=none", f"{registry}/{name}") == f"{CHANGED}\n"


def test_the_notebook_puts_a_changed_trainer_into_an_image_without_an_engine(engine, base, tmp_path):
    """Its cells, with submit=True, on a machine where kubectl is the only program."""
    programs = tmp_path / "bin"
    programs.mkdir()
    need("kubectl", "kubernetes-client")
    (programs / "kubectl").symlink_to(shutil.which("kubectl"))
    image = f"{base}-from-the-notebook"
    names = ON_A_SLICE[: ON_A_SLICE.index("create-the-job") + 1]
    with ApiServer() as cluster:
        how = {"names": [name for name in names if name in PARTS or name in WITHOUT_TRAINING]}
        how |= {"change": (BEFORE, CHANGED), "parameters": [("base_image", base), ("image", image)]}
        kubeconfig = cluster.kubeconfig(tmp_path)
        code, output = submit_in(tmp_path, **how, PATH=programs, KUBECONFIG=kubeconfig)
    assert code == 0, output
    assert "No Docker engine answers here.\n" in output
    (job,) = [each for each in cluster.created if each["kind"] == "PyTorchJob"]
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        assert replica["template"]["spec"]["containers"][0]["image"] == image
    engine.must("pull", image)
    assert CHANGED in engine.must("run", "--rm", "--entrypoint=cat", image, "mnist.py")


@pytest.fixture
def chapter_log(engine, registry, base, project):
    """A function that runs a chapter's commands with this registry, and returns all that they print."""
    for name in ("podman", "skopeo"):
        need(name, name)
    images = tempfile.mkdtemp(prefix="podman.", dir="/var/tmp")
    docker, podman, skopeo = map(shutil.which, (engine.program, "podman", "skopeo"))
    podman += f" --root {images}/root --runroot {images}/run"
    plain, bare = "--tls-verify=false", f"{registry}/you/pytorch:1"
    build = f"{plain} --network=host --layers=false --build-arg=BASE_IMAGE={bare} {FEW}"
    programs = {
        "docker": with_more(docker, {"run": " ".join(with_packages(engine))}),
        "podman": with_more(podman, {"build": build, "push": plain}),
        "python": with_more(sys.executable, {}),
        "skopeo": with_more(skopeo, {"inspect": plain, "list-tags": plain}),
    }
    engine.must("tag", base, "mnist")
    engine.must("tag", BASE_IMAGE, bare)
    engine.must("push", bare)
    change = ("registry.example.org", registry)
    yield lambda chapter: run_chapter(chapter, project, programs, engine.environment, change)
    subprocess.run(["umount", f"{images}/root/overlay"], capture_output=True)  # after a build that failed
    subprocess.run(["rm", "-rf", images])  # rmtree takes far longer


def test_an_image_is_shared(registry, chapter_log):
    log = chapter_log("Share")
    assert re.search(r"^accuracy=0\.\d+$", log, re.M), log
    assert f'"Name": "{registry}/you/mnist"' in log


def test_images_made_without_the_engine_are_as_it_makes_them(engine, registry, base, chapter_log):
    """Those made of a bare base lack lists of packages and licences."""
    chapter_log("Without an engine")
    settings, files = look(engine, base)
    for name in ("mnist:2", "mnist:3"):
        assert look(engine, f"{registry}/you/{name}") == (settings, files)
    needed = {line for line in files if not re.search("requirements|LICENSE", line)}
    made_of_digits_1 = f"{registry}/you/digits:2"
    run = ("run", "--rm", "--network=none", "--env=TRAINER=-c")
    assert look(engine, made_of_digits_1) == (settings, needed)
    assert engine.must(*run, made_of_digits_1, "print(1)") == "1\n"
