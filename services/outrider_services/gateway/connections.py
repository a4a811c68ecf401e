"""A connection of HTTP that nobody can hold for ever: by a slow head, or by not reading."""

from __future__ import annotations

import asyncio
import json
import logging

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger(__name__)

HEAD_S = 10.0  # most that the head of a request may take to come
IDLE_S = 60  # most that a connection stays without a request
STALLED_S = 30.0  # most that a client may leave unread what there is for it
MOST = 512  # connections
HEAD_LIMIT = 64 << 10  # bytes

BAD = json.dumps(
    {
        "error": {
            "message": "that is no HTTP request",
            "type": "invalid_request_error",
            "param": None,
            "code": "invalid_request",
        }
    }
).encode()


class Connection(H11Protocol):
    """uvicorn's, with limits."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST:
            self._abort(f"{MOST} connections are open already")
        else:
            self._within(HEAD_S, "no request came")

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            if self._timer is None:  # it is not put off by what comes little by little
                self._within(HEAD_S, "no request came")
        elif not self.flow.write_paused:
            self._at_ease()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._within(STALLED_S, "its client does not read")

    def resume_writing(self) -> None:
        super().resume_writing()
        self._at_ease()

    def connection_lost(self, exc: Exception | None) -> None:
        self._at_ease()
        super().connection_lost(exc)

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        if self.transport.get_write_buffer_size():  # closing would wait for its reader
            self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\n"
            head += f"Content-Length: {len(BAD)}\r\nConnection: close\r\n\r\n"
            self.transport.write(head.encode() + BAD)
        self.transport.close()

    def _within(self, seconds: float, why: str) -> None:
        """End the connection after so many seconds, unless it is put at ease before."""
        self._at_ease()
        self._timer = self.loop.call_later(seconds, self._abort, f"{why} for {seconds:.0f} s")

    def _at_ease(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _abort(self, why: str) -> None:
        log.warning("a connection ends: %s", why)
        self._timer = None
        self.transport.abort()
