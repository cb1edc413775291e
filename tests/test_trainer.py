"""What mnist.py promises when it trains: model, parts, order, distortions, log, processes."""

import ast
import copy
import platform
import re
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import affine

import mnist
from rig.processes import fork
from rig.project import ROOT, make_small_project
from rig.training import Training, metrics


@pytest.fixture(scope="module")
def trained(small_template, tmp_path_factory):
    """Two epochs alone, as (log, output folder)."""
    output = tmp_path_factory.mktemp("trained")
    code, log = fork(small_template, "mnist.py", "--epochs", 2, "--save-model", "--output-dir", output)
    assert code == 0, log
    return log, output


def weights(output):
    return torch.load(output / "checkpoint.pt", weights_only=True)["averaged_model"]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- the model


def test_model_has_the_promised_parameters():
    model = mnist.Net()
    assert sum(p.numel() for p in model.parameters()) == 1_199_882
    names = [f"{layer}.{kind}" for layer in ("conv1", "conv2", "fc1", "fc2") for kind in ("weight", "bias")]
    assert list(model.state_dict()) == names


@pytest.mark.parametrize("training", [True, False])
def test_model_computes_what_the_same_network_written_by_hand_computes(training):
    """A chain of layers that takes normalised images [N, 1, 28, 28], and in training drops the same tenth."""
    convolutions = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2))
    linear = (nn.Linear(9216, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10), nn.LogSoftmax(dim=1))
    model, chain = mnist.Net(), nn.Sequential(*convolutions, nn.Flatten(), *linear)
    chain.load_state_dict(dict(zip(chain.state_dict(), model.state_dict().values(), strict=True)))
    images = torch.randint(256, (7, 28, 28), dtype=torch.uint8)
    answers = []
    for network, its_images in ((model, images), (chain, (images[:, None] / 255 - 0.1307) / 0.3081)):
        torch.manual_seed(1)  # of the dropout
        answers.append(network.train(training)(its_images))
    torch.testing.assert_close(*answers)
    assert answers[0].shape == (7, 10)


def test_importing_the_trainer_has_no_effect():
    """`%run` exports a script's globals into the notebook, so there must be nothing but definitions."""
    tree = ast.parse((ROOT / "mnist.py").read_text())
    harmless = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign)
    others = [node for node in tree.body[1:] if not isinstance(node, harmless)]
    assert [ast.unparse(node.test) for node in others] == ["__name__ == '__main__'"]


# --- the parts


SOURCE = (ROOT / "mnist.py").read_text()
# The first starts with the file; each of the others with its banner.
PARTS = re.split(r"(?m)^(?=# --- (?!The model))", SOURCE)


def test_the_file_has_eight_parts_and_neither_they_nor_their_functions_are_long():
    lengths = [part.count("\n") for part in PARTS]
    assert len(PARTS) == 8 and sum(lengths) <= 840 and max(lengths) <= 146
    assert "".join(PARTS[:3]).rstrip().count("\n") < 280, "the heart, after which a reader may stop"
    functions = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.FunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    del lengths["parse_arguments"]  # a flag a line
    assert max(lengths.values()) <= 40


def test_each_prefix_of_parts_lacks_nothing_that_it_names(tmp_path):
    """The notebook imports each of them, and trains with the first three."""
    for number in range(len(PARTS)):
        (tmp_path / f"prefix{number}.py").write_text("".join(PARTS[: number + 1]))
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# --- order and distortions

# Python's hash takes -1 for -2, and n for n + 2**61 - 1.
SEEDS_AND_EPOCHS = [(seed, epoch) for seed in (-2, -1, 1, 2**61, 2**70) for epoch in (1, 2)]


