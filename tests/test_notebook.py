"""The notebook: its files, its parameters, the ways to run it, and what is stored of it."""

import ast
import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import papermill
import psutil
import pytest
import torch
import torchvision
import yaml
from IPython.core.inputtransformer2 import TransformerManager
from matplotlib import pyplot
from matplotlib.colors import to_rgb

import mnist
from rig.api_server import ApiServer, write_kubeconfig
from rig.processes import need, run, start
from rig.project import RAW, ROOT, make_small_project
from rig.tutorial import (
    CELLS,
    CODE,
    NOTEBOOK,
    ON_A_SLICE,
    ORDER,
    PARTS,
    PICTURES,
    PROSE,
    SMALLER,
    TO_THE_TRAINING,
    WITHOUT_TRAINING,
    Images,
    assert_is_a_picture,
    images_of,
    outputs_of,
    run_cells,
    save,
)


def body(cell):
    """Return what a %%writefile cell writes: Jupyter ends it with a new line, unless it ends so."""
    text = cell.source.split("\n", 1)[1]
    return text if text.endswith("\n") else text + "\n"


def execute(*names, **variables):
    """Execute cells here, in plain Python, and return their variables."""
    for name in names:
        exec(CELLS[name].source, variables)
    return variables


def files_in(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- The files that it writes -------------------------------------------------------------------


def test_the_cells_are_the_committed_files_byte_for_byte():
    files = {"TRAINER_FILE": PARTS, "KUBERNETES_FILE": ["manifest"]}
    for variable, cells in files.items():
        flags = ["%%writefile", *["%%writefile -a"] * (len(cells) - 1)]
        flags = [f"{start} ${variable} $RUN_THE_CELLS_ABOVE_FIRST" for start in flags]
        assert [CELLS[name].source.split("\n")[0] for name in cells] == flags
        file = re.search(rf'^{variable} = "(.+)"$', CELLS["load-the-trainer"].source, re.MULTILINE)[1]
        assert "".join(body(CELLS[name]) for name in cells).encode() == (ROOT / file).read_bytes()


@pytest.fixture
def trainer_file(tmp_path, monkeypatch):
    """The trainer as its cells write it, where load_trainer looks for it; and load_trainer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mnist")
    with mnist.state_restored():
        load = execute("load-the-trainer", re=re, Path=Path, sys=sys)["load_trainer"]
        file = tmp_path / "mnist.py"
        for number, name in enumerate(PARTS, 1):
            with open(file, "a") as opened:
                opened.write(body(CELLS[name]))
            assert load(parts=number).__file__ == str(file)
        assert file.read_bytes() == (ROOT / "mnist.py").read_bytes()
        yield SimpleNamespace(file=file, load=load)


@pytest.mark.parametrize("number", range(2, 9))
def test_a_part_that_is_run_again_takes_the_place_of_the_older_one(number, trainer_file):
    text = body(CELLS[PARTS[number - 1]])
    newer = re.sub(r"(# --- .*\n)", r"\1NEWER = True\n", text, count=1)
    with open(trainer_file.file, "a") as opened:
        opened.write(newer)
    assert trainer_file.load(parts=number).NEWER
    assert trainer_file.file.read_text() == (ROOT / "mnist.py").read_text().replace(text, newer)


def test_a_file_that_is_not_made_of_all_parts_stops_the_notebook_with_a_sentence(trainer_file):
    file, load = trainer_file.file, trainer_file.load
    whole = file.read_text()
    for broken in (
        body(CELLS[PARTS[0]]),  # the first part was run again, and no other
        whole.replace(body(CELLS[PARTS[4]]), ""),
        whole + "# --- A part with a new title ---\n",
    ):
        file.write_text(broken)
        with pytest.raises(RuntimeError, match=r"^mnist\.py is not made of these parts: .*\.$"):
            load(parts=8)
        assert file.read_text() == broken
    assert "load_trainer(parts=8)\n%run $TRAINER_FILE" in CELLS["run-the-trainer"].source


def test_a_part_that_is_run_before_the_cells_above_it_writes_nothing_and_says_so(small):
    """As on another day: Python has forgotten where the files are."""
    code, output = run_cells(small, ["parameters", "trainer-checkpoints"])
    assert code == 1
    assert "UsageError: unrecognized arguments: $RUN_THE_CELLS_ABOVE_FIRST" in output
    assert (small / "mnist.py").read_bytes() == (ROOT / "mnist.py").read_bytes()
    assert {path.name for path in small.iterdir()} == {"datasets", "mnist.py", "notebooks"}


def test_each_part_is_tried_right_after_it():
    for number, name in enumerate(PARTS, 1):
        tried = CELLS[ORDER[ORDER.index(name) + 1]].source
        assert tried.startswith(f"mnist = load_trainer(parts={number})\n")


def parameters(**changes):
    return execute("parameters") | {"re": re} | changes


def manifest_with(folder, **changes):
    """Return the text of the manifest that these parameters make."""
    path = folder / "job.yaml"
    path.write_text(body(CELLS["manifest"]))
    variables = parameters(**changes) | {"KUBERNETES_FILE": path, "Path": Path}
    execute("check-the-parameters", "put-parameters-into-the-manifest", **variables)
    return path.read_text()


def test_each_parameter_changes_its_own_place_in_the_manifest_and_a_default_changes_nothing(tmp_path):
    image = "registry.example.com:5000/team/mnist@sha256:12ab"
    expected = (ROOT / "pytorchjob-mnist.yaml").read_text()
    assert manifest_with(tmp_path) == expected
    for old, new in {
        "image: mnist-trainer:1.0 ": f"image: {image} ",
        '- "15"\n': '- "3"\n',
        "Worker:\n      replicas: 2\n": "Worker:\n      replicas: 5\n",
        "backoffLimit: 16\n": "backoffLimit: 31\n",  # five times the restart of all pods, and one
        "                  nvidia.com/gpu: 1  # take this line out to train on CPUs\n": "",
    }.items():
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert manifest_with(tmp_path, image=image, job_epochs=3, workers=5, gpu=False) == expected


# --- The parameters -----------------------------------------------------------------------------

IMAGES = ["a", "registry.example.com:5000/team/name-1_x:v1.0", "name@sha256:0a", "team/a.b__c--d:V_1"]
IMAGES += ["localhost/a", "host:5000/a", "Host.example.com/a", "127.0.0.1:5000/a/b/c", "[::1]:5000/a"]
NO_IMAGE = [1, None, True, "two words", "a;b", "$(id)", "-v", "../../x", "a/../b", "a//b", "/a", "a/", "a/-v"]
NO_IMAGE += ["Name", "Team/name", "a:", "a:-v", "a:b:c", "a:b/C", "name@sha256:xyz", "https://example.com/a"]
NO_IMAGE += ["a\n", "ä", "a:" + "b" * 129]
VALUES = {  # of each parameter, good ones and bad ones
    "epochs": ([1, 1000], ["abc", 0, -1, 1.5, True, "2", None, 1001, 10**30]),
    "batch_size": ([1, 60_000], ["abc", 0, -1, 1.5, True, "64", 60_001, 10**12]),
    "learning_rate": ([1, 1e-9, 30.0], ["abc", 0, -1.0, True, math.nan, math.inf, "1.0", "1e-3"]),
    "seed": ([0, -7, 10**18 - 1, -(2**63)], ["abc", 1.5, True, None, 2**63, 10**100]),
    "num_processes": ([1, 16], ["abc", 0, -1, 1.5, True, 17, 1000]),
    "image": (IMAGES, ["", *NO_IMAGE]),
    "base_image": (["", IMAGES[1]], NO_IMAGE),
    "job_epochs": ([1], ["abc", 0, 1.5, True, 10**30]),
    "workers": ([1, 100], ["abc", 0, -1, 1.5, True, 10**30]),
    "gpu": ([True, False], ["true", 1, None]),
    "submit": ([True, False], ["true", "yes", 1, 0, None]),
}


@pytest.mark.parametrize(("name", "value"), [(name, bad) for name in VALUES for bad in VALUES[name][1]])
def test_a_bad_value_is_refused_with_one_sentence_that_names_parameter_and_value(name, value):
    with pytest.raises(ValueError, match=r"^.*\.$") as refusal:
        execute("check-the-parameters", **parameters(**{name: value}))
    assert str(refusal.value).startswith(f"{name} must be ")
    assert str(refusal.value).endswith(f", not {value!r}.")


@pytest.mark.parametrize(("name", "value"), [(name, good) for name in VALUES for good in VALUES[name][0]])
def test_a_good_value_is_accepted(name, value):
    execute("check-the-parameters", **parameters(**{name: value}))


def test_every_parameter_is_used():
    rest = "\n".join(c.source for c in CODE if c.id not in ("parameters", "check-the-parameters"))
    assert [name for name in VALUES if not re.search(rf"\b{name}\b", rest)] == []


def test_papermill_stops_at_a_bad_value_and_nothing_is_written(small):
    save(small, ON_A_SLICE)
    before = files_in(small)
    out = small.parent / "out.ipynb"
    code, output = run(small, "-m", "papermill", "notebooks/mnist.ipynb", out, "-p", "epochs", "abc")
    assert code == 1
    assert re.search(r"\nValueError: epochs must be [^\n]+, not 'abc'\.\n", output)
    assert files_in(small) == before


def test_papermill_explains_every_parameter_and_each_is_checked():
    explained = papermill.inspect_notebook(str(NOTEBOOK))
    assert explained.keys() == VALUES.keys()
    for name, about in explained.items():
        assert about["inferred_type_name"] in ("int", "float", "str", "bool"), name
        assert re.match(r"[A-Z]\w* ", about["help"]), name


# --- Submitting ---------------------------------------------------------------------------------

SUBMIT = ORDER[ORDER.index("read-the-manifest") :]
CREATE = SUBMIT[: SUBMIT.index("define-wait-for") + 1]
JOB = "pytorchjob.kubeflow.org/pytorchjob-mnist"
CHANGES = ["POST persistentvolumeclaims", "POST pytorchjobs", "DELETE pytorchjobs"]


@pytest.fixture
def submit(tmp_path, monkeypatch):
    """Returns a function that executes cells with submit=True and a stand-in for a cluster, in no time.

    tests/test_registry.py has the notebook itself submit a job.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shell = SimpleNamespace(getoutput=lambda command: SimpleNamespace(n=subprocess.getoutput(command)))
    variables = {"submit": True, "KUBERNETES_FILE": "pytorchjob-mnist.yaml", "get_ipython": lambda: shell}
    variables |= {"Path": Path, "re": re, "PYTORCH_JOB": JOB, "job_name": "pytorchjob-mnist"}

    def execute_with(cluster, *names):
        need("kubectl", "kubernetes-client")
        monkeypatch.setenv("KUBECONFIG", str(cluster.kubeconfig(tmp_path)))
        return execute("define-step", *names, **variables)

    return execute_with


def test_submitting_without_kubectl_or_a_cluster_stops_with_a_sentence(submit, monkeypatch):
    nowhere = SimpleNamespace(kubeconfig=lambda folder: write_kubeconfig(folder, "http://127.0.0.1:9"))
    sentence = r"^submit is True, but no cluster with PyTorchJobs answers: .*127\.0\.0\.1:9.*$"
    with pytest.raises(RuntimeError, match=sentence):  # nobody listens there
        submit(nowhere, "check-the-cluster")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match=r"^submit is True, but there is no kubectl on this machine\.$"):
        execute("define-step", "check-the-cluster", submit=True)


