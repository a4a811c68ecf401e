"""The rules: how many drafted tokens to verify now, when to wait, how far the draft may run."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.bench import bench_coordinator

from outrider.core import price, stopping
from outrider.core.estimates import CostModel
from outrider.core.experience import Experience, Guard
from outrider.core.priced import IDLE, PricedRule
from outrider.core.reading import Reading
from outrider.core.rules import FixedRule
from outrider.core.values import Mode, Verify
from outrider.wire import messages as wire

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=500)
MODES: list[Mode] = ["plain", "sync", "pipelined"]

PLAIN, SYNC, PIPELINED = FixedRule("plain", 4), FixedRule("sync", 4), FixedRule("pipelined", 4)
PATIENT = FixedRule("pipelined", 4, n_min=2)
CHOOSY = FixedRule("pipelined", 4, n_min=4, p_min=0.5)


@pytest.mark.parametrize(
    ("rule", "confidences", "limit", "more", "expected"),
    [
        pytest.param(PLAIN, [1, 1], 9, True, 0, id="plain-never-verifies-a-draft"),
        pytest.param(FixedRule("sync", 0), [1], 9, True, 0, id="nor-does-a-draft-of-length-0"),
        pytest.param(SYNC, [], 9, True, None, id="sync-waits-for-its-block"),
        pytest.param(SYNC, [1] * 3, 9, True, None, id="and-for-the-last-of-it"),
        pytest.param(SYNC, [1] * 4, 9, True, 4, id="then-it-verifies"),
        pytest.param(SYNC, [1] * 3, 3, True, 3, id="near-the-end-a-shorter-block-is-whole"),
        pytest.param(SYNC, [1], 9, False, 1, id="nothing-to-wait-for"),
        pytest.param(SYNC, [], 9, False, 0, id="without-a-draft-it-is-plain"),
        pytest.param(SYNC, [], 0, True, 0, id="the-last-token-is-not-worth-a-draft"),
        pytest.param(PIPELINED, [], 9, True, 0, id="pipelined-does-not-wait"),
        pytest.param(PIPELINED, [1] * 3, 9, True, 3, id="it-takes-what-there-is"),
        pytest.param(PIPELINED, [1] * 9, 9, True, 4, id="but-no-more-than-a-block"),
        pytest.param(PIPELINED, [1] * 4, 2, True, 2, id="nor-than-the-answer-has-room-for"),
        pytest.param(PATIENT, [1], 9, True, None, id="n-min-waits"),
        pytest.param(PATIENT, [1] * 2, 9, True, 2, id="until-there-are-as-many"),
        pytest.param(PATIENT, [1], 9, False, 1, id="unless-no-more-will-come"),
        pytest.param(PATIENT, [1], 1, True, 1, id="or-there-is-no-room-for-them"),
        pytest.param(CHOOSY, [0.9, 0.4, 0.9], 9, True, 1, id="a-doubtful-token-ends-the-block"),
        pytest.param(CHOOSY, [0.4], 9, True, 0, id="even-where-it-is-the-first"),
        pytest.param(CHOOSY, [0.9, 0.5, 0.9], 9, True, None, id="p-min-itself-is-not-doubtful"),
        pytest.param(CHOOSY, [0.9] * 4 + [0.1], 9, True, 4, id="behind-the-block-it-is-not-seen"),
    ],
)
def test_what_is_decided(
    rule: FixedRule, confidences: list[float], limit: int, more: bool, expected: int | None
) -> None:
    assert rule.decide(confidences, limit, 0.0 if more else None) == expected


@pytest.mark.parametrize(
    ("rule", "drafts", "at_start", "lead"),
    [
        pytest.param(PLAIN, False, 10, 10, id="plain-has-no-draft"),
        pytest.param(FixedRule("pipelined", 0), False, 2, 2, id="a-block-of-0-needs-none"),
        pytest.param(SYNC, True, 0, 4, id="sync-drafts-one-block-and-none-during-prefill"),
        pytest.param(PIPELINED, True, 10, 10, id="two-blocks-and-the-bonus-between"),
    ],
)
def test_how_far_the_draft_may_run(rule: FixedRule, drafts: bool, at_start: int, lead: int) -> None:
    assert (rule.drafts, rule.lead(busy=True), rule.lead(busy=False)) == (
        drafts,
        at_start,
        lead,
    )


rules = st.builds(
    lambda mode, n_max, n_min, p_min: FixedRule(mode, n_max, min(n_min, n_max), p_min),
    st.sampled_from(MODES),
    st.integers(0, 6),
    st.integers(0, 6),
    st.sampled_from([0.0, 0.5, 1.0]),
)
stocks = st.lists(st.floats(0, 1), max_size=14)


@quiet
@given(rules, stocks, st.integers(0, 9))
def test_when_no_more_is_coming_it_never_waits(
    rule: FixedRule, confidences: list[float], limit: int
) -> None:
    assert rule.decide(confidences, limit, None) is not None


@quiet
@given(rules, stocks, st.integers(0, 9), st.booleans())
def test_a_block_is_in_stock_fits_and_is_sure_enough(
    rule: FixedRule, confidences: list[float], limit: int, more: bool
) -> None:
    block = rule.decide(confidences, limit, 0.0 if more else None)
    if block is not None:
        assert 0 <= block <= min(len(confidences), limit, rule.n_max)
        assert all(confidence >= rule.p_min for confidence in confidences[:block])


@quiet
@given(rules, st.integers(0, 9))
def test_with_its_whole_lead_in_stock_it_never_waits(rule: FixedRule, limit: int) -> None:
    assert rule.decide([1.0] * min(rule.lead(busy=False), limit), limit, 0.0) is not None


def test_the_guard_lets_a_draft_rest_that_loses_time_and_tries_it_again() -> None:
    guard = Guard()
    for _ in range(int(Guard.LOSS)):  # each round commits one token in the time of two
        guard.committed(1, 2.0, 1.0)
        assert not guard.resting
    guard.committed(1, 2.0, 1.0)
    rests: list[int] = []
    while len(rests) < 4:
        assert guard.resting
        steps = 0
        while guard.resting:
            guard.committed(1, 1.0, 1.0)
            steps += 1
        rests.append(steps)
        while not guard.resting:
            guard.committed(1, 2.0, 1.0)
    assert rests == [Guard.RESTS[0] * 2**n for n in range(4)]


def test_a_target_that_comes_near_finds_no_debts_of_when_it_was_far() -> None:
    guard = Guard()
    guard.committed(1, 3.0 * Guard.LOSS, 1.0, 2.0)
    assert not guard.resting, "its messages alone take two steps"
    guard.committed(1, 2.0, 1.0)
    assert guard.resting
    near = Guard()
    near.committed(1, 30.0, 1.0, 9.0)
    while near.resting:
        near.committed(1, 1.0, 1.0)
    near.committed(1, 1.5, 1.0)
    assert not near.resting


def test_the_guard_leaves_alone_what_gains_and_forgives_what_is_paid_once() -> None:
    guard = Guard()
    guard.excuse(50.0)
    guard.committed(1, 50.0, 1.0)
    for _ in range(100):
        guard.committed(3, 2.0, 1.0)
        assert not guard.resting


def test_a_request_may_not_lose_what_others_have_saved() -> None:
    guard = Guard()
    for _ in range(9):
        guard.committed(3, 1.0, 1.0)
    lost = 1 + Guard.LOSS + 0.1
    guard.committed(1, lost, 1.0)
    assert not guard.resting
    guard.begin()
    guard.committed(1, lost, 1.0)
    assert guard.resting


def test_a_rest_ends_with_its_request_unless_the_draft_gains_nowhere() -> None:
    guard = Guard()
    for still_rests in (False, False, True, True):
        while not guard.resting:
            guard.committed(1, 2.0, 1.0)
        guard.begin()
        assert guard.resting == still_rests
    while guard.resting:
        guard.committed(1, 1.0, 1.0)
    for _ in range(20):
        guard.committed(3, 1.0, 1.0)  # now it gains
    while not guard.resting:
        guard.committed(1, 2.0, 1.0)
    guard.begin()
    assert not guard.resting


@given(
    passes=st.lists(
        st.tuples(st.integers(1, 8), st.integers(0, 40), st.floats(0.0, 10.0)), max_size=60
    )
)
def test_whatever_passes_take_their_costs_are_numbers(
    passes: list[tuple[int, int, float]],
) -> None:
    """Also where one request's many rows once took longer than those of several together."""
    costs = CostModel([1.0, 0.5, 3.0, 1e-3], 0.03, crowd_s=[1e-3] * 8, together_s=[0.03, 0.01])
    for requests, more, elapsed_s in passes:
        costs.verified(requests + more, elapsed_s, elapsed_s, requests)
        costs.drafted(elapsed_s, 1, elapsed_s, requests)
        costs.crowd = requests
        seen = costs.costs
        assert all(0 < seconds < math.inf for seconds in (*seen.verify_s, seen.draft_s))
        assert sorted(seen.verify_s) == list(seen.verify_s)


