"""Train a small convolutional network on MNIST: alone, in several processes, or on a cluster.

    python mnist.py --epochs 5                          alone
    python mnist.py --num-processes 2                   in two processes on this machine
    torchrun --standalone --nproc-per-node 2 mnist.py   the same, started by torchrun
    python mnist.py                                     in a pod, where Kubeflow's operators set the rest

Exit codes: 0 done; 1 failed, and one line says why; 2 wrong usage; 143 stopped by SIGTERM or Ctrl-C while
training, after saving a checkpoint from which --resume continues.
"""

import argparse
import copy
import ctypes
import errno
import gzip
import hashlib
import io
import json
import logging
import math
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zipfile
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.run
import torch.nn as nn
import torch.nn.functional as F
from filelock import FileLock, Timeout

# --- The model ----------------------------------------------------------------------------------

# Mean and standard deviation of all training pixels, on a scale from 0 (paper) to 1 (ink).
MEAN, STD = 0.1307, 0.3081


class Net(nn.Module):
    """Two convolutions and two linear layers, as in https://github.com/pytorch/examples/tree/main/mnist."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3)
        self.fc1 = nn.Linear(9216, 128)
        self.dropout = nn.Dropout(0.1)
        self.fc2 = nn.Linear(128, 10)

    def forward(self, images):
        """Return log-probabilities, float32 [N, 10], of `images`, [N, 28, 28] from 0 to 255."""
        # Channels last is a memory layout that makes convolutions faster on most devices.
        x = images.reshape(-1, 28, 28, 1).permute(0, 3, 1, 2)
        # Normalising is part of the model, so nobody who uses a trained model can forget it.
        x = (x / 255 - MEAN) / STD
        x = F.relu(self.conv1(x))  # [N, 32, 26, 26]
        # ReLU and max-pooling can swap places. Pooling first leaves ReLU only a quarter of the values.
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [N, 64, 12, 12]
        x = self.dropout(F.relu(self.fc1(x.flatten(1))))  # [N, 9216], then [N, 128]
        return F.log_softmax(self.fc2(x).float(), dim=1)


# --- The data -----------------------------------------------------------------------------------

FILES = [f"{whose}-{what}-ubyte" for whose in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def load_mnist(folder, device="cpu"):
    """Load the four FILES in `folder`/MNIST/raw, all 55 MB, onto `device`. Raises OSError or ValueError.

    Returns two pairs (images, labels), for training and for testing: uint8 [N, 28, 28], int64 [N].
    """
    sums = checksums(raw := Path(folder, "MNIST", "raw"))
    images, labels, *of_test = (read_idx(raw / name, sums[name]).to(device) for name in FILES)
    for digits, answers in ((images, labels), of_test):
        if answers.ndim != 1 or digits.shape != (len(answers) or 1, 28, 28) or (answers > 9).any():
            raise ValueError(f"{raw}: each image must have 28 by 28 pixels and a label from 0 to 9")
    return (images, labels.long()), (of_test[0], of_test[1].long())


def read_idx(path, sha256):
    """Return what an IDX file, or its .gz, holds: uint8, in the shape that its first bytes give."""
    found = path if path.exists() else path.with_name(path.name + ".gz")
    try:
        contents = found.read_bytes() if found == path else gzip.decompress(found.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{found} is damaged: put a good copy there ({error})") from error
    if sha256 is None:
        raise ValueError(f"{path} has no line in SHA256SUMS: sha256sum prints one, to be saved as UTF-8")
    if hashlib.sha256(contents).hexdigest() != sha256:  # otherwise it would learn, only less well
        raise ValueError(f"{found} does not match SHA256SUMS: put a good copy there, or correct the sum")
    # Two zeros, the type of the numbers, how many dimensions they have, and the length of each.
    header = 4 + 4 * sum(contents[3:4])
    shape = [int.from_bytes(contents[i : i + 4], "big") for i in range(4, header, 4)]
    if contents[:3] != b"\0\0\x08":
        kind = {9: "int8", 11: "int16", 12: "int32", 13: "float32", 14: "float64"}.get(sum(contents[:3]))
        raise ValueError(f"{found} holds {kind or 'something else'}, but must hold uint8")
    data = torch.frombuffer(bytearray(contents), dtype=torch.uint8)[header:]
    if len(data) != math.prod(shape):
        raise ValueError(f"{found} holds {len(data)} numbers, but announces {math.prod(shape)}")
    return data.view(shape)


def checksums(raw):
    """Return the SHA-256 of each of FILES, unpacked, or None where SHA256SUMS has no line for it."""
    if (listed := raw / "SHA256SUMS").exists():
        # Each line is "SUM  NAME", "SUM *NAME" or "SHA256 (NAME) = SUM".
        form = r"(?im)^\s*(?:SHA256 ?\((.+)\)\s*=\s*)?([0-9a-f]{64})(?:[ \t]+\*?(.+?))?\s*$"
        lines = re.findall(form, listed.read_text("utf-8-sig", errors="replace"))
        sums = {os.path.realpath(raw / (first or last)): sum.lower() for first, sum, last in lines}
        return {name: sums.get(os.path.realpath(raw / name)) for name in FILES}
    # Without SHA256SUMS, the data must be MNIST itself.
    from torchvision.datasets import MNIST, utils

    if bad := [raw / name for name, md5 in MNIST.resources if not utils.check_integrity(raw / name, md5)]:
        raise ValueError(f"{bad[0]} is not MNIST's: other data needs `sha256sum *-ubyte > SHA256SUMS` there")
    return {n: hashlib.sha256(gzip.decompress((raw / f"{n}.gz").read_bytes())).hexdigest() for n in FILES}


def random_seed(*purpose):
    """Return a 64-bit number that belongs to one purpose alone, such as ("order", seed, epoch)."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "big")


