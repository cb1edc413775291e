"""The images, built from the Dockerfile by a real engine, and everything the guide says about them."""

import json
import os
import re
import select
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from threading import Timer

import pytest
import torch

from rig.engine import BASE_IMAGE, BUILD, persons_project
from rig.guide import CHAPTERS, GUIDE, run_chapter
from rig.processes import free_port, need
from rig.project import ROOT, make_small_project
from rig.tutorial import make_small_tutorial
from rig.users import ENGINES, run_where_numbers_differ

# Two processors are shared here: no thread spins, as in tests/conftest.py, and none waits for another.
SHARING = ("--env=OMP_WAIT_POLICY=PASSIVE", "--env=OMP_NUM_THREADS=1")
# What a strict cluster allows: no network, no rights, nothing writable but what is named.
STRICT = ("--network=none", "--read-only", "--tmpfs=/tmp", "--cap-drop=ALL")
STRICT += ("--security-opt=no-new-privileges", "--memory=2g")


@pytest.fixture(scope="module")
def mnist(engine):
    """The trainer's image."""
    engine.build("mnist")
    return "mnist"


@pytest.fixture(scope="module")
def notebook(engine, mnist):
    """The tutorial's image."""
    engine.build("mnist-notebook", "--target=notebook")
    return "mnist-notebook"


@pytest.fixture(scope="module")
def little(small_template):
    """Options that put little data into a container."""
    return [*SHARING, f"--volume={small_template}/datasets:/app/datasets:ro"]


@pytest.fixture(scope="module")
def least(tmp_path_factory):
    """The same where nothing of note has to be learned."""
    folder = make_small_project(tmp_path_factory.mktemp("least") / "project", 200, 100)
    return [*SHARING, f"--volume={folder}/datasets:/app/datasets:ro"]


@pytest.fixture(scope="module")
def little_tutorial(tmp_path_factory):
    """The same for the tutorial's image, with a notebook that knows of it."""
    folder = make_small_tutorial(tmp_path_factory.mktemp("tutorial") / "project", train=3123)
    files = ("datasets", "notebooks/mnist.ipynb")
    return [*SHARING, *(f"--volume={folder}/{name}:/app/{name}:ro" for name in files)]


@pytest.fixture(scope="module")
def project(engine):
    with persons_project(engine) as folder:
        yield folder


@pytest.fixture(scope="module")
def trained(engine, mnist, little, tmp_path_factory):
    """The log and the folder of a training of three epochs, by a user whom the image does not know."""
    folder = tmp_path_factory.mktemp("output")
    folder.chmod(0o777)
    options = (*STRICT, "--user=1234:0", *little, f"--volume={folder}:/app/output")
    return engine.must("run", "--rm", *options, mnist, "--epochs", 3, "--save-model"), folder


def run_script(engine, project, *arguments, **changes):
    """Start docker/run.sh as a person would; all that it prints comes as one text stream."""
    return subprocess.Popen(
        ["docker/run.sh", *map(str, arguments)],
        cwd=project,
        env=engine.environment | {"ENGINE": engine.program, "HOME": str(project)} | changes,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **engine.person,
    )