def test_one_disturbed_pass_counts_once_however_many_shared_it() -> None:
    """Each of them tells it."""
    draft_s, verify_s = [], []
    for requests in (1, 8):
        verify = [0.1 + 0.01 * n for n in range(16)]
        costs = CostModel(verify, 0.03, crowd_s=[0.1] * 8, together_s=[0.03] * 8)
        experience = Experience(costs)
        for _ in range(requests):
            costs.verified(requests, 0.2, 0.2, requests)
            costs.drafted(0.06, 1, None, requests)
            experience.stepped(0.2, requests)
        costs.crowd = requests
        verify_s.append(costs.costs.verify_s[0])
        draft_s.append(costs.costs.draft_s)
        assert 0.11 < experience.step_s < 0.14
    assert verify_s == pytest.approx([verify_s[0]] * 2, rel=0.02)
    assert draft_s == pytest.approx([draft_s[0]] * 2, rel=0.05)


def test_the_next_request_begins_where_the_last_one_ended() -> None:
    experience = Experience(CostModel([0.1 + 0.02 * n for n in range(16)], 0.03))
    first = PricedRule("sync", 64, experience)
    assert first.decide([], 90, 0.03) is None  # it may pay, for all that is known
    for _ in range(60):
        first.drafted(0.03, [0.1], 0.002)
        first.observe(False, 0.1)
    assert PricedRule("sync", 64, Experience(experience.costs)).decide([], 90, 0.03) is None
    later = PricedRule("sync", 64, experience)
    waits = [later.decide([], 90, 0.03) is None for _ in range(100)]
    assert 1 <= sum(waits) <= 4  # tried again, less and less often


