"""What steps, figures and saves are made of, on a few digits in this process: here a wrong number is noticed.

`make mutants` changes mnist.py in hundreds of places, to see whether these tests notice (docs/mutants.md).
"""

import errno
import json
import math
import os
import re
import shutil
import time
from contextlib import nullcontext
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import mnist

SAMPLES, TEST_SET = 50, (torch.arange(7 * 784).view(7, 28, 28).to(torch.uint8), torch.arange(7))
# A whole epoch in a step, and all other hyper-parameters that a training may not change when it is resumed.
CHANGED = {"batch_size": SAMPLES, "optimizer": "adadelta", "lr": 0.5, "gamma": 0.6, "momentum": 0.6}
CHANGED |= {"label_smoothing": 0.2, "augment": False, "seed": 2}


@pytest.fixture(scope="module")
def digits():
    """Images of noise, which can be learned by heart."""
    images = torch.randint(256, (SAMPLES, 28, 28), generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8), torch.arange(SAMPLES) % 10


class Place(mnist.Job):
    """A place among several processes, without the others: nothing is averaged, and sums are its own."""

    def all_reduce(self, *numbers):
        return list(numbers)

    def distribute(self, model):
        assert self.world_size > 1, "alone, nothing is averaged"
        return model


def new_trainer(rank=0, world_size=1, **settings):
    settings = {"batch_size": 20, **settings}
    return mnist.Trainer(mnist.Hyperparameters(**settings), Place("", rank, world_size))


def settings_for(folder=None, **changes):
    """Return what the command line gives, for short trainings."""
    flags = ["--batch-size", "20", "--log-interval", "1", "--no-cuda", "--output-dir", str(folder)]
    args = mnist.parse_arguments(flags)
    vars(args).update({"bf16": False, "epochs": 1} | changes)
    return args


def distance(one, other):
    return math.sqrt(sum((a - b).square().sum().item() for a, b in zip(one, other, strict=True)))


# --- A step -------------------------------------------------------------------------------------


def by_hand(h, images, labels, rank=0, world_size=1):
    """Take the steps of two epochs with nothing but gradients. Yields loss, weights and their average."""
    torch.manual_seed(mnist.random_seed("weights", h.seed))
    model = mnist.Net()
    weights, steps = list(model.parameters()), 0
    averages = [weight.detach().clone() for weight in weights]
    velocities = [torch.zeros_like(weight) for weight in weights]
    for epoch in (1, 2):
        order = mnist.epoch_order(len(images), h.seed, epoch)
        distortions = mnist.epoch_distortions(len(images), h.seed, epoch)
        for start in range(0, len(images), h.batch_size * world_size):
            batch = order[start : start + h.batch_size * world_size]
            share = [int(sample) for place, sample in enumerate(batch) if place % world_size == rank]
            pictures = images[share].float()
            if h.augment and share:
                pictures = mnist.distort(images[share], distortions[share])
            torch.manual_seed(mnist.random_seed("dropout", h.seed, epoch, start, rank))
            aims = h.label_smoothing / 10 + (1 - h.label_smoothing) * F.one_hot(labels[share], 10)
            loss = -(aims * model(pictures)).sum()
            gradients = torch.autograd.grad(loss * world_size / len(batch), weights)
            length = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
            with torch.no_grad():
                every = zip(weights, averages, velocities, gradients, strict=True)
                for weight, average, velocity, gradient in every:
                    gradient = gradient * min(1, 2 / max(length, 1e-9)) + 0.0005 * weight
                    velocity.mul_(h.momentum).add_(gradient)
                    weight -= h.lr * h.gamma ** (epoch - 1) * (gradient + h.momentum * velocity)
                    average += (weight - average) * 10 / (10 + steps)
            steps += 1
            yield loss.item() / max(1, len(share)), weights, averages