def test_a_submitted_job_is_followed_to_its_end_and_deleted_and_its_volume_stays(submit, capsys):
    with ApiServer(log="Test accuracy: 9915/10000 ( 99.2%)\n") as cluster:
        submit(cluster, *SUBMIT)
        printed = capsys.readouterr().out
        assert re.search(r"^Kind: +PyTorchJob$", printed, re.MULTILINE)
        assert cluster.changes == CHANGES
        created = cluster.created[-1]
        assert created["metadata"].pop("namespace") == "default"
        assert created == json.loads(json.dumps(yaml.safe_load(body(CELLS["manifest"]))))
        for expected in (
            "\npersistentvolumeclaim/mnist-output created\n",
            f"\n{JOB} is created\nwaiting for {JOB}\n",
            re.search(r"```text\n(NAME .*?)```", CELLS["sample-of-pods"].source, re.DOTALL)[1],
            "\nTest accuracy: 9915/10000 ( 99.2%)\n",
            f"waiting for {JOB}\nsucceeded\n",
            '\npytorchjob.kubeflow.org "pytorchjob-mnist" deleted',
        ):
            before, found, printed = printed.partition(expected)
            assert found, f"no {expected!r} in {printed or before!r}"

        submit(cluster, "claim-a-volume", "create-the-job")  # once more: the claim is there already
        assert "persistentvolumeclaim/mnist-output unchanged\n" in capsys.readouterr().out
        assert cluster.changes[3:] == ["POST pytorchjobs"]


