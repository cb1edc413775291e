"""Train a small convolutional network on MNIST: alone, in several processes, or on a cluster.

    python mnist.py --epochs 5                          alone
    python mnist.py --num-processes 2                   in two processes on this machine
    torchrun --standalone --nproc-per-node 2 mnist.py   the same, started by torchrun
    python mnist.py                                     in a pod, where Kubeflow's operators set the rest

Exit codes: 0 done; 1 failed, and one line says why; 2 wrong usage; 143 stopped by SIGTERM or Ctrl-C while
training, after saving a checkpoint from which --resume continues.
"""

import argparse
import ctypes
import gzip
import hashlib
import io
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
import zipfile
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
    """Two convolutions and two linear layers: 1,199,882 parameters.

    Its state_dict fits https://github.com/pytorch/examples/tree/main/mnist, but it normalises its own input.
    """

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
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 9216], then [N, 128]
        x = self.dropout(x)
        return F.log_softmax(self.fc2(x).float(), dim=1)


# --- The data -----------------------------------------------------------------------------------

FILES = [f"{whose}-{what}-ubyte" for whose in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def load_mnist(folder, device="cpu"):
    """Load the four FILES in `folder`/MNIST/raw, all 55 MB, onto `device`. Raises OSError or ValueError.

    Returns two pairs (images, labels), for training and for testing: uint8 [N, 28, 28], int64 [N].
    """
    raw = Path(folder, "MNIST", "raw")
    sums = find_sums(raw)
    images, labels, *of_test = (read_idx(raw / name, sums.get(name)).to(device) for name in FILES)
    for digits, answers in ((images, labels), of_test):
        if digits.shape != (len(answers), 28, 28) or answers.max() > 9:
            raise ValueError(f"{raw}: each image must have 28 by 28 pixels and a label from 0 to 9")
    return (images, labels.long()), (of_test[0], of_test[1].long())


def read_idx(path, sha256):
    """Return the contents of an IDX file, or of its .gz: uint8, in the shape that its first bytes give."""
    found = path if path.exists() else path.with_name(path.name + ".gz")
    try:
        contents = found.read_bytes() if found == path else gzip.decompress(found.read_bytes())
        shape = [int.from_bytes(contents[4 * i : 4 * i + 4], "big") for i in range(1, 1 + contents[3])]
        data = torch.frombuffer(bytearray(contents), dtype=torch.uint8, offset=4 + 4 * len(shape)).view(shape)
    except Exception as error:  # damage can show in many ways
        raise OSError(f"{found} is missing or damaged, put a good copy there ({error})") from error
    if hashlib.sha256(contents).hexdigest() != sha256:  # otherwise it would learn, only less well
        raise ValueError(f"{found} does not match SHA256SUMS: put a good copy there, or correct the sum")
    return data


def find_sums(raw):
    """Return the SHA-256 of each unpacked file, by name. Raises OSError or ValueError, saying what to do."""
    if (raw / "SHA256SUMS").exists():
        words = (raw / "SHA256SUMS").read_text().replace("*", " ").split()
        return dict(zip(words[1::2], words[::2], strict=False))
    # Without SHA256SUMS, the data must be MNIST itself. Where there is no data, MNIST is downloaded.
    from torchvision.datasets import MNIST, utils

    if not any(raw.glob("*-ubyte*")):
        logging.info(f"Downloading MNIST from {MNIST.mirrors[0]}")
        raw.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw.parent) as elsewhere:  # all files appear together
            try:
                MNIST(elsewhere, download=True)
            except RuntimeError as error:
                raise OSError(f"cannot download MNIST, put its four .gz files in {raw} ({error})") from error
            with suppress(OSError):  # another host was faster
                os.replace(Path(elsewhere, "MNIST", "raw"), raw)
    if bad := [raw / name for name, md5 in MNIST.resources if not utils.check_integrity(raw / name, md5)]:
        raise ValueError(f"{bad[0]} is not MNIST's: other data needs `sha256sum *-ubyte > SHA256SUMS` there")
    unpacked = {name: gzip.decompress((raw / f"{name}.gz").read_bytes()) for name in FILES}
    return {name: hashlib.sha256(contents).hexdigest() for name, contents in unpacked.items()}


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
    angle, scale = math.radians(10) * amounts[0], 1 + 0.1 * amounts[1]
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

    def sum(self, *numbers):
        return numbers

    def stop_if_asked(self):
        """Do nothing: nobody asks."""