@pytest.mark.parametrize(
    "rank, world_size, settings",
    [
        (0, 1, {}),
        (0, 1, {"lr": 0.02, "gamma": 0.3, "momentum": 0.5, "label_smoothing": 0.0, "seed": -3}),
        (0, 1, {"batch_size": 7, "momentum": 0.0, "augment": False}),
        (0, 3, {"batch_size": 8}),
        (1, 3, {"batch_size": 8}),
        (2, 3, {"batch_size": 8}),  # its share of the last batch is empty
    ],
)
def test_each_step_is_the_one_that_the_hyperparameters_ask_for(digits, rank, world_size, settings):
    trainer = new_trainer(rank, world_size, **settings)
    expected = by_hand(trainer.hyperparameters, *digits, rank, world_size)
    for epoch in (1, 2):
        before = [weight.detach().clone() for weight in trainer.model.parameters()]
        for loss in trainer.train(*digits):
            expected_loss, weights, averages = next(expected)
            assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
            # Rounding gives 1e-5 of a step, and a ReLU that it switches 1e-4.
            length = distance(weights, before)
            assert distance(trainer.model.parameters(), weights) < 1e-3 * length
            assert distance(trainer.averaged_model.parameters(), averages) < 1e-3 * length
            for weight, its_weight, was in zip(weights, trainer.model.parameters(), before, strict=True):
                was.copy_(weight.data.copy_(its_weight.data))
        assert trainer.samples_seen == SAMPLES and trainer.epoch == epoch
        trainer.next_epoch()
        mnist.test(trainer.model, *TEST_SET)  # which changes nothing
    assert next(expected, None) is None, "steps are missing"


def test_no_two_choices_are_made_with_the_same_random_numbers(digits, monkeypatch):
    drawn, seed = [], mnist.random_seed
    monkeypatch.setattr(mnist, "random_seed", lambda *purpose: drawn.append(purpose) or seed(*purpose))
    list(new_trainer().train(*digits))
    assert len(set(drawn)) == len(drawn) > 3


def test_shares_are_disjoint_and_cover_the_set():
    """In an epoch whose last batch cannot be shared evenly."""
    shares = []
    for rank in range(3):
        trainer = new_trainer(rank, 3, batch_size=99, augment=False)
        trainer.step = lambda digits, labels, scale: shares.append(labels.tolist()) or torch.zeros(())
        list(trainer.train(torch.zeros(1000, 28, 28, dtype=torch.uint8), torch.arange(1000)))
    assert sorted(chain(*shares)) == list(range(1000))
    assert [len(share) for share in shares] == [99, 99, 99, 37, 99, 99, 99, 36, 99, 99, 99, 36]


@pytest.mark.parametrize("batch_size, world_size", [(7, 1), (1000, 1), (4, 2), (4, 3), (4, 7)])
def test_evaluation_gives_the_figures_of_all_images_at_once(digits, batch_size, world_size):
    model = mnist.Net()
    places = [Place("", rank, world_size) for rank in range(world_size)]
    losses, correct = zip(*(mnist.test(model, *digits, batch_size, place) for place in places), strict=True)
    answers = model.eval()(digits[0])
    assert sum(losses) == pytest.approx(F.nll_loss(answers, digits[1]).item(), rel=1e-4)
    assert sum(correct) == (answers.argmax(dim=1) == digits[1]).sum()


def test_the_model_answers_in_float32_also_where_it_multiplies_in_bfloat16(digits):
    with torch.autocast("cpu", torch.bfloat16):
        answers = mnist.Net()(digits[0])
    assert answers.dtype == torch.float32
    torch.testing.assert_close(answers.exp().sum(dim=1), torch.ones(SAMPLES))


@pytest.mark.parametrize("where", ["training", "evaluation"])
def test_who_is_asked_to_stop_does_so_before_the_next_batch(digits, where):
    job = mnist.Job()
    trainer, batches = mnist.Trainer(mnist.Hyperparameters(batch_size=20), job), []
    trainer.model.register_forward_hook(lambda *_: batches.append(1) or setattr(job, "asked_to_stop", True))
    with pytest.raises(mnist.Stopped):
        list(trainer.train(*digits) if where == "training" else mnist.test(trainer.model, *TEST_SET, 3, job))
    assert len(batches) == 1


# --- An epoch -----------------------------------------------------------------------------------


