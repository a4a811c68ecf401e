"""When to verify and how far to draft: the modes are settings of one mechanism, not separate loops.

A session asks: verify how many of these drafted tokens now, or wait for more? And: how far beyond
the committed text may the draft run? `Policy` answers by fixed numbers, `Pilot` by what things cost
and what acceptance the drafts' confidences foretell (`outrider.core.planner`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from outrider.core import planner
from outrider.core.estimates import LEVELS, Acceptance, CostModel, Spread

Mode = Literal["plain", "sync", "pipelined"]

LONGEST = 64  # drafted tokens in a block
CERTAIN = (0.0,) * (len(LEVELS) - 1) + (1.0,)  # the spread of a draft that is nearly always right
PROBES = (8, 24, 72, 512)  # plain steps until a draft that fails is tried again: each time longer
DOUBT = 1 / 32  # of the time of plain steps: to try a draft that has failed, or could never pay


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

    @property
    def floors(self) -> tuple[float, ...]:
        """See `wire.Commit`: a draft that follows fixed numbers has none."""
        return ()

    def block_s(self, behind: int) -> float:
        """How much longer than for a token to wait for a draft that sends whole blocks and has
        `behind` tokens of the text to catch up with."""
        return 0.0

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

    def observe(self, good: bool, confidence: float) -> None:
        """Fixed numbers learn nothing."""

    def settle(self) -> None:
        """Nor is there anything to work out."""

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float) -> None:
        """Nor do they measure."""

    def committed(self, tokens: int, spent_s: float) -> None:
        """Nor do they measure."""

    def drafted(self, each_s: float, confidences: Sequence[float], turn_s: float | None) -> None:
        """Nor do they measure."""


class Experience:
    """What the requests of a pipeline learn from each other: each starts where the last has ended.

    Of two workers in one mode, for in turns a drafted token also costs its messages.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.acceptance = Acceptance(memory=300)
        self.spread = Spread(memory=300)
        self.guard = Guard()
        # what the guard reckons in: the cost model moves a plain step with passes over more rows
        self.step_s = costs.costs.verify_s[0] + costs.costs.link_s
        self.plain_steps, self.patience = PROBES[0], PROBES[0]  # the first probe is at once
        self.prompt_steps = 0.0  # what the draft took for the prompt of the last request

    def begin(self) -> None:
        """A request begins: on another text a draft may pay that did not on the last."""
        self.guard.begin()
        if self.patience < PROBES[-1]:
            self.plain_steps = self.patience

    def stepped(self, elapsed_s: float) -> None:
        """A plain step was seen; a disturbed one counts for no more than twice the usual."""
        self.step_s += 0.2 * (min(elapsed_s, 2 * self.step_s) - self.step_s)

    def probes(self, block: int | None) -> bool:
        """Whether a draft that did not pay (`block` 0) is to be tried again, ever less often.

        Nothing else would show that it has become better, or never cost what it did at load.
        """
        if block != 0:
            self.plain_steps, self.patience = 0, PROBES[0]
            return False
        self.plain_steps += 1
        if self.plain_steps < self.patience:
            return False
        # an attempt may begin with a long prompt
        if self.patience == PROBES[-1] and self.prompt_steps > DOUBT * self.plain_steps:
            return False
        costs = self.costs.costs
        best = planner.solve_in_turn(costs, CERTAIN)
        hopeless = planner.plan_in_turn(costs, best, np.empty(0), LONGEST) is not None
        price = (costs.draft_s + costs.turn_s) / self.step_s
        if hopeless and price > DOUBT * self.plain_steps:
            return False
        self.plain_steps = 0
        self.patience = next((longer for longer in PROBES if longer > self.patience), PROBES[-1])
        return True


class Pilot:
    """The same questions, answered by the price of time; `n_max` only bounds the answers."""

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
        """A draft that rests need not even know the prompt."""
        return not self._guard.resting

    def lead(self, busy: bool) -> int:
        """In turns the draft runs until it is told to stop; else as far as makes a difference,
        counted from behind the block that is being verified."""
        if self._guard.resting or (self.mode == "sync" and busy):
            return 0
        if self.mode == "sync":
            return min(planner.LONGEST, self._n_max)
        block = planner.LONGEST + 1 if busy else 0
        return min(block + planner.DEEPEST, 2 * self._n_max + 2)

    @property
    def floors(self) -> tuple[float, ...]:
        """In turns the draft stops by itself: asking first would cost it a round of messages."""
        if self.mode != "sync":
            return ()
        floors = self._turn.floors
        trust = max(self._experience.acceptance.trust, 0.1)
        return tuple(floor / trust ** (n + 1) for n, floor in enumerate(floors))

    def block_s(self, behind: int) -> float:
        tokens = planner.LONGEST + behind / 2  # to read one takes less than to draft one
        return tokens * self._costs.costs.draft_s if self.mode == "sync" else 0.0

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        """See `Policy.decide`."""
        if self._guard.resting:
            return 0
        limit = max(0, min(limit, self._n_max))
        likely, costs = self._experience.acceptance.of(confidences), self._settled
        if self.mode == "pipelined":
            return planner.plan(costs, self._average, likely, limit, next_s)
        block = planner.plan_in_turn(costs, self._turn, likely, limit)
        if not len(confidences) and self._experience.probes(block) and limit:
            block = None
        return min(len(likely), limit) if block is None and next_s is None else block

    def settle(self) -> None:
        """Let what was observed count from now on.

        That may take milliseconds of solving anew: time in which the target had better be busy.
        """
        self._settled = costs = self._costs.costs
        if self.mode == "pipelined":
            self._average = planner.rounded(self._acceptance.average)
            # any stock will do: it is for the solution and the tables, which are kept
            planner.appraise(costs, self._average, np.ones(1), LONGEST)
        else:
            self._turn = planner.solve_in_turn(costs, self._spread.steady)

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
        """Tokens took `each_s`, and if they began a turn of the draft, that took `turn_s` more."""
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


class Guard:
    """Keeps account of the time that drafts have saved or lost, and lets them rest when they lose.

    Costs and confidences can mislead, such as those of a draft that is sure and wrong. The account
    cannot: it is in plain steps of the target, and stands for at most `CREDIT` of them.
    """

    LOSS, CREDIT, RESTS = 2.5, 6.0, (24, 256)
    FORGIVEN = 48  # a rest of at most so many steps ends with its request

    def __init__(self) -> None:
        self._saved = 0.0
        self._left, self._rest = 0, self.RESTS[0]

    @property
    def resting(self) -> bool:
        return self._left > 0

    def begin(self) -> None:
        """A request begins: it may not lose what others have saved.

        A draft that has gained lately is not to rest for what it lost on another text; one that
        has gained nothing in spite of several attempts is.
        """
        self._saved = min(self._saved, 0.0)
        if self._rest <= 2 * self.FORGIVEN:  # the next would be twice as long
            self._left = 0

    def excuse(self, steps: float) -> None:
        """What had to be paid once counts for nothing."""
        self._saved += steps

    def committed(self, tokens: int, spent_s: float, step_s: float) -> None:
        """A round has committed `tokens` in `spent_s`; the target alone needs `step_s` for one."""
        if self._left:
            self._left -= 1
            return
        self._saved = min(self._saved + tokens - spent_s / step_s, self.CREDIT)
        if self._saved < -self.LOSS:
            self._left, self._rest = self._rest, min(2 * self._rest, self.RESTS[1])
            self._saved = -self.LOSS / 2  # the next attempt is cheaper
        elif self._saved > 0:
            self._rest = self.RESTS[0]