def finish(process, timeout=300):
    """Wait for a started program. Returns (exit code, all that it printed)."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"it still ran after {timeout} s, and printed:\n{process.communicate(timeout=30)[0]}")
    return process.returncode, output


def wait_for_server(address):
    """JupyterLab tells its address a moment before it listens there."""
    for _ in range(300):
        try:
            return urllib.request.urlopen(address, timeout=30)
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"nobody answers at {address}")


# --- The files ----------------------------------------------------------------------------------


def test_linters_find_nothing_in_the_dockerfile_and_the_script():
    for linter, file in (("hadolint", "Dockerfile"), ("shellcheck", "docker/run.sh")):
        program = Path(sys.executable).with_name(linter)
        need(program, "the packages of requirements-dev.txt")
        found = subprocess.run([program, file], cwd=ROOT, capture_output=True, text=True)
        assert (found.returncode, found.stdout) == (0, ""), found.stdout


def test_the_init_of_the_images_is_the_one_that_the_replay_of_the_jobs_tries():
    pin = re.search(r"dumb-init==[\w.]+", (ROOT / "Dockerfile").read_text())[0]
    assert f"\n{pin} ;" in (ROOT / "requirements.txt").read_text()


# --- The trainer's image ------------------------------------------------------------------------


def test_any_user_trains_offline_and_read_only(trained):
    log, folder = trained
    assert re.search(r"^Epoch: 1 \( +\d+\.\d%\) - Loss: \d+\.\d+$", log, re.M)
    accuracies = [float(found) for found in re.findall(r"^accuracy=(0\.\d{4})$", log, re.M)]
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [round(epoch["accuracy"], 4) for epoch in metrics] == accuracies
    assert len(accuracies) == 3 and accuracies[1] > 0.7
    assert "conv1.weight" in torch.load(folder / "mnist_model.pt", weights_only=True)
    assert {path.stat().st_uid for path in folder.iterdir()} == {1234}


def test_the_image_says_who_runs_it_and_what(engine, mnist):
    config = json.loads(engine.must("image", "inspect", mnist))[0]["Config"]
    assert config["User"] == "1000:0"
    assert config["WorkingDir"] == "/app"
    command = ["sh", "-c", 'exec python "$TRAINER" "$@"', "sh"]
    assert config["Entrypoint"] == ["dumb-init", "--single-child", "--", *command]
    assert "TRAINER=mnist.py" in config["Env"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0 AND CC-BY-SA-3.0"


def test_the_tutorial_s_image_runs_any_command_below_an_init(engine, notebook):
    names = "cat /proc/1/comm; cat /proc/$$/comm"
    assert engine.must("run", "--rm", *STRICT, notebook, "sh", "-c", names).split() == ["dumb-init", "sh"]


@pytest.mark.parametrize("image", ["mnist", "notebook"])
def test_nothing_that_was_needed_only_to_build_is_left(engine, image, request):
    image = request.getfixturevalue(image)
    listing = engine.must("run", "--rm", "--user=0", "--entrypoint=find", image, "/", "-xdev", "-type", "f")
    paths = [Path(line) for line in listing.splitlines() if line.startswith("/")]
    assert len(paths) > 10_000
    left = [
        str(path)
        for path in paths
        if path.name in {"uv", "gcc", "g++", "cc", "cc1", "clang", "make", "git"}
        or (path.suffix in {".whl", ".lock"} and not path.is_relative_to("/usr"))
        or path.is_relative_to("/tmp")
        or path.is_relative_to("/root/.cache")
        or path.is_relative_to("/var/lib/apt/lists")
    ]
    assert left == []
    ours = {path.relative_to("/app").parts[0] for path in paths if path.is_relative_to("/app")}
    expected = {"LICENSE", "datasets", "mnist.py", "requirements.in", "requirements.txt"}
    assert ours == expected | (
        {"docker", "notebooks", "pytorchjob-mnist.yaml"} if "notebook" in image else set()
    )


def test_history_holds_no_password_and_no_certificate(engine, mnist):
    history = engine.must("history", "--no-trunc", "--format={{.CreatedBy}}", mnist)
    assert "uv pip install" in history
    assert not re.search(r"password|secret|token|BEGIN|://[^/\s]*@", history, re.I)


def test_any_user_of_group_0_writes_to_the_default_output_folder(engine, mnist):
    engine.must("run", "--rm", "--user=54321:0", "--entrypoint=touch", mnist, "output/checkpoint.pt")


def test_a_changed_trainer_is_built_in_seconds_and_only_its_layer_is_new(engine, mnist, project, tmp_path):
    context = shutil.copytree(project, tmp_path / "changed")
    with open(context / "mnist.py", "a") as file:
        file.write("\n# changed\n")
    clock = time.monotonic()
    engine.build("mnist-changed", context=context)
    seconds = time.monotonic() - clock
    try:
        images = json.loads(engine.must("image", "inspect", mnist, "mnist-changed"))
        before, after = (image["RootFS"]["Layers"] for image in images)
        assert before[:-1] == after[:-1]
        assert before[-1] != after[-1]
        assert seconds < 15
    finally:
        engine.must("image", "rm", "mnist-changed")


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


def test_bad_usage_is_one_sentence_and_code_2(engine, mnist):
    code, output = engine("run", "--rm", mnist, "--epochs", 0)
    assert code == 2
    assert output.endswith(
        "mnist.py: error: argument --epochs: '0' is not a whole number from 1 to 1000000000\n"
    )


def test_a_folder_that_cannot_be_written_is_one_sentence_and_code_1(engine, mnist, tmp_path):
    tmp_path.chmod(0o555)
    code, output = engine("run", "--rm", "--user=1234:1234", f"--volume={tmp_path}:/app/output", mnist)
    assert code == 1
    # The engine hands on the two streams in any order.
    assert "mnist.py: [Errno 13] Permission denied: '/app/output/.lock'" in output.splitlines()
    assert "Traceback" not in output


def test_a_stopped_container_resumes_to_the_weights_of_an_unbroken_one(
    engine, mnist, little, trained, tmp_path
):
    tmp_path.chmod(0o777)
    options = ["run", "--rm", "--name=mnist-stopped", *STRICT, "--user=1234:1234", *little]
    arguments = (
        f"--volume={tmp_path}:/app/output",
        mnist,
        "--epochs",
        3,
        "--log-interval",
        1,
        "--save-model",
    )
    with engine.start(*options, *arguments) as process:
        for line in process.stdout:
            if line.startswith("Epoch: 2"):
                break
        engine.must("stop", "--time=30", "mnist-stopped")
        rest = process.stdout.read()
    assert "Stopped by a signal" in rest and process.returncode == 143
    assert not (tmp_path / "mnist_model.pt").exists()
    assert "Resuming in epoch 2 after" in engine.must(*options, *arguments, "--resume")
    assert (tmp_path / "mnist_model.pt").read_bytes() == (trained[1] / "mnist_model.pt").read_bytes()


@pytest.mark.parametrize("arguments", [(), ("--num-processes", 2)], ids=["alone", "two processes"])
def test_a_container_that_is_stopped_in_its_first_second_ends_at_once(engine, mnist, arguments):
    """PyTorch still loads. The first process of a container would be deaf to a signal: hence the init."""
    engine.must("run", "--detach", "--name=mnist-starting", mnist, *arguments)
    try:
        clock = time.monotonic()
        engine.must("stop", "--time=30", "mnist-starting")
        assert time.monotonic() - clock < 5
        assert engine.must("logs", "mnist-starting") == ""
        code = engine.must("inspect", "--format={{.State.ExitCode}}", "mnist-starting")
        assert int(code) == 143
    finally:
        engine.must("rm", "--force", "mnist-starting")


# A program whose child dies before its own child does, and what it then sees of dead processes.
ORPHAN = """
import os, pathlib, time
if os.fork() == 0:
    if os.fork() == 0:
        time.sleep(0.5)
    os._exit(0)
