"""The price of time while the draft goes on: how much to verify now, or whether to wait.

Let `rate` be the tokens per second that the best rule reaches on text like the recent one. A second
then costs `rate` tokens, and an action is worth the tokens that it is expected to commit, minus
rate times the seconds that it takes, plus the value of the drafted stock that it leaves. This is an
average-reward semi-Markov decision process (Howard, "Dynamic Programming and Markov Processes",
1960) whose state is the stock. It is solved twice: once for stocks of equally good tokens, which
gives the rate and the value of drafts that do not exist yet; then, at each decision, for the very
tokens that are there, each with the acceptance that its confidence foretells. No block length is
tuned; where drafts are bad, it is 0.

Where draft and target take turns, the stopping rule of `outrider.core.stopping` decides instead.

Array axes: `stock` = 0 … DEEPEST drafted tokens there, `block` = 0 … LONGEST of them verified.
Values are in tokens, times in seconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from outrider.core.estimates import LONGEST, Costs, Values

DEEPEST = 24  # drafted tokens ahead that are told apart: more add nothing
FARTHEST = 16  # drafted tokens in stock that a decision looks at one by one
WAIT_GAIN = 0.005  # tokens: waiting for less only adds decisions
GRID = 0.02  # acceptances are rounded to this, so that few processes are ever solved
LEAST, MOST = 0.3, 0.96  # acceptances beyond are taken for these


def rounded(acceptance: float) -> float:
    """The acceptance that stands for this one in `solve`."""
    return min(max(round(acceptance / GRID) * GRID, LEAST), MOST)


# ---- stocks of equally good tokens --------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def solve(costs: Costs, acceptance: float) -> tuple[float, Values]:
    """The best rate, and the value of a stock of tokens of this `acceptance` each, by its size.

    The values have shape [stock]. A draft that fails leaves no stock, so every failure begins the
    process anew.
    """
    stock = np.arange(DEEPEST + 1)[:, None]
    block = np.arange(LONGEST + 1)[None, :]
    seconds = costs.passes(LONGEST)[None, :]
    gain = (1 - acceptance ** (block + 1)) / (1 - acceptance)  # [1, block]
    # what is left if all goes well, the draft having gone on meanwhile: [stock, block]
    left = stock - block - 1 + np.minimum(seconds / costs.draft_s, DEEPEST - stock)
    hit = np.where(left >= 0, acceptance ** (block + 1), 0.0)
    left = np.clip(left, 0, DEEPEST)
    low = np.minimum(left.astype(int), DEEPEST - 1)  # and `part` of the way from there to low + 1
    part = left - low
    barred = np.where(block <= stock, 0.0, -1e9)

    # policy iteration (Howard 1960): the rate and values of a policy are the solution of linear
    # equations in which the value of no stock is 0, so the rate can take its place
    here = np.arange(DEEPEST + 1)
    chosen = np.minimum(here, LONGEST)  # the block to verify, by stock
    for _ in range(50):
        system = np.eye(DEEPEST + 1)
        np.add.at(system, (here, low[here, chosen]), -(hit * (1 - part))[here, chosen])
        np.add.at(system, (here, low[here, chosen] + 1), -(hit * part)[here, chosen])
        system[:, 0] = seconds[0, chosen]
        value = np.linalg.solve(system, gain[0, chosen])
        rate, value[0] = float(value[0]), 0.0
        after = value[low] * (1 - part) + value[low + 1] * part
        worth = gain - rate * seconds + hit * after + barred  # [stock, block]
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


# ---- the very tokens that are there -------------------------------------------------------------


def plan(
    costs: Costs, average: float, likely: Values, limit: int, next_s: float | None
) -> int | None:
    """How many drafted tokens to verify now while the draft goes on; None: wait for the next.

    `likely` [tokens in stock] are their acceptances, `average` that of tokens to come; at most
    `limit` may be verified. The next token is there in `next_s` seconds (None: no more can come).
    """
    appraisal = appraise(costs, average, likely, limit)
    if next_s is not None and len(likely) < min(limit, FARTHEST):
        rate, _ = solve(costs, rounded(average))
        if appraisal.with_one_more - rate * next_s > appraisal.now + WAIT_GAIN:
            return None
    return appraisal.block


class Appraisal(NamedTuple):
    """Values are tokens."""

    block: int  # the best number of drafted tokens to verify now
    now: float  # the value of doing so
    with_one_more: float  # the value of the same stock and one more token of average acceptance


def appraise(costs: Costs, average: float, likely: Values, limit: int) -> Appraisal:
    """What the stock is worth; arguments as in `plan`.

    Done between a verdict and the target's next pass, hence the tables.
    """
    acceptance = rounded(average)
    known, rows = min(len(likely), FARTHEST), min(LONGEST, limit) + 1
    prospect = _prospect(costs, acceptance)
    if not known:
        return Appraisal(0, prospect.alone, float(prospect.unknown[0, min(1, limit)]))
    likely = np.concatenate((likely[:known], np.full(rows, acceptance)))
    # worth[i, m]: the value of what is left when i of the tokens in stock are committed and m more
    # have been drafted behind the last one; filled from the last token in stock to the first
    worth = np.concatenate((np.empty((known, DEEPEST + 1)), prospect.unknown[: rows + 1]))
    block = 0
    for start in range(known - 1, -1, -1):
        left = _leftovers(costs)[known - start]
        # nothing is drafted behind the known tokens yet: the first is verified now, or after one
        of = np.s_[:rows, : DEEPEST + 1 if start else 2]
        reach = likely[start : start + rows].cumprod()  # [block]: all of it is accepted
        gain = reach.cumsum() - reach
        behind = worth[start + 1 :].ravel()
        fewer = behind.take(left.at[of])
        total = fewer + left.part[of] * (behind[1:].take(left.at[of]) - fewer)  # [block, more]
        total *= reach[:, None]
        total += (gain - prospect.price[:rows])[:, None] + left.barred[of]
        worth[start, : total.shape[1]] = total.max(axis=0)
        block = int(total[:, 0].argmax())
    now, later = worth[0, :2].tolist()
    return Appraisal(block, now, later)


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a block leaves of a stock: arrays [block, tokens drafted behind the stock]."""

    at: NDArray[np.intp]  # index into the flattened rows of `worth` in `appraise`
    part: Values  # how much of the way from there to one drafted token more
    barred: Values  # 0, or -inf where the block is longer than the stock


