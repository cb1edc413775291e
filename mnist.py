"""Train a small convolutional network on MNIST: alone, in several processes, or on a cluster.

    python mnist.py --epochs 5                          alone
    python mnist.py --num-processes 2                   in two processes of this machine
    torchrun --standalone --nproc-per-node 2 mnist.py   the same, started by torchrun
    python mnist.py                                     in a pod: Kubeflow's operators have set the rest

Exit codes: 0 done; 1 failed, and one line says why; 2 wrong usage; 143 stopped by SIGTERM or Ctrl-C in
training, after saving a checkpoint: --resume goes on from it.
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
import zlib
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from filelock import FileLock, Timeout
from torch.distributed import elastic
from torch.distributed.run import main as torchrun

# --- The model ----------------------------------------------------------------------------------

# Mean and standard deviation of all training pixels, on a scale from 0 (paper) to 1 (ink).
MEAN, STD = 0.1307, 0.3081


class Net(nn.Module):
    """Two convolutions and two linear layers: 1,199,882 parameters.

    A state_dict fits that of PyTorch's own MNIST example (https://github.com/pytorch/examples/tree/main/mnist),
    and the other way round; but this network normalises the images itself.
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
        # Channels last: a layout in which convolutions are faster on most devices.
        x = images.reshape(-1, 28, 28, 1).permute(0, 3, 1, 2)
        # Normalising is part of the model, so nobody who uses the trained one can forget it.
        x = (x / 255 - MEAN) / STD
        x = F.relu(self.conv1(x))  # [N, 32, 26, 26]
        # ReLU and max-pooling may change places; after pooling only a quarter of the values is left.
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # [N, 64, 12, 12]
        x = F.relu(self.fc1(x.flatten(1)))  # [N, 9216], then [N, 128]
        x = self.dropout(x)
        return F.log_softmax(self.fc2(x).float(), dim=1)


# --- The data -----------------------------------------------------------------------------------

FILES = [f"{whose}-{what}-ubyte" for whose in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]


def load_mnist(folder, device="cpu"):
    """Read the four FILES in `folder`/MNIST/raw, all 55 MB, to `device`.

    Returns (images, labels) of the training set and (images, labels) of the test set:
    images uint8 [60000 or 10000, 28, 28], labels int64 [60000 or 10000].
    Raises OSError or ValueError with the name of a file that is missing or not what it should be.
    """
    raw = Path(folder, "MNIST", "raw")
    sums = find_sums(raw)
    images, labels, *of_test = (read_idx(raw / name, sums.get(name)).to(device) for name in FILES)
    for digits, answers in ((images, labels), of_test):
        if digits.shape != (len(answers), 28, 28) or answers.max() > 9:
            raise ValueError(f"{raw}: each image must have 28 by 28 pixels and a label from 0 to 9")
    return (images, labels.long()), (of_test[0], of_test[1].long())


def read_idx(path, sha256):
    """Return what is in an IDX file, or in the .gz of one: uint8, in the shape that its first bytes give."""
    found = path if path.exists() else path.with_name(path.name + ".gz")
    try:
        contents = found.read_bytes() if found == path else gzip.decompress(found.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise OSError(f"{found} is missing or damaged, put a good copy there ({error})") from error
    if hashlib.sha256(contents).hexdigest() != sha256:  # training on it would only learn worse
        raise ValueError(f"{found} is damaged, SHA256SUMS says: delete it, or put a good copy there")
    shape = [int.from_bytes(contents[4 * i : 4 * i + 4], "big") for i in range(1, 1 + contents[3])]
    return torch.frombuffer(bytearray(contents), dtype=torch.uint8, offset=4 + 4 * len(shape)).reshape(shape)


def find_sums(raw):
    """Return the SHA-256 of each unpacked file by its name, from `raw`/SHA256SUMS, which sha256sum writes.

    Without it the .gz files must be MNIST's own; where nothing is at all, they are downloaded. Nothing is
    ever overwritten. Raises OSError or ValueError with what to do.
    """
    if (raw / "SHA256SUMS").exists():
        words = (raw / "SHA256SUMS").read_text().replace("*", " ").split()
        return dict(zip(words[1::2], words[::2], strict=False))
    from torchvision.datasets import MNIST, utils  # takes a second, and is seldom needed

    if not any(raw.glob("*-ubyte*")):
        logging.info(f"Downloading MNIST from {MNIST.mirrors[0]}")
        raw.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=raw.parent) as elsewhere:  # all files appear together
            MNIST(elsewhere, download=True)
            os.replace(Path(elsewhere, "MNIST", "raw"), raw)
    if not all(utils.check_integrity(raw / archive, md5) for archive, md5 in MNIST.resources):
        raise ValueError(f"not all in {raw} is MNIST: for other data, `sha256sum *-ubyte > SHA256SUMS` there")
    unpacked = {name: gzip.decompress((raw / f"{name}.gz").read_bytes()) for name in FILES}
    return {name: hashlib.sha256(contents).hexdigest() for name, contents in unpacked.items()}


