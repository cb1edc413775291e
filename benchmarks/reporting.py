"""What the benchmarks share: timing steps, naming the processor, and writing results into a page."""

import gzip
import os
import platform
import time
from pathlib import Path


def time_epoch(trainer, images, labels):
    """Return the seconds that the trainer takes for its next epoch on these images."""
    trainer.begin(trainer.epoch + 1)
    begin = time.perf_counter()
    for _ in trainer.train(images, labels):
        pass
    return time.perf_counter() - begin


def unpack(datasets):
    """Unpack MNIST's files there for the peers. Who reads them meanwhile finds a whole file, or none."""
    for packed in Path(datasets, "MNIST", "raw").glob("*-ubyte.gz"):
        if not (file := packed.with_suffix("")).exists():
            temporary = packed.with_name(f"{os.getpid()}-ubyte")
            temporary.write_bytes(gzip.decompress(packed.read_bytes()))
            temporary.replace(file)


def replace_between(text, mark, new):
    """Return `text` with `new` between <!-- mark --> and <!-- /mark -->, and the rest unchanged.

    Raises ValueError unless each of the two is there exactly once, in this order.
    """
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the page must have {begin} and {end} once each, in this order")
    before, rest = text.split(begin)
    return f"{before}{begin}\n\n{new}\n\n{end}{rest.split(end)[1]}"


def processor():
    """Return the name of this machine's processor."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
