"""Floods, hoarders and pauses: what one peer does, or what befalls one process, costs the others
nothing but a moment, and afterwards everything is as it was.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import zmq
from tests.integration.test_faults import PROMPT, SLOW, begin, complete, dealer, ids

from outrider.client import AsyncClient, Client, connect
from outrider.errors import BadRequest, ConnectionFailed, OutriderError, Overloaded
from outrider.wire import messages as wire
from outrider.wire.codec import encode

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Pipeline

    Pipelines = Callable[..., AbstractAsyncContextManager[Pipeline]]

MIB = 1 << 20


@asynccontextmanager
async def undisturbed(
    pipeline: Pipelines, oracle: Oracle, count: int = 300, **settings: Any
) -> AsyncIterator[tuple[Pipeline, AsyncClient]]:
    """A pipeline with a stream that must be right, whatever happens inside of this."""
    async with pipeline(**{**SLOW, **settings}) as up, up.connect() as client:
        workers = up.pids()
        stream = await begin(client, count)
        yield up, client
        await stream.result()
        assert ids(stream) == oracle(PROMPT, count).token_ids
        assert up.pids() == workers
        health = await client.health()
        assert set(health["workers"]) == {"target", "draft"}
        await up.idle(client)


def address(up: Pipeline) -> str:
    return f"ipc://{up.runtime}/outrider/test.sock"


def coordinator(up: Pipeline) -> psutil.Process:
    return psutil.Process(up.pids()["coordinator"])


# ---- floods of questions ------------------------------------------------------------------------


async def test_texts_whose_tokens_no_message_can_carry_are_refused_and_harm_nobody(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    long = "x" * 300_000
    async with undisturbed(pipeline, oracle) as (_, client):
        for _ in range(10):
            with pytest.raises(BadRequest, match="the text has 300000 tokens"):
                await client.tokenize(long)
            with pytest.raises(BadRequest, match="the text has 300000 tokens"):
                await complete(client, 5, long)
        assert len(await client.tokenize("x" * 1000)) == 1000


async def test_of_questions_without_number_some_are_refused_and_none_is_lost(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with undisturbed(pipeline, oracle) as (up, client), up.connect() as other:

        async def ask(n: int) -> str:
            try:
                tokens = await other.tokenize(f"text {n}")
            except Overloaded:
                return "busy"
            assert bytes(tokens) == f"text {n}".encode()
            return "answered"

        told = Counter(await asyncio.gather(*map(ask, range(1000))))
        assert set(told) <= {"answered", "busy"}
        assert told["answered"] >= 64
        assert await ask(1) == "answered"
        assert await client.tokenize("x") == (120,)


# ---- connections --------------------------------------------------------------------------------


async def test_many_connections_that_come_and_go_cost_the_others_little(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with undisturbed(pipeline, oracle, 400) as (up, client):
        idle = [socket.socket(socket.AF_UNIX) for _ in range(400)]
        try:
            for one in idle:
                one.connect(address(up).removeprefix("ipc://"))
            before = sum(coordinator(up).cpu_times()[:2])
            for _ in range(1000):
                with socket.socket(socket.AF_UNIX) as quick:
                    quick.connect(address(up).removeprefix("ipc://"))
                await asyncio.sleep(0)
            began = time.monotonic()
            await client.health()
            assert time.monotonic() - began < 0.5
            assert sum(coordinator(up).cpu_times()[:2]) - before < 3.0
        finally:
            for one in idle:
                one.close()


async def test_one_connection_too_many_is_refused_in_a_sentence(
    pipeline: Pipelines, oracle: Oracle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    few = tmp_path / "python"
    few.write_text(f'#!/bin/sh\nulimit -n 300\nexec "{sys.executable}" "$@"\n')
    few.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(few))
    async with undisturbed(pipeline, oracle) as (up, client):
        most = (300 - 64) // 4
        others = [up.connect() for _ in range(most)]
        try:
            refused = []
            for one in others:
                try:
                    await one.__aenter__()
                except OutriderError as exc:
                    refused.append(exc)
            # the two workers, the launcher's and the test's own client come before them
            assert 1 <= len(refused) <= 5
            for error in refused:
                assert isinstance(error, Overloaded)
                assert f"there are {most} connections already" in str(error)
            raw = [socket.socket(socket.AF_UNIX) for _ in range(200)]
            for connection in raw:
                connection.setblocking(False)
                with suppress(BlockingIOError):
                    connection.connect(address(up).removeprefix("ipc://"))
            await client.health()
            for connection in raw:
                connection.close()
            assert coordinator(up).num_fds() < 300
        finally:
            for one in others:
                await one.close()
        async with up.connect() as again:
            await again.health()


# ---- hoarders -----------------------------------------------------------------------------------


async def peak(up: Pipeline, work: Any) -> int:
    """By how many bytes the coordinator grew at most while this was done."""
    process = coordinator(up)
    before = most = process.memory_info().rss
    task = asyncio.ensure_future(work)
    while not task.done():
        most = max(most, process.memory_info().rss)
        await asyncio.sleep(0.01)
    await task
    return int(most - before)


async def as_before(up: Pipeline, before: int, within_s: float = 5.0) -> None:
    async def check() -> bool:
        return coordinator(up).memory_info().rss < 1.3 * before

    await up.until("the coordinator is as small as before", check, within_s)


async def test_a_message_of_many_large_parts_is_cut_off(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    part = bytes(MIB)

    async def hoard(up: Pipeline) -> None:
        async with dealer(address(up)) as one:
            one.setsockopt(zmq.SNDTIMEO, 2000)
            with suppress(zmq.Again):
                await asyncio.to_thread(one.send_multipart, [part] * 1500)
            await asyncio.sleep(1.0)

    async with undisturbed(pipeline, oracle) as (up, _):
        before = coordinator(up).memory_info().rss
        assert await peak(up, hoard(up)) < 500 * MIB
        await as_before(up, before)


HOARD = """
import os, socket, sys, time
os.nice(19)
address = sys.argv[1]
if address.startswith("ipc://"):
    one = socket.socket(socket.AF_UNIX)
    one.connect(address[6:])
