"""Where workers compute, and whether two of them share it."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from outrider_services import sources
from outrider_services.pipeline.places import place, share_cores, shared

CARD, OTHER_CARD = "gpu 0000:01:00.0", "gpu 0000:02:00.0"


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a:0,1", "a:1,2", True),
        ("a:0,1", "a:2,3", False),
        ("a:0", "b:0", False),
        ("a:1", "a:11", False),
        (f"a:{CARD}", f"a:{OTHER_CARD},{CARD}", True),
        (f"a:{CARD}", f"a:{OTHER_CARD}", False),
        (f"a:{CARD}", f"b:{CARD}", False),
        (f"a:{CARD}", "a:0,1", False),
        (f"a:{CARD},0,1", "a:0,1", True),  # layers on both
        ("a:gpu Vulkan0", "a:0,1", False),
        ("a:gpu Vulkan0", "a:gpu Vulkan0", True),
        ("", "a:0", False),
        ("", "", False),
    ],
)
def test_who_shares(one: str, other: str, expected: bool) -> None:
    assert shared(one, other) is expected
    assert shared(other, one) is expected


def test_where_a_model_is_computed() -> None:
    host = socket.gethostname()
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    assert place(("cpu",)) == f"{host}:{cores}"
    assert place(("0000:01:00.0",)) == f"{host}:{CARD}"
    assert place(("0000:01:00.0", "cpu")) == f"{host}:{CARD},{cores}"
    assert place(()) == ""


@pytest.mark.parametrize(
    ("target", "draft", "expected"),
    [
        ({"device": "CUDA0"}, {}, False),
        ({"device": "CUDA0"}, {"device": "CUDA1"}, False),
        ({"device": "CUDA0,CUDA1"}, {"device": "cuda1"}, True),
        ({"device": "CUDA0"}, {"ngl": -1}, True),
        ({"ngl": -1}, {}, False),
        ({"device": "none"}, {"device": "Vulkan0"}, False),
        ({"device": "CUDA0", "ngl": 3}, {}, True),  # the processor has the other layers
    ],
    ids=str,
)
def test_workers_that_may_use_the_same_gpu_share_it(
    target: dict[str, Any], draft: dict[str, Any], expected: bool
) -> None:
    given = {f"target.{key}": value for key, value in target.items()}
    given |= {f"draft.{key}": value for key, value in draft.items()}
    assert share_cores(sources.settings(given)) is expected


def test_workers_that_may_use_the_same_core_share_it() -> None:
    first, *others = sorted(os.sched_getaffinity(0))
    assert share_cores(sources.settings({}))
    assert share_cores(sources.settings({"target.cores": str(first)}))
    assert not share_cores(sources.settings({"pipeline.backend": "toy"}))
    if others:
        apart = {"target.cores": str(first), "draft.cores": str(others[0])}
        assert not share_cores(sources.settings(apart))
