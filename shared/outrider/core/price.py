"""The price of time in pipelined mode: how many drafted tokens to verify now, or whether to wait.

Let `rate` be the tokens per second that the best rule reaches on text like the recent text. Then a
second costs `rate` tokens. An action is worth the tokens that it is expected to commit, minus the
cost of the seconds that it takes, plus the value of the stock that it leaves. This is an
average-reward semi-Markov decision process (Howard, "Dynamic Programming and Markov Processes",
1960) whose state is the stock. It is solved twice. The first solution is for stocks of equally good
tokens: it gives the rate and the value of tokens not drafted yet. The second, at each decision, is
for the tokens really in stock, each with the acceptance that its confidence foretells. No block
length is tuned; where drafts are bad, the best one is 0.

Where draft and target take turns, the stopping rule of `outrider.core.stopping` decides instead.

Array axes: `stock` = 0 … DEEPEST drafted tokens in stock, `block` = 0 … LONGEST of them verified.
Values are in tokens, times in seconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from outrider.core.estimates import LONGEST, Costs, Values

DEEPEST = 40  # a stock of more drafted tokens counts as one of so many: more add nothing
NEAR, FARTHEST = 16, 32  # drafted tokens in stock that a decision looks at one by one
PROVEN = 0.88  # acceptance of a text from which a decision looks so far
WAIT_GAIN = 0.005  # tokens; waiting for a smaller gain only adds decisions
AT_ONCE = 0.1  # tokens; a step without asking risks another one, so it has to gain so much
GRID = 0.02  # acceptances are rounded to multiples of this, so that few processes are solved
LEAST, MOST = 0.3, 0.98  # acceptances outside this range are moved to its ends


def rounded(acceptance: float) -> float:
    """The acceptance on the grid that stands for this one in `solve`."""
    return min(max(round(acceptance / GRID) * GRID, LEAST), MOST)


# ---- stocks of equally good tokens --------------------------------------------------------------


@functools.lru_cache(maxsize=256)
def solve(costs: Costs, acceptance: float) -> tuple[float, Values]:
    """The best rate, in tokens per second, and the values of stocks by their size: [stock].

    Every token has this `acceptance`. One that is not accepted empties the stock, so that the
    process begins anew.
    """
    stock = np.arange(DEEPEST + 1)[:, None]
    block = np.arange(LONGEST + 1)[None, :]
    seconds = costs.rounds(acceptance ** block.astype(float))  # [1, block]
    gain = (1 - acceptance ** (block + 1)) / (1 - acceptance)  # [1, block]
    # the stock left after a hit, with what is drafted during the pass: [stock, block]
    drafted = costs.passes(LONGEST)[None, :] / costs.draft_s
    left = stock - block - 1 + np.minimum(drafted, DEEPEST - stock)
    hit = np.where(left >= 0, acceptance ** (block + 1), 0.0)
    left = np.clip(left, 0, DEEPEST)
    low = np.minimum(left.astype(int), DEEPEST - 1)  # and `part` of the way to low + 1
    part = left - low
    barred = np.where(block <= stock, 0.0, -1e9)

    # policy iteration (Howard 1960): a policy's rate and values solve a system of linear equations;
    # the value of an empty stock is 0 and not unknown, so the rate takes its place in the system
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
    """Tokens per second if drafted tokens have this acceptance; never less than the target alone.

    `pipelined`: the draft goes on while the target verifies; otherwise they take turns.
    """
    acceptance = min(max(acceptance, 0.0), MOST)
    if pipelined:
        return solve(costs, acceptance)[0]
    blocks = np.arange(LONGEST + 1.0)
    gain = (1 - acceptance ** (blocks + 1)) / (1 - acceptance)
    return float((gain / (costs.rounds(acceptance**blocks) + blocks * costs.draft_s)).max())


# ---- the very tokens that are there -------------------------------------------------------------


def plan(
    costs: Costs, average: float, likely: Values, limit: int, next_s: float | None
) -> int | None:
    """How many drafted tokens to verify now while the draft goes on; None: wait for the next.

    `likely` [tokens in stock] are their acceptances, `average` is that of later tokens. At most
    `limit` may be verified. The next token comes in `next_s` seconds; None: none can come.
    """
    appraisal = appraise(costs, average, likely, limit)
    if next_s is not None and len(likely) < min(limit, _sight(rounded(average))):
        rate, _ = solve(costs, rounded(average))
        if appraisal.with_one_more - rate * next_s > appraisal.now + WAIT_GAIN:
            return None
    return appraisal.block


def waits(costs: Costs, average: float, limit: int, away_s: float) -> bool:
    """Whether to wait for a draft, of which nothing is there, rather than take a plain step.

    Its first token comes `away_s` later than it is drafted; the other arguments are `plan`'s.
    """
    acceptance = rounded(average)
    prospect, (rate, value) = _prospect(costs, acceptance), solve(costs, acceptance)
    counts = np.arange(1, min(LONGEST, limit) + 1)
    worth = prospect.unknown[0, counts] - rate * (away_s + counts * costs.draft_s)
    stock = (costs.passes(0)[0] - away_s) / costs.draft_s - 1
    alone = acceptance * np.interp(stock, np.arange(DEEPEST + 1), value) - prospect.price[0]
    return bool(worth.max(initial=-np.inf) > alone - AT_ONCE)


class Appraisal(NamedTuple):
    """What can be done with a stock, and what that is worth in tokens."""

    block: int  # the best number of drafted tokens to verify now
    now: float  # the value of verifying so many now
    with_one_more: float  # the value of the same stock and one more token of average acceptance


def appraise(costs: Costs, average: float, likely: Values, limit: int) -> Appraisal:
    """What the stock is worth; arguments as in `plan`.

    It is called between a verdict and the target's next pass, so it must be fast: hence the tables.
    """
    acceptance = rounded(average)
    known, rows = min(len(likely), _sight(acceptance)), min(LONGEST, limit) + 1
    prospect = _prospect(costs, acceptance)
    if not known:
        return Appraisal(0, prospect.alone, float(prospect.unknown[0, min(1, limit)]))
    likely = np.concatenate((likely[:known], np.full(rows, acceptance)))
    # worth[i, m]: the value of the stock when its first i tokens are committed and m more are
    # drafted behind its last one. Rows are filled from the last token in stock to the first
    worth = np.concatenate((np.empty((known, DEEPEST + 1)), prospect.unknown[: rows + 1]))
    block = 0
    for start in range(known - 1, -1, -1):
        left = _leftovers(costs)[known - start]
        # two values are asked for of the whole stock: with nothing drafted behind it, and with one
        of = np.s_[:rows, : DEEPEST + 1 if start else 2]
        reach = likely[start : start + rows].cumprod()  # [block]: chance that all is accepted
        gain = reach.cumsum() - reach
        if prospect.rollback:
            gain[1:] -= prospect.rollback * (1 - reach[:-1])
        behind = worth[start + 1 :].ravel()
        fewer = behind.take(left.at[of])
        total = fewer + left.part[of] * (behind[1:].take(left.at[of]) - fewer)  # [block, more]
        total *= reach[:, None]
        total += (gain - prospect.price[:rows])[:, None] + left.barred[of]
        worth[start, : total.shape[1]] = total.max(axis=0)
        block = int(total[:, 0].argmax())
    now, later = worth[0, :2].tolist()
    return Appraisal(block, now, later)


def _sight(average: float) -> int:
    """How many tokens of the stock are looked at: few reach what is far, and it takes time."""
    return FARTHEST if average >= PROVEN else NEAR


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a block leaves of a stock. Axes: [block, tokens drafted behind the stock]."""

    at: NDArray[np.intp]  # index into the flattened rows of `worth` in `appraise`
    part: Values  # how far on from there, towards one drafted token more
    barred: Values  # 0, or -inf where the block is longer than the stock


@functools.lru_cache(maxsize=8)
def _leftovers(costs: Costs) -> tuple[Leftover, ...]:
    """The leftovers of stocks of 0, 1, … FARTHEST known tokens."""
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
    """What is the same for every stock at these costs; values are in tokens."""

    price: Values  # [block]: what a pass costs beyond the token that it always gives
    rollback: float  # what taking back costs
    alone: float  # the value of a plain step
    unknown: Values  # [tokens taken, tokens drafted]: the value of a rest of unknown tokens


@functools.lru_cache(maxsize=256)
def _prospect(costs: Costs, acceptance: float) -> Prospect:
    rate, value = solve(costs, acceptance)
    price = rate * costs.passes(LONGEST) - 1
    stock = costs.passes(0)[0] / costs.draft_s - 1
    alone = acceptance * np.interp(stock, np.arange(DEEPEST + 1), value) - price[0]
    unknown = np.zeros((LONGEST + 2, DEEPEST + 1))
    for taken in range(LONGEST + 2):  # by the block, out of those drafted
        unknown[taken, taken:] = value[: DEEPEST + 1 - taken]
    return Prospect(price, rate * costs.rollback_s, float(alone), unknown)
