"""The draft's half of the commit rule: its text, and where that is cut to follow the target's.

`outrider.core.stock` is the other half. Both apply the same rule to the same messages, so they
agree on lineages and positions without asking each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from outrider.core.branches import Branch, Branches, Found
from outrider.core.estimates import usual_acceptance
from outrider.core.events import Commit, OpenDraft
from outrider.core.values import Drafted, Sides, TokenId

AT_ONCE = 128  # unread tokens of the text: more are read even without leave to draft
CUT_SHORT = 16  # a reading of at most so many tokens is given up halfway, to free the cores


@dataclass(frozen=True, slots=True)
class Begun:
    """The text that a drafter was asked about; it may have changed when the answer comes."""

    lineage: int
    read: int  # the drafter has taken in so many of its tokens before
    tokens: tuple[TokenId, ...]
    may_draft: bool  # else the text is only to be taken in


@dataclass(slots=True)
class Stream:
    """A request's text as the draft sees it: what is committed, then what it drafted itself."""

    tokens: list[TokenId]
    lineage: int
    until: int  # its leave: it may not draft this position
    committed: int  # tokens before this position are the target's
    ends: frozenset[TokenId] = frozenset()
    floors: tuple[float, ...] = ()  # see `events.Commit`
    likely: list[float] = field(default_factory=list)  # usual acceptances of what it drafted
    read: int = 0  # tokens that the drafter has taken in, or is to skip, and that still stand
    is_silent: bool = False  # it has no idea what may follow
    branches: Branches | None = None  # what it has drafted for the case that it is wrong
    adopted: Branch | None = None  # onto which a commit has led, until the drafter has followed
    most_sides: int = 0  # it tells of so many tokens of branches …
    told: Sides | None = None  # … and has told of these
    foreseen: tuple[Drafted, ...] = ()  # what that has brought behind the committed text

    @classmethod
    def opened(cls, order: OpenDraft, context: int) -> Stream:
        """The stream that `order` begins, in a drafter that has room for `context` tokens."""
        return cls(
            tokens=list(order.tokens),
            lineage=order.lineage,
            until=min(order.until, context),
            committed=order.base,
            ends=frozenset(order.ends),
            floors=order.floors,
            most_sides=order.sides,
            likely=[1.0] * (len(order.tokens) - order.base),
            read=min(order.skip, len(order.tokens) - 1),
        )

    # ---- what the target says -------------------------------------------------------------------

    def commit(self, order: Commit, context: int) -> bool:
        """Take over the target's tokens and the new leave; True if the stream was cut for them."""
        self.until, self.floors = min(order.until, context), order.floors
        return self.follow(order.base, order.tokens)

    def follow(self, base: int, tokens: Sequence[TokenId]) -> bool:
        """Take over the target's `tokens` from position `base` on; True if it was cut for them.

        At the first difference the stream is cut, the truth appended, and a new lineage begins. If
        that was foreseen, it goes on with what was drafted for the case: `adopted`.
        """
        cut, adopted = False, None
        self.is_silent = self.is_silent and not tokens
        for position, token in enumerate(tokens, base):
            if position < len(self.tokens):
                if self.tokens[position] == token:
                    continue
                del self.tokens[position:]
                self.read = min(self.read, position)
                self.lineage += 1
                self.likely.clear()
                if before := self.branches:
                    adopted = before.corrected(position, tokens[position - base :])
                    self.branches = before.anew()
                cut = True
            self.tokens.append(token)
        del self.likely[: len(tokens)]
        self.committed = base + len(tokens)
        if self.branches:
            self.branches.committed(self.committed)
        if cut:
            self._adopt(adopted)
        return cut

    def _adopt(self, branch: Branch | None) -> None:
        """Go on with what `branch` has drafted behind the committed text, as far as it may."""
        self.adopted, self.foreseen = branch, ()
        if branch is None:
            return
        room = max(0, self.until - self.committed)
        taken = branch.found[self.committed - branch.place - 1 :][:room]
        for found in taken:
            self._append(found)
        self.foreseen = tuple(found.drafted for found in taken)

    def _append(self, found: Found) -> None:
        if self.branches and found.others:
            self.branches.offer(len(self.tokens), found.others)
        self.tokens.append(found.drafted.token)
        self.likely.append(usual_acceptance(found.drafted.confidence))

    # ---- what it drafts -------------------------------------------------------------------------

    def begin(self) -> Begun:
        """The text to go on from, as it is now."""
        return Begun(self.lineage, self.read, tuple(self.tokens), self.may_draft)

    def took(
        self,
        begun: Begun,
        read: int,
        drafted: Sequence[Drafted],
        others: tuple[TokenId, ...] = (),
    ) -> tuple[Drafted, ...]:
        """Append what was `drafted` behind the text `begun`, now taken in up to position `read`.

        `others` could be in the place of the first of them. Returns the part that counts: nothing
        if the text has changed or there was no leave; else the first token, and as many more as
        leave, floors and an end token now allow.
        """
        if begun.lineage != self.lineage:
            return ()
        self.read = read
        if len(begun.tokens) != len(self.tokens) or not begun.may_draft:
            return ()  # perhaps the target has said what comes here
        is_reading = begun.read < read < len(self.tokens)
        self.is_silent = not drafted and not is_reading
        taken: list[Drafted] = []
        for one in drafted:
            if taken and not self.may_draft:
                break
            self._append(Found(one, () if taken else others))
            taken.append(one)
        return tuple(taken)

    def candidates(self, context: int) -> list[tuple[float, Branch]]:
        """What the next token of each branch is worth, if `context` tokens have room for it."""
        if self.branches is None or self.floors or self.adopted:
            return []
        return [
            (value, branch)
            for value, branch in self.branches.candidates(self.committed, self.likely)
            if branch.tokens[-1] not in self.ends and branch.place + len(branch.tokens) < context
        ]

    def news(self) -> Sides | None:
        """What the target may verify beside what was drafted, if that has changed."""
        if self.branches is None or not self.most_sides:
            return None
        sides = self.branches.sides(self.committed, self.likely, self.most_sides)
        before, self.told = self.told, Sides(self.lineage, sides)
        return self.told if self.told != before else None

    @property
    def reach(self) -> float:
        """How likely all that it has drafted is right, and with it that the next token counts."""
        return math.prod(self.likely)

    @property
    def has_work(self) -> bool:
        """Whether there is a token to draft, or a long text to read beforehand."""
        return self.may_draft or len(self.tokens) - self.read > AT_ONCE

    @property
    def may_draft(self) -> bool:
        """Whether it may draft a token now."""
        return not (self.is_full or self.is_paused or self.has_ended or self.is_silent)

    @property
    def is_full(self) -> bool:
        """Whether it has used up its leave."""
        return len(self.tokens) >= self.until

    @property
    def is_paused(self) -> bool:
        """Whether what it drafted is too unlikely to be accepted for going on."""
        drafted = len(self.likely)
        return 0 < drafted <= len(self.floors) and self.reach < self.floors[drafted - 1]

    @property
    def has_ended(self) -> bool:
        """Whether it has drafted an end token: nothing follows."""
        return len(self.tokens) > self.committed and self.tokens[-1] in self.ends

    @property
    def is_to_stop(self) -> bool:
        """Whether to give up reading for a token beyond its leave; a long reading goes on."""
        return self.until <= len(self.tokens) <= self.read + CUT_SHORT
