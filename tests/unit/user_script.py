"""What a user's program may look like: typed from end to end, and without one `Any` of ours.

`test_public` has mypy check it as a user's own, `test_client` runs it against a pipeline.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, assert_type

import numpy as np

import outrider
from outrider import (
    AsyncClient,
    ChatMessage,
    Client,
    Completion,
    CompletionChoice,
    CompletionSettings,
    FinishReason,
    Fragment,
    Report,
    Span,
    Stream,
    SyncStream,
    Token,
    TopLogprob,
    Usage,
)

SETTINGS: CompletionSettings = {"max_tokens": 8, "temperature": 0, "top_k": 5, "stop": None}
CHAT: list[ChatMessage] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]},
]


def results(done: Completion) -> str:
    assert_type(done.choices, tuple[CompletionChoice, ...])
    assert_type(done.choices[0].finish_reason, FinishReason)
    assert_type(done.choices[0].logprobs, tuple[float, ...] | None)
    assert_type(done.choices[0].top_logprobs, tuple[tuple[TopLogprob, ...], ...] | None)
    assert_type(done.usage, Usage)
    assert_type(done.tokens, tuple[Token, ...])
    assert_type(done.stats, Report)
    assert_type(done.stats.acceptance_rate, float | None)
    assert_type(done.trace, tuple[Span, ...] | None)
    return done.text


def with_the_synchronous_client(pipeline: str) -> str:
    with Client(pipeline, timeout_s=5) as client:
        done = client.create_completion("Hello", **SETTINGS)
        assert_type(done, Completion)
        stream = client.create_completion("Hello", stream=True, **SETTINGS)
        assert_type(stream, SyncStream)
        with stream:
            for fragment in stream:
                assert_type(fragment, Fragment)
        assert_type(stream.stats, Report | None)
        assert_type(stream.finish_reason, FinishReason | None)
        assert_type(stream.result(), Completion)
        perhaps = client.create_chat_completion(CHAT, stream=len(sys.argv) > 2, max_tokens=3)
        assert_type(perhaps, Completion | SyncStream)
        ids = client.tokenize("Hello")
        assert_type(ids, tuple[int, ...])
        assert client.detokenize(np.array(ids)) == "Hello"
        client.health(timeout_s=2.0)
        return results(done)


async def with_the_asynchronous_client(pipeline: str) -> str:
    async with outrider.connect(pipeline) as client:
        assert_type(client, AsyncClient)
        stream = await client.create_completion(
            np.array([72, 105]),
            max_tokens=np.int64(8),
            logit_bias={np.int64(65): np.float32(-1)},
            stream=True,
        )
        assert_type(stream, Stream)
        async for fragment in stream:
            assert_type(fragment.tokens, tuple[Token, ...])
        perhaps = await client.create_completion("Hello", stream=len(sys.argv) > 2, **SETTINGS)
        assert_type(perhaps, Completion | Stream)
        await client.create_chat_completion(
            [{"role": "user", "content": "Hello"}], max_tokens=np.int64(3), logit_bias={"65": 1}
        )
        return results(await client.create_completion("Hello", stream=False, **SETTINGS))


if TYPE_CHECKING:  # what a type checker has to reject

    async def mistakes(client: AsyncClient, twin: Client, stream: SyncStream) -> None:
        outrider.conect()  # type: ignore[attr-defined]
        await client.create_completion(None)  # type: ignore[call-overload]
        await client.create_completion("Hello", temprature=1)  # type: ignore[call-overload]
        await client.create_completion("Hello", seed="1")  # type: ignore[call-overload]
        await client.create_completion("Hello", mode="fast")  # type: ignore[call-overload]
        await client.create_chat_completion("Hello")  # type: ignore[arg-type]
        twin.create_completion("Hello", temprature=1)  # type: ignore[call-overload]
        twin.create_completion("Hello", stop=5)  # type: ignore[call-overload]
        assert twin.create_completion("Hello", stream=True).text  # type: ignore[attr-defined]
        twin.create_completion("Hello").cancel()  # type: ignore[attr-defined]
        twin.create_chat_completion([{"role": 5}])  # type: ignore[dict-item]
        twin.detokenize("Hello")  # type: ignore[arg-type]
        assert stream.stats.seed  # type: ignore[union-attr]
        assert stream.statistics  # type: ignore[attr-defined]


if __name__ == "__main__":
    first = with_the_synchronous_client(sys.argv[1])
    assert first == asyncio.run(with_the_asynchronous_client(sys.argv[1]))
