"""The likeliest of many logits when the shared noise is added, without noise for all of them.

Noise for a whole vocabulary would cost more than all the rest of a choice, so it is computed only
where it can matter: an id cannot win if it is further behind than the highest noise is above the
lowest. The result is exactly that of the full computation.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from outrider.core.noise import HIGHEST_NOISE, LOWEST_NOISE, IdArray, Noise, Scores, keyed, mix
from outrider.core.values import TokenId

# logits: a choice that won by less may fall otherwise in a pass with other rows. On a processor
# (llama.cpp built by gcc 12 for AVX-512, default target), the lead of the first over the second
# moved by up to 0.56 in 2,300 choices, in 1 of 100 by more than 0.4 (tests/bench/bench_margins.py)
NEAR = 1.0
FAR = 1000.0  # logits: the margin of a choice that had no rival

_SPAN = HIGHEST_NOISE - LOWEST_NOISE + 1e-6  # the gap that noise can close, rounding included
_FEW = 4096  # ids whose noise costs less than avoiding it
_LEADS = (8.0, 4.0, 2.0, 1.0, 0.0)  # nats behind the likeliest: the leaders
_BLOCK = 8192  # ids hashed at once: few enough to stay in a core's own cache


def race(
    ids: IdArray, logits: Scores, top: float, temperature: float, key: IdArray
) -> tuple[TokenId, float]:
    """The id that maximises (logit - top) / temperature + noise (the lowest on a tie); its margin.

    `top` is the highest of `logits`. The margin is that of `sampling.decide`: no rival within
    `NEAR` is missed.

    An id further behind the likeliest than the whole span of the noise cannot win. At a low
    temperature that leaves few ids. Otherwise the leaders run first. Another id joins them only if
    its hash promises enough noise to beat the best leader: for noise -log(-log u) above x,
    1 - u < exp(-x) must hold, which is tested without a logarithm.
    """
    if ids.size > _FEW:
        near = _within(logits, top, temperature * _SPAN + NEAR)
        if near.size > _FEW:
            near = _contenders(ids, logits, top, temperature, key)
        ids, logits = ids[near], logits[near]
    scores = _scale(logits, top, temperature) + keyed(key, ids)
    winner = int(scores.argmax())
    won, scores[winner] = float(scores[winner]), -math.inf
    return int(ids[winner]), min(temperature * (won - float(scores.max())), FAR)


def _contenders(
    ids: IdArray, logits: Scores, top: float, temperature: float, key: IdArray
) -> NDArray[np.intp]:
    """The indices, ascending, among which the winner and its near rivals are.

    They are the leaders, and the ids whose noise may bring them within `NEAR` logits of the best.
    """
    for behind in _LEADS:
        leaders = _within(logits, top, temperature * behind)
        if leaders.size <= _FEW:
            break
    leaders = leaders[:_FEW]  # if more are level with the top, any will do: the rest may join
    ahead = _scale(logits[leaders], top, temperature) + keyed(key, ids[leaders])
    needed = behind + float(ahead.max()) - NEAR / temperature
    chance = math.exp(min(-needed, 0.0)) * (1 + 1e-6) + 2.0**-40  # rounding included
    bar = np.uint64(max(0, int((1.0 - chance) * 2.0**64)))
    joining = [
        start + np.flatnonzero(mix(key ^ ids[start : start + _BLOCK]) >= bar)
        for start in range(0, ids.size, _BLOCK)
    ]
    return np.union1d(leaders, np.concatenate(joining))


def _within(logits: Scores, top: float, gap: float) -> NDArray[np.intp]:
    """The indices of logits at most `gap` below `top`; rounding may add some, but loses none."""
    floor = np.float32(max(top - gap, float(np.finfo(np.float32).min)))
    return np.flatnonzero(logits >= np.nextafter(floor, np.float32(-np.inf)))


def _scale(logits: Scores, top: float, temperature: float) -> Noise:
    scaled: Noise = (logits.astype(np.float64) - top) / temperature
    return scaled