os.wait()
time.sleep(1)
states = [file.read_text().split()[1:3] for file in pathlib.Path("/proc").glob("[0-9]*/stat")]
print(sorted(name + " " + state for name, state in states if state == "Z" or name == "(dumb-init)"))
"""


def test_no_zombie_is_left_by_a_process_that_dies_inside(engine, mnist, notebook, tmp_path):
    (tmp_path / "mnist.py").write_text(ORPHAN)
    mount = f"--volume={tmp_path}/mnist.py:/app/mnist.py:ro"
    for image, *command in ((mnist,), (notebook, "python", "mnist.py")):
        assert engine.must("run", "--rm", *STRICT, mount, image, *command) == "['(dumb-init) S']\n"


def test_whatever_the_builder_s_umask_everybody_can_read_what_is_in_the_images(engine, project, tmp_path):
    """They are built without packages here, which no umask of the builder's ever reaches."""
    context = shutil.copytree(project, tmp_path / "private")
    for name in ("requirements.in", "requirements-none.in"):
        (context / name).write_text("")
    (context / "reader.py").write_text(
        "print(len(open('datasets/MNIST/raw/t10k-labels-idx1-ubyte', 'rb').read()))"
    )
    for name in ("kaggle.json", ".cache/token", "MNIST/raw/other.gz"):
        (context / "datasets" / name).parent.mkdir(exist_ok=True)
        (context / "datasets" / name).write_text("secret")
    subprocess.run(["chmod", "--recursive", "u=rwX,go=", context], check=True)
    arguments = ["--build-arg=REQUIREMENTS=requirements-none.in", "--build-arg=TRAINER=reader.py"]
    unreadable = ("/app", "!", "-readable", "-o", "-type", "d", "!", "-executable")
    try:
        for target in ("trainer", "notebook"):
            engine.build("mnist-private", f"--target={target}", *arguments, context=context)
            run = ("run", "--rm", "--network=none", "--user=1234:1234")
            data = engine.must(*run, "--entrypoint=ls", "mnist-private", "-RA", "datasets").split()
            assert "README.md" in data and not {"kaggle.json", ".cache", "other.gz"} & set(data)
            assert engine.must(*run, "--entrypoint=find", "mnist-private", *unreadable) == ""
            if target == "trainer":
                assert engine.must(*run, "mnist-private") == "10008\n"
            else:
                run = ("run", "--rm", "--network=none", "--user=1234:0", "--entrypoint=find", "mnist-private")
                found = engine.must(*run, "/app", "-writable", "-printf", "%P ").split()
                assert {"mnist.py", "pytorchjob-mnist.yaml", "notebooks/mnist.ipynb", "output"} <= set(found)
    finally:
        engine("image", "rm", "mnist-private")


