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
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.core.estimates import LEVELS, Costs, Values

DEEPEST = 24  # drafted tokens ahead that are told apart: more add nothing
LONGEST = 15  # most drafted tokens of a block
FARTHEST = 16  # drafted tokens in stock that a decision looks at one by one
WAIT_GAIN = 0.005  # tokens: waiting for less only adds decisions
GRID = 0.02  # acceptances are rounded to this, so that few processes are ever solved
LEAST, MOST = 0.3, 0.96
LEAST_GAIN = 1e-3  # tokens: what makes no more difference is left
NOTCH, NOTCHES = 0.25, 25  # of a joint acceptance: halvings, in quarters


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


def plan(
    costs: Costs, average: float, likely: Values, limit: int, next_s: float | None
) -> int | None:
    """How many drafted tokens to verify now while the draft goes on; None: wait for the next.

    `likely` are the acceptances of the tokens in stock; the next one is there in `next_s` (None: no
    more can come).
    """
    block, value, later = appraise(costs, average, likely, limit)
    if next_s is not None and len(likely) < min(limit, FARTHEST):
        rate, _ = solve(costs, rounded(average))
        if later - rate * next_s > value + WAIT_GAIN:
            return None
    return block


def plan_in_turn(costs: Costs, turn: Turn, likely: Values, limit: int) -> int | None:
    """How many drafted tokens to verify where draft and target take turns; None: draft one more.

    Each drafted token costs its drafting and its row, and shows how sure the draft is of it: going
    on is worth what the best stopping rule, `turn`, makes of the confidences to be expected.
    """
    rate = turn.rate
    longest = min(LONGEST, limit)
    there = min(len(likely), longest)
    reach = np.cumprod(np.concatenate(([1.0], likely[:there])))
    gain = np.cumsum(reach)
    worth = gain - rate * costs.passes(longest)[: there + 1]
    worth[:-1] += rate * costs.draft_s * reach[1:]  # left over, it may meet the target's own token
    block = int(np.argmax(worth))
    if there < longest:
        goes_on = (
            reach[there] >= turn.floors[there - 1] if there else turn.first > worth[0] + LEAST_GAIN
        )
        return None if goes_on else block
    return block


@dataclass(frozen=True, slots=True)
class Turn:
    """The best way to take turns; values are tokens."""

    rate: float  # tokens per second
    first: float  # the value of drafting a first token
    floors: tuple[float, ...]  # with 1, 2, … drafted: how likely all are accepted, to go on


@functools.lru_cache(maxsize=256)
def solve_in_turn(costs: Costs, spread: tuple[float, ...]) -> Turn:
    """The best rule of when to stop drafting, if acceptances are spread like this.

    An optimal stopping problem in two quantities: how many tokens are drafted, and how likely all
    of them are accepted, which is 2^(-NOTCH n) at index n. Every round begins it anew, so the rate
    is where a round is worth as much as its time; found by Newton's method.
    """
    reach = 2.0 ** (-NOTCH * np.arange(NOTCHES))
    then = reach[:, None] * LEVELS[None, :]  # having drafted a token of each acceptance
    at = np.clip(-np.log2(then) / NOTCH, 0, NOTCHES - 1 - 1e-9)
    low = at.astype(np.intp)
    part = at - low
    weights, passes, draft_s = np.asarray(spread), costs.passes(LONGEST), costs.draft_s
    rate = 1 / float(passes[0])
    going_on: list[Values] = []
    for _ in range(30):
        value, time = np.full(NOTCHES, -rate * passes[-1]), np.full(NOTCHES, passes[-1])
        going_on = []
        for drafted in range(LONGEST - 1, -1, -1):
            kept = then + value[low] * (1 - part) + value[low + 1] * part
            kept_s = time[low] * (1 - part) + time[low + 1] * part
            dropped_s = passes[drafted] - then * draft_s  # a hit spares drafting it again
            dropped = -rate * dropped_s
            next_s = draft_s if drafted else draft_s + costs.turn_s
            going_on.append(np.maximum(kept, dropped) @ weights - rate * next_s)
            more_s = next_s + np.where(kept > dropped, kept_s, dropped_s) @ weights
            stop = -rate * passes[drafted]
            value = np.maximum(stop, going_on[-1])
            time = np.where(going_on[-1] > stop, more_s, passes[drafted])
        profit = 1 + float(value[0])
        if abs(profit) < 1e-6:
            break
        rate += profit / float(time[0])
    going_on.reverse()
    stop = -rate * passes[1:LONGEST, None]
    stop = np.repeat(stop, NOTCHES, axis=1)
    # a single token may as well be left for the target's own to meet
    stop[0] = np.maximum(stop[0], -reach * (1 - rate * draft_s) - rate * passes[0])
    floors = tuple(_floor(reach, gain) for gain in np.array(going_on[1:]) - stop)
    return Turn(rate, 1 + float(going_on[0][0]), floors)


