"""The images, built from the Dockerfile by a real engine, and everything the guide says about them."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import requests
import torch

from rig.engine import BUILD, SHARING, give, persons_project
from rig.guide import CHAPTERS, GUIDE, run_chapter
from rig.processes import Process, free_port, need
from rig.project import ROOT, make_small_project
from rig.tutorial import make_small_tutorial
from rig.users import ENGINES, run_where_numbers_differ

pytestmark = pytest.mark.timeout(2400)

SECRETS = {"datasets/kaggle.json", "datasets/.cache/token", "datasets/MNIST/raw/other.gz"}
IMAGES = ["mnist", "mnist-notebook"]


@pytest.fixture(scope="module")
def project(engine):
    """A person's project, which nobody else may read, with files beside the digits that must stay theirs."""
    with persons_project(engine) as folder:
        for name in SECRETS:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text("secret")
        subprocess.run(["chmod", "--recursive", "u=rwX,go=", folder], check=True)
        give(engine, folder)
        yield folder


# The person's docker, but builds use this machine's network, and trainings none, and little data. So does
# the notebook, which knows of it. What the guide removes after a stop says how it ended.
DOCKER = """command=$1
shift
case "$command $* " in
    "build "*) set -- {build} "$@" ;;
    "run "*" --network "*) set -- {least} "$@" ;;
    "run "*" mnist "*) set -- --network=none {least} "$@" ;;
    "run "*" papermill "*) set -- --network=none {little_tutorial} "$@" ;;
    "rm first "*) {program} inspect --format 'ended with {{{{.State.ExitCode}}}}' first ;;
esac
exec {program} "$command" "$@"
"""


@pytest.fixture(scope="module")
def chapter_log(engine, project, tmp_path_factory):
    """A function that runs a chapter's commands as a person would, and returns all that they print."""
    least = make_small_project(tmp_path_factory.mktemp("least") / "project", 200, 100)
    tutorial = make_small_tutorial(tmp_path_factory.mktemp("tutorial") / "project", 3123)
    mounts = [f"--volume={tutorial}/{name}:/app/{name}:ro" for name in ("datasets", "notebooks/mnist.ipynb")]
    words = {"build": BUILD, "least": [*SHARING, f"--volume={least}/datasets:/app/datasets:ro"]}
    words |= {"little_tutorial": [*SHARING, *mounts], "program": [shutil.which(engine.program)]}
    docker = DOCKER.format(**{name: " ".join(each) for name, each in words.items()})
    programs = {"docker": docker, "sleep": "exec /bin/sleep 0.1"}

    def run(chapter):
        environment = engine.environment | {"HOME": str(project)}
        change = ("127.0.0.1:8888:", f"127.0.0.1:{free_port()}:")  # whoever reads this may use Jupyter
        log = run_chapter(chapter, project, programs, environment, change, **engine.person)
        assert {path.stat().st_uid for path in (project / "output").rglob("*")} <= {project.stat().st_uid}
        return log

    return run


@pytest.fixture(scope="module")
def mnist(chapter_log):
    """The trainer's image."""
    chapter_log("Build")
    return "mnist"


@pytest.fixture(scope="module")
def notebook(engine, mnist, project):
    """The tutorial's image."""
    engine.build("mnist-notebook", "--target=notebook", context=project)
    return "mnist-notebook"


