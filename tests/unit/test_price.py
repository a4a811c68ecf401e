"""The price of time: rates against closed forms, decisions at their extremes, costs that follow."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from outrider.core import price, stopping
from outrider.core.estimates import LONGEST, Acceptance, CostModel, Costs, Spread

FLAT = Costs((0.1,) * 16, 0.01, 0.0)
DEAR = Costs(tuple(0.1 * rows for rows in range(1, 17)), 0.01, 0.0)  # a row costs as much as a pass
SLOPED = Costs(tuple(0.08 + 0.02 * rows for rows in range(1, 17)), 0.01, 0.0)
SURE = np.full(8, 0.99)


def test_where_a_row_costs_as_much_as_a_pass_nothing_is_gained() -> None:
    rate, _ = price.solve(DEAR, 0.9)
    assert rate == pytest.approx(1 / 0.1, rel=0.1)


@pytest.mark.parametrize("acceptance", [0.4, 0.6, 0.8])
def test_even_free_drafts_stay_below_the_limit_of_their_acceptance(acceptance: float) -> None:
    """Tokens per pass are at most 1 / (1 - acceptance), however fast the draft."""
    rate, _ = price.solve(Costs((0.1,) * 16, 1e-4, 0.0), acceptance)
    assert 1.0 < rate * 0.1 < 1 / (1 - acceptance)


def test_a_better_draft_is_worth_more() -> None:
    rates = [price.solve(FLAT, acceptance)[0] for acceptance in (0.3, 0.5, 0.7, 0.9)]
    assert rates == sorted(rates)
    assert rates[0] < rates[-1]


def test_more_stock_is_never_worth_less() -> None:
    _, value = price.solve(FLAT, 0.8)
    assert value[0] == 0
    assert (np.diff(value) >= -1e-9).all()


def test_sure_tokens_are_verified_and_hopeless_ones_are_not() -> None:
    assert price.plan(SLOPED, 0.8, SURE, 100, None) in (7, 8)  # a bonus may tell of the last
    assert price.plan(SLOPED, 0.3, np.full(8, 0.01), 100, None) == 0
    assert price.plan(SLOPED, 0.8, SURE, 3, None) == 3


def test_a_block_ends_before_the_token_that_is_doubtful() -> None:
    likely = np.array([0.99, 0.99, 0.99, 0.05, 0.99, 0.99])
    assert price.plan(SLOPED, 0.8, likely, 100, None) == 3
    assert price.plan(FLAT, 0.8, likely, 100, None) == 6  # unless further rows cost nothing


def test_it_waits_for_a_draft_that_is_about_to_come_and_not_for_one_that_is_far() -> None:
    assert price.plan(FLAT, 0.9, np.empty(0), 100, 0.001) is None
    assert price.plan(FLAT, 0.9, np.empty(0), 100, 1.0) == 0
    assert price.plan(FLAT, 0.9, np.empty(0), 100, None) == 0


@pytest.mark.parametrize("likely", [[], [0.9], [0.95, 0.6], [0.9, 0.9, 0.3, 0.9]])
def test_what_one_more_token_is_worth_is_what_it_is_worth_once_there(likely: list[float]) -> None:
    """`later` takes the place of a second appraisal, of the stock with a usual token behind it."""
    _, _, later = price.appraise(SLOPED, 0.8, np.array(likely), 100)
    _, then, _ = price.appraise(SLOPED, 0.8, np.array([*likely, 0.8]), 100)
    assert later == pytest.approx(then, abs=1e-6)


def spread_of(acceptance: float) -> tuple[float, ...]:
    spread = Spread(weight=1e-6)
    spread.observe([acceptance])
    return spread.weights


def in_turn(costs: Costs, acceptance: float, likely: list[float], limit: int = 100) -> int | None:
    turn = stopping.solve(costs, spread_of(acceptance))
    return stopping.plan(costs, turn, np.array(likely), limit)


def test_in_turns_bad_drafts_and_slow_ones_are_left_alone() -> None:
    assert in_turn(SLOPED, 0.3, []) == 0
    slow = Costs((0.1,) * 16, 0.2, 0.0)
    assert in_turn(slow, 0.99, []) == 0


def test_in_turns_good_drafts_are_worth_long_blocks() -> None:
    for there in range(5):
        assert in_turn(SLOPED, 0.99, [0.99] * there) is None
    assert in_turn(SLOPED, 0.99, [0.99] * 3, limit=3) == 3


def test_in_turns_drafting_ends_where_the_next_token_is_not_worth_its_time() -> None:
    assert in_turn(SLOPED, 0.9, [0.9, 0.02]) == 1
    assert in_turn(SLOPED, 0.9, [0.99, 0.99]) is None
    assert in_turn(SLOPED, 0.9, [0.9] * 8) is not None


def test_the_rate_in_turns_is_what_a_known_chain_gives() -> None:
    """Drafts that are certain: the longest block, each token for its drafting and its row."""
    costs = Costs((0.1,) * 16, 0.01, 0.0)
    rate = stopping.solve(costs, spread_of(0.999)).rate
    expected = sum(0.995**n for n in range(LONGEST + 1))
    assert rate == pytest.approx(expected / (0.1 + LONGEST * 0.01), rel=0.02)


DEARER = [replace(FLAT, rollback_s=seconds) for seconds in (0.0, 0.02, 0.05, 0.1, 0.3, 1.0)]


def test_the_dearer_taking_back_is_the_less_is_gained_and_the_shorter_are_the_blocks() -> None:
    likely = np.full(12, 0.85)
    assert [price.plan(costs, 0.86, likely, 100, None) for costs in DEARER][:1] == [12]
    for figures in (
        [price.plan(costs, 0.86, likely, 100, None) or 0 for costs in DEARER],
        [price.solve(costs, 0.86)[0] for costs in DEARER],
        [price.forecast(costs, 0.86, pipelined=False) for costs in DEARER],
        [in_turns_to_the_end(costs) for costs in DEARER],
        [stopping.solve(costs, spread_of(0.87)).rate for costs in DEARER],
    ):
        assert figures == sorted(figures, reverse=True)
        assert figures[-1] < 0.7 * figures[0]
    assert [price.plan(costs, 0.86, SURE, 100, None) for costs in DEARER][-1] == 8


def in_turns_to_the_end(costs: Costs) -> int:
    """How many tokens are drafted and verified, each as likely as the last."""
    found = (in_turn(costs, 0.87, [0.87] * drafted) for drafted in range(LONGEST + 1))
    return next(block for block in found if block is not None)


def test_the_rate_in_turns_is_that_of_the_best_block_where_drafting_is_free() -> None:
    costs = Costs((0.1,) * 16, 1e-5, 0.0, rollback_s=0.1)
    blocks = np.arange(LONGEST + 1)
    tokens = np.cumsum(0.87**blocks)
    best = (tokens / (0.1 + 0.1 * (1 - 0.87**blocks))).max()
    assert stopping.solve(costs, spread_of(0.87)).rate == pytest.approx(best, rel=0.02)
    assert price.forecast(costs, 0.87, pipelined=False) == pytest.approx(best, rel=0.01)


@pytest.mark.parametrize("likely", [[0.9], [0.95, 0.6], [0.9, 0.9, 0.3, 0.9]])
def test_what_one_more_token_is_worth_counts_taking_back_too(likely: list[float]) -> None:
    costs = replace(SLOPED, rollback_s=0.1)
    later = price.appraise(costs, 0.8, np.array(likely), 100).with_one_more
    then = price.appraise(costs, 0.8, np.array([*likely, 0.8]), 100).now
    assert later == pytest.approx(then, abs=1e-6)


def test_what_taking_back_costs_counts_for_all_who_wait_and_not_where_it_is_nothing() -> None:
    model = CostModel([0.1, 0.11], 0.01, crowd_s=[0.1, 0.1], rollback_s=0.03)
    assert [model.shared_by(crowd).rollback_s for crowd in (1, 2)] == pytest.approx([0.03, 0.06])
    assert CostModel([0.1, 0.11], 0.01, rollback_s=2e-6).costs.rollback_s == 0.0


@pytest.mark.parametrize("average", [0.8, 0.98])  # it looks at few tokens, or at many
def test_a_decision_takes_about_a_millisecond(average: float) -> None:
    likely = np.full(price.FARTHEST, 0.9)
    price.plan(FLAT, average, likely, 100, 0.01)
    seconds = []
    for _ in range(30):
        began = time.perf_counter()
        price.plan(FLAT, average, likely, 100, 0.01)
        seconds.append(time.perf_counter() - began)
    # 1.0 and 2.2 ms on a slow machine; a busy one is no failure
    assert np.median(seconds) < (2e-3 if average < price.PROVEN else 5e-3)


def test_acceptance_follows_what_it_sees_and_rises_with_confidence() -> None:
    acceptance = Acceptance(prior=0.8)
    assert acceptance.average == pytest.approx(0.8)
    for _ in range(200):
        acceptance.observe(False, 0.5)
    assert acceptance.average < 0.1
    likely = acceptance.of([0.0, 0.3, 0.6, 0.9, 0.98])
    assert (np.diff(likely) > 0).all()
    assert 0 < likely[0] < likely[-1] < 1


def test_costs_follow_a_machine_that_slows_down_and_forgive_one_hiccup() -> None:
    model = CostModel([0.1] * 16, 0.01)
    model.verified(4, 10.0, 10.0)
    assert max(model.costs.verify_s) < 0.2
    for _ in range(60):
        model.verified(4, 0.2, 0.201)
        model.drafted(0.03)
    assert model.costs.verify_s[3] == pytest.approx(0.2, rel=0.1)
    assert model.costs.verify_s[0] > 0.1
    assert model.costs.draft_s == pytest.approx(0.03, rel=0.1)
    assert model.costs.link_s == pytest.approx(0.001, rel=0.3)


def test_passes_measured_on_a_busy_machine_never_let_a_pass_take_no_time() -> None:
    """A plain step that was disturbed seems to take longer than passes over more rows."""
    model = CostModel([0.1, 0.09, 0.02], 0.01, crowd_s=[0.01, 0.012])
    before = model.costs
    model.verified(3, 0.02, 0.0205)  # as long as such a pass is known to take
    assert model.costs == before
    for rows, requests in ((2, 1), (3, 2), (2, 2), (1, 1)) * 20:
        model.verified(rows, 0.02, 0.0205, requests)
    assert all(0 < seconds < 0.1 for seconds in model.shared_by(2).verify_s)


def test_passes_longer_than_any_measured_cost_no_less_by_the_row() -> None:
    """What passes took at load is jagged: 12 and 16 rows took the same, and 24 do not."""
    jagged = [0.18, 0.33, 0.37, 0.37, *np.linspace(0.4, 0.76, 8), *[0.77] * 4]
    passes = CostModel(jagged, 0.01).costs.passes(LONGEST)
    assert passes[LONGEST] == pytest.approx(0.77 + 16 * (0.77 - 0.18) / 15, rel=0.01)


def test_a_pass_over_many_rows_tells_of_nearly_as_many_and_hardly_of_few() -> None:
    model = CostModel([0.1] * 16, 0.01)
    for _ in range(20):
        model.verified(28, 0.4, 0.4)
    found = model.costs.passes(LONGEST)
    assert found[[27, 29]] == pytest.approx(0.4, rel=0.05)
    model.verified(1, 0.1, 0.1)  # the next plain step shows that these cost what they did
    for _ in range(20):
        model.verified(1, 0.1, 0.1)
        model.verified(28, 0.4, 0.4)
    assert model.costs.passes(0)[0] == pytest.approx(0.1, rel=0.1)


def test_what_is_far_in_a_stock_counts_once_a_text_is_proven() -> None:
    costs = Costs(tuple(0.1 + 0.02 * rows for rows in range(32)), 0.02, 0.0)
    sure = np.full(price.FARTHEST, 0.995)
    far, near = (price.plan(costs, average, sure, 100, None) for average in (0.98, 0.7))
    assert far
    assert near
    assert far > price.NEAR + 3 >= near


def test_costs_that_hardly_change_are_the_same_costs() -> None:
    """What is solved for them can be kept."""
    model = CostModel([0.1] * 16, 0.01)
    before = model.costs
    model.verified(1, 0.1005, 0.1010)
    assert model.costs == before


def test_a_draft_that_is_sure_and_wrong_loses_its_credit() -> None:
    acceptance = Acceptance(memory=300)
    before = acceptance.of([0.97])[0]
    for _ in range(20):
        acceptance.observe(False, 0.97)
    assert acceptance.of([0.97])[0] < before * 0.6
    for _ in range(2000):
        acceptance.observe(True, 0.97)
    assert acceptance.of([0.97])[0] == pytest.approx(before, rel=0.02)


def test_a_pass_over_more_rows_is_never_expected_to_be_cheaper() -> None:
    """What is measured on a busy machine may say so; no cost may come out as nothing for that."""
    costs = CostModel([0.01, 0.001, 0.001], 0.001, crowd_s=[0.002, 0.003])
    for _ in range(50):
        costs.verified(3, 1e-4, 1e-3)
        costs.verified(2, 1e-4, 1e-3, requests=2)
    assert min(costs.costs.passes(3)) > 0