class Trainer:
    """A network that learns, the average of its weights, and the progress they have made."""

    def __init__(self, hyperparameters, job=None, device="cpu"):
        self.hyperparameters = h = hyperparameters
        self.job, self.device = job or Alone(), torch.device(device)
        torch.manual_seed(random_seed("weights", h.seed))
        # One network learns. The other, the average of its weights over the steps, is tested and kept.
        # (On a Mac's GPU, some versions of PyTorch misread channels-last weights: PyTorch issue 192212.)
        layout = torch.contiguous_format if self.device.type == "mps" else torch.channels_last
        self.learner, self.model = (Net().to(device, memory_format=layout) for _ in range(2))
        self.network = self.learner  # Job wraps it, to average gradients over the processes
        self.weights = [list(network.parameters()) for network in (self.model, self.learner)]
        if h.optimizer == "adadelta":
            self.optimizer = torch.optim.Adadelta(self.weights[1], h.lr)
        else:
            # Weight decay pulls all weights a little towards 0, so only useful ones stay large.
            nesterov = {"momentum": h.momentum, "nesterov": h.momentum > 0}
            self.optimizer = torch.optim.SGD(self.weights[1], h.lr, **nesterov, weight_decay=5e-4, fused=True)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, h.gamma)
        self.steps = 0  # since training began
        self.history = []  # one dict for each finished epoch: the lines of metrics.jsonl
        self.begin(epoch=1)

    def begin(self, epoch):
        self.epoch, self.seconds = epoch, 0.0  # of training in this epoch
        self.samples_seen = 0  # in this epoch, by all processes together
        self.loss_sum = 0.0  # over the samples that this process has seen

    def train(self, images, labels):
        """Train to the end of the epoch on `images`, uint8 [N, 28, 28], and `labels`, int64 [N].

        Yields the mean loss on this process's images after each step. Raises Stopped if the job says so.
        """
        h, rank, world_size = self.hyperparameters, self.job.rank, self.job.world_size
        order = epoch_order(len(images), h.seed, self.epoch).to(self.device)
        distortions = epoch_distortions(len(images), h.seed, self.epoch).to(self.device)
        batch_size = h.batch_size * world_size  # of all processes together
        noise = torch.default_generator if self.device.type == "cpu" else torch.get_device_module(self.device)
        self.learner.train()
        for start in range(self.samples_seen, len(order), batch_size):
            self.job.stop_if_asked()
            batch = order[start : start + batch_size]
            share = batch[rank::world_size]
            # Dropout's random numbers depend only on seed and position, so a resumed run repeats them.
            noise.manual_seed(random_seed("dropout", h.seed, self.epoch, start, rank))  # on this device alone
            digits = images[share]
            if h.augment and len(share):  # the last batch may have no image for this process
                digits = distort(digits, distortions[share])
            # Gradients are averaged over the processes. Scaled like this, the average is the gradient
            # of the mean loss of the whole batch, even if the shares differ in length.
            loss = self.step(digits, labels[share], scale=world_size / len(batch))
            self.loss_sum += loss  # stays on the GPU: reading it would mean waiting for it
            self.samples_seen += len(batch)
            yield loss / max(1, len(share))

    def step(self, digits, labels, scale):
        """Take a step against the gradient of `scale` times the sum of the losses. Returns that sum."""
        h = self.hyperparameters
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=h.bf16):
            output = self.network(digits)
        loss = F.cross_entropy(output, labels, reduction="sum", label_smoothing=h.label_smoothing)
        (loss * scale).backward()
        nn.utils.clip_grad_norm_(self.weights[1], max_norm=2)  # no batch may undo what others have taught
        self.optimizer.step()
        # Each step goes a little astray, having seen only one batch. Averaged, these errors cancel out.
        # The last tenth counts for two thirds (see https://proceedings.mlr.press/v28/shamir13.html).
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(decay=self.steps / (10 + self.steps))
        average(*self.weights, None)
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
    loss, correct = job.sum(loss, correct)
    return loss / len(images), int(correct)


