"""Whose tokens the target evaluates next, and how many of them: one pass for all who are ready."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from outrider.core.constraints import Matcher
from outrider.core.engine import Fork
from outrider.core.orders import Orders
from outrider.core.sampling import Sampling
from outrider.core.values import Beside, TokenId, ids_of
from outrider_services.pipeline.slots import Taken

MOST_FAILURES = 2  # after more of its passes have failed, a request shares none any more


@dataclass(slots=True, eq=False)
class Sequence:
    """A request's committed text, and the block behind it that waits to be verified."""

    request: int
    slot: int
    tokens: list[TokenId]
    sampling: Sampling
    logprobs: bool
    asked: float  # `computed_s` when it was queued last
    taken: Taken | None = None  # what it gets from other texts; None: nothing, or it has it
    cached: int = 0  # how many tokens it got
    top_logprobs: int = 0
    begins: int = 0  # the answer begins here
    matcher: Matcher | None = None  # of the answer's constraint
    forbidden: int = 0  # drafted tokens that it does not allow
    orders: Orders = field(default_factory=Orders)  # that wait for their turns
    drafted: tuple[TokenId, ...] | None = ()  # None: nothing to do
    sides: Beside = ()  # of that block, none of which is begun outside of it
    elapsed_s: float = 0.0
    waited_s: float = 0.0
    faults: int = 0  # of passes, since its last verdict
    failures: int = 0  # … and in all
    is_open: bool = True

    @property
    def is_alone(self) -> bool:
        """Whether it has passes of its own: so it cannot harm the others again."""
        return self.faults > 0 or self.failures > MOST_FAILURES


class Share(NamedTuple):
    """What a sequence gets of the next pass: without `rows` it only comes nearer to its block."""

    sequence: Sequence
    tokens: list[TokenId]
    rows: int
    forks: tuple[Fork, ...] = ()  # one for each of the first sides of the sequence

    @property
    def all_rows(self) -> int:
        """Those of its sides included."""
        return self.rows + sum(len(fork.tokens) for fork in self.forks)


class Passes:
    """Divides the room of a pass, `chunk` tokens; `length` tells how many a slot holds.

    Sides are evaluated in `spare` slots, as far as those and the room go.
    """

    def __init__(self, chunk: int, length: Callable[[int], int], spare: Iterable[int] = ()) -> None:
        self._chunk, self._length, self._spare = chunk, length, tuple(spare)

    def next(self, turns: Iterable[Sequence]) -> list[Share]:
        """The shares of those who are in turn, as far as a pass has room for their tokens.

        Blocks come first, and leave a quarter of the room to a text that is being read.
        """
        in_turn = [one for one in turns if not one.taken]
        if in_turn and in_turn[0].is_alone:
            in_turn = in_turn[:1]
        else:
            in_turn = [one for one in in_turn if not one.is_alone]
        blocks = [one for one in in_turn if self._needed(one) <= self._chunk]
        readers = [one for one in in_turn if self._needed(one) > self._chunk]
        shares: list[Share] = []
        room, free = self._chunk, list(self._spare)
        for sequence in (*blocks, *readers):
            spare = self._chunk // 4 if readers and shares and sequence not in readers else 0
            if share := self._share(sequence, room - spare):
                room -= len(share.tokens)
                forks = self._forks(share, room - spare, free)
                room -= sum(len(fork.tokens) for fork in forks)
                shares.append(share._replace(forks=forks))
        return shares

    @staticmethod
    def _forks(share: Share, room: int, free: list[int]) -> tuple[Fork, ...]:
        """Those of its sides for which there are `free` slots, and `room` for so many tokens."""
        forks: list[Fork] = []
        for side in share.sequence.sides if share.rows else ():
            room -= len(side.drafted)
            if room < 0 or not free:
                break
            forks.append(Fork(free.pop(), side.place, ids_of(side.drafted)))
        return tuple(forks)

    def _needed(self, sequence: Sequence) -> int:
        """How many tokens are to be evaluated, its block included."""
        drafted = sequence.drafted or ()
        return len(sequence.tokens) + len(drafted) - self._length(sequence.slot)

    def _share(self, sequence: Sequence, room: int) -> Share | None:
        """What it can do with `room` for so many tokens; None: it has to wait for more room."""
        base, drafted = len(sequence.tokens), sequence.drafted or ()
        known, needed = self._length(sequence.slot), self._needed(sequence)
        if needed <= room:
            return Share(sequence, [*sequence.tokens[known:], *drafted], len(drafted) + 1)
        ahead = sequence.tokens[known : min(known + room, base - 1)]
        return Share(sequence, ahead, 0) if needed > self._chunk and ahead else None
