"""What the requests of a pipeline learn from each other, and when a losing draft rests."""

from __future__ import annotations

import numpy as np

from outrider.core import stopping
from outrider.core.estimates import LEVELS, LONGEST, Acceptance, CostModel, Spread, Trust
from outrider.core.plain_step import PlainStep, by_itself
from outrider.core.reading import UNTRIED, Lengths

CERTAIN = (0.0,) * (len(LEVELS) - 1) + (1.0,)  # the spread of a draft that is nearly always right
PROBES = (8, 24, 72, 512)  # plain steps before a failing draft is tried again, longer each time
WORTH = 0.97  # of the target alone: what drafting beside it must promise; a little is not foreseen
SURELY = 1.15  # … and so much that it pays whatever is not known of the drag
WATCHED = 4  # plain steps for which the target is watched without a draft
FARTHER = 0.1  # what the messages of one pass count for if they took longer than is known
FADES = 0.98  # … and what is left, after each pass, of what is known
TRIAL, AGAIN = 12, 4  # rounds that promise too little before it rests; if it did so lately
PAUSES = 24, 384  # rounds for which it rests then: at first, and at most
TRIAL_SHARE = 1 / 32  # most that a trial may take, as a share of the plain steps since the last one


class Experience:
    """What was learnt so far: each request starts where the last one has ended.

    There is one for each mode, because in sync mode a drafted token also costs its messages.
    """

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.acceptance = Acceptance(memory=300)
        self.spread = Spread(memory=300)
        self.promised = Trust()
        step_s, link_s = costs.costs.verify_s[0], costs.costs.link_s
        self.guard = Guard()
        self.lengths = Lengths()
        self.untried = UNTRIED  # tokens that were written since a draft was tried in vain
        self.failures = 0  # vain attempts, one after the other
        self.judged = 0  # drafted or recalled tokens that were compared with the target's
        # the guard's unit: only plain steps move it; in the cost model every pass moves every cost
        self.plain = PlainStep(by_itself(step_s, step_s + link_s))
        self.away_s = costs.costs.link_s  # what the messages of a pass take that is waited for
        self.plain_steps, self.patience = PROBES[0], PROBES[0]  # the first probe is at once
        self._doubted = 0  # rounds, one behind the other, that promised too little
        self._pause = PAUSES[0]  # rounds without a draft when they have become too many
        self.prompt_steps = 0.0  # what the last prompt took the draft, in plain steps

    def begin(self) -> None:
        """A request begins: a draft that did not pay on the last text may pay on this one."""
        self.guard.begin()
        self._doubted = 0 if self._pause == PAUSES[0] else TRIAL - AGAIN
        if self.patience < PROBES[-1]:
            self.plain_steps = self.patience

    @property
    def step_s(self) -> float:
        """A plain step now, without a draft that computes beside it."""
        return self.plain.alone_s * self.costs.growth(self.costs.crowd)

    def stepped(self, elapsed_s: float, requests: int = 1, beside: float = 0.0) -> None:
        """A plain step of so many was seen, by each of them; see `PlainStep` for `beside`."""
        self.plain.took(elapsed_s / self.costs.growth(requests), beside, 1 / requests)

    def waited(self, link_s: float) -> None:
        """A pass was over so much later than its computing: nothing, if it was ordered before."""
        more_s = link_s - self.away_s
        self.away_s += FARTHER * more_s if more_s > 0 else (FADES - 1) * self.away_s

    def foretold(self, speedup: float) -> None:
        """A draft that computes beside the target lets expect this; it rests if that is a loss."""
        if self.plain.is_in_doubt and speedup < SURELY:
            self.guard.pause(WATCHED)
        if speedup >= WORTH:
            self._doubted, self._pause = 0, PAUSES[0]
            return
        self._doubted += 1
        if self._doubted == TRIAL:
            self.guard.pause(self._pause)
            self._doubted, self._pause = 0, min(2 * self._pause, PAUSES[1])

    @property
    def is_hopeless(self) -> bool:
        """Whether not even a draft that is nearly always right would pay at these costs."""
        costs = self.costs.costs
        best = stopping.solve(costs, CERTAIN)
        return stopping.plan(costs, best, np.empty(0), LONGEST) is not None

    def tried(self, pays: bool) -> None:
        """A draft was tried on a text, and `pays` there or not."""
        self.untried = UNTRIED if pays else 0.0
        self.failures = 0 if pays else self.failures + 1
        if pays:
            self.plain_steps, self.patience = 0, PROBES[0]
        else:  # it was seen by what it recalls, so a single drafted token tells nothing new
            self.plain_steps, self.patience = 0, max(self.patience, PROBES[2])

    def probes(self, block: int | None) -> bool:
        """Whether to try a draft again that did not pay (`block` is 0); ever less often.

        Nothing else would show that it has become better, or that it cost too much only at load.
        """
        if block != 0:
            self.plain_steps, self.patience = 0, PROBES[0]
            return False
        self.plain_steps += 1
        if self.plain_steps < self.patience:
            return False
        # an attempt may begin with a long prompt
        if self.patience == PROBES[-1] and self.prompt_steps > TRIAL_SHARE * self.plain_steps:
            return False
        costs, hopeless = self.costs.costs, self.is_hopeless
        price = (costs.draft_s + costs.turn_s) / self.step_s
        if hopeless and price > TRIAL_SHARE * self.plain_steps:
            return False
        self.plain_steps = 0
        self.patience = next((longer for longer in PROBES if longer > self.patience), PROBES[-1])
        return True


