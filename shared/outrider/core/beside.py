"""A tree in one pass: what else to verify beside a block, in case the block is wrong somewhere.

A side (`values.Side`) begins at one place of the block with another token than was drafted there,
and goes on behind it. Where the target's rows cost little, a pass takes sides along: if the first
miss is at such a place and the target's token is the side's, what follows is verified already, and
a miss costs no pass (token trees: SpecInfer, arXiv 2305.09781). Each row goes to the token that is
likeliest to be of use, as long as it brings more than the time that it takes is worth.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul
from typing import NamedTuple

from outrider.core.estimates import Costs, usual_acceptance
from outrider.core.values import Beside, Side

# what a token there counts for, as the draft may have foreseen it, and it would come with the next
# pass: with 1, simulated targets of which a row costs 4 % lost 0.5 %, and none gained more
WORTH = 0.75
WIDEST = 16  # rows of the longest pass that is measured beforehand


class Row(NamedTuple):
    """One token more of a side, and how likely it leads to one more token of the text."""

    value: float
    side: int


def likeliest(likely: Sequence[float], base: int, sides: Beside, most: int) -> Beside:
    """Of the `sides`, the `most` tokens that are likeliest to be of use; see `chosen`."""
    return _cut(sides, sorted(_rows(likely, base, sides), reverse=True)[:most])


def chosen(costs: Costs, rate: float, likely: Sequence[float], base: int, sides: Beside) -> Beside:
    """Those of the `sides`, perhaps cut short, that are worth their rows in a pass over a block.

    `likely` are the acceptances of the block's tokens, the first at position `base`; a second is
    worth `rate` tokens. They make no pass longer than `WIDEST` rows.
    """
    block, most = len(likely), min(WIDEST, len(costs.verify_s)) - len(likely) - 1
    if most < 1:
        return ()
    rows = sorted(_rows(likely, base, sides), reverse=True)[:most]
    passes_s = costs.passes(block + len(rows))[block:].tolist()
    worth, best, count = 0.0, 0.0, 0
    for at, row in enumerate(rows, 1):
        worth += WORTH * row.value
        if (gain := worth - rate * (passes_s[at] - passes_s[0])) > best:
            best, count = gain, at
    return _cut(sides, rows[:count])


def _cut(sides: Beside, rows: Sequence[Row]) -> Beside:
    """What of the `sides` has these rows: the values of a side's rows never rise."""
    lengths = Counter(row.side for row in rows)
    return tuple(Side(sides[n].place, sides[n].drafted[:length]) for n, length in lengths.items())


def _rows(likely: Sequence[float], base: int, sides: Beside) -> Iterator[Row]:
    before = list(accumulate(likely, mul, initial=1.0))
    for number, side in enumerate(sides):
        at = side.place - base
        if not 0 <= at < len(likely):
            continue
        value = before[at] * (1 - likely[at]) * side.drafted[0].confidence
        yield Row(value, number)
        for one in side.drafted[1:]:
            value *= usual_acceptance(one.confidence)
            yield Row(value, number)
