"""Where workers compute, and whether two of them share it."""

from __future__ import annotations

import os
import socket

import pytest

from outrider_services import sources
from outrider_services.pipeline.places import VISIBLE, place, share_cores, shared


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a:0,1", "a:1,2", True),
        ("a:0,1", "a:2,3", False),
        ("a:0", "b:0", False),
        ("a:1", "a:11", False),
        ("a:gpu0", "a:gpu0,gpu1", True),
        ("a:gpu0", "a:gpu1", False),
        ("a:gpu*", "a:gpu1", True),
        ("a:gpu*", "a:gpu*", True),
        ("a:gpu*", "b:gpu*", False),
        ("a:gpu*", "a:0,1", False),
        ("a:gpu0", "a:0,1", False),
        ("", "a:0", False),
        ("", "", False),
    ],
)
def test_who_shares(one: str, other: str, expected: bool) -> None:
    assert shared(one, other) is expected
    assert shared(other, one) is expected


def test_where_a_model_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    host = socket.gethostname()
    for name in VISIBLE:
        monkeypatch.delenv(name, raising=False)
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert place("cpu, 2 threads on cores 0, 1") == f"{host}:{cores}"
    assert place("gpu, all layers; cpu, 2 threads") == f"{host}:gpu*"
    assert place("toy") == ""
    monkeypatch.setenv(VISIBLE[0], "0, 2")
    assert place("gpu, all layers; cpu, 2 threads") == f"{host}:gpu0,gpu2"


def test_workers_that_may_use_the_same_core_share_it() -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    assert share_cores(sources.settings({}))
    assert share_cores(sources.settings({"target.cores": str(first)}))
    assert not share_cores(sources.settings({"pipeline.backend": "toy"}))
    if others:
        apart = {"target.cores": str(first), "draft.cores": str(others[0])}
        assert not share_cores(sources.settings(apart))
