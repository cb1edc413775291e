"""The command line and a launcher's variables: strict, documented, and a sentence for every mistake."""

import logging
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.elastic as elastic

import mnist
from rig.processes import clean_environment, fork, shared_state
from rig.project import ROOT


@pytest.fixture
def refuse(capsys):
    """Return a function that returns the sentence with which flags are refused (exit code 2)."""

    def refuse(*flags):
        with pytest.raises(SystemExit) as exit:
            mnist.parse_arguments([str(flag) for flag in flags])
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


def test_every_flag_has_its_documented_default():
    args = vars(mnist.parse_arguments([]))
    assert args == {
        "epochs": 5, "batch_size": 64, "test_batch_size": 1000, "optimizer": "sgd", "lr": 0.1,
        "gamma": 0.75, "momentum": 0.9, "label_smoothing": 0.1, "augment": True, "bf16": None, "seed": 1,
        "log_interval": 10, "no_cuda": False, "backend": None, "num_processes": 1, "data_dir": "datasets",
        "output_dir": "output", "resume": False, "checkpoint_interval": None, "timeout": 60,
        "save_model": False, "dry_run": False,
    }  # fmt: skip
    numbers = {"--" + name.replace("_", "-") for name in args if type(args[name]) in (int, float)}
    assert numbers | {"--checkpoint-interval"} == BAD_VALUES.keys()
    assert mnist.parse_arguments(["--optimizer", "adadelta"]).lr == 1.0
    args = mnist.parse_arguments(["--no-accel", "--no-augment"])
    assert (args.no_cuda, args.augment) == (True, False)


BAD_VALUES = {
    "--epochs": ["0", "-1", "1.5", "abc", "", "1" + 30 * "0"],
    "--batch-size": ["0", "-64", "many", "nan"],
    "--test-batch-size": ["0", "1" + 30 * "0"],
    "--log-interval": ["0", "-1"],
    "--num-processes": ["0", "two"],
    "--checkpoint-interval": ["0", "-1", "1e3"],
    "--timeout": ["0", "-5", "86401", "inf"],
    "--seed": ["1.5", "one", str(2**63), str(-(2**63) - 1)],
    "--lr": ["0", "-1", "1e39", "nan", "inf", "fast"],
    "--gamma": ["0", "1.1", "-0.7", "nan"],
    "--momentum": ["1", "-0.1", "nan"],
    "--label-smoothing": ["1", "-0.1", "some"],
}


@pytest.mark.parametrize("flag, value", [(flag, v) for flag, values in BAD_VALUES.items() for v in values])
def test_a_bad_value_is_refused_with_the_value_and_what_is_right(refuse, flag, value):
    sentence = refuse(f"{flag}={value}")
    assert re.fullmatch(rf"mnist.py: error: argument {flag}: '{value}' is not a (whole )?number.*", sentence)


def test_unknown_flags_and_names_and_shortened_flags_are_refused(refuse):
    assert refuse("--epoch", 1) == "mnist.py: error: unrecognized arguments: --epoch 1"
    assert "unrecognized arguments: epochs" in refuse("epochs")
    for flag in ("--optimizer", "--backend"):
        assert "choose from" in refuse(flag, "nonsense")


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 2**63 - 1])
def test_any_number_of_64_bits_is_a_seed_whose_checkpoint_can_be_read_back(tmp_path, seed):
    args = mnist.parse_arguments(["--seed", str(seed)])
    assert args.seed == seed
    mnist.save(mnist.Trainer(mnist.Hyperparameters(seed=seed)), tmp_path)
    assert mnist.load_checkpoint(tmp_path)["hyperparameters"]["seed"] == seed


# --- A launcher's variables

JOB = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
BAD_VARIABLES = {
    "RANK": [None, "", "one", "-1", "2"],
    "WORLD_SIZE": [None, "", "two", "0", "-2", "1000001"],
    "LOCAL_RANK": ["", "one", "-1", "2"],  # in a pod of a PyTorchJob there is none
    "MASTER_ADDR": [None, ""],
    "MASTER_PORT": [None, "", "http", "0", "65536"],
}