def test_the_metrics_are_those_of_the_steps_and_of_the_test(digits, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer, twin = new_trainer(), new_trainer()
    for epoch, rate in ((1, 0.1), (2, 0.075)):
        caplog.clear()
        mnist.run_epoch(trainer, digits, TEST_SET, settings_for(tmp_path), tmp_path)
        losses = [loss.item() for loss in twin.train(*digits)]
        twin.next_epoch()
        test_loss, correct = mnist.test(twin.averaged_model, *TEST_SET)
        seen = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        train_loss = (20 * losses[0] + 20 * losses[1] + 10 * losses[2]) / 50
        seconds = seen.pop("seconds")
        assert seconds > 0 and seen.pop("samples_per_second") == pytest.approx(SAMPLES / seconds)
        figures = {"train_loss": train_loss, "test_loss": test_loss, "accuracy": correct / 7}
        assert seen == pytest.approx({"epoch": epoch, "learning_rate": rate} | figures)
        steps = zip(("  0.0%", " 33.3%", " 66.7%"), losses, strict=True)
        lines = [f"Epoch: {epoch} ({share}) - Loss: {loss}" for share, loss in steps]
        lines += [f"Test accuracy: {correct}/7 ({correct / 7:6.1%})"]
        assert caplog.messages == [*lines, f"loss={test_loss:.4f}", f"accuracy={correct / 7:.4f}"]


def test_a_resumed_epoch_goes_on_in_its_clock_its_log_and_its_saves(digits, tmp_path, monkeypatch, caplog):
    """The clock is looked at once before the first step, once after each of the five, and once at the end."""
    caplog.set_level("INFO")
    seconds = count(1)
    monkeypatch.setattr(mnist, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    args = settings_for(tmp_path, batch_size=10, checkpoint_interval=3, log_interval=2)
    trainer, resumed = (new_trainer(batch_size=10) for _ in range(2))
    mnist.run_epoch(trainer, digits, TEST_SET, args, tmp_path)
    shown = ["Epoch: 1 (  0.0%)", "Epoch: 1 ( 40.0%)", "Epoch: 1 ( 80.0%)"]
    assert [line[:17] for line in caplog.messages[:3]] == shown
    mnist.resume(resumed, mnist.read_checkpoint(tmp_path / "checkpoint.previous.pt"))
    assert (resumed.samples_seen, resumed.seconds) == (30, 3)
    caplog.clear()
    mnist.run_epoch(resumed, digits, TEST_SET, args, tmp_path)
    assert caplog.messages[0].startswith("Epoch: 1 ( 80.0%)")
    assert trainer.history[0]["seconds"] == resumed.history[0]["seconds"] == 6
    assert resumed.seconds == 0, "the next epoch has a clock of its own"


def test_three_processes_that_resume_have_the_loss_of_two_between_them(digits, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer = new_trainer()
    next(trainer.train(*digits))
    trainer.job.world_size, trainer.job.all_reduce = 2, lambda loss: [loss + 5]  # that of the other one
    mnist.save(trainer, tmp_path)
    parts = [new_trainer(rank, 3) for rank in range(3)]
    for part in parts:
        mnist.resume(part, mnist.load_checkpoint(tmp_path))
    assert sum(float(part.loss_sum) for part in parts) == float(trainer.loss_sum) + 5
    assert caplog.messages[-1].startswith("2 process(es) before, 3 now: ")


def test_a_loss_that_is_no_number_is_not_saved(digits, tmp_path, monkeypatch):
    said = pytest.raises(FloatingPointError, match="in epoch 1, the loss is nan: try a smaller --lr")
    trainer = new_trainer()
    trainer.loss_sum = math.nan
    with said:
        mnist.save(trainer, tmp_path)
    monkeypatch.setattr(mnist, "test", lambda *_: (math.nan, 0))
    with said:
        mnist.run_epoch(new_trainer(), digits, TEST_SET, settings_for(tmp_path), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stopped", [False, True])
def test_nobody_leaves_before_all_is_written(digits, tmp_path, monkeypatch, caplog, stopped):
    class Watched(Place):
        def all_reduce(self, *numbers):
            there_at_meetings.append({path.name for path in tmp_path.iterdir()})
            return list(numbers)

        def stop_if_asked(self):
            if stopped and len(there_at_meetings) > 1:
                raise mnist.Stopped

        def distribute(self, model):
            there_at_meetings.append("distributed")
            return model

    there_at_meetings = []
    caplog.set_level("INFO")
    monkeypatch.setattr(mnist, "load_mnist", lambda *_: (digits, TEST_SET))
    args = settings_for(tmp_path, save_model=True)
    with pytest.raises(SystemExit) if stopped else nullcontext() as end:
        mnist.train(args, Watched("", 0, 2), torch.device("cpu"), tmp_path, None)
    written = {"checkpoint.pt", "metrics.jsonl"} | ({"mnist_model.pt"} if not stopped else set())
    assert there_at_meetings[-1] == written and there_at_meetings[0] == "distributed"
    if stopped:
        assert end.value.code == 143
        assert caplog.messages[-1] == "Stopped by a signal. --resume goes on from the newest checkpoint"


def test_each_flag_of_a_training_does_what_it_says(digits, tmp_path, monkeypatch, caplog):
    def train(folder, rank=0, world_size=1, checkpoint=None, **flags):
        caplog.clear()
        args = settings_for(tmp_path, **flags)
        place = Place("", rank, world_size)
        mnist.train(args, place, torch.device("cpu"), folder and tmp_path, checkpoint)
        return [message for message in caplog.messages if not message.startswith(("loss=", "accuracy="))]

    def load_mnist(folder, device):
        assert (folder, device) == ("datasets", torch.device("cpu"))
        return digits, TEST_SET

    caplog.set_level("INFO")
    monkeypatch.setattr(mnist, "load_mnist", load_mnist)
    (step, accuracy) = train(None, 0, 2, dry_run=True, epochs=9, save_model=True, test_batch_size=3)
    assert step.startswith("Epoch: 1 (  0.0%)") and re.fullmatch(r"Test accuracy: [0-3]/3 .*", accuracy)
    train("folder", 1, 2, save_model=True)
    assert not list(tmp_path.iterdir()), "only the first process writes"
    first, *_ = train("folder", resume=True)
    assert first == f"No checkpoint in {tmp_path} yet: starting afresh"
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", "metrics.jsonl"}
    checkpoint = mnist.load_checkpoint(tmp_path)
    first, *_ = train("folder", checkpoint=checkpoint, resume=True, epochs=2, save_model=True)
    assert first == "Resuming in epoch 2 after 0 samples"
    resumed = mnist.load_checkpoint(tmp_path)
    kept = resumed["averaged_model"]
    model = torch.load(tmp_path / "mnist_model.pt", weights_only=True)
    assert model.keys() == kept.keys() and all(torch.equal(model[name], kept[name]) for name in kept)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert train("folder", epochs=2)[0].startswith("Epoch: 1 "), "without --resume, it starts afresh"
    in_one_go = mnist.load_checkpoint(tmp_path)
    assert all(torch.equal(in_one_go["averaged_model"][name], kept[name]) for name in kept)
    for one, other in zip(*(each["progress"]["history"] for each in (resumed, in_one_go)), strict=True):
        assert {name for name in one if one[name] != other[name]} <= {"seconds", "samples_per_second"}
    with pytest.raises(ValueError, match="--batch-size is too large: 60 in all processes, of 50 images"):
        train("folder", 0, 3)
    train("folder", **CHANGED)
    assert mnist.load_checkpoint(tmp_path)["hyperparameters"] == CHANGED | {"bf16": False}


# --- A save -------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names[1].name) or replace(*names))
    mnist.write(tmp_path / "file", b"five!")
    mnist.write(tmp_path / "file", b"three", keep=tmp_path / "before")
    assert done == [5, "file", 5, "before", "file"]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EIO, errno.ENOSPC])
def test_only_a_file_system_that_has_no_fsync_is_written_to_without_it(tmp_path, monkeypatch, number):
    def fail(_):
        raise OSError(number, os.strerror(number))

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "fsync", fail)
    there_is_none = number not in (errno.EIO, errno.ENOSPC)
    said = pytest.raises(OSError, match=f"^cannot write {tmp_path}/file: {os.strerror(number)}$")
    with nullcontext() if there_is_none else said:
        mnist.write(tmp_path / "file", b"after")
    assert (tmp_path / "file").read_bytes() == (b"after" if there_is_none else b"before")
    assert len(list(tmp_path.iterdir())) == 1


def test_the_first_reason_why_nothing_is_written_is_told(tmp_path, monkeypatch):
    """Not that of the cleaning up, which then fails too."""

    def full(_):
        monkeypatch.setattr(Path, "unlink", lambda path: os.rmdir(path / "nowhere"))
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"cannot write .*file: {os.strerror(errno.EDQUOT)}$"):
        mnist.write(tmp_path / "file", b"after")


