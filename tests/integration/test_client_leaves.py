"""Whoever leaves without a word: dropped streams, Ctrl-C, fork(), other loops, a program's end."""

from __future__ import annotations

import asyncio
import gc
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest

from outrider import Client, CompletionSettings, ConnectionFailed, Stream, connect
from outrider.client import synchronous

if TYPE_CHECKING:
    from tests.integration.conftest import Served

PROMPT = "Quiet rain over"
LONG: CompletionSettings = {"max_tokens": 1900, "mode": "plain"}  # most of ten seconds
FREE_S = 3.0  # how soon its sequence has to be free


def until_idle(served: Served) -> None:
    """Another client sees that nothing is generated any more."""
    deadline = time.monotonic() + FREE_S
    with Client(served.ipc) as other:
        while any((requests := other.health()["requests"]).values()):
            assert time.monotonic() < deadline, requests


# ---- streams that nobody has any more -----------------------------------------------------------


def left_by_break(client: Client) -> None:
    for _ in client.create_completion(PROMPT, stream=True, **LONG):
        break


def left_by_return(client: Client) -> None:
    stream = client.create_completion(PROMPT, stream=True, **LONG)
    next(stream)


def left_unread(client: Client) -> None:
    client.create_completion(PROMPT, stream=True, **LONG)


def left_in_a_cycle(client: Client) -> None:
    holder: dict[str, Any] = {"stream": client.create_completion(PROMPT, stream=True, **LONG)}
    holder["itself"] = holder
    next(holder["stream"])
    del holder
    gc.collect()


@pytest.mark.parametrize("leave", [left_by_break, left_by_return, left_unread, left_in_a_cycle])
def test_a_stream_that_is_dropped_is_cancelled(
    served: Served, leave: Callable[[Client], None]
) -> None:
    with Client(served.ipc) as client:
        leave(client)
        until_idle(served)
        assert not client._client._inboxes


async def test_an_asynchronous_stream_that_is_dropped_is_cancelled(served: Served) -> None:
    async with served.connect() as client, asyncio.timeout(5):
        async for _ in await client.create_completion(PROMPT, stream=True, **LONG):
            break
        read = await client.create_completion(PROMPT, max_tokens=5, stream=True)
        await read.result()
        await asyncio.to_thread(until_idle, served)
        assert not client._inboxes


async def test_a_stream_may_be_dropped_late(served: Served) -> None:
    """After its client, and after its loop."""
    async with served.connect() as client:
        streams = [await client.create_completion(PROMPT, stream=True, **LONG)]
    streams.clear()

    async def begin() -> Stream:
        async with served.connect() as client:
            return await client.create_completion(PROMPT, stream=True, **LONG)

    def in_a_loop_of_its_own() -> None:
        stream = asyncio.run(begin())
        del stream

    await asyncio.to_thread(in_a_loop_of_its_own)
    await asyncio.to_thread(until_idle, served)


def test_a_client_that_is_dropped_ends_its_thread(served: Served) -> None:
    before = threading.active_count()
    stream = Client(served.ipc).create_completion(PROMPT, stream=True, **LONG)
    next(stream)  # a stream keeps its client
    del stream
    until_idle(served)
    deadline = time.monotonic() + FREE_S
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


# ---- Ctrl-C -------------------------------------------------------------------------------------


def test_ctrl_c_in_a_loop_over_a_stream_cancels_it(served: Served) -> None:
    with Client(served.ipc) as client:
        stream = client.create_completion(PROMPT, stream=True, **LONG)
        next(stream)
        main = threading.get_ident()
        threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
        with pytest.raises(KeyboardInterrupt):
            for _ in stream:
                pass
        until_idle(served)
        assert stream.result().choices[0].finish_reason == "cancelled"


class Interrupted(synchronous.Call[Any]):
    """A call whose caller is interrupted when it has just begun, or has just ended."""

    when = "begin"

    def begin(self) -> None:
        super().begin()
        if self.when == "begin":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _over(self, task: asyncio.Task[Any]) -> None:
        super()._over(task)
        if self.when == "end":
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


@pytest.mark.parametrize(("when", "stream"), [("begin", True), ("end", True), ("begin", False)])
def test_ctrl_c_between_asking_and_having_the_answer_cancels_it(
    served: Served, monkeypatch: pytest.MonkeyPatch, when: str, stream: bool
) -> None:
    with Client(served.ipc) as client:
        with monkeypatch.context() as patched:
            patched.setattr(synchronous, "Call", Interrupted)
            patched.setattr(Interrupted, "when", when)
            with pytest.raises(KeyboardInterrupt) as caught:
                client.create_completion(PROMPT, stream=stream, **LONG)
        until_idle(served)  # although the traceback still holds all frames
        assert caught.traceback