@pytest.fixture
def refuse_variables(monkeypatch):
    """Return a function that returns the sentence with which these variables are refused (exit code 1)."""
    for name in [*JOB, *(name for name in os.environ if name.startswith("PET_"))]:
        monkeypatch.delenv(name, raising=False)
    for name in ("OMP_NUM_THREADS", "PET_SIGNALS_TO_HANDLE"):  # or those of the launcher would stay
        monkeypatch.setenv(name, os.environ.get(name, ""))

    def refuse(variables, *flags):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as exit:
            mnist.main(list(flags))
        assert len(exit.value.code.splitlines()) == 1
        return exit.value.code

    return refuse


@pytest.mark.parametrize("name, value", [(name, v) for name, values in BAD_VARIABLES.items() for v in values])
def test_a_bad_or_missing_variable_is_named_in_a_sentence(refuse_variables, name, value):
    variables = {k: v for k, v in (JOB | {name: value}).items() if v is not None}
    sentence = refuse_variables(variables)
    assert sentence.startswith(f"mnist.py: the variable {name} must be ")
    assert value is None or name == "MASTER_ADDR" or sentence.endswith(f" not {value!r}")


@pytest.mark.parametrize("value", ["", "many", "0", "3:1"])
@pytest.mark.parametrize("name", ["PET_NNODES", "PET_NPROC_PER_NODE"])
def test_what_torchrun_cannot_take_from_an_operator_is_one_sentence(refuse_variables, name, value):
    assert "PET_" in refuse_variables({name: value})


@pytest.mark.parametrize("value", ["", "first", "-1", "65536"])
@pytest.mark.parametrize("name", ["PET_NODE_RANK", "PET_MASTER_PORT", "PET_MAX_RESTARTS"])
def test_a_wrong_number_from_an_operator_is_named(refuse_variables, name, value):
    sentence = refuse_variables({"PET_NNODES": "2", name: value})
    assert sentence == f"mnist.py: the variable {name} must be a whole number from 0 to 65535, not {value!r}"


LAUNCHED = [(JOB, "does not go with a launcher"), (JOB | {"LOCAL_RANK": ""}, "is for one machine")]
LAUNCHED.append(({"PET_NNODES": "2"}, "is for one machine"))


@pytest.mark.parametrize("variables, sentence", LAUNCHED)
def test_who_has_a_launcher_already_is_told_so_and_not_ignored(refuse_variables, variables, sentence):
    variables = {name: value for name, value in variables.items() if value}
    assert f"--num-processes {sentence}" in refuse_variables(variables, "--num-processes", "2")


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(), "OSError"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RuntimeError("\n"), "rank 0 of 2 (meeting at localhost:29500) failed, or lost another: Runtime"),
        # This process's own want:
        (RuntimeError("can't allocate memory"), "memory does not suffice, try a smaller --batch-size (can't"),
    ],
)
def test_an_error_in_a_job_is_a_sentence(refuse_variables, monkeypatch, tmp_path, error, sentence):
    def fail(*_):
        raise error

    monkeypatch.setattr(mnist.Job, "rendezvous", fail)
    monkeypatch.setattr(mnist, "settle_in", lambda: None)  # who has torchrun ends with its parent
    assert refuse_variables(JOB, "--output-dir", str(tmp_path)).startswith(f"mnist.py: {sentence}")


