"""Drafts from elsewhere than one model: the text is the target's, whoever drafts it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Serve

REPEATS = "the old river runs over the quiet meadow, " * 3 + "the old river"
PROMPTS = (REPEATS, "Quiet rain over")
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 4},
    {"temperature": 0.8, "seed": 4, "repeat_penalty": 1.3},
)
KINDS = {
    "suffix": ("-md=suffix",),
    "model-and-suffix": ("--draft-suffix", "--draft-branches=0"),
    "model-and-branches": ("--toy-draft-row-ms=0",),
    "model-and-corrections": ("--toy-draft-row-ms=0.8",),
    "all": ("--draft-suffix", "--toy-draft-row-ms=0"),
}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", KINDS)
async def test_every_mode_and_block_length_says_what_the_target_says_alone(
    serve: Serve, oracle: Oracle, kind: str
) -> None:
    served = serve("drafts", *KINDS[kind], "--toy-step-ms=4", "--toy-draft-ms=0.8")
    verified = foreseen = beside = 0
    async with served.connect() as client:
        for prompt in PROMPTS:
            for settings in SETTINGS:
                right = oracle(prompt, 60, **settings)
                for mode in ("sync", "pipelined", "auto"):
                    for n_draft in (1, 16, None):
                        given: Any = {"mode": mode, "n_draft": n_draft, **settings}
                        answer = await client.create_completion(prompt, max_tokens=60, **given)
                        assert [token.id for token in answer.tokens] == right.token_ids, given
                        verified += answer.stats.verified_tokens
                        foreseen += answer.stats.foreseen_misses
                        beside += answer.stats.beside_tokens
    assert verified > 20  # made-up text hardly repeats itself
    assert bool(foreseen) is (kind in ("model-and-branches", "all"))
    # where the draft's rows are dear but the target's are not, corrections alone are verified
    assert bool(beside) is (kind in ("model-and-branches", "model-and-corrections", "all"))
