"""How many replicas there should be, by what waits and by how fast answers come."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from outrider_services.cluster.scaling import REQUESTS, SPEED, Policy, wanted


@pytest.mark.parametrize(("requests", "count"), [(0, 0), (1, 1), (4, 1), (5, 2), (16, 4), (17, 5)])
def test_requests_get_the_places_that_they_need(requests: int, count: int) -> None:
    assert wanted(1, requests, places=4) == count


def test_where_answers_come_too_slowly_a_replica_has_fewer_of_them() -> None:
    # each of two replicas has 4 requests, which get half of what they should
    assert wanted(2, 8, places=4, speed=10.0, least_speed=20.0) == 4
    assert wanted(2, 8, places=4, speed=40.0, least_speed=20.0) == 2
    assert wanted(2, 8, places=4, speed=0.0, least_speed=20.0) == 2  # nothing was measured yet
    assert wanted(8, 8, places=4, speed=1.0, least_speed=20.0) == 8  # alone, and as slow


def context(requests: float, **told: dict[str, float]) -> SimpleNamespace:
    return SimpleNamespace(
        current_num_replicas=2, total_num_requests=requests, aggregated_metrics=told
    )


def test_the_policy_reads_what_replicas_tell() -> None:
    policy = Policy(places=4, tokens_per_s=20.0)
    assert policy(context(8))[0] == 2
    slow = {SPEED: {"a": 10.0, "b": 10.0, "idle": 0.0}}
    assert policy(context(8, **slow))[0] == 4
    assert policy(context(1, **{REQUESTS: {"a": 6.0, "b": 6.0}}))[0] == 3
    assert policy(SimpleNamespace(**{**vars(context(4)), "aggregated_metrics": None}))[0] == 1
