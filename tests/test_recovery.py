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
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.run

from rig.faults import DAMAGES, REGIONS, damage_checkpoint, damage_data, kill_and_resume, stop_and_resume
from rig.processes import Process, clean_environment, fork, need, skip
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
    assert message.startswith("mnist.py: ")
    assert len(message.splitlines()) == 1
    return message


# --- Killed -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "moment"), [(1, "start-up"), (1, "saving"), (3, "training"), (3, "evaluation")]
)
def test_killed_at_any_instant_and_resumed_ends_with_the_same_bits(project, world_size, moment):
    kill_and_resume(project, f"kill-{world_size}-{moment}", world_size, moment, random.Random(moment))


def test_killed_again_and_again_loses_no_checkpoint(project):
    expected, lines = project.reference(1)
    with project.training("again") as training:
        for steps in (12, 9, 7):
            training.fork("--resume")
            process = training.processes[0]
            assert process.until(lambda p=process, n=steps: p.output.count("- Loss: ") > n)
            training.kill()
        training.complete()
        after = results(training.processes[0].output)
        assert after == lines[len(lines) - len(after) :]
        assert len(after) < len(lines) - 15
        assert weights(training.output) == expected


# --- Asked to stop ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "moment", "number"),
    [
        (1, "training", signal.SIGINT),
        (1, "saving", signal.SIGTERM),
        (3, "training", signal.SIGTERM),
        (3, "evaluation", signal.SIGTERM),
    ],
)
def test_a_signal_is_obeyed_within_20_s_and_no_step_is_lost(project, world_size, moment, number):
    name = f"stop-{world_size}-{moment}-{number}"
    codes = stop_and_resume(project, name, world_size, moment, random.Random(1), number)
    assert set(codes) == {143}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_process_that_still_waits_for_the_others(project, number):
    with project.training(f"before-{number}", world_size=3) as training:
        master, *workers = training.fork().processes
        for worker in workers:
            worker.kill()
        assert master.until("Started ")  # and now it waits for workers that never come
        with pytest.raises(AssertionError, match=r"still runs"):
            master.end(2)
        master.send_signal(number)
        code, printed = master.end(5)
    assert code == -number
    assert len(printed.splitlines()) == 1  # how it was started
    assert not training.saved()


def test_a_signal_is_obeyed_by_the_first_process_of_a_container(project):
    """The kernel spares process number 1 all signals for which it has not made provisions."""
    need("unshare", "util-linux")
    if os.geteuid():
        skip("root is missing, and without it no process can be number 1")
    command = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-u", "mnist.py", *OPTIONS]
    environment = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    log, output = project.folder / "first.log", project.folder / "first"
    with Process([*command, "--output-dir", output], log, cwd=project.folder, env=environment) as unshare:
        try:
            assert unshare.until("- Loss: ")
            unshare.family()[-1].send_signal(signal.SIGTERM)
            code, _ = unshare.end(20)
        finally:
            unshare.kill_all()
    assert code == 143
    assert (output / "checkpoint.pt").exists()


def test_a_signal_while_python_still_loads_torch_ends_it_at_once(project):
    with project.training("loading") as training:
        process = training.start().processes[0]
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)
        assert process.end(5) == (-signal.SIGTERM, "")


def test_a_signal_after_the_last_line_changes_nothing(project):
    expected, lines = project.reference(2)
    with project.training("last", 2) as training:
        processes = training.start().processes
        assert end_under_signals(processes, lines) == [0, 0], training.printed
    assert results(processes[0].output) == lines
    assert weights(training.output) == expected


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
            assert end_under_signals([nohup], lines) == [0], nohup.output
        finally:
            nohup.kill_all()
    assert results(nohup.output) == lines
    assert weights(output) == expected


def end_under_signals(processes, lines):
    """Send SIGTERM from the moment at which the last of the lines is there. Returns the exit codes."""
    assert processes[0].until(lambda: len(results(processes[0].output)) == len(lines))
    while any(process.poll() is None for process in processes):
        for process in processes:
            process.send_signal(signal.SIGTERM)
        time.sleep(0.02)
    return [process.poll() for process in processes]


# --- A launcher and its processes ---------------------------------------------------------------


def leave(processes, timeout):
    """Return whether all leave in time. Who has no parent any more may stay as a zombie for a while."""

    def at_work(process):
        try:
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    limit = time.monotonic() + timeout
    while any(at_work(process) for process in processes) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(at_work(process) for process in processes)


def test_a_launcher_that_is_asked_to_stop_before_training_begins_leaves_with_its_processes(project):
    with project.training("launching", 2) as training:
        launcher = training.launch(IN_TWO)
        assert launcher.until(lambda: len(launcher.family()) > 2)
        time.sleep(0.5)  # torchrun does not yet know a process that it is just starting
        family = launcher.family()
        launcher.send_signal(signal.SIGTERM)
        assert training.end(20) == [1]  # not 143: nobody has saved
        assert "Traceback" not in training.printed and not training.saved()
        assert leave(family, 10)


