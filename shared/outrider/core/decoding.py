"""Which drafted tokens are accepted: those that the target chose itself.

Verifying by equality keeps the text exactly the target's own, for `choose` draws each choice from
the target's distribution with noise that depends on the position alone (`outrider.core.sampling`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

from outrider.core.sampling import Token


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of a verify round: `tokens` is what to commit, its first `accepted` drafted.

    Behind the accepted ones comes one token of the target's own, a correction or, after a block
    accepted whole, a bonus. Only an accepted end token has nothing behind it.
    """

    accepted: int
    tokens: tuple[Token, ...]


def verify(
    drafted: Sequence[Token], choices: Iterable[Token], ends: Container[Token] = ()
) -> Verdict:
    """Keep the longest prefix of `drafted` that the target chose itself, and its next own token.

    `choices` is read up to the first difference, for later rows saw another prefix, or up to the
    first of `ends`, for nothing follows an end token. An empty draft is plain decoding.

    >>> verify([1, 2, 3], [1, 2, 9])
    Verdict(accepted=2, tokens=(1, 2, 9))
    >>> verify([1, 2, 3], [1, 2, 3, 4])
    Verdict(accepted=3, tokens=(1, 2, 3, 4))
    >>> verify([], [7])
    Verdict(accepted=0, tokens=(7,))
    >>> verify([1, 0, 3], [1, 0], ends={0})
    Verdict(accepted=2, tokens=(1, 0))
    """
    for accepted, choice in enumerate(choices):
        if accepted == len(drafted) or drafted[accepted] != choice:
            return Verdict(accepted, (*drafted[:accepted], choice))
        if choice in ends:
            return Verdict(accepted + 1, tuple(drafted[: accepted + 1]))
    raise ValueError("the last row needs a choice too")