def test_order_is_a_permutation_and_new_in_every_epoch_and_for_every_seed():
    before = torch.get_rng_state()
    orders = [mnist.epoch_order(1000, seed, epoch) for seed, epoch in SEEDS_AND_EPOCHS]
    assert torch.equal(before, torch.get_rng_state()), "it also changes PyTorch's own random numbers"
    assert all(sorted(order.tolist()) == list(range(1000)) for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert torch.equal(orders[4], mnist.epoch_order(1000, seed=1, epoch=1))


def amounts(distortions):
    """Return by how much digits are changed: degrees, factor of the size, pixels right, pixels down."""
    turned = torch.rad2deg(torch.atan2(distortions[:, 1, 0], distortions[:, 0, 0]))
    looked_at = distortions[:, :, :2].det().sqrt()  # of a larger part of the image, the digit is smaller
    back = torch.linalg.solve(distortions[:, :, :2], -distortions[:, :, 2]) * 14
    return -turned, 1 / looked_at, back[:, 0], back[:, 1]


def test_distortions_fill_their_ranges_and_are_new_in_every_epoch_and_for_every_seed():
    every = [mnist.epoch_distortions(5000, seed, epoch) for seed, epoch in SEEDS_AND_EPOCHS]
    for distortions in every:
        assert distortions.shape == (5000, 2, 3) and distortions.dtype == torch.float32
        turned, size, *_ = amounts(distortions)
        right, down = 14 * distortions[:, :, 2].T
        for seen, low, high in ((turned, -10, 10), (1 / size, 0.9, 1.1), (right, -2, 2), (down, -2, 2)):
            counts = seen.histc(10, low, high)
            assert seen.min() >= low - 1e-3 and seen.max() <= high + 1e-3
            assert counts.min() > 400 and counts.max() < 600
        each_by_itself = torch.corrcoef(torch.stack([turned, size, right, down])) - torch.eye(4)
        assert each_by_itself.abs().max() < 0.1
    assert len({tuple(distortions.flatten().tolist()) for distortions in every}) == len(every)
    assert torch.equal(every[4], mnist.epoch_distortions(5000, seed=1, epoch=1))


def test_a_distorted_digit_is_the_one_that_torchvision_makes():
    images = mnist.load_mnist("datasets")[0][0][:50]
    distortions = mnist.epoch_distortions(50, 1, 1)
    distorted = mnist.distort(images, distortions)
    assert distorted.dtype == torch.float32 and distorted.shape == images.shape
    every = zip(images, distorted, *amounts(distortions), strict=True)
    for before, after, turned, size, right, down in every:
        moved, zoom = [right.item(), down.item()], size.item()
        how = {"shear": [0.0], "interpolation": InterpolationMode.BILINEAR}
        expected = affine(before[None].float(), turned.item(), moved, zoom, **how)
        assert torch.allclose(after, expected[0], atol=0.05)


# --- a step


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's memory that is kept")
def test_a_step_fetches_no_new_memory_from_the_system(small):
    (small / "program.py").write_text("""
import resource, torch, mnist
mnist.settle_in()
trainer = mnist.Trainer(mnist.Hyperparameters())
images, labels = (tensor[:640] for tensor in mnist.load_mnist("datasets")[0])
for epoch in (1, 2):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    trainer.begin(epoch)
    list(trainer.train(images, labels))
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
""")
    code, printed = fork(small, "program.py")
    assert code == 0 and float(printed.splitlines()[-1]) < 500  # seen: up to 31, and 2,774 to 6,692 without


class Normalising(mnist.Net):
    """A network with a batch normalisation, which keeps a mean, a variance and a count, too."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Sequential(self.conv1, nn.BatchNorm2d(32))


def test_what_a_batch_normalisation_counts_is_averaged_too(monkeypatch):
    monkeypatch.setattr(mnist, "Net", Normalising)
    trainer = mnist.Trainer(mnist.Hyperparameters())
    for _ in range(30):
        trainer.step(torch.randint(256, (8, 28, 28), dtype=torch.uint8), torch.arange(8), scale=1 / 8)
    learned, averaged = trainer.model.conv1[1], trainer.averaged_model.conv1[1]
    assert averaged.num_batches_tracked == learned.num_batches_tracked == 30
    apart, moved = averaged.running_var - learned.running_var, 1 - learned.running_var
    assert apart.abs().max() < 0.2 * moved.abs().max()


def test_several_processes_begin_with_the_network_as_it_is(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = Normalising()
        before = copy.deepcopy(model.state_dict())
        mnist.Job().distribute(model)
        assert same(model.state_dict(), before)
    finally:
        dist.destroy_process_group()


def test_no_batch_moves_the_weights_far():
    trainer = mnist.Trainer(mnist.Hyperparameters(lr=0.1, momentum=0.0))
    before = [weight.detach().clone() for weight in trainer.model.parameters()]
    digits = torch.randint(256, (8, 28, 28), dtype=torch.uint8)
    trainer.step(digits, torch.arange(8), scale=1e6)
    # Without weight decay, which is added after clipping, the step is that of a gradient of length 2.
    decayed = [(1 - 0.1 * 5e-4) * weight for weight in before]
    moved = [weight - other for weight, other in zip(trainer.model.parameters(), decayed, strict=True)]
    assert torch.cat([part.flatten() for part in moved]).norm().item() == pytest.approx(0.1 * 2, rel=1e-4)


def test_bfloat16_learns_as_well(trained, small):
    log, output = trained
    other = ("--bf16", "--no-bf16")["bfloat16" in log.splitlines()[0]]
    assert fork(small, "mnist.py", "--epochs", 2, other)[0] == 0
    assert all(weight.dtype == torch.float32 for weight in weights(small / "output").values())
    assert not same(weights(small / "output"), weights(output))
    assert abs(metrics(small / "output")[-1]["accuracy"] - metrics(output)[-1]["accuracy"]) < 0.03


INTEL = {"cpu_name": "Intel Xeon", "avx512_bf16": True}


@pytest.mark.parametrize(
    "able, device, asked, expected",
    [
        ({"cpu_name": "AMD EPYC", "amx_bf16": False, "avx512_bf16": True}, "cpu", None, True),
        (INTEL | {"amx_bf16": True}, "cpu", None, True),
        (INTEL | {"amx_bf16": False}, "cpu", None, False),  # slower than float32
        (INTEL, "cpu", True, True),
        ({"neon": True, "bf16": True}, "cpu", None, False),  # ARM: not measured
        ({"avx2": True, "amx_bf16": False, "avx512_bf16": False, "amx_fp16": True}, "cpu", None, False),
        ({"avx512_bf16": True}, "cpu", False, False),
        ({"avx512_bf16": True}, "mps", None, False),
        (None, "cpu", None, False),  # an old version of PyTorch does not say
    ],
)
def test_a_cpu_takes_bfloat16_if_it_is_faster(monkeypatch, able, device, asked, expected):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: able, raising=False)
    if able is None:
        monkeypatch.delattr("torch.cpu.get_capabilities")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    assert mnist.choose_bf16(torch.device(device), asked) is expected


def test_a_gpu_without_bfloat16_says_so(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: including_emulation)
    with pytest.raises(ValueError, match=r"^this GPU does not multiply in bfloat16: use --no-bf16$"):
        mnist.choose_bf16(torch.device("cuda"), True)


# --- the log


def test_log_has_the_promised_form(trained):
    log, _ = trained
    lines = log.splitlines()
    started = r"Started alone: rank 0 of 1, device cpu, backend none, \d+ threads?, (bfloat16|float32)"
    epoch = r"Epoch: [12] \((  0\.0| 62\.5)%\) - Loss: \d+\.\d+"
    accuracy = r"Test accuracy: \d+/500 \( \d\d\.\d%\)"
    expected = [started, *[epoch, epoch, accuracy, r"loss=\d+\.\d{4}", r"accuracy=0\.\d{4}"] * 2]
    assert len(lines) == len(expected), log
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)


def test_the_model_learns_and_the_saved_one_has_the_accuracy_in_the_log(trained, small_template):
    _, output = trained
    model = mnist.Net()
    model.load_state_dict(torch.load(output / "mnist_model.pt", weights_only=True))
    loss, correct = mnist.test(model, *mnist.load_mnist(small_template / "datasets")[1])
    assert correct / 500 == metrics(output)[-1]["accuracy"] > 0.7
    assert loss == pytest.approx(metrics(output)[-1]["test_loss"], rel=1e-4)


# --- several processes


def test_two_processes_log_once_and_say_how_they_were_started(small):
    code, log = fork(small, "mnist.py", "--num-processes", 2, "--batch-size", 500, "--epochs", 1)
    first, second, *lines = [line for line in log.splitlines() if not line.startswith("[Gloo]")]
    started = r"Started by torchrun: rank 0 of 2, device cpu, backend gloo, \d+ threads?, (bfloat16|float32)"
    assert code == 0 and re.fullmatch(started, first), log
    assert second == "Using distributed PyTorch with gloo backend"
    assert [re.split("[:=]", line)[0] for line in lines] == ["Epoch", "Test accuracy", "loss", "accuracy"]


def test_steps_and_figures_of_three_processes_are_those_of_one_with_their_batches_together(tmp_path):
    """Dropout's random numbers differ from process to process, so this is shown without dropout.

    Processors add up in different orders, so what is compared is how far the weights differ beside how far
    they have come. Rounding gives 1e-5 of it; a share or a scale that is wrong, more than a tenth.
    """
    project = make_small_project(tmp_path / "project", train=128, test=500)  # the last shares: 1, 1 and 0
    source = (project / "mnist.py").read_text()
    assert source.count("nn.Dropout(0.1)") == 1
    (project / "mnist.py").write_text(source.replace("nn.Dropout(0.1)", "nn.Identity()"))
    for world_size in (1, 3):
        options = ("--epochs", 1, "--no-bf16", "--no-cuda", "--batch-size", 63 // world_size)
        with Training(project, project / f"of {world_size}", world_size, options) as training:
            training.complete()
    start = mnist.Trainer(mnist.Hyperparameters()).model.state_dict()
    folders = project / "of 1", project / "of 3"
    one, three = (torch.load(each / "checkpoint.pt", weights_only=True)["model"] for each in folders)
    for name in start:
        assert (one[name] - three[name]).norm() < 1e-3 * (one[name] - start[name]).norm(), name
    (figures,), (others,) = map(metrics, folders)
    for name in ("train_loss", "test_loss"):
        assert others[name] == pytest.approx(figures[name], rel=1e-4)
    assert others["accuracy"] == pytest.approx(figures["accuracy"], abs=0.005)  # two images, by rounding
