"""The noise that draft and target share: a function of seed, position and token id.

Uniforms of 52 bits bound the noise from both sides.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

IdArray: TypeAlias = NDArray[np.uint64]
Scores: TypeAlias = NDArray[np.float32]
Noise: TypeAlias = NDArray[np.float64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_12, _27, _30, _31 = np.uint64(12), np.uint64(27), np.uint64(30), np.uint64(31)
_NO_TOKEN = np.array([1 << 63], np.uint64)  # above all ids: what is drawn once for a position

HIGHEST_NOISE = -math.log(-math.log1p(-(2.0**-53)))  # 36.74
LOWEST_NOISE = -math.log(53 * math.log(2))  # -3.60


def mix(x: IdArray) -> IdArray:
    """SplitMix64's output function (Steele, Lea, Flood 2014), for arrays."""
    x = x + _GOLDEN  # arrays wrap; scalars would warn
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    return x ^ (x >> _31)


def gumbel(seed: int, position: int, ids: IdArray) -> Noise:
    """The noise of each of `ids` at `position`, one number each; other ids do not matter."""
    return keyed(key_of(seed, position), ids)


def key_of(seed: int, position: int) -> IdArray:
    """What the noise of all ids at `position` is made from."""
    return mix(mix(np.array([seed], np.uint64)) ^ np.uint64(position))


def keyed(key: IdArray, ids: IdArray) -> Noise:
    """As `gumbel`, with the key of seed and position."""
    noise: Noise = -np.log(-np.log(_uniform(key, ids)))
    return noise


def chance(key: IdArray) -> float:
    """A number between 0 and 1 for the position itself."""
    return float(_uniform(key, _NO_TOKEN)[0])


def _uniform(key: IdArray, ids: IdArray) -> Noise:
    hashed = (mix(key ^ ids) >> _12).astype(np.float64)
    return (hashed + 0.5) * 2.0**-52  # inside (0, 1): never log(0)
