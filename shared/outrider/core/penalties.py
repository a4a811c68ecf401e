"""llama.cpp's penalties for tokens that are in the text already, and for repeating a part of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.core.noise import Scores
from outrider.core.values import TokenId

Tail: TypeAlias = tuple[TokenId, ...]

LARGEST = 88.7228391  # the logarithm of the largest float32, as llama.cpp has it
LONGEST = 512  # tokens more in a repetition than are allowed: a longer one is penalised like this
LONGEST_TAIL = 20  # tokens of a breaker behind its first


@dataclass(frozen=True, slots=True)
class Breakers:
    """At which tokens a repetition ends, as DRY counts it; see `outrider.engines.breakers`.

    `tails` has, by the token that a breaker begins with, what must follow for it to be one: nothing
    where that token contains the whole of it.
    """

    tails: Mapping[TokenId, tuple[Tail, ...]] = field(default_factory=dict)

    def since(self, text: Sequence[TokenId], most: int) -> int:
        """How many tokens are behind the last breaker in `text`, if they are `most` or fewer."""
        for back in range(min(len(text), most + LONGEST_TAIL)):
            if tails := self.tails.get(text[-1 - back]):
                behind = tuple(text[len(text) - back :][:LONGEST_TAIL])
                if fit := [len(tail) for tail in tails if behind[: len(tail)] == tail]:
                    return back - max(fit)
        return len(text)

    def is_one(self, token: TokenId) -> bool:
        """Whether this token alone is a breaker."""
        return () in self.tails.get(token, ())


NO_BREAKERS = Breakers()


def penalise(
    row: Scores, recent: Sequence[TokenId], repeat: float, presence: float, frequency: float
) -> None:
    """llama.cpp's repetition, frequency and presence penalties, in place."""
    seen, counts = np.unique(np.asarray(recent, np.int64), return_counts=True)
    known = seen < row.size
    seen, counts = seen[known], counts[known].astype(np.float32)
    logits = row[seen]
    factor = np.float32(repeat)
    logits = np.where(logits <= 0, logits * factor, logits / factor)
    logits -= counts * np.float32(frequency)
    logits -= np.float32(presence)
    row[seen] = logits


def penalise_repetition(
    row: Scores,
    recent: Sequence[TokenId],
    multiplier: float,
    base: float,
    allowed: int,
    breakers: Breakers,
) -> None:
    """llama.cpp's DRY ("don't repeat yourself"), in place.

    A token that would make a repetition longer than `allowed` tokens loses
    multiplier * base ** (length - allowed) logits, where the length is that of the longest part of
    the text that ends it and came before, followed by this token.
    """
    if len(recent) <= allowed:
        return
    base = float(np.float32(base))
    most = allowed + LONGEST
    if base > 1.000001:
        most = min(most, allowed + (int(LARGEST / math.log(base)) or LONGEST))
    most = min(most, breakers.since(recent, most))
    if most < allowed:
        return
    for token, length in repetitions(np.asarray(recent, np.int64), allowed, most).items():
        if token < row.size and not breakers.is_one(token):
            row[token] -= np.float32(float(np.float32(multiplier)) * base ** (length - allowed))


def repetitions(text: NDArray[np.int64], least: int, most: int) -> dict[TokenId, int]:
    """By token: how many tokens, `least` to `most`, are repeated already where it is next again.

    The end of the text is compared with what stands before each of its tokens.

    >>> repetitions(np.array([1, 2, 3, 9, 2, 3, 8, 1, 2, 3]), 1, 9)
    {8: 2, 9: 3}
    """
    ends = np.arange(text.size - 1)  # where something that is repeated may end
    longest = np.zeros(ends.size, np.int64)
    for length in range(most):
        ends = ends[np.searchsorted(ends, length) :]
        ends = ends[text[ends - length] == text[-1 - length]]
        if not ends.size:
            break
        longest[ends] = length + 1
    found = np.flatnonzero(longest >= least)
    ranked = found[np.argsort(longest[found], kind="stable")]  # of equal tokens the last counts
    return dict(zip(text[ranked + 1].tolist(), longest[ranked].tolist(), strict=True))
