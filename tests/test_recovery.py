"""What a training survives on one machine: signals, damaged files, full disks, bad numbers."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.run

from rig.faults import DAMAGES, REGIONS, damage_checkpoint, damage_data, kill_and_resume, stop_and_resume
from rig.processes import Process, clean_environment, need, skip
from rig.project import make_small_project
from rig.training import OPTIONS, TRAIN, results, trainer_of, weights

# As a launcher of Training:
IN_TWO = ("mnist.py", "--num-processes", 2)
TORCHRUN = (torch.distributed.run.__file__, "--standalone", "--nproc-per-node", 2, "mnist.py")


@pytest.fixture
def output(project):
    """The output folder of a finished training: two good checkpoints, the end and 120 samples before."""
    project.reference(1)
    folder = project.folder / "output"
    shutil.copytree(project.folder / "uninterrupted-1", folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def trainer(project, monkeypatch):
    """The trainer, called as a notebook's %run does, and so without waiting for another Python."""
    monkeypatch.chdir(project.folder)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PET_NNODES", "PET_NPROC_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    return trainer_of(project.folder)


@pytest.fixture
def small_disk(tmp_path):
    """A disk with room for two checkpoints, but not for the third that is written beside them."""
    need("mount", "mount")
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command).returncode:
        skip("the right to mount a disk is missing: be root")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def refusal(trainer, *arguments):
    """Run the trainer, which must end with code 1. Returns its one sentence."""
    with pytest.raises(SystemExit) as refused:
        trainer.main([str(argument) for argument in arguments])
    message = refused.value.code
    assert isinstance(message, str), message  # sys.exit(text) prints it and leaves with 1
    assert message.startswith("mnist.py: ") and len(message.splitlines()) == 1
    return message


# --- Killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "moment"), [(1, "start-up"), (1, "saving"), (3, "training"), (3, "evaluation")]
)
def test_killed_at_any_instant_and_resumed_ends_with_the_same_bits(project, world_size, moment):
    kill_and_resume(project, f"kill-{world_size}-{moment}", world_size, moment, random.Random(moment))


# --- Asked to stop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "moment", "number"), [(1, "training", signal.SIGINT), (3, "evaluation", signal.SIGTERM)]
)
def test_a_signal_is_obeyed_within_20_s_and_no_step_is_lost(project, world_size, moment, number):
    name = f"stop-{world_size}-{moment}-{number}"
    codes = stop_and_resume(project, name, world_size, moment, random.Random(1), number)
    assert set(codes) == {143}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_still_waits_for_the_others(project, number):
    with project.training(f"before-{number}", world_size=2) as training:
        master, worker = training.fork().processes
        worker.kill()
        assert master.until("Started ")  # and now it waits for a worker that never comes
        with pytest.raises(AssertionError, match=r"still runs"):
            master.end(2)
        master.send_signal(number)
        code, printed = master.end(5)
    assert code == -number
    assert len(printed.splitlines()) == 1  # how it was started
    assert not training.saved()


def test_neither_a_terminal_that_hangs_up_nor_a_late_signal_ends_what_nohup_started(project):
    need("nohup", "coreutils")
    expected, lines = project.reference(2)
    output = project.folder / "nohup"
    command = ["nohup", sys.executable, *IN_TWO, *OPTIONS, "--output-dir", output]
    environment = clean_environment(OMP_NUM_THREADS=1)
    with Process(command, project.folder / "nohup.log", cwd=project.folder, env=environment) as nohup:
        try:
            assert nohup.until(lambda: nohup.output.count("- Loss: ") > 2)
            os.killpg(nohup.pid, signal.SIGHUP)  # as the kernel does to all that a terminal has started
            assert nohup.until(lambda: len(results(nohup.output)) == len(lines))
            while nohup.poll() is None:  # all is done: from now on, no signal changes an exit code
                for process in nohup.family():
                    with suppress(psutil.NoSuchProcess):
                        process.terminate()
                time.sleep(0.02)
        finally:
            nohup.kill_all()
    assert (nohup.returncode, results(nohup.output)) == (0, lines), nohup.output
    assert weights(output) == expected