@pytest.mark.parametrize(
    "codes, expected",
    [
        ([0, 0], 0),
        ([143, 143], 143),
        ([0, 143], 143),  # a signal came when one of them had already ended
        ([143, 1], 1),  # who could not save
        ([1, 3, 143], 3),  # a process's own code
        ([-signal.SIGTERM, 143], 1),
        ([1, -signal.SIGKILL], r"process 1 was ended by SIGKILL \(often, memory has run out\)"),
        ([-signal.SIGSEGV, -signal.SIGTERM], r"process 0 was ended by SIGSEGV$"),
        (None, 1),  # it is not known
    ],
)
def test_a_launcher_leaves_with_what_its_processes_left_with(codes, expected):
    def torchrun():
        processes = [SimpleNamespace(proc=SimpleNamespace(wait=partial(int, code))) for code in codes or ()]
        context = SimpleNamespace(subprocess_handlers=dict(enumerate(processes)))
        agent = SimpleNamespace(_pcontext=context) if codes else None
        raise elastic.multiprocessing.SignalException(f"{agent} was asked to stop", signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch, mnist.state_restored():
        patch.setattr("torch.distributed.run.main", lambda _: torchrun())
        patch.setenv("PET_NNODES", "1")
        if isinstance(expected, int):
            assert mnist.launch("2", []) == expected
        else:
            with pytest.raises(ChildProcessError, match=expected):
                mnist.launch("2", [])


def test_several_processes_share_the_processors_that_there_are(monkeypatch):
    """Not those of the whole machine: a container may have a few of them only."""
    shares = []
    note = lambda words: shares.append((words[0], os.environ["OMP_NUM_THREADS"]))  # noqa: E731
    monkeypatch.setattr("torch.distributed.run.main", note)
    monkeypatch.setattr(mnist, "count_processors", lambda: 6)
    for each in (2, 9):
        with monkeypatch.context() as environment, mnist.state_restored():  # launch silences the log
            environment.setattr(os, "environ", clean_environment(PET_NNODES=1))
            os.environ.pop("OMP_NUM_THREADS", None)
            assert mnist.launch(str(each), []) == 0
    assert shares == [("--nproc-per-node=2", "3"), ("--nproc-per-node=9", "1")]


IN_A_POD = {name: value for name, value in JOB.items() if name != "LOCAL_RANK"} | {"PET_NNODES": "2"}


@pytest.mark.parametrize(
    "flags, variables, accelerators, count",
    [
        ([], {}, 4, None),
        (["--num-processes", "3"], {}, 0, "3"),
        ([], IN_A_POD, 4, None),
        ([], IN_A_POD | {"PET_NPROC_PER_NODE": "1"}, 4, None),
        ([], IN_A_POD | {"PET_NPROC_PER_NODE": "3"}, 0, "3"),
        ([], IN_A_POD | {"PET_NPROC_PER_NODE": "auto"}, 0, None),
        ([], IN_A_POD | {"PET_NPROC_PER_NODE": "auto"}, 1, None),
        ([], IN_A_POD | {"PET_NPROC_PER_NODE": "auto"}, 4, "4"),
        (["--no-cuda"], IN_A_POD | {"PET_NPROC_PER_NODE": "auto"}, 4, None),
        ([], {"PET_NNODES": "2"}, 4, "1"),
        ([], {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "auto"}, 4, "auto"),
        ([], JOB | {"PET_NNODES": "2", "PET_NPROC_PER_NODE": "3"}, 4, None),  # one of torchrun's processes
    ],
)
def test_how_many_processes_a_pod_is_to_have(monkeypatch, flags, variables, accelerators, count):
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: accelerators)
    assert mnist.count_to_launch(mnist.parse_arguments(flags)) == count


# --- The machine


