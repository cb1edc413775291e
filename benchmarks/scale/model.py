"""A model of the time that a step takes on several workers, and how it is fitted to what was seen."""

import math
from dataclasses import dataclass

import numpy as np

# DDP's buckets with its defaults: the linear layers, whose gradients are the first, and the convolutions.
BUCKETS = (4 * 1_181_066, 4 * 18_816)
AGREEMENT = 8  # bytes: mnist.py agrees at every step on whether to stop


@dataclass
class Pace:
    """The seconds of a step that computes: up to the backward pass, to fc1's gradients, to the last."""

    rest: float
    head: float
    tail: float

    @property
    def step(self):
        return self.rest + self.head + self.tail


@dataclass
class Model:
    """What communication costs, in seconds where nothing else is said."""

    start: float  # once in an all-reduce
    hop: float  # a piece that is waited for, on its way to the next worker of the ring
    trips: float  # how many of the wire's delays that takes
    asks: float  # how many more where a worker has to be ready for the piece before it is sent
    byte: float  # to copy and add up a byte
    frames: float  # the bytes on the wire for each byte: headers are sent too
    bucket: float = 0.0  # to DDP, for each of its buckets

    @property
    def costs(self):
        return np.array([self.start, self.hop, self.trips, self.asks, self.byte, self.frames])

    def all_reduce(self, workers, size, rate, delay):
        """Return the seconds for `size` bytes, where each worker sends at `rate` Mbit/s."""
        return float(max(bounds(workers, size, rate, delay) @ self.costs))

    def step(self, pace, workers, rate, delay, buckets=BUCKETS):
        """Return the seconds of a step: computing, and what that does not hide of communication.

        The agreement on stopping has time until the next step. A bucket is sent when its gradients are there.
        gloo sends two at a time, so they wait for the wire's delay together, but share its bandwidth.
        """
        if workers == 1:
            return pace.step
        agreement = self.all_reduce(workers, AGREEMENT, rate, delay)
        ready = [pace.rest + pace.head, pace.step][-len(buckets) :]
        ends = [
            there + self.all_reduce(workers, size, rate, delay)
            for size, there in zip(buckets, ready, strict=True)
        ]
        busy = max(bounds(workers, sum(buckets), rate, delay)[:2] @ self.costs)
        return float(max(*ends, ready[0] + busy, agreement)) + self.bucket * len(buckets)


def bounds(workers, size, rate, delay):
    """Return what an all-reduce has of each of the Model's costs, in rows: it takes as long as the longest.

    gloo cuts the bytes into pieces, two or more for each worker and of no more than 1 MB, and passes them
    around a ring, first to add them up and then to tell the sums. Two are under way at a time. So either the
    wire is always busy, or the processor is, or each piece waits until the one two before it is there.
    """
    if workers == 1:
        return np.zeros((1, 6))
    if size <= AGREEMENT:
        # A number is a single piece. Who sent it first has the sum after a whole round, and starts the next
        # all-reduce while the others are still told of this one; they then have to be ready for it.
        return np.array([[1, workers, workers * delay, 2 * (workers > 2) * delay, 0, 0]])
    pieces = math.ceil(max(2 * workers, size / 2**20) / workers) * workers
    passed, piece = pieces - pieces // workers, size / pieces  # in each half
    pairs = math.ceil(passed / 2)
    wire, processor = 2 * passed * piece * 8e-6 / rate, 2 * passed * piece
    waited = (pairs + (passed % 2 == 0)) / passed  # the part of this that falls between waiting and waiting
    return np.array(
        [
            [1, 2, 2 * delay, 2 * delay, 0, wire],
            [1, 2, 2 * delay, 2 * delay, processor, 0],
            [1, 2 * pairs, 2 * pairs * delay, 2 * pairs * delay, waited * processor, waited * wire],
        ]
    )


def least_squares(matrix, sums):
    """Return costs, none of them below 0, with which the rows come to about these sums."""
    used = list(range(matrix.shape[1]))
    while True:
        scale = np.linalg.norm(matrix[:, used], axis=0) + 1e-300  # for their sizes lie far apart
        costs = np.linalg.lstsq(matrix[:, used] / scale, sums, rcond=None)[0]
        if min(costs) >= 0:
            break
        del used[int(np.argmin(costs))]
    found = np.zeros(matrix.shape[1])
    found[used] = costs / scale
    return found.tolist()


def fit(all_reduces, steps=()):
    """Return the Model whose errors are least, as ratios to what was measured.

    `all_reduces` are (workers, bytes, rate, delay, seconds), `steps` (pace, workers, rate, delay, seconds).
    """
    seconds = np.array([row[-1] for row in all_reduces])
    rows = [bounds(*row[:-1]) for row in all_reduces]
    model = Model(start=0, hop=1e-4, trips=1, asks=1, byte=2e-9, frames=1.05)
    for _ in range(50):  # which of its bounds an all-reduce keeps to depends on the costs that are looked for
        matrix = np.array([each[np.argmax(each @ model.costs)] for each in rows]) / seconds[:, None]
        # Not the squares of the errors count but their sizes: a few odd measurements must not spoil the rest.
        weights = np.maximum(abs(matrix @ model.costs - 1), 0.01) ** -0.5
        model = Model(*least_squares(matrix * weights[:, None], weights))
    if steps:
        squares = np.array([seconds**-2 for *_, seconds in steps])
        missing = np.array([seconds - model.step(*place) for *place, seconds in steps])
        model.bucket = max(0.0, float((squares * missing).sum() / squares.sum()) / len(BUCKETS))
    return model
