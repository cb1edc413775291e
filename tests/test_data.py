"""The data: what is in the repository, how it is read and checked, and that nothing of it is overwritten."""

import gzip
import hashlib
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
from contextlib import suppress
from http.server import SimpleHTTPRequestHandler

import pytest
import torch
from torchvision.datasets import MNIST

import mnist
from rig.processes import Fork, clean_environment, fork, need, serving
from rig.project import RAW, ROOT


def contents_of(folder):
    """Return what is in the files of a folder, by their names and the time of their last change."""
    return {(p.name, p.stat().st_mtime_ns): p.read_bytes() for p in folder.iterdir()}


def keep(folder, packed):
    """Keep of each of the four files the packed one, if its name is in `packed`, or the unpacked one."""
    for name in mnist.FILES:
        (folder / (name if name in packed else f"{name}.gz")).unlink()


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
    assert list(sums) == mnist.FILES


def test_the_data_are_all_digits_as_bytes_with_the_statistics_that_the_trainer_knows():
    (images, labels), (test_images, test_labels) = mnist.load_mnist(ROOT / "datasets")
    assert images.shape == (60_000, 28, 28) and test_images.shape == (10_000, 28, 28)
    assert images.dtype == test_images.dtype == torch.uint8
    assert labels.dtype == test_labels.dtype == torch.int64
    assert labels[:5].tolist() == [5, 0, 4, 1, 9] and test_labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert labels.bincount().min() == 5421 and labels.bincount().max() == 6742
    pixels = images.float() / 255
    assert round(pixels.mean().item(), 4) == mnist.MEAN
    assert round(pixels.std().item(), 4) == mnist.STD


@pytest.mark.parametrize("packed", [0, 1, 4])
def test_packed_and_unpacked_files_are_the_same_data_and_reading_writes_nothing(small, packed):
    """Root may write anywhere, so this looks at what reading does, not at permissions."""
    expected = mnist.load_mnist(small / "datasets")
    assert [images.shape for images, _ in expected] == [(1000, 28, 28), (500, 28, 28)]
    keep(small / RAW, mnist.FILES[:packed])
    before = contents_of(small / RAW)
    for part, of_expected in zip(mnist.load_mnist(small / "datasets"), expected, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(part, of_expected, strict=True))
    assert contents_of(small / RAW) == before


def test_sums_are_read_as_the_program_sha256sum_writes_and_checks_them(small):
    need("sha256sum", "coreutils")
    raw, expected = small / RAW, mnist.checksums(small / RAW)

    def sha256sum(*words, folder=raw):
        return subprocess.run(["sha256sum", *words], cwd=folder, capture_output=True, text=True).stdout

    printed = [sha256sum(mode, *mnist.FILES) for mode in ("--text", "--binary", "--tag")]
    printed += [sha256sum(*(f"./{name}" for name in mnist.FILES)), sha256sum(*(raw / n for n in mnist.FILES))]
    printed += [printed[0].replace("\n", "\r\n"), "# by hand\n\n" + printed[0], "\ufeff" + printed[1]]
    printed += ["\n".join(f"  {sum.upper()}  {name}" for name, sum in expected.items())]
    printed += ["".join(f"SHA256({name})= {sum}\n" for name, sum in expected.items())]  # as openssl does
    for text in printed:
        (raw / "SHA256SUMS").write_text(text, encoding="utf-8", newline="")
        assert mnist.checksums(raw) == expected, text
        if not text.startswith("\ufeff"):  # a mark of Windows, which sha256sum itself does not know
            assert sha256sum("--check", "SHA256SUMS").count(": OK") == 4, text


@pytest.mark.parametrize("kind", ["empty", "of another folder", "of three files", "of archives", "UTF-16"])
def test_a_file_for_which_there_is_no_sum_is_named_and_not_trained_on(small, kind):
    listed = small / RAW / "SHA256SUMS"
    whole = listed.read_text()
    texts = {
        "empty": "",
        "of another folder": whole.replace("  ", "  raw/"),
        "of three files": re.sub(".*t10k-labels.*\n", "", whole),
        "of archives": whole.replace("-ubyte", "-ubyte.gz"),
        "UTF-16": whole,  # PowerShell's >
    }
    listed.write_text(texts[kind], encoding=kind if kind == "UTF-16" else "UTF-8")
    with pytest.raises(ValueError, match=rf"{small / RAW}/t.*-ubyte has no line in SHA256SUMS.*UTF-8"):
        mnist.load_mnist(small / "datasets")


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
        what_to_do = "No such file" if damage == "missing" else "put a good copy there"
        with pytest.raises((OSError, ValueError)) as refused:
            mnist.load_mnist(small / "datasets")
        assert what_to_do in str(refused.value) and str(RAW / name) in str(refused.value)
        path.write_bytes(intact)