# --- Checkpoints --------------------------------------------------------------------------------

# What a checkpoint holds besides the hyper-parameters: states, and the progress of training.
STATES = ("model", "learner", "optimizer", "scheduler")
PROGRESS = ("epoch", "steps", "samples_seen", "loss_sum", "seconds", "history")


def lacks_memory(error):
    """Return whether an exception means that memory ran out. PyTorch has no single class for this."""
    words = ("alloc", "out of memory") if isinstance(error, RuntimeError) else ()
    return isinstance(error, MemoryError) or any(word in str(error).lower() for word in words)


def save(trainer, folder):
    """Write metrics.jsonl and checkpoint.pt. All call it, rank 0 writes. Raises OSError, ArithmeticError."""
    (loss_sum,) = trainer.job.sum(float(trainer.loss_sum))
    if not math.isfinite(loss_sum):
        raise FloatingPointError(f"in epoch {trainer.epoch}, the loss is {loss_sum}: try a smaller --lr")
    if trainer.job.rank > 0 or folder is None:
        return
    checkpoint = {name: getattr(trainer, name).state_dict() for name in STATES}
    checkpoint["progress"] = {name: getattr(trainer, name) for name in PROGRESS} | {"loss_sum": loss_sum}
    checkpoint["hyperparameters"] = asdict(trainer.hyperparameters)
    checkpoint["world_size"] = trainer.job.world_size
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
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
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


def load_checkpoint(folder):
    """Return the newest good checkpoint, or None. Raises OSError, or ValueError if all are damaged."""
    found = [Path(folder, n) for n in ("checkpoint.pt", "checkpoint.previous.pt") if n in os.listdir(folder)]
    for path in found:
        try:
            contents = b"" if path.is_dir() else path.read_bytes()
            # zipfile verifies checksums, torch.load does not. With weights_only, no code in the file runs.
            if damaged := zipfile.ZipFile(io.BytesIO(contents)).testzip():
                raise ValueError(f"wrong checksum of {damaged}")
            checkpoint = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
            for part, keys in (("progress", PROGRESS), ("hyperparameters", asdict(Hyperparameters()))):
                if checkpoint.get(part, {}).keys() != set(keys):
                    raise ValueError("it is another program's, or another version's")
        except Exception as error:
            if isinstance(error, OSError) or lacks_memory(error):
                raise OSError(f"cannot read {path}: {error}") from error
            logging.warning(f"{path} is not a good checkpoint ({repr(error)[:200]}): passed over")
            continue
        if path != found[0]:  # otherwise the next save would replace the good one by it
            os.replace(found[0], found[0].with_suffix(".damaged"))
        return checkpoint
    if found:
        raise ValueError(f"no good checkpoint is left in {folder}: start afresh, without --resume")


