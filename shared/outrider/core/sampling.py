"""Logits to a token, by noise that draft and target share.

Coupled sampling: both workers add the same Gumbel noise, a function of (seed, position, token id),
to their own filtered distribution and take the maximum. Each choice of the target is then an exact
draw from its distribution (the Gumbel-max rule), a drafted token is verified by plain equality, and
the text does not depend on the draft at all. Source: Daliri, Musco, Suresh, "Coupling without
Communication and Drafter-Invariant Speculative Decoding", arXiv 2408.07978.

The order is llama-server's: logit bias, penalties, DRY, top-n-sigma, top-k, typical, top-p, min-p,
XTC, and temperature last. What each does is llama.cpp's, too; only the noise is our own, and the
chance of XTC, which is keyed by seed and position like all noise here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Annotated, TypeAlias, get_type_hints

import numpy as np

from outrider.core import filters
from outrider.core.filters import Candidates
from outrider.core.noise import IdArray, Noise, Scores, chance, gumbel, key_of, keyed
from outrider.core.penalties import NO_BREAKERS, Breakers, penalise, penalise_repetition
from outrider.core.race import FAR, NEAR, race
from outrider.core.values import Count, Drafted, Id, Meta, TokenId, Value, Word
from outrider.errors import BadRequest, ModelUnusable

__all__ = [
    "FAR",
    "NEAR",
    "BadScores",
    "Noise",
    "Sampling",
    "Scores",
    "choose",
    "decide",
    "gumbel",
    "likeliest",
    "propose",
]

BIASES = 4096  # most tokens of a logit bias
BREAKERS, LONGEST_BREAKER = 16, 40  # most sequence breakers of DRY, and bytes of one
_RIVALS = 64  # a choice is judged by the noise of so many of the likeliest tokens

Penalty: TypeAlias = Annotated[float, Meta(ge=-100, le=100)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
UpTo100: TypeAlias = Annotated[float, Meta(ge=0, le=100)]
LastN: TypeAlias = Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)]
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

    temperature: UpTo100 = 0.1  # 0: always the likeliest
    top_k: Count = 0  # 0: off
    top_p: Share = 1.0  # 1: off
    min_p: Share = 0.0  # 0: off
    repeat_penalty: Annotated[float, Meta(ge=0.01, le=100)] = 1.0  # 1: off
    # how many tokens back the three penalties look; 0: none, -1: all
    repeat_last_n: LastN = 64
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: Annotated[tuple[tuple[TokenId, Bias], ...], Meta(max_length=BIASES)] = ()
    seed: Id = 0
    typical_p: Share = 1.0  # 1: off
    top_n_sigma: Annotated[float, Meta(ge=-1, le=1000)] = -1.0  # not above 0: off
    dynatemp_range: UpTo100 = 0.0  # 0: off
    dynatemp_exponent: UpTo100 = 1.0
    dry_multiplier: UpTo100 = 0.0  # 0: off
    dry_base: Annotated[float, Meta(ge=1, le=100)] = 1.75
    dry_allowed_length: Annotated[int, Meta(ge=0, le=1024)] = 2
    dry_penalty_last_n: LastN = 64  # how many tokens back it looks; 0: none, -1: all
    dry_sequence_breakers: Annotated[tuple[Word, ...], Meta(max_length=BREAKERS)] = (
        "\n", ":", '"', "*",
    )  # fmt: skip
    xtc_probability: Share = 0.0  # 0: off
    xtc_threshold: Share = 0.1  # above 0.5: off

    def __post_init__(self) -> None:
        for name, bounds in _bounds().items():
            _check(name, getattr(self, name), bounds, whole=name in _WHOLE)
        for token, bias in self.logit_bias:
            _check("logit_bias", token, _meta(TokenId), whole=True)
            _check("logit_bias", bias, _meta(Bias), whole=False)
        if (count := len(self.dry_sequence_breakers)) > BREAKERS:
            raise BadRequest(f"{_BREAKERS} has {count} texts, more than {BREAKERS}", _BREAKERS)
        for text in self.dry_sequence_breakers:
            if len(text.encode(errors="replace")) > LONGEST_BREAKER:
                rule = f"must be of {LONGEST_BREAKER} bytes at most"
                raise BadRequest(f"{_BREAKERS}: each {rule}, not {text!r:.80}", _BREAKERS)

    @property
    def has_dry(self) -> bool:
        """Whether repetitions are penalised."""
        return self.dry_multiplier > 0 and self.dry_penalty_last_n != 0

    @property
    def has_xtc(self) -> bool:
        """Whether the likeliest tokens may be left out."""
        return self.xtc_probability > 0 and self.xtc_threshold <= 0.5

    @property
    def takes_likeliest(self) -> bool:
        """Whether the choice is that of the highest logit, once the penalties are applied."""
        is_cold = self.temperature == 0 and self.dynatemp_range == 0
        return is_cold and self.typical_p == 1 and not self.has_xtc


_WHOLE = {"top_k", "repeat_last_n", "seed", "dry_allowed_length", "dry_penalty_last_n"}
_BREAKERS = "dry_sequence_breakers"


@lru_cache(maxsize=1)
def _bounds() -> dict[str, Meta]:
    """The bounds of each number, by its field: those in its annotation."""
    hints = get_type_hints(Sampling, include_extras=True)
    return {n: _meta(hint) for n, hint in hints.items() if n not in ("logit_bias", _BREAKERS)}


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


# --- the choice --------------------------------------------------------------------------------


def choose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    position: int,
    *,
    n_vocab: int | None = None,
    breakers: Breakers = NO_BREAKERS,
) -> TokenId:
    """Choose the token at `position` from its logits; `history` is all tokens before it.

    `row` has shape (vocabulary,) and is left as it was. Ids of `n_vocab` and above cannot be chosen
    (a draft's vocabulary may be padded further than its target's); biased or penalised ids beyond
    the row are skipped. `breakers` are the settings' sequence breakers in the model's tokens.
    Raises BadScores for a row with NaN or +inf, or without any finite value.
    """
    return decide(row[:n_vocab], sampling, history, position, breakers)[0]


def decide(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    position: int,
    breakers: Breakers = NO_BREAKERS,
) -> tuple[TokenId, float]:
    """The choice of `choose`, and its margin: by how many logits it won, noise included.

    Filters aside, one logit may move that far before another token is chosen. A margin of `NEAR` or
    more may be overstated, as rivals that far off are not looked for; it is at most `FAR`.
    """
    with np.errstate(over="ignore"):  # a logit too far behind for a float becomes -inf
        row = _adjust(row, sampling, history, breakers)
        token, top = likeliest(row)
        if sampling.takes_likeliest:
            return token, _lead(row, token, top)
        key = key_of(sampling.seed, position)
        found, temperature = _field(row, sampling, top, key)
        return _draw(found, temperature, key)


def propose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    position: int,
    *,
    n_vocab: int | None = None,
    breakers: Breakers = NO_BREAKERS,
) -> Drafted:
    """The choice of `choose`, and its confidence: its softmax among logits plus noise.

    The noise is scaled by the temperature, as in the choice. So the confidence judges the lead that
    another model's logits must overcome to choose otherwise. At temperature 0 it is the token's
    probability. The probability at the given temperature would say little: at a low one it is near
    1 for nearly every token. Tokens that a filter left out compete as well, unless it left out the
    likeliest.
    """
    with np.errstate(over="ignore"):
        row = _adjust(row[:n_vocab], sampling, history, breakers)
        token, top = likeliest(row)
        if sampling.takes_likeliest:
            return Drafted(token, 1.0 / filters.mass(row, top))
        key = key_of(sampling.seed, position)
        found, temperature = _field(row, sampling, top, key)
        token, _ = _draw(found, temperature, key)
        judged = found if found.top < top else Candidates.of(row, top)
        return Drafted(token, _confidence(judged, token, temperature, key))


def runners_up(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    token: TokenId,
    count: int,
    breakers: Breakers = NO_BREAKERS,
) -> tuple[TokenId, ...]:
    """The next likeliest behind `history` if it is not `token`: by logit plus noise, best first.

    At most `count` of them, and none that could not be chosen at all. What a filter would leave out
    may be among them.
    """
    with np.errstate(over="ignore"):
        row = _adjust(row, sampling, history, breakers)
        near = filters.top_k(row, min(_RIVALS, row.size))
        noise = keyed(key_of(sampling.seed, len(history)), near.astype(np.uint64))
        scores = row[near].astype(np.float64) + sampling.temperature * noise
    order = near[np.argsort(-scores)][: count + 1]
    return tuple(int(one) for one in order if one != token and row[one] > -np.inf)[:count]


def _field(row: Scores, sampling: Sampling, top: float, key: IdArray) -> tuple[Candidates, float]:
    """The tokens that pass the filters, and the temperature at which one of them is drawn."""
    found = Candidates.of(row, top)
    if sampling.top_n_sigma > 0.0 and row.size > 1:
        kept = filters.top_n_sigma(row, sampling.top_n_sigma)
        found = found.only(kept, masked=row.size - kept.size)
    if 0 < sampling.top_k < found.count:
        k = min(sampling.top_k, found.ids.size)
        found = found.only(filters.top_k(found.logits, k), masked=sampling.top_k - k)
    if sampling.typical_p < 1.0:
        found = found.only(filters.typical(found.logits, sampling.typical_p, found.top))
    if sampling.top_p < 1.0:
        found = found.only(filters.top_p(found.logits, sampling.top_p, found.top))
    if sampling.min_p > 0.0:
        found = found.only(filters.min_p(found.logits, sampling.min_p, found.top))
    if sampling.has_xtc and chance(key) <= sampling.xtc_probability:
        found = found.without(filters.xtc(found.logits, sampling.xtc_threshold, found.top))
    temperature, spread = sampling.temperature, sampling.dynatemp_range
    if spread > 0.0:
        exponent = sampling.dynatemp_exponent
        temperature = filters.dynamic_temperature(found, temperature, spread, exponent)
    return found, temperature


def _draw(found: Candidates, temperature: float, key: IdArray) -> tuple[TokenId, float]:
    """The choice among these, and its margin."""
    if temperature == 0.0:
        at = int(found.logits.argmax())
        return int(found.ids[at]), _lead(found.logits, at, found.top)
    temperature = max(temperature, 1e-30)  # below that, float32 logits tell no more apart
    return race(found.ids, found.logits, found.top, temperature, key)


def _lead(logits: Scores, at: int, top: float) -> float:
    """By how much the highest logit, `top`, at this index, is above the others."""
    rivals = [float(part.max()) for part in (logits[:at], logits[at + 1 :]) if part.size]
    return min(top - max(rivals, default=-math.inf), FAR)


def _confidence(found: Candidates, token: TokenId, temperature: float, key: IdArray) -> float:
    """The share of `token` among the exponentials of logits plus noise."""
    logits, top = found.logits, found.top
    at = int(np.searchsorted(found.ids, np.uint64(token)))
    near = np.union1d(filters.top_k(logits, min(_RIVALS, logits.size)), [at])
    noise = temperature * keyed(key, found.ids[near])
    plain = logits[near].astype(np.float64) - top
    noisy = plain + noise
    won = float(noisy[near == at][0])
    # the noise of the rest hardly matters
    rest = max(0.0, filters.mass(logits, top) - float(np.exp(plain).sum()))
    others = float(np.exp(noisy - won).sum())
    return 1.0 / (others + rest * math.exp(min(-won, 700.0)))


def likeliest(row: Scores) -> tuple[TokenId, float]:
    """The id of the highest logit (the lowest on a tie), and that logit. Raises BadScores."""
    token = int(row.argmax()) if row.size else 0  # a NaN counts as the highest
    top = float(row[token]) if row.size else -math.inf
    if not math.isfinite(top):
        raise BadScores(top)
    return token, top


def _adjust(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    breakers: Breakers = NO_BREAKERS,
) -> Scores:
    """`row` with bias and penalties, a copy only if there are any."""
    repeat, presence = sampling.repeat_penalty, sampling.presence_penalty
    frequency = sampling.frequency_penalty
    recent: Sequence[TokenId] = ()
    if repeat != 1.0 or presence != 0.0 or frequency != 0.0:
        recent = _last(history, sampling.repeat_last_n)
    repeated = _last(history, sampling.dry_penalty_last_n) if sampling.has_dry else ()
    if not (sampling.logit_bias or recent or repeated):
        return row
    row = row.copy()
    for token, bias in sampling.logit_bias:
        if token < row.size:
            row[token] += np.float32(bias)
    if recent:
        penalise(row, recent, repeat, presence, frequency)
    if repeated:
        penalise_repetition(
            row,
            repeated,
            sampling.dry_multiplier,
            sampling.dry_base,
            sampling.dry_allowed_length,
            breakers,
        )
    return row


def _last(history: Sequence[TokenId], count: int) -> Sequence[TokenId]:
    """The last `count` tokens, or all if it is negative."""
    return history if count < 0 else history[max(0, len(history) - count) :]
