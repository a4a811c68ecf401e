"""`Stats`: what is counted, and which seconds belong to which lane."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core.stats import Lane, Stats

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=200)


def prefilled(at: float = 0.0) -> Stats:
    stats = Stats("pipelined", 7)
    stats.computed(stats.target, at, 1.0)
    stats.count(0, 0, at)
    return stats


def test_before_anything_happened_no_ratio_is_defined() -> None:
    report = Stats("sync", 3).report().as_dict()
    undefined = {name for name, value in report.items() if value is None}
    assert undefined == {
        *("acceptance_rate", "mean_accepted_length", "overlap", "target_busy", "draft_busy"),
        *("time_to_first_token_s", "prefill_s", "decode_s", "tokens_per_s"),
        *("speedup", "speedup_kind", "smallest_margin"),
    }
    assert (report.pop("mode"), report.pop("seed")) == ("sync", 3)
    assert {value for value in report.values() if value is not None} == {0}


def test_a_correction_or_a_bonus_is_never_counted_as_accepted() -> None:
    stats = prefilled()
    stats.own["plain"] += 1
    stats.count(4, 2, 1.0)
    stats.own["corrected"] += 1
    stats.count(2, 2, 2.0)
    stats.own["bonus"] += 1
    report = stats.report()
    assert (report.verified_tokens, report.accepted_tokens, report.generated_tokens) == (6, 4, 7)
    assert report.acceptance_rate == 4 / 6
    assert report.mean_accepted_length == 1 + 4 / 2


def test_a_pass_without_drafted_tokens_is_no_verify_round() -> None:
    stats = prefilled()
    stats.count(0, 0, 1.0)
    assert stats.report().verify_rounds == 0
    assert stats.report().mean_accepted_length is None
    stats.count(1, 0, 2.0)
    assert stats.report().verify_rounds == 1
    assert stats.report().mean_accepted_length == 1


def test_truncated_tokens_are_accepted_but_not_generated() -> None:
    stats = prefilled()
    stats.count(4, 4, 1.0)
    stats.truncated = 3
    assert stats.report().accepted_tokens == 4
    assert stats.report().generated_tokens == 1


def test_generation_time_runs_from_the_end_of_prefill_to_the_last_commit() -> None:
    stats = Stats(submitted=10.0, started=12.0, step_s=0.5)
    stats.count(0, 0, 15.0)
    stats.own["plain"] += 1
    assert stats.report().speedup is None  # a first token alone takes no generation time
    stats.count(4, 4, 16.0)
    stats.own["bonus"] += 1
    report = stats.report()
    assert (report.time_to_first_token_s, report.prefill_s, report.decode_s) == (5.0, 3.0, 1.0)
    assert report.tokens_per_s == 6.0
    # alone the target would have taken five steps of half a second for the five after prefill
    assert (report.speedup, report.speedup_kind) == (2.5, "estimate")


def test_without_a_measured_step_there_is_no_estimate_of_the_speedup() -> None:
    stats = prefilled()
    stats.count(1, 1, 1.0)
    assert (stats.report().speedup, stats.report().speedup_kind) == (None, None)


Event = tuple[str, float, float]  # lane, end, elapsed


@pytest.mark.parametrize(
    ("events", "busy", "both"),
    [
        pytest.param([("target", 4, 4)], (4, 0), 0, id="one-lane"),
        pytest.param([("draft", 1, 1), ("target", 4, 4)], (4, 1), 1, id="inside"),
        pytest.param([("target", 4, 4), ("draft", 5, 3)], (4, 3), 2, id="reported-later"),
        pytest.param([("draft", 1, 1), ("target", 3, 2)], (2, 1), 0, id="one-after-the-other"),
        pytest.param(
            [("draft", 1, 1), ("draft", 2, 1), ("draft", 5, 1), ("target", 4.5, 3)],
            (3, 3),
            1,
            id="only-the-shared-parts",
        ),
        pytest.param(
            [("draft", 1, 3)], (0, 1), 0, id="what-began-during-prefill-counts-from-its-end"
        ),
        pytest.param([("draft", 0, 2)], (0, 0), 0, id="prefill-itself-is-left-out"),
        pytest.param([("draft", 2, 1), ("draft", 2.5, 1)], (0, 1.5), 0, id="a-delayed-report"),
        pytest.param([("draft", 2, 1), ("draft", 2, 1)], (0, 1), 0, id="two-reports-at-once"),
        pytest.param([("draft", 2, 0)], (0, 0), 0, id="no-time-at-all"),
    ],
)
def test_when_the_lanes_computed(
    events: list[Event], busy: tuple[float, float], both: float
) -> None:
    stats = prefilled()
    for name, ended, elapsed in events:
        stats.computed(stats.target if name == "target" else stats.draft, ended, elapsed)
    assert (stats.target.busy_s, stats.draft.busy_s) == busy
    assert stats.both_s == both


def test_before_prefill_has_ended_nothing_is_counted() -> None:
    stats = Stats()
    stats.computed(stats.draft, 5.0, 1.0)
    assert stats.draft.busy_s == 0


def test_overlap_is_the_share_of_the_drafts_computing() -> None:
    stats = prefilled()
    stats.computed(stats.draft, 2.0, 2.0)
    stats.computed(stats.draft, 6.0, 2.0)
    stats.computed(stats.target, 5.0, 4.0)
    stats.count(1, 1, 8.0)
    report = stats.report()
    assert (report.overlap, report.target_busy, report.draft_busy) == (0.5, 0.5, 0.5)


@quiet
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.integers(0, 8)), max_size=20),
)
def test_whatever_order_reports_come_in_the_shares_are_shares(
    reports: list[tuple[bool, int, int]],
) -> None:
    stats, now, unit = prefilled(), 0, {True: set[int](), False: set[int]()}
    for is_target, later, elapsed in reports:
        now += later
        stats.computed(stats.target if is_target else stats.draft, now, elapsed)
        unit[is_target].update(range(max(0, now - elapsed), now))
    lanes: list[Lane] = [stats.target, stats.draft]
    for lane in lanes:
        assert all(a < b for a, b in lane.recent)
        assert all(
            one[1] <= two[0] for one, two in zip(lane.recent, list(lane.recent)[1:], strict=False)
        )
        assert lane.busy_s == sum(b - a for a, b in lane.recent)
    in_both = {
        second
        for a, b in stats.target.recent
        for second in range(int(a), int(b))
        if any(c <= second < d for c, d in stats.draft.recent)
    }
    assert stats.both_s == len(in_both)
    assert stats.both_s <= min(stats.target.busy_s, stats.draft.busy_s)


def test_a_lane_tells_for_which_share_of_a_time_it_was_busy() -> None:
    lane = Lane()
    assert lane.share(0.0, 2.0, goes_on=True) == 1.0
    assert lane.share(0.0, 2.0, goes_on=False) == 0.0
    lane.add((1.0, 2.0))
    lane.add((3.0, 4.0))
    assert lane.share(1.5, 3.5, goes_on=False) == 0.5
    assert lane.share(3.0, 5.0, goes_on=False) == 0.5
    assert lane.share(3.0, 5.0, goes_on=True) == 1.0
    assert lane.share(5.0, 5.0, goes_on=True) == 0.0
