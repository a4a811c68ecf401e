"""Typed messages over ZeroMQ: one ROUTER (`Router`) that the coordinator binds, and the DEALERs
(`Link`) that workers and clients connect.

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
from contextlib import suppress

import zmq
from zmq.utils.monitor import parse_monitor_message

from outrider.errors import ConfigError, ConnectionFailed, Overloaded, ProtocolError
from outrider.wire.addresses import is_answered
from outrider.wire.codec import decode, encode
from outrider.wire.connections import (
    Backlog,
    Connections,
    Patience,
    Scales,
    check_room,
    shut,
)
from outrider.wire.messages import FRAME_LIMIT, Failed, Hello, Message, Welcome

log = logging.getLogger(__name__)

BURST = 64  # messages handled before other tasks get their turn
QUEUE = 32  # messages that ZeroMQ itself may hold for or from a peer
BACKLOG_LIMIT = 4 << 20  # bytes that may wait for a client besides
TRUSTED_LIMIT = 64 << 20  # for a worker, and for the coordinator
RETRY_S = (0.001, 0.1)  # between two looks at what waits: at first, at most
GONE_S = 0.002  # what was sent before a connection ended is read within this time
ENDED = 1024  # peers whose connections were ended that are remembered
MUTE_S = 2.0  # a surplus connection that has said nothing for so long ends

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


class _Endpoint:
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
        self._loop.call_soon(self._drain)

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


class Router(_Endpoint):
    """The coordinator's socket. `on_message` may raise ProtocolError: that frame was a bad one.

    `on_gone` is called, at most a moment late, for each peer whose connection has ended. Once an
    origin has sent too many bad frames, it loses its connection at each further one.
    """

    def __init__(
        self,
        on_message: Callable[[bytes, Message], None],
        on_gone: Callable[[bytes], None],
        *,
        most: int | None = None,
    ) -> None:
        super().__init__(zmq.ROUTER, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A full queue is where libzmq (4.3.5) ends the process if a ping of its protocol comes
        # behind it on a connection that breaks. So it is never full; `relieve` sees to the bytes.
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._on_message, self._on_gone = on_message, on_gone
        self._connections = Connections(most)
        # what they still send is not looked at; whether their connections were found and ended
        self._ended: dict[bytes, bool] = {}
        self._patience, self._scales = Patience(), Scales()
        self.addresses: list[str] = []

    def bind(self, address: str) -> str:
        """Bind; return the address for clients, with its real port. Raises ConfigError."""
        self._resolve(address)
        if address.startswith("ipc://") and is_answered(address.removeprefix("ipc://")):
            raise ConfigError(f"cannot listen on {address}: somebody does already")
        try:
            self._socket.bind(address)
        except (zmq.ZMQError, UnicodeError) as exc:
            raise ConfigError(f"cannot listen on {address!r}: {exc}") from exc
        bound: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.addresses.append(bound)
        return bound

    def send(self, peer: bytes, message: Message) -> None:
        """Send soon. Raises PeerGone, or BadRequest for a message that is too long."""
        if isinstance(message, Welcome) and (connection := self._connections.of(peer)):
            connection.is_worker = True
        self._post(peer, encode(message))

    def _limit(self, peer: bytes) -> int:
        connection = self._connections.of(peer)
        return TRUSTED_LIMIT if connection and connection.is_worker else BACKLOG_LIMIT

    def end(self, peer: bytes) -> None:
        self._drain_monitor()  # its descriptor may be another connection's by now
        self._ended[peer] = self._connections.end(peer)
        if len(self._ended) > ENDED:
            del self._ended[next(iter(self._ended))]
        self._backlogs.pop(peer, None)
        self._loop.call_soon(self._tell_gone, peer)

    def relieve(self) -> None:
        """If the process has grown too heavy, end the connection to blame; to be called often."""
        blamed = self._scales.blame(self._connections, self._waiting)
        if blamed is None:
            return
        log.warning("a connection ends: it takes too much memory")
        if blamed.peer is None:
            shut(blamed.fd)
        else:
            self.end(blamed.peer)

    def _waiting(self, peer: bytes) -> int:
        backlog = self._backlogs.get(peer)
        return backlog.size if backlog else 0

    def _on_event(self, event: int, fd: int) -> None:
        if former := self._connections.lose(fd):
            self._backlogs.pop(former, None)
            # what it sent before it ended is read first
            self._loop.call_later(GONE_S, self._tell_gone, former)
        if event == zmq.EVENT_ACCEPTED:
            self._connections.accept(fd)
            if len(self._connections) > self._connections.most:
                self._loop.call_later(MUTE_S, self._connections.shut_if_mute, fd)

    def _tell_gone(self, peer: bytes) -> None:
        if not self.closed:
            self._on_gone(peer)

    def _meet(self, peer: bytes, frame: zmq.Frame) -> str:
        """Find the connection of a peer that has none yet; return its origin."""
        self._drain_monitor()
        origin = str(frame.get("Peer-Address"))
        is_open = self._connections.meet(peer, int(frame.get(zmq.SRCFD)), origin)
        if not is_open and peer not in self._ended:
            self._loop.call_later(GONE_S, self._tell_gone, peer)
        return origin

    def _receive(self) -> None:
        peer = self._socket.recv(zmq.NOBLOCK)
        if connection := self._connections.of(peer):
            origin, frame = connection.origin, self._socket.recv(zmq.NOBLOCK)
            self._connections.heard(connection, len(frame))
        elif self._ended.get(peer):
            self._rest()
            return
        else:
            first = self._socket.recv(zmq.NOBLOCK, copy=False)
            origin, frame = self._meet(peer, first), first.bytes
        rest = self._rest()
        if peer in self._ended:
            self._ended[peer] = self._connections.end(peer)
            return
        try:
            if rest:
                raise ProtocolError(f"a message of {rest + 1} frames instead of one")
            message = decode(frame)
            # a worker always has room
            if self._connections.is_refused(peer) and not isinstance(message, Hello):
                self._refuse(peer, message)
            else:
                self._on_message(peer, message)
        except ProtocolError as exc:
            log.warning("dropped: %s", exc)
            if not self._patience.spend(origin):
                log.warning("a connection ends: too many bad frames came from its origin")
                self.end(peer)

    def _refuse(self, peer: bytes, message: Message) -> None:
        reason = f"there are {self._connections.most} connections already"
        with suppress(PeerGone):
            self.send(peer, Failed(getattr(message, "call", 0), Overloaded.code, reason))
        self._loop.call_later(0.1, self.end, peer)  # the answer needs a moment to leave


class Link(_Endpoint):
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