@functools.lru_cache(maxsize=8)
def _leftovers(costs: Costs) -> tuple[Leftover, ...]:
    """Those of 0, 1, … FARTHEST known tokens."""
    drafted = (costs.passes(LONGEST) / costs.draft_s)[:, None]  # during the pass: [block, 1]
    block, more = np.arange(LONGEST + 1)[:, None], np.arange(DEEPEST + 1)[None, :]
    found = []
    for known in range(FARTHEST + 1):
        room = np.maximum(DEEPEST - known - more, 0.0)
        after: Values = np.asarray(more + np.minimum(drafted, room), np.float64)
        low = np.minimum(after.astype(np.intp), DEEPEST - 1)
        barred = np.where(block <= known + more, 0.0, -np.inf)
        found.append(Leftover(block * (DEEPEST + 1) + low, after - low, barred))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class Prospect:
    """What holds of every stock at these costs; values are tokens."""

    price: Values  # [block]: what a pass costs beyond the token that it always gives
    alone: float  # the value of a plain step
    unknown: Values  # [tokens taken, tokens drafted]: the value of what is left, none of it known


@functools.lru_cache(maxsize=256)
def _prospect(costs: Costs, acceptance: float) -> Prospect:
    rate, value = solve(costs, acceptance)
    price = rate * costs.passes(LONGEST) - 1
    stock = costs.passes(0)[0] / costs.draft_s - 1
    alone = acceptance * np.interp(stock, np.arange(DEEPEST + 1), value) - price[0]
    unknown = np.zeros((LONGEST + 2, DEEPEST + 1))
    for taken in range(LONGEST + 2):  # shorter by as many as the block took of it
        unknown[taken, taken:] = value[: DEEPEST + 1 - taken]
    return Prospect(price, float(alone), unknown)