def random_seed(*purpose):
    """Return a number of 64 bits for a purpose, such as ("order", seed, epoch), and for no other purpose."""
    return int.from_bytes(hashlib.sha256(repr(purpose).encode()).digest()[:8], "big")


def epoch_order(samples, seed, epoch):
    """Return the order in which an epoch takes the samples, int64 [samples]; all processes agree on it."""
    generator = torch.Generator().manual_seed(random_seed("order", seed, epoch))
    return torch.randperm(samples, generator=generator)


def epoch_distortions(samples, seed, epoch):
    """Return how an epoch turns, scales and moves each sample: float32 [samples, 2, 3].

    By up to 10 degrees, 10 % and 2 pixels. Each maps places in the new image to places in the old one.
    """
    generator = torch.Generator().manual_seed(random_seed("distortions", seed, epoch))
    amounts = 2 * torch.rand(4, samples, generator=generator) - 1  # from -1 to 1
    angle, scale = math.radians(10) * amounts[0], 1 + 0.1 * amounts[1]
    right, down = amounts[2:] * 2 / 14  # 2 of 28 pixels, on a scale that reaches from -1 to 1
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    return torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(samples, 2, 3)


def distort(images, distortions):
    """Return `images`, uint8 [N, 28, 28], as float32, changed by `distortions`, float32 [N, 2, 3]."""
    images = images.unsqueeze(1).float()
    places = F.affine_grid(distortions, images.shape, align_corners=False)
    # Values between pixels are interpolated; beyond the edge there is paper.
    return F.grid_sample(images, places, align_corners=False).squeeze(1)


# --- Learning -----------------------------------------------------------------------------------


@dataclass
class Hyperparameters:
    """What decides how a training goes, besides the data and the number of processes."""

    batch_size: int = 64  # images in a step, for each process
    optimizer: str = "sgd"  # or "adadelta"
    lr: float = 0.07  # the learning rate in the first epoch
    gamma: float = 0.75  # which multiplies it after each epoch
    momentum: float = 0.9  # of sgd
    label_smoothing: float = 0.1  # aim at 91 % for the right digit, and at 1 % for each other one
    augment: bool = True  # distort the digits
    bf16: bool = False  # multiply in bfloat16
    seed: int = 1


class Alone:
    """A process that trains by itself: the first of one. For several there is Job, further down."""

    rank, world_size = 0, 1

    def sum(self, *numbers):
        return numbers

    def stop_if_asked(self):
        """Nobody asks."""