EVERYWHERE = """
import signal, sys, time
from outrider import Client
lost = 0
def on(*_):
    raise KeyboardInterrupt
signal.signal(signal.SIGALRM, on)
with Client(sys.argv[1]) as client:
    for n in range(150):
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00001 * (1 + n))
            stream = client.create_completion("x", max_tokens=1900, mode="plain", stream=True)
            time.sleep(0.02)
        except KeyboardInterrupt:
            pass
        except RuntimeError as exc:  # Python's own lock was caught half released
            assert "un-acquired lock" in str(exc), exc
        stream = None
    deadline = time.monotonic() + 5
    while any((asked := client.health()["requests"]).values()):
        assert time.monotonic() < deadline, asked
"""


def test_an_interrupt_at_any_moment_leaves_nothing_running(served: Served) -> None:
    _, err, status = run(EVERYWHERE, served)
    assert status == 0, err


# ---- fork, another loop, the end of the program -------------------------------------------------


def run(code: str, served: Served) -> tuple[str, str, int]:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", code, served.ipc]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    return done.stdout, done.stderr, done.returncode


FORKS = """
import asyncio, gc, os, sys, time
from outrider import Client, ConnectionFailed, connect

def in_child(use):
    "Whether `use` raises one ConnectionFailed within a second, in a child."
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    began = time.monotonic()
    try:
        use()
        print("no error", flush=True)
    except ConnectionFailed as exc:
        if "fork" in str(exc) and time.monotonic() - began < 1:
            os._exit(0)
    os._exit(1)

def closes():
    global client, stream
    client.close()
    client.close()
    stream = client = None
    gc.collect()
    raise ConnectionFailed("fork")

client = Client(sys.argv[1])
stream = client.create_completion("x", max_tokens=400, temperature=0, stream=True)
next(stream)
for use in (client.health, lambda: next(stream), stream.result, stream.cancel, closes):
    assert in_child(use), use
    assert client.health()["status"] == "ok"
if os.fork() == 0:
    with Client(sys.argv[1]) as own:
        own.health()
    sys.exit(3)  # the usual way out, with all that Python does then
assert os.waitstatus_to_exitcode(os.wait()[1]) == 3
assert stream.result().usage.completion_tokens == 400

async def main():
    async with connect(sys.argv[1]) as client:
        stream = await client.create_completion("x", max_tokens=400, stream=True)
        await anext(stream)
        for use in (client.health, stream.__anext__, stream.cancel):
            assert in_child(lambda: asyncio.run(use()))
        def leaves():
            nonlocal client, stream
            asyncio.run(client.close())
            asyncio.run(client.close())
            client = stream = None
            gc.collect()
            raise ConnectionFailed("fork")
        assert in_child(leaves)
        await client.health()
        assert (await stream.result()).usage.completion_tokens == 400
asyncio.run(main())
client.close()
print("done")
"""


def test_after_fork_a_client_is_a_typed_error_and_the_parent_goes_on(served: Served) -> None:
    assert run(FORKS, served) == ("done\n", "", 0)


def test_in_a_second_loop_a_client_is_a_typed_error(served: Served) -> None:
    client = connect(served.ipc)

    async def begin() -> Stream:
        await client.__aenter__()
        stream = await client.create_completion(PROMPT, stream=True, **LONG)
        await anext(stream)
        return stream

    stream = asyncio.run(begin())  # whose loop is closed now
    for use in (client.health, stream.__anext__, stream.cancel):
        began = time.monotonic()
        with pytest.raises(ConnectionFailed, match="event loop"):
            asyncio.run(use())
        assert time.monotonic() - began < 1
    asyncio.run(client.close())
    asyncio.run(client.close())
    with pytest.raises(ConnectionFailed, match="closed"):
        asyncio.run(stream.result())
    until_idle(served)

    async def again() -> None:
        async with client:
            assert (await client.health())["status"] == "ok"

    asyncio.run(again())


async def test_another_thread_may_close_a_client_but_not_use_it(served: Served) -> None:
    async with served.connect() as client:
        with pytest.raises(ConnectionFailed, match="event loop"):
            await asyncio.to_thread(asyncio.run, client.health())
        asking = asyncio.ensure_future(client.create_completion(PROMPT, **LONG))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(asyncio.run, client.close())
        with pytest.raises(ConnectionFailed):
            async with asyncio.timeout(1):
                await asking


ENDS = """
import asyncio, sys, threading
from outrider import Client, connect
client = Client(sys.argv[1])
stream = client.create_completion("x", max_tokens=1900, mode="plain", stream=True)
next(stream)
left = client.create_completion("x", max_tokens=1900, mode="plain", stream=True)
reader = threading.Thread(target=lambda: next(left), daemon=True)
reader.start()
async def opens():
    global other, third
    other = await connect(sys.argv[1]).__aenter__()
    third = await other.create_completion("x", max_tokens=1900, stream=True)
asyncio.run(opens())
{end}
"""


@pytest.mark.parametrize(
    ("end", "status"),
    [("", 0), ("sys.exit(4)", 4), ("import os, signal; os.kill(os.getpid(), 15)", -15)],
    ids=["end", "exit", "signal"],
)
def test_a_program_that_ends_with_all_open_ends_at_once(
    served: Served, end: str, status: int
) -> None:
    began = time.monotonic()
    assert run(ENDS.format(end=end), served) == ("", "", status)
    assert time.monotonic() - began < 5
    until_idle(served)