def test_a_request_begins_with_an_attempt_unless_too_many_have_failed() -> None:
    """Whatever the draft did on the last text: twenty plain steps are a third of a short answer."""
    experience = Experience(CostModel([0.1 + 0.02 * n for n in range(16)], 0.03))
    for _ in range(300):
        experience.spread.observe([0.1])  # by all that was seen, no draft pays
    attempts = []
    for _ in range(6):
        request = PricedRule("sync", 64, experience)
        waits = [request.decide([], 90, 0.03) is None for _ in range(30)]
        attempts.append(waits[0])
    assert attempts[:2] == [True, True]
    assert not any(attempts[2:])


def reading_s(
    experience: Experience, count: int, *, length: int, good: bool = False
) -> list[float]:
    """Seconds that a draft read in each of `count` answers; it is `good` or always wrong."""
    found = []
    for _ in range(count):
        rule, read_s = PricedRule("sync", 64, experience), 0.0
        for written in range(length):
            reading = rule.reads(400 + written, written, length - written, busy=False)
            if reading.tokens and not read_s:
                read_s = reading.tokens * READ_S
                rule.recalled([(good, 0.99 if good else 0.1)] * reading.recall, read_s)
            rule.verified(1, STEP_S, STEP_S)
            rule.committed(1, STEP_S)
        rule.ended(length)
        found.append(read_s)
    return found