class Trainer:
    """A network that learns, the average of its weights, and how far they have come."""

    def __init__(self, hyperparameters, job=None, device="cpu"):
        self.hyperparameters = h = hyperparameters
        self.job, self.device = job or Alone(), torch.device(device)
        torch.manual_seed(random_seed("weights", h.seed))
        # One network learns. The other one, an average over its last steps, is tested and kept.
        self.learner, self.model = (Net().to(device, memory_format=torch.channels_last) for _ in range(2))
        self.network = self.learner  # which Job wraps, to average gradients over its processes
        weights = self.learner.parameters()
        if h.optimizer == "adadelta":
            self.optimizer = optim.Adadelta(weights, h.lr)
        else:
            # Weight decay draws all weights a little towards 0, so only those that pay stay large.
            nesterov = {"momentum": h.momentum, "nesterov": h.momentum > 0}
            self.optimizer = optim.SGD(weights, h.lr, **nesterov, weight_decay=5e-4, fused=True)
        self.scheduler = optim.lr_scheduler.ExponentialLR(self.optimizer, h.gamma)
        self.steps = 0  # since the training began
        self.history = []  # a dict for each finished epoch: the lines of metrics.jsonl
        self.begin(epoch=1)

    def begin(self, epoch):
        self.epoch, self.seconds = epoch, 0.0  # of training in this epoch
        self.samples_seen = 0  # in this epoch, by all processes together
        self.loss_sum = 0.0  # over those of them that this process has seen

    def train(self, images, labels):
        """Train for an epoch, or what is left of it, on `images`, uint8 [N, 28, 28], and `labels`, int64 [N].

        Yields the mean loss of this process's images after each step; raises Stopped if the job says so.
        """
        h, rank, world_size = self.hyperparameters, self.job.rank, self.job.world_size
        order = epoch_order(len(images), h.seed, self.epoch).to(self.device)
        distortions = epoch_distortions(len(images), h.seed, self.epoch).to(self.device)
        batch_size = h.batch_size * world_size  # of all processes together
        self.learner.train()
        for start in range(self.samples_seen, len(order), batch_size):
            self.job.stop_if_asked()
            batch = order[start : start + batch_size]
            share = batch[rank::world_size]
            # Dropout's random numbers depend on the position alone, so a resumed run repeats them.
            torch.manual_seed(random_seed("dropout", h.seed, self.epoch, start, rank))
            digits = images[share]
            if h.augment and len(share):  # none may be left for this process in the last batch
                digits = distort(digits, distortions[share])
            # Gradients are averaged over the processes. Scaled like this, the average is the gradient
            # of the mean loss of the whole batch, even where the shares differ in length.
            loss = self.step(digits, labels[share], scale=world_size / len(batch))
            self.loss_sum += loss  # stays on the GPU: to read it at every step is to wait for it
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
        self.optimizer.step()
        # Each step goes a little astray, for it has seen one batch only; averaged, these errors cancel out.
        # The 10 gives two thirds of the weight, 1 - 0.9 ** 10, to the last tenth of all steps
        # (polynomial-decay averaging, https://proceedings.mlr.press/v28/shamir13.html).
        average = optim.swa_utils.get_ema_multi_avg_fn(decay=self.steps / (10 + self.steps))
        average(list(self.model.parameters()), list(self.learner.parameters()), None)
        self.steps += 1
        return loss.detach()


@torch.inference_mode()
def test(model, images, labels, batch_size=1000, job=None):
    """Return the mean loss and the number of right answers on `images`, uint8 [N, 28, 28]. Raises Stopped."""
    job, loss, correct = job or Alone(), 0.0, 0
    model.eval()
    for start in range(0, len(images), batch_size * job.world_size):
        job.stop_if_asked()
        # No sample is taken twice to even out the shares, so the result is that of a single process.
        share = slice(start + job.rank, start + batch_size * job.world_size, job.world_size)
        output = model(images[share])
        loss += F.nll_loss(output, labels[share], reduction="sum").item()
        correct += (output.argmax(dim=1) == labels[share]).sum().item()
    loss, correct = job.sum(loss, correct)
    return loss / len(images), int(correct)


# --- Checkpoints --------------------------------------------------------------------------------

# What a checkpoint holds besides the hyper-parameters: states, and how far the training has come.
STATES = ("model", "learner", "optimizer", "scheduler")
PROGRESS = ("epoch", "steps", "samples_seen", "loss_sum", "seconds", "history")