def test_linters_find_nothing_in_the_dockerfile_and_the_script():
    for linter, file in (("hadolint", "Dockerfile"), ("shellcheck", "docker/run.sh")):
        program = Path(sys.executable).with_name(linter)
        need(program, "the packages of requirements-dev.txt")
        found = subprocess.run([program, file], cwd=ROOT, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (0, ""), found.stdout


def test_the_init_of_the_images_is_the_one_that_the_replay_of_the_jobs_tries():
    pin = re.search(r"dumb-init==[\w.]+", (ROOT / "Dockerfile").read_text())[0]
    assert f"\n{pin} ;" in (ROOT / "requirements.txt").read_text()


# --- The images ---------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
def test_nothing_is_left_that_was_needed_only_to_build_or_is_the_builder_s_own(engine, notebook, image):
    listing = engine.must("run", "--rm", "--user=0", "--entrypoint=find", image, "/", "-xdev", "-type", "f")
    paths = [line for line in listing.splitlines() if line.startswith("/")]
    assert len(paths) > 10_000
    needed = r"/(uv|gcc|g\+\+|cc1?|clang|make|git)$|^(?!/usr/).*\.(whl|lock)$"
    needed += r"|^/(tmp|root/\.cache|var/lib/apt/lists)/"
    assert [path for path in paths if re.search(needed, path)] == []
    ours = {path.removeprefix("/app/") for path in paths if path.startswith("/app/")}
    assert "datasets/README.md" in ours and not ours & SECRETS
    expected = {"LICENSE", "datasets", "mnist.py", "requirements.in", "requirements.txt"}
    expected |= {"docker", "notebooks", "pytorchjob-mnist.yaml"} if image == notebook else set()
    assert {path.partition("/")[0] for path in ours} == expected


@pytest.mark.parametrize("image", IMAGES)
def test_whatever_the_builder_s_umask_everybody_can_read_what_is_in_the_images(engine, notebook, image):
    run = ("run", "--rm", "--network=none", "--user=1234:1234")
    unreadable = ("/app", "!", "-readable", "-o", "-type", "d", "!", "-executable")
    assert engine.must(*run, "--entrypoint=find", image, *unreadable) == ""
    options = ("--workdir=/app/datasets/MNIST/raw", "--entrypoint=sha256sum")
    assert engine.must(*run, *options, image, "--check", "SHA256SUMS").count(": OK\n") == 4


def test_any_user_of_group_0_writes_results_and_what_the_notebook_writes(engine, mnist, notebook):
    run = ("run", "--rm", "--user=54321:0")
    engine.must(*run, "--entrypoint=touch", mnist, "output/checkpoint.pt")
    found = engine.must(*run, "--entrypoint=find", notebook, "/app", "-writable", "-printf", "%P ").split()
    assert {"mnist.py", "pytorchjob-mnist.yaml", "notebooks/mnist.ipynb", "output"} <= set(found)


def test_the_image_tells_its_licences_and_no_password_or_certificate(engine, mnist):
    labels = json.loads(engine.must("image", "inspect", mnist))[0]["Config"]["Labels"]
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0 AND CC-BY-SA-3.0"
    history = engine.must("history", "--no-trunc", "--format={{.CreatedBy}}", mnist)
    assert "uv pip install" in history
    assert not re.search(r"password|secret|token|BEGIN|://[^/\s]*@", history, re.I)


def test_a_changed_trainer_is_built_in_seconds_and_only_its_layer_is_new(engine, mnist, project, tmp_path):
    context = shutil.copytree(project, tmp_path / "changed")
    with open(context / "mnist.py", "a") as file:
        file.write("\n# changed\n")
    clock = time.monotonic()
    engine.build("mnist-changed", context=context)
    assert time.monotonic() - clock < 15
    images = json.loads(engine.must("image", "inspect", mnist, "mnist-changed"))
    before, after = (image["RootFS"]["Layers"] for image in images)
    assert before[:-1] == after[:-1] and before[-1] != after[-1]


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("UV_TORCH_BACKEND=abacus", "abacus.*--torch-backend|--torch-backend.*abacus"),
        ("UV_DEFAULT_INDEX=file:///none", "file:///none|No matching distribution found for uv"),
        ("BASE_IMAGE=localhost/none", "localhost/none"),
    ],
)
def test_a_build_argument_reaches_what_it_is_for(argument, said, engine, mnist, project):
    code, output = engine("build", "--network=host", f"--build-arg={argument}", project)
    assert code != 0
    assert re.search(said, output, re.S), output


# --- Containers ---------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_one_sentence_and_code_1(engine, mnist, tmp_path):
    tmp_path.chmod(0o555)
    code, output = engine("run", "--rm", "--user=1234:1234", f"--volume={tmp_path}:/app/output", mnist)
    assert code == 1
    # The engine hands on the two streams in any order.
    assert "mnist.py: [Errno 13] Permission denied: '/app/output/.lock'" in output.splitlines()
    assert "Traceback" not in output