def epoch_order(samples, seed, epoch):
    """Return the order of the samples in an epoch, int64 [samples]. It is the same in all processes."""
    generator = torch.Generator().manual_seed(random_seed("order", seed, epoch))
    return torch.randperm(samples, generator=generator)


def epoch_distortions(samples, seed, epoch):
    """Return float32 [samples, 2, 3] for F.affine_grid: up to 10°, 10 % of the size, 2 pixels each way."""
    generator = torch.Generator().manual_seed(random_seed("distortions", seed, epoch))
    amounts = 2 * torch.rand(4, samples, generator=generator) - 1  # from -1 to 1
    angle, scale = math.radians(10) * amounts[0], 1 + 0.1 * amounts[1]  # above 1, digits get smaller
    right, down = amounts[2:] * 2 / 14  # 2 of 28 pixels, on a scale from -1 to 1
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    return torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(samples, 2, 3)


def distort(images, distortions):
    """Return `images`, uint8 [N, 28, 28], as float32, distorted by `distortions`, float32 [N, 2, 3]."""
    images = images.unsqueeze(1).float()
    places = F.affine_grid(distortions, images.shape, align_corners=False)
    # Values between pixels are interpolated; beyond the edge there is paper.
    return F.grid_sample(images, places, align_corners=False).squeeze(1)


# --- Learning -----------------------------------------------------------------------------------


@dataclass
class Hyperparameters:
    """The settings that decide how training goes, besides the data and the number of processes."""

    batch_size: int = 64  # images per step, in each process
    optimizer: str = "sgd"  # or "adadelta"
    lr: float = 0.1  # the learning rate in the first epoch
    gamma: float = 0.75  # multiplies the learning rate after each epoch
    momentum: float = 0.9  # of sgd
    label_smoothing: float = 0.1  # aim for 91 % on the right digit and 1 % on each of the others
    augment: bool = True  # distort the digits
    bf16: bool = False  # multiply in bfloat16
    seed: int = 1


class Alone:
    """A process that trains by itself, the first and only one. Job, further down, is for several."""

    rank, world_size = 0, 1

    def all_reduce(self, *numbers):
        return numbers

    def stop_if_asked(self):
        """Do nothing: nobody asks."""


class Trainer:
    """A model that learns, the average of its weights, and the progress they have made."""

    def __init__(self, hyperparameters, job=None, device="cpu"):
        self.hyperparameters = h = hyperparameters
        self.job, self.device = job or Alone(), torch.device(device)
        torch.manual_seed(random_seed("weights", h.seed))
        # (On a Mac's GPU, some versions of PyTorch misread channels-last weights: PyTorch issue 192212.)
        layout = torch.contiguous_format if self.device.type == "mps" else torch.channels_last
        self.model = Net().to(device, memory_format=layout)
        self.averaged_model = copy.deepcopy(self.model)  # this one is tested and kept
        self.ddp_model = self.model  # Job wraps it, to average gradients over the processes
        if h.optimizer == "adadelta":
            self.optimizer = torch.optim.Adadelta(self.model.parameters(), h.lr)
        else:
            options = {"momentum": h.momentum, "nesterov": h.momentum > 0, "weight_decay": 5e-4}
            self.optimizer = torch.optim.SGD(self.model.parameters(), h.lr, **options, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, h.gamma)
        self.steps, self.history = 0, []  # since training began; a line of metrics.jsonl for each epoch
        self.begin(epoch=1)

    def begin(self, epoch):
        self.epoch, self.seconds = epoch, 0.0  # of training in this epoch
        self.samples_seen, self.loss_sum = 0, 0.0  # in this epoch: by all processes, and by this one

    def next_epoch(self):
        self.scheduler.step()  # from now on, shorter steps
        self.begin(self.epoch + 1)

    def train(self, images, labels):
        """Train to the end of the epoch on `images`, uint8 [N, 28, 28], and `labels`, int64 [N].

        Yields the mean loss on this process's images after each step. Raises Stopped if the job says so.
        """
        h, rank, world_size = self.hyperparameters, self.job.rank, self.job.world_size
        order = epoch_order(len(images), h.seed, self.epoch).to(self.device)
        distortions = epoch_distortions(len(images), h.seed, self.epoch).to(self.device)
        on_cpu = self.device.type == "cpu"
        generator = torch.default_generator if on_cpu else torch.get_device_module(self.device)
        batch_size = h.batch_size * world_size  # of all processes together
        self.model.train()
        for start in range(self.samples_seen, len(images), batch_size):
            self.job.stop_if_asked()
            batch = order[start : start + batch_size]
            share = batch[rank::world_size]  # the last batch may have no image for this process
            digits = distort(images[share], distortions[share]) if h.augment and len(share) else images[share]
            # Dropout's random numbers depend only on seed and position, so a resumed run repeats them.
            generator.manual_seed(random_seed("dropout", h.seed, self.epoch, start, rank))
            # Gradients are averaged over the processes. Scaled like this, the average is the gradient
            # of the mean loss of the whole batch, even if the shares differ in length.
            loss = self.step(digits, labels[share], scale=world_size / len(batch))
            self.loss_sum += loss  # stays on the GPU: reading it would mean waiting for it
            self.samples_seen += len(batch)
            yield loss / max(1, len(share))

    def step(self, digits, labels, scale):
        """Take a step against the gradient of `scale` times the sum of the losses. Returns that sum."""
        h = self.hyperparameters
        with torch.autocast(self.device.type, torch.bfloat16, enabled=h.bf16):
            output = self.ddp_model(digits)
        loss = F.cross_entropy(output, labels, reduction="sum", label_smoothing=h.label_smoothing)
        self.optimizer.zero_grad()
        (loss * scale).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=2)  # no batch may undo what others taught
        self.optimizer.step()
        # Each step goes a little astray, having seen only one batch. Averaged, these errors cancel out.
        # The last tenth counts for two thirds (see https://proceedings.mlr.press/v28/shamir13.html).
        newest = self.model.state_dict().values()
        for mean, value in zip(self.averaged_model.state_dict().values(), newest, strict=True):
            mean.lerp_(value, 10 / (10 + self.steps)) if mean.is_floating_point() else mean.copy_(value)
        self.steps += 1
        return loss.detach()


