"""How long the target waits before a pass for requests whose next blocks are on their way.

Requests that share a pass are answered together and ask again together, a moment later. If another
one has asked meanwhile, its pass would begin without them, they would ask during that pass, and so
on: two groups in turns, each at half the speed. A short wait makes them one.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

SHARE = 0.25  # most of a pass that is waited for a request
MARGIN, MARGIN_S = 1.5, 5e-4  # a request is waited for so much longer than it took last time
FIRST_S = 2e-3  # the delay of one that has never asked again yet


@dataclass(slots=True)
class Straggler:
    """One that was answered, and has not asked again."""

    answered: float
    delay_s: float


class Stragglers(Generic[K]):
    """The requests that the target has answered; times are seconds on one clock."""

    def __init__(self) -> None:
        self._away: dict[K, Straggler] = {}
        self._delays: dict[K, float] = {}
        self._pass_s = 0.0

    def passed(self, elapsed_s: float) -> None:
        """A pass took so long."""
        self._pass_s = elapsed_s

    def answered(self, key: K, now: float) -> None:
        self._away[key] = Straggler(now, self._delays.get(key, FIRST_S))

    def asked(self, key: K, now: float) -> None:
        if away := self._away.pop(key, None):
            self._delays[key] = now - away.answered

    def gone(self, key: K) -> None:
        self._away.pop(key, None)
        self._delays.pop(key, None)

    def expected(self, now: float) -> float:
        """How many seconds to wait from `now` on; 0: for nobody.

        One that takes longer than a share of a pass, because its draft does, is not waited for.
        """
        most_s = SHARE * self._pass_s
        ends = [
            one.answered + min(MARGIN * one.delay_s + MARGIN_S, most_s)
            for one in self._away.values()
            if one.delay_s <= most_s
        ]
        return max(0.0, max(ends, default=now) - now)