def test_debian_s_own_python_is_a_base_too(engine, project, tmp_path):
    """It takes packages from apt alone unless told otherwise, and is called python3."""
    marker = "$(python3 -c 'import sysconfig; print(sysconfig.get_path(\"stdlib\"))')/EXTERNALLY-MANAGED"
    change = f'printf "[externally-managed]\\n" > "{marker}" && rm "$(command -v python)"'
    base, context = tmp_path / "base", shutil.copytree(project, tmp_path / "project")
    base.mkdir()
    (base / "Dockerfile").write_text(f"FROM {BASE_IMAGE}\nRUN {change}\n")
    (context / "requirements-none.in").write_text("filelock\n")
    (context / "reader.py").write_text("import filelock, sys; print(sys.version_info.major)")
    arguments = ["--build-arg=REQUIREMENTS=requirements-none.in", "--build-arg=TRAINER=reader.py"]
    try:
        engine.build("debian-python", context=base)
        engine.build("mnist-debian", "--build-arg=BASE_IMAGE=debian-python", *arguments, context=context)
        assert engine.must("run", "--rm", "--network=none", "mnist-debian") == "3\n"
    finally:
        engine("image", "rm", "mnist-debian", "debian-python")


def test_two_processes_without_network_train_with_the_image_s_own_digits(engine, mnist):
    """They are all of MNIST, or the sums that the image has of them would not be theirs."""
    options = (*STRICT, "--user=1234:1234", *SHARING)
    log = engine.must("run", "--rm", *options, mnist, "--dry-run", "--num-processes", 2)
    assert "rank 0 of 2" in log
    assert results(log)[0].startswith("Test accuracy: ") and "/1000 " in results(log)[0]


def results(log):
    """Return what the log says of the test set."""
    return re.findall(r"^(?:Test accuracy: .*|loss=.*|accuracy=.*)$", log, re.M)