else:
    host, _, port = address[6:].rpartition(":")
    one = socket.create_connection((host, int(port)))
one.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00NULL" + bytes(48))
ready = b"\\x05READY\\x0bSocket-Type\\x00\\x00\\x00\\x06DEALER"
one.sendall(bytes([4, len(ready)]) + ready)
part, sent = b"\\x03" + (60_000).to_bytes(8, "big") + bytes(60_000), 0
try:
    for sent in range(10_000):
        one.sendall(part)  # another part will follow
        time.sleep(0.0005)
except OSError:
    pass
print(sent)
"""


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
async def test_a_message_of_parts_that_come_slowly_is_cut_off_too(
    pipeline: Pipelines, oracle: Oracle, kind: str
) -> None:
    """The kernel holds next to nothing of it, and nobody sees it before it is whole."""

    async def hoard(where: str) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOARD, where, stdout=asyncio.subprocess.PIPE
        )
        sent, _ = await process.communicate()
        assert int(sent) < 9_000

    settings = {"coordinator__listen": ("tcp://127.0.0.1:0",)}
    async with undisturbed(pipeline, oracle, 900, **settings) as (up, client):
        where = address(up) if kind == "ipc" else up.launcher.addresses[0]
        before = coordinator(up).memory_info().rss
        assert await peak(up, hoard(where)) < 400 * MIB
        assert await client.tokenize("x") == (120,)
        await as_before(up, before)


async def test_a_client_that_asks_and_never_reads_is_let_go(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    question = encode(wire.Render(1, (wire.Turn("user", "x" * 900_000),)))

    async def ask(up: Pipeline) -> None:
        async with dealer(address(up)) as one:
            for _ in range(300):
                with suppress(zmq.Again):
                    one.send(question, zmq.NOBLOCK)
                await asyncio.sleep(0.005)

    async with undisturbed(pipeline, oracle, 500) as (up, client):
        before = coordinator(up).memory_info().rss
        assert await peak(up, ask(up)) < 200 * MIB
        assert await client.tokenize("x") == (120,)
        await as_before(up, before)


FLOOD = """
import os, sys, time, zmq
os.nice(19)
end = time.monotonic() + 8.0
context, sent = zmq.Context(), 0
nested = b"\\xdd\\x00\\x03\\xff\\xff" + b"\\x91\\x91\\x91\\x90" * 250_000
while sent < 50_000 and time.monotonic() < end:
    one = context.socket(zmq.DEALER)
    one.setsockopt(zmq.LINGER, 0)
    one.connect(sys.argv[1])
    one.poll(20, zmq.POLLOUT)
    for n in range(500):
        try:
            one.send(nested if n % 50 == 0 else b"\\x91" * 300, zmq.NOBLOCK)
            sent += 1
        except zmq.Again:
            break
    one.close()
print(sent)
"""


async def test_malformed_frames_without_end_cost_the_others_little(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with undisturbed(pipeline, oracle, 500) as (up, client):
        cpu = sum(coordinator(up).cpu_times()[:2])
        flood = await asyncio.create_subprocess_exec(
            sys.executable, "-c", FLOOD, address(up), stdout=asyncio.subprocess.PIPE
        )
        slowest = 0.0
        while flood.returncode is None:
            began = time.monotonic()
            await client.health()
            slowest = max(slowest, time.monotonic() - began)
            with suppress(TimeoutError):
                async with asyncio.timeout(0.05):
                    await flood.wait()
        sent, _ = await flood.communicate()
        assert int(sent) > 1000
        assert slowest < 0.5
        spent = sum(coordinator(up).cpu_times()[:2]) - cpu
        assert spent < 120e-6 * int(sent), (spent, sent)


TORRENT = """
import os, socket, sys, time
from outrider.wire.codec import encode
from outrider.wire.messages import Health
os.nice(19)
frame = encode(Health(1))
one = socket.socket(socket.AF_UNIX)
one.connect(sys.argv[1])
one.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x00NULL" + bytes(48))
ready = b"\\x05READY\\x0bSocket-Type\\x00\\x00\\x00\\x06DEALER"
one.sendall(bytes([4, len(ready)]) + ready)
many, end, sent = (bytes([0, len(frame)]) + frame) * 500, time.monotonic() + 3.0, 0
try:
    while time.monotonic() < end:
        one.sendall(many)
        sent += 500
