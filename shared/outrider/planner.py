"""The price of time: when to verify, how much, how far to draft, decided from measured costs.

Let `rate` be the tokens per second that the best policy reaches on text like the recent one. A
second then costs `rate` tokens, and an action is worth the tokens that it is expected to commit,
minus rate times the seconds that it takes, plus the value of the drafted stock that it leaves: an
average-reward semi-Markov decision process (Howard 1960), whose state is the stock. It is solved
twice: once for stocks of equally good tokens, which gives the rate and the value of drafts that do
not exist yet; then, at each decision, for the very tokens that are there, each with the acceptance
that its confidence foretells. No block length is tuned; where drafts are bad, it is 0.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

DEEPEST = 24  # drafted tokens ahead that are told apart: more add nothing
LONGEST = 15  # most drafted tokens of a block
FARTHEST = 16  # drafted tokens in stock that a decision looks at one by one
WAITS_FOR = 4
GRID = 0.02  # acceptances are rounded to this, so that few processes are ever solved
LEAST, MOST = 0.3, 0.96


@dataclass(frozen=True, slots=True)
class Costs:
    """What things take, in seconds."""

    verify_s: tuple[float, ...]  # a pass over 1, 2, 3 … rows
    draft_s: float  # one drafted token
    link_s: float  # added to each pass by messages

    def passes(self, longest: int) -> Values:
        """Seconds of a round with 0 … `longest` drafted tokens."""
        rows = np.arange(1, longest + 2)
        known = np.arange(1, len(self.verify_s) + 1)
        slope = max(0.0, self.verify_s[-1] - self.verify_s[-2]) if len(self.verify_s) > 1 else 0.0
        beyond = np.maximum(rows - len(self.verify_s), 0) * slope
        seconds: Values = np.interp(rows, known, self.verify_s) + beyond + self.link_s
        return seconds


@functools.lru_cache(maxsize=256)
def solve(costs: Costs, acceptance: float) -> tuple[float, Values]:
    """The best rate, and the value of 0 … DEEPEST drafted tokens of this acceptance each.

    A draft that fails leaves no stock, so every failure begins the process anew.
    """
    stock = np.arange(DEEPEST + 1)[:, None]
    block = np.arange(LONGEST + 1)[None, :]
    seconds = costs.passes(LONGEST)[None, :]
    gain = (1 - acceptance ** (block + 1)) / (1 - acceptance)
    left = stock - block - 1 + np.minimum(seconds / costs.draft_s, DEEPEST - stock)
    hit = np.where(left >= 0, acceptance ** (block + 1), 0.0)
    left = np.clip(left, 0, DEEPEST)
    low = np.minimum(left.astype(int), DEEPEST - 1)
    part = left - low
    worst = np.where(block <= stock, 0.0, -1e9)

    # policy iteration (Howard 1960): the rate and values of a policy are the solution of linear
    # equations in which the value of no stock is 0, so the rate can take its place
    here = np.arange(DEEPEST + 1)
    chosen = np.minimum(here, LONGEST)
    for _ in range(50):
        system = np.eye(DEEPEST + 1)
        np.add.at(system, (here, low[here, chosen]), -(hit * (1 - part))[here, chosen])
        np.add.at(system, (here, low[here, chosen] + 1), -(hit * part)[here, chosen])
        system[:, 0] = seconds[0, chosen]
        value = np.linalg.solve(system, gain[0, chosen])
        rate, value[0] = float(value[0]), 0.0
        worth = (
            gain - rate * seconds + hit * (value[low] * (1 - part) + value[low + 1] * part) + worst
        )
        better = worth.argmax(axis=1)
        if (worth[here, better] - worth[here, chosen]).max() < 1e-9:
            break
        chosen = better
    return rate, value


def forecast(costs: Costs, acceptance: float, pipelined: bool) -> float:
    """Tokens per second, were every drafted token accepted so often; never below the target alone.

    `pipelined`: the draft goes on while the target verifies; otherwise they take turns.
    """
    acceptance = min(max(acceptance, 0.0), MOST)
    if pipelined:
        return solve(costs, acceptance)[0]
    blocks = np.arange(LONGEST + 1)
    gain = (1 - acceptance ** (blocks + 1)) / (1 - acceptance)
    return float((gain / (costs.passes(LONGEST) + blocks * costs.draft_s)).max())


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

    def drafted(self, elapsed_s: float) -> None:
        self._draft += self.SHARED * _bounded(math.log(max(elapsed_s, 1e-6)) - self._draft)
        self._costs = None

    @property
    def costs(self) -> Costs:
        if self._costs is None:
            verify = np.maximum.accumulate(self._rounded(self._verify))
            draft, link = self._rounded([self._draft, self._link])
            self._costs = Costs(tuple(map(float, verify)), float(draft), float(link))
        return self._costs

    def _rounded(self, logs: Sequence[float]) -> Values:
        rounded: Values = np.exp(np.round(np.asarray(logs) / self.STEP) * self.STEP)
        return rounded


def _bounded(error: float) -> float:
    """One measurement that was disturbed must not count for more than a doubling."""
    return min(max(error, -math.log(2)), math.log(2))


class Acceptance:
    """How likely a drafted token is accepted: on average lately, and by the draft's confidence."""

    # doubt = log2(1 / (1 - confidence)) and what came true at it, on 1,644 recorded tokens
    DOUBTS = (0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 6.0)
    PRIOR = (0.22, 0.5, 0.70, 0.86, 0.925, 0.965, 0.995)

    def __init__(self, memory: float = 60.0, prior: float = 0.8, weight: float = 10.0) -> None:
        self._memory = memory
        self._good, self._seen = prior * weight, weight

    def observe(self, good: bool) -> None:
        fade = 1 - 1 / self._memory
        self._good = self._good * fade + good
        self._seen = self._seen * fade + 1

    @property
    def average(self) -> float:
        return self._good / self._seen

    def of(self, confidences: Sequence[float]) -> Values:
        doubts = -np.log2(np.maximum(1 - np.asarray(confidences, np.float64), 1e-4))
        likely: Values = np.interp(doubts, self.DOUBTS, self.PRIOR)
        return likely


