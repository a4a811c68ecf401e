"""Typed messages over ZeroMQ: one ROUTER (`router.Router`) that the coordinator binds, and the
DEALERs (`Link`) that workers and clients connect.

Both call their handler for each message, in order, on the event loop. Sending never waits: what
ZeroMQ cannot take yet waits in a backlog, and a peer that lets it grow beyond its limit loses
its connection. So no message is lost unseen: either it arrives, or its connection ends, and both
sides are told. The ROUTER gives every connection an id of its own, which is the name of the peer
here; nobody can choose or steal one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from outrider.errors import ConnectionFailed, ProtocolError
from outrider.wire.codec import decode, encode
from outrider.wire.connections import (
    Backlog,
    check_room,
    shut,
)
from outrider.wire.messages import FRAME_LIMIT, Message

log = logging.getLogger(__name__)

BURST = 64  # messages handled before other tasks get their turn
QUEUE = 32  # messages that ZeroMQ itself may hold for or from a peer
TRUSTED_LIMIT = 64 << 20  # bytes that may wait for a worker, or for the coordinator, besides
RETRY_S = (0.001, 0.1)  # between two looks at what waits: at first, at most
GONE_S = 0.002  # what was sent before a connection ended is read within this time

LOST = "the connection was lost"

OPTIONS = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,  # nothing is queued for a peer that is not there
    zmq.MAXMSGSIZE: FRAME_LIMIT,
    zmq.BACKLOG: 1024,
    zmq.HANDSHAKE_IVL: 2000,
    # A process that ends closes its connections at once; these are for a peer behind a broken
    # network, and longer than a process may be paused. Not ZeroMQ's own heartbeats: where one is
    # due on a connection that broke while its queue was full, libzmq (4.3.5) ends the process.
    zmq.TCP_KEEPALIVE: 1,
    zmq.TCP_KEEPALIVE_IDLE: 10,
    zmq.TCP_KEEPALIVE_INTVL: 5,
    zmq.TCP_KEEPALIVE_CNT: 3,
    zmq.TCP_MAXRT: 25000,
    zmq.CONNECT_TIMEOUT: 500,
    zmq.RECONNECT_IVL: 50,
    zmq.RECONNECT_IVL_MAX: 1000,
    zmq.SNDHWM: QUEUE,
    zmq.RCVHWM: QUEUE,
}


class PeerGone(Exception):
    """The connection is gone, or has just been ended because its peer does not read."""


class Endpoint:
    """A socket on the event loop, read whenever ZeroMQ's edge-triggered descriptor says so."""

    def __init__(self, kind: int, events: int) -> None:
        self._loop = asyncio.get_running_loop()
        check_room()
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in OPTIONS.items():
            self._socket.setsockopt(option, value)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(events)
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._monitor_fd, self._drain_monitor)
        self._loop.call_soon(self._drain_monitor)  # until it was found empty, ZeroMQ wakes nobody
        self._backlogs: dict[bytes, Backlog] = {}  # by peer; those that are not empty
        self._retrying: asyncio.TimerHandle | None = None  # the next look at them
        self.closed = False

    # ---- sending --------------------------------------------------------------------------------

    def _post(self, peer: bytes, frame: bytes) -> None:
        """Send `frame`, or put it behind what waits for this peer. Raises PeerGone."""
        waiting = self._backlogs.get(peer)
        if waiting is None:
            if self._put(peer, frame):
                return
            if self._retrying is None:
                self._retrying = self._loop.call_later(RETRY_S[0], self._retry, RETRY_S[0])
            waiting = self._backlogs[peer] = Backlog()
        waiting.append(frame)
        if waiting.size > self._limit(peer):
            log.warning("a connection ends: its peer does not read what it is sent")
            self.end(peer)
            raise PeerGone("it does not read")

    def _put(self, peer: bytes, frame: bytes) -> bool:
        """Give `frame` to ZeroMQ; False if there is no room now. Raises PeerGone."""
        try:
            self._socket.send_multipart([peer, frame] if peer else [frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as exc:
            raise PeerGone(exc.strerror) from exc
        finally:
            # sending may swallow the edge that announces a message: look for one
            if not self.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._loop.call_soon(self._drain)
        return True

    def _retry(self, waited_s: float) -> None:
        """Send what waits as far as there is room; look again, later and later if there is none."""
        moved, self._retrying = False, None
        for peer, waiting in list(self._backlogs.items()):
            try:
                while waiting.frames and self._put(peer, waiting.frames[0]):
                    waiting.popleft()
                    moved = True
            except PeerGone:
                waiting.frames.clear()
            if not waiting.frames:
                self._backlogs.pop(peer, None)
        if self._backlogs and not self.closed:
            next_s = RETRY_S[0] if moved else min(2 * waited_s, RETRY_S[1])
            self._retrying = self._loop.call_later(next_s, self._retry, next_s)

    def _limit(self, peer: bytes) -> int:
        """Most bytes that may wait for `peer`."""
        return TRUSTED_LIMIT

    def end(self, peer: bytes) -> None:
        """End the connection; both sides are told."""
        raise NotImplementedError

    # ---- receiving ------------------------------------------------------------------------------

    def _drain(self) -> None:
        for _ in range(BURST):
            if self.closed:
                return
            try:
                self._receive()
            except zmq.Again:
                return
            except Exception:  # what one message leads to must not keep others from being read
                log.exception("a message was not handled")
        self._on_burst()
        self._loop.call_soon(self._drain)

    def _on_burst(self) -> None:
        """More comes than is read at once."""

    def _receive(self) -> None:
        """Take one message. Raises zmq.Again if there is none."""
        raise NotImplementedError

    def _rest(self) -> int:
        """Drop the further frames of a message, one by one; how many there were."""
        count = 0
        while self._socket.getsockopt(zmq.RCVMORE):
            self._socket.recv(zmq.NOBLOCK, copy=False)
            count += 1
        return count

    def _drain_monitor(self) -> None:
        while not self.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._on_event(event["event"], event["value"])

    def _on_event(self, event: int, fd: int) -> None:
        raise NotImplementedError

    def _resolve(self, address: str) -> None:
        """Let the next address be one of IPv6, `tcp://[::1]:5701`; others stay as they were."""
        self._socket.setsockopt(zmq.IPV6, int("[" in address))

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
            self._loop.remove_reader(self._monitor_fd)
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=0)
        self._context.term()


class Link(Endpoint):
    """A worker's or client's connection to the coordinator; it reconnects by itself.

    `on_lost` is told why a connection has ended; one over which something unreadable comes is
    ended, since what it was may be waited for. Raises ConnectionFailed for what is no address.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None] = lambda _: None,
    ) -> None:
        events = zmq.EVENT_CONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        super().__init__(zmq.DEALER, events)
        self._on_message, self._on_lost = on_message, on_lost
        self._connection: int | None = None  # its descriptor
        self._is_up = False
        self._why = LOST
        self._resolve(address)
        try:
            self._socket.connect(address)
        except (zmq.ZMQError, UnicodeError) as exc:
            self.close()
            raise ConnectionFailed(f"{address!r} is not an address: {exc}") from exc

    def send(self, message: Message) -> None:
        """Send soon. Raises PeerGone while there is no connection, else as `Router.send`."""
        if not self._is_up:
            raise PeerGone("not connected")
        self._post(b"", encode(message))

    def end(self, peer: bytes = b"") -> None:
        self._drain_monitor()
        if self._connection is not None:
            shut(self._connection)

    def _on_event(self, event: int, fd: int) -> None:
        match event:
            case zmq.EVENT_CONNECTED:
                self._connection = fd
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._is_up = True
            case zmq.EVENT_DISCONNECTED:
                was_up, self._is_up, self._connection = self._is_up, False, None
                self._backlogs.clear()
                if was_up:
                    self._loop.call_later(GONE_S, self._lost)

    def _lost(self) -> None:
        self._drain()  # what came before the end
        why, self._why = self._why, LOST
        if not self.closed:
            self._on_lost(why)

    def _receive(self) -> None:
        frame = self._socket.recv(zmq.NOBLOCK)
        try:
            if rest := self._rest():
                raise ProtocolError(f"a message of {rest + 1} frames instead of one")
            message = decode(frame)
        except ProtocolError as exc:
            log.warning("dropped: %s", exc)
            self._why = "the coordinator said what this version of outrider cannot read"
            self.end()
            return
        self._on_message(message)
