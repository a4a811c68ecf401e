"""Logits to a token, by noise that draft and target share.

Coupled sampling: both workers add the same Gumbel noise, a function of (seed, position, token id),
to their own filtered distribution and take the maximum. Each choice of the target is then an exact
draw from its distribution (the Gumbel-max rule), a drafted token is verified by plain equality, and
the text does not depend on the draft at all. Source: Daliri, Musco, Suresh, "Coupling without
Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978.

The order is llama-server's: logit bias, penalties, top-k, top-p, min-p, and temperature last.

Noise for a whole vocabulary would cost more than all the rest, so `choose` computes it only where
it can matter. Uniforms of 52 bits bound the noise from both sides: an id so far behind that it
would need more than the highest noise against the lowest cannot win (see `_race`). The result is
exactly that of the full computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.errors import BadRequest

Token: TypeAlias = int
Ids: TypeAlias = NDArray[np.uint64]
Scores: TypeAlias = NDArray[np.float32]
Noise: TypeAlias = NDArray[np.float64]

SEEDS = 2**63  # seeds are below this, so that they fit a signed 64-bit integer on the wire


class BadScores(ValueError):
    """A row of logits from which nothing can be chosen: it has NaN or +inf, or no finite value."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token; raises BadRequest, naming the field, for a value out of range."""

    temperature: float = 0.1  # 0: always the likeliest
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # 0: off
    repeat_penalty: float = 1.0  # 1: off
    repeat_last_n: int = 64  # tokens that the three penalties look back on; 0: none, -1: all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[Token, float], ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, 100)
        _check("top_k", self.top_k, 0, 2**31 - 1, whole=True)
        _check("top_p", self.top_p, 0, 1)
        _check("min_p", self.min_p, 0, 1)
        _check("repeat_penalty", self.repeat_penalty, 0.01, 100)
        _check("repeat_last_n", self.repeat_last_n, -1, 2**31 - 1, whole=True)
        _check("presence_penalty", self.presence_penalty, -100, 100)
        _check("frequency_penalty", self.frequency_penalty, -100, 100)
        _check("seed", self.seed, 0, SEEDS - 1, whole=True)
        for token, bias in self.logit_bias:
            _check("logit_bias", token, 0, 2**31 - 1, whole=True)
            _check("logit_bias", bias, -1e6, 1e6)


def _check(name: str, value: float, least: float, most: float, whole: bool = False) -> None:
    kind = int if whole else (int, float)
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        what = "a whole number" if whole else "a number"
        raise BadRequest(f"{name} must be {what} from {least} to {most}, not {value!r}", name)


@dataclass(frozen=True, slots=True)
class Choice:
    """A chosen token and how clearly it won; see `propose`."""

    token: Token
    confidence: float


# --- the noise ---------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_12, _27, _30, _31 = np.uint64(12), np.uint64(27), np.uint64(30), np.uint64(31)

HIGHEST_NOISE = -math.log(-math.log1p(-(2.0**-53)))  # 36.74
LOWEST_NOISE = -math.log(53 * math.log(2))  # -3.60
_SPAN = HIGHEST_NOISE - LOWEST_NOISE + 1e-6  # what noise can make up for, rounding included


def mix(x: Ids) -> Ids:
    """SplitMix64's output function (Steele, Lea, Flood 2014), for arrays."""
    x = x + _GOLDEN  # arrays wrap; scalars would warn
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    return x ^ (x >> _31)


def gumbel(seed: int, position: int, ids: Ids) -> Noise:
    """The noise of each of `ids` at `position`, whichever others survived the filters."""
    return _noise(_key(seed, position), ids)


def _key(seed: int, position: int) -> Ids:
    return mix(mix(np.array([seed], np.uint64)) ^ np.uint64(position))


def _noise(key: Ids, ids: Ids) -> Noise:
    uniform = ((mix(key ^ ids) >> _12) + 0.5) * 2.0**-52  # inside (0, 1): never log(0)
    noise: Noise = -np.log(-np.log(uniform))
    return noise


# --- the choice --------------------------------------------------------------------------------


def choose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[Token],
    position: int,
    *,
    n_vocab: int | None = None,
) -> Token:
    """Choose the token at `position` from its logits; `history` is all tokens before it.

    `row` is left as it was. Ids of `n_vocab` and above cannot be chosen (a draft's vocabulary may
    be padded further than its target's); biased or penalised ids beyond the row are skipped.
    Raises BadScores for a row with NaN or +inf, or without any finite value.
    """
    with np.errstate(over="ignore"):  # -inf is right for what is too far behind for a float
        return _choose(_adjust(row[:n_vocab], sampling, history), sampling, position)


