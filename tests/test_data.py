"""The data: what is in the repository, how it is unpacked, and how damage to it is noticed."""

import gzip
import hashlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import RAW, ROOT, clean_environment, run

import mnist


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The whole data set, unpacked, as the folder to give to --data-dir."""
    folder = tmp_path_factory.mktemp("whole") / "datasets"
    shutil.copytree(ROOT / RAW, folder / "MNIST/raw", ignore=shutil.ignore_patterns("*ubyte"))
    mnist.unpack_mnist(folder)
    return folder


def test_the_repository_has_the_files_whose_sums_the_trainer_and_torchvision_know():
    for archive, md5 in mnist.datasets.MNIST.resources:
        packed = (ROOT / RAW / archive).read_bytes()
        assert hashlib.md5(packed).hexdigest() == md5
        contents = gzip.decompress(packed)
        assert hashlib.sha256(contents).hexdigest() == mnist.SHA256[archive.removesuffix(".gz")]
        assert md5 in (ROOT / "datasets/README.md").read_text()


def test_unpacking_needs_no_network_and_leaves_only_the_eight_files(unpacked):
    names = {path.name for path in (unpacked / "MNIST/raw").iterdir()}
    assert names == {*mnist.SHA256, *(f"{name}.gz" for name in mnist.SHA256)}


def test_the_data_are_all_digits_as_bytes(unpacked):
    (images, labels), (test_images, test_labels) = mnist.load_mnist(unpacked)
    assert images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.dtype == test_labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert labels.bincount().min() == 5421 and labels.bincount().max() == 6742


def test_the_trainers_constants_are_the_statistics_of_the_training_pixels(unpacked):
    (images, _), _ = mnist.load_mnist(unpacked)
    pixels = images.float() / 255
    assert round(pixels.mean().item(), 4) == mnist.MEAN
    assert round(pixels.std().item(), 4) == mnist.STD


def test_a_folder_that_cannot_be_written_but_is_unpacked_will_do(unpacked, tmp_path):
    """Root may write anywhere, so this looks at what unpacking does, not at permissions."""
    before = {path: path.stat().st_mtime_ns for path in (unpacked / "MNIST/raw").iterdir()}
    folder_time = (unpacked / "MNIST/raw").stat().st_mtime_ns
    mnist.unpack_mnist(unpacked)
    mnist.load_mnist(unpacked)
    assert before == {path: path.stat().st_mtime_ns for path in (unpacked / "MNIST/raw").iterdir()}
    assert folder_time == (unpacked / "MNIST/raw").stat().st_mtime_ns


def test_processes_that_unpack_at_the_same_time_do_not_disturb_each_other(tmp_path):
    shutil.copytree(ROOT / RAW, tmp_path / "MNIST/raw", ignore=shutil.ignore_patterns("*ubyte"))
    code = f"import mnist; mnist.unpack_mnist({str(tmp_path)!r}); mnist.load_mnist({str(tmp_path)!r})"
    both = [
        subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=clean_environment()) for _ in range(2)
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty"])
@pytest.mark.parametrize("name", list(mnist.SHA256))
def test_a_damaged_file_is_named_in_one_line_with_what_to_do(small, name, damage):
    path = small / RAW / name
    contents = bytearray(path.read_bytes())
    contents[-7] ^= 1
    path.write_bytes({"one bit": contents, "truncated": contents[:-7], "empty": b""}[damage])
    if (name, damage) != ("train-images-idx3-ubyte", "one bit"):  # starting the program once is enough
        with pytest.raises(ValueError, match=f"{name} is damaged: delete it"):
            with_sums_of(small).load_mnist(small / "datasets")
        return
    code, log = run(small, "mnist.py")
    assert code == 1
    assert log.splitlines()[-1].startswith(f"mnist.py: {RAW / name} is damaged: delete it")
    assert "Traceback" not in log


def with_sums_of(project):
    """Return the module mnist of the small project, which knows the sums of the small files."""
    import importlib.util

    spec = importlib.util.spec_from_file_location("small_mnist", project / "mnist.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["small_mnist"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("damage", ["altered", "missing"])
def test_an_archive_that_is_bad_and_cannot_be_fetched_is_named_in_one_line(tmp_path, damage):
    shutil.copytree(ROOT / RAW, tmp_path / RAW, ignore=shutil.ignore_patterns("*ubyte"))
    archive = tmp_path / RAW / "t10k-labels-idx1-ubyte.gz"
    contents = bytearray(archive.read_bytes())
    contents[1000] ^= 1
    archive.unlink() if damage == "missing" else archive.write_bytes(contents)
    # A proxy that is not there makes sure that nothing is fetched, on whatever network this runs.
    code, log = run(
        tmp_path,
        ROOT / "mnist.py",
        "--dry-run",
        http_proxy="http://127.0.0.1:9",
        https_proxy="http://127.0.0.1:9",
    )
    assert code == 1 and "Traceback" not in log
    last = log.splitlines()[-1]
    assert f"{RAW / archive.name} is missing or damaged, put a good copy there" in last, log
    assert not list((tmp_path / RAW).glob("*ubyte")), "something half-done was left"


def test_a_data_folder_without_data_is_named(tmp_path):
    proxy = "http://127.0.0.1:9"
    code, log = run(tmp_path, ROOT / "mnist.py", "--data-dir", "nowhere", http_proxy=proxy, https_proxy=proxy)
    assert code == 1 and "nowhere/MNIST/raw/train-images-idx3-ubyte.gz is missing" in log
