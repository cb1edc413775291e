"""The project, and small copies of it: the trainer with a slice of the real digits."""

import gzip
import hashlib
import shutil
import struct
from pathlib import Path

import mnist

ROOT = Path(__file__).parents[1]
RAW = Path("datasets", "MNIST", "raw")


def slice_of(name, count):
    """Return one of MNIST's four files, unpacked and cut to its first `count` items, as bytes."""
    contents = gzip.decompress((ROOT / RAW / f"{name}.gz").read_bytes())
    header, item = (16, 28 * 28) if "images" in name else (8, 1)
    return contents[:4] + struct.pack(">I", count) + contents[8:header] + contents[header:][: count * item]


def make_small_project(folder, train=1000, test=500):
    """Make `folder` a project with the trainer and little data: real digits, and their sums beside them."""
    (folder / RAW).mkdir(parents=True)
    sums = ""
    for name in mnist.FILES:
        contents = slice_of(name, train if "train" in name else test)
        (folder / RAW / name).write_bytes(contents)
        (folder / RAW / f"{name}.gz").write_bytes(gzip.compress(contents, 1))
        sums += f"{hashlib.sha256(contents).hexdigest()}  {name}\n"
    (folder / RAW / "SHA256SUMS").write_text(sums)
    shutil.copy(ROOT / "mnist.py", folder)
    return folder