def propose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[Token],
    position: int,
    *,
    n_vocab: int | None = None,
) -> Choice:
    """What `choose` would, and how clearly: the softmax of the logits with their noise.

    The noise is weighed by the temperature, as it is in the choice, so what is judged is the lead
    that another model's logits must overcome to choose otherwise. At temperature 0 that is the
    token's probability. A probability of the tempered distribution would say little: at a low
    temperature it is near 1 for nearly every token.
    """
    with np.errstate(over="ignore"):
        row = _adjust(row[:n_vocab], sampling, history)
        token, top = _likeliest(row)
        if sampling.temperature == 0:
            return Choice(token, 1.0 / _mass(row, top))
        token = _draw(row, sampling, position, top)
        near = np.union1d(_top_k(row, min(_RIVALS, row.size)), [token])
        key = _key(sampling.seed, position)
        noise = sampling.temperature * _noise(key, near.astype(np.uint64))
        plain = row[near].astype(np.float64) - top
        noisy = plain + noise
        won = float(noisy[near == token][0])
        rest = max(0.0, _mass(row, top) - float(np.exp(plain).sum()))  # their noise hardly matters
        others = float(np.exp(noisy - won).sum())
        return Choice(token, 1.0 / (others + rest * math.exp(min(-won, 700.0))))


def _choose(row: Scores, sampling: Sampling, position: int) -> Token:
    token, top = _likeliest(row)
    return token if sampling.temperature == 0 else _draw(row, sampling, position, top)


def _draw(row: Scores, sampling: Sampling, position: int, top: float) -> Token:
    temperature = max(sampling.temperature, 1e-30)  # below that, float32 has no more to tell
    ids, logits = _survivors(row, sampling, top)
    return _race(ids, logits, top, temperature, _key(sampling.seed, position))


def logprob(row: Scores, token: Token) -> float:
    """The natural log-probability of `token` in plain `row`: no penalty, filter or temperature."""
    _, top = _likeliest(row)
    with np.errstate(over="ignore"):
        return float(row[token]) - top - math.log(_mass(row, top))


def _likeliest(row: Scores) -> tuple[Token, float]:
    """The id of the highest logit, the lowest on a tie, and that logit."""
    token = int(row.argmax()) if row.size else 0  # a NaN counts as the highest
    top = float(row[token]) if row.size else math.nan
    if not math.isfinite(top):
        raise BadScores(f"cannot choose among {row.size} logits whose maximum is {top}")
    return token, top


def _mass(logits: Scores, top: float) -> float:
    """The sum of exp(logit - top)."""
    scaled = logits - np.float32(top)
    return float(np.exp(scaled, out=scaled).sum())


# --- bias, penalties and filters -----------------------------------------------------------------


