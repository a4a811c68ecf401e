"""The session's half of the commit rule: what has been drafted ahead of the committed text.

`outrider.core.stream` is the other half, in the draft worker. A drafted token is good if it is of
the current lineage and does not differ from the text at its position. At the first one that differs
the draft cuts its stream, once it hears of it. What it still sends of the old lineage is stale.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.values import Beside, Drafted, Proposal, Side, Sides, TokenId, Verdict, ids_of


@dataclass(frozen=True, slots=True)
class Judged:
    """Which drafted tokens the text has shown to be right, and which wrong."""

    agreed: Sequence[Drafted]
    # the first that does, with which a new lineage begins; those behind it show nothing
    differed: Drafted | None = None
    hits: int = 0  # those that agreed and were never verified
    discarded: int = 0  # but for those that a constraint forbids


class Stock:
    """Drafted tokens in order; those under verification come first."""

    def __init__(self) -> None:
        self.drafted: list[Drafted] = []
        self.sides: Beside = ()  # what may follow where these are wrong
        self.lineage = 0
        self._next = 0  # the earliest position of the lineage's next token

    def __len__(self) -> int:
        return len(self.drafted)

    def open(self, text: Sequence[TokenId]) -> tuple[TokenId, ...]:
        """Begin a lineage behind text and stock; return both, a draft worker's first stream."""
        stream = (*text, *ids_of(self.drafted))
        self.lineage += 1
        self._next = len(stream)
        return stream

    def may_be(self, proposal: Proposal, text: Sequence[TokenId]) -> bool:
        """Whether a draft worker that keeps the rules could have sent this now."""
        end = len(text) + len(self.drafted)
        follows = self._next <= proposal.position or not proposal.drafted
        return proposal.lineage == self.lineage and follows and proposal.position <= end

    def take(self, proposal: Proposal, text: Sequence[TokenId]) -> Judged:
        """Add drafted tokens; those at positions that the text has reached are judged at once."""
        agreed: list[Drafted] = []
        for at, one in enumerate(proposal.drafted):
            where = proposal.position + at
            if where >= len(text):
                self.drafted.append(one)
            elif one.token == text[where]:
                agreed.append(one)
            else:
                unseen = len(proposal.drafted) - at
                return Judged(
                    agreed,
                    differed=one,
                    hits=len(agreed),
                    discarded=unseen + self._break(where),
                )
            self._next = where + 1
        return Judged(agreed, hits=len(agreed))

    def may_tell(self, found: Sides, vocabulary: int) -> bool:
        """Whether a draft worker that keeps the rules could have told these."""
        drafted = [one for side in found.sides for one in side.drafted]
        return found.lineage <= self.lineage and all(
            one.token < vocabulary and math.isfinite(one.confidence) for one in drafted
        )

    def take_sides(self, found: Sides) -> None:
        """Take sides in the place of those before, if they are of this lineage."""
        if found.lineage == self.lineage:
            self.sides = found.sides

    def way(self, block: int, base: int, side: Side | None) -> tuple[Drafted, ...]:
        """Of `block` verified tokens behind `base`, and a side, those where the target has gone."""
        if side is None:
            return tuple(self.drafted[:block])
        return (*self.drafted[: side.place - base], *side.drafted)

    def commit(
        self, block: int, verdict: Verdict, text: Sequence[TokenId], side: Side | None = None
    ) -> Judged:
        """Drop what the `verdict` on the first `block` tokens decides; all if the text differs.

        `text` ends with the verdict's tokens; from its place on, they may be those of a `side`.
        """
        accepted, last = verdict.accepted, len(text) - 1
        if side:
            last, accepted = side.place, side.place - (len(text) - len(verdict.tokens))
        agreed, rest = self.drafted[:accepted], self.drafted[accepted:]
        if accepted < block:
            self.drafted = self.drafted[block:]
            discarded = self._break(last) - verdict.forbidden
            return Judged(agreed, differed=rest[0], discarded=discarded)
        if not rest:
            self.drafted = []
            return Judged(agreed)
        if rest[0].token == text[last]:
            self.drafted = rest[1:]
            return Judged([*agreed, rest[0]], hits=1)
        self.drafted = rest
        discarded = self._break(last) - verdict.forbidden
        return Judged(agreed, differed=rest[0], discarded=discarded)

    def drop(self) -> None:
        """Nothing of it is wanted any more."""
        self.drafted, self.sides = [], ()

    def _break(self, where: int) -> int:
        """End the lineage, which differs from the text at `where`; return how many are void."""
        void = len(self.drafted)
        self.drop()
        self.lineage += 1
        self._next = where + 1
        return void