def test_a_checkpoint_never_knows_an_epoch_that_the_metrics_lack(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match=r"cannot write .*metrics\.jsonl"):
        mnist.save(new_trainer(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl"}


def test_no_save_replaces_the_good_checkpoint_by_a_damaged_one(tmp_path):
    for _ in range(2):
        mnist.save(new_trainer(), tmp_path)
    newest, previous = tmp_path / "checkpoint.pt", tmp_path / "checkpoint.previous.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    mnist.load_checkpoint(tmp_path)
    assert not newest.exists() and (tmp_path / "checkpoint.damaged").exists()
    mnist.save(new_trainer(), tmp_path)
    assert mnist.read_checkpoint(newest) and mnist.read_checkpoint(previous)


@pytest.fixture(scope="module")
def saved_once(digits, tmp_path_factory):
    """A folder with checkpoints of two steps and, before that, of one."""
    folder, trainer = tmp_path_factory.mktemp("saved"), new_trainer()
    for _, _ in zip(trainer.train(*digits), range(2), strict=False):
        mnist.save(trainer, folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path):
    return shutil.copytree(saved_once, tmp_path / "saved")


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(saved, caplog):
    newest, previous = saved / "checkpoint.pt", saved / "checkpoint.previous.pt"
    newest.write_bytes(b"?" * 999)
    assert mnist.load_checkpoint(saved)["progress"]["samples_seen"] == 20
    said = f"{newest} is not a good checkpoint (BadZipFile('File is not a zip file')): passed over"
    assert caplog.messages == [said]
    newest.with_suffix(".damaged").rename(newest)
    newest.unlink()
    newest.mkdir()
    assert mnist.load_checkpoint(saved) and newest.with_suffix(".damaged").is_dir()
    newest.touch()
    previous.write_bytes(b"")
    with pytest.raises(ValueError, match=f"no good checkpoint is left in {saved}: start afresh, without --r"):
        mnist.load_checkpoint(saved)
    assert newest.exists() and previous.exists()


class Trap:
    """What a pickle runs when it is loaded without care."""

    def __reduce__(self):
        return Path.touch, (Path("sprung"),)


OTHERS = "^it is another program's, or another version's$"


@pytest.mark.parametrize(
    "part, changes, reason",
    [
        ("world_size", None, OTHERS),
        ("model", None, OTHERS),
        ("progress", {"pace": 1}, OTHERS),
        ("hyperparameters", {"depth": 1}, OTHERS),
        ("progress", {"history": Trap()}, "Weights only load failed"),
    ],
)
def test_what_is_no_checkpoint_of_this_program_is_not_loaded(saved, monkeypatch, part, changes, reason):
    monkeypatch.chdir(saved)
    checkpoint = mnist.read_checkpoint(saved / "checkpoint.pt")
    checkpoint[part].update(changes) if changes else checkpoint.pop(part)
    torch.save(checkpoint, saved / "checkpoint.pt")
    with pytest.raises(Exception, match=reason):
        mnist.read_checkpoint(saved / "checkpoint.pt")
    assert not (saved / "sprung").exists()


def test_a_single_wrong_bit_is_noticed(saved):
    contents = bytearray((saved / "checkpoint.pt").read_bytes())
    contents[len(contents) // 2] ^= 1
    (saved / "checkpoint.pt").write_bytes(contents)
    with pytest.raises(ValueError, match=r"wrong checksum of .*data/\d"):
        mnist.read_checkpoint(saved / "checkpoint.pt")


@pytest.mark.parametrize("error", [PermissionError("no"), MemoryError("no"), RuntimeError("can't allocate")])
def test_a_checkpoint_that_cannot_be_read_is_an_error_and_stays(saved, monkeypatch, error):
    def fail(path):
        raise error

    monkeypatch.setattr(mnist, "read_checkpoint", fail)
    with pytest.raises(OSError, match=f"cannot read {saved}/checkpoint.pt: {error}"):
        mnist.load_checkpoint(saved)
    for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=r"PyTorch loads no checkpoint here: .*TORCH_FORCE"):
        mnist.load_checkpoint(saved)
    assert len(list(saved.iterdir())) == 3


@pytest.mark.parametrize("name", CHANGED)
def test_a_checkpoint_of_other_hyperparameters_is_refused_by_name(saved, name):
    checkpoint = mnist.load_checkpoint(saved)
    then = checkpoint["hyperparameters"][name]
    with pytest.raises(ValueError, match=f"checkpoint has {name} {then}, but this run has {CHANGED[name]}"):
        mnist.resume(new_trainer(**{name: CHANGED[name]}), checkpoint)


def test_a_checkpoint_of_another_model_is_refused(saved):
    checkpoint = mnist.load_checkpoint(saved)
    checkpoint["model"]["fc2.bias"] = torch.zeros(11)
    with pytest.raises(ValueError, match=r"(?s)the checkpoint does not fit this model: .*fc2\.bias"):
        mnist.resume(new_trainer(), checkpoint)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_trainer_takes_the_next_step(digits, saved, caplog, world_size):
    """Fused SGD does not look how weights and their momentum lie in memory, which depends on the device."""
    caplog.set_level("INFO")
    checkpoint = mnist.load_checkpoint(saved)
    for state in checkpoint["optimizer"]["state"].values():
        state["momentum_buffer"] = state["momentum_buffer"].contiguous()
    resumed, untouched = new_trainer(0, world_size), new_trainer()
    resumed.hyperparameters.bf16 = True  # a machine may have another precision
    mnist.resume(resumed, checkpoint)
    resumed.hyperparameters.bf16, resumed.job = False, mnist.Alone()
    list(resumed.train(*digits))
    list(untouched.train(*digits))
    assert (resumed.samples_seen, resumed.steps, resumed.epoch) == (SAMPLES, 3, 1)
    assert distance(resumed.model.parameters(), untouched.model.parameters()) == 0
    assert distance(resumed.averaged_model.parameters(), untouched.averaged_model.parameters()) == 0
    assert resumed.loss_sum == untouched.loss_sum
    mnist.resume(at_the_end := new_trainer(), checkpoint)
    at_the_end.scheduler.step()  # it does not warn that no step was taken
    goes_on = "Resuming in epoch 1 after 40 samples"
    note = f"1 process(es) before, {world_size} now: batches differ in size, so results will differ"
    assert caplog.messages == [goes_on, *([note] if world_size > 1 else ()), goes_on]


def test_adadelta_is_taken_if_asked_for_and_resumed(digits, tmp_path):
    """It also keeps a number of steps for each weight, which has not the weight's shape."""
    trainer, resumed = (new_trainer(optimizer="adadelta", lr=0.5) for _ in range(2))
    assert type(trainer.optimizer) is torch.optim.Adadelta and trainer.optimizer.defaults["lr"] == 0.5
    for _, _ in zip(trainer.train(*digits), range(2), strict=False):
        mnist.save(trainer, tmp_path)
    mnist.resume(resumed, mnist.load_checkpoint(tmp_path))
    assert all(state["step"].shape == () for state in resumed.optimizer.state.values())
    for each in (trainer, resumed):
        list(each.train(*digits))
    assert distance(resumed.model.parameters(), trainer.model.parameters()) == 0


@pytest.mark.parametrize(
    "text, advice", [("", ""), ("4711\nnode-1\n3\n", ". If 4711 on node-1 is gone, delete FOLDER/.lock")]
)
def test_a_folder_belongs_to_one_run_at_a_time_of_any_user(tmp_path, monkeypatch, text, advice):
    folder = tmp_path / "deep" / "output"
    with mnist.claimed(folder):
        assert (folder / ".lock").stat().st_mode & 0o777 == 0o666
        monkeypatch.setattr(Path, "read_text", lambda path: text if path == folder / ".lock" else "")
        monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("it waits"))
        with pytest.raises(OSError) as refused:
            mnist.claimed(str(folder))
    assert str(refused.value) == f"another run writes to {folder}{advice.replace('FOLDER', str(folder))}"
    mnist.claimed(folder).__exit__(None, None, None)


@pytest.mark.parametrize(
    "error, lacking",
    [
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 7 bytes"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to get 7 bytes"), True),
        (RuntimeError("shapes do not match"), False),
        (OSError("allocations/MNIST/raw/train-labels-idx1-ubyte.gz is missing"), False),  # a path's name
    ],
)
def test_a_want_of_memory_is_told_from_other_errors(error, lacking):
    assert mnist.lacks_memory(error) is lacking