@torch.inference_mode()
def test(model, images, labels, batch_size=1000, job=None):
    """Return the mean loss and the number of right answers on `images`, uint8 [N, 28, 28]. Raises Stopped."""
    job, loss, correct = job or Alone(), 0.0, 0
    model.eval()
    for start in range(0, len(images), batch_size * job.world_size):
        job.stop_if_asked()
        # Shares may differ by a sample, and none is repeated: the result is that of a single process.
        share = slice(start + job.rank, start + batch_size * job.world_size, job.world_size)
        output = model(images[share])
        loss += F.nll_loss(output, labels[share], reduction="sum").item()
        correct += (output.argmax(dim=1) == labels[share]).sum().item()
    loss, correct = job.all_reduce(loss, correct)
    return loss / len(images), int(correct)


# --- Checkpoints --------------------------------------------------------------------------------

# What a checkpoint holds besides the hyper-parameters: states, and the progress of training.
STATES = ("model", "averaged_model", "optimizer", "scheduler")
PROGRESS = ("epoch", "steps", "samples_seen", "loss_sum", "seconds", "history")


def lacks_memory(error):
    """Return whether an exception means that memory ran out. PyTorch has no single class for this."""
    words = ("alloc", "out of memory") if isinstance(error, RuntimeError) else ()
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def finite(loss, epoch):
    """Return the loss. Raises FloatingPointError if it is no number: training has gone astray."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"in epoch {epoch}, the loss is {loss}: try a smaller --lr")
    return loss


def save(trainer, folder):
    """Write metrics.jsonl and checkpoint.pt. All call it, rank 0 writes. Raises OSError, ArithmeticError."""
    loss_sum = finite(*trainer.job.all_reduce(float(trainer.loss_sum)), trainer.epoch)
    if trainer.job.rank > 0 or folder is None:
        return
    checkpoint = {name: getattr(trainer, name).state_dict() for name in STATES}
    checkpoint["progress"] = {name: getattr(trainer, name) for name in PROGRESS} | {"loss_sum": loss_sum}
    checkpoint |= {"hyperparameters": asdict(trainer.hyperparameters), "world_size": trainer.job.world_size}
    write(Path(folder, "metrics.jsonl"), "".join(json.dumps(m) + "\n" for m in trainer.history).encode())
    write(Path(folder, "checkpoint.pt"), checkpoint, keep=Path(folder, "checkpoint.previous.pt"))


def write(path, contents, keep=None):
    """Write bytes, or what torch.save takes, all or nothing. The old file moves to `keep`. Raises OSError."""
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    buffer.write(contents) if isinstance(contents, bytes) else torch.save(contents, buffer)
    try:
        temporary.unlink(missing_ok=True)  # a leftover may belong to another user
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            try:
                os.fsync(file.fileno())
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # "there is no fsync here"
                    raise
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {error.filename or path}: {error.strerror}") from error


def claimed(folder):
    """Make the output folder, and return a context that keeps other runs out of it. Raises OSError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return FileLock(Path(folder, ".lock"), timeout=0, mode=0o666).acquire()  # for all users
    except Timeout as error:
        # On a file system without locks, the file itself is the lock, and names its process and host.
        who = " on ".join(Path(folder, ".lock").read_text().split()[:2])
        advice = f". If {who} is gone, delete {folder}/.lock" if who else ""
        raise OSError(f"another run writes to {folder}{advice}") from error


