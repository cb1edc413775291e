"""Train a small convolutional network on MNIST: alone, in several processes, or on a cluster.

    python mnist.py --epochs 5                          alone
    python mnist.py --num-processes 2                   two processes of this machine
    torchrun --standalone --nproc-per-node 2 mnist.py   the same, started by torchrun
    python mnist.py                                     in a pod of a PyTorchJob, whose operator
                                                        sets MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE

Exit codes: 0 done; 1 failed (one line says why); 2 wrong usage; 143 stopped by SIGTERM, or by Ctrl-C
once the data is unpacked. If training has begun, a checkpoint is saved first, and --resume goes on from it.
"""

import argparse
import ctypes
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path


def leave(*_):
    """End at once: a signal asks for it, and there is nothing to save."""
    print("mnist.py: stopped by a signal, with nothing to save", flush=True)
    os._exit(143)


if __name__ == "__main__":
    # Loading PyTorch takes seconds, and meanwhile the first process of a container would be deaf
    # to the signal with which Kubernetes takes a pod away.
    signal.signal(signal.SIGTERM, leave)

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import torch.optim as optim
from filelock import FileLock, Timeout
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import download_and_extract_archive

# Mean and standard deviation of all training pixels, on a scale from 0 (paper) to 1 (ink).
MEAN, STD = 0.1307, 0.3081

# SHA-256 of the unpacked files. Training on damaged data raises no error, it only learns worse.
SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# What a checkpoint holds: states, how far the training has come, and the flags that must stay the same.
PARTS = ("model", "learner", "optimizer", "scheduler")
PROGRESS = ("epoch", "samples_seen", "loss_sum", "seconds", "history")
HYPERPARAMETERS = (
    "batch_size", "optimizer", "lr", "gamma", "momentum", "label_smoothing", "augment", "bf16", "seed",
)  # fmt: skip


# --- The model ----------------------------------------------------------------------------------