TROUBLE = [  # what goes wrong, how many changes are made, and what is said
    ({"refused": ["persistentvolumeclaims"]}, 1, "This failed with exit code 1: kubectl apply -f kubernetes"),
    ({"refused": ["pytorchjobs"]}, 2, "Nothing was created: Error from server (Forbidden): error when "),
    ({"end": "Failed", "log": "the last words\n"}, 2, f"{JOB} failed: see the end of its pods' logs above."),
]


@pytest.mark.parametrize(("trouble", "changes", "sentence"), TROUBLE, ids=["claim", "job", "training"])
def test_a_step_that_goes_wrong_is_the_last_one(trouble, changes, sentence, submit, capsys):
    with ApiServer(**trouble) as cluster, pytest.raises(RuntimeError, match=f"^{re.escape(sentence)}"):
        submit(cluster, *SUBMIT)
    assert cluster.changes == CHANGES[:changes]
    said = r"^\[pod/pytorchjob-mnist-(.+)/pytorch\] the last words$"
    last_words = re.findall(said, capsys.readouterr().out, re.MULTILINE)
    assert sorted(last_words) == (["master-0", "worker-0", "worker-1"] if "log" in trouble else [])


def test_nobody_waits_for_a_job_that_is_gone(submit):
    with ApiServer() as cluster, pytest.raises(RuntimeError, match=rf"^{JOB} is gone: "):
        submit(cluster, "define-wait-for", "wait-for-the-end")