def read_checkpoint(path):
    """Return the checkpoint in a file. Raises ValueError if it is another program's, anything if damaged."""
    contents = b"" if path.is_dir() else path.read_bytes()
    # zipfile verifies checksums, torch.load does not. With weights_only, no code in the file runs.
    if damaged := zipfile.ZipFile(io.BytesIO(contents)).testzip():
        raise ValueError(f"wrong checksum of {damaged}")
    checkpoint = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    ours = {"progress": PROGRESS, "hyperparameters": asdict(Hyperparameters())}
    missing = {*STATES, *ours, "world_size"} - checkpoint.keys()
    if missing or any(checkpoint[part].keys() != set(keys) for part, keys in ours.items()):
        raise ValueError("it is another program's, or another version's")
    return checkpoint


def load_checkpoint(folder):
    """Return the newest good checkpoint, or None. Raises OSError, or ValueError if all are damaged."""
    torch.save({}, good := io.BytesIO())
    try:  # what keeps a good file from being loaded is no damage
        torch.load(io.BytesIO(good.getvalue()), weights_only=True)
    except RuntimeError as error:
        raise ValueError(f"PyTorch loads no checkpoint here: {error}") from error
    found = [Path(folder, n) for n in ("checkpoint.pt", "checkpoint.previous.pt") if n in os.listdir(folder)]
    for path in found:
        try:
            checkpoint = read_checkpoint(path)
        except Exception as error:  # damage can show in many ways
            if isinstance(error, OSError) or lacks_memory(error):
                raise OSError(f"cannot read {path}: {error}") from error
            logging.warning(f"{path} is not a good checkpoint ({repr(error)[:200]}): passed over")
            continue
        if path != found[0]:  # otherwise the next save would replace the good one by it
            os.replace(found[0], found[0].with_suffix(".damaged"))
        return checkpoint
    if found:
        raise ValueError(f"no good checkpoint is left in {folder}: start afresh, without --resume")


def resume(trainer, checkpoint):
    """Continue from a checkpoint. Raises ValueError if its model or its settings differ; only bf16 may."""
    for name, then in checkpoint["hyperparameters"].items():
        if name != "bf16" and then != (now := getattr(trainer.hyperparameters, name)):
            raise ValueError(f"the checkpoint has {name} {then}, but this run has {now}")
    try:
        for name in STATES:
            getattr(trainer, name).load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise ValueError(f"the checkpoint does not fit this model: {error}") from error
    # Fused SGD reads weights and their momentum as they lie in memory, which depends on the device.
    for weight, state in trainer.optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(value)
    trainer.optimizer._opt_called = True  # otherwise the scheduler warns about a step it has not seen
    vars(trainer).update(checkpoint["progress"])
    trainer.loss_sum *= trainer.job.rank == 0  # rank 0 has the sum of all
    logging.info(f"Resuming in epoch {trainer.epoch} after {trainer.samples_seen} samples")
    if (then := checkpoint["world_size"]) != (now := trainer.job.world_size):
        logging.info(f"{then} process(es) before, {now} now: batches differ in size, so results will differ")


# --- The processes ------------------------------------------------------------------------------


class Stopped(Exception):
    """All processes have agreed to stop, between two steps."""


def variable(name, low, high):
    """Return the whole number in a variable that a launcher sets. Raises ValueError, naming the variable."""
    text = os.environ.get(name, "")
    if text.isdecimal() and low <= int(text) <= high:
        return int(text)
    raise ValueError(f"the variable {name} must be a whole number from {low} to {high}, not {text!r}")


