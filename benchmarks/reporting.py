"""What the benchmarks share: how steps are timed, where figures go, on what machine they were found."""

import platform
import time
from pathlib import Path


def time_epoch(trainer, images, labels):
    """Return the seconds that the trainer takes for its next epoch, in another order than the last."""
    trainer.begin(trainer.epoch + 1)
    begin = time.perf_counter()
    for _ in trainer.train(images, labels):
        pass
    return time.perf_counter() - begin


def replace_between(text, mark, new):
    """Return `text` with `new` between <!-- mark --> and <!-- /mark -->; the rest stays as it is.

    Raises ValueError where these two are not there once each, in this order.
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