def _floor(reach: NDArray[Any], gain: NDArray[Any]) -> float:
    """The least reach from which on going on gains; 2 if it never does."""
    losing = np.flatnonzero(gain <= 0)
    if not len(losing):
        return 0.0
    if losing[0] == 0:
        return 2.0
    at = losing[0]
    part = gain[at - 1] / (gain[at - 1] - gain[at])
    return float(reach[at - 1] * (reach[at] / reach[at - 1]) ** part)


def appraise(costs: Costs, average: float, likely: Values, limit: int) -> tuple[int, float, float]:
    """The best number of drafted tokens to verify now, the value of doing so, and with one more.

    From the last token in stock to the first: `worth[i, m]` is the value of what is left when i of
    the tokens in stock are committed and m more, of `average` acceptance, have been drafted behind
    the last. This is done between a verdict and the target's next pass, hence the tables.
    """
    acceptance = rounded(average)
    known, rows = min(len(likely), FARTHEST), min(LONGEST, limit) + 1
    price, alone, unknown = _prospect(costs, acceptance)
    if not known:
        return 0, alone, float(unknown[0, min(1, limit)])
    likely = np.concatenate((likely[:known], np.full(rows, acceptance)))
    worth = np.concatenate((np.empty((known, DEEPEST + 1)), unknown[: rows + 1]))
    for start in range(known - 1, -1, -1):
        left = _leftovers(costs)[known - start]
        # nothing is drafted behind the known tokens yet: the first is verified now, or after one
        of = np.s_[:rows, : DEEPEST + 1 if start else 2]
        reach = likely[start : start + rows].cumprod()
        gain = reach.cumsum() - reach
        behind = worth[start + 1 :].ravel()
        fewer = behind.take(left.at[of])
        total = fewer + left.part[of] * (behind[1:].take(left.at[of]) - fewer)
        total *= reach[:, None]
        total += (gain - price[:rows])[:, None] + left.barred[of]
        worth[start, : total.shape[1]] = total.max(axis=0)
    now, later = worth[0, :2].tolist()
    return int(total[:, 0].argmax()), now, later


@dataclass(frozen=True, slots=True)
class Leftover:
    """What of a stock is left by a block: arrays by its length and what is drafted behind it."""

    at: NDArray[np.intp]  # where in `appraise` its worth stands, the row behind the first being 0
    part: Values  # how much of the way from there to one drafted token more
    barred: Values  # 0, or -inf where the block is longer than the stock


@functools.lru_cache(maxsize=8)
def _leftovers(costs: Costs) -> tuple[Leftover, ...]:
    """Those of 0, 1, … FARTHEST known tokens."""
    drafted = (costs.passes(LONGEST) / costs.draft_s)[:, None]
    block, more = np.arange(LONGEST + 1)[:, None], np.arange(DEEPEST + 1)[None, :]
    found = []
    for known in range(FARTHEST + 1):
        room = np.maximum(DEEPEST - known - more, 0.0)
        after: Values = np.asarray(more + np.minimum(drafted, room), np.float64)
        low = np.minimum(after.astype(np.intp), DEEPEST - 1)
        barred = np.where(block <= known + more, 0.0, -np.inf)
        found.append(Leftover(block * (DEEPEST + 1) + low, after - low, barred))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _prospect(costs: Costs, acceptance: float) -> tuple[Values, float, Values]:
    """What a pass costs beyond the token that it always gives, by its drafted tokens; what a plain
    step is worth; the worth of what is left, where none of it is known."""
    rate, value = solve(costs, acceptance)
    price = rate * costs.passes(LONGEST) - 1
    stock = costs.passes(0)[0] / costs.draft_s - 1
    alone = acceptance * np.interp(stock, np.arange(DEEPEST + 1), value) - price[0]
    unknown = np.zeros((LONGEST + 2, DEEPEST + 1))
    for taken in range(LONGEST + 2):  # shorter by as many as the block took of it
        unknown[taken, taken:] = value[: DEEPEST + 1 - taken]
    return price, float(alone), unknown


def rounded(acceptance: float) -> float:
    return min(max(round(acceptance / GRID) * GRID, LEAST), MOST)
