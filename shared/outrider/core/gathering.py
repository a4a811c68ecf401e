"""Which blocks go to the target together: those of all who are ready, and in turns of all.

Where draft and target take turns, a pass that begins while some still draft takes the device from
the draft, and leaves these requests behind: their blocks would have to wait for its end. So it is
held back until all are there. Nobody waits longer than a session does for its draft.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Generic, TypeVar

from outrider.core.session import Phase, Session
from outrider.core.values import Verify

K = TypeVar("K")


class Gathering(Generic[K]):
    """Orders for the target's next pass, each with a key of the caller's."""

    def __init__(self) -> None:
        self._orders: list[tuple[K, Verify]] = []

    def add(self, key: K, order: Verify) -> None:
        self._orders.append((key, order))

    def release(self, sessions: Iterable[Session]) -> list[tuple[K, Verify]]:
        """All orders, unless one of these `sessions`, which are all that run, is waited for."""
        if self._orders and not any(waits(session) for session in sessions):
            orders, self._orders = self._orders, []
            return orders
        return []


def waits(session: Session) -> bool:
    """Whether it takes turns with its draft, and this is the draft's."""
    return session.phase is Phase.WAITING and session.rule.mode == "sync"