def save(trainer, folder):
    """Write metrics.jsonl and checkpoint.pt; all call it, rank 0 writes. Raises OSError, ArithmeticError."""
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
    """Write bytes, or what torch.save takes, wholly or not; the old file moves to `keep`. Raises OSError."""
    temporary, buffer = path.with_name(path.name + ".tmp"), io.BytesIO()
    buffer.write(contents) if isinstance(contents, bytes) else torch.save(contents, buffer)
    try:
        temporary.unlink(missing_ok=True)  # one that is left over may be another user's
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {error.filename or path}: {error.strerror}") from error


def load_checkpoint(folder):
    """Return the newest good checkpoint in `folder`, or None where there is none at all.

    A damaged one is named and passed over. Raises ValueError if none is left, OSError if one is unreadable.
    """
    names = ("checkpoint.pt", "checkpoint.previous.pt")
    found = [path for path in (Path(folder, name) for name in names) if path.exists()]
    for path in found:
        try:
            contents = path.read_bytes() if path.is_file() else b""
            # torch.load does not look at the checksums, zipfile does; weights_only runs no code in the file.
            if damaged := zipfile.ZipFile(io.BytesIO(contents)).testzip():
                raise ValueError(f"wrong checksum of {damaged}")
            checkpoint = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
            for part, names in (("progress", PROGRESS), ("hyperparameters", asdict(Hyperparameters()))):
                if checkpoint.get(part, {}).keys() != set(names):
                    raise ValueError("it is another program's, or another version's")
        except (OSError, MemoryError) as error:
            raise OSError(f"cannot read {path}: {error}") from error
        except Exception as error:
            logging.warning(f"{path} is not a good checkpoint ({repr(error)[:200]}): passed over")
            continue
        if path != found[0]:  # or the next save would move it over the good one
            os.replace(found[0], found[0].with_suffix(".damaged"))
        return checkpoint
    if found:
        raise ValueError(f"no good checkpoint is left in {folder}: start afresh, without --resume")


def resume(trainer, folder):
    """Go on from the newest good checkpoint, if any. Raises OSError, ValueError if it is another run's."""
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
        reason = " ".join(str(error).split())
        raise ValueError(f"the checkpoint in {folder} does not fit this model: {reason}") from error
    vars(trainer).update(checkpoint["progress"])
    trainer.loss_sum *= trainer.job.rank == 0  # which has that of all
    logging.info(f"Resuming in epoch {trainer.epoch} after {trainer.samples_seen} samples")
    if (then := checkpoint["world_size"]) != now:
        logging.info(
            f"{then} process(es) before, {now} now: batches have another size, so results will differ"
        )


# --- The processes ------------------------------------------------------------------------------


class Stopped(Exception):
    """All processes have agreed to stop, between two steps."""


def variable(name, low, high):
    """Return a whole number that a launcher has set. Raises ValueError with the name of the variable."""
    text = os.environ.get(name, "")
    if text.isdecimal() and low <= int(text) <= high:
        return int(text)
    raise ValueError(f"the variable {name} must be a whole number from {low} to {high}, not {text!r}")


