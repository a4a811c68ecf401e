"""The session's half of the commit rule: what has been drafted ahead of the committed text.

`outrider.core.stream` is the other half, in the draft worker. A drafted token is good if its
lineage is the current one and the text at its position, as far as there is any, agrees. The first
that does not is where the draft will have cut its stream, or is about to: what it still sends of
that lineage is stale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.values import Drafted, Proposal, TokenId, Verdict, ids_of


@dataclass(frozen=True, slots=True)
class Judged:
    """What the text has shown of drafted tokens."""

    agreed: Sequence[Drafted]
    differed: Drafted | None = None  # the first; what stood behind it says nothing
    hits: int = 0  # agreed without having been verified
    broken: bool = False  # a new lineage has begun
    discarded: int = 0


class Stock:
    """Drafted tokens in order, the first of which may be under verification."""

    def __init__(self) -> None:
        self.drafted: list[Drafted] = []
        self.lineage = 0
        self._next = 0  # where the lineage's next token may stand, at the earliest

    def __len__(self) -> int:
        return len(self.drafted)

    def open(self, text: Sequence[TokenId]) -> tuple[TokenId, ...]:
        """A draft worker is to go on behind what there is: the stream that it begins with."""
        stream = (*text, *ids_of(self.drafted))
        self.lineage += 1
        self._next = len(stream)
        return stream

    def may_be(self, proposal: Proposal, text: Sequence[TokenId]) -> bool:
        """Whether a draft worker that keeps the rules could have sent this now."""
        end = len(text) + len(self.drafted)
        return proposal.lineage == self.lineage and self._next <= proposal.position <= end

    def take(self, proposal: Proposal, text: Sequence[TokenId]) -> Judged:
        """Add what was drafted. Where the text has come that far, it is judged by it at once."""
        agreed: list[Drafted] = []
        for at, one in enumerate(proposal.drafted):
            where = proposal.position + at
            if where >= len(text):
                self.drafted.append(one)
            elif one.token == text[where]:
                agreed.append(one)
            else:
                unseen = len(proposal.drafted) - at
                return Judged(agreed, one, len(agreed), True, unseen + self._break(where))
            self._next = where + 1
        return Judged(agreed, hits=len(agreed))

    def commit(self, block: int, verdict: Verdict, text: Sequence[TokenId]) -> Judged:
        """Drop what the verdict on the first `block` tokens covers, and all of it if it differs.

        `text` ends with the verdict's tokens.
        """
        accepted, last = verdict.accepted, len(text) - 1
        agreed, rest = self.drafted[:accepted], self.drafted[accepted:]
        if accepted < block:
            self.drafted = self.drafted[block:]
            return Judged(agreed, rest[0], 0, True, self._break(last))
        if not rest:
            self.drafted = []
            return Judged(agreed)
        if rest[0].token == text[last]:
            self.drafted = rest[1:]
            return Judged([*agreed, rest[0]], hits=1)
        self.drafted = rest
        return Judged(agreed, rest[0], 0, True, self._break(last))

    def _break(self, where: int) -> int:
        """The draft's stream differs from the text at position `where`: its lineage ends there.

        Returns how many tokens are void.
        """
        void = len(self.drafted)
        self.drafted = []
        self.lineage += 1
        self._next = where + 1
        return void