@dataclass
class Job(Alone):
    """The place of this process among those that train together, in torchrun's terms."""

    started: str = "alone"
    rank: int = 0  # the number of this process, from 0
    world_size: int = 1  # the number of all processes
    local_rank: int = 0  # the number of this process on this machine, from 0
    address: str = ""  # where they meet
    asked_to_stop: bool = False

    @classmethod
    def from_environment(cls):
        """Read the variables that torchrun or a PyTorchJob's operator has set, if any. Raises ValueError."""
        env = os.environ
        if not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(env):
            return cls()
        size, port = variable("WORLD_SIZE", 1, 10**6), variable("MASTER_PORT", 1, 65535)
        if not env.get("MASTER_ADDR"):
            raise ValueError("the variable MASTER_ADDR must be the name or address of rank 0's machine")
        local_rank = variable("LOCAL_RANK", 0, size - 1) if "LOCAL_RANK" in env else 0
        started = "by a batch system" if "LOCAL_RANK" in env else "in a pod of a PyTorchJob"
        started = "by torchrun" if dist.is_torchelastic_launched() else started
        return cls(started, variable("RANK", 0, size - 1), size, local_rank, f"{env['MASTER_ADDR']}:{port}")

    @contextmanager
    def connected(self, backend, timeout):
        """Connect the processes. Raises ConnectionError if they do not meet, or if one is lost."""
        try:
            if self.world_size > 1:
                self.rendezvous(backend, timedelta(seconds=timeout))
            yield
        except RuntimeError as error:
            if self.world_size == 1 or lacks_memory(error):  # not the others' fault
                raise
            if dist.is_initialized():
                dist.group.WORLD.abort()  # otherwise nccl would go on waiting for the lost one
            who = f"rank {self.rank} of {self.world_size} (meeting at {self.address})"
            why = (str(error).strip() or repr(error)).splitlines()[0]
            raise ConnectionError(f"{who} failed, or lost another: {why}") from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
                time.sleep(0.1)  # otherwise gloo may free a tensor after Python has ended, and crash

    def rendezvous(self, backend, limit):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)  # Python's own would not act before all have met
        others = f"{self.world_size - 1} other process{'es' * (self.world_size > 2)}"
        notice = threading.Timer(5, logging.warning, [f"Waiting for {others} at {self.address}"])
        notice.start()
        try:
            # Pods start minutes apart, and by default only rank 0 waits for all. The others would soon give
            # up. But those that torchrun starts do so together.
            patience = limit if dist.is_torchelastic_launched() else 10 * limit
            store, rank, size = next(dist.rendezvous("env://", timeout=patience))
            store.set(f"here/{rank}", "")
            store.wait([f"here/{other}" for other in range(size)])
        finally:
            notice.cancel()
        store.set_timeout(limit)
        if dist.get_debug_level() == dist.DebugLevel.DETAIL:
            dist.set_debug_level(dist.DebugLevel.INFO)  # gloo and DDP crash with DETAIL (PyTorch 2.15)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)

    def distribute(self, model):
        """Return the model, wrapped so that its gradients are averaged over all processes."""
        ddp_model = nn.parallel.DistributedDataParallel(model.eval())
        # A first pass, without a step, fixes the order in which gradients are added, also after --resume.
        ddp_model(torch.zeros(1, 28, 28, device=next(model.parameters()).device)).sum().backward()
        return ddp_model

    def all_reduce(self, *numbers):
        """Add up each number over all processes. All must call this, and all get the sums."""
        if self.world_size == 1:
            return numbers
        dist.all_reduce(totals := torch.tensor(numbers, dtype=torch.float64))
        return totals.tolist()

    def stop_if_asked(self):
        """Raise Stopped in all processes at once if any of them was asked to stop."""
        if any(self.all_reduce(self.asked_to_stop)):
            raise Stopped


# --- The machine --------------------------------------------------------------------------------


def choose_device(local_rank, accelerate=True):
    """Return this process's own accelerator (CUDA, MPS, XPU), or the CPU if there is none."""
    if not accelerate or not torch.accelerator.is_available():
        return torch.device("cpu")
    if local_rank >= torch.accelerator.device_count():
        raise ValueError(f"no accelerator is left for process {local_rank}: start fewer, or use --no-cuda")
    torch.accelerator.set_device_index(local_rank)
    device = torch.device(torch.accelerator.current_accelerator().type, local_rank)
    if device.type == "cuda":  # otherwise a resumed run would differ in its last digits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads it
    return device


def choose_bf16(device, asked):
    """Return whether to multiply in bfloat16: as asked, or if this CPU gains by it. Raises ValueError."""
    if asked is None and device.type == "cpu" and torch.backends.mkldnn.is_available():
        abilities = getattr(torch.cpu, "get_capabilities", dict)()  # missing in old versions of PyTorch
        # Intel's processors gain only with AMX: in AVX-512's bfloat16, a step takes 1.4 times as long.
        asked = abilities.get("amx_bf16" if "Intel" in abilities.get("cpu_name", "") else "avx512_bf16")
    if asked and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ValueError("this GPU does not multiply in bfloat16: use --no-bf16")
    return bool(asked)


