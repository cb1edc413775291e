"""Faults, and what must hold after them. The tests try a few; this tries many.

python -m rig.faults             (or `make faults`) prints a table of what was tried and what survived
python -m rig.faults --quick     a tenth of it
python -m rig.faults --seed 2    at other instants, with other damage
"""

import argparse
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import torch

from rig.hosts import PyTorchJob
from rig.operators import PORT
from rig.project import RAW, make_small_project
from rig.training import MOMENTS, TEST, TIMEOUT, TRAIN, Project, fingerprint, results, trainer_of, weights

# Or torchrun's agents would lend the processes their store, in which those that start again find the
# addresses of the dead (https://github.com/pytorch/pytorch/issues/135712).
# Once enough hosts are there, torchrun waits half a minute for still more; 3 seconds show the same. It takes
# a host for lost that has been silent for 15 seconds; 6 are enough.
ELASTIC = {
    "PET_RDZV_CONF": "last_call_timeout=3,keep_alive_interval=2",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": 1,
}


# --- Faults: each raises AssertionError if a promise was not kept -------------------------------


def kill_and_resume(project, name, world_size, moment, rng):
    """Kill all processes, or one of them, with -9; resume; compare with the uninterrupted training."""
    expected, lines = project.reference(world_size)
    with project.training(name, world_size) as training:
        training.reach(moment, rng)
        saved = training.saved()
        if world_size > 1 and moment != "start-up" and rng.random() < 0.5:
            rng.choice(training.processes).kill()
            codes = training.end(TIMEOUT + 10)
            assert 0 not in codes or "Test accuracy" in training.printed, training.printed
        training.kill()
        before = results(training.processes[0].output)
        training.complete()
        after = results(training.processes[0].output)
        check_resumed(training, saved)
        assert before == lines[: len(before)]
        assert after == lines[len(lines) - len(after) :]
        assert weights(training.output) == expected
        shutil.rmtree(training.output)


def stop_and_resume(project, name, world_size, moment, rng, number=signal.SIGTERM):
    """Send SIGTERM to all processes, or to one; resume; compare. Returns the exit codes."""
    expected, lines = project.reference(world_size)
    with project.training(name, world_size) as training:
        training.reach(moment, rng)
        began = "- Loss: " in training.processes[0].output
        one = [rng.choice(training.processes)] if began and rng.random() < 0.5 else training.processes
        for process in one:
            process.send_signal(number)
        codes = training.end(20)
        printed = training.printed
        before = results(training.processes[0].output)
        if set(codes) == {0}:  # it came when all was done
            assert before == lines, f"left too early, with {codes}:\n{printed}"
            assert weights(training.output) == expected, f"not all is saved, with {codes}:\n{printed}"
        elif began:
            assert set(codes) == {143}, f"{codes}\n{printed}"
            assert "Stopped by a signal" in printed, printed
        elif 143 in codes:  # training has just begun
            assert training.saved() and "Stopped by a signal" in printed, printed
        else:  # the signal ends the process by itself, and who has met it already loses it
            assert not set(codes) - {-number, 1}, f"{codes}\n{printed}"
        assert "Traceback" not in printed, printed
        saved = training.saved()
        training.complete()
        check_resumed(training, saved)
        if saved:
            # No step is lost, and none is done twice.
            assert before + results(training.processes[0].output) == lines
        assert weights(training.output) == expected
        shutil.rmtree(training.output)
    return codes


def check_resumed(training, saved):
    """Check that a checkpoint was used if there was one, and that none was found to be damaged."""
    printed = training.processes[0].output
    assert "not a good checkpoint" not in printed, printed
    assert ("Resuming in epoch" if saved else "Started ") in printed, printed


REGIONS = ("header", "middle", "tail")
DAMAGES = ("truncation", "bit flip", "zeroed page", "other bytes")


