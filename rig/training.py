"""Small trainings on real digits, which can be interrupted, taken up again and compared to the last bit."""

import hashlib
import importlib.util
import json
import math
import sys
import time
from pathlib import Path

import torch

from rig.processes import Fork, Process, clean_environment, free_port
from rig.project import ROOT

TRAIN, TEST, BATCH, INTERVAL, EPOCHS = 1000, 500, 30, 5, 2
TIMEOUT = 10
# Many small batches and checkpoints, and a log line for each batch: an instant can be aimed at.
OPTIONS = ("--batch-size", BATCH, "--test-batch-size", 50, "--log-interval", 1, "--epochs", EPOCHS)
OPTIONS += ("--checkpoint-interval", INTERVAL, "--timeout", TIMEOUT, "--no-cuda")
MOMENTS = ("start-up", "training", "evaluation", "saving")
RESULTS = ("Epoch: ", "Test accuracy: ", "loss=", "accuracy=")


# --- What is compared ---------------------------------------------------------------------------


def fingerprint(value):
    """Return the SHA-256 of a nest of dicts, lists and tensors, to the last bit."""
    sha256 = hashlib.sha256()

    def add(value):
        if isinstance(value, torch.Tensor):
            sha256.update(f"{value.dtype} {tuple(value.shape)}".encode())
            sha256.update(value.contiguous().numpy().tobytes())
        elif isinstance(value, dict):
            for key in value:
                add(key)
                add(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        else:
            sha256.update(repr(value).encode())

    add(value)
    return sha256.hexdigest()


def weights(folder):
    """Return the fingerprint of all in a folder's checkpoint that decides how training goes on."""
    checkpoint = torch.load(Path(folder, "checkpoint.pt"), weights_only=True)
    return fingerprint([checkpoint[part] for part in ("model", "averaged_model", "optimizer", "scheduler")])


def metrics(folder):
    """Return what a folder's metrics.jsonl says of each epoch."""
    return [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]


def results(text):
    """Return the lines of a log that do not depend on how often the training was interrupted."""
    return [line for line in text.splitlines() if line.startswith(RESULTS)]


def trainer_of(project):
    """Import the project's mnist.py."""
    spec = importlib.util.spec_from_file_location("mnist_of_project", Path(project, "mnist.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


def slowed(pause):
    """Return the trainer's text, with a pause before each step; `pause` is an expression, in seconds."""
    text, step = (ROOT / "mnist.py").read_text(), "self.optimizer.zero_grad()"
    assert text.count(step) == 1
    return text.replace(step, f"time.sleep({pause}); {step}")


# --- A training that can be interrupted ---------------------------------------------------------


class Training:
    """A training by `world_size` processes of this machine, interrupted and taken up again."""

    def __init__(self, project, output, world_size=1, options=OPTIONS):
        self.project, self.output, self.world_size = Path(project), Path(output), world_size
        self.options = options
        self.steps = math.ceil(TRAIN / BATCH / world_size)  # in an epoch
        self.processes, self.logs = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()

    def start(self, *more, kind=Process, launcher=None):
        """Start all processes, or a launcher that does; `more` adds to the command line."""
        python = () if kind is Fork else (sys.executable,)
        command = [*python, *(launcher or ["mnist.py"]), *self.options, "--output-dir", self.output, *more]
        meeting = {"WORLD_SIZE": self.world_size, "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
        attempt, self.processes = len(self.logs), []
        for rank in range(1 if launcher else self.world_size):
            in_job = {"RANK": rank, **meeting} if self.world_size > 1 and not launcher else {}
            log = f"{self.output}.{attempt}.{rank}.log"
            environment = clean_environment(OMP_NUM_THREADS=1, **in_job)
            self.processes.append(kind(command, log, cwd=self.project, env=environment))
        self.logs.append(self.processes[0].log)
        return self

    def launch(self, launcher, *more):
        """Let a Python program, such as `mnist.py --num-processes 2`, start the processes. Returns it."""
        return self.start(*more, kind=Fork, launcher=launcher).processes[0]

    def fork(self, *more):
        """Start all, sooner: they are no programs of their own."""
        return self.start(*more, kind=Fork)

    def end(self, timeout=120):
        """Wait for the end of all. Returns their exit codes."""
        limit = time.monotonic() + timeout
        return [process.end(max(0.1, limit - time.monotonic()))[0] for process in self.processes]

    def complete(self, *more):
        """Run, from the start or where a checkpoint is, to the end of the last epoch."""
        self.fork("--resume", *more)
        codes = self.end()
        assert codes == [0] * len(codes), f"exit codes {codes}:\n{self.printed}"
        return self

    def kill(self):
        """Kill all processes at once, as a power cut would."""
        for process in self.processes:
            process.kill_all()

    @property
    def printed(self):
        """All that the processes have printed in this attempt."""
        return "".join(process.output for process in self.processes)

    def saved(self):
        """Tell whether there is a checkpoint."""
        return any(self.output.glob("checkpoint*.pt"))

    def reach(self, moment, rng):
        """Start, and wait for a random instant of one of MOMENTS."""
        assert not self.logs, "aim only at a first attempt: a later one prints fewer lines"
        early = moment == "start-up" and rng.random() < 0.5  # while Python loads PyTorch
        first = self.start(kind=Process if early else Fork).processes[0]

        def trained(steps):
            return lambda: first.output.count("- Loss: ") >= steps

        if moment == "start-up":
            if not early:
                first.until("Started ")
            time.sleep(rng.uniform(0, 2))
        elif moment == "training":
            first.until(trained(rng.randrange(1, EPOCHS * self.steps)))
            time.sleep(rng.uniform(0, 0.05))
        elif moment == "evaluation":
            first.until(trained(rng.randint(1, EPOCHS) * self.steps))
            time.sleep(rng.uniform(0, 0.15))
        elif moment == "saving":
            step = rng.randint(1, self.steps // INTERVAL) * INTERVAL
            first.until(trained((rng.randint(1, EPOCHS) - 1) * self.steps + step - 1), pause=0)
            first.until((self.output / "checkpoint.pt.tmp").exists, pause=0)
            time.sleep(rng.uniform(0, 0.03))


class Project:
    """A small project with the results of uninterrupted trainings, for comparison."""

    def __init__(self, folder):
        self.folder, self.uninterrupted = Path(folder), {}

    def training(self, name, world_size=1, options=OPTIONS):
        return Training(self.folder, self.folder / name, world_size, options)

    def reference(self, world_size):
        """Return (weights, result lines) of a training by so many processes that nobody interrupted."""
        if world_size not in self.uninterrupted:
            with self.training(f"uninterrupted-{world_size}", world_size) as training:
                training.complete()
                lines = results(training.processes[0].output)
                self.uninterrupted[world_size] = weights(training.output), lines
        return self.uninterrupted[world_size]