WARNINGS = {
    "FailedCreatePod": 'pods "pytorchjob-mnist-worker-1" is forbidden: exceeded quota: two-pods',
    "ErrImagePull": "Back-off pulling image",
}


def test_each_warning_about_the_job_is_printed_once_while_it_is_waited_for(submit, capsys):
    with ApiServer(warnings=WARNINGS) as cluster:
        submit(cluster, *CREATE, "wait-for-the-end")
    printed = capsys.readouterr().out.split(f"waiting for {JOB}\n")[1]
    warned = "".join(f"Warning: {reason}: {text}\n" for reason, text in WARNINGS.items())
    assert printed == f"{warned}succeeded\n"


def test_whoever_gives_up_waiting_says_so_and_points_at_the_warnings(submit, capsys):
    with ApiServer(warnings=WARNINGS) as cluster:
        cluster.states = [""] * 99
        wait_for = submit(cluster, *CREATE)["wait_for"]
        with pytest.raises(RuntimeError, match=r"1 minutes, but: no state yet; see the warnings above$"):
            wait_for("Running", "Succeeded", minutes=1)
    assert capsys.readouterr().out.count("Warning: FailedCreatePod: ") == 1


def test_the_job_has_the_name_that_kubectl_gave_it_also_after_a_warning():
    answer = SimpleNamespace(n=f"Warning: something\n{JOB} created\n")
    assert execute("name-of-the-job", re=re, submit=True, job_name="?", answer=answer)["PYTORCH_JOB"] == JOB


# --- Running it ---------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "notebooks", "datasets/MNIST"])
def test_wherever_jupyter_has_started_it_works_in_the_projects_folder(folder, monkeypatch):
    monkeypatch.chdir(ROOT / folder)
    with pyplot.rc_context():  # the cell changes it
        execute("go-to-the-project")
    assert Path.cwd() == ROOT


def test_nbconvert_runs_it_too_and_it_writes_two_files_and_submits_nothing(small):
    """So does papermill: see the main job, below."""
    # Without a PATH neither kubectl nor docker is found, and nothing else may be needed from there.
    save(small, [name for name in ON_A_SLICE if name in {*WITHOUT_TRAINING, *PARTS}])
    (small / "mnist.py").unlink()
    before = set(files_in(small))
    command = "nbconvert --execute --to notebook --output ../../out notebooks/mnist.ipynb"
    code, output = run(small, "-m", *command.split(), PATH="")
    assert code == 0, output
    new = {name for name in files_in(small) if not name.endswith(".lock")} - before
    assert new == {"mnist.py", "pytorchjob-mnist.yaml"}
    outputs = outputs_of(nbformat.read(small.parent / "out.ipynb", as_version=4))
    text = "".join(output.get("text", "") for output in outputs)
    assert len(re.findall(r"^would run: (docker|kubectl) .+$", text, re.MULTILINE)) == 6
    assert f"{JOB} would be created" in text


