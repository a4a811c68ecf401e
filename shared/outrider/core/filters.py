"""Which tokens may be chosen, and how randomly: llama.cpp's filters and its dynamic temperature.

Each filter tells the indices of the logits that it keeps, ascending; XTC, of those that it leaves
out. On a tie at the border the lower ones stay, with XTC the higher ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.core.noise import IdArray, Scores

Indices: TypeAlias = NDArray[np.intp]

_FORBIDDEN = 1e5  # further below the highest is no score of the model's, but a bias like -inf
_NOTHING = np.float32(-200)  # nats behind: the exponential is 0, and times this still 0


@dataclass(frozen=True, slots=True)
class Candidates:
    """The ids that may be chosen, ascending, and their logits, of which `top` is the highest.

    `count` is how many llama.cpp would count here: with those that top-n-sigma has masked there.
    """

    ids: IdArray
    logits: Scores
    top: float
    count: int

    @classmethod
    def of(cls, row: Scores, top: float) -> Candidates:
        """All ids."""
        return cls(_all_ids(row.size), row, top, row.size)

    def only(self, kept: Indices, masked: int = 0) -> Candidates:
        """Those at these indices."""
        logits = self.logits[kept]
        return Candidates(self.ids[kept], logits, float(logits.max()), kept.size + masked)

    def without(self, dropped: Indices) -> Candidates:
        """All but those at these indices, which get a logit of -inf."""
        if not dropped.size:
            return self
        logits = self.logits.copy()
        logits[dropped] = -np.inf
        return Candidates(self.ids, logits, float(logits.max()), self.count - dropped.size)


@lru_cache(maxsize=8)
def _all_ids(size: int) -> IdArray:
    ids = np.arange(size, dtype=np.uint64)
    ids.flags.writeable = False  # shared by all callers
    return ids


def mass(logits: Scores, top: float) -> float:
    """The sum of exp(logit - top)."""
    scaled = logits - np.float32(top)
    return float(np.exp(scaled, out=scaled).sum())


def _weights(logits: Scores, top: float) -> tuple[Scores, float, float]:
    """exp(logit - top), the sum of these, and the entropy of the distribution in nats."""
    behind = np.maximum(logits - np.float32(top), _NOTHING)
    weights = np.exp(behind)
    total = float(weights.sum(dtype=np.float64))
    behind *= weights
    return weights, total, math.log(total) - float(behind.sum(dtype=np.float64)) / total


def top_n_sigma(logits: Scores, n: float) -> Indices:
    """Those at most `n` standard deviations of all logits below the highest."""
    top, possible = float(logits.max()), logits
    if float(logits.min()) < top - _FORBIDDEN:
        possible = logits[logits >= top - _FORBIDDEN]
    sigma = float(possible.std(dtype=np.float64))
    return np.flatnonzero(logits >= np.float32(top - n * sigma))


def top_k(row: Scores, k: int) -> Indices:
    """The `k` highest."""
    width = 8 * k
    near = row
    if row.size >= 4 * width:
        # of the maxima of `width` disjoint groups, the k-th highest is reached by at least k logits
        groups = row[: row.size - row.size % width].reshape(-1, width).max(axis=0)
        near = row[row >= np.partition(groups, width - k)[width - k]]
    return _highest_ones(row, k, np.partition(near, near.size - k)[near.size - k])


def typical(logits: Scores, p: float, top: float) -> Indices:
    """The fewest that hold more than `p` of the mass, those with the most typical surprise first.

    A token is typical if the negative logarithm of its probability is near the entropy (Meister and
    others, "Locally Typical Sampling", arXiv 2202.00666).
    """
    weights, total, entropy = _weights(logits, top)
    distance = np.abs(logits - np.float32(top + math.log(total) - entropy))
    needed = p * total
    for radius in (0.5, 2.0, 8.0, math.inf):  # sort only as far as it takes
        near = np.flatnonzero(distance <= radius)
        if float(weights[near].sum(dtype=np.float64)) > needed:
            break
    ranked = near[np.argsort(distance[near], kind="stable")]
    held = np.cumsum(weights[ranked], dtype=np.float64)
    return np.sort(ranked[: int(np.searchsorted(held, needed, side="right")) + 1])


def top_p(logits: Scores, p: float, top: float) -> Indices:
    """The fewest highest that hold `p` of the mass; at least one."""
    needed = p * mass(logits, top)
    for depth in (2.0, 4.0, 8.0, 16.0, math.inf):  # sort only as deep as it takes
        near = np.sort(logits[logits >= np.float32(top - depth)])[::-1]
        held = np.cumsum(np.exp(near - np.float32(top)), dtype=np.float64)
        if held[-1] >= needed:
            break
    count = min(int(np.searchsorted(held, needed)) + 1, near.size)
    return _highest_ones(logits, count, near[count - 1])


def min_p(logits: Scores, p: float, top: float) -> Indices:
    """Those at least `p` times as likely as the likeliest."""
    return np.flatnonzero(logits >= np.float32(top + math.log(p)))


def xtc(logits: Scores, threshold: float, top: float) -> Indices:
    """Those to leave out: of probability `threshold` or more, but for the least likely of them."""
    share = threshold * mass(logits, top)
    floor = np.float32(top + math.log(share)) if share else np.finfo(np.float32).min
    likely = np.flatnonzero(logits >= floor)
    if likely.size < 2:
        return likely[:0]
    last = np.flatnonzero(logits[likely] == logits[likely].min())[-1]
    return np.delete(likely, last)


def dynamic_temperature(
    found: Candidates, temperature: float, spread: float, exponent: float
) -> float:
    """From `temperature` - `spread` where one token is sure, to + `spread` where all are alike."""
    if found.count < 2:
        return 1.0
    _, _, entropy = _weights(found.logits, found.top)
    share = min(max(entropy, 0.0) / math.log(found.count), 1.0)
    low, high = max(0.0, temperature - spread), temperature + spread
    return low + (high - low) * float(share**exponent)


def _highest_ones(logits: Scores, count: int, last: np.float32) -> Indices:
    """The indices of the `count` highest, ascending; `last` is the lowest of them."""
    kept = np.flatnonzero(logits >= last)
    if kept.size > count:  # a tie at the end: its lowest ids stay
        tied = np.flatnonzero(logits[kept] == last)
        kept = np.delete(kept, tied[count - kept.size :])
    return kept