def _adjust(row: Scores, sampling: Sampling, history: Sequence[Token]) -> Scores:
    """`row` with bias and penalties, a copy only if there are any."""
    penalised = (
        sampling.repeat_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
    last_n = sampling.repeat_last_n if sampling.repeat_last_n >= 0 else len(history)
    penalised = penalised and min(last_n, len(history)) > 0
    if not (sampling.logit_bias or penalised):
        return row
    row = row.copy()
    for token, bias in sampling.logit_bias:
        if token < row.size:
            row[token] += np.float32(bias)
    if penalised:
        _penalise(row, sampling, history[-last_n:])
    return row


def _penalise(row: Scores, sampling: Sampling, recent: Sequence[Token]) -> None:
    """llama.cpp's repetition, frequency and presence penalties, in place."""
    seen, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    known = seen < row.size
    seen, counts = seen[known], counts[known].astype(np.float32)
    logits = row[seen]
    repeat = np.float32(sampling.repeat_penalty)
    logits = np.where(logits <= 0, logits * repeat, logits / repeat)
    logits -= counts * np.float32(sampling.frequency_penalty)
    logits -= np.float32(sampling.presence_penalty)
    row[seen] = logits


def _survivors(row: Scores, sampling: Sampling, top: float) -> tuple[Ids, Scores]:
    """The ids that pass the filters, ascending, and their logits."""
    ids, logits = _all_ids(row.size), row
    if 0 < sampling.top_k < row.size:
        kept = _top_k(row, sampling.top_k)
        ids, logits = ids[kept], logits[kept]
    if sampling.top_p < 1.0:
        kept = _top_p(logits, sampling.top_p, top)
        ids, logits = ids[kept], logits[kept]
    if sampling.min_p > 0.0:
        kept = np.flatnonzero(logits >= np.float32(top + math.log(sampling.min_p)))
        ids, logits = ids[kept], logits[kept]
    return ids, logits


@lru_cache(maxsize=8)
def _all_ids(size: int) -> Ids:
    ids = np.arange(size, dtype=np.uint64)
    ids.flags.writeable = False  # shared by all callers
    return ids


def _top_k(row: Scores, k: int) -> NDArray[np.intp]:
    """Where the `k` highest are, the lower index on a tie, ascending."""
    width = 8 * k
    near = row
    if row.size >= 4 * width:
        # `width` disjoint groups: the k-th highest of their maxima is reached by k logits at least
        groups = row[: row.size - row.size % width].reshape(-1, width).max(axis=0)
        near = row[row >= np.partition(groups, width - k)[width - k]]
    return _highest_ones(row, k, np.partition(near, near.size - k)[near.size - k])


def _top_p(logits: Scores, p: float, top: float) -> NDArray[np.intp]:
    """Where the fewest are, from the highest down, that hold `p` of the mass; at least one."""
    needed = p * _mass(logits, top)
    for depth in (2.0, 4.0, 8.0, 16.0, math.inf):  # sort only as deep as it takes
        near = np.sort(logits[logits >= np.float32(top - depth)])[::-1]
        held = np.cumsum(np.exp(near - np.float32(top)), dtype=np.float64)
        if held[-1] >= needed:
            break
    count = min(int(np.searchsorted(held, needed)) + 1, near.size)
    return _highest_ones(logits, count, near[count - 1])


def _highest_ones(logits: Scores, count: int, last: np.float32) -> NDArray[np.intp]:
    """Where the `count` highest are, ascending, of which `last` is the lowest."""
    kept = np.flatnonzero(logits >= last)
    if kept.size > count:  # a tie at the end: its lowest ids stay
        tied = np.flatnonzero(logits[kept] == last)
        kept = np.delete(kept, tied[count - kept.size :])
    return kept


# --- the race ------------------------------------------------------------------------------------

_RIVALS = 64  # of the likeliest tokens the noise is known where a choice is judged
_FEW = 4096  # ids whose noise costs less than avoiding it
_LEADS = (8.0, 4.0, 2.0, 1.0, 0.0)  # nats behind the likeliest: within, an id counts as a leader
_BLOCK = 8192  # ids hashed at once: few enough to stay in a core's own cache


def _race(ids: Ids, logits: Scores, top: float, temperature: float, key: Ids) -> Token:
    """The id that maximises (logit - top) / temperature + noise, the lowest one on a tie.

    An id further behind the likeliest than the whole span of the noise cannot win. At a low
    temperature that leaves few. Otherwise the leaders run first, and the others join only if their
    hash promises the noise that they need to beat the best leader: noise -log(-log u) above x takes
    1 - u < exp(-x), which is seen without a logarithm.
    """
    if ids.size > _FEW:
        near = _within(logits, top, temperature * _SPAN)
        if near.size > _FEW:
            near = _contenders(ids, logits, top, temperature, key)
        ids, logits = ids[near], logits[near]
    return int(ids[np.argmax(_scale(logits, top, temperature) + _noise(key, ids))])


def _contenders(
    ids: Ids, logits: Scores, top: float, temperature: float, key: Ids
) -> NDArray[np.intp]:
    """Where the winner must be, ascending: the leaders and those whose noise may beat them all."""
    for behind in _LEADS:
        leaders = _within(logits, top, temperature * behind)
        if leaders.size <= _FEW:
            break
    leaders = leaders[:_FEW]  # any will do; what is left out is not further behind than 0
    ahead = _scale(logits[leaders], top, temperature) + _noise(key, ids[leaders])
    chance = math.exp(-behind - float(ahead.max())) * (1 + 1e-6) + 2.0**-40  # rounding included
    bar = np.uint64(max(0, int((1.0 - chance) * 2.0**64)))
    joining = [
        start + np.flatnonzero(mix(key ^ ids[start : start + _BLOCK]) >= bar)
        for start in range(0, ids.size, _BLOCK)
    ]
    return np.union1d(leaders, np.concatenate(joining))


def _within(logits: Scores, top: float, gap: float) -> NDArray[np.intp]:
    """Where logits are at most `gap` below `top`; rounding lets in too many rather than too few."""
    floor = np.float32(max(top - gap, float(np.finfo(np.float32).min)))
    return np.flatnonzero(logits >= np.nextafter(floor, np.float32(-np.inf)))


def _scale(logits: Scores, top: float, temperature: float) -> Noise:
    scaled: Noise = (logits.astype(np.float64) - top) / temperature
    return scaled
