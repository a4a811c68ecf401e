"""The orders on their way to the target, and what is left of each when its turn comes.

The session and the target worker keep the same account of the same messages, so they agree on it
without asking each other. An order says which tokens the session expects from a position on. It may
be sent before the verdict on the one before; then it begins with the token that the target is
expected to choose itself behind that block. The target compares it with the text that there is when
its turn comes: what agrees is done, and the rest is the next block. At a difference the order is
dropped, and with it those that follow from it.

Where no order is left the target may go on by itself, with plain steps up to `Verify.until`.

Two orders ahead of their verdicts, a hit and a miss (round 2 follows round 1, and 3 follows 2)
    session      1: d1 d2    2: t3 d4 d5    3: t6 d7
    target       chooses d1 d2 t3: the rest of 2 is d4 d5, which it begins at once
                 chooses d4 u5, u5 ≠ d5: it drops 3, goes on with a plain step, or waits
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from outrider.core.values import Beside, Block, Side, TokenId, Verify

NO_SIDES: Beside = ()
MOST_WAITING = 16  # orders; a correct session keeps to less, but for those that can be dropped


class Orders:
    """Those that wait, oldest first. For the session the one in work is among them."""

    def __init__(self) -> None:
        self.waiting: deque[Verify] = deque()
        self.round = 0  # of the latest one that was begun, or dropped before a step without one
        self.block, self.sides = 0, NO_SIDES  # what was left of that one, and its sides
        self.latest = -1  # round of the last that was added
        self.until = 0  # as that one says
        self.leave = 0  # the farthest `until` of any: the target may have heard of no later one
        self._dropped = 0  # round of the latest one that was
        self._broken = -1  # round of the latest one that the text contradicts

    def add(self, order: Verify) -> None:
        self.waiting.append(order)
        self.latest = order.round
        self.until, self.leave = order.until, max(self.leave, order.until)

    def rest(self, text: Sequence[TokenId]) -> Block | None:
        """What is left to verify of the next order; None: there is none. Drops those before it.

        What is dropped here can have no effect behind any longer text.
        """
        while self.waiting:
            if (rest := self._compared(self.waiting[0], text)) is not None:
                return rest
            self._dropped = self.waiting.popleft().round
        return None

    def make_room(self, text: Sequence[TokenId]) -> None:
        """In the midst of a pass: drop those of which nothing can be left when it is over."""
        while self.waiting:
            order = self.waiting[0]
            is_open = order.base > len(text) and not self._follows_broken(order)
            if is_open or self._compared(order, text) is not None:
                return
            self._dropped = self.waiting.popleft().round

    def goes_on(self, text: Sequence[TokenId]) -> bool:
        """Whether the target has something to do, if only a plain step, unless `text` has ended."""
        return self.rest(text) is not None or len(text) < self.until

    def rows(self, text: Sequence[TokenId]) -> list[int]:
        """Of the passes that the target makes next, if each block is accepted whole."""
        if (rest := self.rest(text)) is None:
            return [1]
        return [len(rest) + 1, *(max(1, len(one.drafted)) for one in list(self.waiting)[1:])]

    def extend(self, until: int) -> None:
        """The target may go farther by itself; the order that says so asks for nothing else."""
        self.until = self.leave = until

    def judged(self, is_whole: bool) -> None:
        """The block of the order that was begun last was accepted whole, or it was not."""
        if not is_whole:
            self._broken = self.round

    def take(self, text: Sequence[TokenId]) -> Block | None:
        """In the target worker: the next block; empty: a plain step; None: nothing to do."""
        if (rest := self.rest(text)) is not None:
            return self._begun(text, rest)
        self.round = max(self.round, self._dropped)
        self.block, self.sides = 0, NO_SIDES
        return () if len(text) < self.until else None

    def answered(self, round: int, text: Sequence[TokenId]) -> Block | None:
        """In the session: what the verdict of `round` behind `text` is on.

        None: no target that keeps the rules has made it, or not for this text.
        """
        rest, following = self.rest(text), self.waiting[0].round if self.waiting else None
        if rest is not None and following == round:
            return self._begun(text, rest)
        self.block, self.sides = 0, NO_SIDES
        is_own = len(text) < self.leave and (following is None or round < following)
        return () if is_own else None

    @property
    def beside(self) -> int:
        """In the session: the position up to which sides reach that the target may evaluate."""
        sides = (side for order in self.waiting for side in order.sides)
        return max((side.place + len(side.drafted) for side in sides), default=0)

    def side(self, number: int) -> Side | None:
        """That of the order that was begun last, counted from 1; None: there is none such."""
        return self.sides[number - 1] if 1 <= number <= len(self.sides) else None

    def _begun(self, text: Sequence[TokenId], rest: Block) -> Block:
        order = self.waiting.popleft()
        self.round, self.block = order.round, len(rest)
        self.sides = tuple(side for side in order.sides if side.place >= len(text))
        return rest

    def _compared(self, order: Verify, text: Sequence[TokenId]) -> Block | None:
        """What `text` leaves of the order; None: nothing, as it is done, or contradicted."""
        drafted, known = order.drafted, tuple(text[order.base :])
        is_void = order.base > len(text) or self._follows_broken(order)
        if is_void or known[: len(drafted)] != drafted[: len(known)]:
            self._broken = order.round
            return None
        return drafted[len(known) :] if len(known) <= len(drafted) else None

    def _follows_broken(self, order: Verify) -> bool:
        return order.follows and self._broken >= order.round - 1