STEP_S, READ_S = 0.05, 0.003


def cheap() -> Experience:
    """Of a pair on shared cores where a good draft pays, and no text has been seen."""
    return Experience(CostModel([STEP_S + 0.005 * n for n in range(16)], 0.012, read_s=READ_S))


def test_a_draft_that_never_agrees_reads_less_and_less() -> None:
    experience = cheap()
    for _ in range(300):
        experience.spread.observe([0.3])
    spent = reading_s(experience, 40, length=256)
    assert spent[0] > 0, "it is tried"
    assert max(spent) <= 0.02 * 256 * STEP_S
    assert sum(spent) <= 0.005 * 40 * 256 * STEP_S
    assert any(spent[20:]), "it is tried again: the next texts may be others"


def test_a_draft_that_agrees_is_tried_on_every_text() -> None:
    experience = cheap()
    assert all(reading_s(experience, 10, length=256, good=True))


def test_a_short_answer_leaves_nothing_to_read_for() -> None:
    experience = cheap()
    for _ in range(300):
        experience.spread.observe([0.3])
    assert reading_s(experience, 10, length=16) == [0.0] * 10


def test_where_not_even_a_perfect_draft_would_pay_nothing_is_read() -> None:
    steep = Experience(CostModel([STEP_S * (1 + n) for n in range(16)], 0.012, read_s=READ_S))
    assert reading_s(steep, 5, length=2000) == [0.0] * 5


def test_a_draft_with_its_own_device_reads_everything_at_once() -> None:
    rule = PricedRule("pipelined", 64, cheap())
    assert rule.reads(5000, 0, 16, busy=True) == Reading(5000, 0)
    assert not rule.dismisses


def test_a_draft_on_shared_cores_reads_nothing_while_the_target_does() -> None:
    assert PricedRule("sync", 64, cheap()).reads(400, 0, 4000, busy=True) == Reading(0, 0)


def test_a_draft_that_is_of_no_use_is_dismissed() -> None:
    rule = PricedRule("sync", 64, cheap())
    for _ in range(IDLE):
        assert not rule.dismisses
        assert rule.decide([], 90, None) == 0
    assert rule.dismisses
    assert rule.decide([0.999, 0.999], 90, None) == 2
    assert not rule.dismisses


def test_one_message_that_stood_still_makes_no_target_far() -> None:
    experience = Experience(CostModel([0.1] * 16, 0.01))
    experience.waited(0.3)
    assert experience.away_s < 0.04
    for _ in range(60):
        experience.waited(0.3)
    assert experience.away_s == pytest.approx(0.3, rel=0.01)
    for _ in range(60):  # ordered ahead, it waits for none
        experience.waited(0.0)
    assert 0.05 < experience.away_s < 0.15


def test_a_step_without_a_draft_that_hangs_is_not_counted() -> None:
    experience = Experience(CostModel([0.1] * 16, 0.01))
    rule = PricedRule("sync", 64, experience)
    for _ in range(99):
        rule.committed(1, None)
    assert rule.drafts
    rule.committed(1, 10.0)
    rests = 0
    while not rule.drafts:
        rule.committed(1, None)
        rests += 1
    assert rests == Guard.RESTS[0]


@pytest.mark.parametrize(("unread", "is_awaited"), [(6, True), (60, False)])
def test_only_what_is_read_sooner_than_a_step_is_waited_for(unread: int, is_awaited: bool) -> None:
    """Not even once the target has the text from the request before, and the draft has not."""
    for mode, expected in (("sync", True), ("pipelined", is_awaited)):
        experience = Experience(CostModel([0.1] * 16, 0.03, read_s=0.01))
        rule = PricedRule(mode, 64, experience, shares=False)  # type: ignore[arg-type]
        rule.reads(unread, 0, 100, busy=True)
        assert rule.awaits_reading is expected