def resume(trainer, folder):
    """Continue from the newest good checkpoint, if any. Raises ValueError for another run's, or OSError."""
    received = [load_checkpoint(folder) if trainer.job.rank == 0 else None]
    if (now := trainer.job.world_size) > 1:
        dist.broadcast_object_list(received)
    if (checkpoint := received[0]) is None:
        logging.info(f"No checkpoint in {folder} yet: starting afresh")
        return
    for name, value in checkpoint["hyperparameters"].items():
        if value != (ours := getattr(trainer.hyperparameters, name)):
            raise ValueError(f"the checkpoint in {folder} has {name} {value}, but this run has {ours}")
    try:
        for name in STATES:
            getattr(trainer, name).load_state_dict(checkpoint[name])
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the checkpoint in {folder} does not fit this model: {error}") from error
    vars(trainer).update(checkpoint["progress"])
    trainer.loss_sum *= trainer.job.rank == 0  # rank 0 has the sum of all
    logging.info(f"Resuming in epoch {trainer.epoch} after {trainer.samples_seen} samples")
    trainer.optimizer._opt_called = True  # otherwise the scheduler warns about a step it has not seen
    if (then := checkpoint["world_size"]) != now:
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
    asked_to_stop: bool = False
    pending: tuple | None = None  # the previous step's sum of asked_to_stop, and its Work

    @classmethod
    def from_environment(cls):
        """Read the variables that torchrun or a PyTorchJob's operator has set, if any. Raises ValueError."""
        if not {"WORLD_SIZE", "RANK", "LOCAL_RANK"} & set(os.environ):
            return cls()
        size, _ = variable("WORLD_SIZE", 1, 10**6), variable("MASTER_PORT", 1, 65535)
        if not os.environ.get("MASTER_ADDR"):
            raise ValueError("the variable MASTER_ADDR must be the name or address of rank 0's machine")
        if "LOCAL_RANK" not in os.environ:
            return cls("in a pod of a PyTorchJob", variable("RANK", 0, size - 1), size)
        return cls("by torchrun", variable("RANK", 0, size - 1), size, variable("LOCAL_RANK", 0, size - 1))

    @contextmanager
    def connected(self, backend, timeout):
        """Connect the processes. From then on, SIGTERM and Ctrl-C ask to stop. Raises ConnectionError."""
        try:
            if self.world_size > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would not act before all have met
                self.meet(backend, timedelta(seconds=timeout))
            for name in (signal.SIGTERM, signal.SIGINT):  # Kubernetes sends SIGTERM, and SIGKILL 30 s later
                signal.signal(name, lambda *_: setattr(self, "asked_to_stop", True))
            yield
        except RuntimeError as error:
            if self.world_size == 1 or lacks_memory(error):  # not the others' fault
                raise
            if dist.is_initialized():
                dist.group.WORLD.abort()  # otherwise nccl would go on waiting for the lost one
            who = "rank {rank} of {world_size} (meeting at {MASTER_ADDR}:{MASTER_PORT})"
            who = who.format(**os.environ | vars(self))
            raise ConnectionError(f"{who} failed, or lost another: {str(error).splitlines()[0]}") from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
                time.sleep(0.1)  # otherwise gloo may free a tensor after Python has ended, and crash

    def meet(self, backend, limit):
        # Pods start minutes apart, and by default only rank 0 waits for all. The others would soon give up.
        store, rank, size = next(dist.rendezvous("env://", timeout=10 * limit))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)])
        store.set_timeout(limit)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)

    def distribute(self, model):
        """Return the model, wrapped so that its gradients are averaged over all processes."""
        shared = nn.parallel.DistributedDataParallel(model)
        # A first pass, without a step, fixes the order in which gradients are added, also after --resume.
        shared(torch.zeros(1, 28, 28, device=model.fc1.weight.device)).sum().backward()
        return shared

    def sum(self, *numbers):
        """Add up each number over all processes. All must call this, and all get the sums."""
        if self.world_size == 1:
            return numbers
        dist.all_reduce(totals := torch.tensor(numbers, dtype=torch.float64))
        return totals.tolist()

    def stop_if_asked(self):
        """Raise Stopped in all processes at once if any of them was asked to stop."""
        asked = torch.tensor(float(self.asked_to_stop))
        if self.world_size > 1:
            # The sum is computed during a step and read before the next. (The first call waits for its sum.)
            sent = asked, dist.all_reduce(asked, async_op=True)
            (asked, work), self.pending = self.pending or sent, sent
            work.wait()
        if asked:
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


