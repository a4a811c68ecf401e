"""The branches of a draft worker's texts: which of them a step drafts for, and where they are held.

See `outrider.core.branches`. Everything here belongs to the owner thread; `lock` guards what the
loop touches too, the streams.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

from outrider.core.branches import Branch, Branches, Found, Ranks, chosen
from outrider.core.drafter import Drafter
from outrider.core.stream import Stream
from outrider.core.values import Drafted, TokenId

CHOOSING = 0.1  # what one step counts for
MOST_LINES = 4  # of more texts that share a step each has a row, and none a branch


class Rider(Protocol):
    """What is to be known of a request: its sequence, and its text as the draft sees it."""

    slot: int
    stream: Stream
    is_open: bool
    is_new: bool


R = TypeVar("R", bound=Rider)


class Growing(NamedTuple):
    """A branch that a step drafts a token for."""

    branch: Branch
    branches: Branches  # of which it is one
    text: tuple[TokenId, ...]  # up to the branch's end


class Branching(Generic[R]):
    """The spare sequences of one drafter."""

    def __init__(self, model: Drafter, lock: threading.Lock) -> None:
        self._model, self._lock = model, lock
        self._ranks = Ranks()
        self._choosing_s = 0.0  # what choosing takes, by the token: measured passes are without it
        info = model.info
        self._slots = range(info.slots, info.slots + info.spare)
        self._held: set[int] = set()  # spare sequences that are not empty

    def begin(self, stream: Stream) -> None:
        """It may have branches, if there is room for any; else the target may, on its own."""
        if self._slots or stream.most_sides:
            stream.branches = Branches(self._ranks)

    def has_work(self, riders: Iterable[R]) -> bool:
        """Whether a step is worth it for branches alone. Call it with the lock held."""
        return bool(self.share((), riders)[1])

    def share(self, lines: Sequence[R], riders: Iterable[R]) -> tuple[int, list[tuple[Branch, R]]]:
        """Of those with a step now, `lines`, and branches of all riders: what a step is for.

        How many of the `lines`, and which branches. Call it with the lock held.
        """
        riders = [one for one in riders if one.is_open and not one.is_new and one.stream.branches]
        if not riders or len(lines) > MOST_LINES:
            return len(lines), []
        context = self._model.info.context
        candidates = [
            (value, branch, ride)
            for ride in riders
            for value, branch in ride.stream.candidates(context)
            if branch.place <= ride.stream.read
        ]
        room = len(self._free(riders))
        return chosen([ride.stream.reach for ride in lines], candidates, room, self._passes_s)

    @property
    def _passes_s(self) -> list[float]:
        """What steps for 1, 2 … texts and branches take, choosing the tokens included."""
        known = self._model.crowd_s or (self._model.token_s,)
        return [seconds + rows * self._choosing_s for rows, seconds in enumerate(known, 1)]

    def took_s(self, rows: int, elapsed_s: float) -> None:
        """A step for so many texts and branches took so long."""
        known = self._model.crowd_s
        if self._slots and rows <= len(known):
            each_s = max(0.0, elapsed_s - known[rows - 1]) / rows
            self._choosing_s += CHOOSING * (each_s - self._choosing_s)

    def _free(self, riders: Iterable[R]) -> list[int]:
        used = set()
        for ride in riders:
            stream = ride.stream
            used |= {branch.slot for branch in (stream.branches.begun if stream.branches else ())}
            used |= {stream.adopted.slot} if stream.adopted else set()
        return [slot for slot in self._slots if slot not in used]

    def tidy(self, riders: Iterable[R]) -> None:
        """Empty the sequences of branches that are over: they hold cells that texts need."""
        if not self._held:
            return
        with self._lock:
            over = [slot for slot in self._free(riders) if slot in self._held]
        for slot in over:
            self._model.cut(slot, 0)
            self._held.discard(slot)

    def adopt(self, ride: R) -> None:
        """If the target's text has led onto a branch, hold that in the text's own sequence."""
        stream = ride.stream
        if stream.adopted is None:  # a commit that comes now is followed in the next step
            return
        with self._lock:
            branch, stream.adopted = stream.adopted, None
            if branch is None or not ride.is_open:
                return
            held = branch.tokens[:-1]  # the last one has not been read
            there = stream.tokens[branch.place :]
            same = next(
                (n for n, pair in enumerate(zip(held, there, strict=False)) if pair[0] != pair[1]),
                min(len(held), len(there) - 1),
            )
            length = branch.place + same
            if length <= stream.read:  # it has been read there meanwhile
                return
        self._model.cut(ride.slot, branch.place)
        self._model.fork(branch.slot, ride.slot, length)
        with self._lock:
            if list(stream.tokens[branch.place : length]) == list(held[:same]):
                stream.read = max(stream.read, length)

    def grown(self, found: Sequence[tuple[Branch, R]], riders: Iterable[R]) -> list[Growing]:
        """The texts of these branches; those that are new begin as copies of their riders'."""
        growing = []
        with self._lock:
            free = self._free(riders)
            for branch, ride in found:
                stream = ride.stream
                is_there = ride.is_open and branch.place <= stream.read
                if is_there and stream.branches:  # it may have changed by now
                    text = (*stream.tokens[: branch.place], *branch.tokens)
                    growing.append((ride, Growing(branch, stream.branches, text)))
        for ride, one in growing:
            if one.branch.slot < 0:
                one.branch.slot = free.pop()
                self._held.add(one.branch.slot)
                self._model.fork(ride.slot, one.branch.slot, one.branch.place)
        return [one for _, one in growing]

    def took(self, growing: Growing, drafted: Sequence[Drafted]) -> None:
        """What a step has drafted on a branch. Call it with the lock held."""
        branch, branches, _ = growing
        if drafted:
            branches.grow(branch, Found(drafted[0], self._model.others(branch.slot)))

    @staticmethod
    def end(ride: R) -> None:
        """It has none any more, and never will: a step with them has failed."""
        ride.stream.branches = ride.stream.adopted = None
