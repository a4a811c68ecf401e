"""Which blocks go to the target together: those of all who are ready, and in turns of all.

Where draft and target take turns, a pass that begins while some still draft takes the device from
the draft, and leaves these requests behind: their blocks would have to wait for its end. So it is
held back until all are there, also those that are still in the pass before. Nobody waits longer
than a session may wait for its draft, even while requests come and go of which one is always
waiting.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Generic, TypeVar

from outrider.core.dispatch import BLOCK_PATIENCE_S
from outrider.core.session import Phase, Session
from outrider.core.values import Verify

K = TypeVar("K", bound=Hashable)


class Gathering(Generic[K]):
    """Orders for the target's next pass, each with a key of the caller's."""

    def __init__(self) -> None:
        self._orders: dict[K, list[Verify]] = {}
        self._since = 0.0  # when the first of them came

    def add(self, key: K, order: Verify, now: float) -> None:
        if not self._orders:
            self._since = now
        self._orders.setdefault(key, []).append(order)

    def drop(self, key: K) -> None:
        """Nobody wants this one's orders any more, if there are any."""
        self._orders.pop(key, None)

    def release(self, sessions: Mapping[K, Session], now: float) -> list[tuple[K, Verify]]:
        """All orders, unless one of these `sessions`, which are all that run, is waited for."""
        if not self._orders:
            return []
        others = (one for key, one in sessions.items() if key not in self._orders)
        if now - self._since < BLOCK_PATIENCE_S and any(map(waits, others)):
            return []
        orders, self._orders = self._orders, {}
        return [(key, order) for key, several in orders.items() for order in several]


def waits(session: Session) -> bool:
    """Whether it takes turns with its draft, and this is the draft's or will be after the pass."""
    if session.phase is Phase.VERIFYING:
        return session.takes_turns and not session.dispatch.is_reading
    return session.phase is Phase.WAITING and session.rule.mode == "sync"
