"""When the next block is ordered: in time, and as late as can be."""

from __future__ import annotations

import pytest

from outrider.core.pace import MARGIN, MARGIN_S, MOST_STEPS, STEPS, Pace, reach
from outrider.core.values import Drafted, Verdict

PASS_S = 0.1


def verdict(round: int, rows: int = 1, elapsed_s: float = PASS_S) -> Verdict:
    return Verdict(0, (1,), round, elapsed_s=elapsed_s, rows=rows)


def paced(trip_s: float) -> Pace:
    """After a plain step for which the target, then idle, was asked over such a link."""
    pace = Pace()
    pace.answered(verdict(0, rows=0, elapsed_s=3.0), 1, 5.0)
    pace.asked(1, 5.0, 1)
    assert pace.answered(verdict(1), 1, 5.0 + trip_s + PASS_S) == pytest.approx(trip_s + PASS_S)
    return pace


@pytest.mark.parametrize(("trip_s", "is_far"), [(0.0005, False), (0.002, True), (0.3, True)])
def test_a_link_is_far_if_messages_take_a_noticeable_part_of_a_pass(
    trip_s: float, is_far: bool
) -> None:
    pace = paced(trip_s)
    assert pace.trip_s == pytest.approx(trip_s)
    assert pace.is_far is is_far


def test_nothing_is_far_before_a_round_trip_was_seen() -> None:
    assert not Pace().is_far
    assert Pace().steps == STEPS


def test_the_next_block_is_there_a_little_before_the_target_needs_it() -> None:
    pace = paced(0.04)
    pace.asked(2, 6.0, 1)
    due = 6.0 + 0.04 + PASS_S - 0.04 - MARGIN * PASS_S - MARGIN_S
    assert pace.due == pytest.approx(due)
    pace.asked_more(3, due, 1)
    assert pace.due == pytest.approx(due + PASS_S)


def test_over_a_long_link_several_are_on_their_way() -> None:
    pace, now = paced(0.25), 6.0
    pace.asked(2, now, 1)
    sent = 1
    while pace.due < now + 0.25 + PASS_S:  # when the first verdict comes
        sent += 1
        pace.asked_more(1 + sent, pace.due, 1)
    assert sent == 1 + pace.passes_away == 4
    assert pace.steps == STEPS + 2 * pace.passes_away
    assert paced(60.0).steps <= MOST_STEPS


def test_a_verdict_that_follows_at_once_shows_no_round_trip() -> None:
    pace = paced(0.04)
    pace.asked(2, 6.0, 1)
    pace.asked_more(3, 6.05, 1)
    pace.answered(verdict(2), 1, 6.14)
    assert pace.answered(verdict(3), 1, 6.24) == pytest.approx(PASS_S)
    assert pace.trip_s == pytest.approx(0.04)


def test_an_order_that_comes_late_shows_that_the_link_has_become_slower() -> None:
    pace = paced(0.04)
    pace.asked(2, 6.0, 1)
    pace.asked_more(3, 6.05, 1)
    pace.answered(verdict(2), 1, 6.14)
    assert pace.answered(verdict(3), 1, 6.30) == pytest.approx(0.16)
    assert pace.trip_s is not None
    assert 0.04 < pace.trip_s < 0.15


def test_long_blocks_are_less_likely_to_be_reached_behind() -> None:
    unsure, sure = Drafted(1, 0.3), Drafted(1, 0.99)
    assert reach([]) == 1.0
    assert reach([unsure] * 3) < reach([unsure]) < reach([sure])