FAILS_TO_SAVE = """
import mnist
write = mnist.write
def fail(path, *more, **how):
    if path.name == "checkpoint.pt":
        raise OSError(f"cannot write {path}: no")
    write(path, *more, **how)
mnist.write = fail
mnist.__file__ = __file__
mnist.main()
"""


def test_a_launcher_whose_process_fails_to_save_does_not_say_that_all_is_saved(project):
    (project.folder / "fails.py").write_text(FAILS_TO_SAVE)
    with project.training("fails", 2) as training:
        launcher = training.launch(("fails.py", "--num-processes", 2), "--checkpoint-interval", 999)
        assert launcher.until(lambda: launcher.output.count("- Loss: ") > 2)
        launcher.send_signal(signal.SIGTERM)
        assert training.end(20) == [1] and "checkpoint.pt: no" in training.printed, training.printed


ONLY_ON_LINUX = pytest.mark.skipif(
    sys.platform != "linux", reason="only Linux tells a process that its parent died"
)


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
def test_processes_whose_launcher_dies_before_they_listen_leave_at_once(project):
    with project.training("early orphans", 2) as training:
        launcher = training.launch(IN_TWO)
        assert launcher.until(lambda: len(launcher.family()) > 2)
        orphans = launcher.family()[1:]
        launcher.kill()
        assert leave(orphans, 30), f"still at work:\n{launcher.output}"  # most is the import of PyTorch
        said = launcher.output.splitlines()
        assert said == ["mnist.py: the process that has started this one is gone"] * len(said), said


@pytest.mark.parametrize("killed", ["one", "all"])
def test_local_processes_that_are_killed_take_the_others_along_and_are_named(project, killed):
    with project.training(f"killed-{killed}", 2) as training:
        launcher = training.launch(IN_TWO)
        assert launcher.until("- Loss: ")
        processes = launcher.family()[1:]
        if killed == "all":
            for process in processes:
                process.suspend()  # so that none sees another die
        for process in processes if killed == "all" else processes[-1:]:
            process.kill()
        assert training.end(20) == [1], training.printed
        assert leave(processes, 0), "some are still at work"
        said = [line for line in training.printed.splitlines() if line.startswith("mnist.py: ")]
        assert re.search(r"process [01] was ended by SIGKILL .*memory", said[-1])
        assert len(said) == 1 or killed == "one", said
        assert "Traceback" not in training.printed


# --- Damaged checkpoints ------------------------------------------------------------------------


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_previous_one_used(project, output, region, damage):
    rng = random.Random(region + damage)
    seen = [damage_checkpoint(project, output, region, damage, rng) for _ in range(2)]
    assert "named, and the previous one used" in seen


def test_with_a_damaged_checkpoint_training_goes_on_to_the_same_bits(project, output):
    expected, lines = project.reference(1)
    with open(output / "checkpoint.pt", "r+b") as file:
        file.truncate(1_000_000)
    with project.training(output.name) as training:
        printed = training.complete().printed
    assert "checkpoint.pt is not a good checkpoint" in printed
    assert results(printed) == lines[-7:]  # four steps, and the evaluation's three lines
    assert weights(output) == expected


def test_with_no_good_checkpoint_left_nothing_is_started_afresh(trainer, output, capfd):
    for path in output.glob("checkpoint*.pt"):
        path.write_bytes(path.read_bytes()[:-1000])
    for _ in range(2):  # the second time too: an operator starts a failed pod again
        message = refusal(trainer, *OPTIONS, "--resume", "--output-dir", output)
        assert f"no good checkpoint is left in {output}" in message
        printed = capfd.readouterr().out
        assert printed.count("is not a good checkpoint") == 2
        assert not results(printed)


def test_damaged_data_is_named_and_not_trained_on(project):
    for name in trainer_of(project.folder).FILES:
        for damage in DAMAGES:
            damage_data(project, name, damage, random.Random(damage + name))


# --- Where nothing can be written ---------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(project, small_disk):
    expected, lines = project.reference(1)
    with project.training(small_disk / "output") as training:
        code = training.fork().end()
        printed = training.printed
        assert code == [1]
        assert printed.splitlines()[-1].startswith("mnist.py: cannot write ")
        assert "No space left on device" in printed
        assert "Traceback" not in printed
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
    forward = trainer.Net.forward

    def lacking(net, images):
        if not net.training:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes")
        return forward(net, images)

    monkeypatch.setattr(trainer.Net, "forward", lacking)
    message = refusal(trainer, *OPTIONS, "--output-dir", tmp_path, "--dry-run")
    assert "memory does not suffice, try a smaller --test-batch-size" in message


