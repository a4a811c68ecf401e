"""Several drafts and several targets, all of them nothing but their messages."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.unit.test_coordinator import (
    CLIENT,
    DRAFT,
    PROMPT,
    TARGET,
    Pipeline,
    hello,
    submit,
)  # fmt: skip

from outrider.core.events import Commit, OpenDraft, Prefill
from outrider.core.session import OFFENCES
from outrider.core.values import Drafted, Proposal, Verdict, Verify
from outrider.wire import messages as wire
from outrider_services.pipeline.requests import Defaults
from outrider_services.pipeline.roster import LOST_S

OTHER, SECOND = b"other", b"second"  # another draft, another target
PRICED: dict[str, Any] = {"p_min": None, "cache": None}  # blocks are as the costs say


@pytest.fixture
async def up() -> AsyncIterator[Pipeline]:
    """With a target of two sequences, a draft and a slower one."""
    pipeline = Pipeline()
    await pipeline.join()
    await pipeline.says(OTHER, hello("draft", 3, curve_s=(0.08,)))
    yield pipeline
    await pipeline.core.close()


@pytest.fixture
async def two() -> AsyncIterator[Pipeline]:
    """With two targets of two sequences each, and a draft of four."""
    pipeline = Pipeline()
    await pipeline.says(TARGET, hello("target"))
    await pipeline.says(SECOND, hello("target", 3))
    await pipeline.says(DRAFT, hello("draft", 2, slots=4))
    yield pipeline
    await pipeline.core.close()


async def counted(up: Pipeline) -> dict[str, Any]:
    await up.says(CLIENT, wire.Metrics(99))
    report: wire.MetricsReport = up.to(CLIENT, wire.MetricsReport)[-1]
    return report.metrics


def opened(up: Pipeline, peer: bytes) -> list[int]:
    return [do.request for do in up.orders(peer, OpenDraft)]


def workers_of(up: Pipeline, request: int) -> tuple[bytes | None, bytes | None]:
    one = up.core._requests.running[request]
    return (one.target.peer if one.target else None, one.draft.peer if one.draft else None)


# ---- drafts -------------------------------------------------------------------------------------


async def test_the_slow_one_of_two_drafts_stands_by(up: Pipeline) -> None:
    for call in range(1, 40):
        request = await up.begin(call, **PRICED)
        assert workers_of(up, request) == (TARGET, DRAFT)
        await up.says(CLIENT, wire.Cancel(call))
    assert opened(up, OTHER) == []
    workers = up.core.health()["workers"]
    assert list(workers) == ["target", "draft", "draft-2"]
    assert workers["draft"]["worth"] > workers["draft-2"]["worth"] > 9.0


async def test_the_one_that_joined_later_serves_if_it_is_faster(up: Pipeline) -> None:
    await up.says(b"third", hello("draft", 4, curve_s=(0.001,)))
    await up.begin(**PRICED)
    assert len(opened(up, b"third")) == 1
    assert opened(up, DRAFT) == []


async def test_the_one_that_is_far_away_stands_by(up: Pipeline) -> None:
    await up.says(b"third", hello("draft", 4, curve_s=(0.001,)))
    ping = up.to(b"third", wire.Ping)[-1]
    up.now += 0.8
    await up.says(b"third", wire.Beat(1, False, 0.0, ping.number))
    assert up.core.health()["workers"]["draft-3"]["link_s"] == pytest.approx(0.8)
    await up.begin(**PRICED)
    assert len(opened(up, DRAFT)) == 1
    assert opened(up, b"third") == []


@pytest.mark.parametrize("leave", ["gone", "silent", "refused"])
async def test_another_draft_takes_over_between_two_tokens(up: Pipeline, leave: str) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21)
    await up.verdict(request, 20)
    verified = len(up.orders(TARGET, Verify))
    if leave == "gone":
        up.core.on_gone(DRAFT)
    elif leave == "refused":
        await up.says(DRAFT, wire.Failed(request, "internal_error", "no"))
    else:
        for _ in range(6):
            up.now += 0.25
            await up.says(TARGET, wire.Beat(1, False))
            await up.says(OTHER, wire.Beat(1, False))
            up.core.look()
        assert up.to(DRAFT, wire.Close) == [wire.Close(request)]
    (opening,) = up.orders(OTHER, OpenDraft)
    assert (opening.request, opening.order.base) == (request, 4)
    assert opening.order.tokens == (*PROMPT, 20, 21)  # what is being verified included
    assert len(up.orders(TARGET, Verify)) == verified  # no pass was lost
    await up.verdict(request, 21, 22)
    assert up.orders(OTHER, Commit)[-1].order.tokens == (21, 22)
    drafted = (Drafted(23, 0.9), Drafted(24, 0.9))
    await up.says(OTHER, wire.Done(request, Proposal(opening.order.lineage, 6, drafted, 0.01)))
    await up.verdict(request, 23)
    assert up.orders(TARGET, Verify)[-1].order.drafted == (24,)


async def test_what_the_former_draft_still_says_is_dropped_and_counted(up: Pipeline) -> None:
    request = await up.begin()
    up.core.look()
    up.now += 1.2
    for peer in (TARGET, OTHER):
        await up.says(peer, wire.Beat(1, False))
    up.core._roster._looked = up.now  # this process was not paused
    up.core.look()
    assert workers_of(up, request) == (TARGET, OTHER)
    await up.drafted(request, 3, 66, 66)
    assert workers_of(up, request) == (TARGET, OTHER)
    await up.verdict(request, 20)
    assert up.orders(TARGET, Verify)[-1].order.drafted == ()
    assert (await counted(up))["stale_dropped_total"]["other_worker"] == 1
    await up.says(DRAFT, wire.Done(request + 9, Proposal(1, 3, (Drafted(66, 0.9),), 0.01)))
    assert (await counted(up))["stale_dropped_total"]["over"] == 1


async def test_what_is_not_awaited_is_counted_by_what_differs(up: Pipeline) -> None:
    request = await up.begin()
    await up.verdict(request, 20)
    await up.verdict(request, 66, round=0, base=3)  # of the round before
    await up.verdict(request, 66, base=2)
    await up.drafted(request, 9, 66)
    await up.says(DRAFT, wire.Done(request, Proposal(0, 4, (Drafted(66, 0.9),), 0.01)))
    await up.says(CLIENT, wire.Cancel(1))
    await up.says(TARGET, two_verdicts(request))
    assert (await counted(up))["stale_dropped_total"] == {
        **{"over": 1, "other_worker": 0, "round": 2, "lineage": 1, "malformed": 1}
    }


async def test_a_draft_that_breaks_the_rules_is_replaced_for_this_request(up: Pipeline) -> None:
    request = await up.begin()
    for _ in range(OFFENCES):
        await up.drafted(request, 77, 20)
    assert workers_of(up, request) == (TARGET, OTHER)
    assert wire.Close(request) in up.to(DRAFT, wire.Close)
    assert opened(up, OTHER) == [request]


async def test_a_request_that_every_draft_gives_up_goes_on_without(up: Pipeline) -> None:
    request = await up.begin()
    for peer in (DRAFT, OTHER):
        await up.says(peer, wire.Failed(request, "internal_error", "no"))
    assert workers_of(up, request) == (TARGET, None)
    assert (len(opened(up, DRAFT)), len(opened(up, OTHER))) == (1, 1)
    await up.verdict(request, 20)
    await up.verdict(request, 21)
    assert len(up.to(CLIENT, wire.Progress)) == 2


async def test_a_draft_without_a_place_is_no_choice_until_it_has_one(bare: Pipeline) -> None:
    await bare.says(TARGET, hello("target", slots=3))
    await bare.says(DRAFT, hello("draft", 2, slots=1))
    requests = [await bare.begin(call, **PRICED) for call in (1, 2)]
    assert [workers_of(bare, one)[1] for one in requests] == [DRAFT, None]
    await bare.says(CLIENT, wire.Cancel(1))
    assert workers_of(bare, requests[1])[1] == DRAFT
    assert opened(bare, DRAFT) == requests


@pytest.fixture
async def bare() -> AsyncIterator[Pipeline]:
    pipeline = Pipeline()
    yield pipeline
    await pipeline.core.close()


# ---- targets ------------------------------------------------------------------------------------


async def test_requests_go_to_the_least_loaded_target_and_each_has_its_own_passes(
    two: Pipeline,
) -> None:
    await two.says(CLIENT, *(submit(call, mode="plain") for call in range(1, 6)))
    prefills = {peer: two.orders(peer, Prefill) for peer in (TARGET, SECOND)}
    assert [len(one) for one in prefills.values()] == [2, 2]
    assert two.core.health()["requests"] == {"running": 4, "waiting": 1}
    first, second = (prefills[SECOND][at].request for at in (0, 1))
    done = two_verdicts(first, second)
    await two.says(SECOND, done)
    (together,) = two.to(SECOND, wire.Pass)
    assert [number for number, _ in together.orders] == [first, second]
    assert two.to(TARGET, wire.Pass) == []
    assert two.core.health()["slots"]["2"]["target"] == "target-2"


def two_verdicts(*requests: int) -> wire.Passed:
    said = Verdict(
        accepted=0, tokens=(20,), round=0, base=3, pieces=(b"x",), margins=(1.0,), elapsed_s=0.1
    )
    return wire.Passed(tuple((request, said) for request in requests))


async def test_what_one_target_says_of_anothers_request_does_not_count(two: Pipeline) -> None:
    await two.says(CLIENT, submit(1, mode="plain"))
    (prefill,) = two.orders(TARGET, Prefill)
    await two.says(SECOND, two_verdicts(prefill.request))
    assert two.to(CLIENT, wire.Progress) == []
    assert (await counted(two))["stale_dropped_total"]["other_worker"] == 1
    await two.says(TARGET, two_verdicts(prefill.request))
    assert len(two.to(CLIENT, wire.Progress)) == 1


async def test_the_target_that_knows_the_text_serves_if_the_loads_are_about_equal(
    two: Pipeline,
) -> None:
    text = tuple(range(10, 80))
    await two.says(CLIENT, submit(1, mode="plain"))  # the first has something to do meanwhile
    await two.says(CLIENT, submit(2, text, mode="plain", cache="talk"))
    (prefill,) = two.orders(SECOND, Prefill)
    await two.verdict_of(SECOND, prefill.request, 1)  # it ends
    await two.says(CLIENT, wire.Cancel(1))
    for call, where in ((3, SECOND), (4, SECOND), (5, TARGET)):
        await two.says(CLIENT, submit(call, (*text, call), mode="plain", cache="talk"))
        ran = two.orders(where, Prefill)[-1]
        assert ran.order.tokens[-1] == call
    assert Counter(len(two.orders(peer, Prefill)) for peer in (TARGET, SECOND)) == {2: 1, 3: 1}


async def test_one_draft_rides_ahead_of_several_targets(two: Pipeline) -> None:
    await two.says(CLIENT, *(submit(call) for call in (1, 2)))
    one, other = (two.orders(peer, Prefill)[0].request for peer in (TARGET, SECOND))
    assert opened(two, DRAFT) == [one, other]
    await two.drafted(other, 3, 20, 21)
    await two.verdict_of(SECOND, other, 20)
    assert two.orders(SECOND, Verify)[-1].order.drafted == (21,)
    assert two.orders(TARGET, Verify) == []


async def test_questions_go_to_the_target_that_is_left(two: Pipeline) -> None:
    two.core.on_gone(TARGET)
    await two.says(CLIENT, wire.Tokenize(5, "text", True))
    assert len(two.to(SECOND, wire.Tokenize)) == 1
    two.now += LOST_S
    assert two.core.health()["status"] == "ok"


async def test_what_a_lost_target_was_at_goes_on_at_once_with_another(two: Pipeline) -> None:
    await two.says(CLIENT, submit(1), submit(2))
    one, other = (two.orders(peer, Prefill)[0].request for peer in (TARGET, SECOND))
    await two.verdict_of(TARGET, one, 20)
    await two.verdict_of(SECOND, other, 30)
    await two.drafted(one, 4, 21, 22)
    two.core.on_gone(TARGET)
    assert workers_of(two, one) == (SECOND, DRAFT)
    resumed = two.orders(SECOND, Prefill)[-1]
    assert (resumed.request, resumed.order.tokens) == (one, (*PROMPT, 20))
    assert two.core.health()["slots"]["1"]["target"] == "target-2"
    await two.verdict_of(SECOND, one, 21, base=4, round=resumed.order.round)
    assert two.orders(SECOND, Verify)[-1].order.drafted == (22,)  # what was drafted is kept
    await two.verdict_of(SECOND, other, 31)
    assert two.outcomes() == {}


async def test_those_for_whom_there_is_no_place_wait_for_one_before_all_others(
    two: Pipeline,
) -> None:
    await two.says(CLIENT, *(submit(call, mode="plain") for call in range(1, 6)))
    lost = [do.request for do in two.orders(TARGET, Prefill)]
    two.core.on_gone(TARGET)
    assert [workers_of(two, one)[0] for one in lost] == [None, None]
    kept = [do.request for do in two.orders(SECOND, Prefill)]
    await two.verdict_of(SECOND, kept[0], 1)  # it ends
    assert [workers_of(two, one)[0] for one in lost] == [SECOND, None]
    assert two.started() == [1, 2, 3, 4]
    await two.says(TARGET, hello("target", 9))
    assert workers_of(two, lost[1])[0] is None  # perhaps one of the two has killed the target
    resumed = two.orders(SECOND, Prefill)[-1]
    await two.verdict_of(SECOND, resumed.request, 40, round=resumed.order.round)
    assert [workers_of(two, one)[0] for one in lost] == [SECOND, TARGET]
    assert (two.started(), two.outcomes()) == ([1, 2, 3, 4, 5], {2: ["stop"]})


async def test_a_request_that_kills_two_targets_does_not_get_the_third(two: Pipeline) -> None:
    await two.says(b"third", hello("target", 4))
    await two.says(CLIENT, submit(1, mode="plain"), submit(2, mode="plain"))
    (culprit,) = two.orders(TARGET, Prefill)
    (other,) = two.orders(SECOND, Prefill)
    two.core.on_gone(TARGET)
    where = workers_of(two, culprit.request)[0]
    assert where == b"third"
    two.core.on_gone(b"third")
    assert workers_of(two, culprit.request)[0] is None
    two.core.look()
    assert two.outcomes() == {}  # it may yet be told that somebody has killed them
    two.now += Defaults().resume_s
    two.core.look()
    assert two.outcomes() == {1: ["request_poisoned"]}
    await two.verdict_of(SECOND, other.request, 30)
    assert workers_of(two, other.request)[0] == SECOND


async def test_those_whose_target_was_lost_find_their_places_free(bare: Pipeline) -> None:
    await bare.says(TARGET, hello("target"))
    await bare.says(CLIENT, *(submit(call, mode="plain") for call in range(1, 5)))
    bare.core.on_gone(TARGET)
    await bare.says(TARGET, hello("target", 7))
    assert bare.started() == [1, 2]  # one of them has gone on, and the other is to follow
    first, second = (do.request for do in bare.orders(TARGET, Prefill)[:2])
    assert [workers_of(bare, one)[0] for one in (first, second)] == [TARGET, None]
    await bare.verdict_of(TARGET, first, 1, round=1)
    assert workers_of(bare, second)[0] == TARGET
    assert bare.started() == [1, 2, 3]
