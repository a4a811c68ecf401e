"""What the price of time gains on recorded traces, against fixed rules and under other costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

import pytest
from tests.sim.replay import FLAT, PROCESSOR, TRACES, speedups

from outrider.core.estimates import CostModel
from outrider.core.experience import Experience
from outrider.core.priced import PricedRule
from outrider.core.rules import FixedRule
from outrider_services.bench.replay import Replay, World
from outrider_services.bench.results import geometric_mean

HERE = World(PROCESSOR, 0.031)
CURVES = {
    "processor": HERE,
    "flat-0.05": World(FLAT, 0.005),
    "flat-0.1": World(FLAT, 0.010),
    "flat-0.2": World(FLAT, 0.020),
    "dear-rollback": World(FLAT, 0.010, rollback_s=0.100),
    "slow-link": World(PROCESSOR, 0.031, link_s=0.020),
}


def fixed_rules() -> Iterator[Callable[[], FixedRule]]:
    for longest in (3, 5, 8, 12):
        for least in (0, 3, longest):
            yield lambda n=longest, m=least: FixedRule("pipelined", n, m)  # type: ignore[misc]


@pytest.mark.parametrize("cuts", [True, False], ids=["cut-short", "waited-for"])
def test_the_recorded_traces_are_worth_what_was_promised(cuts: bool) -> None:
    world = World(PROCESSOR, 0.031, cuts=cuts)
    figures = speedups(lambda: world.rule("pipelined"), world)
    assert geometric_mean(figures.values()) >= 1.69, figures
    assert min(figures.values()) >= 1.08, figures


@pytest.mark.parametrize("name", CURVES)
def test_no_fixed_rule_does_better_under_any_costs(name: str) -> None:
    world = CURVES[name]
    best = max(geometric_mean(speedups(rule, world).values()) for rule in fixed_rules())
    # over the slow link a length chosen with hindsight is 0.5 % better: see `Rule.goes_on`
    least = 0.99 if world.link_s else 1.0
    figures = speedups(lambda: world.rule("pipelined"), world)
    assert geometric_mean(figures.values()) >= least * best


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
def test_to_know_what_taking_back_costs_is_worth_much_where_it_is_dear(
    mode: Literal["sync", "pipelined"],
) -> None:
    world = World(FLAT, 0.010, rollback_s=0.200)
    figures = [
        geometric_mean(speedups(lambda: known.rule(mode), world).values())  # noqa: B023
        for known in (world, replace(world, rollback_s=0.0))
    ]
    assert figures[0] >= 1.1 * figures[1]


def test_in_turns_it_beats_every_fixed_length() -> None:
    best = max(
        geometric_mean(speedups(lambda n=n: FixedRule("sync", n), HERE).values())
        for n in range(1, 10)
    )
    figures = speedups(lambda: HERE.rule("sync"), HERE)
    assert geometric_mean(figures.values()) >= best + 0.05, figures
    assert min(figures.values()) >= 0.97, figures


def test_the_replay_agrees_with_what_was_measured_for_a_fixed_rule() -> None:
    """1.60 over target alone was found for blocks of at most 8 that are never waited for."""
    world = World(PROCESSOR, 0.031, cuts=False)
    assert geometric_mean(
        speedups(lambda: FixedRule("pipelined", 8), world).values()
    ) == pytest.approx(1.60, abs=0.03)


def test_a_draft_too_slow_to_help_is_left_alone() -> None:
    world = World(FLAT, 0.200)
    figures = speedups(lambda: world.rule("sync"), world)
    assert min(figures.values()) >= 0.97, figures


def test_a_useless_draft_costs_little_and_later_requests_less() -> None:
    experience = Experience(CostModel(PROCESSOR, 0.031, 0.0005))
    trace = {"match": [0] * 300, "confidence": [0.3] * 300, "off_path_confidence": {}}
    for mode in ("sync", "pipelined"):
        for least in (0.9, 0.97):
            assert Replay(trace, PricedRule(mode, 64, experience), HERE).speedup() >= least


def test_a_far_draft_costs_less_than_a_far_pair() -> None:
    near, far = (World(FLAT, 0.005, 0.0003, link_s) for link_s in (None, 0.03))
    pair = World(FLAT, 0.005, 0.03)
    figures = [
        geometric_mean(
            (len(trace["match"]) - 1) / report.decode_s
            for trace in TRACES.values()
            if (report := Replay(trace, world.rule("pipelined"), world).play().report()).decode_s
        )
        for world in (pair, far, near)
    ]
    assert figures[0] < figures[1] < 0.95 * figures[2]