def test_two_containers_on_a_private_network_train_together(engine, mnist, least, tmp_path):
    """They are told of each other as the operator of a PyTorchJob does it."""
    tmp_path.chmod(0o777)
    engine.must("network", "create", "--internal", "mnist-job")
    try:
        containers = []
        for rank, name in enumerate(("pytorchjob-mnist-master-0", "pytorchjob-mnist-worker-0")):
            variables = {
                "PYTHONUNBUFFERED": 1,
                "MASTER_ADDR": "pytorchjob-mnist-master-0",
                "MASTER_PORT": 23456,
                "WORLD_SIZE": 2,
                "RANK": rank,
                "PET_NNODES": 2,
                "PET_NODE_RANK": rank,
                "PET_NPROC_PER_NODE": "auto",
            }
            options = ["--rm", f"--name={name}", f"--hostname={name}", "--network=mnist-job", *least]
            options += ["--dns=127.0.0.1"]  # unknown names are refused at once: there is nobody to ask
            options += [f"--env={key}={value}" for key, value in variables.items()]
            options += [f"--volume={tmp_path}:/app/output"] if rank == 0 else []
            containers.append(engine.start("run", *options, mnist, "--epochs", 1))
        (master, log), (worker, silence) = (finish(container) for container in containers)
    finally:
        engine("network", "rm", "mnist-job")
    assert (master, worker) == (0, 0), log + silence
    assert "Started in a pod of a PyTorchJob: rank 0 of 2" in log
    assert len(results(log)) == 3
    assert "accuracy=" not in silence and (tmp_path / "checkpoint.pt").exists()


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


def test_the_script_speaks_podman():
    command = printed("-d", "2,3", "--epochs", "1", ENGINE="podman")
    assert command.startswith("podman run ")
    assert " --device nvidia.com/gpu=2 --device nvidia.com/gpu=3 " in command
    assert command.endswith(" mnist --epochs 1 \n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["-d"], "-d needs a value"),
        (["-d", "first"], "-d first: use all, none, or numbers"),
        (["-m", "/nowhere"], "/nowhere is not a folder"),
        (["-x"], "DISPLAY is not set"),
    ],
)
def test_the_script_says_what_is_wrong_with_an_option(arguments, sentence):
    refused = script("--dry-run", *arguments, DISPLAY="")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert sentence in refused.stderr and refused.stderr.count("\n") == 1


@pytest.mark.engine
@pytest.mark.parametrize("name", ENGINES)
def test_results_are_the_person_s_where_an_engine_numbers_users_differently(name):
    command = ["/bin/sh", "-c", "echo >/app/output/result; echo >/app/output/home/setting"]
    code, log, owners = run_where_numbers_differ(
        name, "docker/run.sh", "-d", "none", "-i", "localhost/tiny", *command
    )
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
        ([], {"CUDA_VISIBLE_DEVICES": "2"}, '--gpus \\"device=2\\" '),
        ([], {"CUDA_VISIBLE_DEVICES": "0", "SLURM_JOB_GPUS": "5"}, '--gpus \\"device=5\\" '),
        ([], {"CUDA_VISIBLE_DEVICES": "GPU-8932f937-d72c"}, '--gpus \\"device=GPU-8932f937-d72c\\" '),
        ([], {"CUDA_VISIBLE_DEVICES": ""}, None),
    ],
)
def test_the_script_takes_the_cards_of_its_option_or_those_that_a_batch_system_has_given(
    arguments, variables, option, tmp_path
):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")  # it finds all
    (tmp_path / "nvidia-smi").chmod(0o755)
    command = printed(*arguments, PATH=f"{tmp_path}:{os.environ['PATH']}", **variables)
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