def damaged(contents, region, damage, rng):
    """Return bytes, damaged in one way somewhere in one of REGIONS."""
    edge = min(4096, len(contents) // 3)
    first, last = {
        "header": (0, edge),
        "middle": (edge, len(contents) - edge),
        "tail": (len(contents) - edge, len(contents)),
    }[region]
    position = rng.randrange(first, last)
    if damage == "truncation":
        return contents[:position]
    if damage == "bit flip":
        flipped = bytearray(contents)
        flipped[position] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    size = min(4096, len(contents) - position)
    other = bytes(size) if damage == "zeroed page" else rng.randbytes(size)
    return contents[:position] + other + contents[position + size :]


def damage_checkpoint(project, folder, region, damage, rng):
    """Damage the newest of two checkpoints in `folder`, load, and repair. Returns what became of it."""
    newest, previous = Path(folder, "checkpoint.pt"), Path(folder, "checkpoint.previous.pt")
    contents = newest.read_bytes(), previous.read_bytes()
    good = [fingerprint(torch.load(path, weights_only=True)) for path in (newest, previous)]
    assert good[0] != good[1]
    trainer, printed = trainer_of(project.folder), io.StringIO()
    bad = damaged(contents[0], region, damage, rng)
    newest.write_bytes(bad)
    try:
        with redirect_stdout(printed):
            trainer.logging.basicConfig(stream=sys.stdout, force=True)
            loaded = fingerprint(trainer.load_checkpoint(folder))
    finally:
        for leftover in folder.glob("checkpoint*"):
            leftover.unlink()
        for path, intact in zip((newest, previous), contents, strict=True):
            path.write_bytes(intact)
    if loaded == good[0]:
        return "harmless"  # in the padding between the tensors, or not a change at all
    assert loaded == good[1], "loaded something that was never saved"
    assert f"{newest} is not a good checkpoint" in printed.getvalue()
    return "named, and the previous one used"


def damage_data(project, name, damage, rng):
    """Damage one of the four data files; loading must name it, and leave it as it is."""
    path = project.folder / RAW / name
    intact = path.read_bytes()
    trainer = trainer_of(project.folder)
    bad = damaged(intact, rng.choice(REGIONS), damage, rng)
    path.write_bytes(bad)
    try:
        trainer.load_mnist(project.folder / "datasets")
        assert bad == intact, "damaged data was loaded"
    except (OSError, ValueError) as error:
        assert str(path) in str(error)
        assert path.read_bytes() == bad
    finally:
        path.write_bytes(intact)


def lose_worker(project, fault, rng):
    """Lose one worker among three hosts: the others must leave, and say whom they have lost."""
    timeout = 5
    options = ("--epochs", 200, "--timeout", timeout, "--log-interval", 1)
    options += ("--output-dir", tempfile.mkdtemp(dir=project.folder))
    with PyTorchJob(project.folder) as job:
        processes = job.fork("mnist.py", *options)
        steps = rng.randrange(1, 40)
        assert processes[0].until(lambda: processes[0].output.count("- Loss: ") >= steps)
        time.sleep(rng.uniform(0, 0.05))
        lost = rng.randrange(1, 3)
        if fault == "kill":
            processes[lost].kill()
        elif fault == "link":
            job.hosts[lost].cut()
        elif fault == "stop":
            processes[lost].send_signal(signal.SIGSTOP)
        limit = time.monotonic() + timeout + 10
        for rank, process in enumerate(processes):
            if rank == lost and fault != "link":
                continue
            code, printed = process.end(limit - time.monotonic())
            assert code == 1, f"exit code {code}:\n{printed}"
            assert "Traceback" not in printed, printed
            meeting = f"mnist.py: rank {rank} of 3 (meeting at {job.hosts[0].name}:{PORT})"
            assert meeting in printed, printed


def lose_elastic_worker(project, whole_host, rng):
    """Kill a worker, or its whole host, in an elastic job of three: the job must finish by itself."""
    options = ("--epochs", 4, "--timeout", TIMEOUT, "--log-interval", 1, "--checkpoint-interval", 2)
    options += ("--resume", "--output-dir", tempfile.mkdtemp(dir=project.folder))
    with PyTorchJob(project.folder, workers=3, elastic=(1, 3, 3), processes_per_node="1") as job:
        agents = job.start("mnist.py", *options, **ELASTIC)  # starts torchrun, as PET_... asks for
        wanted = rng.randrange(4, 12)  # by then there is a checkpoint

        def trained():
            return sum(agent.output.count("- Loss: ") for agent in agents) > wanted

        agents[0].until(trained)
        lost = rng.randrange(1, 3)  # the first host is the one where they meet
        if whole_host:
            job.hosts[lost].kill()
        else:
            agents[lost].family()[-1].kill()
        codes = [agent.end(180)[0] for agent in agents]
        printed = "".join(agent.output for agent in agents)
        expected = [-9 if whole_host and rank == lost else 0 for rank in range(3)]
        assert codes == expected, f"exit codes {codes}:\n{printed}"
        assert "Resuming in epoch" in printed, printed
        assert printed.count("Test accuracy") >= 4, printed
        return printed


# --- The campaign -------------------------------------------------------------------------------


def plan(project, share):
    """Return a list of (what is tried and must hold, function, arguments) for `share` of the campaign."""
    tries = []
    for number in range(int(50 * share)):
        moment, world_size = MOMENTS[number % 4], (1, 1, 3)[number % 3]
        what = f"kill -9 in {moment}, of 1 process or 3: resumed, ends with the same bits"
        tries.append((what, kill_and_resume, f"kill-{number}", world_size, moment))
        what = f"SIGTERM in {moment}, to 1 process or 3: leaves within 20 s; resumed, ends with the same bits"
        tries.append((what, stop_and_resume, f"stop-{number}", world_size, moment))
    for number in range(int(200 * share)):
        region, damage = REGIONS[number % 3], DAMAGES[number % 4]
        what = f"checkpoint damaged in its {region}: harmless, or named and the one before it used"
        tries.append((what, damage_checkpoint, project.folder / "uninterrupted-1", region, damage))
    for number in range(int(40 * share)):
        name = trainer_of(project.folder).FILES[number % 4]
        what = "data damaged: named, and not trained on"
        tries.append((what, damage_data, name, DAMAGES[number // 4 % 4]))
    if os.geteuid() or not shutil.which("ip"):
        print("No faults of several hosts: they need root and iproute2", file=sys.stderr)
        return tries
    for _ in range(int(10 * share)):
        for fault, what in (("kill", "killed"), ("link", "cut off"), ("stop", "frozen")):
            what = f"a worker of three hosts {what}: the others leave within --timeout + 10 s"
            tries.append((what, lose_worker, fault))
        for whole_host, what in ((False, "worker"), (True, "host")):
            what = f"a {what} of an elastic job killed: goes on by itself and finishes"
            tries.append((what, lose_elastic_worker, whole_host))
    return tries


def campaign(share, seed):
    """Try everything; print a table. Returns the number of faults that were not survived."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        project = Project(make_small_project(Path(folder, "project"), TRAIN, TEST))
        for world_size in (1, 3):
            project.reference(world_size)

        def survived(number, what, function, *arguments):
            begin = time.monotonic()
            try:
                function(project, *arguments, random.Random(f"{seed} {number}"))
                return what, True
            except Exception as error:  # a failed attempt must not end a night's campaign
                print(f"NOT HELD: {what} {arguments}: {type(error).__name__}: {error}", file=sys.stderr)
                return what, False
            finally:
                print(f"{number}: {time.monotonic() - begin:.0f} s, {what}", file=sys.stderr, flush=True)

        tries = [(number, *attempt) for number, attempt in enumerate(plan(project, share))]
        # What is tried in this process changes files that the others read: it cannot run beside them.
        here = [attempt for attempt in tries if attempt[2] in (damage_checkpoint, damage_data)]
        others = [attempt for attempt in tries if attempt not in here]
        outcomes = [survived(*attempt) for attempt in here]
        outcomes += pool.map(lambda attempt: survived(*attempt), others)
    print("| fault, and what must hold | tried | held |\n|---|--:|--:|")
    for what in dict.fromkeys(attempt[1] for attempt in tries):
        held = [good for name, good in outcomes if name == what]
        print(f"| {what} | {len(held)} | {sum(held)} |")
    return sum(not good for _, good in outcomes)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of all")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    failures = campaign(0.1 if args.quick else 1, args.seed)
    sys.exit(f"{failures} faults were not survived" if failures else 0)


if __name__ == "__main__":
    main()
