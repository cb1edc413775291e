"""The data: what is in the repository, how it is read and checked, and that nothing of it is overwritten."""

import gzip
import hashlib
import shutil
import subprocess
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler

import pytest
import torch
from torchvision.datasets import MNIST

import mnist
from tests.rig.processes import need, run, serving
from tests.rig.project import RAW, ROOT

NO_NETWORK = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


def contents_of(folder):
    """Return what is in the files of a folder, by their names and the time of their last change."""
    return {(p.name, p.stat().st_mtime_ns): p.read_bytes() for p in folder.iterdir()}


def keep(folder, packed):
    """Keep of each of the four files the packed one, if its name is in `packed`, or the unpacked one."""
    for name in mnist.FILES:
        contents = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / f"{name}.gz").unlink(missing_ok=True)
        if name in packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(contents, 1))
        else:
            (folder / name).write_bytes(contents)


@pytest.fixture
def mirror(monkeypatch):
    """A server on this machine that has MNIST: the only one that is tried. Lists what it was asked for."""

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=ROOT / RAW)

        def do_GET(self):
            asked.add(self.path.strip("/"))
            with suppress(ConnectionError):  # torchvision looks for the last address first, and hangs up
                super().do_GET()

    asked = set()
    with serving(Handler) as address:
        monkeypatch.setattr(MNIST, "mirrors", [f"{address}/"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield asked


# --- What is there


def test_the_repository_has_the_files_whose_sums_stand_beside_them_and_torchvision_knows():
    sums = mnist.checksums(ROOT / RAW)
    for archive, md5 in MNIST.resources:
        packed = (ROOT / RAW / archive).read_bytes()
        assert hashlib.md5(packed).hexdigest() == md5
        assert hashlib.sha256(gzip.decompress(packed)).hexdigest() == sums[archive.removesuffix(".gz")]
        assert md5 in (ROOT / "datasets/README.md").read_text()
    assert list(sums) == sorted(mnist.FILES)


def test_the_data_are_all_digits_as_bytes():
    (images, labels), (test_images, test_labels) = mnist.load_mnist(ROOT / "datasets")
    assert images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.dtype == test_labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert labels.bincount().min() == 5421 and labels.bincount().max() == 6742


def test_the_trainers_constants_are_the_statistics_of_the_training_pixels():
    (images, _), _ = mnist.load_mnist(ROOT / "datasets")
    pixels = images.float() / 255
    assert round(pixels.mean().item(), 4) == mnist.MEAN
    assert round(pixels.std().item(), 4) == mnist.STD


@pytest.mark.parametrize("packed", [0, 1, 4])
def test_packed_and_unpacked_files_are_the_same_data_and_reading_writes_nothing(small, packed):
    """Root may write anywhere, so this looks at what reading does, not at permissions."""
    expected = mnist.load_mnist(small / "datasets")
    keep(small / RAW, mnist.FILES[:packed])
    before = contents_of(small / RAW)
    for part, of_expected in zip(mnist.load_mnist(small / "datasets"), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(part, of_expected, strict=True))
    assert contents_of(small / RAW) == before


def test_sums_are_read_as_the_program_sha256sum_writes_them(small):
    need("sha256sum", "coreutils")
    expected = mnist.checksums(small / RAW)
    for mode in ("--text", "--binary"):
        words = ["sha256sum", mode, *mnist.FILES]
        printed = subprocess.run(words, cwd=small / RAW, capture_output=True, text=True, check=True).stdout
        for end in ("\n", "\r\n"):
            (small / RAW / "SHA256SUMS").write_text(printed, newline=end)
            assert mnist.checksums(small / RAW) == expected


# --- What is damaged or missing


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "missing"])
@pytest.mark.parametrize("packed", [False, True], ids=["unpacked", "packed"])
def test_a_damaged_file_is_named_with_what_to_do(small, packed, damage):
    keep(small / RAW, mnist.FILES if packed else ())
    for name in mnist.FILES:
        path = small / RAW / (f"{name}.gz" if packed else name)
        intact = path.read_bytes()
        middle = len(intact) // 2
        other = intact[:middle] + bytes([intact[middle] ^ 1]) + intact[middle + 1 :]
        path.write_bytes({"one bit": other, "truncated": intact[:-7]}.get(damage, b""))
        if damage == "missing":
            path.unlink()
        what_to_do = "put a good copy there"
        with pytest.raises((OSError, ValueError), match=f"{RAW / name}.*{what_to_do}"):
            mnist.load_mnist(small / "datasets")
        path.write_bytes(intact)