def idx(kind, shape, values):
    return bytes([0, 0, kind, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape) + values


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
FOREIGN = {
    "signed bytes": (IMAGES, idx(9, (1, 28, 28), bytes(784)), "int8"),
    "int16": (IMAGES, idx(11, (1, 28, 28), bytes(2 * 784)), "int16"),
    "float64": (IMAGES, idx(14, (1, 28, 28), bytes(8 * 784)), "float64"),
    "floats": (IMAGES, idx(13, (1, 28, 28), bytes(4 * 784)), "float32"),
    "int32 labels": (LABELS, idx(12, (1000,), bytes(4000)), "int32"),
    "an unknown type": (LABELS, idx(7, (1000,), bytes(1000)), "something else"),
    "an array of numpy's": (IMAGES, b"\x93NUMPY" + bytes(900), "something else"),
    "a byte too many": (LABELS, idx(8, (1000,), bytes(1001)), "1001 numbers, but announces 1000"),
    "a byte too few": (LABELS, idx(8, (1000,), bytes(999)), "999 numbers, but announces 1000"),
    "a label of 10": (LABELS, idx(8, (1000,), bytes(999) + b"\x0a"), "a label from 0 to 9"),
    "a header cut off": (LABELS, b"\0\0\x08\x01\0", "each image must have"),
    "nothing": (LABELS, b"", "something else"),
    "no digits": (LABELS, idx(8, (0,), b""), "each image must have"),
    "labels in two dimensions": (LABELS, idx(8, (1000, 1), bytes(1000)), "each image must have"),
    "smaller digits": (IMAGES, idx(8, (1000, 14, 14), bytes(196000)), "each image must have"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_sound_files_of_another_type_are_told_apart_from_damaged_ones(small, kind):
    name, contents, expected = FOREIGN[kind]
    (small / RAW / name).write_bytes(contents)
    listed = small / RAW / "SHA256SUMS"
    lines = [line for line in listed.read_text().splitlines() if name not in line]
    listed.write_text("\n".join([*lines, f"{hashlib.sha256(contents).hexdigest()}  {name}"]))
    with pytest.raises(ValueError, match=rf"\b{expected}\b") as refused:
        mnist.load_mnist(small / "datasets")
    assert str(small / RAW) in str(refused.value) and "damaged" not in str(refused.value)


def test_a_file_that_cannot_be_read_is_not_called_damaged(small, monkeypatch):
    """Root may read anything, so the error is made here."""

    def read_bytes(path):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr("pathlib.Path.read_bytes", read_bytes)
    with pytest.raises(OSError, match=rf"Input/output error.*{mnist.FILES[0]}") as refused:
        mnist.load_mnist(small / "datasets")
    assert "damaged" not in str(refused.value)


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
    assert mnist.load_mnist(small / "datasets")[1][0].shape == (500, 28, 28)
    assert before.items() < contents_of(small / RAW).items() and not mirror


def test_where_nothing_is_mnist_is_downloaded_as_a_line_says(tmp_path, mirror, caplog):
    caplog.set_level("INFO")
    mnist.download(tmp_path / RAW)
    assert mnist.checksums(tmp_path / RAW) == mnist.checksums(ROOT / RAW)
    assert caplog.messages == [f"Downloading MNIST from {MNIST.mirrors[0]}"]
    assert mirror == {f"{name}.gz" for name in mnist.FILES}
    assert [path.name for path in (tmp_path / RAW).parent.iterdir()] == ["raw"], "something is left over"


def test_who_finds_that_another_host_was_faster_takes_what_is_there(tmp_path, mirror, monkeypatch):
    def slow(folder, download):
        MNIST(folder, download=download)
        shutil.copytree(ROOT / RAW, tmp_path / RAW)

    slow.mirrors, slow.resources = MNIST.mirrors, MNIST.resources
    monkeypatch.setattr("torchvision.datasets.MNIST", slow)
    mnist.download(tmp_path / RAW)
    assert mnist.checksums(tmp_path / RAW) == mnist.checksums(ROOT / RAW)


def test_a_download_that_fails_is_one_line_with_what_to_do(tmp_path):
    no_network = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    code, log = fork(tmp_path, ROOT / "mnist.py", "--data-dir", "nowhere", **no_network)
    assert code == 1 and len(log.splitlines()) == 3, log
    assert log.splitlines()[-1].startswith("mnist.py: cannot download MNIST")
    assert "put its four .gz files in nowhere/MNIST/raw" in log
    assert not list((tmp_path / "nowhere/MNIST").iterdir()), "something half-done was left"


class Silent(SimpleHTTPRequestHandler):
    """A server that takes requests and never answers."""

    timeout = 60  # seconds; the default is the one that the download sets

    def do_GET(self):
        self.rfile.read(1)  # until the client leaves


def test_a_server_that_never_answers_is_given_up_with_a_sentence(tmp_path, monkeypatch):
    with serving(Silent) as address:
        monkeypatch.setattr(MNIST, "mirrors", [f"{address}/"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        begin = time.monotonic()
        with pytest.raises(OSError, match=r"cannot download MNIST.*timed out"):
            mnist.download(tmp_path / RAW, patience=1)
    assert time.monotonic() - begin < 15 and socket.getdefaulttimeout() is None
    assert not list((tmp_path / RAW).parent.iterdir()), "something half-done was left"


WITH_MIRROR = """
import sys
import mnist
from torchvision.datasets import MNIST
MNIST.mirrors = [sys.argv.pop(1)]
mnist.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_download_leaves_nothing(tmp_path, number):
    asked = threading.Event()

    class Noting(Silent):
        def do_GET(self):
            asked.set()
            super().do_GET()

    with serving(Noting) as address:
        log = tmp_path / "log"
        shutil.copy(ROOT / "mnist.py", tmp_path)
        (tmp_path / "program.py").write_text(WITH_MIRROR)
        command = ["program.py", f"{address}/", "--data-dir", "data"]
        process = Fork(command, log, tmp_path, clean_environment(no_proxy="127.0.0.1"))
        assert process.until(lambda: asked.is_set() and list(tmp_path.glob("data/MNIST/*/MNIST")))
        process.send_signal(number)
        code, printed = process.end()
    assert code == 1 and printed.splitlines()[-1] == "mnist.py: KeyboardInterrupt"
    assert not list((tmp_path / "data/MNIST").iterdir())