@dataclass
class Job(Alone):
    """The place of this process among those that train together, in torchrun's words."""

    started: str = "alone"
    rank: int = 0  # the number of this process, from 0
    world_size: int = 1  # the number of all processes
    local_rank: int = 0  # the number of this process among those of this machine
    asked_to_stop: bool = False
    question: tuple | None = None  # the last sum that says who was asked to stop, and its arrival

    @classmethod
    def from_environment(cls):
        """Read what torchrun, or the operator of a PyTorchJob, has set, if anything. Raises ValueError."""
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
        """Connect the processes; from then on, SIGTERM and Ctrl-C ask to stop. Raises ConnectionError."""
        handlers = {name: signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.world_size > 1:
                signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own would wait for the meeting
                self.meet(backend, timedelta(seconds=timeout))
            for name in handlers:  # Kubernetes sends SIGTERM before it takes a pod away, SIGKILL 30 s later
                signal.signal(name, lambda *_: vars(self).update(asked_to_stop=True))
            yield
        except RuntimeError as error:
            if self.world_size == 1 or "allocate" in str(error):  # the others cannot help a want of memory
                raise
            if dist.is_initialized():
                dist.group.WORLD.abort()  # nccl would wait for the lost one before it lets go
            who = "rank {rank} of {world_size} (meeting at {MASTER_ADDR}:{MASTER_PORT})"
            who = who.format(**vars(self), **os.environ)
            raise ConnectionError(f"{who} failed, or lost another: {str(error).splitlines()[0]}") from error
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
            if dist.is_initialized():
                dist.destroy_process_group()
                time.sleep(0.1)  # or gloo lets go of its last tensor when Python has ended, and crashes

    def meet(self, backend, limit):
        # Pods start minutes apart, while images are pulled. By itself only rank 0 waits for all: the others
        # would go on, and give up after `limit`.
        store, rank, size = next(dist.rendezvous("env://", timeout=10 * limit))
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)])
        store.set_timeout(limit)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)

    def distribute(self, model):
        """Return the model such that its gradients are averaged over all processes."""
        shared = nn.parallel.DistributedDataParallel(model)
        # The first backward pass settles the order in which gradients are added up. Its gradients are
        # thrown away, or a resumed run would add in another order than the one that it resumes.
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
            # Summed up while a step computes, it is read before the next. (The first has none before it.)
            question = asked, dist.all_reduce(asked, async_op=True)
            (asked, arrival), self.question = self.question or question, question
            arrival.wait()
        if asked:
            raise Stopped


# --- The machine --------------------------------------------------------------------------------


def choose_device(local_rank, accelerate=True):
    """Return this process's own accelerator (CUDA, MPS, XPU), or the CPU where there is none."""
    if not accelerate or not torch.accelerator.is_available():
        return torch.device("cpu")
    if local_rank >= torch.accelerator.device_count():
        raise ValueError(f"no accelerator is left for process {local_rank}: start fewer, or use --no-cuda")
    torch.accelerator.set_device_index(local_rank)
    device = torch.device(torch.accelerator.current_accelerator().type, local_rank)
    if device.type == "cuda":  # or a resumed run would differ in its last digits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # takes time, and nothing here reads it
    return device


