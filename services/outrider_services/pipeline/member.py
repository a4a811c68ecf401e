"""A worker that serves, as the coordinator knows it."""

from __future__ import annotations

from dataclasses import dataclass

from outrider.core.values import Role
from outrider.wire import messages as wire

SILENT_S = 1.0  # four missing heartbeats: nobody waits for such a draft


@dataclass(slots=True, eq=False)
class Member:
    """A worker that was welcomed, and the one connection that speaks for it."""

    peer: bytes
    hello: wire.Hello
    heard: float
    moved: float  # when it last finished an evaluation, or had none to do
    name: str = ""  # its role, and from the second of the role on a number
    steps: int = 0
    is_silent: bool = False
    link_s: float | None = None  # a message there and back, on average; None: not measured yet

    @property
    def role(self) -> Role:
        return self.hello.role

    def hear(self, now: float) -> None:
        """It has said something. A time in which it was paused is none without progress."""
        if now - self.heard > SILENT_S:
            self.moved += now - self.heard
        self.heard = now

    def stall_s(self) -> float:
        """Most seconds of an evaluation: 128 rows at the price of single ones, and half more."""
        return max(8.0, 200 * self.hello.curve_s[0])

    def took(self, round_trip_s: float) -> None:
        """A message there and back took so long."""
        known_s = round_trip_s if self.link_s is None else self.link_s
        self.link_s = known_s + 0.3 * (round_trip_s - known_s)