def test_a_folder_that_cannot_be_used_is_one_sentence_and_nothing_is_made(tmp_path):
    said = {"a:b": "cannot be mounted, because its name has a colon", "/proc": "cannot make /proc/home"}
    for folder, sentence in said.items():
        refused = script("-o", folder, cwd=tmp_path)
        assert refused.returncode == 2 and sentence in refused.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_the_script_explains_every_option_it_knows():
    explained = script("-h").stdout
    known = re.findall(r"^        (-[-a-z]+)(?: \| --help)?\)", (ROOT / "docker/run.sh").read_text(), re.M)
    assert len(known) >= 8
    for option in known:
        assert re.search(rf"^  {option}\s", explained, re.M) or option == "--", option


def test_the_script_mounts_other_data(engine, mnist, project, small_template):
    """They are not MNIST's: their own sums lie beside them."""
    data = shutil.copytree(small_template / "datasets", project / "little")
    before = sorted(data.rglob("*"))
    arguments = ("-d", "none", "-m", "little", "-o", "other", "--", "--dry-run")
    code, log = finish(run_script(engine, project, *arguments))
    assert code == 0, log
    assert re.search(r"^Test accuracy: \d+/500 ", log, re.M), log
    assert sorted(data.rglob("*")) == before
    assert (project / "other/home").stat().st_uid == project.stat().st_uid


def test_the_script_opens_jupyterlab_in_the_project_and_only_for_who_has_the_token(engine, notebook, project):
    port = free_port()
    with run_script(engine, project, "-d", "none", "-j", PORT=str(port)) as process:
        try:
            log, watchdog = "", Timer(120, process.kill)  # which ends the log
            watchdog.start()
            while not (found := re.search(r"http://127\.0\.0\.1:8888/lab\?token=(\w+)", log)):
                line = process.stdout.readline()
                assert line, log
                log += line
            watchdog.cancel()
            address = f"http://127.0.0.1:{port}"
            wait_for_server(f"{address}/api")
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{address}/api/contents", timeout=30)
            assert refused.value.code == 403
            assert "/login" in urllib.request.urlopen(f"{address}/lab", timeout=30).url
            token = {"Authorization": f"token {found[1]}"}
            lab = urllib.request.Request(f"{address}/lab", headers=token)
            assert b"JupyterLab" in urllib.request.urlopen(lab, timeout=30).read()
            content = json.dumps({"type": "file", "format": "text", "content": "hello"}).encode()
            file = urllib.request.Request(f"{address}/api/contents/hello.txt", content, token, method="PUT")
            assert urllib.request.urlopen(file, timeout=30).status == 201
        finally:
            watchdog.cancel()
            process.terminate()
    assert (project / "hello.txt").read_text() == "hello"
    assert (project / "hello.txt").stat().st_uid == project.stat().st_uid


@contextmanager
def display(**person):
    """Start an X server of somebody's, which can be reached as ssh's can, too, and yield its number."""
    need("Xvfb", "xvfb")
    read, write = os.pipe()
    command = ["Xvfb", "-displayfd", str(write), "-listen", "tcp"]
    server = subprocess.Popen(command, pass_fds=[write], stderr=subprocess.PIPE, text=True, **person)
    os.close(write)  # or the end of a server that does not start would never be read
    try:
        # It writes its number when it listens. It may also hang, or end.
        number = os.read(read, 10).decode().strip() if select.select([read], [], [], 30)[0] else ""
        if not number:
            server.kill()
            pytest.fail(f"Xvfb has not started in 30 seconds: {server.communicate()[1]}")
        yield number
    finally:
        os.close(read)
        server.kill()
        server.communicate()


def test_the_script_shows_windows(engine, notebook, project):
    """On a display of this machine, and on one that is reached as ssh -X lets it be, by a port."""
    program = """
import faulthandler
faulthandler.dump_traceback_later(40, exit=True)
import matplotlib.pyplot as plt
plt.switch_backend("TkAgg")
window = plt.figure().canvas.manager.window
plt.pause(1)
print("viewable:", window.winfo_viewable())
"""
    arguments = ("-d", "none", "-x", "-i", notebook, "python", "-c", program)
    with display(**engine.person) as number:
        for name in (f":{number}", f"localhost:{number}.0"):
            code, log = finish(run_script(engine, project, *arguments, DISPLAY=name), timeout=60)
            assert (code, log.splitlines()[-1]) == (0, "viewable: 1"), log


