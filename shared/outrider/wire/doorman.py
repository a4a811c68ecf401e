"""Answers ZeroMQ's question which keys may connect (ZAP, ZeroMQ's RFC 27).

It is asked once for each connection, in the middle of its handshake. A key that is not let in gets
no further; one that is has its role in the "User-Id" of all its messages, which no peer can forge.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq

from outrider.errors import ConfigError

log = logging.getLogger(__name__)

DOMAIN = b"outrider"  # without a name for it ZeroMQ asks nobody, and lets everybody in
BURST = 64  # questions that are answered before other tasks get their turn
YES, NO = b"200", b"400"


class Doorman:
    """Lets in whoever `role_of` knows a role of; nobody while that raises ConfigError."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], role_of: Callable[[bytes], str | None]
    ) -> None:
        self._role_of = role_of
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.REP)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind("inproc://zeromq.zap.01")
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._loop.call_soon(self._drain)  # until it was found empty, ZeroMQ wakes nobody
        self.is_quiet = False  # strangers are expected: nobody need be told of them

    def _drain(self) -> None:
        for _ in range(BURST):
            if self._socket.closed:
                return
            try:
                question = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._socket.send_multipart(self._answer(question), zmq.NOBLOCK)
        self._loop.call_soon(self._drain)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        version, number, domain, origin, _, mechanism, *key = (*question, *[b""] * 6)[:7]
        role = None
        if (domain, mechanism) == (DOMAIN, b"CURVE"):
            role = self._judge(key[0])
        if role is None and not self.is_quiet:
            log.warning("refused: a key that is not trusted, from %s", origin.decode("latin-1"))
        user = f"{role} {key[0].hex()}".encode() if role else b""
        return [version, number, YES if role else NO, b"", user, b""]

    def _judge(self, key: bytes) -> str | None:
        try:
            return self._role_of(key)
        except ConfigError as exc:
            log.error("nobody is let in: %s", exc)
            return None

    def close(self) -> None:
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
