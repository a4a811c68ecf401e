"""How far ahead of the verdicts to order passes: from how long a pass and a round trip take.

A block is chosen as late as it can be, when the draft has most to offer, but so early that it is
there when the target has done what it was asked for before. Over a link that is longer than a pass
several are on their way at once; over one that takes no time there is nothing to gain. Times are
seconds on the session's clock, on which a pass of the target ends when its verdict comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from outrider.core.estimates import usual_acceptance
from outrider.core.values import Drafted, Verdict

NEAR = 0.01  # of a plain step: a shorter round trip is not worth a message
MARGIN, MARGIN_S = 0.1, 5e-4  # an order is there so much of a pass earlier than it is needed
STEPS, MOST_STEPS = 4, 32  # plain steps that the target may take by itself: least and most
TURN_STEPS = 3  # … at least, where the draft may be tried again as soon as it is idle
MOST_AHEAD = 8  # orders that have no verdict yet
LEAST_REACH = 0.05  # a block that is less likely to be begun is not sent


class Pace:
    """What is known of the target's passes for one request, and of the way there and back."""

    def __init__(self) -> None:
        self.trip_s: float | None = None  # a round trip without its pass; None: not known yet
        self._passes: dict[int, float] = {}  # by rows
        self._last_s = 0.0  # the last pass
        self._sent: dict[int, float] = {}  # when an order was sent, by its round
        self._answered = 0.0  # when the last verdict came
        self._free_at = 0.0  # when the target will have done what it was asked for

    # ---- what happens ---------------------------------------------------------------------------

    def asked(self, round: int, now: float, rows: int) -> None:
        """The target is idle, and is asked for a pass over so many rows."""
        self._sent[round] = now
        self._free_at = now + (self.trip_s or 0.0) + self.pass_s(rows)

    def asked_more(self, round: int, now: float, rows: int) -> None:
        """The target is busy, and is asked for another pass behind that."""
        self._sent[round] = now
        self._free_at += self.pass_s(rows)

    def answered(self, verdict: Verdict, rows: int, now: float) -> float:
        """A verdict on so many rows has come; return the seconds that its round took.

        That begins with the order, or with the verdict before if the order was there by then.
        """
        sent = self._sent.pop(verdict.round, None)
        self._sent = {round: at for round, at in self._sent.items() if round > verdict.round}
        began = self._answered if sent is None else max(sent, self._answered)
        round_s, elapsed_s = max(0.0, now - began - verdict.waited_s), verdict.elapsed_s
        self._answered = now
        if not verdict.rows:  # it also read text
            return round_s
        before = self._passes.get(rows, elapsed_s)
        self._passes[rows], self._last_s = before + 0.3 * (elapsed_s - before), elapsed_s
        if sent is not None:
            trip_s = max(0.0, now - sent - elapsed_s - verdict.waited_s)
            self._travelled(trip_s, is_late=round_s > (1 + MARGIN) * elapsed_s)
        return round_s

    def goes_on(self, now: float, rows: Iterable[int]) -> None:
        """A verdict has come, and the target has begun passes over so many rows."""
        self._free_at = now + sum(map(self.pass_s, rows))

    def _travelled(self, trip_s: float, is_late: bool) -> None:
        """A message there and one back took so long, or less if the order had to wait there.

        An order that is late has not waited.
        """
        if self.trip_s is None or trip_s < self.trip_s:
            self.trip_s = trip_s
        elif is_late:
            self.trip_s += 0.2 * (min(trip_s, 2 * self.trip_s + MARGIN_S) - self.trip_s)

    # ---- what follows ---------------------------------------------------------------------------

    def pass_s(self, rows: int) -> float:
        """How long a pass over so many rows will take."""
        return self._passes.get(rows, self._last_s)

    @property
    def due(self) -> float:
        """When to order the next block."""
        return self._free_at - (self.trip_s or 0.0) - MARGIN * self._last_s - MARGIN_S

    @property
    def is_far(self) -> bool:
        """Whether waiting for messages costs the target more than ordering ahead does."""
        return self.trip_s is not None and self.trip_s > NEAR * self.pass_s(1)

    @property
    def passes_away(self) -> int:
        """Passes that begin during a round trip: so many blocks may be on their way besides one."""
        step_s = self.pass_s(1)
        away = math.ceil((self.trip_s or 0.0) / step_s) if step_s else 0
        return min(away, MOST_AHEAD)

    @property
    def steps(self) -> int:
        """How many plain steps the target may take by itself where nothing is known to follow."""
        return min(STEPS + 2 * self.passes_away, MOST_STEPS)


def reach(drafted: Sequence[Drafted]) -> float:
    """How likely all of these are what the target will choose."""
    return math.prod(usual_acceptance(one.confidence) for one in drafted)