def count_processors():
    """Return how many processors this process may use: those it is bound to, or fewer in a container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroups v2 and v1
        with suppress(OSError, ValueError):  # "max" or -1 means that there is no limit
            quota, period = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in files).split()
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


@contextmanager
def state_restored():
    """Restore variables and signal handlers at the end, because a notebook lives on after %run."""
    env, numbers = dict(os.environ), (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
    handlers = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(env)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        logging.disable(logging.NOTSET)
        logging.getLogger().handlers.clear()


def launch(processes, argv):
    """Run torchrun if it is needed. Returns its exit code, or else None. Raises ValueError, OSError."""
    # torchrun starts this file once for each process, on this machine or in a pod. A pod needs it if its
    # operator asks for several processes (PET_NPROC_PER_NODE), or sets PET_NNODES and no RANK.
    env, each = os.environ, os.environ.get("PET_NPROC_PER_NODE", "1")
    in_pods = each not in ("auto", "1") or ("PET_NNODES" in env and "RANK" not in env)
    if "LOCAL_RANK" in env or (processes == 1 and not in_pods):
        return None  # torchrun has started this process, or is not needed
    if processes > 1 and (in_pods or "RANK" in env):
        raise ValueError("--num-processes is for one machine: here a job says how many processes a pod has")
    for name in {"PET_NODE_RANK", "PET_MASTER_PORT", "PET_MAX_RESTARTS"} & set(env):
        variable(name, 0, 65535)  # otherwise torchrun answers a bad value with a page of usage
    options = ["--standalone", f"--nproc-per-node={processes}"]
    if "PET_NNODES" not in env:  # this machine alone: a container may not know its own name
        env.setdefault("PET_LOCAL_ADDR", "localhost")
    each = processes if processes > 1 else int(each) if each.isdecimal() else count_processors()
    env.setdefault("OMP_NUM_THREADS", str(max(1, count_processors() // max(1, each))))  # a fair share
    # All of torchrun's signals but SIGHUP, which nohup ignores. (PyTorch 2.9 does not read this yet.)
    env.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    logging.disable()  # otherwise torchrun adds a page to the one line of a failed process
    try:
        dist.run.main([*(options if processes > 1 else []), __file__, *argv])
    except dist.elastic.multiprocessing.SignalException:
        return 143
    except dist.elastic.multiprocessing.errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        why = " (often, memory has run out)" if failure.exitcode == -signal.SIGKILL else ""
        raise ChildProcessError(f"process {rank} was ended by {failure.signal_name()}{why}") from error
    except (dist.elastic.rendezvous.RendezvousError, AssertionError, RuntimeError, ValueError) as error:
        raise ConnectionError(f"processes did not meet, or a PET_… variable is wrong: {error!r}") from error
    return 0


# --- The command line ---------------------------------------------------------------------------


def number(kind, is_valid, meaning, text):
    """Convert `text` to an int or float (`kind`) that `is_valid` accepts, for argparse."""
    with suppress(ValueError):
        if is_valid(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")


def parse_arguments(argv):
    """Return the values of the flags. A mistake ends the program with one sentence and exit code 2."""
    count = partial(number, int, lambda n: n >= 1, "a whole number of 1 or more")
    integer = partial(number, int, lambda n: True, "a whole number")
    seconds = partial(number, int, lambda n: 1 <= n <= 86400, "a whole number from 1 to 86400")
    rate = partial(number, float, lambda x: 0 < x < 1e38, "a number above 0 and below 1e38")
    factor = partial(number, float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    fraction = partial(number, float, lambda x: 0 <= x < 1, "a number from 0 to less than 1")
    parser = argparse.ArgumentParser("mnist.py", description="Train a network on MNIST.", allow_abbrev=False)
    add, shown = parser.add_argument, "(default: %(default)s)"
    add("--epochs", metavar="N", type=count, default=5, help=f"passes over the training set {shown}")
    add("--batch-size", metavar="N", type=count, help=f"images per process and step {shown}")
    add("--test-batch-size", metavar="N", type=count, default=1000, help=f"the same for evaluation {shown}")
    add("--optimizer", choices=("adadelta", "sgd"), help=f"how to update the weights {shown}")
    add("--lr", metavar="LR", type=rate, help="learning rate (default: 0.1, or 1.0 with adadelta)")
    add("--gamma", metavar="M", type=factor, help=f"multiply the learning rate by this each epoch {shown}")
    add("--momentum", metavar="M", type=fraction, help=f"momentum of sgd {shown}")
    add("--label-smoothing", metavar="X", type=fraction, help=f"target share spread over all digits {shown}")
    add("--no-augment", dest="augment", action="store_false", help="do not turn, scale or move digits")
    add("--bf16", action="store_true", help="multiply in bfloat16 when training: faster on some processors")
    add("--seed", metavar="S", type=integer, help=f"seed of all random numbers {shown}")
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
    parser.set_defaults(**asdict(Hyperparameters()) | {"lr": None})  # lr depends on the optimizer
    args = parser.parse_args(argv)
    args.lr = args.lr or (1.0 if args.optimizer == "adadelta" else Hyperparameters.lr)
    return args


# --- All together -------------------------------------------------------------------------------


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
    (loss_sum,) = trainer.job.sum(float(trainer.loss_sum))  # reading it waits for all steps
    trainer.seconds = seconds = time.perf_counter() - clock
    loss, correct = test(trainer.model, *test_set, args.test_batch_size, trainer.job)
    if not math.isfinite(both := loss_sum + loss):
        raise FloatingPointError(f"in epoch {trainer.epoch}, the loss is {both}: try a smaller --lr")
    accuracy = correct / len(test_set[0])
    logging.info(f"Test accuracy: {correct}/{len(test_set[0])} ({accuracy:6.1%})")
    logging.info(f"loss={loss:.4f}")  # the form that Katib, which tunes hyper-parameters, looks for
    logging.info(f"accuracy={accuracy:.4f}")
    metrics = {"epoch": trainer.epoch, "train_loss": loss_sum / trainer.samples_seen, "test_loss": loss}
    metrics |= {"accuracy": accuracy, "learning_rate": trainer.scheduler.get_last_lr()[0], "seconds": seconds}
    trainer.history.append(metrics | {"samples_per_second": trainer.samples_seen / seconds})
    trainer.scheduler.step()
    trainer.begin(trainer.epoch + 1)
    save(trainer, folder)


def give_up(record):
    """End the program if its log cannot be written, for example to a closed pipe or a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python tries again at exit
    raise