except OSError:
    pass
print(sent)
"""


async def test_small_messages_without_end_are_cut_off(pipeline: Pipelines, oracle: Oracle) -> None:
    """Each is right, and none is read as fast as it comes."""

    async def flood(up: Pipeline) -> None:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", TORRENT, address(up)[6:], stdout=asyncio.subprocess.PIPE
        )
        sent, _ = await process.communicate()
        assert int(sent) >= 1000

    async with undisturbed(pipeline, oracle, 600) as (up, client):
        before = coordinator(up).memory_info().rss
        assert await peak(up, flood(up)) < 500 * MIB
        async with asyncio.timeout(3):  # millions of messages may wait to be dropped
            assert await client.tokenize("x") == (120,)
        await as_before(up, before, 45.0)


# ---- pauses -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
@pytest.mark.parametrize("role", ["coordinator", "target", "draft"])
async def test_a_process_that_was_paused_goes_on_where_it_stood(
    pipeline: Pipelines, oracle: Oracle, role: str, mode: str
) -> None:
    """As by Ctrl-Z and `fg`, on a machine that swaps, in a container that was frozen."""
    async with pipeline(**SLOW) as up, up.connect() as client:
        workers = up.pids()
        stream = await begin(client, 400, mode=mode)
        os.kill(workers[role], signal.SIGSTOP)
        last, longest = time.monotonic(), 0.0
        asyncio.get_running_loop().call_later(3.0, os.kill, workers[role], signal.SIGCONT)
        asked = asyncio.ensure_future(client.health())
        async for _ in stream:
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        await asked
        assert ids(stream) == oracle(PROMPT, 400).token_ids
        assert longest < (1.5 if role == "draft" else 4.0)
        assert up.pids() == workers
        after = await complete(client, 60, mode=mode)
        assert ids(after) == oracle(PROMPT, 60).token_ids
        assert after.stats.accepted_tokens > 0


STREAM = """
import sys, outrider
with outrider.Client(sys.argv[1]) as client:
    settings = {"max_tokens": 400, "temperature": 0.0, "mode": "pipelined"}
    with client.create_completion(sys.argv[2], stream=True, **settings) as stream:
        for fragment in stream:
            print(*(token.id for token in fragment.tokens), flush=True)
            client.health()
"""


async def test_a_client_that_was_paused_goes_on_where_it_stood(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with pipeline(**SLOW) as up:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", STREAM, up.name, PROMPT, stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        said = await process.stdout.readline()
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(3.0)
        process.send_signal(signal.SIGCONT)
        said += (await process.communicate())[0]
        assert [int(token) for token in said.split()] == oracle(PROMPT, 400).token_ids


async def test_answers_outlive_a_connection_that_breaks(
    pipeline: Pipelines, oracle: Oracle
) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        stream = await begin(client, 400)
        asked = asyncio.ensure_future(client.tokenize("x"))
        assert client._link is not None
        client._link.end()
        assert await asked == (120,)
        await stream.result()
        assert ids(stream) == oracle(PROMPT, 400).token_ids
        assert (await client.health())["status"] == "ok"
        await up.idle(client)


async def test_without_patience_a_connection_that_breaks_ends_every_call(
    pipeline: Pipelines,
) -> None:
    async with pipeline(**SLOW) as up, connect(up.name, resume_s=0) as client:
        stream = await begin(client, 1000)
        began = time.monotonic()
        assert client._link is not None
        client._link.end()
        with pytest.raises(ConnectionFailed, match="was lost before the answer ended"):
            await stream.result()
        assert time.monotonic() - began < 1.0
        await asyncio.sleep(0.3)
        assert (await client.health())["status"] == "ok"  # it has reconnected by itself
        await up.idle(client)


def test_a_synchronous_client_goes_on_as_well(served: Any, oracle: Oracle) -> None:
    with Client(served.ipc) as client:
        stream = client.create_completion(PROMPT, max_tokens=1000, temperature=0, stream=True)
        next(stream)
        link = client._client._link
        assert link is not None
        client._loop.call_soon_threadsafe(link.end)
        assert stream.result().text == oracle(PROMPT, 1000).text
