"""What the coordinator counts over all requests: it adds up, and Prometheus can read it."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.unit.test_coordinator import CLIENT, DRAFT, TARGET, Pipeline, hello, submit

import outrider
from outrider.core.stats import Stats
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services.pipeline.exposition import SHARED, exposition
from outrider_services.pipeline.families import FAMILIES
from outrider_services.pipeline.metrics import Beat, Histogram, Meter, Overlap


@pytest.fixture
async def up() -> AsyncIterator[Pipeline]:
    """With a target of two sequences, and a draft."""
    pipeline = Pipeline(queue=3)
    await pipeline.join()
    yield pipeline
    await pipeline.core.close()


async def counted(up: Pipeline) -> dict[str, Any]:
    await up.says(CLIENT, wire.Metrics(99))
    report: wire.MetricsReport = up.to(CLIENT, wire.MetricsReport)[-1]
    return report.metrics


def failures(counts: Mapping[str, Any]) -> dict[str, int]:
    return {code: count for code, count in counts["request_failure_total"].items() if count}


def samples(told: str) -> dict[str, float]:
    """By name and labels as they are written, without our prefix."""
    found = {}
    for family in text_string_to_metric_families(told):
        for one in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in one.labels.items())
            found[f"{one.name.removeprefix('outrider_')}{{{labels}}}"] = one.value
    return found


def check_identities(counts: Mapping[str, Any], *, is_over: bool = True) -> None:
    """Once all requests are over, created = verified + discarded + hits, and so on."""
    drafted = "spec_decode_num_{}_draft_tokens_total"
    created = counts[drafted.format("created")]
    verified = counts["spec_decode_num_draft_tokens_total"]
    accepted = counts["spec_decode_num_accepted_tokens_total"]
    discarded = counts[drafted.format("discarded")]
    used = verified + sum(discarded.values()) + counts["spec_decode_num_hits_total"]
    assert created == used if is_over else created >= used
    assert min(discarded.values()) >= 0
    assert accepted <= verified
    by_position = counts["spec_decode_num_accepted_tokens_per_pos_total"]
    assert sum(by_position.values()) == accepted
    assert [*by_position.values()] == sorted(by_position.values(), reverse=True)
    own = sum(counts["target_tokens_total"].values())
    answered = accepted - counts["truncated_tokens_total"] + own
    assert counts["generation_tokens_total"] == answered


# ---- counting -----------------------------------------------------------------------------------


async def test_each_metric_of_the_table_is_told_from_the_beginning(up: Pipeline) -> None:
    assert (await counted(up)).keys() == FAMILIES.keys()


async def test_of_a_block_each_token_is_counted_once(up: Pipeline) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21, 22, 23)
    await up.verdict(request, 20)  # the target's first, and a hit
    await up.verdict(request, 21, 22, 30, accepted=2)  # of three, then a correction
    counts = await counted(up)
    assert counts["spec_decode_num_created_draft_tokens_total"] == 4
    assert counts["spec_decode_num_hits_total"] == 1
    assert counts["spec_decode_num_drafts_total"] == 1
    assert counts["spec_decode_num_draft_tokens_total"] == 3
    assert counts["spec_decode_num_accepted_tokens_total"] == 2
    assert counts["spec_decode_num_accepted_tokens_per_pos_total"] == {"0": 1, "1": 1}
    assert counts["target_tokens_total"] == {"corrected": 1, "bonus": 0, "plain": 1}
    assert counts["generation_tokens_total"] == 4
    assert counts["prompt_tokens_total"] == 3
    assert counts["num_requests_running"] == 1
    check_identities(counts)


async def test_what_a_request_counted_stays_when_it_is_over(up: Pipeline) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21)
    await up.verdict(request, 20)
    before = await counted(up)
    await up.verdict(request, 21, 1)  # an end token
    counts = await counted(up)
    assert (before["generation_tokens_total"], counts["generation_tokens_total"]) == (1, 3)
    assert counts["request_success_total"] == {"stop": 1, "length": 0, "cancelled": 0}
    assert counts["num_requests_running"] == 0
    check_identities(counts)


async def test_what_is_left_of_the_drafted_is_discarded_for_a_reason(up: Pipeline) -> None:
    first, second = await up.begin(1), await up.begin(2)
    for request in (first, second):
        await up.drafted(request, 3, 20, 21, 22)
    check_identities(await counted(up), is_over=False)
    await up.says(CLIENT, wire.Cancel(1))
    up.core.on_gone(TARGET)
    up.now += 600
    up.core.look()
    counts = await counted(up)
    reasons = counts["spec_decode_num_discarded_draft_tokens_total"]
    assert (reasons["cancelled"], reasons["failed"], sum(reasons.values())) == (3, 3, 6)
    assert counts["request_success_total"]["cancelled"] == 1
    assert failures(counts) == {"worker_unavailable": 1}
    check_identities(counts)


async def test_a_request_that_is_refused_is_a_failure_by_its_code(up: Pipeline) -> None:
    await up.says(CLIENT, *(submit(call) for call in range(1, 6)), submit(6, prompt=()))
    counts = await counted(up)
    assert failures(counts) == {"busy": 3}
    assert (counts["num_requests_running"], counts["num_requests_waiting"]) == (2, 1)
    await up.says(CLIENT, wire.Cancel(3), submit(7, prompt=()))
    assert failures(await counted(up)) == {"busy": 3, "invalid_request": 1}


async def test_times_are_those_of_the_clock(up: Pipeline) -> None:
    request = await up.begin()
    up.now += 0.4
    await up.verdict(request, 20)
    up.now += 0.3
    await up.verdict(request, 21)
    await up.drafted(request, 5, 22, 23)
    up.now += 0.3
    await up.verdict(request, 24)
    await up.verdict(request, 1)
    counts = await counted(up)
    first, between = counts["time_to_first_token_seconds"], counts["inter_token_latency_seconds"]
    assert (first["0.25"], first["0.5"], first["+Inf"]) == (0, 1, 1)
    assert first["sum"] == pytest.approx(0.4)
    assert (between["0.25"], between["0.5"], between["+Inf"]) == (1, 3, 3)
    assert between["sum"] == pytest.approx(0.6)
    assert counts["e2e_request_latency_seconds"]["sum"] == pytest.approx(1.0)
    assert counts["verify_seconds"]["+Inf"] == 3
    drafting = counts["draft_seconds"]
    assert (drafting["+Inf"], drafting["sum"]) == (2, pytest.approx(0.01))


def test_what_both_lanes_share_is_counted_as_a_request_counts_it() -> None:
    rng = random.Random(5)
    stats, overlap = Stats(prefilled=100.0), Overlap()
    now = 100.0
    for _ in range(2000):
        now += rng.expovariate(50)
        elapsed_s = rng.expovariate(30)
        if rng.random() < 0.4:
            stats.computed(stats.target, now, elapsed_s)
            overlap.add("target", "draft", now, min(elapsed_s, now - 100.0))
        else:
            stats.computed(stats.draft, now, elapsed_s)
            overlap.add("draft", "target", now, min(elapsed_s, now - 100.0))
    assert overlap.both_s > 1.0
    assert overlap.both_s == pytest.approx(stats.both_s)


def test_a_histogram_tells_how_many_were_at_most_so_much() -> None:
    histogram = Histogram((1.0, 2.0))
    for value, times in ((0.5, 1), (1.0, 2), (1.5, 1), (9.0, 1)):
        histogram.observe(value, times)
    assert histogram.table() == {"1.0": 3, "2.0": 4, "+Inf": 5, "sum": 13.0}


# ---- workers ------------------------------------------------------------------------------------


async def test_a_lane_is_busy_as_its_worker_says_and_waits_only_while_requests_run(
    up: Pipeline,
) -> None:
    await up.says(TARGET, wire.Beat(5, True, 10.0))
    up.now += 2.0  # nothing runs
    await up.says(TARGET, wire.Beat(5, False, 10.0))
    await up.begin()
    up.now += 0.5
    await up.says(TARGET, wire.Beat(9, True, 10.3))
    up.now += 0.5
    await up.says(TARGET, wire.Beat(13, True, 10.7))
    counts = await counted(up)
    assert counts["lane_busy_seconds_total"]["target"] == pytest.approx(0.7)
    assert counts["lane_passes_total"] == {"target": 8, "draft": 0}
    assert counts["lane_wait_seconds_total"]["target"] == {"draft": pytest.approx(0.3)}
    worker = up.core.health()["workers"]["target"]
    assert (worker["busy"], worker["passes_per_s"]) == (pytest.approx(0.7), pytest.approx(8.0))


async def test_a_worker_that_is_restarted_counts_on(up: Pipeline) -> None:
    await up.says(DRAFT, wire.Beat(5, True, 10.0))
    up.now += 1.0
    await up.says(DRAFT, wire.Beat(7, True, 10.5))
    up.core.on_gone(DRAFT)
    counts = await counted(up)
    assert counts["worker_up"] == {"target": 1, "draft": 0}
    assert counts["info"] == {"version": counts["info"]["version"], "target": "target", "draft": ""}
    await up.says(b"next", hello("draft", 3))
    await up.says(b"next", wire.Beat(1, True, 0.1))
    up.now += 1.0
    await up.says(b"next", wire.Beat(2, True, 0.3))
    counts = await counted(up)
    assert counts["worker_up"] == {"target": 1, "draft": 1}
    assert counts["worker_restarts_total"] == {"target": 0, "draft": 1}
    assert up.core.health()["restarts"] == {"target": 0, "draft": 1}
    assert counts["lane_busy_seconds_total"]["draft"] == pytest.approx(0.7)
    assert counts["lane_passes_total"]["draft"] == 3


async def test_only_the_answer_to_the_last_ping_tells_of_the_link(up: Pipeline) -> None:
    up.core.ping()
    up.core.ping()
    ping = up.to(TARGET, wire.Ping)[-1]
    up.now += 0.02
    await up.says(TARGET, wire.Beat(1, False, 0.0, ping.number - 1), wire.Beat(1, False))
    assert (await counted(up))["link_rtt_seconds"]["target"]["+Inf"] == 0
    await up.says(TARGET, wire.Beat(1, False, 0.0, ping.number))
    links = (await counted(up))["link_rtt_seconds"]
    assert (links["target"]["+Inf"], links["draft"]["+Inf"]) == (1, 0)
    assert links["target"]["sum"] == pytest.approx(0.02)


def test_a_meter_looks_back_one_second_however_many_beats_come() -> None:
    meter = Meter()
    for beat in range(1000):  # busy at first, then idle
        at = beat * 0.01
        meter.take(Beat(at, min(at, 9.5), beat, 0.0), "draft")
    assert meter.recently()["busy"] < 0.6
    assert meter.busy_s == pytest.approx(9.5)
    meter.begin()
    assert meter.recently() == {"busy": 0.0, "passes_per_s": 0.0}


@pytest.mark.parametrize("told", [float("nan"), 0.0], ids=["nan", "less"])
def test_a_worker_that_tells_nonsense_takes_nothing_away(told: float) -> None:
    meter = Meter()
    for at, computed_s in ((1.0, 1.0), (2.0, 1.5), (3.0, told), (4.0, told)):
        meter.take(Beat(at, computed_s, 1, 0.0), "draft")
    assert meter.busy_s == 0.5
    assert 0.0 <= meter.recently()["busy"] <= 1.0


# ---- the health report --------------------------------------------------------------------------


async def test_a_running_request_has_a_line_without_its_text(up: Pipeline) -> None:
    request = await up.begin()
    (slot,) = up.core.health()["slots"].values()
    assert slot["phase"] == "reading"
    await up.drafted(request, 3, 20, 21)
    await up.verdict(request, 20)
    up.now += 0.5
    await up.verdict(request, 21, 22)
    assert up.core.health()["slots"] == {
        "1": {
            "phase": "verifying",
            "prompt_tokens": 3,
            "generated_tokens": 3,
            "tokens_per_s": 6.0,
            "acceptance_rate": 1.0,
            "mode": "pipelined",
            "target": "target",
            "draft": "draft",
        }
    }
    await up.says(CLIENT, wire.Cancel(1))
    assert up.core.health()["slots"] == {}


async def test_what_is_told_fits_a_message_however_many_run() -> None:
    crowd = Pipeline(queue=300)
    await crowd.join(slots=300)
    await crowd.says(CLIENT, *(submit(call) for call in range(1, 301)))
    await crowd.says(CLIENT, wire.Health(999), wire.Metrics(1000))
    for kind in (wire.HealthReport, wire.MetricsReport):
        (message,) = crowd.to(CLIENT, kind)
        assert decode(encode(message)) == message
    assert crowd.core.health()["requests"]["running"] == 300
    await crowd.core.close()


# ---- the text -----------------------------------------------------------------------------------


async def test_the_exposition_says_what_the_snapshot_says(up: Pipeline) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21)
    await up.verdict(request, 20)
    await up.verdict(request, 21, 22)
    await up.says(TARGET, wire.Beat(1, True, 0.0))
    up.now += 0.2
    await up.says(TARGET, wire.Beat(3, True, 0.1))
    found = samples(exposition(await counted(up)))
    assert found["spec_decode_num_accepted_tokens_total{}"] == 1
    assert found["spec_decode_num_accepted_tokens_per_pos_total{position=0}"] == 1
    assert found["spec_decode_num_discarded_draft_tokens_total{reason=stop}"] == 0
    assert found["lane_wait_seconds_total{lane=target,on=draft}"] == pytest.approx(0.1)
    assert found["verify_seconds_count{}"] == found["verify_seconds_bucket{le=+Inf}"] == 1
    assert found["verify_seconds_sum{}"] == pytest.approx(0.1)
    assert found["num_requests_running{}"] == 1
    (info,) = [name for name in found if name.startswith("info{")]
    assert set(info[5:-1].split(",")) == {
        f"version={outrider.__version__}",
        "target=target",
        "draft=draft",
    }


async def test_each_family_has_its_type_and_a_help(up: Pipeline) -> None:
    told = exposition(await counted(up))
    for name, family in FAMILIES.items():
        kind = "gauge" if family.kind == "info" else family.kind
        assert f"# HELP outrider_{name} {family.help}\n# TYPE outrider_{name} {kind}\n" in told


async def test_whatever_a_worker_calls_its_model_the_text_can_be_read(bare: Pipeline) -> None:
    name = 'a "model"\\ with\nlines'
    await bare.join(model=name)
    told = exposition(await counted(bare))
    families = {family.name: family for family in text_string_to_metric_families(told)}
    info = families["outrider_info"]
    assert info.samples[0].labels["target"] == name


@pytest.fixture
async def bare() -> AsyncIterator[Pipeline]:
    pipeline = Pipeline()
    yield pipeline
    await pipeline.core.close()


async def test_by_vllms_names_the_same_is_told_again(up: Pipeline) -> None:
    counts = await counted(up)
    ours, both = exposition(counts), exposition(counts, "vllm")
    assert both.startswith(ours)
    more = samples(both).keys() - samples(ours).keys()
    assert {name.partition("{")[0] for name in more} == {
        "vllm:" + name for name in SHARED if "per_pos" not in name
    }


async def test_what_a_coordinator_of_another_version_does_not_count_is_left_out(
    up: Pipeline,
) -> None:
    counts = await counted(up)
    del counts["overlap_seconds_total"]
    found = samples(exposition({**counts, "invented_total": 5}))
    assert not {"overlap_seconds_total{}", "invented_total{}"} & found.keys()