@pytest.mark.parametrize(
    "groups, files, count",
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "5000 100000"}, 1),
        ("0::/", {"cpu.max": "6400000 100000"}, 8),
        ("0::/my.slice/job", {"my.slice/job/cpu.max": "300000 100000"}, 3),
        ("0::/my.slice/job", {"my.slice/job/cpu.max": "max 100000", "my.slice/cpu.max": "200000 100000"}, 2),
        ("4:memory:/m\n3:cpu,acct:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ("3:cpu,acct:/a/b", {"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ("3:cpu,acct:/a/b", {"cpu/a/cpu.cfs_quota_us": "50000", "cpu/a/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_processors_are_those_of_all_groups_of_a_process(monkeypatch, tmp_path, groups, files, count):
    root, proc = tmp_path / "sys/fs/cgroup", tmp_path / "proc/self/cgroup"
    for path, text in ({root / name: text for name, text in files.items()} | {proc: groups}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    below = lambda path, *more: Path(str(tmp_path) + str(path).removeprefix(str(tmp_path)), *more)  # noqa: E731
    monkeypatch.setattr(mnist, "Path", below)
    assert mnist.count_processors() == count


ON_ONE_PROCESSOR = """
import os
import mnist
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
mnist.main(["--dry-run", "--no-cuda"])
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system binds no process to processors")
def test_threads_are_no_more_than_processors(small):
    (small / "program.py").write_text(ON_ONE_PROCESSOR)
    code, log = fork(small, "program.py", OMP_NUM_THREADS=4)
    assert code == 0 and log.splitlines()[0].split(", ")[3] == "1 thread", log


IN_LITTLE_MEMORY = """
import re, resource, sys
import mnist
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 60 * 2**20, resource.RLIM_INFINITY))
mnist.main(["--batch-size", "1000", "--epochs", "1", "--no-cuda"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit a process's memory like this")
def test_a_batch_for_which_memory_does_not_suffice_is_one_line(small):
    (small / "program.py").write_text(IN_LITTLE_MEMORY)
    code, log = fork(small, "program.py", OMP_NUM_THREADS=1)
    assert code == 1 and len(log.splitlines()) == 2, log
    assert "mnist.py: memory does not suffice, try a smaller --batch-size" in log
    assert re.search(r"tried to allocate \d+ bytes", log)


def test_a_log_that_cannot_be_written_is_one_line(small):
    """As with `python mnist.py | head`, after which nobody reads on."""
    reader, output = os.pipe()
    os.close(reader)
    how = {"cwd": small, "env": clean_environment(), "stdout": output, "stderr": subprocess.PIPE}
    done = subprocess.run([sys.executable, "mnist.py", "--dry-run"], text=True, **how)
    os.close(output)
    assert done.returncode == 1 and re.fullmatch(r"mnist.py: .*Broken pipe\n", done.stderr), done.stderr


# --- Beside the program


def test_the_table_of_flags_is_the_help_text(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    with pytest.raises(SystemExit):
        mnist.parse_arguments(["--help"])
    flags = dict(re.findall(r"^  (--.*?)(?:  +|\n +)(\S.*)$", capsys.readouterr().out, re.M))
    table = dict(re.findall(r"^\| `(--[^`]*)` \| (.*) \|$", (ROOT / "docs" / "trainer.md").read_text(), re.M))
    assert table == flags


@pytest.mark.parametrize("fails", [False, True])
def test_after_a_dry_run_a_notebook_has_everything_back_and_no_files(small, monkeypatch, fails):
    """%run runs it in the notebook's own process, which must not keep the program's ways."""
    monkeypatch.chdir(small)
    for name in JOB:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CHANGED", "before")
    monkeypatch.setenv("DELETED", "before")

    def state():
        return shared_state() | {"handlers": logging.getLogger().handlers[:]}

    def test(*arguments):
        seen.append(state())
        os.environ.update(CHANGED="after", NEW="after")
        del os.environ["DELETED"]
        logging.disable()
        logging.warning("a logger remembers that it was silent")
        return mnist.no_such_name if fails else original(*arguments)

    before, seen, original = state(), [], mnist.test
    monkeypatch.setattr(mnist, "test", test)
    with pytest.raises(AttributeError) if fails else nullcontext():
        mnist.main(["--dry-run", "--no-cuda", "--save-model"])
    assert all(seen[0][name] != before[name] for name in ("signals", "handlers"))
    assert len(seen[0]["handlers"]) == 1, "lines would appear twice"
    assert state() == before and logging.getLogger().isEnabledFor(logging.WARNING)
    assert not (small / "output").exists()