# --- The guide ----------------------------------------------------------------------------------

# The person's docker, but builds use this machine's network, and trainings have little data, and learn
# at once that there is nobody to ask for names. So does the notebook where it trains.
DOCKER = """command=$1
shift
case "$command $* " in
    "build "*) set -- {build} "$@" ;;
    "run "*" mnist "*) set -- --dns=127.0.0.1 {least} "$@" ;;
    "run "*" papermill "*) set -- --dns=127.0.0.1 {little_tutorial} "$@" ;;
esac
exec {program} "$command" "$@"
"""
# These are run where there is what they need: a registry, or the packages of the example.
ELSEWHERE = {"A trainer of your own": "test_question_answering"}
ELSEWHERE |= {"Share": "test_registry", "Without an engine": "test_registry"}
MISSING = {"PyTorch's package index", "a GPU", "a cluster", "the hub and a GPU"}

# What the commands of a chapter print, when they do what they should.
PRINTED = {
    "Run": [r"^accuracy="],
    "Stop and go on": [r"^Stopped by a signal", r"^Resuming in epoch [123] "],
    "Several processes, several experiments": ['^{"epoch": 2'],
    "The tutorial": [r"http://127\.0\.0\.1:8888/lab\?token=\w+"],
    "Changed code": [r"^accuracy="],
    "Look, and clean up": [r"^mnist +latest"],
}


def test_the_guide_marks_all_that_no_test_runs():
    blocks = re.findall(r"^(?:<!-- needs (.+) -->\n)?```bash$", "".join(GUIDE), re.M)
    assert len(blocks) == "".join(GUIDE).count("```bash") > 20
    assert {what for what in blocks if what} == MISSING
    assert "```bash" not in GUIDE[0]


def test_other_tests_run_the_chapters_that_are_not_run_here():
    assert ELSEWHERE.keys() <= CHAPTERS.keys()
    for chapter, module in ELSEWHERE.items():
        assert f'"{chapter}"' in Path(__file__).with_name(f"{module}.py").read_text()


@pytest.fixture(scope="module")
def chapter_log(engine, notebook, project, least, little_tutorial):
    """A function that runs a chapter's commands as a person would, and returns all that they print."""
    environment = engine.environment | {"HOME": str(project)}

    def run(chapter):
        options = {"build": BUILD, "least": least, "little_tutorial": little_tutorial}
        options = {name: " ".join(words) for name, words in options.items()}
        docker = DOCKER.format(**options, program=shutil.which(engine.program))
        programs = {"docker": docker, "sleep": "exec /bin/sleep 0.1"}
        log = run_chapter(chapter, project, programs, environment, **engine.person)
        for pattern in PRINTED.get(chapter, []):
            assert re.search(pattern, log, re.M), log
        assert {path.stat().st_uid for path in (project / "output").rglob("*")} <= {project.stat().st_uid}
        return log

    return run


# Those that another test runs, which looks closer.
CLOSER = {"Several processes, several experiments", "The tutorial"}


@pytest.mark.parametrize("chapter", [chapter for chapter in CHAPTERS if chapter not in {*ELSEWHERE, *CLOSER}])
def test_every_command_of_the_guide_works(chapter, chapter_log):
    chapter_log(chapter)


def test_asked_in_either_way_two_processes_get_the_same_results(chapter_log):
    log = chapter_log("Several processes, several experiments")
    assert log.count("rank 0 of 2") == 2
    found = results(log)
    assert len(found) == 6 and found[:3] == found[3:], log


def test_the_notebook_runs_to_its_end_in_its_image(chapter_log, project):
    chapter_log("The tutorial")
    cells = json.loads((project / "output/out.ipynb").read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["execution_count"] for cell in code)
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
