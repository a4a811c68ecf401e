"""What a draft is to read where reading takes the target's time."""

from __future__ import annotations

import pytest

from outrider.core import reading
from outrider.core.reading import NOTHING, RECALLED, TRIAL_SHARE, Lengths, Reading


def test_without_known_answers_one_is_expected_to_go_on_as_long_as_it_has_lasted() -> None:
    lengths = Lengths()
    assert lengths.left(0, 10_000) == reading.USUAL
    assert lengths.left(1000, 10_000) == 1000
    assert lengths.left(0, 16) == 16, "the limit is the most that can come"


def test_known_answers_tell_how_much_is_still_to_come() -> None:
    lengths = Lengths()
    for _ in range(60):
        lengths.ended(40)
    assert lengths.left(0, 10_000) == pytest.approx(40, rel=0.2)
    assert lengths.left(30, 10_000) < 20
    assert lengths.left(50, 10_000) == reading.USUAL, "longer than any that was seen"
    for _ in range(64):
        lengths.ended(400)
    assert lengths.left(0, 10_000) == pytest.approx(400, rel=0.05), "only the latest count"


def test_a_gain_that_is_expected_pays_for_reading() -> None:
    assert reading.budget(100, 0.2, 0, 0) == pytest.approx(reading.SHARE * 20)
    assert reading.budget(100, 0.2, 0, 9) == pytest.approx(reading.SHARE * 20)


def test_a_trial_costs_a_small_share_and_less_the_more_have_failed() -> None:
    assert reading.budget(100, 0, 1e9, 0) == pytest.approx(reading.MOST_TRIAL * 100)
    assert reading.budget(100, 0, 0, 0) == pytest.approx(TRIAL_SHARE * 100)
    costs = [reading.budget(100, 0, 50, failures) for failures in range(12)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] == costs[-2] > 0, "it is never given up for good"


def test_what_can_be_paid_for_is_read_from_the_end() -> None:
    assert reading.chosen(1000, 0, 0.3, 0.003, knows=True) == Reading(100)
    assert reading.chosen(60, 0, 0.3, 0.003, knows=True) == Reading(60)
    assert reading.chosen(1000, 0, 0.03, 0.003, knows=True) == NOTHING, "too few to guess from"


def test_a_trial_recalls_what_the_target_has_written() -> None:
    least, most = RECALLED
    assert reading.chosen(1000, least - 1, 0.3, 0.003, knows=False) == NOTHING
    context = reading.CONTEXT
    assert reading.chosen(1000, least, 0.3, 0.003, knows=False) == Reading(context + least, least)
    assert reading.chosen(1000, 500, 0.07, 0.003, knows=False) == Reading(23, 23 - context)
    assert reading.chosen(1000, 500, 9.0, 0.003, knows=False) == Reading(context + most, most)
