"""The command line: strict, documented, and a sentence for every mistake."""

import os
import re

import pytest
from conftest import ROOT, run

import mnist


@pytest.fixture
def refuse(capsys):
    """Return a function that returns the sentence with which flags are refused (exit code 2)."""

    def refuse(*flags):
        with pytest.raises(SystemExit) as exit:
            mnist.parse_arguments([str(flag) for flag in flags])
        assert exit.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    return refuse


def test_defaults_are_those_of_the_plan():
    args = vars(mnist.parse_arguments([]))
    assert args == {
        "epochs": 5, "batch_size": 64, "test_batch_size": 1000, "optimizer": "sgd", "lr": 0.07,
        "gamma": 0.75, "momentum": 0.9, "label_smoothing": 0.1, "augment": True, "bf16": False, "seed": 1,
        "log_interval": 10, "no_cuda": False, "backend": None, "num_processes": 1, "data_dir": "datasets",
        "output_dir": "output", "resume": False, "checkpoint_interval": 0, "timeout": 60,
        "save_model": False, "dry_run": False,
    }  # fmt: skip
    assert mnist.parse_arguments(["--optimizer", "adadelta"]).lr == 1.0
    assert mnist.parse_arguments(["--no-accel"]).no_cuda


BAD_VALUES = {
    "--epochs": ["0", "-1", "1.5", "abc", ""],
    "--batch-size": ["0", "-64", "many", "nan"],
    "--test-batch-size": ["0"],
    "--log-interval": ["0", "-1"],
    "--num-processes": ["0", "two"],
    "--checkpoint-interval": ["-1", "1e3"],
    "--timeout": ["0", "-5", "86401", "inf"],
    "--seed": ["1.5", "one"],
    "--lr": ["0", "-1", "nan", "inf", "fast"],
    "--gamma": ["0", "1.1", "-0.7", "nan"],
    "--momentum": ["1", "-0.1", "nan"],
    "--label-smoothing": ["1", "-0.1", "some"],
}


@pytest.mark.parametrize("flag, value", [(flag, v) for flag, values in BAD_VALUES.items() for v in values])
def test_a_bad_value_is_refused_with_the_value_and_what_is_right(refuse, flag, value):
    sentence = refuse(f"{flag}={value}")
    assert re.fullmatch(rf"mnist.py: error: argument {flag}: '{value}' is not a (whole )?number.*", sentence)


def test_every_flag_that_takes_a_number_is_tried_with_bad_ones():
    numbers = [name for name, value in vars(mnist.parse_arguments([])).items() if type(value) in (int, float)]
    assert {"--" + name.replace("_", "-") for name in numbers} == set(BAD_VALUES)


@pytest.mark.parametrize("flag", ["--optimizer", "--backend"])
def test_an_unknown_name_is_refused_with_the_known_ones(refuse, flag):
    assert "choose from" in refuse(flag, "nonsense")


def test_unknown_and_shortened_flags_are_refused(refuse):
    assert refuse("--epoch", 1) == "mnist.py: error: unrecognized arguments: --epoch 1"
    assert "unrecognized arguments: --frobnicate" in refuse("--frobnicate")
    assert "unrecognized arguments: epochs" in refuse("epochs")


def test_any_whole_number_is_a_seed():
    for seed in (0, -1, 2**70):
        args = mnist.parse_arguments(["--seed", str(seed)])
        assert args.seed == seed
        mnist.epoch_order(10, args.seed, 1)


def test_bad_usage_ends_the_program_with_code_2(small):
    code, log = run(small, "mnist.py", "--epochs", "0")
    assert code == 2 and log.splitlines()[-1].endswith("'0' is not a whole number of 1 or more")
    assert not (small / "output").exists()


def test_a_batch_larger_than_the_training_set_is_refused_in_one_line(small):
    code, log = run(small, "mnist.py", "--batch-size", 1001)
    assert code == 1 and log.splitlines()[-1].startswith("mnist.py: --batch-size is too large: 1001")
    assert "Traceback" not in log


@pytest.mark.parametrize(
    "variables, sentence",
    [
        ({"WORLD_SIZE": 3}, "^RANK, MASTER_ADDR, MASTER_PORT must be set beside RANK or WORLD_SIZE"),
        ({"RANK": 1, "MASTER_ADDR": "one", "MASTER_PORT": 1}, "^WORLD_SIZE must be set"),
        ({"PET_NNODES": 3}, "start `torchrun mnist.py`"),
        ({"PET_NPROC_PER_NODE": 2, "WORLD_SIZE": 6, "RANK": 0}, "start `torchrun mnist.py`"),
    ],
)
def test_pods_that_would_never_meet_are_told_so(monkeypatch, variables, sentence):
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match=sentence):
        mnist.Job.from_environment()


def test_the_flags_table_of_the_readme_is_the_help_text(capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "COLUMNS", "200")
    with pytest.raises(SystemExit):
        mnist.parse_arguments(["--help"])
    flags = dict(re.findall(r"^  (--.*?)(?:  +|\n +)(\S.*)$", capsys.readouterr().out, re.M))
    table = dict(re.findall(r"^\| `(--[^`]*)` \| (.*) \|$", (ROOT / "README.md").read_text(), re.M))
    assert table == flags


def test_after_the_program_a_notebook_has_its_signals_back():
    """%run runs it in the notebook's own process, which must not keep the program's way to end."""
    code = """
import runpy, signal, sys
sys.argv = ["mnist.py", "--help"]
try:
    runpy.run_path("mnist.py", run_name="__main__")
except SystemExit:
    print("SIGTERM:", signal.getsignal(signal.SIGTERM).name)
"""
    assert "SIGTERM: SIG_DFL" in run(ROOT, "-c", code)[1]
