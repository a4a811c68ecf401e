"""How likely the target found what it chose, and what it could have chosen instead."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from outrider.core.filters import mass, top_k
from outrider.core.noise import Scores
from outrider.core.sampling import likeliest
from outrider.core.values import TokenId, TopLogprob

Likelihoods = tuple[tuple[float, ...], tuple[tuple[TopLogprob, ...], ...] | None]


def likelihoods(
    rows: Iterable[Scores], tokens: Sequence[TokenId], most: int, piece: Callable[[TokenId], bytes]
) -> Likelihoods:
    """The `logprob` of each token in its row, and the `most` likeliest of each row unless `most` is
    0; `piece` tells the bytes of a token.
    """
    pairs = list(zip(rows, tokens, strict=False))
    logprobs = tuple(logprob(row, token) for row, token in pairs)
    if not most:
        return logprobs, None
    found = (top_logprobs(row, most) for row, _ in pairs)
    return logprobs, tuple(tuple(TopLogprob(t, piece(t), p) for t, p in one) for one in found)


def logprob(row: Scores, token: TokenId) -> float:
    """The natural log-probability of `token` in plain `row`: no penalty, filter or temperature."""
    return _logprobs(row, [token])[0]


def top_logprobs(row: Scores, most: int) -> list[tuple[TokenId, float]]:
    """The likeliest tokens of plain `row` and their `logprob`, in order (the lower id on a tie)."""
    ids = top_k(row, min(most, row.size))
    ranked: list[TokenId] = ids[np.argsort(-row[ids], kind="stable")].tolist()
    return list(zip(ranked, _logprobs(row, ranked), strict=True))


def _logprobs(row: Scores, tokens: Sequence[TokenId]) -> list[float]:
    _, top = likeliest(row)
    with np.errstate(over="ignore"):
        total = math.log(mass(row, top))
    return [float(row[token]) - top - total for token in tokens]