def count_processors():
    """Return how many processors this process may use: those it is bound to, or fewer in a container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for files in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):  # of cgroups v2 and v1
        with suppress(OSError, ValueError):  # "max" or -1 where there is no limit
            quota, period = " ".join(Path("/sys/fs/cgroup", name).read_text() for name in files).split()
            count = min(count, math.ceil(int(quota) / int(period))) if int(quota) > 0 else count
    return count


def settle_in():
    """Use the processors that there are; on Linux, also stop when torchrun dies, and keep freed memory."""
    torch.set_num_threads(min(torch.get_num_threads(), count_processors()))
    with suppress(AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.prctl(1, signal.SIGTERM if "LOCAL_RANK" in os.environ else 0)  # PR_SET_PDEATHSIG
        # glibc would give memory back after each step, to get it again page by page: a tenth of a step's time
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no pieces of their own for large tensors
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the end of the heap given back


def launch(processes, argv):
    """Start this file by torchrun, if it is to. Returns the exit code, or None. Raises ValueError, OSError.

    Kubeflow's operators set torchrun's options, PET_…; pods of a plain PyTorchJob have a RANK and need none.
    """
    env, each = os.environ, os.environ.get("PET_NPROC_PER_NODE", "auto")
    in_pods = each not in ("auto", "1") or ("PET_NNODES" in env and "RANK" not in env)
    if "LOCAL_RANK" in env or (processes == 1 and not in_pods):
        return None
    if processes > 1 and (in_pods or "RANK" in env):
        raise ValueError("--num-processes is for one machine: here a job says how many processes a pod has")
    # By localhost, for a machine's own name may be unknown to it, in a container for example.
    options = ["--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}"]
    each = processes if processes > 1 else int(each) if each.isdecimal() else count_processors()
    env.setdefault("OMP_NUM_THREADS", str(max(1, count_processors() // max(1, each))))
    # Not SIGHUP, which nohup ignores. (PyTorch 2.9 does not look here yet, and stops at a hang-up.)
    env.setdefault("PET_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    logging.disable()  # of torchrun, which would add a page to the one line of a process that failed
    try:
        torchrun([*(options if processes > 1 else []), __file__, *argv])
    except elastic.multiprocessing.SignalException:
        return 143
    except elastic.multiprocessing.errors.ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        why = " (often, memory has run out)" if failure.exitcode == -signal.SIGKILL else ""
        raise ChildProcessError(f"process {rank} was ended by {failure.signal_name()}{why}") from error
    except (elastic.rendezvous.RendezvousError, AssertionError, RuntimeError, ValueError) as error:
        raise ConnectionError(
            f"the processes did not meet, or a variable PET_… is wrong: {error!r}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    return 0


# --- The command line ---------------------------------------------------------------------------


def number(kind, is_valid, meaning, text):
    """Return `text` as an int or float (`kind`) of which `is_valid` holds, for argparse."""
    with suppress(ValueError):
        if is_valid(kind(text)):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")


def parse_arguments(argv):
    """Return the flags' values; a mistake ends the program with one sentence and exit code 2."""
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
    add("--test-batch-size", metavar="N", type=count, default=1000, help=f"the same in evaluation {shown}")
    add("--optimizer", choices=("adadelta", "sgd"), help=f"rule for the steps {shown}")
    add("--lr", metavar="LR", type=rate, help="learning rate (default: 0.07, with adadelta 1.0)")
    add("--gamma", metavar="M", type=factor, help=f"multiplies the learning rate after each epoch {shown}")
    add("--momentum", metavar="M", type=fraction, help=f"momentum of sgd {shown}")
    add("--label-smoothing", metavar="X", type=fraction, help=f"share of the target for all digits {shown}")
    add("--no-augment", dest="augment", action="store_false", help="do not turn, scale and move digits")
    add("--bf16", action="store_true", help="multiply in bfloat16 in training: faster on some processors")
    add("--seed", metavar="S", type=integer, help=f"seed of all random numbers {shown}")
    add("--log-interval", metavar="N", type=count, default=10, help=f"steps per log line {shown}")
    add("--no-cuda", "--no-accel", action="store_true", help="use the CPU even where there is a GPU")
    add("--backend", choices=("gloo", "nccl", "xccl", "mpi"), help="default: the device's own, gloo on CPUs")
    add("--num-processes", metavar="N", type=count, default=1, help=f"processes on this machine {shown}")
    add("--data-dir", metavar="DIR", default="datasets", help=f"where MNIST/raw is {shown}")
    add("--output-dir", metavar="DIR", default="output", help=f"where results go {shown}")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--checkpoint-interval", metavar="N", type=count, help="also save every N steps")
    add("--timeout", metavar="S", type=seconds, default=60, help=f"seconds to wait for others {shown}")
    add("--save-model", action="store_true", help="write mnist_model.pt, a state_dict")
    add("--dry-run", action="store_true", help="one batch of training, one of evaluation, no files")
    parser.set_defaults(**asdict(Hyperparameters()) | {"lr": None})  # which depends on the optimizer
    args = parser.parse_args(argv)
    args.lr = args.lr or (1.0 if args.optimizer == "adadelta" else Hyperparameters.lr)
    return args


# --- All together -------------------------------------------------------------------------------