def test_damage_ends_the_program_in_one_line_and_stays_as_it_is(small):
    path = small / RAW / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    before = contents_of(small / RAW)
    code, log = run(small, "mnist.py")
    assert code == 1 and len(log.splitlines()) == 2  # the first says how it was started
    assert log.splitlines()[-1].startswith(
        f"mnist.py: {RAW / path.name} is missing or damaged, put a good copy"
    )
    assert contents_of(small / RAW) == before and not (small / "output/checkpoint.pt").exists()


def test_what_is_no_set_of_digits_is_refused_even_with_its_sums(small):
    labels = small / RAW / "train-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x0a")
    sums = (small / RAW / "SHA256SUMS").read_text().split()
    sums[2 * mnist.FILES.index(labels.name)] = hashlib.sha256(labels.read_bytes()).hexdigest()
    (small / RAW / "SHA256SUMS").write_text("\n".join(sums))
    with pytest.raises(ValueError, match="a label from 0 to 9"):
        mnist.load_mnist(small / "datasets")


# --- Without sums: MNIST, or nothing


def test_without_sums_the_archives_must_be_those_of_mnist(tmp_path, mirror):
    shutil.copytree(ROOT / RAW, tmp_path / RAW, ignore=shutil.ignore_patterns("SHA256SUMS", "*ubyte"))
    assert mnist.checksums(tmp_path / RAW) == mnist.checksums(ROOT / RAW)
    archive = tmp_path / RAW / "t10k-labels-idx1-ubyte.gz"
    contents = bytearray(archive.read_bytes())
    contents[1000] ^= 1
    for damage in (lambda: archive.write_bytes(contents), archive.unlink):
        damage()
        before = contents_of(tmp_path / RAW)
        with pytest.raises(ValueError, match=rf"{archive} is not MNIST's"):
            mnist.load_mnist(tmp_path / "datasets")
        assert contents_of(tmp_path / RAW) == before
    assert not mirror, "a good copy was fetched, which nobody has asked for"


def test_another_data_set_is_never_overwritten_and_trained_on_once_it_has_sums(small, mirror):
    """Fashion-MNIST, for example, comes in archives of the same names."""
    keep(small / RAW, mnist.FILES)
    sums = (small / RAW / "SHA256SUMS").read_text()
    (small / RAW / "SHA256SUMS").unlink()
    before = contents_of(small / RAW)
    with pytest.raises(ValueError, match="SHA256SUMS"):
        mnist.load_mnist(small / "datasets")
    assert contents_of(small / RAW) == before and not mirror
    (small / RAW / "SHA256SUMS").write_text(sums)
    code, log = run(small, "mnist.py", "--dry-run", **NO_NETWORK)
    assert code == 0 and "/500 (" in log
    assert before.items() < contents_of(small / RAW).items()


def test_where_nothing_is_mnist_is_downloaded_as_a_line_says(tmp_path, mirror, caplog):
    caplog.set_level("INFO")
    assert mnist.checksums(tmp_path / RAW) == mnist.checksums(ROOT / RAW)
    assert caplog.messages == [f"Downloading MNIST from {MNIST.mirrors[0]}"]
    assert mirror == {f"{name}.gz" for name in mnist.FILES}
    assert [path.name for path in (tmp_path / RAW).parent.iterdir()] == ["raw"], "something is left over"
    mirror.clear()
    mnist.checksums(tmp_path / RAW)
    assert not mirror, "it was downloaded a second time"


def test_who_finds_that_another_host_was_faster_takes_what_is_there(tmp_path, mirror, monkeypatch):
    def slow(folder, download):
        MNIST(folder, download=download)
        shutil.copytree(ROOT / RAW, tmp_path / RAW)

    slow.mirrors, slow.resources = MNIST.mirrors, MNIST.resources
    monkeypatch.setattr("torchvision.datasets.MNIST", slow)
    assert mnist.checksums(tmp_path / RAW) == mnist.checksums(ROOT / RAW)


def test_a_download_that_fails_is_one_line_with_what_to_do(tmp_path):
    code, log = run(tmp_path, ROOT / "mnist.py", "--data-dir", "nowhere", **NO_NETWORK)
    assert code == 1 and len(log.splitlines()) == 3, log
    assert log.splitlines()[-1].startswith("mnist.py: cannot download MNIST")
    assert "put its four .gz files in nowhere/MNIST/raw" in log
    assert not list((tmp_path / "nowhere/MNIST").iterdir()), "something half-done was left"