def test_a_read_only_output_folder_is_one_sentence(trainer, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert str(small_disk) in refusal(trainer, *OPTIONS, "--output-dir", small_disk)
    assert str(small_disk) in refusal(trainer, *OPTIONS, "--output-dir", small_disk / "below")


def test_an_output_folder_that_is_a_file_is_one_sentence(trainer, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "file" in refusal(trainer, *OPTIONS, "--output-dir", tmp_path / "file")
    assert "file" in refusal(trainer, *OPTIONS, "--output-dir", tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_second_run_into_the_same_folder_is_refused(project, trainer):
    with project.training("shared", options=("--log-interval", 1, "--epochs", 99)) as training:
        first = training.fork().processes[0]
        assert first.until("- Loss: ")
        for more in ((), ("--resume",)):
            message = refusal(trainer, *OPTIONS, *more, "--output-dir", training.output)
            assert f"another run writes to {training.output}" in message
        assert first.poll() is None  # the first one goes on


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
    (output / ".lock").unlink()
    trainer.main([str(word) for word in (*OPTIONS, "--resume", "--output-dir", output)])


AS_ANOTHER_USER = """
import os, sys
import mnist
# Train, save and load once: that brings in the rest of PyTorch, which that user may not be able to read.
mnist.main(["--dry-run"])
os.makedirs("before", exist_ok=True)
trainer = mnist.Trainer(mnist.Hyperparameters())
mnist.save(trainer, "before")
mnist.resume(trainer, mnist.load_checkpoint("before"))
os.umask(0o022)
os.setgroups([])
os.setgid(4321)
os.setuid(int(sys.argv[1]))
mnist.main(sys.argv[2:])
"""


def test_a_second_user_of_the_group_goes_on_where_the_first_one_stopped():
    if os.geteuid():
        skip("root is missing, and without it nobody can be another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        project = make_small_project(Path(folder, "project"), 200, 100)
        (project / "as_another_user.py").write_text(AS_ANOTHER_USER)
        output = project / "output"
        output.mkdir()
        os.chown(output, -1, 4321)
        output.chmod(0o775)
        for epochs, user in ((1, 1111), (2, 2222)):
            options = ("--epochs", epochs, "--resume", "--output-dir", output, "--save-model")
            code, printed = fork(project, "as_another_user.py", user, *options)
            assert code == 0, printed
            for path in [*output.iterdir()]:  # one that was killed on the way leaves such files
                left_over = path.with_name(path.name + ".tmp")
                left_over.write_bytes(b"")
                os.chown(left_over, user, 4321)
        assert "Resuming in epoch 2" in printed


def test_a_file_that_is_in_the_way_is_named(trainer, tmp_path):
    (tmp_path / "checkpoint.pt.tmp").mkdir()
    assert f"{tmp_path}/checkpoint.pt.tmp" in refusal(trainer, *OPTIONS, "--output-dir", tmp_path)


# --- Resumed with something else ----------------------------------------------------------------


@pytest.mark.parametrize(("flags", "precision"), [((), "bfloat16"), (("--no-bf16",), "float32")])
def test_a_resumed_run_keeps_its_precision_unless_told_otherwise(
    trainer, tmp_path, monkeypatch, capfd, flags, precision
):
    """Also on a machine that does not multiply bfloat16 natively."""
    options = (*OPTIONS, "--batch-size", 500, "--output-dir", tmp_path, "--resume")
    trainer.main([str(word) for word in (*options, "--epochs", 1, "--bf16")])
    monkeypatch.setattr("torch.cpu.get_capabilities", dict, raising=False)
    trainer.main([str(word) for word in (*options, *flags)])
    first, second = (line for line in capfd.readouterr().out.splitlines() if line.startswith("Started "))
    assert first.endswith(", bfloat16") and second.endswith(f", {precision}")
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["hyperparameters"]["bf16"] == (precision == "bfloat16")


# --- Numbers that go wrong ----------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adadelta", "sgd"])
def test_a_loss_that_is_no_number_stops_the_run_and_the_good_checkpoint_stays(trainer, output, optimizer):
    before = weights(output)
    arguments = ("--optimizer", optimizer, "--lr", "1e30", "--output-dir", output, "--no-cuda")
    for more in ((), ("--checkpoint-interval", 2)):
        message = refusal(trainer, *arguments, *more)
        assert re.search("in epoch 1, the loss is (nan|inf): try a smaller --lr", message)
    # It may go wrong in the very last step.
    refusal(trainer, *arguments, "--batch-size", TRAIN, "--epochs", 1)
    assert weights(output) == before
