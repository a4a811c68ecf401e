"""When to verify and how far to draft: the modes are settings of one mechanism, not separate loops.

A session asks its rule: verify how many of these drafted tokens now, or wait for more? And: how far
beyond the committed text may the draft run? `FixedRule` answers by fixed numbers, `PricedRule` by
what things cost and what acceptance the drafts' confidences foretell (`price`, `stopping`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np

from outrider.core import price, stopping
from outrider.core.estimates import LONGEST, Acceptance, Spread
from outrider.core.experience import Experience
from outrider.core.values import Mode

MOST_DRAFTED = 64  # tokens in a block, whatever is asked for


class Rule(Protocol):
    """What a session asks, and what it tells; telling is free to be ignored.

    Times are seconds of the session's clock, without those in which a worker worked for others.
    """

    mode: Mode

    @property
    def drafts(self) -> bool:
        """Whether a draft is wanted at all: else it need not even know the prompt."""

    def lead(self, busy: bool) -> int:
        """How many tokens the draft may run ahead of the text, the target being `busy` or idle."""

    @property
    def floors(self) -> tuple[float, ...]:
        """Below which joint acceptance the draft stops by itself; see `events.Commit`."""

    def block_s(self, behind: int) -> float:
        """How much longer than for a token to wait for a draft that sends whole blocks.

        It has `behind` tokens of the text to catch up with.
        """

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        """Verify how many of the drafted tokens now; None: wait for the next.

        `confidences` belong to the drafted tokens in stock, `limit` is how many the length of the
        answer leaves room for. The next token is expected in `next_s`; None: none can come.
        """

    def settle(self) -> None:
        """Let what was observed count from now on.

        That may take milliseconds of solving anew: time in which the target had better be busy.
        """
        return None

    def observe(self, good: bool, confidence: float) -> None:
        """A drafted token of this confidence was what the target chose, or not."""
        return None

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float) -> None:
        """A pass over `rows` took so long, and so long with its messages."""
        return None

    def committed(self, tokens: int, spent_s: float) -> None:
        """`tokens` were committed, `spent_s` after those before them."""
        return None

    def drafted(self, each_s: float, confidences: Sequence[float], turn_s: float | None) -> None:
        """Tokens took `each_s`, and if they began a turn of the draft, that took `turn_s` more."""
        return None


class FixedRule(Rule):
    """At most `n_max` drafted tokens in a block, `n_min` at least while the draft can deliver.

    A block ends before a token that the draft itself gave less than `p_min`. Nothing is learnt.
    """

    def __init__(self, mode: Mode, n_max: int = 5, n_min: int = 0, p_min: float = 0.0) -> None:
        self.mode, self.n_max, self.n_min, self.p_min = mode, n_max, n_min, p_min

    @property
    def drafts(self) -> bool:
        return self.mode != "plain" and self.n_max > 0

    def lead(self, busy: bool) -> int:
        """In turns one block, and only while the target is idle.

        Pipelined: the block being verified, the next one, and the bonus between.
        """
        if self.mode == "sync":
            return 0 if busy else self.n_max
        return 2 * self.n_max + 2

    @property
    def floors(self) -> tuple[float, ...]:
        return ()

    def block_s(self, behind: int) -> float:
        return 0.0

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        limit = min(limit, self.n_max) if self.drafts else 0
        ready = 0
        for confidence in confidences[:limit]:
            if confidence < self.p_min:
                return ready
            ready += 1
        wanted = min(limit, self.n_max if self.mode == "sync" else self.n_min)
        return None if next_s is not None and ready < wanted else ready


class PricedRule(Rule):
    """Answers by the price of time; `n_max` bounds a block, no length is tuned.

    What is observed goes to the `experience` of all requests too, and counts after `settle`.
    """

    def __init__(
        self, mode: Literal["sync", "pipelined"], n_max: int, experience: Experience
    ) -> None:
        self.mode, self._n_max, self._experience = mode, n_max, experience
        self._costs, self._guard = experience.costs, experience.guard
        self._acceptance = Acceptance(prior=experience.acceptance.average)
        self._spread = Spread(prior=experience.spread.weights)
        self._prefilled = False
        experience.begin()
        self.settle()

    @property
    def drafts(self) -> bool:
        return not self._guard.resting

    def lead(self, busy: bool) -> int:
        """In turns the draft runs until it is told to stop; else as far as makes a difference.

        That is counted from behind the block that is being verified.
        """
        if self._guard.resting or (self.mode == "sync" and busy):
            return 0
        if self.mode == "sync":
            return min(LONGEST, self._n_max)
        block = LONGEST + 1 if busy else 0
        return min(block + price.DEEPEST, 2 * self._n_max + 2)

    @property
    def floors(self) -> tuple[float, ...]:
        """In turns the draft stops by itself: asking first would cost it a round of messages."""
        if self.mode != "sync":
            return ()
        floors = self._turn.floors
        trust = max(self._experience.acceptance.trust, 0.1)
        return tuple(floor / trust ** (n + 1) for n, floor in enumerate(floors))

    def block_s(self, behind: int) -> float:
        tokens = LONGEST + behind / 2  # to read one takes less than to draft one
        return tokens * self._costs.costs.draft_s if self.mode == "sync" else 0.0

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        if self._guard.resting:
            return 0
        limit = max(0, min(limit, self._n_max))
        likely, costs = self._experience.acceptance.of(confidences), self._settled
        if self.mode == "pipelined":
            return price.plan(costs, self._average, likely, limit, next_s)
        block = stopping.plan(costs, self._turn, likely, limit)
        if not len(confidences) and self._experience.probes(block) and limit:
            block = None
        return min(len(likely), limit) if block is None and next_s is None else block

    def settle(self) -> None:
        self._settled = costs = self._costs.costs
        if self.mode == "pipelined":
            self._average = price.rounded(self._acceptance.average)
            # any stock will do: it is for the solution and the tables, which are kept
            price.appraise(costs, self._average, np.ones(1), LONGEST)
        else:
            self._turn = stopping.solve(costs, self._spread.steady)

    def observe(self, good: bool, confidence: float) -> None:
        self._acceptance.observe(good, confidence)
        self._experience.acceptance.observe(good, confidence)

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float) -> None:
        self._costs.verified(rows, elapsed_s, round_trip_s)
        if rows == 1:
            self._experience.stepped(round_trip_s)

    def committed(self, tokens: int, spent_s: float) -> None:
        self._guard.committed(tokens, spent_s, self._experience.step_s)

    def drafted(self, each_s: float, confidences: Sequence[float], turn_s: float | None) -> None:
        costs = self._costs.costs
        if self._prefilled:
            in_turns = self.mode == "sync"
            self._costs.drafted(each_s, len(confidences), turn_s if in_turns else None)
        else:  # with the first came the prompt
            prompt_s = max(0.0, each_s - costs.draft_s) * len(confidences)
            self._experience.prompt_steps = prompt_s / costs.verify_s[0]
            self._guard.excuse(self._experience.prompt_steps)
            self._prefilled = True
        likely = self._experience.acceptance.of(confidences)
        for spread in (self._spread, self._experience.spread):
            spread.observe(likely)
