"""When to verify and how far to draft: the modes are settings of one mechanism, not separate loops.

A session asks: verify how many of these drafted tokens now, or wait for more? And: how far beyond
the committed text may the draft run? `Policy` answers by fixed numbers, `Pilot` by what things cost
and what acceptance the drafts' confidences foretell (`outrider.planner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from outrider import planner
from outrider.planner import Acceptance, CostModel

Mode = Literal["plain", "sync", "pipelined"]

LONGEST = 64  # drafted tokens in a block
PROBES = (8, 256)  # plain steps until a draft that did not pay is tried again: at first, at most


@dataclass(frozen=True, slots=True)
class Policy:
    """`n_max` drafted tokens at most in a block, `n_min` at least while the draft can deliver;
    a block ends before a token that the draft itself gave less than `p_min`."""

    mode: Mode
    n_max: int = 5
    n_min: int = 0
    p_min: float = 0.0

    @property
    def drafts(self) -> bool:
        return self.mode != "plain" and self.n_max > 0

    def lead(self, busy: bool) -> int:
        """How far the draft may run ahead of the committed text, the target being `busy` or idle.

        Synchronous: one block, and only while the target is idle. Pipelined: the block being
        verified, the next one, and the bonus between.
        """
        if self.mode == "sync":
            return 0 if busy else self.n_max
        return 2 * self.n_max + 2

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        """Verify how many of the drafted tokens now; None: wait for the next.

        `confidences` belong to the drafted tokens in stock, `limit` is how many the length of the
        answer leaves room for. The next token is expected in `next_s`; None: none can come.
        """
        limit = min(limit, self.n_max) if self.drafts else 0
        ready = 0
        for confidence in confidences[:limit]:
            if confidence < self.p_min:
                return ready
            ready += 1
        wanted = min(limit, self.n_max if self.mode == "sync" else self.n_min)
        return None if next_s is not None and ready < wanted else ready

    def observe(self, good: bool) -> None:
        """Fixed numbers learn nothing."""

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float) -> None:
        """Nor do they measure."""

    def drafted(self, elapsed_s: float) -> None:
        """Nor do they measure."""


class Pilot:
    """The same questions, answered by the price of time; `n_max` only bounds the answers."""

    drafts = True

    def __init__(self, mode: Literal["sync", "pipelined"], n_max: int, costs: CostModel) -> None:
        self.mode, self._n_max, self._costs = mode, n_max, costs
        self._acceptance = Acceptance(prior=costs.acceptance.average)
        self._block = 0  # in turns: how long the block is to be
        self._plain_steps, self._patience = PROBES[0], PROBES[0]  # the first probe is at once

    def lead(self, busy: bool) -> int:
        """Pipelined: as far as makes a difference. In turns: what the next block is to have."""
        if self.mode == "sync":
            return 0 if busy else self._block
        return min(planner.DEEPEST, 2 * self._n_max + 2)

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        """See `Policy.decide`."""
        limit = max(0, min(limit, self._n_max))
        likely = self._acceptance.of(confidences)
        costs, average = self._costs.costs, self._acceptance.average
        if self.mode == "pipelined":
            return planner.plan(costs, average, likely, limit, next_s)
        self._block = planner.plan_in_turn(costs, average, likely, limit)
        if not len(confidences):
            self._block = max(self._block, self._probe(limit))
        if self._block > len(likely) and next_s is not None:
            return None
        return min(self._block, len(likely))

    def _probe(self, limit: int) -> int:
        """A draft that does not pay is tried again, less and less often."""
        if self._block:
            self._plain_steps, self._patience = 0, PROBES[0]
            return 0
        self._plain_steps += 1
        if self._plain_steps < self._patience:
            return 0
        self._plain_steps, self._patience = 0, min(2 * self._patience, PROBES[1])
        # unless it could not pay however good it has become
        return min(1, planner.plan_in_turn(self._costs.costs, 1.0, self._acceptance.of(()), limit))

    def observe(self, good: bool) -> None:
        self._acceptance.observe(good)
        self._costs.acceptance.observe(good)

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float) -> None:
        self._costs.verified(rows, elapsed_s, round_trip_s)

    def drafted(self, elapsed_s: float) -> None:
        self._costs.drafted(elapsed_s)