def test_the_notebook_notices_that_the_training_failed(small):
    raw = small / RAW / "train-labels-idx1-ubyte"
    raw.write_bytes(raw.read_bytes()[:-1] + b"\xff")
    (small / "output").mkdir()
    (small / "output" / "mnist_model.pt").write_text("of an earlier run")
    code, output = run_cells(small, ON_A_SLICE)
    assert code == 1
    assert "RuntimeError: The training failed: see what it printed above." in output
    assert not (small / "pytorchjob-mnist.yaml").exists()


def test_without_digits_and_without_a_network_a_sentence_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    for _ in range(2):  # the second time, too
        with pytest.raises(RuntimeError, match=r"^There are no digits in .*\. Put the four \.gz .*\.$"):
            execute("load-the-data", Path=Path, torch=torch, torchvision=torchvision)


def test_unpacked_digits_alone_are_read_too(small, monkeypatch):
    for packed in (small / RAW).glob("*.gz"):
        packed.unlink()
    monkeypatch.chdir(small)
    assert len(execute("load-the-data", Path=Path, torch=torch, torchvision=torchvision)["digits"]) == 1000


def test_every_text_is_read_and_written_as_utf_8():
    """Whatever the language of the machine: elsewhere, Python may take another encoding."""
    for source in [*(cell.source for cell in CODE if cell.id not in PARTS), *EXERCISES.values()]:
        for call in re.findall(r"\b(?:read_text|write_text|open)\(.*", source):
            assert "encoding=" in call or call.startswith("open(raw"), call


def test_no_cell_has_a_form_that_jupytext_loses():
    """It takes an assignment from a command for a comment, and some of its formats drop last blank lines."""
    assert [cell.id for cell in CODE if re.search(r"^ *\w+ = [!%]|\n\Z", cell.source, re.MULTILINE)] == []


def test_percent_run_changes_no_variable_of_the_notebook():
    plain = (TransformerManager().transform_cell(cell.source) for cell in CODE)
    nodes = [node for source in plain for node in ast.walk(ast.parse(source))]
    own = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    own |= {node.name for node in nodes if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    assert {"epochs", "show", "step", "model"} <= own
    assert {"Net", "main", "MEAN", "STD"} <= vars(mnist).keys()
    assert own & vars(mnist).keys() == set()


OTHER_LAYERS = {
    "conv1 = nn.Conv2d(1, 32, kernel_size=3)": "conv1 = nn.Conv2d(1, 6, kernel_size=5)",
    "conv2 = nn.Conv2d(32, 64, kernel_size=3)": "conv2 = nn.Conv2d(6, 12, kernel_size=3, padding=1)",
    "fc1 = nn.Linear(9216, 128)": "fc1 = nn.Sequential(nn.Linear(1728, 64), nn.ReLU(), nn.Linear(64, 128))",
}


def test_another_network_gets_to_the_end_and_earlier_cells_can_be_run_again(tmp_path):
    """First to last with other channels, windows and layers; then last to first, without starting anew."""
    small = make_small_project(tmp_path / "project", train=3123)
    order = ORDER[: ORDER.index("load-the-model") + 1]
    slow = {"ten-lines", "with-momentum", "train-one-epoch", "run-the-trainer", *PARTS}
    again = [CELLS[name].source for name in reversed(order) if name not in slow]
    assert all(layer in CELLS["trainer-model"].source for layer in OTHER_LAYERS)
    how = {"parameters": [("epochs", 1)], "changes": SMALLER | OTHER_LAYERS}
    code, output = run_cells(small, order, *again, **how, OMP_NUM_THREADS=1)
    assert code == 0, output
    said = "Net has other layers than your network above, so there is nothing to compare.\n"
    assert output.count(said) == 2


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("Conv2d(1, 32,", "Conv2d(1, 64,", r"The layers of Net do not fit together\. PyTorch says: .+"),
        ("Linear(128, 10)", "Linear(128, 12)", r"Net must give ten values for each image, .+\."),
    ],
)
def test_a_network_that_cannot_work_is_a_sentence(old, new, sentence, trainer_file):
    trainer_file.file.write_text((ROOT / "mnist.py").read_text().replace(old, new))
    variables = {"load_trainer": trainer_file.load, "mean": 0.1307, "std": 0.3081}
    with pytest.raises(RuntimeError, match=f"^{sentence}$"):
        execute("try-the-model", digits=torch.zeros(64, 28, 28, dtype=torch.uint8), **variables)