# --- A launcher and its processes ---------------------------------------------------------------


def leave(processes, timeout):
    """Return whether all leave in time. Who has no parent any more may stay as a zombie for a while."""

    def at_work():
        there = psutil.process_iter(["status"])
        return any(p in processes and p.info["status"] != psutil.STATUS_ZOMBIE for p in there)

    limit = time.monotonic() + timeout
    while at_work() and time.monotonic() < limit:
        time.sleep(0.05)
    return not at_work()


ONLY_ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="others do not tell that a parent died")


@ONLY_ON_LINUX
def test_launchers_pass_a_signal_on_take_over_from_each_other_and_leave_no_orphans(project):
    expected, lines = project.reference(2)
    seen = []
    with project.training("launched", 2) as training:
        for launcher, number, codes in (
            (IN_TWO, signal.SIGTERM, [143]),
            (TORCHRUN, signal.SIGKILL, [-signal.SIGKILL]),
        ):
            process = training.launch(launcher, "--resume")
            assert process.until(lambda: training.printed.count("- Loss: ") > 6)
            family = process.family()
            process.send_signal(number)
            assert training.end(20) == codes, training.printed
            assert leave(family, 20), f"still at work:\n{training.printed}"
            assert "Stopped by a signal" in training.printed
            seen += results(training.printed)
        training.complete()
        assert seen + results(training.processes[0].output) == lines
        assert weights(training.output) == expected


@ONLY_ON_LINUX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 1), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_launcher_that_ends_before_training_begins_leaves_no_orphans(project, number, code):
    with project.training(f"launching-{number}", 2) as training:
        launcher = training.launch(IN_TWO)
        assert launcher.until(lambda: len(launcher.family()) > 2)
        time.sleep(0.5)  # torchrun does not yet know a process that it is just starting
        processes = launcher.family()[1:]
        launcher.send_signal(number)
        assert training.end(20) == [code]  # not 143: nobody has saved
        assert leave(processes, 30), training.printed  # most of it is the import of PyTorch
        said = set(training.printed.splitlines())
        assert said <= {"mnist.py: the process that has started this one is gone"}, said
        assert not training.saved()


def test_a_local_process_that_is_killed_takes_the_others_along_and_is_named(project):
    with project.training("killed", 2) as training:
        launcher = training.launch(IN_TWO)
        assert launcher.until("- Loss: ")
        processes = launcher.family()[1:]
        processes[-1].kill()
        assert training.end(20) == [1], training.printed
        assert leave(processes, 0), "some are still at work"
        said = [line for line in training.printed.splitlines() if line.startswith("mnist.py: ")]
        assert re.search(r"process [01] was ended by SIGKILL .*memory", said[-1])
        assert "Traceback" not in training.printed


# --- Damaged checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(project, output, region, damage):
    rng = random.Random(region + damage)
    seen = [damage_checkpoint(project, output, region, damage, rng) for _ in range(2)]
    assert "named, and the previous one used" in seen


def test_damaged_data_is_named_and_not_trained_on(project):
    for name in trainer_of(project.folder).FILES:
        for damage in DAMAGES:
            damage_data(project, name, damage, random.Random(damage + name))


# --- Where nothing can be written ---------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(project, small_disk):
    expected, lines = project.reference(1)
    with project.training(small_disk / "output") as training:
        assert training.fork().end() == [1]
        printed = training.printed
        assert printed.splitlines()[-1].startswith("mnist.py: cannot write ")
        assert "No space left on device" in printed and "Traceback" not in printed
        before = results(printed)
        names = {path.name for path in training.output.iterdir()} - {".lock", "metrics.jsonl"}
        assert names == {"checkpoint.pt", "checkpoint.previous.pt"}
        subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
        printed = training.complete().printed
        assert "is not a good checkpoint" not in printed
        after = results(printed)
        assert len(before) + len(after) == len(lines) + 5  # those between the last save and the end
        assert weights(training.output) == expected


