"""OpenAI's own library against the gateway of a running pipeline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest

from outrider import Client

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Served

SAID: Any = [{"role": "user", "content": "Hi"}]
PLAIN = "Hello"  # the answer is ASCII
ASKED = "<|user|>Hi<|end|><|assistant|>"  # the same in the toy's template
LONG: dict[str, Any] = {
    "max_tokens": 1900,
    "extra_body": {"speculative.enabled": False},
}  # most of ten seconds
FREE_S = 3.0  # how soon its sequence has to be free


@pytest.fixture
def client(web: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
async def client_async(web: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{web.url}/v1", api_key="any", max_retries=0) as found:
        yield found


def until_idle(web: Served) -> None:
    """Another client sees that nothing is generated any more."""
    deadline = time.monotonic() + FREE_S
    with Client(web.ipc) as other:
        while any((requests := other.health()["requests"]).values()):
            assert time.monotonic() < deadline, requests


# ---- answers ------------------------------------------------------------------------------------


def test_a_chat_says_what_the_target_says(client: openai.OpenAI, oracle: Oracle) -> None:
    answer = client.chat.completions.create(
        model="any", messages=SAID, max_completion_tokens=30, temperature=0
    )
    (choice,) = answer.choices
    assert choice.message.content == oracle(ASKED, 30).text
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert (answer.model, answer.object) == ("toy-target", "chat.completion")
    assert answer.usage
    assert answer.usage.to_dict() == {
        "prompt_tokens": 5,
        "completion_tokens": 30,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    extra: Any = answer.model_extra
    assert extra["timings"]["predicted_n"] == 30
    assert extra["timings"]["draft_n_accepted"] == extra["outrider"]["stats"]["accepted_tokens"] > 0


def test_a_streamed_chat_says_the_same(client: openai.OpenAI, oracle: Oracle) -> None:
    stream = client.chat.completions.create(
        model="any",
        messages=SAID,
        max_tokens=30,
        temperature=0.8,
        seed=7,
        stream=True,
        stream_options={"include_usage": True},
    )
    first, *chunks, finish, usage = list(stream)
    assert first.choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == oracle(ASKED, 30, temperature=0.8, seed=7).text
    assert 1 < len(chunks) < 30, "no block had more than one token"
    assert {chunk.choices[0].finish_reason for chunk in chunks} == {None}
    assert finish.choices[0].finish_reason == "length"
    assert (usage.choices, usage.usage and usage.usage.completion_tokens) == ([], 30)
    assert {one.id for one in chunks} == {first.id} == {usage.id}


async def test_several_streams_at_once(client_async: openai.AsyncOpenAI, oracle: Oracle) -> None:
    async def ask(seed: int) -> str:
        stream = await client_async.chat.completions.create(
            model="", messages=SAID, max_tokens=40, temperature=1, seed=seed, stream=True
        )
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    texts = await asyncio.gather(*map(ask, range(6)))
    assert texts == [oracle(ASKED, 40, temperature=1, seed=seed).text for seed in range(6)]


def test_a_completion_with_its_logprobs(client: openai.OpenAI, oracle: Oracle) -> None:
    answer = client.completions.create(
        model="", prompt=PLAIN, max_tokens=12, temperature=0, logprobs=0
    )
    (choice,) = answer.choices
    assert choice.text == oracle(PLAIN, 12).text
    assert choice.logprobs
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert choice.logprobs.text_offset == list(range(12))
    assert all(value <= 0 for value in choice.logprobs.token_logprobs or [1.0])
    ids = client.completions.create(
        model="", prompt=list(PLAIN.encode()), max_tokens=12, temperature=0
    )
    assert ids.choices[0].text == choice.text
    assert ids.choices[0].logprobs is None


@pytest.mark.parametrize("streamed", [False, True])
def test_a_chats_logprobs_are_of_each_token(client: openai.OpenAI, streamed: bool) -> None:
    asked: Any = {"model": "", "messages": SAID, "max_tokens": 9, "seed": 3, "logprobs": True}
    if streamed:
        chunks = list(client.chat.completions.create(**asked, stream=True))
        found = [chunk.choices[0].logprobs for chunk in chunks]
    else:
        found = [client.chat.completions.create(**asked).choices[0].logprobs]
    told = [one for each in found if each for one in each.content or []]
    assert len(told) == 9
    assert all(one.bytes == list(one.token.encode()) and one.logprob <= 0 for one in told)


def test_a_stop_string_ends_it(client: openai.OpenAI, oracle: Oracle) -> None:
    whole = oracle(ASKED, 60).text
    stop = whole.split()[2]
    for stream in (False, True):
        answer: Any = client.chat.completions.create(
            model="", messages=SAID, max_tokens=60, temperature=0, stop=[stop], stream=stream
        )
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert (text, reason) == (whole.partition(stop)[0], "stop")


def test_provenance_tells_of_each_token_and_of_both_lanes(slow: Served) -> None:
    client = openai.OpenAI(base_url=f"{slow.url}/v1", api_key="any", max_retries=0)
    asked: Any = {"model": "", "messages": SAID, "max_tokens": 40, "temperature": 0}
    more = {"return_provenance": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, extra_body=more))
    told: list[Any] = [c.model_extra["outrider"] for c in chunks if "outrider" in c.model_extra]
    tokens = [token for one in told for token in one["tokens"]]
    assert len(tokens) == 40
    assert {"drafted", "plain"} <= {token["kind"] for token in tokens}
    spans = [span for one in told for span in one["spans"]]
    assert {span["lane"] for span in spans} == {"target", "draft"}
    assert all(span["start"] <= span["end"] for span in spans)
    counts = [one["stats"]["generated_tokens"] for one in told]
    assert counts == sorted(counts)
    assert counts[-1] == 40
    whole = client.chat.completions.create(**asked, extra_body=more)
    figures: Any = (whole.model_extra or {})["outrider"]
    assert [token["text"] for token in figures["tokens"]] == [token["text"] for token in tokens]
    assert {span["lane"] for span in figures["spans"]} == {"target", "draft"}
    client.close()


def test_the_models_are_listed(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object) == ("toy-target", "model")
    assert client.models.retrieve("toy-target").id == model.id
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


# ---- mistakes -----------------------------------------------------------------------------------


def test_a_mistake_is_an_error_that_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="", messages=SAID, temperature=-1)
    assert (caught.value.param, caught.value.code) == ("temperature", "invalid_request")
    with pytest.raises(openai.BadRequestError, match="2048 leaves no room"):
        client.completions.create(model="", prompt="x" * 3000, stream=True)


# ---- whoever leaves -----------------------------------------------------------------------------


def test_a_stream_that_is_closed_frees_its_sequence(web: Served, client: openai.OpenAI) -> None:
    stream: Any = client.chat.completions.create(model="", messages=SAID, stream=True, **LONG)
    next(stream)
    stream.close()
    until_idle(web)


async def test_an_answer_nobody_waits_for_frees_its_sequence(
    web: Served, client_async: openai.AsyncOpenAI
) -> None:
    asked: Any = client_async.chat.completions.create(model="", messages=SAID, **LONG)
    task = asyncio.ensure_future(asked)
    with Client(web.ipc) as other:
        while not other.health()["requests"]["running"]:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.to_thread(until_idle, web)


@pytest.mark.parametrize("streamed", [False, True])
async def test_a_request_is_cancelled_by_its_name(
    web: Served, client_async: openai.AsyncOpenAI, streamed: bool
) -> None:
    named = {"X-Request-Id": f"mine-{streamed}"}
    asked: Any = client_async.chat.completions.create(
        model="", messages=SAID, extra_headers=named, stream=streamed, **LONG
    )
    task = asyncio.ensure_future(asked)
    async with httpx2.AsyncClient(base_url=web.url) as other:
        url = f"/v1/requests/chatcmpl-mine-{streamed}"
        while (await other.delete(url)).status_code == 404:  # noqa: ASYNC110  # the same
            await asyncio.sleep(0.01)
        answer = await task
        if streamed:
            *_, answer = [chunk async for chunk in answer]
        assert answer.choices[0].finish_reason == "cancelled"
        missing = await other.delete(url)
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_request")
    await asyncio.to_thread(until_idle, web)


async def test_too_many_requests_are_told_when_to_come_back(web: Served) -> None:
    asked = {"prompt": "Hi", "n_predict": 1900, "speculative.enabled": False}
    limits = httpx2.Limits(max_connections=100)
    async with httpx2.AsyncClient(base_url=web.url, timeout=20, limits=limits) as client:
        posts = [asyncio.ensure_future(client.post("/completion", json=asked)) for _ in range(70)]
        done: set[asyncio.Future[httpx2.Response]] = set()
        while not done:
            done, _ = await asyncio.wait(posts, return_when=asyncio.FIRST_COMPLETED)
        refused = next(iter(done)).result()
        for post in posts:
            post.cancel()
        await asyncio.gather(*posts, return_exceptions=True)
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "busy"
    await asyncio.to_thread(until_idle, web)
