"""Logits to a token, by noise that draft and target share.

Coupled sampling: both workers add the same Gumbel noise, a function of (seed, position, token id),
to their own filtered distribution and take the maximum. Each choice of the target is then an exact
draw from its distribution (the Gumbel-max rule), a drafted token is verified by plain equality, and
the text does not depend on the draft at all. Source: Daliri, Musco, Suresh, "Coupling without
Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978.

The order is llama-server's: logit bias, penalties, top-k, top-p, min-p, and temperature last.

Noise for a whole vocabulary would cost more than all the rest, so `choose` computes it only where
it can matter. Uniforms of 52 bits bound the noise from both sides. An id cannot win if it is
further behind than the highest noise is above the lowest (see `_race`). The result is exactly that
of the full computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, TypeAlias, get_type_hints

import numpy as np
from numpy.typing import NDArray

from outrider.core.values import Count, Drafted, Id, Meta, TokenId, Value
from outrider.errors import BadRequest, ModelUnusable

IdArray: TypeAlias = NDArray[np.uint64]
Scores: TypeAlias = NDArray[np.float32]
Noise: TypeAlias = NDArray[np.float64]

# logits: a choice that won by less may fall otherwise in a pass with other rows. On a processor
# (llama.cpp built by gcc 12 for AVX-512, default target), the lead of the first over the second
# moved by up to 0.56 in 2,300 choices, in 1 of 100 by more than 0.4 (tests/bench/bench_margins.py)
NEAR = 1.0
FAR = 1000.0  # logits: the margin of a choice that had no rival
BIASES = 4096  # most tokens of a logit bias

Penalty: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Bias: TypeAlias = Annotated[float, Meta(ge=-1e6, le=1e6)]


class BadScores(ModelUnusable):
    """A row of logits from which nothing can be chosen: it has NaN or +inf, or no finite value."""

    def __init__(self, top: float) -> None:
        found = "NaN" if math.isnan(top) else "an infinite score" if top > 0 else "no finite score"
        super().__init__(
            f"the model computed {found} where it was to choose a token; its file may be damaged"
        )


class Sampling(Value, frozen=True):
    """How to choose a token; raises BadRequest, naming the field, for a value out of range."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 0.1  # 0: always the likeliest
    top_k: Count = 0  # 0: off
    top_p: Share = 1.0  # 1: off
    min_p: Share = 0.0  # 0: off
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0  # 1: off
    # how many tokens back the three penalties look; 0: none, -1: all
    repeat_last_n: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)] = 64
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], Meta(max_length=BIASES)] = ()
    seed: Id = 0

    def __post_init__(self) -> None:
        for name, bounds in _bounds().items():
            _check(name, getattr(self, name), bounds, whole=name in _WHOLE)
        for token, bias in self.logit_bias:
            _check("logit_bias", token, _meta(TokenId), whole=True)
            _check("logit_bias", bias, _meta(Bias), whole=False)


_WHOLE = {"top_k", "repeat_last_n", "seed"}


@lru_cache(maxsize=1)
def _bounds() -> dict[str, Meta]:
    """The bounds of each number, by its field: those in its annotation."""
    hints = get_type_hints(Sampling, include_extras=True)
    return {name: _meta(hint) for name, hint in hints.items() if name != "logit_bias"}


def _meta(hint: object) -> Meta:
    (meta,) = hint.__metadata__  # type: ignore[attr-defined]  # of Annotated
    assert isinstance(meta, Meta)
    return meta


def _check(name: str, value: float, bounds: Meta, whole: bool) -> None:
    kind = int if whole else (int, float)
    least, most = bounds.ge, bounds.le
    assert least is not None
    assert most is not None
    if isinstance(value, bool) or not isinstance(value, kind) or not least <= value <= most:
        what = "a whole number" if whole else "a number"
        raise BadRequest(f"{name} must be {what} from {least:g} to {most:g}, not {value!r}", name)


# --- the noise ---------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_12, _27, _30, _31 = np.uint64(12), np.uint64(27), np.uint64(30), np.uint64(31)