def run_epoch(trainer, training_set, test_set, args, folder):
    """Train for an epoch, or what is left of it, test, and save to `folder`, unless that is None."""
    batch_size = args.batch_size * trainer.job.world_size
    if batch_size > (images := len(training_set[0])):
        raise ValueError(f"--batch-size is too large: {batch_size} in all processes, of {images} images")
    steps = math.ceil(images / batch_size)
    clock = time.perf_counter() - trainer.seconds
    for step, loss in enumerate(trainer.train(*training_set), trainer.samples_seen // batch_size):
        trainer.seconds = time.perf_counter() - clock
        if step % args.log_interval == 0:
            logging.info(f"Epoch: {trainer.epoch} ({step / steps:6.1%}) - Loss: {loss.item()}")
        if args.checkpoint_interval and (step + 1) % args.checkpoint_interval == 0:
            save(trainer, folder)
    (loss_sum,) = trainer.job.sum(float(trainer.loss_sum))  # which is read: all steps are done
    trainer.seconds = time.perf_counter() - clock
    loss, correct = test(trainer.model, *test_set, args.test_batch_size, trainer.job)
    accuracy = correct / len(test_set[0])
    logging.info(f"Test accuracy: {correct}/{len(test_set[0])} ({accuracy:6.1%})")
    # Katib, which tunes hyper-parameters, looks for lines of this form.
    logging.info(f"loss={loss:.4f}")
    logging.info(f"accuracy={accuracy:.4f}")
    metrics = {"epoch": trainer.epoch, "train_loss": loss_sum / trainer.samples_seen, "test_loss": loss}
    metrics |= {"accuracy": accuracy, "learning_rate": trainer.scheduler.get_last_lr()[0]}
    metrics |= {"seconds": trainer.seconds, "samples_per_second": trainer.samples_seen / trainer.seconds}
    trainer.history.append(metrics)
    trainer.scheduler.step()
    trainer.begin(trainer.epoch + 1)
    save(trainer, folder)


def give_up(record):
    """End the program where its log cannot be written: to a closed pipe, for example, or a full disk."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would try once more in the end
    raise


def claimed(folder):
    """Make the output folder, and return a context in which other runs are kept out of it. Raises OSError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return FileLock(Path(folder, ".lock"), timeout=0, mode=0o666).acquire()  # for all who may write here
    except Timeout as error:
        # Where a file system has no locks, the file itself is one, and tells its process and host.
        who = " on ".join(Path(folder, ".lock").read_text().split()[:2]) or "unknown"
        raise OSError(
            f"another run writes to {folder}. If it is gone ({who}), delete {folder}/.lock"
        ) from error


def run(args, job):
    """Train and evaluate for all epochs, as one of the processes of `job`."""
    settle_in()
    device = choose_device(job.local_rank, not args.no_cuda)
    backend = args.backend or dist.get_default_backend_for_device(device)
    logging.info(
        f"Started {job.started}: rank {job.rank} of {job.world_size}, device {device}, "
        f"backend {backend if job.world_size > 1 else 'none'}, {torch.get_num_threads()} threads"
    )
    if job.local_rank == 0:
        find_sums(Path(args.data_dir, "MNIST", "raw"))  # which may download, before the processes meet
    # Gradients are added up on the GPUs, the few numbers in Job.sum on the CPUs.
    backends = f"cpu:gloo,{device.type}:{backend}" if backend in ("nccl", "xccl") else backend
    folder = None if args.dry_run else args.output_dir
    writes = folder and job.rank == 0
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
        if args.resume and folder:
            resume(trainer, folder)
        try:
            while trainer.epoch <= args.epochs:
                run_epoch(trainer, training_set, test_set, args, folder)
        except Stopped:
            save(trainer, folder)
            logging.info("Stopped by a signal. --resume goes on from the newest checkpoint")
            sys.exit(143)
        if args.save_model and writes:  # for machines without a GPU, too
            write(Path(folder, "mnist_model.pt"), trainer.model.cpu().state_dict())
        job.sum(0)  # a barrier: rank 0 must not leave before the others have finished


def main(argv=None):
    """Do what the command line `argv` says (default: the one this program was started with)."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    # Standard output, because notebooks paint standard error pink; force, because %run is repeated.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    logging.getLogger().handlers[0].handleError = give_up
    try:
        if (code := launch(args.num_processes, argv)) is not None:
            sys.exit(code)
        job = Job.from_environment()
        logging.disable(logging.INFO if job.rank > 0 else logging.NOTSET)
        run(args, job)
    except (ArithmeticError, OSError, ValueError) as error:
        sys.exit(f"mnist.py: {error}")
    except KeyboardInterrupt:
        sys.exit("mnist.py: interrupted before the training began")
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate" not in str(error):
            raise
        sys.exit(f"mnist.py: memory does not suffice, try a smaller --batch-size ({error})")


if __name__ == "__main__":
    main()