EXERCISES = {
    name: re.search(r"<summary>Answer</summary>.*```python\n(.*?)```", CELLS[name].source, re.DOTALL)[1]
    for name in CELLS
    if name.startswith("exercise-")
}


def test_the_answers_to_the_exercises_work_one_after_the_other(small):
    """None needs what another has defined, or leaves the trainer changed for the next."""
    imports = "import importlib, math\nimport mnist\nimport torch.nn.functional as F\nfrom torch import nn"
    before = [CELLS[each].source for each in ("load-the-data", "load-the-model", "few-digits")]
    before += ["_known = set(globals())"]
    forget = "for name in set(globals()) - _known:\n    if not name.startswith('_'): del globals()[name]"
    answers = (f"{answer}\n{forget}" for answer in EXERCISES.values())
    code, output = run_cells(small, TO_THE_TRAINING, imports, *before, *answers, OMP_NUM_THREADS=1)
    assert code == 0, output


@pytest.mark.parametrize("name", ["Intel Xeon", "AMD EPYC"])
@pytest.mark.parametrize("able", ["amx_bf16", "avx512_bf16", "arm_bf16", "amx_fp16"])
def test_the_epoch_in_the_notebook_multiplies_as_the_program_will(able, name, monkeypatch):
    """Its rule for bfloat16 stands in the notebook before the part that has it."""
    abilities = {"cpu_name": name, "amx_int8": False, able: True}
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: abilities)
    (rule,) = re.findall(r"^abilities = .*\n.*\nbf16 = .*$", CELLS["make-a-trainer"].source, re.MULTILINE)
    found = {"accelerated": False, "torch": torch}
    exec(rule, found)
    gains = able == {"Intel Xeon": "amx_bf16", "AMD EPYC": "avx512_bf16"}[name]
    assert found["bf16"] == mnist.choose_bf16(torch.device("cpu"), None) == gains


def test_what_each_addition_is_worth_is_what_the_page_on_hyper_parameters_says():
    page = (ROOT / "docs" / "hyperparameters.md").read_text()
    rows = re.compile(r"^\| (.+?) \| (.\d.+?) \| (.\d.+?) \|$", re.MULTILINE)
    told = rows.findall(CELLS["what-each-is-worth"].source)
    assert len(told) == 6
    for name, *worth in told:
        assert f" | {worth[0]} | {worth[1]} |" in page, name


# --- Writing a digit ----------------------------------------------------------------------------


def test_empty_paper_a_dot_and_a_line_can_be_read_too():
    """With digits, the notebook tries it itself: those of MNIST stay as they are, or become it again."""
    as_mnist = execute("as-mnist", torch=torch)["as_mnist"]
    paper = torch.zeros(112, 112, dtype=torch.uint8)
    assert as_mnist(paper).sum() == 0
    paper[111, 0] = 255
    assert (as_mnist(paper) == 255).sum() == 20 * 20
    paper[:, 0] = 255  # a line of a single point's width keeps a width
    assert (as_mnist(paper) > 0).sum() == 20


def test_without_anywidget_or_the_file_beside_the_notebook_a_sentence_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for missing in (r"draw\.js", "anywidget"):
        assert execute("define-the-pad", Path=Path)["Pad"] is None
        said = capsys.readouterr().out
        assert re.fullmatch(rf"There is no drawing pad here \(.*{missing}.*\), so [^\n]+\.\n", said)
        monkeypatch.chdir(ROOT)
        monkeypatch.setitem(sys.modules, "anywidget", None)


# --- The stored notebook ------------------------------------------------------------------------