def count_processors():
    """Return how many processors this process may use: those it is bound to, or fewer by a quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with suppress(OSError):
        # On Linux, its control group may have a quota, or one of the groups around that one.
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, of_version_1, group = line.split(":", 2)
            names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if of_version_1 else ("cpu.max",)
            root = "/sys/fs/cgroup/cpu" if of_version_1 else "/sys/fs/cgroup"
            for folder in Path(root + group, "x").parents:
                with suppress(OSError, ValueError):  # "max" or -1 means that there is no limit
                    quota, period = " ".join(Path(folder, name).read_text() for name in names).split()
                    count = min(count, math.ceil(int(quota) / int(period))) if int(quota) > 0 else count
    return count


def settle_in():
    """Use no more threads than processors. On Linux, also stop when torchrun dies, and keep freed memory."""
    torch.set_num_threads(min(torch.get_num_threads(), count_processors()))
    with suppress(AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        if "LOCAL_RANK" in os.environ:
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        # glibc would return memory after each step and get it back page by page: a tenth of a step's time
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large tensors get no mappings of their own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the end of the heap is not returned
    if os.environ.get("MNIST_LAUNCHER", parent := str(os.getppid())) != parent:
        raise ChildProcessError("the process that has started this one is gone")


@contextmanager
def state_restored():
    """Restore variables, signal handlers and the log at the end, because a notebook lives on after %run."""
    # A program of its own is about to end. All is done then, and no signal may change its exit code any more.
    ends = __name__ == "__main__" and "IPython" not in sys.modules
    env, log, numbers = dict(os.environ), logging.getLogger(), (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in numbers]
    log_was = log.handlers[:], log.level, log.manager.disable
    log.handlers.clear()
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, signal.SIG_IGN if ends else handler)
        os.environ.clear()
        os.environ.update(env)
        log.handlers[:], log.level, disabled = log_was
        logging.disable(disabled)  # a call, because loggers remember what they have found disabled


def count_to_launch(args):
    """Return how many processes torchrun must start here, as text for it, or None. Raises ValueError."""
    env, processes = os.environ, args.num_processes
    if "LOCAL_RANK" in env:  # torchrun has started this process
        if processes > 1 and "MNIST_LAUNCHER" not in env:
            raise ValueError("--num-processes does not go with a launcher, which has its own way to say that")
        return None
    # A pod needs torchrun if its operator asks for several processes (PET_NPROC_PER_NODE), or sets
    # PET_NNODES and no RANK. With a RANK, "auto" is one process, or one for each accelerator.
    each = env.get("PET_NPROC_PER_NODE", "1")
    if each == "auto" and "RANK" in env:
        each = "1" if args.no_cuda else str(max(1, torch.accelerator.device_count()))
    in_pods = each not in ("auto", "1") or ("PET_NNODES" in env and "RANK" not in env)
    if processes > 1 and (in_pods or "RANK" in env):
        raise ValueError("--num-processes is for one machine: here a job says how many processes a pod has")
    return each if in_pods else str(processes) if processes > 1 else None


def launch(each, argv):
    """Let torchrun start this file `each` times. Returns the exit code. Raises ValueError, OSError."""
    env, options = os.environ, [f"--nproc-per-node={each}"]
    for name in {"PET_NODE_RANK", "PET_MASTER_PORT", "PET_MAX_RESTARTS"} & set(env):
        variable(name, 0, 65535)  # otherwise torchrun answers a bad value with a page of usage
    if "PET_NNODES" not in env:  # this machine alone: a container may not know its own name
        options.append("--standalone")
        env.setdefault("PET_LOCAL_ADDR", "localhost")
        with suppress(OSError):  # it need not know its own name either, only the way back to itself
            env.setdefault("GLOO_SOCKET_IFNAME", socket.if_indextoname(1))
        reached = False
        for family, kind, _, _, address in socket.getaddrinfo("localhost", 1, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind) as knock:
                reached |= knock.connect_ex(address) in (0, errno.ECONNREFUSED)
        if not reached:
            raise ConnectionError("processes cannot meet: this machine does not reach itself as localhost")
    share = count_processors() // max(1, int(each)) if each.isdecimal() else 1
    env.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    # All of torchrun's signals but SIGHUP, which nohup ignores. (PyTorch 2.9 does not read this yet.)
    env.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    env["MNIST_LAUNCHER"] = str(os.getpid())
    logging.disable()  # otherwise torchrun adds a page to the one line of a failed process
    multiprocessing, rendezvous = dist.elastic.multiprocessing, dist.elastic.rendezvous
    try:
        dist.run.main([*options, __file__, *argv])
    except (multiprocessing.SignalException, multiprocessing.errors.ChildFailedError) as end:
        return exit_code(end)
    except (rendezvous.RendezvousError, AssertionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"processes did not meet, or a PET_… variable is wrong: {error!r}") from error
    return 0


def exit_code(end):
    """Return what torchrun's processes left with: 143 only if all have saved. Raises ChildProcessError."""
    agents = [frame.f_locals.get("agent") for frame, _ in traceback.walk_tb(end.__traceback__)]
    context = next((agent._pcontext for agent in agents if agent), None)
    started = context.subprocess_handlers.values() if context else ()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)  # a second one must not interrupt this
    codes = [process.proc.wait() for process in started] or [1]
    for rank, code in enumerate(codes):
        if code < 0 and code != -signal.SIGTERM:
            why = " (often, memory has run out)" if code == -signal.SIGKILL else ""
            raise ChildProcessError(f"process {rank} was ended by {signal.Signals(-code).name}{why}")
    failed = set(codes) - {0, 143}
    return max({1} | failed) if failed else max(codes)


# --- The command line ---------------------------------------------------------------------------


def between(kind, low, high, text):
    """Convert `text` to an int or float (`kind`) from `low` to `high`, for argparse."""
    with suppress(ValueError):
        if low <= kind(text) <= high:
            return kind(text)
    what = "a whole number" if kind is int else "a number"
    raise argparse.ArgumentTypeError(f"{text!r} is not {what} from {low} to {high}")