def test_what_was_read_while_the_target_went_on_allows_no_greater_loss() -> None:
    lost = []
    for read_s in (0.0, 5.0):
        rule = PricedRule("pipelined", 64, Experience(CostModel([0.1] * 16, 0.03)))
        rule.reads(500, 0, 100, busy=True)
        rule.drafted(0.03 + read_s, [0.9], None)
        lost.append(0)
        while rule.drafts:
            rule.committed(1, 0.2)
            lost[-1] += 1
    assert lost[0] == lost[1]


def test_resting_needs_no_draft() -> None:
    experience = Experience(CostModel([0.1] * 16, 0.01))
    rule = PricedRule("sync", 64, experience)
    assert rule.drafts
    rule.committed(1, 10.0)
    assert not rule.drafts
    assert (rule.lead(busy=False), rule.decide([0.99], 9, 0.01)) == (0, 0)
    assert PricedRule("sync", 64, experience).drafts, "it may do better on the next text"


def test_the_guard_reckons_in_plain_steps_that_were_seen() -> None:
    """Passes over more rows that have become slow excuse no loss."""
    experience = Experience(CostModel([0.1] * 16, 0.01, link_s=1e-3))
    rule = PricedRule("sync", 64, experience)
    for _ in range(60):
        rule.verified(4, 0.2, 0.201)
    assert experience.costs.costs.verify_s[0] > 0.11
    assert experience.step_s == pytest.approx(0.101)
    for _ in range(60):
        rule.verified(1, 0.119, 0.12)
    assert experience.step_s == pytest.approx(0.12, rel=0.01)
    rule.verified(1, 50.0, 50.0)
    assert experience.step_s < 0.15


def test_a_draft_that_seemed_too_slow_at_load_is_tried_and_found_to_be_fast() -> None:
    """What a draft costs is seen only by drafting: nothing else can correct it."""
    costs = CostModel((0.002,) * 8, draft_s=0.0032)
    rule = PricedRule("sync", 1, Experience(costs))
    wanted = []
    for _ in range(300):
        wanted.append(rule.decide([], 1, 0.0) is None)
        if wanted[-1]:
            rule.drafted(0.0002, [0.99], 0.0001)
            rule.observe(True, 0.99)
        rule.committed(1 + wanted[-1], 0.002)
        rule.settle()
    assert not any(wanted[:32]), "it could not pay by what was measured at load"
    assert all(wanted[200:])


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
def test_no_decision_has_to_wait_for_a_solution(mode: Literal["sync", "pipelined"]) -> None:
    """What was learnt counts once it is settled, while the target is busy."""

    def solved() -> int:
        solvers = (price.solve, stopping.solve, price._prospect, price._leftovers)
        return sum(solver.cache_info().misses for solver in solvers)

    rule = PricedRule(
        mode, 64, Experience(CostModel([0.1 + 0.0123 * n for n in range(16)], 0.0321))
    )
    before = solved()
    for _ in range(40):
        rule.drafted(0.05, [0.3], 0.01)
        rule.observe(False, 0.3)
        rule.verified(3, 0.2, 0.21)
        rule.decide([0.9, 0.4], 90, 0.03)
    assert rule.lead(busy=False) > 0
    assert bool(rule.floors) == (mode == "sync")
    assert solved() == before
    rule.settle()
    assert solved() > before


def test_however_long_the_block_the_draft_may_fill_a_whole_stock_behind_it() -> None:
    rule = PricedRule("pipelined", 64, Experience(CostModel([0.1] * 16, 0.004)))
    block = rule.decide([0.99] * price.DEEPEST, 200, 0.004)
    assert block is not None
    assert block >= price.NEAR
    assert rule.lead(busy=True) - (block + 1) >= price.DEEPEST == rule.lead(busy=False)