def run(args, job):
    """Train and test for all epochs, as one of the processes of `job`."""
    settle_in()
    device = choose_device(job.local_rank, not args.no_cuda)
    backend = args.backend or dist.get_default_backend_for_device(device)
    how = f"backend {backend if job.world_size > 1 else 'none'}, {torch.get_num_threads()} threads"
    logging.info(f"Started {job.started}: rank {job.rank} of {job.world_size}, device {device}, {how}")
    if job.local_rank == 0:
        find_sums(Path(args.data_dir, "MNIST", "raw"))  # may download, so before the processes meet
    mixed = device.type != "cpu" and backend not in ("gloo", "mpi")  # gradients on GPUs, Job.sum on CPUs
    backends = f"cpu:gloo,{device.type}:{backend}" if mixed else backend
    folder = None if args.dry_run else args.output_dir
    writes = folder is not None and job.rank == 0
    with job.connected(backends, args.timeout), claimed(folder) if writes else nullcontext():
        training_set, test_set = load_mnist(args.data_dir, device)
        if args.dry_run:
            args.epochs, training_set = 1, [t[: args.batch_size * job.world_size] for t in training_set]
            test_set = [t[: args.test_batch_size] for t in test_set]
        chosen = {name: vars(args)[name] for name in asdict(Hyperparameters())}
        trainer = Trainer(Hyperparameters(**chosen), job, device)
        if job.world_size > 1:
            logging.info(f"Using distributed PyTorch with {backend} backend")
            trainer.network = job.distribute(trainer.learner)
        if args.resume and not args.dry_run:
            resume(trainer, folder)
        try:
            while trainer.epoch <= args.epochs:
                run_epoch(trainer, training_set, test_set, args, folder)
        except Stopped:
            save(trainer, folder)
            logging.info("Stopped by a signal. --resume goes on from the newest checkpoint")
            sys.exit(143)
        if args.save_model and writes:  # so any machine can load it
            write(Path(folder, "mnist_model.pt"), trainer.model.cpu().state_dict())
        job.sum(0)  # a barrier: rank 0 must not leave before the others have finished


def main(argv=None):
    """Do what the command line `argv` says (default: the one this program was started with)."""
    args = parse_arguments(argv := sys.argv[1:] if argv is None else argv)
    try:
        with state_restored():
            # Notebooks show standard error in pink, and already have a log, which `force` replaces.
            logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
            logging.getLogger().handlers[0].handleError = give_up
            if (code := launch(args.num_processes, argv)) is not None:
                sys.exit(code)
            job = Job.from_environment()
            logging.disable(logging.INFO if job.rank > 0 else logging.NOTSET)
            run(args, job)
    except (Exception, KeyboardInterrupt) as error:
        if lacks_memory(error):
            sys.exit(f"mnist.py: memory does not suffice, try a smaller --batch-size ({error})")
        if not isinstance(error, (ArithmeticError, KeyboardInterrupt, OSError, ValueError)):
            raise
        sys.exit("mnist.py: " + (" ".join(str(error).split()) or "interrupted"))


if __name__ == "__main__":
    main()