class Guard:
    """Keeps account of the time that drafts have saved or lost, and lets them rest when they lose.

    Costs and confidences can mislead: a draft may be sure and wrong. The account cannot. It counts
    in plain steps of the target and never exceeds `CREDIT` of them.
    """

    LOSS, CREDIT, RESTS = 2.5, 6.0, (24, 256)
    LEAST, SHARE = 0.5, 0.01  # of an answer, in steps: the loss that a short one allows
    FORGIVEN = 48  # a rest of at most so many steps ends with its request

    def __init__(self) -> None:
        self._saved, self._loss = 0.0, self.LOSS
        self._left, self._rest = 0, self.RESTS[0]

    @property
    def resting(self) -> bool:
        return self._left > 0

    def begin(self) -> None:
        """A request begins: it may not spend what others have saved.

        A draft that has gained lately need not rest for what it lost on another text. One that has
        gained nothing in several attempts must.
        """
        self._saved = min(self._saved, 0.0)
        if self._rest <= 2 * self.FORGIVEN:  # the next would be twice as long
            self._left = 0

    def pause(self, rounds: int) -> None:
        """Let it rest for so many rounds at least, for nothing that it has done."""
        self._left = max(self._left, rounds)

    def expect(self, tokens: float) -> None:
        """So many tokens are to come: what may be lost on them is in proportion."""
        self._loss = min(max(self.SHARE * tokens, self.LEAST), self.LOSS)

    def excuse(self, steps: float) -> None:
        """Do not count `steps` that had to be paid once, such as for a prompt."""
        self._saved += steps

    def committed(self, tokens: int, spent_s: float, step_s: float, link_s: float = 0.0) -> None:
        """A round has committed `tokens` in `spent_s`; the target alone needs `step_s` for one.

        The farther the target, the more does a single wrong block lose where one is waited for: its
        messages take `link_s`, and a step counts for less by as much.
        """
        if self._left:
            self._left -= 1
            return
        saved = (tokens * step_s - spent_s) / (step_s + link_s)
        self._saved = min(self._saved + saved, self.CREDIT)
        if self._saved < -self._loss:
            self._left, self._rest = self._rest, min(2 * self._rest, self.RESTS[1])
            self._saved = -self._loss / 2  # the next attempt is cheaper
        elif self._saved > 0:
            self._rest = self.RESTS[0]
