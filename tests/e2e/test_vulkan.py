"""Draft and target on unlike devices: the processor, and Vulkan's first one.

For a llama.cpp that `scripts/setup --gpu vulkan` has built. The device may be Mesa's, which is made
of software: llama.cpp leaves it out unless it is named.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outrider import Client, Completion
from outrider.core.values import Mode
from outrider_services.bench.results import Sample, first_difference
from outrider_services.commands import devices

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

VISIBLE = "GGML_VK_VISIBLE_DEVICES"
PROMPTS = ("The future of AI is", "def merge(left, right):")
COUNT = 24
PLACEMENTS = {"draft-on-vulkan": ("--device-draft=Vulkan0",), "target-on-vulkan": ("-dev=Vulkan0",)}
FIXED = ("--n-draft=4", "--spec-draft-n-min=4")  # blocks are verified whether they pay or not
READY_S = 600  # made of software, a device first translates some dozen programs for itself
# Mesa's device made of software crashes where a pass has several sequences (seen with 22.3)
ALONE = ("--parallel=1", "--draft-branches=0")
FLAGS = ("--ctx=256", *ALONE, "--draft-quant=off", f"--ready-timeout={READY_S}", *FIXED)


@pytest.fixture(scope="module", autouse=True)
def vulkan() -> Iterator[dict[str, Any]]:
    """What Vulkan0 is here; without one, these tests are skipped."""
    before = os.environ.get(VISIBLE)
    os.environ.setdefault(VISIBLE, "0")
    try:
        names = {one["name"]: one for one in devices.ask()}
        if "Vulkan0" not in names:
            pytest.skip("this build of llama.cpp sees no device of Vulkan's")
        yield names["Vulkan0"]
    finally:
        if before is None:
            del os.environ[VISIBLE]


def sample(mode: Mode, answer: Completion) -> Sample:
    ids = tuple(token.id for token in answer.tokens)
    margins = tuple(token.margin for token in answer.tokens)
    return Sample("", 0, 0, mode, 1.0, len(ids), token_ids=ids, margins=margins)


@pytest.fixture(scope="module", params=PLACEMENTS, ids=str)
def pair(request: pytest.FixtureRequest, serve: Any, test_model: Path) -> tuple[str, Client]:
    placement: str = request.param
    models = ("-m", test_model, "-md", test_model)
    client: Client = serve(*models, *PLACEMENTS[placement], *FLAGS, seconds=READY_S)
    return placement, client


def test_each_worker_computes_where_it_was_placed(
    pair: tuple[str, Client], vulkan: dict[str, Any]
) -> None:
    placement, client = pair
    told = {role: one["device"] for role, one in client.health()["workers"].items()}
    there, here = ("draft", "target") if placement == "draft-on-vulkan" else ("target", "draft")
    assert told[there].startswith(f"Vulkan0 ({vulkan['description']}), all layers; cpu, ")
    assert told[here].startswith("cpu, ")


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_text_is_the_targets_wherever_they_are(
    pair: tuple[str, Client], prompt: str, request: pytest.FixtureRequest
) -> None:
    _, client = pair
    costs = client.health()["costs"]
    # a device made of software may read more slowly than the target writes: its draft never rides
    keeps_up = costs["draft"]["2"] < costs["target"]["1"]

    def ask(mode: Mode) -> Completion:
        answer: Completion = client.create_completion(
            prompt, max_tokens=COUNT, mode=mode, temperature=0.0, ignore_eos=True
        )
        return answer

    plain = ask("plain")
    assert len(plain.tokens) == COUNT
    modes: tuple[Mode, ...] = ("sync", "pipelined")
    for mode in modes:
        answer = ask(mode)
        assert answer.stats.accepted_tokens > 0 or not keeps_up
        difference = first_difference(sample(mode, answer), sample("plain", plain))
        request.node.user_properties.append((mode, str(difference or "the same tokens")))
        assert difference is None or difference.is_near, str(difference)
