"""The client library, asynchronous and not, against a pipeline of processes with the toy engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

import pytest

import outrider
from outrider import (
    BadRequest,
    Client,
    Completion,
    Fragment,
    OutriderError,
    Stream,
)

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Served

    from outrider import AsyncClient

PROMPT = "Quiet rain over"
BLOCKS: dict[str, Any] = {"n_draft": 4, "n_min": 4}  # are verified whether they pay here or not
MODES: tuple[Literal["plain", "sync", "pipelined"], ...] = ("plain", "sync", "pipelined")


async def idle(client: AsyncClient, within_s: float = 1.0) -> None:
    deadline = time.monotonic() + within_s
    while any((await client.health())["requests"].values()):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def read(stream: Stream) -> list[Fragment]:
    return [fragment async for fragment in stream]


# ---- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
async def test_a_stream_joins_to_the_result_and_to_what_the_target_says(
    served: Served, oracle: Oracle, mode: Any
) -> None:
    settings: dict[str, Any] = {"temperature": 0.7, "seed": 5}
    expected = oracle(PROMPT, 120, **settings)
    async with served.connect() as client:
        stream = await client.create_completion(
            PROMPT, max_tokens=120, mode=mode, stream=True, **settings
        )
        fragments = await read(stream)
        result = await stream.result()
        whole = await client.create_completion(PROMPT, max_tokens=120, mode=mode, **settings)
    for completion in (result, whole):
        assert isinstance(completion, Completion)
        assert completion.text == completion.choices[0].text == expected.text
        assert [token.id for token in completion.tokens] == expected.token_ids
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage.prompt_tokens == len(PROMPT)
        assert completion.usage.total_tokens == len(PROMPT) + 120
        assert completion.model == "toy-target"
        assert completion.stats.mode == mode
        assert completion.stats.seed == 5
    assert "".join(fragment.text for fragment in fragments) == expected.text
    tokens = [token for fragment in fragments for token in fragment.tokens]
    assert tuple(tokens) == result.tokens
    assert [token.position for token in tokens] == list(range(len(PROMPT), len(PROMPT) + 120))
    assert [fragment.round for fragment in fragments] == list(range(len(fragments)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", ["東", "\U0001f30a ", "naïve caf"])
async def test_no_character_is_broken_over_fragments(
    served: Served, oracle: Oracle, prompt: str, mode: Any
) -> None:
    bias = {
        0xE4: 4.5,
        0xE6: 4.5,
        0xF0: 4.5,
        0xC3: 4.5,
    }  # what characters of several bytes begin with
    async with served.connect() as client:
        stream = await client.create_completion(
            prompt, max_tokens=150, temperature=0, mode=mode, stream=True, logit_bias=bias
        )
        fragments = await read(stream)
    expected = oracle(prompt, 150, logit_bias=tuple(sorted(bias.items())))
    texts = [fragment.text for fragment in fragments]
    assert "".join(texts) == expected.text
    assert sum(ord(character) > 127 for character in expected.text) > 5
    broken = [text for text in texts[:-1] if "\ufffd" in text]
    assert broken == ["\ufffd"] * expected.text[:-1].count("\ufffd") == []
    # the bytes came one by one, so that text had to be held back
    assert any(fragment.tokens and not fragment.text for fragment in fragments) or mode != "plain"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("begin", [7, 40, 71])
async def test_a_stop_string_is_found_over_rounds_and_not_printed(
    served: Served, oracle: Oracle, begin: int, mode: Any
) -> None:
    said = oracle(PROMPT, 150).text
    stop = said[begin : begin + 12]
    before = said[: said.index(stop)]
    async with served.connect() as client:
        stream = await client.create_completion(
            PROMPT,
            max_tokens=150,
            temperature=0,
            stop=["never said", stop, ""],
            mode=mode,
            n_draft=3,
            stream=True,
        )
        fragments = await read(stream)
        result = await stream.result()
    assert result.text == before
    assert result.choices[0].finish_reason == "stop"
    shown = ""
    for fragment in fragments:
        shown += fragment.text
        assert before.startswith(shown)
    through = [bool(fragment.text) for fragment in fragments]
    assert through.count(False) >= 2 or mode != "plain"
    assert [t.id for t in result.tokens] == oracle(PROMPT, 150).token_ids[: len(result.tokens)]


@pytest.mark.parametrize("mode", MODES)
async def test_a_control_token_ends_the_answer_where_its_marker_is_a_stop(
    served: Served, oracle: Oracle, mode: Any
) -> None:
    """Nothing of it is in the text, where other stop strings are looked for."""
    bias, token = {257: 63.0}, 257
    settings: dict[str, Any] = {"temperature": 1.0, "seed": 5}
    expected = oracle(PROMPT, 80, logit_bias=tuple(bias.items()), **settings).token_ids
    end = expected.index(token)
    assert 5 < end < 75  # the model says it itself, now and then
    async with served.connect() as client:
        result = await client.create_completion(
            PROMPT,
            max_tokens=80,
            mode=mode,
            n_draft=4,
            logit_bias=bias,
            stop=["<|system|>", "<nothing>"],
            **settings,
        )
    assert [one.id for one in result.tokens] == expected[: end + 1]
    assert result.text == bytes(expected[:end]).decode("utf-8", "replace")
    assert result.choices[0].finish_reason == "stop"


async def test_what_looked_like_a_stop_string_is_released(served: Served, oracle: Oracle) -> None:
    said = oracle(PROMPT, 60).text
    almost = said[-8:] + "never"
    async with served.connect() as client:
        result = await client.create_completion(PROMPT, max_tokens=60, temperature=0, stop=almost)
    assert result.text == said
    assert result.choices[0].finish_reason == "length"


async def test_the_prompt_may_be_token_ids(served: Served, oracle: Oracle) -> None:
    async with served.connect() as client:
        by_text = await client.create_completion(PROMPT, max_tokens=20, temperature=0)
        by_ids = await client.create_completion(
            by_text.prompt_token_ids, max_tokens=20, temperature=0
        )
    assert by_ids.text == by_text.text == oracle(PROMPT, 20).text


async def test_without_a_limit_the_context_is_filled(served: Served, oracle: Oracle) -> None:
    prompt = "a" * 2000
    async with served.connect() as client:
        result = await client.create_completion(prompt, temperature=0)
    assert result.usage.total_tokens == 2048
    assert [token.id for token in result.tokens] == oracle(prompt, 48).token_ids


async def test_penalties_and_bias_read_only_the_text(served: Served, oracle: Oracle) -> None:
    settings: dict[str, Any] = {
        "temperature": 1.2,
        "seed": 11,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
        "repeat_penalty": 1.2,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
    }
    expected = oracle(PROMPT, 80, logit_bias=((32, -1.0),), **settings)
    async with served.connect() as client:
        for mode in MODES:
            result = await client.create_completion(
                PROMPT, max_tokens=80, mode=mode, logit_bias={32: -1.0}, **settings
            )
            assert [token.id for token in result.tokens] == expected.token_ids


async def test_logprobs_are_the_targets_whatever_the_mode(served: Served) -> None:
    found = []
    async with served.connect() as client:
        for mode in MODES:
            result = await client.create_completion(
                PROMPT, max_tokens=30, temperature=0, mode=mode, logprobs=True
            )
            logprobs = result.choices[0].logprobs
            assert logprobs is not None
            assert len(logprobs) == 30
            assert all(value <= 0 for value in logprobs)
            found.append(logprobs)
    assert found[0] == pytest.approx(found[1])
    assert found[0] == pytest.approx(found[2])


async def test_a_seed_that_was_not_given_is_told(served: Served, oracle: Oracle) -> None:
    async with served.connect() as client:
        results = [
            await client.create_completion(PROMPT, max_tokens=30, temperature=1.0) for _ in range(2)
        ]
    first, second = (result.stats.seed for result in results)
    assert first != second
    for result in results:
        expected = oracle(PROMPT, 30, temperature=1.0, seed=result.stats.seed)
        assert result.text == expected.text


# ---- statistics ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_draft", [1, 4, 8])
async def test_kinds_of_tokens_agree_with_the_statistics(
    served: Served, mode: Any, n_draft: int
) -> None:
    async with served.connect() as client:
        stream = await client.create_completion(
            PROMPT,
            max_tokens=100,
            temperature=0,
            mode=mode,
            n_draft=n_draft,
            n_min=n_draft,
            stream=True,
        )
        live = []
        async for _ in stream:
            assert stream.stats is not None
            live.append(stream.stats.generated_tokens)
        result = await stream.result()
    stats = result.stats
    kinds = Counter(token.kind for token in result.tokens)
    assert kinds["drafted"] == stats.accepted_tokens - stats.truncated_tokens
    assert kinds["corrected"] == stats.corrections
    assert kinds["bonus"] == stats.bonuses
    assert kinds["plain"] == stats.plain_tokens
    assert sum(kinds.values()) == stats.generated_tokens == 100
    assert stats.drafted_tokens == stats.verified_tokens + stats.discarded_tokens + stats.hits
    assert live == sorted(live)
    assert live[-1] == 100
    blocks = [fragment for fragment in stream.fragments if fragment.drafted]
    assert len(blocks) == stats.verify_rounds
    # where a side was right, a fragment tells of the side instead of what the block had there
    unseen = stats.verified_tokens - sum(len(block.drafted) for block in blocks)
    assert 0 <= unseen <= n_draft * stats.beside_misses
    longer = sum(len(block.drafted) > n_draft for block in blocks)
    assert longer <= stats.beside_misses
    for fragment in stream.fragments:
        accepted = [token.id for token in fragment.tokens if token.kind == "drafted"]
        assert [one.token for one in fragment.drafted][: len(accepted)] == accepted
        assert len(fragment.tokens) == len(accepted) + 1 or fragment is stream.fragments[-1]
    if mode == "plain":
        assert kinds == {"plain": 100}
        assert stats.acceptance_rate is None
        assert stats.mean_accepted_length is None
    elif stats.verified_tokens or mode == "sync":
        assert stats.acceptance_rate == stats.accepted_tokens / stats.verified_tokens
        assert stats.mean_accepted_length == 1 + stats.accepted_tokens / stats.verify_rounds


async def test_a_request_fixes_the_length_of_its_blocks(served: Served, oracle: Oracle) -> None:
    async with served.connect() as client:
        stream = await client.create_completion(
            PROMPT, max_tokens=40, temperature=0, mode="sync", n_draft=3, n_min=3, stream=True
        )
        result = await stream.result()
        with pytest.raises(BadRequest, match="n_min is 4"):
            await client.create_completion(PROMPT, max_tokens=4, n_draft=3, n_min=4)
    assert [token.id for token in result.tokens] == oracle(PROMPT, 40).token_ids
    lengths = [len(fragment.drafted) for fragment in stream.fragments[1:-2]]
    assert set(lengths) == {3}  # the prompt has none, and the end may leave no room


async def test_a_trace_shows_drafting_during_verification(served: Served) -> None:
    async with served.connect() as client:
        result = await client.create_completion(
            PROMPT, max_tokens=60, temperature=0, mode="pipelined", **BLOCKS, trace=True
        )
        untraced = await client.create_completion(PROMPT, max_tokens=2)
    assert untraced.trace is None
    assert result.trace is not None
    target = [(span.start, span.end) for span in result.trace if span.lane == "target"]
    draft = [(span.start, span.end) for span in result.trace if span.lane == "draft"]
    assert any(a < d and c < b for a, b in target for c, d in draft)
    assert len(target) == len({token.position for token in result.tokens}) - sum(
        token.kind == "drafted" for token in result.tokens
    )


async def test_in_turns_a_block_is_one_message(pipeline: Any) -> None:
    async with pipeline(toy__agreement=0.95) as up, up.connect() as client:
        traces = {}
        for mode in MODES[1:]:
            done = await client.create_completion(
                PROMPT, max_tokens=80, temperature=0, mode=mode, trace=True
            )
            drafted = [span.rows for span in done.trace or () if span.lane == "draft"]
            # what was told beside a block counts where it was right, and has no span of its own
            told = done.stats.beside_tokens if done.stats.beside_misses else 0
            assert 0 <= done.stats.drafted_tokens - sum(drafted) <= told
            traces[mode] = drafted
    assert max(traces["sync"]) > 2
    assert max(traces["pipelined"]) == 1


# ---- ending early -------------------------------------------------------------------------------


async def test_cancelling_is_idempotent_and_ends_the_iteration(
    served: Served, oracle: Oracle
) -> None:
    async with served.connect() as client:
        stream = await client.create_completion(PROMPT, max_tokens=1500, temperature=0, stream=True)
        await anext(stream)
        for _ in range(3):
            await stream.cancel()
        rest = await read(stream)
        result = await stream.result()
        await stream.cancel()
        assert result.choices[0].finish_reason == stream.finish_reason == "cancelled"
        assert len(rest) < 20
        got = [token.id for token in result.tokens]
        assert got == oracle(PROMPT, 1500).token_ids[: len(got)]
        assert result.stats.generated_tokens == len(got) > 0
        await idle(client)
        assert await read(stream) == []


async def test_cancelling_before_the_first_fragment_is_a_result_too(served: Served) -> None:
    async with served.connect() as client:
        stream = await client.create_completion(PROMPT, max_tokens=500, stream=True)
        await stream.cancel()
        result = await stream.result()
        assert result.choices[0].finish_reason == "cancelled"
        await idle(client)


async def test_leaving_the_stream_cancels(served: Served) -> None:
    async with served.connect() as client:
        async with await client.create_completion(PROMPT, max_tokens=1500, stream=True) as stream:
            await anext(stream)
        await idle(client)
        with pytest.raises(KeyError):
            async with await client.create_completion(
                PROMPT, max_tokens=1500, stream=True
            ) as stream:
                raise KeyError("of the caller's")
        await idle(client)


async def test_a_call_that_is_cancelled_cancels_its_request(served: Served) -> None:
    async with served.connect() as client:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await client.create_completion(PROMPT, max_tokens=1500)
        await idle(client)


async def test_streams_of_one_client_do_not_mix(served: Served, oracle: Oracle) -> None:
    prompts = [f"{PROMPT} {n}" for n in range(6)]
    async with served.connect() as client:
        streams = [
            await client.create_completion(prompt, max_tokens=40, temperature=0, stream=True)
            for prompt in prompts
        ]
        for stream, prompt in [*zip(streams, prompts, strict=True)][::-1]:
            assert (await stream.result()).text == oracle(prompt, 40).text


# ---- questions ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["plain", "naïve 中文 🚀", "", "<|end|>", "a\x00b\n"])
async def test_text_goes_through_token_ids_and_back(served: Served, text: str) -> None:
    async with served.connect() as client:
        assert await client.detokenize(await client.tokenize(text, special=False)) == text
        tokens = await client.tokenize(text)
        assert (tokens == (256,)) == (text == "<|end|>")


async def test_both_clients_get_the_prompt_for_a_gap(served: Served) -> None:
    wanted = "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>c"
    async with served.connect() as client:
        tokens = await client.infill_prompt("a", "b", start="c", extra=[])
        assert tokens == await client.tokenize(wanted)
        assert (await client.create_completion(tokens, max_tokens=3)).prompt_token_ids == tokens
        files = await client.infill_prompt("a", "b", extra=[("f", "F")])
        assert files[-5:] == (*tokens[:2], *tokens[2:5])
        for room in (-1, 4000):
            with pytest.raises(BadRequest):
                await client.infill_prompt("a", "b", room=room)
    with Client(served.ipc) as twin:
        assert twin.infill_prompt("a", "b", start="c") == tokens


async def test_chat_applies_the_template_and_keeps_markers_out(
    served: Served, oracle: Oracle
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What says <|assistant|>?"},
    ]
    async with served.connect() as client:
        rendered = await client.apply_template(messages)
        assert rendered == (
            "<|system|>Be brief.<|end|><|user|>What says <|assistant|>?<|end|><|assistant|>"
        )
        result = await client.create_chat_completion(messages, max_tokens=20, temperature=0)
        ids = result.prompt_token_ids
        assert ids.count(259) == 1  # the template's own marker, not the one that was typed
        assert bytes(i for i in ids if i < 256) == b"Be brief.What says <|assistant|>?"
        assert result.text == oracle(ids, 20).text
        stream = await client.create_chat_completion(
            messages, max_tokens=20, temperature=0, stream=True
        )
        assert "".join([fragment.text async for fragment in stream]) == result.text
        with pytest.raises(OutriderError):
            await client.create_chat_completion([{"role": "wizard", "content": "x"}])


async def test_health_tells_who_is_there(served: Served) -> None:
    async with served.connect() as client:
        health = await client.health()
    assert health["status"] == "ok"
    assert health["version"] == outrider.__version__
    assert set(health["workers"]) == {"target", "draft"}
    assert json.loads(json.dumps(health)) == health
