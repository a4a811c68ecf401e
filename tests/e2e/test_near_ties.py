"""The promise outside `--exact`: where modes differ, the choice was a near-tie, and was told."""

from __future__ import annotations

from typing import Any

import pytest

from outrider import Client, Completion
from outrider.core.sampling import NEAR
from outrider.core.values import Mode
from outrider_services.bench.results import Sample, first_difference

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

PROMPTS = ("The future of AI is", "def merge(left, right):", "Once upon a time, in a valley")
SETTINGS = ({"temperature": 0.0}, {"temperature": 0.8, "seed": 5})
COUNT = 48


@pytest.fixture(scope="module")
def pair(serve: Any, default_target: Any, default_draft: Any) -> Client:
    flags = ("--ctx=512", "--draft-quant=off", "--n-draft=5", "--spec-draft-n-min=5")
    client: Client = serve("-m", default_target, "-md", default_draft, *flags)
    return client


def sample(mode: Mode, answer: Completion) -> Sample:
    ids = tuple(token.id for token in answer.tokens)
    margins = tuple(token.margin for token in answer.tokens)
    return Sample("", 0, 0, mode, 1.0, len(ids), token_ids=ids, margins=margins)


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_modes_differ_at_near_ties_only(
    pair: Client, prompt: str, settings: dict[str, Any]
) -> None:
    def ask(mode: Mode) -> Completion:
        answer: Completion = pair.create_completion(prompt, max_tokens=COUNT, mode=mode, **settings)
        return answer

    plain = ask("plain")
    close = [token.margin for token in plain.tokens if token.margin < NEAR]
    assert plain.stats.near_ties == len(close)
    assert plain.stats.smallest_margin == min(token.margin for token in plain.tokens)
    modes: tuple[Mode, ...] = ("sync", "pipelined")
    for mode in modes:
        answer = ask(mode)
        assert answer.stats.verified_tokens > 0
        difference = first_difference(sample(mode, answer), sample("plain", plain))
        assert difference is None or difference.is_near, str(difference)
