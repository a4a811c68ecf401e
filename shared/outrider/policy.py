"""When to verify and how far to draft: the modes are settings of one rule, not separate loops.

The rule answers one question, whenever the target is idle: verify how many drafted tokens now, or
wait for more? And one at each commit: how far beyond the committed text may the draft run?
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Mode = Literal["plain", "sync", "pipelined"]


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

    @property
    def lead_at_start(self) -> int:
        """How far the draft may run ahead of the prompt while the target still prefills it."""
        return 0 if self.mode == "sync" else self.lead

    @property
    def lead(self) -> int:
        """How far the draft may run ahead of the committed text.

        Synchronous: one block, which it has drafted before the target starts, so both never
        compute at once. Pipelined: the block being verified, the next one, and the bonus between.
        """
        return self.n_max if self.mode == "sync" else 2 * self.n_max + 2

    def decide(self, confidences: Sequence[float], limit: int, more: bool) -> int | None:
        """Verify how many of the drafted tokens now; None: wait, which needs `more` to be coming.

        `confidences` belong to the drafted tokens in stock, `limit` is how many the length of the
        answer leaves room for.
        """
        limit = min(limit, self.n_max) if self.drafts else 0
        ready = 0
        for confidence in confidences[:limit]:
            if confidence < self.p_min:
                return ready
            ready += 1
        wanted = min(limit, self.n_max if self.mode == "sync" else self.n_min)
        return None if more and ready < wanted else ready
