"""What is measured, and what is predicted from it."""

from dataclasses import dataclass

BATCH, IMAGES = 64, 60_000
PARAMETERS = 1_199_882
SIZES = {"large": PARAMETERS, "middle": 40_000, "small": 1}  # of the all-reduces that are measured


@dataclass(frozen=True)
class Link:
    """So many hosts, each of which sends at a rate in Mbit/s; a frame is under way for `delay` seconds."""

    hosts: int
    rate: int
    delay: float = 0

    def __str__(self):
        rate = f"{self.rate // 1000} Gbit/s" if self.rate % 1000 == 0 else f"{self.rate} Mbit/s"
        return f"{self.hosts} hosts, {rate}" + (f", {self.delay * 1000:g} ms" if self.delay else "")


# On this machine, without hosts: how many processes, with how many threads each.
HERE = {
    "1 process, 1 thread": (1, 1),
    "1 process, 2 threads": (1, 2),
    "2 processes, 1 thread each": (2, 1),
}
# With a delay, all hosts together can have no more than 3 Gbit/s: that is what delay.py hands on.
FITTED = [
    Link(2, 10_000),
    *(Link(2, rate, delay) for rate in (1000, 100) for delay in (0, 0.001, 0.01)),
    Link(3, 10_000),
    Link(3, 100, 0.001),
    Link(3, 300, 0.01),
    Link(4, 1000),
    Link(4, 100),
    Link(4, 300, 0.001),
    Link(4, 300, 0.01),
]
HELD_OUT = [Link(3, 1000), Link(2, 300, 0.005), Link(4, 100, 0.005), Link(8, 100, 0.001), Link(8, 300, 0.01)]
# Where processes compute in earnest too: the last with more of them than cores, to see what that does.
IN_EARNEST = [Link(2, 10_000), Link(2, 1000), Link(2, 100), Link(2, 1000, 0.001), Link(4, 1000)]
VARIED = [Link(2, 100), Link(2, 1000), Link(2, 1000, 0.01)]
VARIANTS = {
    "default": {},
    "buckets of 1 MB": {"bucket_cap_mb": 1},
    "buckets of 5 MB": {"bucket_cap_mb": 5},
    "buckets of 25 MB": {"bucket_cap_mb": 25},
    "bfloat16": {},
}
PREDICTED = [2**power for power in range(11)]
NETWORKS = {"10 Gbit/s": (10_000, 0.0001), "1 Gbit/s": (1000, 0.0001)}
