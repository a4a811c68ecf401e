"""While there is no target worker: who waits for the next one, and for how long at most."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from outrider_services.pipeline.member import Member
from outrider_services.pipeline.roster import Roster


class Absence:
    """Nobody waits longer than `limit_s` since the last target was lost, or since the beginning."""

    def __init__(self, roster: Roster, limit_s: float, clock: Callable[[], float]) -> None:
        self.limit_s = limit_s
        self._roster, self._clock, self._since = roster, clock, clock()
        self._waiting: set[asyncio.Future[None]] = set()

    def begin(self) -> None:
        """A target is lost, perhaps the last one."""
        self._since = self._clock()

    def end(self) -> None:
        """A target has joined."""
        self._wake()

    def look(self) -> bool:
        """Whether nobody is to wait any more; to be called a few times a second."""
        is_over = self._is_too_long
        if is_over:
            self._wake()
        return is_over

    async def target(self) -> Member:
        """A target worker, be it the next one. Raises WorkerLost if none comes in time."""
        while not self._roster.of("target") and not self._is_too_long:
            waiter = asyncio.get_running_loop().create_future()
            self._waiting.add(waiter)
            try:
                await waiter
            finally:
                self._waiting.discard(waiter)
        return self._roster.target()

    @property
    def _is_too_long(self) -> bool:
        return not self._roster.of("target") and self.is_long_ago

    @property
    def is_long_ago(self) -> bool:
        """Whether the last target was lost so long ago that nobody waits any more."""
        return self._clock() - self._since >= self.limit_s

    def _wake(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)
