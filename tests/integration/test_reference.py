"""The pipeline says what the reference says: the same ids, whatever rides ahead in either."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest

from outrider.core.reference import generate
from outrider.core.sampling import Sampling
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyEngine, ToySettings

if TYPE_CHECKING:
    from tests.integration.conftest import Served

PROMPT = "The river runs"
COUNT = 120
PENALTIES = {"repeat_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.3}


def reference(n_draft: int, settings: dict[str, Any]) -> list[int]:
    target, draft = ToyEngine(), ModelDrafter(ToyEngine(ToySettings("draft")))
    prompt = target.tokenize(PROMPT, special=True)
    blocks = generate(target, draft, prompt, Sampling(**settings), n_draft)
    return list(islice((token for block in blocks for token in block), COUNT))


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"temperature": 0.0}, id="greedy"),
        pytest.param({"temperature": 0.8, "top_k": 40, "seed": 11}, id="top-k"),
        pytest.param({"temperature": 0.8, "top_p": 0.9, "seed": 5, **PENALTIES}, id="penalised"),
        pytest.param({"temperature": 0.0, **PENALTIES}, id="greedy-penalised"),
    ],
)
async def test_the_pipeline_says_what_the_reference_says(
    served: Served, settings: dict[str, Any]
) -> None:
    expected = reference(0, settings)
    assert len(expected) == COUNT
    assert [reference(n_draft, settings) for n_draft in (1, 4)] == [expected] * 2
    said, stats = {}, {}
    async with served.connect() as client:
        for mode in ("plain", "sync", "pipelined"):
            done = await client.create_completion(
                PROMPT, max_tokens=COUNT, mode=mode, p_min=0.01, **settings
            )
            said[mode], stats[mode] = [token.id for token in done.tokens], done.stats
    assert said == dict.fromkeys(("plain", "sync", "pipelined"), expected)
    assert stats["plain"].drafted_tokens == 0
    assert stats["sync"].accepted_tokens > 0
    # a hit, and a miss: what was drafted ahead was the target's own token, and was not
    ridden = stats["pipelined"]
    assert ridden.hits > 0
    assert ridden.discarded_tokens > 0
    assert ridden.corrections > 0