@pytest.mark.parametrize("arguments", [(), ("--num-processes", 2)], ids=["alone", "two processes"])
def test_a_container_that_is_stopped_in_its_first_second_ends_at_once(engine, mnist, arguments):
    """PyTorch still loads. The first process of a container would be deaf to a signal: hence the init."""
    engine.must("run", "--detach", "--name=mnist-starting", mnist, *arguments)
    try:
        clock = time.monotonic()
        engine.must("stop", "--time=30", "mnist-starting")
        assert time.monotonic() - clock < 5
        assert engine.must("logs", "mnist-starting") == ""
        assert engine.must("inspect", "--format={{.State.ExitCode}}", "mnist-starting") == "143\n"
    finally:
        engine.must("rm", "--force", "mnist-starting")


# Leaves a process without its parent, and prints the states of the first process and of those that are dead.
ORPHAN = """
import pathlib, subprocess, time
subprocess.run("sleep 0.5 &", shell=True)
time.sleep(1)
states = [file.read_text().split()[:3] for file in pathlib.Path("/proc").glob("[0-9]*/stat")]
print(sorted(" ".join(state) for state in states if state[2] == "Z" or state[0] == "1"))
"""


def test_an_init_lets_no_zombie_of_any_command_stay(engine, mnist, notebook):
    run = ("run", "--rm", "--network=none", "--read-only", "--env=TRAINER=-c")
    for image, *command in ((mnist,), (notebook, "python", "-c")):
        assert engine.must(*run, image, *command, ORPHAN) == "['1 (dumb-init) S']\n"


# --- docker/run.sh ------------------------------------------------------------------------------