def test_the_stored_notebook_has_been_run_from_top_to_bottom_in_one_go():
    assert [cell.execution_count for cell in CODE] == list(range(1, len(CODE) + 1))
    assert {output.output_type for cell in CODE for output in cell.outputs} <= {"stream", "display_data"}
    assert {output.get("name", "stdout") for cell in CODE for output in cell.outputs} == {"stdout"}
    accuracies = re.findall(r"^accuracy=(.+)$", CELLS["run-the-trainer"].outputs[0].text, re.MULTILINE)
    assert len(accuracies) == execute("parameters")["epochs"]
    assert float(accuracies[-1]) >= 0.99


def test_the_stored_notebook_shows_the_end_of_the_dockerfile_as_it_is():
    (output,) = CELLS["show-the-dockerfile"].outputs
    assert (ROOT / "Dockerfile").read_text().endswith(output.text)
    assert {"FROM", "COPY", "USER", "ENTRYPOINT"} <= set(re.findall(r"^[A-Z]+", output.text, re.MULTILINE))


def test_the_stored_notebook_is_clean():
    stored = nbformat.read(NOTEBOOK, as_version=4)
    assert set(stored.metadata) == {"kernelspec", "language_info"}
    assert stored.metadata.kernelspec.name == "python3"
    assert stored.metadata.language_info.file_extension == ".py"  # nbconvert and JupyterLab need it whole
    for cell in stored.cells:
        assert re.fullmatch(r"[a-z]+(-[a-z]+)*", cell.id) and not re.fullmatch(r"[0-9a-f]{8}", cell.id)
        tagged, folded = {"tags": ["parameters"]}, {"jupyter": {"source_hidden": True}}
        assert cell.metadata in ([tagged] if cell.id == "parameters" else [{}, folded])
    text = "".join(str(cell.get("outputs")) for cell in stored.cells if cell.id != "show-the-dockerfile")
    text = re.sub(r"base64,[\w+/=]+", "", text)
    assert re.findall(r"/(?:home|root|work|tmp|var|opt|usr|Users|private|mnt)/\S*|[A-Z]:\\\\", text) == []
    assert NOTEBOOK.stat().st_size < 1_500_000


def test_every_stored_picture_is_drawn_and_described():
    images = images_of(nbformat.read(NOTEBOOK, as_version=4))
    assert len(images) == PICTURES
    for image in images:
        assert_is_a_picture(image)
    assert Images(PROSE).found == []
    assert not re.search(r"!\[\]\(", PROSE)


def test_colours_can_be_told_apart_by_the_colour_blind():
    maps = {name for cell in CODE for name in re.findall(r"cmap\W+(\w+)", cell.source)}
    assert maps == {"gray_r", "cividis", "cividis_r"}


GREYS = torch.linspace(0, 255, 784).to(torch.uint8).reshape(1, 28, 28)
SQUARES = torch.arange(100) ** 2 // 13 % 10
TEXT_ON_PICTURES = {
    "pixels-as-numbers": {"digits": GREYS, "labels": [5]},
    "one-position": {"digits": GREYS},
    "confusion-matrix": {"test_labels": torch.arange(100) // 10, "guesses": SQUARES},
}


@pytest.mark.parametrize("name", TEXT_ON_PICTURES)
def test_every_number_on_a_picture_stands_out_from_it(name):
    """The contrast is at least 4.5 to 1, as WCAG 2 asks for text."""

    def luminance(rgb):
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in rgb]
        return np.dot(linear, (0.2126, 0.7152, 0.0722))

    figures, ratios = [], []
    with pyplot.rc_context({"image.cmap": "gray_r"}):  # as the first cell sets it
        variables = {"torch": torch, "plt": pyplot, "show": lambda figure, _: figures.append(figure)}
        execute(name, **variables, **TEXT_ON_PICTURES[name])
    for text in [text for axes in figures[0].axes for text in axes.texts]:
        (picture,) = text.axes.images
        column, row = map(int, text.get_position())
        drawn = picture.to_rgba(picture.get_array())[row, column]
        behind = drawn[:3] * drawn[3] + (1 - drawn[3])  # on a white page
        light, dark = sorted(map(luminance, (behind, to_rgb(text.get_color()))), reverse=True)
        ratios.append((light + 0.05) / (dark + 0.05))
    pyplot.close(figures[0])
    assert len(ratios) >= 9 and min(ratios) >= 4.5