def parse_arguments(argv):
    """Return the values of the flags. A mistake ends the program with exit code 2: the last line names it."""
    count, seconds = partial(between, int, 1, 10**9), partial(between, int, 1, 86400)
    seed = partial(between, int, -(2**63), 2**63 - 1)
    rate, factor = partial(between, float, 1e-38, 1e38), partial(between, float, 1e-9, 1)
    fraction = partial(between, float, 0, 0.9999)
    parser = argparse.ArgumentParser("mnist.py", description="Train a network on MNIST.", allow_abbrev=False)
    add, shown, unless = parser.add_argument, "(default: %(default)s)", "(default: if a CPU gains by it)"
    add("--epochs", metavar="N", type=count, default=5, help=f"passes over the training set {shown}")
    add("--batch-size", metavar="N", type=count, help=f"images per process and step {shown}")
    add("--test-batch-size", metavar="N", type=count, default=1000, help=f"the same for evaluation {shown}")
    add("--optimizer", choices=("adadelta", "sgd"), help=f"how to update the weights {shown}")
    add("--lr", metavar="LR", type=rate, help="learning rate (default: 0.1, or 1.0 with adadelta)")
    add("--gamma", metavar="M", type=factor, help=f"multiply the learning rate by this each epoch {shown}")
    add("--momentum", metavar="M", type=fraction, help=f"momentum of sgd {shown}")
    add("--label-smoothing", metavar="X", type=fraction, help=f"target share spread over all digits {shown}")
    add("--no-augment", dest="augment", action="store_false", help="do not turn, scale or move digits")
    add("--bf16", action=argparse.BooleanOptionalAction, help=f"train in bfloat16 {unless}")
    add("--seed", metavar="S", type=seed, help=f"seed of all random numbers {shown}")
    add("--log-interval", metavar="N", type=count, default=10, help=f"steps per log line {shown}")
    add("--no-cuda", "--no-accel", action="store_true", help="use the CPU even if there is a GPU")
    add("--backend", choices=("gloo", "nccl", "xccl", "mpi"), help="default: the device's own, gloo on CPUs")
    add("--num-processes", metavar="N", type=count, default=1, help=f"processes to start here {shown}")
    add("--data-dir", metavar="DIR", default="datasets", help=f"folder that contains MNIST/raw {shown}")
    add("--output-dir", metavar="DIR", default="output", help=f"folder for the results {shown}")
    add("--resume", action="store_true", help="continue from the newest checkpoint, if there is one")
    add("--checkpoint-interval", metavar="N", type=count, help="also save every N steps")
    add("--timeout", metavar="S", type=seconds, default=60, help=f"seconds to wait for the others {shown}")
    add("--save-model", action="store_true", help="write mnist_model.pt, a state_dict")
    add("--dry-run", action="store_true", help="train on one batch, test on one, write no files")
    parser.set_defaults(**asdict(Hyperparameters()) | {"lr": None, "bf16": None})  # these two depend
    args = parser.parse_args(argv)
    args.lr = args.lr or (1.0 if args.optimizer == "adadelta" else Hyperparameters.lr)
    return args


# --- All together -------------------------------------------------------------------------------


def download(raw, patience=30):
    """Download MNIST as the folder `raw`. Raises OSError, also if the server is silent for `patience` s."""
    from torchvision.datasets import MNIST

    logging.info(f"Downloading MNIST from {MNIST.mirrors[0]}")
    raw.parent.mkdir(parents=True, exist_ok=True)
    before = socket.getdefaulttimeout()
    with tempfile.TemporaryDirectory(dir=raw.parent) as elsewhere:  # all files appear together
        try:
            socket.setdefaulttimeout(patience)
            MNIST(elsewhere, download=True)
        except Exception as error:  # networks fail in many ways
            raise OSError(f"cannot download MNIST, put its four .gz files in {raw} ({error})") from error
        finally:
            socket.setdefaulttimeout(before)
        with suppress(OSError):  # another host was faster
            os.replace(Path(elsewhere, "MNIST", "raw"), raw)


