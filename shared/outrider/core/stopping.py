"""When to stop drafting where draft and target take turns, so that each waits for the other.

This is an optimal stopping problem (Chow, Robbins and Siegmund, "Great Expectations", 1971). Each
drafted token costs its drafting and its row of the pass, and shows how sure the draft is of it.
Going on is worth what the best rule gains from it, averaged over the confidences to be expected.
Every round begins the problem anew. So the price of time (see `outrider.core.price`) is the one at
which a round is worth exactly what its time costs.

Array axes: `notch` n stands for a joint acceptance of 2^(-NOTCH n), `level` for `estimates.LEVELS`,
`block` for 0 … LONGEST drafted tokens. Values are in tokens, times in seconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from outrider.core.estimates import LEVELS, LONGEST, Costs, Values

NOTCH, NOTCHES = 0.25, 25  # a notch is a quarter of a halving of the joint acceptance
LEAST_GAIN = 1e-3  # tokens; a first token that promises less is not drafted


@dataclass(frozen=True, slots=True)
class StoppingRule:
    """The best way to take turns; values are tokens."""

    rate: float  # tokens per second
    first: float  # the value of drafting a first token
    floors: tuple[float, ...]  # with 1, 2, … drafted: the least joint acceptance to go on with


def plan(costs: Costs, rule: StoppingRule, likely: Values, limit: int) -> int | None:
    """How many drafted tokens to verify where draft and target take turns; None: draft one more.

    `likely` [tokens in stock] are their acceptances; at most `limit` may be verified.
    """
    longest = min(LONGEST, limit)
    there = min(len(likely), longest)
    reach: Values = np.cumprod([1.0, *likely[:there]])  # [block]: joint acceptance
    gain = np.cumsum(reach)
    worth = gain - rule.rate * costs.rounds(reach)
    # the first token behind the block may be a hit, which spares drafting it again
    worth[:-1] += rule.rate * costs.draft_s * reach[1:]
    block = int(np.argmax(worth))
    if there == longest:
        return block
    if there:
        goes_on = bool(reach[there] >= rule.floors[there - 1])
    else:
        goes_on = bool(rule.first > worth[0] + LEAST_GAIN)
    return None if goes_on else block


@functools.lru_cache(maxsize=256)
def solve(costs: Costs, spread: tuple[float, ...]) -> StoppingRule:
    """The best rule for acceptances that have the weights `spread` [level].

    Newton's method finds the rate at which a round's profit is 0; its slope is minus the time.
    """
    passes, draft_s = costs.passes(LONGEST), costs.draft_s
    rate = 1 / float(passes[0])
    for _ in range(30):
        going_on, time_s = _values_of_going_on(costs, spread, rate)
        profit = 1 + max(float(going_on[0, 0]), -rate * float(passes[0]))
        if abs(profit) < 1e-6:
            break
        rate += profit / time_s
    reach = 2.0 ** (-NOTCH * np.arange(NOTCHES))
    stop = -rate * (passes[1:LONGEST, None] + costs.rollback_s * (1 - reach[None, :]))
    # a single token need not be verified: left in stock, it may be a hit
    stop[0] = np.maximum(stop[0], -reach * (1 - rate * draft_s) - rate * passes[0])
    floors = tuple(_floor(reach, gain) for gain in going_on[1:] - stop)
    return StoppingRule(rate, 1 + float(going_on[0, 0]), floors)


def _values_of_going_on(
    costs: Costs, spread: tuple[float, ...], rate: float
) -> tuple[Values, float]:
    """The values of drafting one more token, [block, notch], and the seconds of a whole round.

    `block` is how many are drafted already, 0 … LONGEST - 1. Worked out at this `rate`, backwards
    from the longest block.
    """
    reach = 2.0 ** (-NOTCH * np.arange(NOTCHES))
    then = reach[:, None] * LEVELS[None, :]  # [notch, level]: joint acceptance with one token more
    at = np.clip(-np.log2(then) / NOTCH, 0, NOTCHES - 1 - 1e-9)
    low = at.astype(np.intp)
    part = at - low
    weights, draft_s = np.asarray(spread), costs.draft_s
    rounds = costs.passes(LONGEST)[:, None] + costs.rollback_s * (1 - reach)  # [block, notch]
    value, time = -rate * rounds[-1], rounds[-1]  # [notch]
    going_on = np.empty((LONGEST, NOTCHES))
    for drafted in range(LONGEST - 1, -1, -1):
        kept = then + value[low] * (1 - part) + value[low + 1] * part
        kept_s = time[low] * (1 - part) + time[low + 1] * part
        dropped_s = rounds[drafted][:, None] - then * draft_s  # a hit spares drafting it again
        dropped = -rate * dropped_s
        next_s = draft_s if drafted else draft_s + costs.turn_s
        going_on[drafted] = np.maximum(kept, dropped) @ weights - rate * next_s
        more_s = next_s + np.where(kept > dropped, kept_s, dropped_s) @ weights
        stop = -rate * rounds[drafted]
        value = np.maximum(stop, going_on[drafted])
        time = np.where(going_on[drafted] > stop, more_s, rounds[drafted])
    return going_on, float(time[0])


def _floor(reach: NDArray[Any], gain: NDArray[Any]) -> float:
    """The least joint acceptance (`reach`) at which going on gains; 2: none. Arrays: [notch]."""
    losing = np.flatnonzero(gain <= 0)
    if not len(losing):
        return 0.0
    if losing[0] == 0:
        return 2.0
    at = losing[0]
    part = gain[at - 1] / (gain[at - 1] - gain[at])
    return float(reach[at - 1] * (reach[at] / reach[at - 1]) ** part)
