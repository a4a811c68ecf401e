"""What a policy is told: what things cost, and how likely drafted tokens are accepted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Costs:
    """What things take, in seconds."""

    verify_s: tuple[float, ...]  # a pass over 1, 2, 3 … rows
    draft_s: float  # one drafted token
    link_s: float  # added to each pass by messages
    turn_s: float = 0.0  # added to the first drafted token where draft and target take turns

    def passes(self, longest: int) -> Values:
        """Seconds of a round with 0 … `longest` drafted tokens."""
        rows = np.arange(1, longest + 2)
        known = np.arange(1, len(self.verify_s) + 1)
        slope = max(0.0, self.verify_s[-1] - self.verify_s[-2]) if len(self.verify_s) > 1 else 0.0
        beyond = np.maximum(rows - len(self.verify_s), 0) * slope
        seconds: Values = np.interp(rows, known, self.verify_s) + beyond + self.link_s
        return seconds


class CostModel:
    """The costs of a pair of workers: calibrated when they were loaded, followed ever after.

    A measurement moves the number of rows that it is of, and a little all others with it, as a
    machine that has become slower is so for all. `costs` are rounded to steps of 4 %, so that what
    is solved for them can be kept.
    """

    OWN, SHARED, STEP = 0.2, 0.05, math.log(1.04)

    def __init__(self, verify_s: Sequence[float], draft_s: float, link_s: float = 5e-4) -> None:
        self._verify = [math.log(max(seconds, 1e-6)) for seconds in verify_s]
        self._draft = math.log(max(draft_s, 1e-6))
        self._link = math.log(link_s)
        self._first = self._draft + math.log(1.3)
        self._costs: Costs | None = None
        self.acceptance = Acceptance(memory=300)  # of all requests: where the next one starts

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float) -> None:
        if not 1 <= rows <= len(self._verify):
            return
        error = _bounded(math.log(max(elapsed_s, 1e-6)) - self._verify[rows - 1])
        self._verify = [cost + self.SHARED * error for cost in self._verify]
        self._verify[rows - 1] += (self.OWN - self.SHARED) * error
        link_s = min(max(round_trip_s - elapsed_s, 1e-5), 1.0)
        self._link += self.OWN * _bounded(math.log(link_s) - self._link)
        self._costs = None

    def drafted(self, elapsed_s: float, first: bool = False) -> None:
        """`first`: after the draft's turn began, with what it had to catch up."""
        seconds = math.log(max(elapsed_s, 1e-6))
        if first:
            self._first += self.SHARED * _bounded(seconds - self._first)
        else:
            self._draft += self.SHARED * _bounded(seconds - self._draft)
        self._costs = None

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            verify = np.maximum.accumulate(self._rounded(self._verify))
            draft, link, first = map(float, self._rounded([self._draft, self._link, self._first]))
            verify_s = tuple(map(float, verify))
            self._costs = Costs(verify_s, draft, link, max(0.0, first - draft))
        return self._costs

    def _rounded(self, logs: Sequence[float]) -> Values:
        rounded: Values = np.exp(np.round(np.asarray(logs) / self.STEP) * self.STEP)
        return rounded


def _bounded(error: float) -> float:
    """One measurement that was disturbed must not count for more than a doubling."""
    return min(max(error, -math.log(2)), math.log(2))


# doubt = log2(1 / (1 - confidence)) and what came true at it, on 1,644 recorded tokens
DOUBTS = (0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 6.0)
CAME_TRUE = (0.22, 0.5, 0.70, 0.86, 0.925, 0.965, 0.995)


def usual_acceptance(confidences: Sequence[float]) -> Values:
    """How often tokens were accepted of which a draft was so sure."""
    doubts = -np.log2(np.maximum(1 - np.asarray(confidences, np.float64), 1e-4))
    likely: Values = np.interp(doubts, DOUBTS, CAME_TRUE)
    return likely


class Acceptance:
    """How likely a drafted token is accepted: on average lately, and by the draft's confidence."""

    def __init__(self, memory: float = 60.0, prior: float = 0.8, weight: float = 10.0) -> None:
        self._memory, self._weight = memory, weight
        self._good, self._seen = prior * weight, weight
        self._came, self._foretold = weight, weight

    def observe(self, good: bool, confidence: float) -> None:
        """A drafted token of this confidence was accepted or not."""
        fade = 1 - 1 / self._memory
        self._good, self._seen = self._good * fade + good, self._seen * fade + 1
        self._came = self._came * fade + good
        self._foretold = self._foretold * fade + float(usual_acceptance((confidence,))[0])

    @property
    def average(self) -> float:
        return self._good / self._seen

    @property
    def trust(self) -> float:
        """How much of the accepted tokens that the confidences foretold there were; at most 1."""
        weight = self._weight
        return min(1.0, (self._came + weight) / (self._foretold + weight))

    def of(self, confidences: Sequence[float]) -> Values:
        return usual_acceptance(confidences) * self.trust


LEVELS = np.array([0.3, 0.5, 0.65, 0.78, 0.87, 0.93, 0.97, 0.995])  # acceptances told apart


class Spread:
    """How the acceptances of drafted tokens are spread lately: the weight of each of `LEVELS`."""

    MEMORY, SHARES = 60.0, 20

    def __init__(self, prior: Values | None = None, weight: float = 16.0) -> None:
        self._seen = weight * (np.full(len(LEVELS), 1 / len(LEVELS)) if prior is None else prior)

    def observe(self, likely: Values) -> None:
        for level in np.searchsorted((LEVELS[1:] + LEVELS[:-1]) / 2, likely):
            self._seen *= 1 - 1 / self.MEMORY
            self._seen[level] += 1

    @property
    def weights(self) -> Values:
        weights: Values = self._seen / self._seen.sum()
        return weights

    @property
    def rounded(self) -> tuple[float, ...]:
        """The weights in steps of a twentieth, so that what is solved for them can be kept."""
        shares = np.round(self.weights * self.SHARES)
        return tuple(map(float, shares / max(shares.sum(), 1.0)))