def script(*arguments, cwd=ROOT, **changes):
    """Run docker/run.sh here, where it starts nothing."""
    environment = os.environ | {"ENGINE": "docker"} | changes
    command = [ROOT / "docker/run.sh", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def printed(*arguments, **changes):
    """Return the command that docker/run.sh would run, in words."""
    would = script("--dry-run", *arguments, **changes)
    assert would.returncode == 0, would.stderr
    return would.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-d"], "-d needs a value"),
        (["-d", "first"], "-d first: use all, none, or numbers"),
        (["-m", "/nowhere"], "/nowhere is not a folder"),
        (["-x"], "DISPLAY is not set"),
        (["-o", "a:b"], "cannot be mounted, because its name has a colon"),
        (["-o", "/proc"], "cannot make /proc/home"),
    ],
)
def test_the_script_says_what_is_wrong_with_an_option_and_makes_nothing(arguments, sentence, tmp_path):
    refused = script(*arguments, cwd=tmp_path, DISPLAY="", ENGINE="true")
    assert (refused.returncode, refused.stdout) == (2, "")
    said = [line for line in refused.stderr.splitlines() if not line.startswith("mkdir: ")]
    assert len(said) == 1 and sentence in said[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.engine
@pytest.mark.parametrize("name", ENGINES)
def test_data_are_mounted_and_results_the_person_s_where_an_engine_numbers_users_differently(name):
    shell = "ls /app/datasets/run.sh; echo >/app/output/result; echo >/app/output/home/setting"
    command = ["docker/run.sh", "-d", "none", "-m", "docker", "-o", "output/new", "-i", "localhost/tiny"]
    code, log, owners = run_where_numbers_differ(name, *command, "/bin/sh", "-ec", shell)
    assert (code, owners) == (0, {1234}), log


@pytest.mark.engine
def test_podman_called_docker_gets_cards_in_its_own_words_or_fails():
    """Podman 4 takes --gpus, and does nothing about it."""
    arguments = ["docker/run.sh", "-d", "0", "-i", "localhost/tiny", "/bin/sh", "-c", "echo ran"]
    code, log, _ = run_where_numbers_differ("podman called docker", *arguments)
    assert code != 0 and "nvidia.com/gpu=0" in log and "ran" not in log.split()


@pytest.mark.parametrize(
    ("arguments", "variables", "option"),
    [
        (["-d", "all"], {"CUDA_VISIBLE_DEVICES": "2"}, "--gpus all "),
        (["-d", "0"], {}, '--gpus \\"device=0\\" '),
        (["-d", "2,3"], {}, '--gpus \\"device=2\\,3\\" '),
        (["-d", "2,3"], {"ENGINE": "podman"}, "--device nvidia.com/gpu=2 --device nvidia.com/gpu=3 "),
        ([], {"CUDA_VISIBLE_DEVICES": "2"}, '--gpus \\"device=2\\" '),
        ([], {"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "5"}, '--gpus \\"device=5\\" '),
        ([], {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"}, '--gpus \\"device=GPU-8932f937-d72c\\" '),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_cards_are_those_of_the_option_or_of_the_batch_system(arguments, variables, option, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")  # it finds all
    (tmp_path / "nvidia-smi").chmod(0o755)
    command = printed(*arguments, "--lr", "1", PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
    assert command.startswith(variables.get("ENGINE", "docker")) and command.endswith(" mnist --lr 1 \n")
    assert option in command if option else "--gpus" not in command


def test_the_script_finds_its_project_through_a_link_and_whatever_cd_prints(tmp_path):
    (tmp_path / "train").symlink_to(ROOT / "docker/run.sh")
    for command in ([tmp_path / "train"], ["docker/run.sh"]):
        environment = os.environ | {"CDPATH": "."}
        shown = subprocess.check_output([*command, "--dry-run", "-j"], cwd=ROOT, env=environment, text=True)
        assert f" --volume {ROOT}:/app " in shown


def test_the_script_reaches_a_display_that_is_a_port_and_jupyterlab_stays_private():
    command = printed("-j", "-x", DISPLAY="localhost:10.0", PORT="8889")
    assert " --network host " in command and " --publish " not in command
    assert command.endswith(" mnist-notebook jupyter lab --ip=127.0.0.1 --port=8889 --no-browser \n")
    assert "--network" not in printed("-x", DISPLAY=":0")


def test_the_script_explains_every_option_it_knows():
    explained = script("-h").stdout
    known = re.findall(r"^        (-[-a-z]+)(?: \| --help)?\)", (ROOT / "docker/run.sh").read_text(), re.M)
    assert len(known) >= 8
    for option in known:
        assert re.search(rf"^  {option}\s", explained, re.M) or option == "--", option


@pytest.fixture
def start_script(engine, notebook, project, tmp_path):
    """A function that starts docker/run.sh as a person would."""
    environment = engine.environment | {"ENGINE": engine.program, "HOME": str(project)}

    def start(*arguments, **changes):
        options = {"cwd": project, "env": environment | changes, **engine.person}
        return Process(["docker/run.sh", "-d", "none", *arguments], tmp_path / "log", **options)

    return start


def answers(address):
    with suppress(requests.ConnectionError):
        return requests.get(address)


def test_the_script_opens_jupyterlab_in_the_project_and_only_for_who_has_the_token(start_script, project):
    port = free_port()
    lab, address = start_script("-j", PORT=str(port)), f"http://127.0.0.1:{port}"
    told = re.compile(r"http://127\.0\.0\.1:8888/lab\?token=(\w+)\n")
    try:
        assert lab.until(lambda: told.search(lab.output)), lab.output
        assert lab.until(lambda: answers(f"{address}/api")), lab.output  # it tells its address too early
        assert requests.get(f"{address}/api/contents").status_code == 403
        assert "/login" in requests.get(f"{address}/lab").url
        token = {"Authorization": f"token {told.search(lab.output)[1]}"}
        assert "JupyterLab" in requests.get(f"{address}/lab", headers=token).text
        file = {"type": "file", "format": "text", "content": "hello"}
        assert requests.put(f"{address}/api/contents/hello.txt", json=file, headers=token).status_code == 201
    finally:
        lab.terminate()
        lab.end()
    assert (project / "hello.txt").read_text() == "hello"
    assert (project / "hello.txt").stat().st_uid == project.stat().st_uid


WINDOW = """
import faulthandler
faulthandler.dump_traceback_later(40, exit=True)
import matplotlib.pyplot as plt
plt.switch_backend("TkAgg")
window = plt.figure().canvas.manager.window
plt.pause(1)
print("viewable:", window.winfo_viewable())
"""


def test_the_script_shows_windows(engine, start_script, notebook, tmp_path):
    """On a display of this machine, and on one that is reached as ssh -X lets it be, by a port."""
    need("Xvfb", "xvfb")
    command = ["Xvfb", "-displayfd", "1", "-listen", "tcp"]  # its number comes when it listens
    display = Process(command, tmp_path / "display", **engine.person)
    try:
        assert display.until(lambda: re.search(r"^\d+\n", display.output, re.M), 30), display.output
        number = re.search(r"^\d+$", display.output, re.M)[0]
        for name in (f":{number}", f"localhost:{number}.0"):
            code, log = start_script("-x", "-i", notebook, "python", "-c", WINDOW, DISPLAY=name).end(60)
            assert (code, log.splitlines()[-1]) == (0, "viewable: 1"), log
    finally:
        display.kill_all()


# --- The guide ----------------------------------------------------------------------------------


def test_the_guide_marks_all_that_no_test_runs():
    blocks = re.findall(r"^(?:<!-- needs (.+) -->\n)?```bash$", "".join(GUIDE), re.M)
    assert len(blocks) == "".join(GUIDE).count("```bash") > 20
    missing = {"PyTorch's package index", "a GPU", "a cluster", "the hub and a GPU"}
    assert {what for what in blocks if what} == missing
    assert "```bash" not in GUIDE[0]


def test_some_test_runs_each_chapter_of_the_guide():
    modules = ("image", "registry", "question_answering")
    sources = [Path(__file__).with_name(f"test_{name}.py").read_text() for name in modules]
    assert [chapter for chapter in CHAPTERS if f'"{chapter}"' not in "".join(sources)] == []


def test_an_unknown_user_trains_offline_and_read_only_and_keeps_the_results(mnist, chapter_log, project):
    log = chapter_log("Run")
    assert re.search(r"^Epoch: 1 \( +\d+\.\d%\) - Loss: \d+\.\d+$", log, re.M)
    accuracies = re.findall(r"^accuracy=(0\.\d{4})$", log, re.M)
    assert len(accuracies) == 5 + 1 + 5 + 5 + 2 + 1 and float(accuracies[4]) > 0.6
    metrics = [json.loads((project / name / "metrics.jsonl").read_text()) for name in ("", "output")]
    assert [f"{each['accuracy']:.4f}" for each in metrics] == [accuracies[5], accuracies[-1]]
    assert "conv1.weight" in torch.load(project / "output/mnist_model.pt", weights_only=True)


def test_a_container_that_is_stopped_saves_and_another_goes_on(mnist, chapter_log):
    log = chapter_log("Stop and go on")
    assert re.search(r"^Stopped by a signal", log, re.M) and "\nended with 143\n" in log, log
    assert re.search(r"^Resuming in epoch \d+ after", log, re.M), log


def test_asked_in_either_way_two_processes_get_the_same_results(mnist, chapter_log):
    log = chapter_log("Several processes, several experiments")
    assert log.count("rank 0 of 2") == 2
    found = re.findall(r"^(?:Test accuracy: .*|loss=.*|accuracy=.*)$", log, re.M)
    assert len(found) == 6 and found[:3] == found[3:], log
    assert re.search('^{"epoch": 2', log, re.M), log


def test_the_notebook_runs_to_its_end_in_its_image(notebook, chapter_log, project):
    log = chapter_log("The tutorial")
    assert re.search(r"http://127\.0\.0\.1:8888/lab\?token=\w+", log), log
    cells = json.loads((project / "output/out.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]


def test_changed_code_trains_and_the_images_are_shown_and_removed(mnist, chapter_log):
    for chapter, said in {"Changed code": "^accuracy=", "Look, and clean up": "^mnist +latest"}.items():
        log = chapter_log(chapter)
        assert re.search(said, log, re.M), log
