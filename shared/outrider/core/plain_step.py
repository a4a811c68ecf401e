"""What a plain step of the target takes, and how much longer while a draft computes beside it.

Workers with cores or devices of their own may still share caches and the way to memory: on two
cores of one processor the target's steps took 6 % longer beside a busy draft. What a draft brings
must be counted in steps without one, or it seems to gain what it only takes. So steps with it and
steps without it are told apart, by a Kalman filter of two states: the logarithm of a step's time,
which wanders, and the *drag*, the logarithm of how many times as long one takes beside the draft.
"""

from __future__ import annotations

import math

NOISE = 0.08  # of a single step, in logarithms: its standard deviation
WANDERS, DRIFTS = 0.018, 0.001  # per pass, of a step's time and of the drag
AT_LOAD, PRIOR = 0.035, 0.1  # how far the time measured at load is off, and what the drag may be
MOST_LOG = math.log(2)  # a disturbed step counts for no more than twice the usual
BETWEEN = 0.01  # of a pass: most that is between it and the next if the target goes on by itself
SURE = 0.02  # the drag is known if it is off by no more
SELDOM, RARELY = 24, 512  # passes beside a draft before the target is watched without one again


def by_itself(elapsed_s: float, round_s: float) -> float:
    """What a plain step takes where no message is waited for, from its pass and its round."""
    return min(round_s, (1 + BETWEEN) * elapsed_s)


class PlainStep:
    """The target's, alone and beside a draft that computes at the same time."""

    def __init__(self, alone_s: float) -> None:
        self._log, self._drag = math.log(max(alone_s, 1e-9)), 0.0
        # the variances of both, and what they have in common
        self._own, self._common, self._drags = AT_LOAD**2, 0.0, PRIOR**2
        self._beside = 0  # passes since the last without a draft

    @property
    def alone_s(self) -> float:
        return math.exp(self._log)

    @property
    def drag(self) -> float:
        """How many times as long a step takes beside a draft that computes; at least 1."""
        return math.exp(max(0.0, self._drag))

    @property
    def is_in_doubt(self) -> bool:
        """Whether the target is to be watched without a draft for some steps."""
        is_sure = self._drags <= SURE**2
        return self._beside >= (RARELY if is_sure else SELDOM)

    def passed(self, beside: float) -> None:
        """The target's pass was over; for this share of it the draft computed too."""
        self._own += WANDERS**2
        self._drags += DRIFTS**2
        self._beside = self._beside + 1 if beside > 0.5 else 0

    def took(self, elapsed_s: float, beside: float, weight: float = 1.0) -> None:
        """That pass was a plain step, and of `weight`."""
        error = math.log(max(elapsed_s, 1e-9)) - self._log - beside * self._drag
        error = max(-MOST_LOG, min(MOST_LOG, error))
        with_own = self._own + beside * self._common
        with_drag = self._common + beside * self._drags
        spread = with_own + beside * with_drag + NOISE**2 / weight
        gain, drag_gain = with_own / spread, with_drag / spread
        self._log += gain * error
        self._drag += drag_gain * error
        self._own -= gain * with_own
        self._common -= gain * with_drag
        self._drags -= drag_gain * with_drag