def run_epoch(trainer, training_set, test_set, args, folder):
    """Train to the end of the epoch, test, and save to `folder`, unless that is None."""
    batch_size = args.batch_size * trainer.job.world_size
    if batch_size > (images := len(training_set[0])):
        raise ValueError(f"--batch-size is too large: {batch_size} in all processes, of {images} images")
    steps = math.ceil(images / batch_size)
    clock = time.perf_counter() - trainer.seconds
    for step, loss in enumerate(trainer.train(*training_set), trainer.samples_seen // batch_size):
        trainer.seconds = time.perf_counter() - clock
        if step % args.log_interval == 0 and trainer.job.rank == 0:
            logging.info(f"Epoch: {trainer.epoch} ({step / steps:6.1%}) - Loss: {loss.item()}")
        if args.checkpoint_interval and (step + 1) % args.checkpoint_interval == 0:
            save(trainer, folder)
    (loss_sum,) = trainer.job.all_reduce(float(trainer.loss_sum))  # reading it waits for all steps
    trainer.seconds = seconds = time.perf_counter() - clock
    loss, correct = test(trainer.averaged_model, *test_set, args.test_batch_size, trainer.job)
    finite(loss_sum + loss, trainer.epoch)
    accuracy = correct / len(test_set[0])
    logging.info(f"Test accuracy: {correct}/{len(test_set[0])} ({accuracy:6.1%})")
    logging.info(f"loss={loss:.4f}")  # the form that Katib, which tunes hyper-parameters, looks for
    logging.info(f"accuracy={accuracy:.4f}")
    metrics = {"epoch": trainer.epoch, "train_loss": loss_sum / trainer.samples_seen, "test_loss": loss}
    metrics |= {"accuracy": accuracy, "learning_rate": trainer.scheduler.get_last_lr()[0], "seconds": seconds}
    trainer.history.append(metrics | {"samples_per_second": trainer.samples_seen / seconds})
    trainer.next_epoch()
    save(trainer, folder)


def run(args, job):
    """Get ready, and train as one of the processes of `job`."""
    settle_in()
    device = choose_device(job.local_rank, not args.no_cuda)
    backend = args.backend or dist.get_default_backend_for_device(device)
    folder = None if args.dry_run else args.output_dir
    with claimed(folder) if folder and job.rank == 0 else nullcontext():
        checkpoint = load_checkpoint(folder) if folder and args.resume and job.rank == 0 else None
        asked = checkpoint["hyperparameters"]["bf16"] if checkpoint and args.bf16 is None else args.bf16
        args.bf16 = choose_bf16(device, asked)
        threads, numbers = torch.get_num_threads(), "bfloat16" if args.bf16 else "float32"
        how = f"backend {backend if job.world_size > 1 else 'none'}, "
        how += f"{threads} thread{'s' * (threads > 1)}, {numbers}"
        logging.info(f"Started {job.started}: rank {job.rank} of {job.world_size}, device {device}, {how}")
        raw = Path(args.data_dir, "MNIST", "raw")
        if job.local_rank == 0 and not any(raw.glob("*")):  # before the processes meet
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # otherwise half of it would be left
            download(raw)
        mixed = device.type != "cpu" and backend not in ("gloo", "mpi")  # gradients on GPUs, counts on CPUs
        with job.connected(f"cpu:gloo,{device.type}:{backend}" if mixed else backend, args.timeout):
            for number in (signal.SIGTERM, signal.SIGINT):  # Kubernetes sends SIGTERM, and SIGKILL 30 s later
                signal.signal(number, lambda *_: setattr(job, "asked_to_stop", True))
            shared = [checkpoint, args.bf16]  # rank 0 decides for all
            if job.world_size > 1:
                logging.info(f"Using distributed PyTorch with {backend} backend")
                dist.broadcast_object_list(shared)
            checkpoint, args.bf16 = shared[0], choose_bf16(device, shared[1])  # can this one, too?
            train(args, job, device, folder, checkpoint)


def train(args, job, device, folder, checkpoint):
    """Train and test for all epochs, from a checkpoint if there is one."""
    training_set, test_set = load_mnist(args.data_dir, device)
    if args.dry_run:
        args.epochs, training_set = 1, [t[: args.batch_size * job.world_size] for t in training_set]
        test_set = [t[: args.test_batch_size] for t in test_set]
    chosen = Hyperparameters(**{name: vars(args)[name] for name in asdict(Hyperparameters())})
    trainer = Trainer(chosen, job, device)
    if job.world_size > 1:
        trainer.ddp_model = job.distribute(trainer.model)
    if checkpoint:
        resume(trainer, checkpoint)
    elif args.resume and folder:
        logging.info(f"No checkpoint in {folder} yet: starting afresh")
    try:
        while trainer.epoch <= args.epochs:
            run_epoch(trainer, training_set, test_set, args, folder)
    except Stopped:
        save(trainer, folder)
        job.all_reduce(0)  # a barrier: nobody leaves with 143 before rank 0 has saved
        logging.info("Stopped by a signal. --resume goes on from the newest checkpoint")
        sys.exit(143)
    if args.save_model and folder and job.rank == 0:  # so any machine can load it
        write(Path(folder, "mnist_model.pt"), trainer.averaged_model.cpu().state_dict())
    job.all_reduce(0)  # a barrier: rank 0 must not leave before the others have finished


def give_up(record):
    """End the program if its log cannot be written, for example to a closed pipe or a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python tries again at exit
    raise


def main(argv=None):
    """Do what the command line `argv` says (default: the one this program was started with)."""
    args = parse_arguments(argv := sys.argv[1:] if argv is None else argv)
    try:
        with state_restored():
            # Notebooks show standard error in pink.
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
            logging.getLogger().handlers[0].handleError = give_up
            if (each := count_to_launch(args)) is not None:
                sys.exit(launch(each, argv))
            job = Job.from_environment()
            logging.disable(logging.INFO if job.rank > 0 else logging.NOTSET)
            run(args, job)
    except (Exception, KeyboardInterrupt) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if lacks_memory(error):
            testing = any(frame.name == "test" for frame in traceback.extract_tb(error.__traceback__))
            flag = "--test-batch-size" if testing else "--batch-size"
            text = f"memory does not suffice, try a smaller {flag} ({text})"
        elif not isinstance(error, (ArithmeticError, KeyboardInterrupt, OSError, ValueError)):
            raise
        sys.exit(f"mnist.py: {text}")


if __name__ == "__main__":
    main()
