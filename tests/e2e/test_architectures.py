"""Any kind of model, as target and as draft: the pipeline says what the target alone would say.

The models are tiny and have random weights, see scripts/make-tiny-models: what they say makes no
sense, but whether drafts change it can be seen all the same.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from outrider import Client, Completion
from outrider.core.values import Mode, TokenId

pytestmark = [pytest.mark.model, pytest.mark.timeout(120)]

TEXT = "The pairs of a hash table lie where their keys say, and the rest of the table is empty."
# a draft of the same weights is right, one of others wrong; one that is near is wrong now and then
PAIRS = (
    ("plain", "plain-near"),
    ("plain", "mamba"),
    ("window", "window-near"),
    ("experts", "experts-other"),
    ("mamba", "mamba-near"),
    ("lfm2", "lfm2"),
    ("qwen35", "qwen35-near"),
)
FLAGS = ("--exact", "--ctx=256", "--parallel=3", "--draft-quant=off", "--n-draft=16",
         "--spec-draft-n-min=16")  # fmt: skip
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 1.0, "seed": 5}
COUNT = 28


def ids(answer: Completion) -> list[TokenId]:
    return [token.id for token in answer.tokens]


@pytest.fixture(scope="module", params=PAIRS, ids="+".join)
def pair(request: pytest.FixtureRequest, serve: Any, tiny: Path) -> tuple[str, str, Client]:
    target, draft = request.param
    files = "-m", tiny / f"{target}.gguf", "-md", tiny / f"{draft}.gguf"
    return target, draft, serve(*files, *FLAGS)


def test_with_any_memory_every_mode_and_block_says_the_same(
    pair: tuple[str, str, Client],
) -> None:
    target, draft, client = pair
    accepted = verified = 0
    modes: tuple[Mode, ...] = ("sync", "pipelined")
    for settings in (GREEDY, SAMPLED):
        ask = partial(client.create_completion, TEXT, max_tokens=COUNT, **settings)
        plain = ids(ask(mode="plain"))
        for mode in modes:
            for n_draft in (1, 4, 16):
                answer = ask(mode=mode, n_draft=n_draft)
                assert ids(answer) == plain, f"{mode}, {n_draft}, {settings}"
                accepted += answer.stats.accepted_tokens
                verified += answer.stats.verified_tokens
    assert verified > 0
    assert (accepted == verified) == (target == draft)
    assert (accepted > 0.05 * verified) == (draft in (target, f"{target}-near"))


def test_with_any_memory_requests_at_once_and_on_what_is_held_say_the_same(
    pair: tuple[str, str, Client],
) -> None:
    """They share passes, take over what others have left, and copy from it; one leaves."""
    target, _, client = pair
    prompts = [TEXT, TEXT[:70] + " Its load", TEXT + " More of it."]
    settings = [GREEDY, SAMPLED, GREEDY]
    alone = [
        ids(client.create_completion(one, max_tokens=24, mode="plain", cache_prompt=False, **how))
        for one, how in zip(prompts, settings, strict=True)
    ]
    modes: tuple[Mode, ...] = ("pipelined", "sync", "pipelined")
    for _ in range(2):
        streams = [
            client.create_completion(one, max_tokens=24, mode=mode, n_draft=4, stream=True, **how)
            for one, mode, how in zip(prompts, modes, settings, strict=True)
        ]
        assert [ids(stream.result()) for stream in streams] == alone
        leaving = client.create_completion(TEXT, max_tokens=60, mode="pipelined", stream=True)
        next(iter(leaving))
        leaving.cancel()
    if target == "mamba":
        assert client.health()["workers"]["target"]["rollback_s"] > 1e-4
