"""Which drafted tokens are accepted: those that the target chose itself.

Verifying by equality keeps the text exactly the target's own: `choose` draws each choice from the
target's distribution, with noise that depends on the position alone (`outrider.core.sampling`).
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from outrider.core.values import Beside, Block, Side, TokenId, Verdict


def verify(
    drafted: Sequence[TokenId], choices: Iterable[TokenId], ends: Container[TokenId] = ()
) -> Verdict:
    """Keep the longest prefix of `drafted` that the target chose itself, and its next own token.

    `choices` is read up to the first difference, because later rows saw another prefix, or up to
    the first of `ends`, because nothing follows an end token. With nothing drafted this is plain
    decoding. Raises ValueError if `choices` ends too early.

    >>> verdict = verify([1, 2, 3], [1, 2, 9])
    >>> verdict.accepted, verdict.tokens
    (2, (1, 2, 9))
    >>> verify([1, 2, 3], [1, 2, 3, 4]).tokens
    (1, 2, 3, 4)
    >>> verify([], [7]).tokens
    (7,)
    >>> verify([1, 0, 3], [1, 0], ends={0}).tokens
    (1, 0)
    """
    for accepted, choice in enumerate(choices):
        if accepted == len(drafted) or drafted[accepted] != choice:
            return Verdict(accepted, (*drafted[:accepted], choice))
        if choice in ends:
            return Verdict(accepted + 1, tuple(drafted[: accepted + 1]))
    raise ValueError("the last row needs a choice too")


def leads_to(verdict: Verdict, base: int, drafted: Block, sides: Beside) -> int:
    """Which of the `sides` goes on where the `verdict` on `drafted` ends, from 1; 0: none."""
    if verdict.accepted < len(drafted) and len(verdict.tokens) > verdict.accepted:
        place, correction = base + verdict.accepted, verdict.tokens[-1]
        for number, side in enumerate(sides, 1):
            if side.place == place and side.drafted[0].token == correction:
                return number
    return 0


def joined(verdict: Verdict, beside: Verdict, number: int) -> Verdict:
    """A `verdict` with a correction, and that on what side `number` has behind the correction."""
    accepted = len(verdict.tokens) + beside.accepted
    return Verdict(accepted, (*verdict.tokens, *beside.tokens), side=number)


def contradiction(
    verdict: Verdict,
    drafted: Sequence[TokenId],
    ends: Container[TokenId],
    vocabulary: int,
    side: Side | None = None,
) -> str | None:
    """What makes this `verdict` on `drafted` impossible; None if it is possible.

    With a `side`, `drafted` are the tokens where the target has gone. It knows ids below
    `vocabulary`.
    """
    tokens, accepted = verdict.tokens, verdict.accepted
    if verdict.side and (side is None or accepted <= side.place - verdict.base):
        return "a side where it has not gone"
    if side and verdict.forbidden:
        return "a side of a block that it has cut"
    block = len(drafted) - verdict.forbidden
    ended = bool(tokens) and accepted == len(tokens) and tokens[-1] in ends
    if accepted > block or not (ended or len(tokens) == accepted + 1):
        return f"{accepted} accepted of {block}, but {len(tokens)} tokens"
    for said in (verdict.pieces, verdict.margins, verdict.logprobs, verdict.top_logprobs):
        if said is not None and len(said) != len(tokens):
            return "not one text, margin and probability for each token"
    if any(token >= vocabulary for token in tokens):
        return "a token outside its vocabulary"
    if any(one != other for one, other in zip(drafted[:accepted], tokens, strict=False)):
        return "an accepted token that was not drafted"
    if accepted < min(len(drafted), len(tokens)) and drafted[accepted] == tokens[accepted]:
        return "a correction that was drafted"
    return None
