"""In front of the application: who may ask, how much, and how long a body may take.

The body is read here, as a whole and no longer than it may be; what comes behind it can only be the
end of the connection.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from contextlib import suppress

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from outrider.errors import OutriderError, Overloaded
from outrider_services.gateway import handlers
from outrider_services.gateway.access import OPEN, Rules
from outrider_services.gateway.errors import Refused

BODY_LIMIT = 1 << 20  # bytes
BODY_S = 30.0  # most that a body may take to come
SPILL_LIMIT, SPILL_S = 4 << 20, 1.0  # bytes and seconds of what is not wanted
MOST = 256  # requests at once
NAME = re.compile(rb"[\w.-]{1,64}", re.ASCII)  # of a request, if its client names it
JSON = (b"content-type", b"application/json")


class Gate:
    """ASGI middleware: lets through what keeps to `rules` and to the limits above.

    The scope's "state" then has the request's `id` and, as a short digest, its `key`.
    """

    def __init__(self, app: ASGIApp, rules: Rules) -> None:
        self._app, self._rules = app, rules
        self._count = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        is_open = scope["path"] in OPEN
        try:
            key = self._rules.check(scope["path"], scope["headers"])
            if self._count >= MOST and not is_open:
                raise Overloaded(f"{MOST} HTTP requests are being served already")
            body = await whole(scope, receive)
        except OutriderError as exc:
            await refuse(exc, scope, receive, send)
            return
        if body is None:
            return  # the client has left
        scope.setdefault("state", {}).update(id=name_of(scope), key=key)
        self._count += 1
        try:
            await self._app(as_json(scope), Body(body, receive), send)
        finally:
            self._count -= 1


async def refuse(exc: OutriderError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request of which more may come, and end its connection.

    A moment is left for the rest: a client that is still sending would not see the answer.
    """
    size = 0
    with suppress(TimeoutError):
        async with asyncio.timeout(SPILL_S):
            while size <= SPILL_LIMIT:
                message = await receive()
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    break
    answer = handlers.response(exc)
    answer.headers["Connection"] = "close"
    await answer(scope, receive, send)


async def whole(scope: Scope, receive: Receive) -> bytes | None:
    """The body; None if the client leaves before its end. Raises Refused."""
    parts: list[bytes] = []
    size = int(dict(scope["headers"]).get(b"content-length", b"0"))
    try:
        async with asyncio.timeout(BODY_S):
            while size <= BODY_LIMIT:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                parts.append(message.get("body", b""))
                size = sum(map(len, parts))
                if not message.get("more_body", False) and size <= BODY_LIMIT:
                    return b"".join(parts)
    except TimeoutError:
        raise Refused(408, "timeout", f"the body has not come within {BODY_S:.0f} s") from None
    raise Refused(413, "body_too_large", f"the body is longer than {BODY_LIMIT} bytes")


class Body:
    """`receive` for the application: first the body that has come, then what the client does."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        body, self._body = self._body, None
        if body is None:
            return await self._receive()
        return {"type": "http.request", "body": body, "more_body": False}


def name_of(scope: Scope) -> str:
    """The request's name: the client's own (X-Request-Id), if it is one, else a random one."""
    given = dict(scope["headers"]).get(b"x-request-id", b"")
    return given.decode() if NAME.fullmatch(given) else secrets.token_hex(12)


def as_json(scope: Scope) -> Scope:
    """Every body is read as JSON, as `curl -d` sends it without saying so."""
    kept = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
    return {**scope, "headers": [*kept, JSON]}