def test_a_whole_block_is_waited_for_longer_the_more_there_is_to_read() -> None:
    costs = CostModel([0.1] * 16, 0.01, read_s=0.003)
    sync, pipelined = (PricedRule(mode, 64, Experience(costs)) for mode in ("sync", "pipelined"))
    assert sync.block_s(0) == pytest.approx(0.31)
    assert sync.block_s(100) == pytest.approx(0.31 + 2 * 100 * 0.003)
    assert pipelined.block_s(100) == FixedRule("sync").block_s(100) == 0


async def test_the_coordinator_settles_after_each_block_is_on_its_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a request would know for ever what was known when it began."""
    seen: list[str] = []
    send, settle = bench_coordinator.Fakes.send, PricedRule.settle

    def sent(self: bench_coordinator.Fakes, peer: bytes, message: wire.Message) -> None:
        send(self, peer, message)
        if isinstance(message, wire.Do) and isinstance(message.order, Verify):
            seen.append("verify")

    def settled(self: PricedRule) -> None:
        settle(self)
        seen.append("settle")

    monkeypatch.setattr(bench_coordinator.Fakes, "send", sent)
    monkeypatch.setattr(PricedRule, "settle", settled)
    await bench_coordinator.measure(1)
    assert seen[0] == "settle"  # when the request begins
    assert seen[1:] == ["verify", "settle"] * (len(seen) // 2)
    assert len(seen) > 100


def known() -> Experience:
    """Of a service that has seen much, on all of which the draft was right."""
    experience = cheap()
    for _ in range(300):
        experience.spread.observe([0.995])
    experience.judged = 300
    return experience


def test_nobody_stands_still_for_long_while_a_draft_reads() -> None:
    experience = Experience(CostModel([0.5 + 0.01 * n for n in range(16)], 0.05, read_s=0.017))
    experience.spread, experience.judged = known().spread, 300
    rule = PricedRule("sync", 64, experience)
    asked = rule.reads(600, 0, 4000, busy=False).tokens
    assert 0 < asked * 0.017 <= 0.8
    for _ in range(IDLE + 1):
        rule.decide([], 90, None)
    assert not rule.dismisses, "it is still reading"


def test_a_draft_that_was_dismissed_must_show_that_it_agrees_on_this_text() -> None:
    rule = PricedRule("sync", 64, known())
    first = rule.reads(400, 0, 1000, busy=False)
    assert (first.tokens >= 100, first.recall) == (True, 0)
    rule.drafted(first.tokens * READ_S, [0.1], 0.002)
    for _ in range(IDLE):
        rule.decide([], 90, None)
    assert rule.dismisses
    again = rule.reads(430, 30, 970, busy=False)
    assert again.tokens == 0 or again.recall > 0


def test_where_nothing_can_be_recalled_the_draft_is_not_waited_for() -> None:
    experience = cheap()
    rule = PricedRule("sync", 64, experience)
    assert rule.reads(400, 20, 1000, busy=False).recall
    assert rule.decide([], 90, 0.01) is None
    rule.recalled([], 0.001)
    assert experience.failures == 1
    assert rule.decide([], 90, None) == 0


def test_a_draft_with_its_own_device_reads_at_once_in_turns_too() -> None:
    rule = PricedRule("sync", 64, cheap(), shares=False)
    assert rule.reads(5000, 0, 16, busy=True) == Reading(5000, 0)
    for _ in range(2 * IDLE):
        rule.decide([], 90, None)
    assert not rule.dismisses


def test_what_was_read_in_vain_is_not_spent_again_in_the_same_answer() -> None:
    experience = cheap()
    rule = PricedRule("sync", 64, experience)
    first = rule.reads(400, 100, 2000, busy=False)
    rule.recalled([(False, 0.1)] * first.recall, 3.0)  # it took far longer than expected
    experience.untried, experience.failures = 1e6, 0
    rule.verified(1, STEP_S, STEP_S)
    assert rule.reads(420, 120, 2000, busy=False) == Reading(0, 0)