HIGHEST_NOISE = -math.log(-math.log1p(-(2.0**-53)))  # 36.74
LOWEST_NOISE = -math.log(53 * math.log(2))  # -3.60
_SPAN = HIGHEST_NOISE - LOWEST_NOISE + 1e-6  # the gap that noise can close, rounding included


def mix(x: IdArray) -> IdArray:
    """SplitMix64's output function (Steele, Lea, Flood 2014), for arrays."""
    x = x + _GOLDEN  # arrays wrap; scalars would warn
    x = (x ^ (x >> _30)) * _FIRST
    x = (x ^ (x >> _27)) * _SECOND
    return x ^ (x >> _31)


def gumbel(seed: int, position: int, ids: IdArray) -> Noise:
    """The noise of each of `ids` at `position`, one number each; other ids do not matter."""
    return _noise(_key(seed, position), ids)


def _key(seed: int, position: int) -> IdArray:
    return mix(mix(np.array([seed], np.uint64)) ^ np.uint64(position))


def _noise(key: IdArray, ids: IdArray) -> Noise:
    uniform = ((mix(key ^ ids) >> _12) + 0.5) * 2.0**-52  # inside (0, 1): never log(0)
    noise: Noise = -np.log(-np.log(uniform))
    return noise


# --- the choice --------------------------------------------------------------------------------


def choose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    position: int,
    *,
    n_vocab: int | None = None,
) -> TokenId:
    """Choose the token at `position` from its logits; `history` is all tokens before it.

    `row` has shape (vocabulary,) and is left as it was. Ids of `n_vocab` and above cannot be chosen
    (a draft's vocabulary may be padded further than its target's); biased or penalised ids beyond
    the row are skipped. Raises BadScores for a row with NaN or +inf, or without any finite value.
    """
    return decide(row[:n_vocab], sampling, history, position)[0]


def decide(
    row: Scores, sampling: Sampling, history: Sequence[TokenId], position: int
) -> tuple[TokenId, float]:
    """The choice of `choose`, and its margin: by how many logits it won, noise included.

    Filters aside, one logit may move that far before another token is chosen. A margin of `NEAR` or
    more may be overstated, as rivals that far off are not looked for; it is at most `FAR`.
    """
    with np.errstate(over="ignore"):  # a logit too far behind for a float becomes -inf
        row = _adjust(row, sampling, history)
        token, top = _likeliest(row)
        if sampling.temperature > 0:
            return _draw(row, sampling, position, top)
        rivals = [float(part.max()) for part in (row[:token], row[token + 1 :]) if part.size]
        return token, min(top - max(rivals, default=-math.inf), FAR)


def propose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    position: int,
    *,
    n_vocab: int | None = None,
) -> Drafted:
    """The choice of `choose`, and its confidence: its softmax among logits plus noise.

    The noise is scaled by the temperature, as in the choice. So the confidence judges the lead that
    another model's logits must overcome to choose otherwise. At temperature 0 it is the token's
    probability. The probability at the given temperature would say little: at a low one it is near
    1 for nearly every token.
    """
    with np.errstate(over="ignore"):
        row = _adjust(row[:n_vocab], sampling, history)
        token, top = _likeliest(row)
        if sampling.temperature == 0:
            return Drafted(token, 1.0 / _mass(row, top))
        token, _ = _draw(row, sampling, position, top)
        near = np.union1d(_top_k(row, min(_RIVALS, row.size)), [token])
        key = _key(sampling.seed, position)
        noise = sampling.temperature * _noise(key, near.astype(np.uint64))
        plain = row[near].astype(np.float64) - top
        noisy = plain + noise
        won = float(noisy[near == token][0])
        rest = max(0.0, _mass(row, top) - float(np.exp(plain).sum()))  # their noise hardly matters
        others = float(np.exp(noisy - won).sum())
        return Drafted(token, 1.0 / (others + rest * math.exp(min(-won, 700.0))))


def _draw(row: Scores, sampling: Sampling, position: int, top: float) -> tuple[TokenId, float]:
    temperature = max(sampling.temperature, 1e-30)  # below that, float32 logits tell no more apart
    ids, logits = _survivors(row, sampling, top)
    return _race(ids, logits, top, temperature, _key(sampling.seed, position))


