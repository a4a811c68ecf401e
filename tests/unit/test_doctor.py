"""What `outrider doctor` reads off spans, what it predicts from that, and what it advises."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest

from outrider.core.values import Mode, Span
from outrider_services.doctor import forecast
from outrider_services.doctor.advice import Advice, advise, ms
from outrider_services.doctor.findings import (
    Findings,
    Text,
    Timing,
    Worker,
    agreement,
    corrected,
    usual,
)
from outrider_services.doctor.forecast import CORES_EACH, PLACED, Forecast, forecasts

STEP_S, DRAFT_S = 0.1, 0.005
FLAT = (STEP_S,) * 16
STEEP = tuple(STEP_S * (1 + more) for more in range(16))


def text(matches: Sequence[int], category: str = "code") -> Text:
    """An answer whose draft is as sure as it is right."""
    confidence = [0.999 if sum(matches) == len(matches) else 0.8] * len(matches)
    off = {str(at): [0.5] * 8 for at, match in enumerate(matches) if not match}
    trace = {"match": list(matches), "confidence": confidence, "off_path_confidence": off}
    return Text(category, 10, trace)


def agreeing(share: float, count: int = 80) -> Text:
    draw = random.Random(7)
    return text([int(draw.random() < share) for _ in range(count)])


def found(
    *texts: Text,
    curve_s: tuple[float, ...] = FLAT,
    draft_s: float = DRAFT_S,
    target_link_s: float = 0.0001,
    draft_link_s: float = 0.0001,
    cores: tuple[str, str] = ("", ""),
    here: bool = False,
) -> Findings:
    """A pair with these costs, the same in every mode."""

    def worker(name: str, place: str, link_s: float) -> Worker:
        return Worker(name, "cpu", "", place, here, 10**9, 1e-6, (0.1,), link_s)

    def timing() -> Timing:
        return Timing({1: [curve_s[0]] * 3, 4: [curve_s[3]] * 3}, [draft_s] * 3)

    timings: dict[Mode, Timing] = {
        "plain": timing(), "sync": timing(), "pipelined": timing()
    }  # fmt: skip
    target, draft = cores
    return Findings(
        target=worker("big", target, target_link_s),
        draft=worker("small", draft, draft_link_s),
        shares=bool(target) and target == draft,
        curve_s=curve_s,
        prefill_s=0.001,
        read_s=0.001,
        timings=timings,
        texts=texts or (agreeing(0.8),),
        tokens=300,
        near_ties=2,
    )


# ---- what spans show ----------------------------------------------------------------------------

ANSWER = (10, 11, 12, 13, 14, 15)  # from position 5 on


def target(start: float, end: float, rows: int, number: int, base: int, *tokens: int) -> Span:
    return Span("target", start, end, rows, number, base, tokens)


def draft(start: float, end: float, lineage: int, base: int, *tokens: int) -> Span:
    confidences = tuple(0.5 + token / 100 for token in tokens)
    return Span("draft", start, end, len(tokens), lineage, base, tokens, confidences)


def test_every_token_drafted_behind_the_right_text_counts_used_or_not() -> None:
    spans = [
        draft(0, 1, 0, 6, 11, 12),  # right; nothing was drafted for position 5
        draft(1, 2, 0, 8, 99, 14),  # wrong, and 14 stands behind it
        draft(2, 3, 1, 9, 14),  # the draft began anew
        draft(3, 4, 1, 10, 15, 16),  # one behind the end
    ]
    trace = agreement(5, ANSWER, spans)
    assert trace["match"] == [1, 1, 0, 1, 1]
    assert trace["confidence"] == pytest.approx([0.61, 0.62, 1.49, 0.64, 0.65])
    assert trace["off_path_confidence"] == {"2": [pytest.approx(0.64)]}


def test_positions_without_a_draft_are_left_out_and_those_behind_are_renumbered() -> None:
    spans = [draft(0, 1, 0, 5, 10), draft(1, 2, 1, 8, 98, 97), draft(2, 3, 2, 10, 15)]
    trace = agreement(5, ANSWER, spans)
    assert trace["match"] == [1, 0, 1]
    assert trace["off_path_confidence"] == {"1": [pytest.approx(1.47)]}


def test_an_answer_without_drafts_shows_nothing_of_them() -> None:
    assert agreement(5, ANSWER, [target(0, 1, 1, 1, 5, 10)])["match"] == []


def test_passes_are_kept_by_their_rows_and_the_prompt_is_none() -> None:
    timing = Timing()
    timing.add(
        [
            target(0.0, 1.0, 1, 0, 5, 10),
            draft(1.25, 1.5, 0, 6, 11),
            draft(1.5, 2.0, 0, 7, 12, 13),
            target(2.0, 2.5, 4, 1, 6, 11, 12, 13, 14),
            target(3.0, 3.25, 1, 2, 10, 15),
        ]
    )
    assert dict(timing.passes) == {4: [0.5], 1: [0.25]}
    assert timing.drafted == [0.25]  # the first is behind a text that had to be read
    assert timing.to_target == [0.0]  # for the second pass nothing had been drafted
    assert timing.to_draft == []  # of the prompt's verdict it is not told


def test_the_way_to_the_draft_is_from_a_verdict_to_the_drafting_behind_it() -> None:
    timing = Timing()
    timing.add(
        [
            target(0.0, 1.0, 1, 0, 5, 10),
            target(1.0, 2.0, 1, 1, 6, 11),
            draft(2.5, 2.75, 1, 7, 12),
            target(3.0, 4.0, 2, 2, 7, 12, 13),
            draft(3.5, 3.75, 1, 9, 14),  # drafted while the target computed
        ]
    )
    assert timing.to_draft == [0.5]


def test_a_new_lineage_is_looked_for_where_an_old_one_has_been() -> None:
    timing = Timing()
    timing.add(
        [
            target(0.0, 1.0, 1, 0, 5, 10),
            draft(1.0, 1.25, 0, 6, 90),
            draft(1.25, 1.5, 0, 7, 91),  # behind a wrong token, at the place of …
            target(2.0, 3.0, 3, 1, 6, 11),
            draft(3.5, 3.75, 1, 7, 12),  # … this one
        ]
    )
    assert timing.to_draft == [0.5]


def test_a_pause_between_two_tokens_is_drafting_and_one_for_leave_is_none() -> None:
    timing = Timing()
    timing.add([draft(0, 1, 0, 5, 1), draft(1.25, 2, 0, 6, 2), draft(4, 5, 0, 7, 3)])
    assert timing.drafted == [1.0, 1.0]


def test_what_takes_long_now_and_then_counts_and_an_accident_does_not() -> None:
    assert usual([1.0, 1.0, 1.0, 3.0]) == 1.5
    assert usual([1.0, 1.0, 1.0, 100.0]) == 1.75


def test_what_the_first_token_took_longer_is_what_reading_took() -> None:
    timing = Timing()
    timing.add([draft(0, 2.5, 0, 6, 11), draft(3.0, 3.5, 0, 7, 12)], unread=8)
    assert timing.read == [0.25]
    timing.add([draft(0, 2.5, 0, 6, 11), draft(3.0, 3.5, 0, 7, 12)])
    assert timing.read == [0.25]


def test_a_curve_is_moved_to_where_passes_were_seen() -> None:
    seen = {1: [0.2] * 3, 3: [0.4] * 4, 2: [9.0]}  # one pass may be an accident
    assert corrected((0.1, 0.1, 0.1, 0.1), seen) == pytest.approx((0.2, 0.3, 0.4, 0.4))
    assert corrected((0.1, 0.2), {7: [1.0] * 5}) == (0.1, 0.2)


def test_what_passes_take_longer_beside_the_draft_is_no_part_of_those_without_it() -> None:
    one = found()
    slower = [1.1 * STEP_S] * 3
    one.timings["pipelined"].passes.update({1: slower, 4: slower, 9: [9.0] * 3})
    assert one.drag == pytest.approx(1.1), "nobody has seen 9 rows without the draft"
    assert one.world("pipelined").drag == pytest.approx(1.1)
    assert one.world("pipelined").verify_s[:4] == pytest.approx([STEP_S] * 4)
    assert one.world("sync").drag == 1.0
    assert found().drag == 1.0


# ---- predictions --------------------------------------------------------------------------------


def predicted(*texts: Text, n_max: int = 64, **changes: Any) -> Forecast:
    one = found(*texts, **changes)
    return forecast.forecast(
        forecast.places(one)[PLACED],
        one.texts,
        forecast.rate("plain", one.world("sync"), one.texts, one.shares),
        n_max,
    )


def test_a_draft_that_never_errs_gives_whole_blocks() -> None:
    """In turns 32 tokens in a pass and 31 drafts; at once as many as are drafted meanwhile."""
    one = predicted(text([1] * 400))
    assert one.plain == pytest.approx(1.0)
    assert one.sync == pytest.approx(32 * STEP_S / (STEP_S + 31 * DRAFT_S), rel=0.1)
    assert one.pipelined == pytest.approx(STEP_S / DRAFT_S, rel=0.15)


@pytest.mark.parametrize("share", [0.6, 0.8, 0.9])
@pytest.mark.parametrize("cost", [0.05, 0.2])
def test_in_turns_it_is_what_the_best_length_gives(share: float, cost: float) -> None:
    answer = agreeing(share, 300)
    one, right = predicted(answer, draft_s=cost * STEP_S), answer.accepted
    best = max(
        (1 - right ** (length + 1)) / (1 - right) / (1 + length * cost) for length in range(1, 16)
    )
    assert one.sync == pytest.approx(best, rel=0.12)
    assert 0.97 * one.sync <= one.pipelined <= min(1 / (1 - right), 1 / cost + 1) * 1.05


def test_a_useless_draft_is_left_alone() -> None:
    one = predicted(text([0] * 300))
    assert 0.9 < one.sync <= 1
    assert 0.9 < one.pipelined <= 1


def test_auto_takes_turns_where_both_share_a_place() -> None:
    apart = predicted(cores=("0", "1"))
    assert apart.auto == apart.pipelined
    together = predicted(cores=("0,1", "0,1"))
    assert together.auto == together.sync


def test_a_far_target_is_seen_as_it_is_and_as_it_would_be_nearby() -> None:
    told = forecasts(found(target_link_s=0.05))
    placed, near = told[PLACED], told["target beside the coordinator"]
    assert placed.plain == pytest.approx(1.0)
    assert near.plain >= 1.0
    assert near.auto > 1.05 * placed.auto > 1.05
    assert "draft beside the coordinator" not in told


def test_the_categories_count_alike_as_in_bench() -> None:
    world = found().world("sync")
    good, bad = agreeing(0.9), text([0] * 80, "prose")
    one, other = (forecast.rate("sync", world, [each], False, 64) for each in (good, bad))
    # what is learnt on one text tells on the next, so this is no exact mean
    both = forecast.rate("sync", world, [good, good, bad], False, 64)
    assert both == pytest.approx((one * other) ** 0.5, rel=0.1)


def test_a_short_answer_stands_for_one_of_usual_length_and_a_long_one_for_itself() -> None:
    short = forecast.lengthened(text([1, 0] * 20).trace)
    assert short["match"] == [1, 0] * 48
    assert len(short["confidence"]) == 96
    assert {"1", "39", "41", "95"} <= short["off_path_confidence"].keys()
    assert all(short["match"][int(at)] == 0 for at in short["off_path_confidence"] if int(at) < 96)
    long = text([1, 0] * 60).trace
    assert forecast.lengthened(long) == long


def test_a_bound_on_the_block_holds() -> None:
    best = 4 * STEP_S / (STEP_S + 3 * DRAFT_S)
    assert predicted(text([1] * 300), n_max=3).sync == pytest.approx(best, rel=0.1)


# ---- advice -------------------------------------------------------------------------------------


def advised(**changes: Any) -> dict[str, Advice]:
    return {one.what: one for one in advised_for(found(**changes))}


def advised_for(one: Findings) -> list[Advice]:
    return advise(one, forecasts(one))


def test_nothing_is_advised_where_all_is_well() -> None:
    assert advised() == {}


def test_a_far_draft_is_to_be_co_located_with_the_figures_that_say_so() -> None:
    one = advised(draft_link_s=0.1)["co-locate the draft with the coordinator"]
    assert "the round trip to the draft, 200 ms, is longer than a block takes" in one.because
    assert "tokens of 5.0 ms" in one.because
    assert one.then is not None
    assert one.then > 1.05 * one.now


def test_a_draft_that_is_a_little_far_is_left_there() -> None:
    assert advised(draft_link_s=0.0014) == {}


def test_a_coordinator_far_from_the_target_is_to_move() -> None:
    one = advised(target_link_s=0.05)["co-locate the coordinator with the target"]
    assert "the round trip to the target, 100 ms, stands beside a pass of 100 ms" in one.because
    assert advised(target_link_s=0.0014) == {}


def test_far_messages_on_one_machine_mean_that_it_is_busy() -> None:
    told = advised(target_link_s=0.05, draft_link_s=0.05, here=True)
    assert "take 100 ms there and back" in told["measure again while it is quiet"].because
    assert not any(what.startswith("co-locate") for what in told)
    assert "measure again while it is quiet" not in advised(target_link_s=0.05)
    assert "measure again while it is quiet" not in advised(here=True)


def test_workers_that_share_a_device_are_told_what_another_would_bring() -> None:
    told = advised(cores=("gpu0",) * 2, draft_s=0.02)
    assert "0.20 of a pass" in told["a device of its own for the draft"].because
    assert "a device of its own for the draft" not in advised(draft_s=0.02)
    # half the speed would cost more than the overlap brings
    assert "a core each" not in advised(cores=("0,1",) * 2)


def test_a_core_each_is_said_where_it_pays_even_at_half_the_speed() -> None:
    one = found(cores=("0,1",) * 2)
    told = dict(forecasts(one))
    told[CORES_EACH] = Forecast(0.5, 1.0, 9.0, 9.0)
    (first, *_) = advise(one, told)
    assert first.what == "a core each"
    assert "--target-cores" in first.because
    told[CORES_EACH] = Forecast(0.5, 1.0, told[PLACED].auto, 1.0)
    assert "a core each" not in {each.what for each in advise(one, told)}


def test_one_gpu_or_one_core_cannot_be_split() -> None:
    assert forecast.split(found(cores=("gpu0",) * 2)) is None
    assert forecast.split(found(cores=("3",) * 2)) is None
    assert forecast.split(found(cores=("0,1",) * 2)) == (1, 1)
    assert forecast.split(found(cores=("0,1,2,3,4,5,6,7",) * 2)) == (6, 2)


def test_a_dear_draft_is_to_be_smaller_and_a_cheap_one_is_not() -> None:
    told = advised(draft_s=0.4 * STEP_S)
    assert "0.40 of a pass" in told["a smaller draft"].because
    assert "a smaller draft" not in advised(draft_s=0.01 * STEP_S)


def test_a_draft_that_is_seldom_right_is_to_be_another() -> None:
    one = found(agreeing(0.4))
    told = {each.what: each for each in advised_for(one)}
    assert "a draft of the target's own family" in told
    assert "a draft of the target's own family" not in advised()


def test_another_mode_is_named_where_auto_is_slower() -> None:
    one = found()
    told = dict(forecasts(one))
    told[PLACED] = Forecast(1.0, 2.0, 1.5, 1.5)
    assert "--mode sync" in {each.what for each in advise(one, told)}
    told[PLACED] = Forecast(1.0, 1.51, 1.5, 1.5)
    assert not [each for each in advise(one, told) if each.what.startswith("--mode")]


def test_no_draft_can_pay_where_rows_cost_as_much_as_passes() -> None:
    one = advised(curve_s=STEEP)["this draft cannot pay here"]
    assert "a pass over 4 rows costs 4.00 passes over one" in one.because
    assert one.then is None


def test_one_that_is_wrong_does_not_pay_and_another_might() -> None:
    told = {each.what for each in advised_for(found(text([0] * 80)))}
    assert "this draft does not pay here" in told
    assert not any(what.startswith("this draft") for what in advised())


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.0000123, "0.01 ms"), (0.0123, "12.3 ms"), (0.1234, "123 ms")]
)
def test_milliseconds_are_as_exact_as_anybody_needs(seconds: float, shown: str) -> None:
    assert ms(seconds) == shown
