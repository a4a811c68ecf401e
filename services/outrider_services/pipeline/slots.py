"""The sequences of a worker's model, and the texts that those not in use still hold.

A new text goes where the longest beginning of it is held already: it takes that sequence over, or
copies from it. What one cache name has brought is never used for another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from outrider.core.values import TokenId
from outrider.errors import Overloaded

WORTH = 32  # tokens; a shorter beginning is read faster than it is copied


@dataclass(slots=True)
class Holder:
    """A sequence, and what it holds or, while it is in use, is to hold."""

    slot: int
    tokens: Sequence[TokenId] = ()  # from `skip` on; while in use they may still be read
    skip: int = 0
    cache: str | None = None  # None: for nobody else
    used: int = 0  # when it was used last: a higher number is later
    taken: int = 0  # when it was taken last
    is_free: bool = True
    has_begun: bool = False  # else the model still holds an earlier text there


class Taken(NamedTuple):
    """A sequence for a new text, of which `kept` tokens are held in the sequence `source`."""

    slot: int
    kept: int = 0
    source: int = -1  # the same slot: it is taken over; -1: nothing is held
    skip: int = 0  # of these, so many at the beginning were never read
    stamp: int = 0  # see `still_holds`


class Slots:
    """The model's sequences, ids 0 … count - 1."""

    def __init__(self, count: int) -> None:
        self._holders = [Holder(slot) for slot in range(count)]
        self._count = 0

    def take(self, text: Sequence[TokenId], cache: str | None = None, skip: int = 0) -> Taken:
        """A sequence for `text`, of which the last token is not to be known yet.

        Its first `skip` tokens need not be held. Raises Overloaded where all are in use.
        """
        free = sorted((one for one in self._holders if one.is_free), key=lambda one: one.used)
        if not free:
            raise Overloaded("every sequence of the worker is taken")
        best, kept = self._best(text, cache, skip)
        chosen = free[0]
        if best and best.is_free and (2 * kept >= len(best.tokens) or best is chosen):
            chosen = best
        elif kept - skip < WORTH:
            best = None
        self._count += 1
        taken = Taken(chosen.slot)
        if best:
            skip, is_own = best.skip, best is chosen
            taken = Taken(chosen.slot, kept, best.slot, skip, self._count if is_own else best.taken)
        self._holders[chosen.slot] = Holder(
            chosen.slot, text, skip, cache, self._count, self._count, False
        )
        return taken

    def still_holds(self, taken: Taken) -> bool:
        """Whether the source has not been taken for another text since."""
        return taken.source >= 0 and self._holders[taken.source].taken == taken.stamp

    def begin(self, slot: int, skip: int = 0) -> None:
        """From now on the model holds nothing there but the text it was taken for, from `skip`."""
        self._holders[slot].has_begun, self._holders[slot].skip = True, skip

    def held(self, taken: Taken) -> int:
        """How many of the tokens that were to be kept the source can still have."""
        source = self._holders[taken.source]
        if not self.still_holds(taken) or source.skip != taken.skip:
            return 0
        is_there = source.has_begun or taken.source == taken.slot
        return min(taken.kept, len(source.tokens)) if is_there else 0

    def give_back(self, slot: int, tokens: Sequence[TokenId]) -> None:
        """It is not in use any more, and holds these tokens (those that it skipped included).

        If its text has not begun there, it holds nothing that anybody may use.
        """
        holder = self._holders[slot]
        self._count += 1
        holder.is_free, holder.used = True, self._count
        is_known = holder.has_begun and holder.cache is not None
        holder.tokens = tuple(tokens) if is_known else ()

    def _best(
        self, text: Sequence[TokenId], cache: str | None, skip: int
    ) -> tuple[Holder | None, int]:
        """Who holds the longest beginning of `text`, and how long that is."""
        best, longest = None, skip
        for holder in self._holders:
            if cache is None or holder.cache != cache or holder.skip > skip:
                continue
            common = min(shared_beginning(holder.tokens, text), len(text) - 1)
            if common > longest:
                best, longest = holder, common
        return best, longest


def shared_beginning(one: Sequence[TokenId], other: Sequence[TokenId]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(one), len(other))
    if high and one[0] != other[0]:
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        if list(one[low:middle]) == list(other[low:middle]):
            low = middle
        else:
            high = middle - 1
    return low