def plan(
    costs: Costs, average: float, likely: Values, limit: int, next_s: float | None
) -> int | None:
    """How many drafted tokens to verify now while the draft goes on; None: wait for the next.

    `likely` are the acceptances of the tokens in stock; the next one is there in `next_s` (None: no
    more can come). Waiting is considered where the stock is so small that one more could matter.
    """
    block, value = appraise(costs, average, likely, limit)
    if next_s is not None and len(likely) < min(limit, WAITS_FOR):
        acceptance = rounded(average)
        _, later = appraise(costs, average, np.append(likely, acceptance), limit)
        rate, _ = solve(costs, acceptance)
        if later - rate * next_s > value + 1e-3:
            return None
    return block


def plan_in_turn(costs: Costs, average: float, likely: Values, limit: int) -> int:
    """How many tokens the block is to have when draft and target take turns.

    More than there are in `likely`: draft so many first. Each further token costs its drafting and
    its row, and is worth what it adds to the expected length, at the rate of the best block.
    """
    acceptance = rounded(average)
    longest = min(LONGEST, limit)
    passes = costs.passes(longest)
    blocks = np.arange(longest + 1)
    usual = (1 - acceptance ** (blocks + 1)) / (1 - acceptance)
    rate = float((usual / (passes + blocks * costs.draft_s)).max())
    there = min(len(likely), longest)
    all_of_them = np.concatenate((likely[:there], np.full(longest - there, acceptance)))
    gain = 1 + np.concatenate(([0.0], np.cumsum(np.cumprod(all_of_them))))
    still = np.maximum(blocks - there, 0)
    return int(np.argmax(gain - rate * (passes + still * costs.draft_s)))


def appraise(costs: Costs, average: float, likely: Values, limit: int) -> tuple[int, float]:
    """The best number of drafted tokens to verify now, and the value of doing so.

    `worth[i, m]` is the value of what is left when i of the tokens in stock are committed and m
    more, of `average` acceptance, have been drafted behind the last.
    """
    acceptance = rounded(average)
    rate, value = solve(costs, acceptance)
    known, longest = min(len(likely), FARTHEST), min(LONGEST, limit)
    likely = np.concatenate((likely[:known], np.full(longest + 1, acceptance)))
    seconds = costs.passes(longest)
    block, more = np.arange(longest + 1)[:, None], np.arange(DEEPEST + 1)[None, :]
    price, drafted = rate * seconds[:, None], (seconds / costs.draft_s)[:, None]
    # rows behind the known tokens: what is left is shorter by as many as the block took of it
    worth = np.zeros((known + longest + 2, DEEPEST + 1))
    for taken in range(longest + 2):
        worth[known + taken, taken:] = value[: DEEPEST + 1 - taken]
    for start in range(known - 1, -1, -1):
        now = more if start else more[:, :1]  # nothing is drafted behind the known tokens yet
        reach = np.cumprod(likely[start : start + longest + 1])[:, None]
        gain = np.cumsum(reach, axis=0) - reach + 1
        room = np.maximum(DEEPEST - (known - start) - now, 0)
        left = now + np.minimum(drafted, room)
        low = np.minimum(left.astype(np.intp), DEEPEST - 1)
        after = start + 1 + block
        rest = worth[after, low]
        rest = rest + (left - low) * (worth[after, low + 1] - rest)
        total = np.where(block <= known - start + now, gain - price + reach * rest, -np.inf)
        if start == 0:
            best = int(np.argmax(total[:, 0]))
            return best, float(total[best, 0])
        worth[start] = total.max(axis=0)
    return 0, float(1 - price[0, 0] + acceptance * np.interp(drafted[0, 0] - 1, more[0], value))


def rounded(acceptance: float) -> float:
    return min(max(round(acceptance / GRID) * GRID, LEAST), MOST)
