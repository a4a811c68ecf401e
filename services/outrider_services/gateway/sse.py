"""Answers while they come, as server-sent events; and noticing that the client has left."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from outrider.errors import OutriderError
from outrider_services.gateway import errors

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"
HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # a proxy is to pass on each event at once
}

T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do `work`, but stop as soon as the client has left. Raises ClientLeft.

    The body must have been read: `receive` then waits for the end of the connection.
    """
    task = asyncio.ensure_future(work)
    left = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        for one in (task, left):
            one.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(data: str) -> bytes:
    return b"data: " + data.encode() + b"\n\n"


_encoder = json.JSONEncoder(separators=(",", ":"))


def dump(value: object) -> str:
    """`value` as JSON on one line."""
    return _encoder.encode(value)


class Events(Response):
    """Sends `events`, which come in parts, until they end or the client leaves.

    The status is sent with the first part: until then an error still has a status of its own. Later
    it is an event, and the last one.
    """

    def __init__(self, events: AsyncGenerator[bytes], headers: Mapping[str, str]) -> None:
        self.status_code, self.background = 200, None
        self.init_headers({**HEADERS, **headers})
        self._events = events
        self._started = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        except ClientLeft:
            if not self._started:
                raise

    async def _send(self, send: Send) -> None:
        try:
            async with aclosing(self._events) as events:
                async for part in events:
                    await self._put(send, part)
        except Exception as exc:
            if not self._started:
                raise
            error = exc if isinstance(exc, OutriderError) else errors.unexpected(exc)
            await self._put(send, event(dump(errors.content(error))))
        await self._put(send, b"", more=False)

    async def _put(self, send: Send, body: bytes, *, more: bool = True) -> None:
        if not self._started:
            self._started = True
            start = {"status": self.status_code, "headers": self.raw_headers}
            await send({"type": "http.response.start", **start})
        await send({"type": "http.response.body", "body": body, "more_body": more})
