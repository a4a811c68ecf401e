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
import time
from collections.abc import Callable

import zmq
from zmq.utils.monitor import parse_monitor_message

from outrider.errors import ConfigError, ConnectionFailed, ProtocolError
from outrider.wire.codec import decode, encode
from outrider.wire.connections import (
    SEAL,
    Backlog,
    check_room,
    shut,
)
from outrider.wire.keys import Credentials
from outrider.wire.messages import FRAME_LIMIT, Message

log = logging.getLogger(__name__)

BURST, BURST_S = 64, 0.005  # messages handled, or the time, before other tasks get their turn
QUEUE = 32  # messages that ZeroMQ itself may hold for or from a peer
TRUSTED_LIMIT = 64 << 20  # bytes that may wait for a worker, or for the coordinator, besides
RETRY_S = (0.001, 0.1)  # between two looks at what waits: at first, at most
GONE_S = 0.002  # what was sent before a connection ended is read within this time

LIBRARY = (4, 3, 5)  # of earlier ones peers without a key could end the process, or do worse

LOST = "the connection was lost"

OPTIONS = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,  # nothing is queued for a peer that is not there
    zmq.MAXMSGSIZE: FRAME_LIMIT + SEAL,
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


def check_library() -> None:
    """Raise ConfigError if ZeroMQ's library is too old to face a network."""
    if zmq.zmq_version_info() < LIBRARY:
        least = ".".join(map(str, LIBRARY))
        raise ConfigError(
            f"libzmq {zmq.zmq_version()} is too old: it has holes that {least} has closed; "
            "install a pyzmq that brings a newer one"
        )


class PeerGone(Exception):
    """The connection is gone, or has just been ended because its peer does not read."""


class Endpoint:
    """A socket on the event loop, read whenever ZeroMQ's edge-triggered descriptor says so."""

    def __init__(self, kind: int, events: int) -> None:
        self._loop = asyncio.get_running_loop()
        check_library()
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
        self._will_drain = False
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
                self._drain_soon()
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

    def _drain_soon(self) -> None:
        """Once, however often it is called: each burst that finds more is followed by another."""
        if not self._will_drain:
            self._will_drain = True
            self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._will_drain = False
        self._drain()

    def _drain(self) -> None:
        until = time.monotonic() + BURST_S
        for _ in range(BURST):
            if self.closed:
                return
            try:
                self._receive()
            except zmq.Again:
                return
            except Exception:  # what one message leads to must not keep others from being read
                log.exception("a message was not handled")
            if time.monotonic() > until:
                break
        else:
            self._loop.call_soon(self._on_burst)
        self._drain_soon()

    def _on_burst(self) -> None:
        """More comes than is read at once."""

    def _receive(self) -> None:
        """Take one message. Raises zmq.Again if there is none."""
        raise NotImplementedError

    def _rest(self, more: int | bytes) -> int:
        """Drop the further frames of a message, if it has `more`, one by one; how many it had."""
        count = 0
        while more:
            more = self._socket.recv(zmq.NOBLOCK, copy=False).more
            count += 1
        return count

    def _drain_monitor(self) -> None:
        while not self.closed:
            try:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            self._on_event(event["event"], event["value"])

    def _on_event(self, event: int, value: int) -> None:
        """`value` is mostly a descriptor."""
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


ONE_SIDE_HAS_KEYS = zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH
LINK_EVENTS = (
    zmq.EVENT_CONNECTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)


class Link(Endpoint):
    """A worker's or client's connection to the coordinator; it reconnects by itself.

    `on_lost` is told why a connection has ended, `on_up` that there is one, perhaps again. One over
    which something unreadable comes is ended, since what it was may be waited for. Raises
    ConnectionFailed for what is no address. `refusal` is why there will be no connection any more,
    "" while there may be one: keys do not fit. `hindrance` is why there may be none now.
    """

    def __init__(
        self,
        address: str,
        on_message: Callable[[Message], None],
        on_lost: Callable[[str], None] = lambda _: None,
        on_up: Callable[[], None] = lambda: None,
        credentials: Credentials | None = None,
    ) -> None:
        super().__init__(zmq.DEALER, LINK_EVENTS)
        self._on_message, self._on_lost, self._on_up = on_message, on_lost, on_up
        self._address, self._credentials = address, credentials
        self._connection: int | None = None  # its descriptor
        self.is_up = False
        self.refusal = self.hindrance = ""
        self.failures = 0  # connections that ended before they were made
        self._why = LOST
        self._resolve(address)
        if credentials:
            self._socket.setsockopt(zmq.CURVE_PUBLICKEY, credentials.own.public)
            self._socket.setsockopt(zmq.CURVE_SECRETKEY, credentials.own.secret)
            self._socket.setsockopt(zmq.CURVE_SERVERKEY, credentials.coordinator)
        if address.startswith("ipc://"):  # to look for a coordinator on this machine costs nothing
            self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        try:
            self._socket.connect(address)
        except (zmq.ZMQError, UnicodeError) as exc:
            self.close()
            raise ConnectionFailed(f"{address!r} is not an address: {exc}") from exc

    def send(self, message: Message) -> None:
        """Send soon. Raises PeerGone while there is no connection, else as `Router.send`."""
        if not self.is_up:
            raise PeerGone("not connected")
        self._post(b"", encode(message))

    def end(self, peer: bytes = b"") -> None:
        self._drain_monitor()
        if self._connection is not None:
            shut(self._connection)

    def _on_event(self, event: int, value: int) -> None:
        match event:
            case zmq.EVENT_CONNECTED:
                self._connection = value
            case zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.is_up = True
                self.hindrance = ""
                self._loop.call_later(GONE_S, self._up)  # behind `_lost` of the one before
            case zmq.EVENT_HANDSHAKE_FAILED_AUTH:
                self.refusal = (
                    f"the coordinator at {self._address} does not trust our key: give what "
                    "`outrider keys show` prints here to `outrider keys trust` there"
                )
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if value != ONE_SIDE_HAS_KEYS:
                self.refusal = f"what answers at {self._address} is no coordinator"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL if self._credentials:
                self.refusal = f"the coordinator at {self._address} takes no keys"
            case zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL:
                self.refusal = f"the coordinator at {self._address} asks for keys (see --keys)"
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL if self._address.startswith("ipc://"):
                self.failures += 1  # no keys there: it is frozen, or has just ended
            case zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                # also where only one side has keys, if the other side is the first to find out
                self.failures += 1
                perhaps = (
                    "it may have another key than the coordinator trusted here, or take none"
                    if self._credentials
                    else "it may ask for keys (see --keys)"
                )
                self.hindrance = f"who answers at {self._address} ends the connection: {perhaps}"
            case zmq.EVENT_DISCONNECTED:
                was_up, self.is_up, self._connection = self.is_up, False, None
                self._backlogs.clear()
                if was_up:
                    self._loop.call_later(GONE_S, self._lost)

    def _up(self) -> None:
        if self.is_up and not self.closed:
            self._on_up()

    def _lost(self) -> None:
        self._drain()  # what came before the end
        why, self._why = self._why, LOST
        if not self.closed:
            self._on_lost(why)

    def _receive(self) -> None:
        frame = self._socket.recv(zmq.NOBLOCK)
        try:
            if rest := self._rest(self._socket.getsockopt(zmq.RCVMORE)):
                raise ProtocolError(f"a message of {rest + 1} frames instead of one")
            message = decode(frame)
        except ProtocolError as exc:
            log.warning("dropped: %s", exc)
            self._why = "the coordinator said what this version of outrider cannot read"
            self.end()
            return
        self._on_message(message)
