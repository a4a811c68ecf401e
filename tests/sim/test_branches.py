"""What corrections foreseen are worth in virtual time, with ranks at misses as measured."""

from __future__ import annotations

import random
import statistics
from functools import cache
from typing import Any, Literal

import pytest
from tests.sim.replay import FLAT

from outrider.core.branches import RANKS
from outrider.core.estimates import usual_confidence
from outrider_services.bench.replay import Replay, World, curve

ACCEPTANCE, LENGTH, ANSWERS, BRANCHES = 0.8, 400, 12, 16


def trace(seed: int) -> dict[str, Any]:
    """An answer whose draft agrees at each position with the same probability."""
    chance = random.Random(seed)
    confidence = usual_confidence(ACCEPTANCE)
    match = [int(chance.random() < ACCEPTANCE) for _ in range(LENGTH)]
    ranks = [*range(2, 2 + len(RANKS)), 99]
    weights = [*RANKS, 1 - sum(RANKS)]
    return {
        "match": match,
        "confidence": [confidence] * LENGTH,
        "rank_at_miss": {
            str(at): chance.choices(ranks, weights)[0] for at, good in enumerate(match) if not good
        },
        # a draft does not know that it is on a wrong path
        "off_path_confidence": {str(at): [confidence] for at in range(LENGTH)},
    }


@cache
def speed(
    cost: float,
    branches: int,
    mode: Literal["sync", "pipelined"] = "pipelined",
    row: float = 0.0,
    sides: int = 0,
    passes_s: tuple[float, ...] = FLAT,
    answers: int = ANSWERS,
) -> tuple[float, float]:
    """Over the target alone, and the share of misses that were foreseen.

    A drafted token costs `cost` target passes, each further row of the draft's pass a share `row`
    of that. Beside a block, the target may verify so many tokens of `sides`.
    """
    draft_s = cost * passes_s[0]
    rows_s = tuple(draft_s * (1 + row * more) for more in range(branches + 1))
    world = World(passes_s, draft_s, sides=sides, rows_s=rows_s if branches or sides else ())
    speeds, foreseen = [], []
    for seed in range(answers):
        answer = Replay(trace(seed), world.rule(mode), world)
        speeds.append(answer.speedup())
        misses = answer.trace["match"].count(0)
        foreseen.append(answer.session.stats.foreseen / misses)
    return statistics.geometric_mean(speeds), statistics.mean(foreseen)


@pytest.mark.parametrize(
    ("cost", "least", "over_sync"), [(0.05, 3.7, 1.15), (0.1, 3.3, 1.3), (0.2, 2.6, 1.4)]
)
def test_with_free_branches_a_miss_costs_little(
    cost: float, least: float, over_sync: float
) -> None:
    (branched, foreseen), (chain, _) = speed(cost, BRANCHES), speed(cost, 0)
    assert branched >= least
    assert branched >= 1.15 * chain
    assert branched >= over_sync * speed(cost, 0, "sync")[0]
    assert foreseen >= 0.6


@pytest.mark.parametrize("cost", [0.05, 0.1, 0.2, 0.4])
def test_where_each_row_costs_as_much_as_a_token_nothing_is_lost(cost: float) -> None:
    """Their rows are then drafted where the main line's next token is less likely of use."""
    assert speed(cost, BRANCHES, row=1.0)[0] >= 0.99 * speed(cost, 0)[0]


# ---- a tree in one pass -------------------------------------------------------------------------

NEARLY_FLAT = curve({1: 100, 16: 105, 64: 130})  # ms, as a dense model of 8B takes on a large GPU
RISING = curve({1: 100, 8: 150, 16: 190, 32: 300})  # a processor with matrix instructions


@pytest.mark.parametrize(("cost", "branches", "gain"), [(0.05, 16, 1.01), (0.2, 0, 1.06)])
def test_where_rows_are_nearly_free_a_tree_brings_more(
    cost: float, branches: int, gain: float
) -> None:
    """Most where the draft can do no more than name corrections: its own rows are dear."""
    world: Any = {"passes_s": NEARLY_FLAT, "answers": 4}
    chain = speed(cost, branches, **world)[0]
    assert speed(cost, branches, sides=16, **world)[0] >= gain * chain


@pytest.mark.parametrize("branches", [0, 16])
def test_where_rows_cost_something_a_tree_loses_nothing(branches: int) -> None:
    world: Any = {"passes_s": RISING, "answers": 4}
    chain = speed(0.2, branches, **world)[0]
    assert speed(0.2, branches, sides=16, **world)[0] >= 0.995 * chain
