"""What can go wrong with a client, and the synchronous one, against processes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from outrider import (
    BadRequest,
    Client,
    ConfigError,
    ConnectionFailed,
    OutriderError,
    SyncStream,
    WorkerLost,
    connect,
)
from outrider.engines.toy_text import SMALLEST

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Pipeline, Serve, Served

PROMPT = "Quiet rain over"


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n_draft": -1}, "n_draft"),
        ({"mode": "fast"}, "mode"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": "x" * 300}, "stop"),
        ({"logit_bias": {5000: 1.0}}, "logit_bias"),
        ({"prompt": "a" * 2048}, "context"),
        ({"prompt": "a" * 1_100_000}, "1048576"),
        ({"prompt": "é" * 600_000}, "1048576"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [1, 2, 999]}, "999"),
        ({"prompt": [1, -2]}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
        ({"prompt": [1] * 300_000}, "prompt"),
    ],
    ids=lambda value: str(value)[:30],
)
async def test_a_request_that_cannot_be_served_is_one_typed_error(
    served: Served, settings: dict[str, Any], words: str
) -> None:
    async with served.connect() as client, asyncio.timeout(5):
        with pytest.raises(BadRequest, match=words) as caught:
            await client.create_completion(**{"prompt": PROMPT, "max_tokens": 4, **settings})
        assert caught.value.code == "invalid_request"
        assert caught.value.exit_code == 2
        # and the connection is as good as before
        assert (await client.create_completion(PROMPT, max_tokens=3)).usage.completion_tokens == 3


async def test_an_error_is_raised_again_to_who_asks_again(served: Served) -> None:
    async with served.connect() as client, asyncio.timeout(5):
        stream = await client.create_completion("a" * 2048, stream=True)
        for _ in range(2):
            with pytest.raises(BadRequest):
                await stream.result()
            with pytest.raises(BadRequest):
                await anext(stream)
        await stream.cancel()


async def test_a_token_id_that_does_not_exist_is_a_typed_error(served: Served) -> None:
    async with served.connect() as client, asyncio.timeout(5):
        for tokens in ([SMALLEST], [-1], [2**40]):
            with pytest.raises(BadRequest):
                await client.detokenize(tokens)
        assert await client.detokenize([65]) == "A"


async def test_nobody_there_is_a_typed_error(served: Served) -> None:
    for pipeline in ("nobody", "tcp://127.0.0.1:9"):
        began = time.monotonic()
        with pytest.raises(ConnectionFailed, match="outrider serve"):
            async with connect(pipeline, timeout_s=0.3):
                pass
        assert time.monotonic() - began < 1.0
    with pytest.raises(ConfigError, match="name a pipeline"):
        async with connect("../etc"):
            pass
    with pytest.raises(ConnectionFailed, match="not an address"):
        async with connect("nothing://at-all"):
            pass


async def test_a_pipeline_that_ends_is_one_error_for_each_request(pipeline: Any) -> None:
    async with pipeline(toy__step_ms=20.0) as up, up.connect() as client:
        streams = [
            await client.create_completion(PROMPT, max_tokens=500, stream=True) for _ in range(3)
        ]
        for stream in streams:
            await anext(stream)
        await end(up)
        for stream in streams:
            with pytest.raises((WorkerLost, ConnectionFailed)):
                async with asyncio.timeout(10):
                    await stream.result()
        with pytest.raises(ConnectionFailed):
            await client.create_completion(PROMPT)


async def end(up: Pipeline) -> None:
    await up.launcher.stop()


# ---- the synchronous twin -----------------------------------------------------------------------


def test_the_synchronous_client_does_the_same(served: Served, oracle: Oracle) -> None:
    with Client(served.ipc) as client:
        expected = oracle(PROMPT, 50)
        whole = client.create_completion(PROMPT, max_tokens=50, temperature=0)
        assert whole.text == expected.text
        stream = client.create_completion(PROMPT, max_tokens=50, temperature=0, stream=True)
        assert "".join(fragment.text for fragment in stream) == expected.text
        assert stream.result().text == whole.text
        assert stream.stats is not None
        assert stream.stats.generated_tokens == 50
        assert client.detokenize(client.tokenize("中文")) == "中文"
        messages = [{"role": "user", "content": "hello"}]
        assert client.apply_template(messages).endswith("<|assistant|>")
        assert client.create_chat_completion(messages, max_tokens=3).usage.completion_tokens == 3
        assert client.health()["status"] == "ok"


def test_the_synchronous_stream_cancels_and_is_cancelled(served: Served) -> None:
    with Client(served.ipc) as client:
        stream = client.create_completion(PROMPT, max_tokens=1500, stream=True)
        next(iter(stream))
        stream.cancel()
        stream.cancel()
        assert stream.result().choices[0].finish_reason == "cancelled"
        with client.create_completion(PROMPT, max_tokens=1500, stream=True) as stream:
            next(iter(stream))
        deadline = time.monotonic() + 1.0
        while any(client.health()["requests"].values()):
            assert time.monotonic() < deadline


def test_the_synchronous_client_raises_and_leaves_no_thread(served: Served) -> None:
    before = threading.active_count()
    with pytest.raises(ConnectionFailed):
        Client("nobody", timeout_s=0.2)
    with Client(served.ipc) as client, pytest.raises(BadRequest):
        client.create_completion("")
    assert threading.active_count() == before


def test_the_synchronous_client_serves_several_threads(served: Served, oracle: Oracle) -> None:
    texts: dict[int, str] = {}

    def ask(n: int) -> None:
        done = client.create_completion(f"{PROMPT} {n}", max_tokens=30, temperature=0)
        texts[n] = done.text

    with Client(served.ipc) as client:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert texts == {n: oracle(f"{PROMPT} {n}", 30).text for n in range(4)}


def test_the_synchronous_client_ends_its_pipeline(serve: Serve) -> None:
    own = serve("stopped")
    with Client(own.ipc) as client:
        client.stop()
        own.process.wait(10)
        with pytest.raises(OutriderError):
            client.create_completion(PROMPT, max_tokens=3)


def test_a_users_program_runs_with_both_clients(served: Served) -> None:
    script = Path(__file__).parents[1] / "unit" / "user_script.py"
    done = subprocess.run(
        [sys.executable, script, served.ipc], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


# ---- a client that is closed --------------------------------------------------------------------


async def test_a_closed_client_fails_at_once(served: Served) -> None:
    client = connect(served.ipc)
    with pytest.raises(ConnectionFailed, match="`with`"):
        await client.health()
    async with client:
        reading = await client.create_completion(PROMPT, max_tokens=1500, stream=True)
        await anext(reading)
        asking = asyncio.ensure_future(client.create_completion(PROMPT, max_tokens=1500))
        await asyncio.sleep(0)
        await client.close()
    await client.close()
    async with asyncio.timeout(1):
        for answer in (asking, reading.result(), reading.result(), client.tokenize("x")):
            with pytest.raises(ConnectionFailed):
                await answer
        await reading.__aexit__()
        async with client:  # it can be opened again, but once at a time
            with pytest.raises(BadRequest, match="already"):
                await client.__aenter__()
            assert await client.detokenize(await client.tokenize("again")) == "again"


async def test_what_was_left_can_still_be_read(served: Served) -> None:
    async with served.connect() as client, asyncio.timeout(5):
        async with await client.create_completion(PROMPT, max_tokens=1500, stream=True) as left:
            await anext(left)
        result = await left.result()
        assert result.choices[0].finish_reason == "cancelled"
        assert 0 < result.usage.completion_tokens < 1500
        whole = await client.create_completion(PROMPT, max_tokens=5, stream=True)
        await anext(whole)
        while any((await client.health())["requests"].values()):
            pass
        assert not client._inboxes  # no answer that has ended is kept
    assert (await whole.result()).usage.completion_tokens == 5


def closed(served: Served) -> tuple[Client, SyncStream, SyncStream]:
    with Client(served.ipc) as client:
        read = client.create_completion(PROMPT, max_tokens=5, stream=True)
        read.result()
        unread = client.create_completion(PROMPT, max_tokens=1500, stream=True)
        next(unread)
    return client, read, unread


@pytest.mark.parametrize(
    "use",
    [
        lambda client, _: client.create_completion(PROMPT),
        lambda client, _: client.health(),
        lambda _, stream: next(stream),
        lambda _, stream: stream.result(),
        lambda _, stream: stream.cancel(),
    ],
    ids=["completion", "health", "next", "result", "cancel"],
)
def test_a_closed_synchronous_client_fails_at_once(
    served: Served, use: Callable[[Client, SyncStream], Any]
) -> None:
    client, _, unread = closed(served)
    for _ in range(2):
        client.close()
        began = time.monotonic()
        with pytest.raises(ConnectionFailed, match="closed"):
            use(client, unread)
        assert time.monotonic() - began < 1


def test_what_a_synchronous_stream_has_outlives_its_client(served: Served) -> None:
    _, read, unread = closed(served)
    assert read.result().usage.completion_tokens == 5
    assert list(read) == []
    read.cancel()
    with unread:
        assert len(unread.fragments) == 1


def test_closing_ends_what_other_threads_wait_for(served: Served) -> None:
    outcomes: list[BaseException] = []

    def ask() -> None:
        try:
            client.create_completion(PROMPT, max_tokens=1500)
        except BaseException as exc:
            outcomes.append(exc)

    client = Client(served.ipc)
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    while sum(client.health()["requests"].values()) < 3:
        pass
    client.close()
    for thread in threads:
        thread.join(1)
    assert [type(outcome) for outcome in outcomes] == [ConnectionFailed] * 3


def test_ctrl_c_gives_the_answer_up(served: Served) -> None:
    with Client(served.ipc) as client:
        main = threading.get_ident()
        threading.Timer(0.05, signal.pthread_kill, [main, signal.SIGINT]).start()
        deadline = time.monotonic() + 2.0
        with pytest.raises(KeyboardInterrupt):
            client.create_completion(PROMPT, max_tokens=1900, mode="plain")
        while any(client.health()["requests"].values()):
            assert time.monotonic() < deadline


async def test_an_error_that_the_service_finds_names_the_argument(served: Served) -> None:
    async with served.connect() as client:
        for prompt, settings, param in (
            ("", {}, "prompt"),
            ("x", {"logit_bias": {5000: 1.0}}, "logit_bias"),
            ("x", {"n_min": 5, "n_draft": 2}, "n_min"),
        ):
            with pytest.raises(BadRequest) as caught:
                await client.create_completion(prompt, **settings)
            assert caught.value.param == param