def test_memory_that_lacks_in_evaluation_names_its_flag(trainer, tmp_path, monkeypatch):
    def lacking(*_, **__):  # what only the evaluation calls
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")

    monkeypatch.setattr("torch.nn.functional.nll_loss", lacking)
    message = refusal(trainer, *OPTIONS, "--output-dir", tmp_path, "--dry-run")
    assert "memory does not suffice, try a smaller --test-batch-size" in message


def test_an_output_folder_that_cannot_be_written_is_one_sentence(trainer, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "checkpoint.pt.tmp").mkdir()
    for folder, named in (("file", "file"), ("file/below", "file"), (".", "checkpoint.pt.tmp")):
        assert f"{tmp_path / named}" in refusal(trainer, *OPTIONS, "--output-dir", tmp_path / folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_lock_that_another_host_has_left_is_named_with_what_to_delete(trainer, output, monkeypatch):
    """A file system without locks (ENOSYS): the file itself is the lock, and nobody else takes it away."""
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    (output / ".lock").write_text("4711\nanother-host\n")
    message = refusal(trainer, *OPTIONS, "--resume", "--output-dir", output)
    assert f"another run writes to {output}" in message
    assert "4711 on another-host" in message and ".lock" in message and "delete" in message


def test_a_second_user_of_the_group_goes_on_where_the_first_one_stopped(monkeypatch, capfd):
    if os.geteuid():
        skip("root is missing, and without it nobody can be another user")
    group, umask = 4321, os.umask(0o022)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        project = make_small_project(Path(folder, "project"), 200, 100)
        monkeypatch.chdir(project)
        output, trainer = project / "output", trainer_of(project)
        output.mkdir()
        os.chown(output, -1, group)
        output.chmod(0o775)
        try:
            # Root begins, twice: that brings in the rest of PyTorch, which others may not be able to read.
            for epochs, user in enumerate((0, 0, 1111, 2222), 1):
                os.setegid(group)
                os.seteuid(user)
                trainer.main(["--epochs", str(epochs), "--resume", "--save-model", "--no-cuda"])
                os.seteuid(0)
                for path in [*output.iterdir()]:  # one that was killed on the way leaves such files
                    left_over = path.with_name(path.name + ".tmp")
                    left_over.write_bytes(b"")
                    os.chown(left_over, user, group)
        finally:
            os.seteuid(0)
            os.setegid(0)
            os.umask(umask)
        assert capfd.readouterr().out.count("Resuming in epoch ") == 3


# --- Resumed with something else ----------------------------------------------------------------


def test_a_resumed_run_keeps_its_precision(trainer, tmp_path, monkeypatch, capfd):
    """Also on a machine that is slower in bfloat16; unless a flag says otherwise."""
    options = [str(word) for word in (*OPTIONS, "--batch-size", 500, "--output-dir", tmp_path, "--resume")]
    trainer.main([*options, "--epochs", "1", "--bf16"])
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)
    trainer.main(options)
    assert torch.load(tmp_path / "checkpoint.pt", weights_only=True)["hyperparameters"]["bf16"]
    trainer.main([*options, "--no-bf16"])
    started = re.findall("^Started .*, (.+)$", capfd.readouterr().out, re.MULTILINE)
    assert started == ["bfloat16", "bfloat16", "float32"]


# --- Numbers that go wrong ----------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run_and_the_good_checkpoint_stays(trainer, output):
    before = weights(output)
    # At the end of an epoch, at a save within it, or in the very last step.
    for more in ((), ("--checkpoint-interval", 2), ("--batch-size", TRAIN, "--epochs", 1)):
        message = refusal(trainer, "--lr", "1e30", "--output-dir", output, "--no-cuda", *more)
        assert re.search("in epoch 1, the loss is (nan|inf): try a smaller --lr", message)
    assert weights(output) == before
