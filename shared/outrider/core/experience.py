"""What the requests of a pipeline learn from each other, and when a draft that loses is to rest."""

from __future__ import annotations

import numpy as np

from outrider.core import stopping
from outrider.core.estimates import LEVELS, LONGEST, Acceptance, CostModel, Spread

CERTAIN = (0.0,) * (len(LEVELS) - 1) + (1.0,)  # the spread of a draft that is nearly always right
PROBES = (8, 24, 72, 512)  # plain steps until a draft that fails is tried again: each time longer
DOUBT = 1 / 32  # of the time of plain steps: to try a draft that has failed, or could never pay


class Experience:
    """Each request of a pipeline starts where the last one has ended.

    There is one for each mode, for in turns a drafted token also costs its messages.
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
        best = stopping.solve(costs, CERTAIN)
        hopeless = stopping.plan(costs, best, np.empty(0), LONGEST) is not None
        price = (costs.draft_s + costs.turn_s) / self.step_s
        if hopeless and price > DOUBT * self.plain_steps:
            return False
        self.plain_steps = 0
        self.patience = next((longer for longer in PROBES if longer > self.patience), PROBES[-1])
        return True


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
