"""What steps, figures and saves are made of, on a few digits in this process: here a wrong number is noticed.

`make mutants` changes mnist.py in hundreds of places, to see whether these tests notice (docs/mutants.md).
"""

import json
import math
import os
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

import mnist

SAMPLES, TEST_SET = 50, (torch.arange(7 * 784).view(7, 28, 28).to(torch.uint8), torch.arange(7))


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
        trainer.scheduler.step()
        trainer.begin(epoch + 1)
    assert next(expected, None) is None, "steps are missing"


def test_a_tenth_of_the_units_is_dropped_in_training_and_none_in_evaluation(digits):
    model, seen = mnist.Net(), []
    model.fc2.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    for training in (True, False):
        model.train(training)(digits[0])
    dropped, all_units = (units[seen[1] > 0] for units in seen)
    kept = dropped > 0
    torch.testing.assert_close(dropped[kept], all_units[kept] / 0.9)
    assert len(kept) > 1000 and 0.07 < 1 - kept.float().mean() < 0.13


def test_a_test_in_between_does_not_change_what_is_learned(digits):
    one, other = new_trainer(), new_trainer()
    for epoch in (1, 2):
        for trainer in (one, other):
            trainer.begin(epoch)
            list(trainer.train(*digits))
            mnist.test(trainer.averaged_model, *TEST_SET)
        mnist.test(one.model, *TEST_SET)
    assert distance(one.model.parameters(), other.model.parameters()) == 0


def test_random_numbers_are_new_for_each_purpose_epoch_batch_and_process(digits, monkeypatch):
    seen, dropout, random_seed = [], [], mnist.random_seed
    monkeypatch.setattr(mnist, "random_seed", lambda *purpose: seen.append(purpose) or random_seed(*purpose))
    for rank in (0, 1):
        trainer = new_trainer(rank, 2, batch_size=10)
        for epoch in (1, 2):
            trainer.begin(epoch)
            dropout += [torch.initial_seed() for _ in trainer.train(*digits)]
    assert len(set(dropout)) == len(dropout) == 2 * 2 * 3
    # Those of dropout are a process's own, the others are the same for all.
    assert len(set(seen)) == len(dropout) + 1 + 2 * 2 and len(seen) == len(set(seen)) + 1 + 2 * 2


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
        if where == "training":
            list(trainer.train(*digits))
        else:
            mnist.test(trainer.model, *TEST_SET, batch_size=3, job=job)
    assert len(batches) == 1


# --- An epoch -----------------------------------------------------------------------------------


class Clock:
    """A clock that goes on by a second whenever somebody looks at it."""

    now = 0.0

    def perf_counter(self):
        self.now += 1
        return self.now


def test_the_metrics_are_those_of_the_steps_and_of_the_test(digits, tmp_path, caplog):
    caplog.set_level("INFO")
    trainer, twin = new_trainer(), new_trainer()
    for epoch, rate in ((1, 0.1), (2, 0.075)):
        caplog.clear()
        mnist.run_epoch(trainer, digits, TEST_SET, settings_for(tmp_path), tmp_path)
        twin.begin(epoch)
        losses = [loss.item() for loss in twin.train(*digits)]
        twin.scheduler.step()
        test_loss, correct = mnist.test(twin.averaged_model, *TEST_SET)
        seen = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
        train_loss = (20 * losses[0] + 20 * losses[1] + 10 * losses[2]) / 50
        seconds = seen.pop("seconds")
        assert seconds > 0 and seen.pop("samples_per_second") == pytest.approx(SAMPLES / seconds)
        figures = {"train_loss": train_loss, "test_loss": test_loss, "accuracy": correct / 7}
        assert seen == pytest.approx({"epoch": epoch, "learning_rate": rate} | figures)
        steps = [
            f"Epoch: {epoch} ({share}) - Loss: {loss}"
            for share, loss in zip(("  0.0%", " 33.3%", " 66.7%"), losses, strict=True)
        ]
        accuracy = f"Test accuracy: {correct}/7 ({correct / 7:6.1%})"
        assert caplog.messages == [
            *steps,
            accuracy,
            f"loss={test_loss:.4f}",
            f"accuracy={correct / 7:.4f}",
        ]


def test_the_clock_of_a_resumed_epoch_goes_on(digits, tmp_path, monkeypatch):
    """It is looked at once before the first step, once after each of the three, and once at the end."""
    monkeypatch.setattr(mnist, "time", Clock())
    args = settings_for(tmp_path, checkpoint_interval=2)
    trainer = new_trainer()
    mnist.run_epoch(trainer, digits, TEST_SET, args, tmp_path)
    resumed = new_trainer()
    mnist.resume(resumed, mnist.read_checkpoint(tmp_path / "checkpoint.previous.pt"))  # of two steps
    assert (resumed.samples_seen, resumed.seconds) == (40, 2)
    mnist.run_epoch(resumed, digits, TEST_SET, args, tmp_path)
    assert trainer.history[0]["seconds"] == resumed.history[0]["seconds"] == 4
    assert resumed.seconds == 0, "the next epoch has a clock of its own"


def test_three_processes_that_resume_have_the_loss_of_one_between_them(digits, tmp_path):
    trainer = new_trainer()
    next(trainer.train(*digits))
    mnist.save(trainer, tmp_path)
    checkpoint = mnist.load_checkpoint(tmp_path)
    parts = [new_trainer(rank, 3) for rank in range(3)]
    for part in parts:
        mnist.resume(part, checkpoint)
    assert sum(float(part.loss_sum) for part in parts) == float(trainer.loss_sum) > 0


def test_a_loss_that_is_no_number_is_not_saved(digits, tmp_path):
    trainer = new_trainer()
    trainer.loss_sum = math.nan
    with pytest.raises(FloatingPointError, match="in epoch 1, the loss is nan: try a smaller --lr"):
        mnist.save(trainer, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stopped", [False, True])
def test_nobody_leaves_before_all_that_is_to_be_written_is_there(digits, tmp_path, monkeypatch, stopped):
    class Watched(Place):
        def all_reduce(self, *numbers):
            there_at_meetings.append({path.name for path in tmp_path.iterdir()})
            return list(numbers)

        def stop_if_asked(self):
            if stopped and there_at_meetings:
                raise mnist.Stopped

    there_at_meetings = []
    monkeypatch.setattr(mnist, "load_mnist", lambda *_: (digits, TEST_SET))
    args = settings_for(tmp_path, save_model=True)
    with pytest.raises(SystemExit) if stopped else nullcontext() as end:
        mnist.train(args, Watched("", 0, 2), torch.device("cpu"), tmp_path, None)
    written = {"checkpoint.pt", "metrics.jsonl"} | ({"mnist_model.pt"} if not stopped else set())
    assert there_at_meetings[-1] == written
    assert not stopped or end.value.code == 143


# --- A save -------------------------------------------------------------------------------------


def test_a_file_is_on_the_disk_before_it_takes_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: done.append(os.fstat(file).st_size) or fsync(file))
    monkeypatch.setattr(os, "replace", lambda *names: done.append(names[1].name) or replace(*names))
    mnist.write(tmp_path / "file", b"five!")
    mnist.write(tmp_path / "file", b"three", keep=tmp_path / "before")
    assert done == [5, "file", 5, "before", "file"]


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
