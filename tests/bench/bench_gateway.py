"""What the gateway computes for each streamed fragment, without a network.

    python -m tests.bench.bench_gateway

Run from the project's root with the Python of `.venv`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, cast

from starlette.types import Message

from outrider.client.inboxes import Inbox
from outrider.client.stream import Stream
from outrider.core.stats import Stats
from outrider.core.values import Fragment, Token
from outrider.wire import messages as wire
from outrider_services.gateway.answering import Gateway
from outrider_services.gateway.asking import Ask
from outrider_services.gateway.openai_answers import ChatForm
from outrider_services.gateway.sse import Events
from outrider_services.gateway.upstream import Upstream
from outrider_services.table import ServerOptions

FRAGMENTS = 5000
REPORT = Stats(started=1.0).report()


class Feeder:
    """The client of a stream whose fragments come one a turn of the loop."""

    def __init__(self) -> None:
        self.inbox = Inbox(1)
        self.left = FRAGMENTS

    def _open(self, call: int) -> Inbox:
        return self.inbox

    async def _next(self, inbox: Inbox) -> wire.Message:
        await asyncio.sleep(0)
        self.left -= 1
        if self.left < 0:
            return wire.Finished(1, "length", REPORT)
        tokens = tuple(Token(n, b" word", n, "drafted", 1.0) for n in range(3))
        return wire.Progress(1, Fragment(1, " word word word", tokens, ()), REPORT)

    def _cancel(self, inbox: Inbox) -> None: ...
    def _abandon(self, inbox: Inbox) -> None: ...
    def _release(self, inbox: Inbox) -> None: ...
    def _adopt(self, inbox: Inbox) -> None: ...


async def measure(*, provenance: bool) -> list[float]:
    """Milliseconds of CPU time from one event to the next."""
    stream = Stream(Feeder(), 1)

    async def begin(_: object) -> Stream:
        return stream

    @asynccontextmanager
    async def answering(ask: object, key: str) -> AsyncIterator[Stream]:
        yield stream

    ask = SimpleNamespace(begin=begin, predict_ms=None, reads_only=False)
    request = SimpleNamespace(scope={"state": {"id": "a", "key": ""}})
    upstream = SimpleNamespace(answering=answering, running=Upstream("none").running)
    events = Gateway(cast(Upstream, upstream), ServerOptions())._events(
        cast(Any, request),
        cast(Ask, ask),
        lambda answer, model: ChatForm(answer, model, usage=False, provenance=provenance),
    )
    times: list[float] = []

    async def send(_: Message) -> None:
        times.append(1000 * time.process_time())

    async def receive() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    await Events(events, {})({}, receive, send)
    return [later - earlier for earlier, later in pairwise(times)]


def main() -> None:
    for told in (False, True):
        found = sorted(asyncio.run(measure(provenance=told)))
        kind = "with provenance" if told else "text alone"
        print(
            f"{kind}: median {statistics.median(found):.3f} ms, p99 {found[-len(found) // 100]:.3f}"
        )


if __name__ == "__main__":
    main()
