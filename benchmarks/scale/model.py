"""A model of the time that a step takes on several hosts, in milliseconds, and its fit to what was seen."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# In bytes, what DDP sends at a time: the gradients of the linear layers, and those of the convolutions.
BUCKETS = (4 * 1_181_066, 4 * 18_816)
TAIL = 0.54  # on an AMD EPYC, the part of a step that is left when the linear layers have their gradients
ALL_REDUCES = {"large": sum(BUCKETS), "middle": 160_000, "small": 4}  # measured by themselves, also in bytes


class Link(NamedTuple):
    """How many hosts there are, and the rate in Gbit/s at which each of them sends."""

    hosts: int
    rate: float

    def __str__(self):
        return f"{self.hosts} hosts, {self.rate} Gbit/s"


@dataclass
class Model:
    """What communication costs: the three costs of bounds(), and what DDP adds to each step."""

    costs: np.ndarray
    ddp: float = 0.0

    def all_reduce(self, link, size):
        """Return the time for `size` bytes."""
        return max(bounds(link, size) @ self.costs)

    def step(self, link, compute):
        """Return the time of a step that computes for so long, beside which the first bucket travels."""
        first, second = (self.all_reduce(link, size) for size in BUCKETS)
        return compute + max(first - TAIL * compute, second) + self.ddp


def bounds(link, size):
    """Return three lower bounds of an all-reduce's time, in rows: it takes as long as the longest.

    The columns say how often each cost is paid: a hop to the next host, copying and adding up a byte, and a
    millisecond of the wire. gloo cuts each host's share into two pieces or more, of up to 1 MB. They go round
    a ring twice: first they are added up, then the sums are handed out. Two are on their way at any time.
    """
    hosts, rate = link
    pieces = max(2, math.ceil(size / hosts / 2**20)) * (hosts - 1)  # that each host sends, in each round
    hops = 2 * math.ceil(pieces / 2)  # one after the other, in both rounds
    moved = 2 * size * (hosts - 1) / hosts
    wire = moved * 8e-6 / rate
    always_sending = [2, 0, wire]
    always_adding = [2, moved, 0]
    often_waiting = [hops, moved / 2, wire / 2]  # each piece for the one two before it
    return np.array([always_sending, always_adding, often_waiting])


def fit(all_reduces, steps):
    """Return the Model whose errors, as ratios to what was seen, have the smallest sum.

    Both lists have what the Model's method takes, and then the time that was seen.
    """
    model, times = Model(np.array([0.1, 1e-6, 1])), np.array([time for *_, time in all_reduces])
    for _ in range(50):  # which bound is the longest depends on the costs, which are only now being found
        rows = [max(bounds(*given), key=lambda row: row @ model.costs) for *given, _ in all_reduces]
        matrix = np.array(rows) / times[:, None]
        # Least squares; but these weights undo the squares, so that a few odd times do not spoil the rest.
        weights = np.maximum(abs(matrix @ model.costs - 1), 0.01) ** -0.5
        model.costs = np.linalg.lstsq(matrix * weights[:, None], weights)[0]
    model.ddp = np.median([time - model.step(*given) for *given, time in steps])
    return model