class Net(nn.Module):
    """Two convolutions and two linear layers: 1,199,882 parameters.

    They have the names and shapes of those in PyTorch's own MNIST example, so a state_dict of either fits
    the other; but this network normalises the images itself
    (https://github.com/pytorch/examples/tree/main/mnist).
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


def unpack_mnist(folder):
    """Unpack MNIST's four .gz files below `folder`; fetch those that are missing or damaged.

    They are unpacked elsewhere, then moved: a half-written one is never seen. Raises OSError.
    """
    raw = Path(folder, "MNIST", "raw")
    if all((raw / name).is_file() for name in SHA256):
        return
    raw.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=raw) as unpacked, redirect_stdout(io.StringIO()):
        for archive, md5 in datasets.MNIST.resources:
            url = datasets.MNIST.mirrors[0] + archive
            try:
                download_and_extract_archive(url, raw, unpacked, archive, md5)
            except (OSError, RuntimeError) as error:
                problem = f"{raw / archive} is missing or damaged, put a good copy there"
                raise OSError(f"{problem} ({url} was tried: {error})") from error
        for name in SHA256:
            os.replace(Path(unpacked, name), raw / name)


def load_mnist(folder, device="cpu"):
    """Read the unpacked MNIST below `folder`, all 55 MB of it, to `device`.

    Returns (images, labels) of the training set and (images, labels) of the test set:
    images uint8 [60000 or 10000, 28, 28], labels int64 [60000 or 10000].
    Raises ValueError with the name of a file that is not what it should be.
    """
    raw = Path(folder, "MNIST", "raw")
    for name, expected in SHA256.items():
        if hashlib.sha256((raw / name).read_bytes()).hexdigest() != expected:
            raise ValueError(f"{raw / name} is damaged: delete it to have it unpacked again from {name}.gz")
    images, labels, test_images, test_labels = (raw / name for name in SHA256)
    return (
        (read_image_file(images).to(device), read_label_file(labels).to(device)),
        (read_image_file(test_images).to(device), read_label_file(test_labels).to(device)),
    )


def epoch_order(samples, seed, epoch):
    """Return the order in which an epoch takes the samples, int64 [samples]; all processes agree.

    It follows from the seed and the epoch alone: hash() of whole numbers, unlike that of
    strings, is the same in every run.
    """
    return torch.randperm(samples, generator=torch.Generator().manual_seed(hash((seed, epoch))))


def epoch_distortions(samples, seed, epoch):
    """Return how an epoch turns, scales and moves each sample: float32 [samples, 2, 3].

    Each is an affine map from places in the new image to places in the old one, for F.affine_grid:
    by up to 10 degrees, 10 % and 2 pixels. Like the order, they follow from the seed and the epoch.
    """
    # The samples too, or these numbers would be those that the order was made of.
    generator = torch.Generator().manual_seed(hash((seed, epoch, samples)))
    amounts = 2 * torch.rand(4, samples, generator=generator) - 1  # from -1 to 1
    angle, scale = math.radians(10) * amounts[0], 1 + 0.1 * amounts[1]
    right, down = amounts[2:] * 2 / 14  # 2 of 28 pixels, on a scale that reaches from -1 to 1
    sine, cosine = scale * angle.sin(), scale * angle.cos()
    return torch.stack([cosine, -sine, right, sine, cosine, down], dim=1).view(samples, 2, 3)


def distort(images, distortions):
    """Return `images`, uint8 [N, 28, 28], as float32, changed by `distortions`, float32 [N, 2, 3].

    Places between pixels are interpolated; paper fills the gaps.
    """
    images = images.unsqueeze(1).float()
    places = F.affine_grid(distortions, images.shape, align_corners=False)
    return F.grid_sample(images, places, align_corners=False).squeeze(1)


# --- Training and evaluation --------------------------------------------------------------------


class Trainer:
    """A network that learns, its average, and how far they have come: this is what a checkpoint holds."""

    def __init__(self, args, job, device):
        self.args, self.job, self.device = args, job, device
        keep_freed_memory()
        torch.manual_seed(hash(args.seed))
        # One network learns. The other one, an average over its last steps, is tested and kept.
        self.learner, self.model = (Net().to(device, memory_format=torch.channels_last) for _ in range(2))
        if args.optimizer == "adadelta":
            self.optimizer = optim.Adadelta(self.learner.parameters(), lr=args.lr)
        else:
            self.optimizer = optim.SGD(
                self.learner.parameters(),
                lr=args.lr,
                momentum=args.momentum,
                nesterov=args.momentum > 0,  # each step already looks where momentum will lead it
                weight_decay=5e-4,  # draws every weight a little towards 0: only what pays stays large
            )
        self.scheduler = optim.lr_scheduler.StepLR(self.optimizer, step_size=1, gamma=args.gamma)
        self.history = []  # a dict for each finished epoch: the lines of metrics.jsonl
        self.begin(epoch=1)

    def begin(self, epoch):
        self.epoch = epoch
        self.samples_seen = 0  # in this epoch, by all processes together
        self.loss_sum = 0.0  # over those of them that this process has seen
        self.seconds = 0.0  # of training in this epoch

    def train(self, learner, images, labels):
        """Train for an epoch, or for what a resumed run has left of it. Returns the mean loss.

        Raises Stopped after a signal, FloatingPointError if the loss is no longer a finite number.
        """
        args, rank, world_size = self.args, self.job.rank, self.job.world_size
        order = epoch_order(len(images), args.seed, self.epoch).to(self.device)
        distortions = epoch_distortions(len(images), args.seed, self.epoch).to(self.device)
        batch_size = args.batch_size * world_size  # of all processes together
        clock = time.perf_counter() - self.seconds
        learner.train()
        for start in range(self.samples_seen, len(order), batch_size):
            self.job.stop_if_asked()
            batch = order[start : start + batch_size]
            share = batch[rank::world_size]
            # Dropout's random numbers depend on the position alone, so a resumed run repeats them.
            torch.manual_seed(hash((args.seed, self.epoch, start, rank)))
            digits = images[share]
            if args.augment and len(share):  # none may be left for this process in the last batch
                digits = distort(digits, distortions[share])
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=args.bf16):
                output = learner(digits)
            # With 0.1, the aim is 91 % for the right digit and 1 % for each other one: a network that
            # is pressed for 100 % learns its training images by heart. nll_loss, which suffices for a
            # network that returns log-probabilities, cannot do that; cross_entropy leaves them as they are.
            smoothing = args.label_smoothing
            loss = F.cross_entropy(output, labels[share], reduction="sum", label_smoothing=smoothing)
            # Gradients are averaged over the processes. Scaled like this, the average is the gradient
            # of the mean loss of the whole batch, even where the shares differ in length.
            (loss * world_size / len(batch)).backward()
            self.optimizer.step()
            step, steps = start // batch_size, math.ceil(len(order) / batch_size)
            self.average((self.epoch - 1) * steps + step)

            self.loss_sum += loss.detach()  # stays on the GPU: to read it at every step is to wait for it
            self.samples_seen += len(batch)
            self.seconds = time.perf_counter() - clock
            if step % args.log_interval == 0:
                value = self.finite(loss.item() / max(1, len(share)))
                logging.info(f"Epoch: {self.epoch} ({step / steps:6.1%}) - Loss: {value}")
            if args.checkpoint_interval and (step + 1) % args.checkpoint_interval == 0:
                self.save()
        total = self.total_loss()  # reads the losses, so that all steps are done when the clock stops
        self.seconds = time.perf_counter() - clock
        return total / len(order)

    @torch.no_grad()
    def average(self, steps):
        """Let the model follow the learner, of which `steps` steps were averaged before.

        Each step goes a little astray, for it has seen one batch only; in the average these errors cancel
        out. The 10 gives two thirds of the weight, 1 - 0.9 ** 10, to the last tenth of all steps; the first
        are soon forgotten (polynomial-decay averaging, https://proceedings.mlr.press/v28/shamir13.html).
        """
        for average, latest in zip(self.model.parameters(), self.learner.parameters(), strict=True):
            average.lerp_(latest, 10 / (10 + steps))

    def total_loss(self):
        """Return the sum of this epoch's losses so far, of all processes."""
        (total,) = self.job.sum(float(self.loss_sum))
        return self.finite(total)

    def finite(self, loss):
        """Return the loss, unless it shows that training has gone wrong."""
        if math.isfinite(loss):
            return loss
        batch = math.ceil(self.samples_seen / self.args.batch_size / self.job.world_size)
        where = f"epoch {self.epoch}, batch {batch}"
        raise FloatingPointError(f"{where}: the loss is {loss}; try an --lr below {self.args.lr}")

    def finish_epoch(self, train_loss, test_loss, accuracy):
        """Write down how the epoch went, lower the learning rate, and save."""
        metrics = {
            "epoch": self.epoch,
            "train_loss": train_loss,
            "test_loss": test_loss,
            "accuracy": accuracy,
            "learning_rate": self.scheduler.get_last_lr()[0],
            "seconds": self.seconds,
            "samples_per_second": self.samples_seen / self.seconds,
        }
        self.history.append(metrics)
        self.scheduler.step()
        self.begin(self.epoch + 1)
        self.save()

    def save(self):
        """Write metrics.jsonl, and checkpoint.pt, keeping the one before it. All call it, rank 0 writes."""
        loss_sum = self.total_loss()
        if self.job.rank > 0 or self.args.dry_run:
            return
        checkpoint = {name: getattr(self, name).state_dict() for name in PARTS}
        checkpoint["progress"] = {name: getattr(self, name) for name in PROGRESS} | {"loss_sum": loss_sum}
        checkpoint["hyperparameters"] = {name: getattr(self.args, name) for name in HYPERPARAMETERS}
        checkpoint["world_size"] = self.job.world_size
        folder = Path(self.args.output_dir)
        lines = "".join(json.dumps(metrics) + "\n" for metrics in self.history)
        write(folder / "metrics.jsonl", lines.encode())
        write(folder / "checkpoint.pt", serialize(checkpoint), keep=folder / "checkpoint.previous.pt")

    def resume(self):
        """Go on from the newest good checkpoint, if there is one: rank 0 reads it for all.

        Raises ValueError if it was made with other hyper-parameters.
        """
        folder = self.args.output_dir
        received = [load_checkpoint(folder) if self.job.rank == 0 else None]
        if self.job.world_size > 1:
            dist.broadcast_object_list(received)
        (checkpoint,) = received
        if checkpoint is None:
            logging.info(f"No checkpoint in {folder} yet: starting afresh")
            return
        for name, then in checkpoint["hyperparameters"].items():
            if then != (now := getattr(self.args, name)):
                raise ValueError(f"the checkpoint in {folder} has {name} {then}, but this run has {now}")
        try:
            for name in PARTS:
                getattr(self, name).load_state_dict(checkpoint[name])
        except (KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"the checkpoint in {folder} does not fit this model: {reason}") from error
        vars(self).update(checkpoint["progress"])
        if self.job.rank > 0:
            self.loss_sum = 0.0  # rank 0 has that of all
        logging.info(f"Resuming in epoch {self.epoch} after {self.samples_seen} samples")
        if (then := checkpoint["world_size"]) != (now := self.job.world_size):
            size = self.args.batch_size
            logging.info(
                f"{then} process(es) before, {now} now: the order of the samples stays the same, but a step "
                f"now takes {size * now} of them instead of {size * then}, so the result will differ"
            )


@torch.inference_mode()
def test(model, images, labels, batch_size, job):
    """Return the mean loss and the number of right answers on `images`, uint8 [N, 28, 28].

    Each process takes a share and the sums are added up. No sample is taken twice to even out the
    shares, so the result is that of a single process. Raises Stopped after a signal.
    """
    loss, correct = 0.0, 0
    model.eval()
    for start in range(0, len(images), batch_size * job.world_size):
        job.stop_if_asked()
        share = slice(start + job.rank, start + batch_size * job.world_size, job.world_size)
        output = model(images[share])
        loss += F.nll_loss(output, labels[share], reduction="sum").item()
        correct += (output.argmax(dim=1) == labels[share]).sum().item()
    loss, correct = job.sum(loss, correct)
    return loss / len(images), int(correct)


# --- Files --------------------------------------------------------------------------------------


def serialize(state):
    """Return `state`, tensors and numbers, as the bytes of a file that torch.load reads."""
    torch.save(state, buffer := io.BytesIO())
    return buffer.getvalue()


def write(path, contents, keep=None):
    """Write bytes to `path` such that nobody sees a half-written file; the old one moves to `keep`.

    Raises OSError, and then the old one is still there, or at `keep`.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def load_checkpoint(folder):
    """Return the newest good checkpoint in `folder`, or None where there is none at all.

    A damaged one is named and passed over. Raises ValueError if no good one is left.
    """
    paths = [Path(folder, name) for name in ("checkpoint.pt", "checkpoint.previous.pt")]
    found = [path for path in paths if path.exists()]
    for path in found:
        try:
            # torch.load does not look at the archive's check sums, zipfile does. And with
            # weights_only it runs no code that somebody may have put into the file.
            if damaged := zipfile.ZipFile(path).testzip():
                raise ValueError(f"wrong check sum of {damaged}")
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            for part, names in (("progress", PROGRESS), ("hyperparameters", HYPERPARAMETERS)):
                if checkpoint.get(part, {}).keys() != set(names):
                    raise ValueError("it is another program's, or another version's")
        except Exception as error:
            logging.warning(f"{path} is not a good checkpoint ({first_line(error)}): passed over")
            continue
        if path != found[0]:  # or the next save would move it over the good one
            os.replace(found[0], found[0].with_suffix(".damaged"))
        return checkpoint
    if found:
        raise ValueError(f"no good checkpoint is left in {folder}: start afresh, without --resume")
    return None


def claimed(folder):
    """Make the output folder; while the returned context lasts, other runs are kept out of it."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        return FileLock(Path(folder, ".lock"), timeout=0).acquire()
    except Timeout as error:
        raise OSError(f"another run writes to {folder}: choose another --output-dir") from error
    except OSError as error:
        raise OSError(f"cannot write to {folder}: {error.strerror}") from error


def first_line(error):
    """Return the first line of what an exception says: torch appends C++ stacks."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# --- The processes ------------------------------------------------------------------------------


class Stopped(Exception):
    """All processes have agreed to stop, between two steps."""


@dataclass
class Job:
    """The place of this process among those that train together, in torchrun's words.

    Its rank is its number among all `world_size` processes, its local rank that on this machine; from 0.
    """

    started: str = "alone"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    asked_to_stop: bool = False
    question: tuple | None = None  # the last sum that says who was asked to stop, and its arrival

    @classmethod
    def from_environment(cls):
        """Read what torchrun, or the operator of a PyTorchJob, has set.

        Raises ValueError where processes that belong together would never meet.
        """
        env = os.environ
        if "LOCAL_RANK" in env:
            return cls("by torchrun", *(int(env[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
        several_a_pod = env.get("PET_NPROC_PER_NODE", "auto") not in ("auto", "1")
        if several_a_pod or (env.get("PET_NNODES", "1") != "1" and "WORLD_SIZE" not in env):
            raise ValueError("PET_… is set for torchrun: start `torchrun mnist.py`, not `python mnist.py`")
        if "WORLD_SIZE" not in env and "RANK" not in env:
            return cls()
        names = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in names if name not in env]:
            raise ValueError(
                f"{', '.join(missing)} must be set beside RANK or WORLD_SIZE: set all four or none"
            )
        return cls("in a pod of a PyTorchJob", int(env["RANK"]), int(env["WORLD_SIZE"]))

    @contextmanager
    def connected(self, backend, timeout):
        """Connect the processes, and from then on take note of SIGTERM and Ctrl-C.

        What all must do together may take `timeout` seconds, and meeting ten times that, for pods start
        minutes apart while images are pulled. Raises ConnectionError with the address of the meeting.
        """
        where = f"rank {self.rank} of {self.world_size}"
        # Kubernetes sends SIGTERM before it takes a pod away, and SIGKILL 30 seconds later.
        handlers = {name: signal.signal(name, leave) for name in (signal.SIGTERM, signal.SIGINT)}
        try:
            if self.world_size > 1:
                where += f" (meeting at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']})"
                with ThreadPoolExecutor() as pool:  # so that a signal is heard while we wait
                    pool.submit(self.meet, backend, timedelta(seconds=timeout)).result()
            for name in handlers:
                signal.signal(name, self.ask_to_stop)
            yield
        except RuntimeError as error:
            if self.world_size == 1:
                raise
            if dist.is_initialized():
                dist.group.WORLD.abort()  # nccl would wait for the lost one before it lets go
            raise ConnectionError(f"{where} failed, or lost another: {first_line(error)}") from error
        finally:
            for name, handler in handlers.items():
                signal.signal(name, handler)
            if dist.is_initialized():
                dist.destroy_process_group()

    def meet(self, backend, limit):
        store, rank, size = next(dist.rendezvous("env://", timeout=10 * limit))
        # By itself only rank 0 waits so long for all: the others would go on, and give up after `limit`.
        store.set(f"here/{rank}", "")
        store.wait([f"here/{other}" for other in range(size)])
        store.set_timeout(limit)
        dist.init_process_group(backend, timeout=limit, store=store, rank=rank, world_size=size)

    def distribute(self, model, images):
        """Return the model such that its gradients are averaged over all processes."""
        if self.world_size == 1:
            return model
        shared = nn.parallel.DistributedDataParallel(model)
        # The first backward pass settles the order in which gradients are added up. Its gradients are
        # thrown away, or a resumed run would add in another order than the one that it resumes.
        shared(images).sum().backward()
        return shared

    def sum(self, *numbers):
        """Add up each number over all processes. All must call this, and all get the sums."""
        if self.world_size == 1:
            return numbers
        totals = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(totals)
        return totals.tolist()

    def ask_to_stop(self, *_):
        self.asked_to_stop = True

    def stop_if_asked(self):
        """Raise Stopped in all processes at once if any of them was asked to stop.

        The sum that says so travels while a step computes, and is read before the next one: nobody waits.
        """
        asked = torch.tensor(float(self.asked_to_stop))
        if self.world_size > 1:
            question = asked, dist.all_reduce(asked, async_op=True)
            # The one before is answered by now. The first has none before it, and waits for its own answer.
            (asked, arrival), self.question = self.question or question, question
            arrival.wait()
        if asked:
            raise Stopped


def launch(processes, argv):
    """Start this file again as `processes` processes of this machine. Returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    logging.disable()  # torchrun would add a page to the one line of a process that failed
    try:
        # A machine's own name may be unknown to it, in a container for example: localhost never is.
        torchrun(["--standalone", "--local-addr=localhost", f"--nproc-per-node={processes}", __file__, *argv])
    except SignalException:
        return 143
    except ChildFailedError as error:
        return max(1, error.get_first_failure()[1].exitcode)
    finally:
        logging.disable(logging.NOTSET)
    return 0


def choose_device(local_rank, accelerate=True):
    """Return this process's own accelerator (CUDA, MPS, XPU), or the CPU where there is none."""
    if not accelerate or not torch.accelerator.is_available():
        return torch.device("cpu")
    if local_rank >= torch.accelerator.device_count():
        raise ValueError(f"no accelerator is left for process {local_rank}: start fewer, or use --no-cuda")
    torch.accelerator.set_device_index(local_rank)
    return torch.device(torch.accelerator.current_accelerator().type, local_rank)


def keep_freed_memory():
    """Keep, from now on, the memory that a step frees for the next one, where the C library is glibc.

    It would give it back to the system after each step, and get it again page by page: a tenth of a step's
    time on a CPU (https://man7.org/linux/man-pages/man3/mallopt.3.html).
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: large pieces are not to be fetched and returned one by one
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor is the unused end of the heap to be returned


# --- The command line ---------------------------------------------------------------------------


def number(kind, is_valid, meaning):
    """Return an argparse type for an int or float (`kind`) of which `is_valid` holds."""

    def parse(text):
        with suppress(ValueError):
            if is_valid(kind(text)):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not {meaning}")

    return parse


def parse_arguments(argv):
    """Return the flags' values; a mistake ends the program with one sentence and exit code 2."""
    count = number(int, lambda n: n >= 1, "a whole number of 1 or more")
    from_zero = number(int, lambda n: n >= 0, "a whole number of 0 or more")
    integer = number(int, lambda n: True, "a whole number")
    seconds = number(int, lambda n: 1 <= n <= 86400, "a whole number from 1 to 86400")
    rate = number(float, lambda x: 0 < x < 1e38, "a number above 0 and below 1e38")
    factor = number(float, lambda x: 0 < x <= 1, "a number above 0 and at most 1")
    fraction = number(float, lambda x: 0 <= x < 1, "a number from 0 to less than 1")

    parser = argparse.ArgumentParser("mnist.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--epochs", metavar="N", type=count, default=5, help="passes over the training set (default: 5)")
    add("--batch-size", metavar="N", type=count, default=64, help="per process and step (default: 64)")
    add("--test-batch-size", metavar="N", type=count, default=1000, help="in evaluation (default: 1000)")
    add("--optimizer", choices=("adadelta", "sgd"), default="sgd", help="default: sgd")
    add("--lr", metavar="LR", type=rate, help="learning rate (default: 0.07 for sgd, 1.0 for adadelta)")
    add("--gamma", metavar="M", type=factor, default=0.75, help="factor of lr per epoch (default: 0.75)")
    add("--momentum", metavar="M", type=fraction, default=0.9, help="momentum of sgd (default: 0.9)")
    add("--label-smoothing", metavar="X", type=fraction, default=0.1, help="0: aim at 100 %% (default: 0.1)")
    add("--no-augment", dest="augment", action="store_false", help="do not turn, scale and move digits")
    add("--bf16", action="store_true", help="multiply in bfloat16 in training: faster on some processors")
    add("--seed", metavar="S", type=integer, default=1, help="of all random numbers (default: 1)")
    add("--log-interval", metavar="N", type=count, default=10, help="batches per log line (default: 10)")
    add("--no-cuda", "--no-accel", action="store_true", help="use the CPU even where there is a GPU")
    add("--backend", choices=("gloo", "nccl", "mpi"), help="default: nccl on CUDA, else gloo")
    add("--num-processes", metavar="N", type=count, default=1, help="on this machine (default: 1)")
    add("--data-dir", metavar="DIR", default="datasets", help="where MNIST is (default: datasets)")
    add("--output-dir", metavar="DIR", default="output", help="where results go (default: output)")
    add("--resume", action="store_true", help="go on from the newest checkpoint, if there is one")
    add("--checkpoint-interval", metavar="N", type=from_zero, default=0, help="also save every N steps")
    add("--timeout", metavar="S", type=seconds, default=60, help="seconds to wait for others (default: 60)")
    add("--save-model", action="store_true", help="write mnist_model.pt, a state_dict")
    add("--dry-run", action="store_true", help="one batch of training, one of evaluation, no files")
    args = parser.parse_args(argv)
    if args.lr is None:
        args.lr = 1.0 if args.optimizer == "adadelta" else 0.07
    return args


def run(args, job):
    """Train and evaluate for all epochs, as one of the processes of `job`."""
    device = choose_device(job.local_rank, not args.no_cuda)
    if device.type == "cuda":  # or a resumed run would differ in its last digits
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # takes time, and nothing here reads it
    backend = args.backend or ("nccl" if device.type == "cuda" else "gloo")
    logging.info(
        f"Started {job.started}: rank {job.rank} of {job.world_size}, device {device}, "
        f"backend {backend if job.world_size > 1 else 'none'}, {torch.get_num_threads()} threads"
    )
    writes = job.rank == 0 and not args.dry_run
    if job.local_rank == 0:
        unpack_mnist(args.data_dir)  # before the processes meet: then it is there for all
    with (
        # nccl adds up gradients on the GPUs. The numbers in Job.sum are on the CPU, and gloo adds those up.
        job.connected("cpu:gloo,cuda:nccl" if backend == "nccl" else backend, args.timeout),
        claimed(args.output_dir) if writes else nullcontext(),
    ):
        if job.world_size > 1:
            logging.info(f"Using distributed PyTorch with {backend} backend")
        training_set, test_set = load_mnist(args.data_dir, device)
        batch_size = args.batch_size * job.world_size
        if batch_size > (images := len(training_set[0])):
            raise ValueError(f"--batch-size is too large: {batch_size} in all processes, of {images} images")
        if args.dry_run:
            args.epochs = 1
            training_set = [tensor[:batch_size] for tensor in training_set]
            test_set = [tensor[: args.test_batch_size] for tensor in test_set]

        trainer = Trainer(args, job, device)
        if args.resume and not args.dry_run:
            trainer.resume()
        learner = job.distribute(trainer.learner, training_set[0][:1])
        try:
            while trainer.epoch <= args.epochs:
                train_loss = trainer.train(learner, *training_set)
                loss, correct = test(trainer.model, *test_set, args.test_batch_size, job)
                loss, accuracy = trainer.finite(loss), correct / len(test_set[0])
                logging.info(f"Test accuracy: {correct}/{len(test_set[0])} ({accuracy:6.1%})")
                # Katib, which tunes hyper-parameters, looks for lines of this form.
                logging.info(f"loss={loss:.4f}")
                logging.info(f"accuracy={accuracy:.4f}")
                trainer.finish_epoch(train_loss, loss, accuracy)
        except Stopped:
            trainer.save()
            logging.info("Stopped by a signal. --resume goes on from the newest checkpoint")
            sys.exit(143)
        if args.save_model and writes:
            weights = trainer.model.cpu().state_dict()  # to be read where there is no GPU, too
            write(Path(args.output_dir, "mnist_model.pt"), serialize(weights))
        job.sum(0)  # a barrier: rank 0 must not leave before the others have finished


def main(argv=None):
    """Do what the command line `argv` says (default: the one this program was started with)."""
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    # Standard output, because notebooks paint standard error pink; force, because %run is repeated.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout, force=True)
    try:
        job = Job.from_environment()
        if args.num_processes > 1 and job.started == "alone":
            sys.exit(launch(args.num_processes, argv))
        if args.num_processes > 1 and job.started != "by torchrun":
            raise ValueError("--num-processes is for one machine: in a pod, start `torchrun mnist.py`")
        if job.rank > 0:
            logging.disable(logging.INFO)
        run(args, job)
    except (ArithmeticError, OSError, ValueError, torch.OutOfMemoryError) as error:
        sys.exit(f"mnist.py: {error}")


if __name__ == "__main__":
    try:
        main()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # after %run, a notebook lives on