def logprob(row: Scores, token: TokenId) -> float:
    """The natural log-probability of `token` in plain `row`: no penalty, filter or temperature."""
    _, top = _likeliest(row)
    with np.errstate(over="ignore"):
        return float(row[token]) - top - math.log(_mass(row, top))


def _likeliest(row: Scores) -> tuple[TokenId, float]:
    """The id of the highest logit (the lowest on a tie), and that logit. Raises BadScores."""
    token = int(row.argmax()) if row.size else 0  # a NaN counts as the highest
    top = float(row[token]) if row.size else -math.inf
    if not math.isfinite(top):
        raise BadScores(top)
    return token, top


def _mass(logits: Scores, top: float) -> float:
    """The sum of exp(logit - top)."""
    scaled = logits - np.float32(top)
    return float(np.exp(scaled, out=scaled).sum())


# --- bias, penalties and filters -----------------------------------------------------------------


def _adjust(row: Scores, sampling: Sampling, history: Sequence[TokenId]) -> Scores:
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


def _penalise(row: Scores, sampling: Sampling, recent: Sequence[TokenId]) -> None:
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


def _survivors(row: Scores, sampling: Sampling, top: float) -> tuple[IdArray, Scores]:
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
def _all_ids(size: int) -> IdArray:
    ids = np.arange(size, dtype=np.uint64)
    ids.flags.writeable = False  # shared by all callers
    return ids


def _top_k(row: Scores, k: int) -> NDArray[np.intp]:
    """The indices of the `k` highest, ascending; on a tie the lower index stays."""
    width = 8 * k
    near = row
    if row.size >= 4 * width:
        # of the maxima of `width` disjoint groups, the k-th highest is reached by at least k logits
        groups = row[: row.size - row.size % width].reshape(-1, width).max(axis=0)
        near = row[row >= np.partition(groups, width - k)[width - k]]
    return _highest_ones(row, k, np.partition(near, near.size - k)[near.size - k])


def _top_p(logits: Scores, p: float, top: float) -> NDArray[np.intp]:
    """The indices of the fewest highest that hold `p` of the mass, ascending; at least one."""
    needed = p * _mass(logits, top)
    for depth in (2.0, 4.0, 8.0, 16.0, math.inf):  # sort only as deep as it takes
        near = np.sort(logits[logits >= np.float32(top - depth)])[::-1]
        held = np.cumsum(np.exp(near - np.float32(top)), dtype=np.float64)
        if held[-1] >= needed:
            break
    count = min(int(np.searchsorted(held, needed)) + 1, near.size)
    return _highest_ones(logits, count, near[count - 1])


def _highest_ones(logits: Scores, count: int, last: np.float32) -> NDArray[np.intp]:
    """The indices of the `count` highest, ascending; `last` is the lowest of them."""
    kept = np.flatnonzero(logits >= last)
    if kept.size > count:  # a tie at the end: its lowest ids stay
        tied = np.flatnonzero(logits[kept] == last)
        kept = np.delete(kept, tied[count - kept.size :])
    return kept


# --- the race ------------------------------------------------------------------------------------

_RIVALS = 64  # a choice is judged by the noise of so many of the likeliest tokens
_FEW = 4096  # ids whose noise costs less than avoiding it
_LEADS = (8.0, 4.0, 2.0, 1.0, 0.0)  # nats behind the likeliest: the leaders
_BLOCK = 8192  # ids hashed at once: few enough to stay in a core's own cache


def _race(
    ids: IdArray, logits: Scores, top: float, temperature: float, key: IdArray
) -> tuple[TokenId, float]:
    """The id that maximises (logit - top) / temperature + noise (the lowest on a tie); its margin.

    The margin is that of `decide`: no rival within `NEAR` is missed.

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
    scores = _scale(logits, top, temperature) + _noise(key, ids)
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
    ahead = _scale(logits[leaders], top, temperature) + _noise(key, ids[leaders])
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