def test_the_table_of_contents_has_all_acts_and_chapters_and_no_link_is_broken():
    headings = re.findall(r"^(#+) (.+)$", re.sub(r"```.*?```", "", PROSE, flags=re.DOTALL), re.MULTILINE)
    levels = [len(marks) for marks, _ in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below <= above + 1 for above, below in pairwise(levels))
    anchors = [title.replace(" ", "-") for _, title in headings]
    acts_and_chapters = [anchors[i] for i, level in enumerate(levels) if level in (2, 3)]
    listed = re.findall(r"\]\(#(.+?)\)", CELLS["title"].source)
    assert listed == acts_and_chapters[: acts_and_chapters.index("Exercises") + 1]
    numbers = re.findall(r"^(\d+)\. \[", CELLS["title"].source, re.MULTILINE)
    assert list(map(int, numbers)) == list(range(1, len(numbers) + 1))
    assert set(re.findall(r"\]\(#(.+?)\)", PROSE)) <= set(anchors)


def test_the_map_names_what_the_trainer_has():
    names = re.findall(r"`(\w+)`", CELLS["map-of-the-trainer"].source)
    assert len(names) >= 15
    assert all(hasattr(mnist, name) for name in names)


def test_a_digit_comes_first_and_nobody_has_to_pass_the_checkpoints_to_see_a_network_learn():
    assert any("show(figure" in cell.source for cell in CODE[:3])
    story = ["ten-lines", "draw-a-digit", "parameters", "check-the-parameters", *PARTS[:3]]
    story += ["train-one-epoch", "confident-mistakes", *PARTS[3:], "run-the-trainer", "manifest"]
    assert [name for name in ORDER if name in story] == story


# --- The main job -------------------------------------------------------------------------------


def watch_memory(process, seen):
    """Note how much memory a process and its children hold together, shared pages once, while it runs."""
    with suppress(psutil.NoSuchProcess):
        family = psutil.Process(process.pid)
        while process.poll() is None:
            total = 0
            for member in (family, *family.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    total += getattr(member.memory_full_info(), "pss", 0)  # which only Linux knows
            seen.append(total)
            time.sleep(1)


@pytest.mark.timeout(2400)
def test_one_epoch_on_all_digits_headless_reads_at_least_98_percent(tmp_path):
    """The README's command, in a copy of the project: all of it works, and leaves the project as it is."""
    project, unpacked = tmp_path / "project", shutil.ignore_patterns("*-ubyte")
    for name in ("datasets", "kubernetes", "notebooks"):
        shutil.copytree(ROOT / name, project / name, ignore=unpacked)
    for name in ("mnist.py", "pytorchjob-mnist.yaml", "Dockerfile"):
        shutil.copy(ROOT / name, project)
    before = files_in(project)

    command = "papermill notebooks/mnist.ipynb out.ipynb -p epochs 1 --log-output --no-progress-bar"
    memory = []
    with start(project, "-m", *command.split(), OMP_NUM_THREADS=1) as process:  # other tests have the rest
        threading.Thread(target=watch_memory, args=(process, memory), daemon=True).start()
        output, _ = process.communicate()
    assert process.returncode == 0, output

    assert max(memory) < 2.8e9, "bytes: too much for a free Binder or a small pod"

    after = files_in(project)
    assert {name: after[name] for name in before} == before
    (metrics,) = map(json.loads, after["output/metrics.jsonl"].splitlines())
    assert metrics["accuracy"] >= 0.98

    done = nbformat.read(project / "out.ipynb", as_version=4)
    assert {output.output_type for output in outputs_of(done)} <= {"stream", "display_data"}
    assert {output.name for output in outputs_of(done) if output.output_type == "stream"} == {"stdout"}
    text = "".join(output.get("text", "") for output in outputs_of(done))
    read = dict(re.findall(r"^(\w+): ([\d.]+)% read correctly$", text, re.MULTILINE))
    assert float(read["spoiled"]) < 50 and float(read["mended"]) > float(read["unchanged"]) - 5
    images = images_of(done)
    assert len(images) == PICTURES - 1  # a single step has no speed
    for image in images:
        assert_is_a_picture(image)
