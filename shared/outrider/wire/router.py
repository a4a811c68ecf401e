"""The coordinator's socket: who is connected, what each may take, and how a connection ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from math import inf

import zmq

from outrider.errors import ConfigError, NotAllowed, Overloaded, ProtocolError
from outrider.wire.addresses import is_answered
from outrider.wire.codec import decode, encode
from outrider.wire.connections import Connections, Patience, Scales, shut
from outrider.wire.doorman import DOMAIN, Doorman
from outrider.wire.doors import close_door, open_door
from outrider.wire.keys import Keyring
from outrider.wire.messages import Failed, Hello, Message, Refused, Welcome
from outrider.wire.rights import forbidden, is_allowed
from outrider.wire.transport import GONE_S, TRUSTED_LIMIT, Endpoint, PeerGone

log = logging.getLogger(__name__)

BACKLOG_LIMIT = 4 << 20  # bytes that may wait for a client besides those that ZeroMQ holds
ENDED = 1024  # peers whose connections were ended that are remembered
DROPPED = 1000  # messages of theirs that are dropped at once
DRAINING_S = 0.2  # since some were dropped: there may be more
MUTE_S = 2.0  # a surplus connection that has said nothing for so long ends
CLOSED_S = 0.25  # for so long nobody new is let in, once far too many are here


class Router(Endpoint):
    """The coordinator's socket. `on_message` may raise ProtocolError: that frame was a bad one.

    `on_gone` is called, at most a moment late, for each peer whose connection has ended. Once an
    origin has sent too many bad frames, it loses its connection at each further one. A peer with a
    key says no more than the key's role may (`rights`): what it says else is a bad frame.
    """

    def __init__(
        self,
        on_message: Callable[[bytes, Message], None],
        on_gone: Callable[[bytes], None],
        *,
        most: int | None = None,
    ) -> None:
        super().__init__(
            zmq.ROUTER, zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        )
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # A full queue is where libzmq (4.3.5) ends the process if a ping of its protocol comes
        # behind it on a connection that breaks. So it is never full; `relieve` sees to the bytes.
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._on_message, self._on_gone = on_message, on_gone
        self._connections = Connections(most)
        # what they still send, or have left, is not looked at; whether their connections are over
        self._ended: dict[bytes, bool] = {}
        self._leaving: set[bytes] = set()  # what they sent before the end is read now
        self._patience, self._scales, self._dropped_at = Patience(), Scales(), -inf
        self.doorman: Doorman | None = None  # where there are addresses with keys
        self.addresses: list[str] = []
        self._doors: list[int] = []  # descriptors of what listens
        self._are_closed = False

    def bind(self, address: str, keys: Keyring | None = None) -> str:
        """Bind; return the address for clients, with its real port. Raises ConfigError.

        With `keys` it is for those who have one that is trusted. Addresses without come first.
        """
        self._resolve(address)
        if keys:
            self._lock(keys)
        elif self.doorman:
            raise ConfigError(f"{address} has no keys, and others before it had some")
        if address.startswith("ipc://") and is_answered(address.removeprefix("ipc://")):
            raise ConfigError(f"cannot listen on {address}: somebody does already")
        try:
            self._socket.bind(address)
        except (zmq.ZMQError, UnicodeError) as exc:
            raise ConfigError(f"cannot listen on {address!r}: {exc}") from exc
        bound: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.addresses.append(bound)
        return bound

    def _lock(self, keys: Keyring) -> None:
        """Where we listen from now on, only keys with a role are let in.

        Each line is needed: without any one of them ZeroMQ lets everybody in (see `trial`).
        """
        own = keys.pair("coordinator")
        self._socket.setsockopt(zmq.CURVE_SERVER, 1)
        self._socket.setsockopt(zmq.CURVE_PUBLICKEY, own.public)
        self._socket.setsockopt(zmq.CURVE_SECRETKEY, own.secret)
        self._socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
        self._socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        if self.doorman is None:
            self.doorman = Doorman(self._context, keys.role_of)

    def close(self) -> None:
        self._open_doors()  # ZeroMQ is to find its file, and remove it
        if self.doorman and not self.closed:
            self.doorman.close()
        super().close()

    def send(self, peer: bytes, message: Message) -> None:
        """Send soon. Raises PeerGone, or BadRequest for a message that is too long."""
        if isinstance(message, Welcome):
            self._connections.trust(peer)
        self._post(peer, encode(message))

    def _limit(self, peer: bytes) -> int:
        return TRUSTED_LIMIT if self._connections.is_worker(peer) else BACKLOG_LIMIT

    def end(self, peer: bytes) -> None:
        self._drain_monitor()  # its descriptor may be another connection's by now
        self._drop_from(peer, self._connections.end(peer))
        self._backlogs.pop(peer, None)
        self._loop.call_soon(self._tell_gone, peer)

    def _drop_from(self, peer: bytes, is_over: bool) -> None:
        self._ended[peer] = is_over
        if len(self._ended) > ENDED:
            del self._ended[next(iter(self._ended))]

    def relieve(self) -> None:
        """If the process has grown too heavy, end the connection to blame; to be called often."""
        is_draining = time.monotonic() - self._dropped_at < DRAINING_S
        blamed = self._scales.blame(self._connections, self._waiting, is_draining=is_draining)
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

    def _on_event(self, event: int, value: int) -> None:
        fd = value
        if former := self._connections.lose(fd):
            self._backlogs.pop(former, None)
            self._let_go(former)
        if event == zmq.EVENT_LISTENING:
            self._doors.append(fd)
        elif event == zmq.EVENT_ACCEPTED:
            accepted = self._connections.accept(fd)
            if accepted.is_surplus:
                self._loop.call_later(MUTE_S, self._connections.shut_if_mute, accepted)
            if self._connections.is_crowded and not self._are_closed:
                self._close_doors()

    def _close_doors(self) -> None:
        """Let nobody in for a moment.

        Whoever is sent away comes back at once: that costs those who are here their time, and us
        the last file, where libzmq (4.3.5) ends the process.
        """
        log.warning("nobody is let in for a moment: there are too many connections")
        self._are_closed = True
        self._loop.call_later(CLOSED_S, self._open_doors)
        for door in self._doors:
            close_door(door)

    def _open_doors(self) -> None:
        """Go on, without those that are too many; whoever is a worker has said so by now."""
        if self.closed or not self._are_closed:
            return
        self._connections.make_room()
        for door in self._doors:
            open_door(door)
        self._are_closed = False

    def _let_go(self, peer: bytes) -> None:
        """Its connection is over; what it sent before is read first."""
        if peer not in self._leaving:
            self._leaving.add(peer)
            self._loop.call_later(GONE_S, self._tell_gone, peer)

    def _tell_gone(self, peer: bytes) -> None:
        self._leaving.discard(peer)
        self._connections.forget(peer)
        if peer not in self._ended:  # there may be millions of messages
            self._drop_from(peer, True)
        if not self.closed:
            self._on_gone(peer)

    def _meet(self, peer: bytes, frame: zmq.Frame) -> tuple[str, str]:
        """Find the connection of a peer that has none yet; return its origin and its user."""
        self._drain_monitor()
        user = user_of(frame)
        origin = user or str(frame.get("Peer-Address"))
        is_open = self._connections.meet(peer, int(frame.get(zmq.SRCFD)), origin, user)
        if not is_open:
            self._dropped_at = time.monotonic()
            if peer not in self._ended:
                self._let_go(peer)
        return origin, user

    def _receive(self) -> None:
        self._receive_from(self._socket.recv(zmq.NOBLOCK))

    def _receive_from(self, peer: bytes) -> None:
        """Take the rest of a message from `peer`."""
        if connection := self._connections.of(peer):
            origin, user = connection.origin, connection.user
            frame = self._socket.recv(zmq.NOBLOCK)
            self._connections.heard(connection, len(frame))
        elif self._ended.get(peer):
            self._drop()
            return
        else:
            first = self._socket.recv(zmq.NOBLOCK, copy=False)
            (origin, user), frame = self._meet(peer, first), first.bytes
        rest = self._rest(self._socket.getsockopt(zmq.RCVMORE))
        if peer in self._ended:
            self._ended[peer] = self._connections.end(peer)
            return
        message = None
        try:
            if rest:
                raise ProtocolError(f"a message of {rest + 1} frames instead of one")
            message = decode(frame)
            if user:
                self._check_right(peer, user, message)
            if isinstance(message, Hello) or self._connections.admit(peer):
                self._on_message(peer, message)  # a worker may always join
            else:
                self._refuse(peer, message)
        except ProtocolError as exc:
            log.warning("dropped: %s", exc)
            if message is None and self._connections.is_worker(peer):
                log.warning("a connection ends: what its worker has said may be waited for")
                self.end(peer)
            elif not self._patience.spend(origin):
                log.warning("a connection ends: too many bad frames came from its origin")
                self.end(peer)

    def _check_right(self, peer: bytes, user: str, message: Message) -> None:
        """Raise ProtocolError, and tell the peer, if its key's role may not say this."""
        role = user.partition(" ")[0]
        if is_allowed(role, message):
            return
        reason, call = forbidden(role, message), getattr(message, "call", None)
        with suppress(PeerGone):
            if isinstance(message, Hello):
                self.send(peer, Refused(NotAllowed.code, reason))
            elif call is not None:
                self.send(peer, Failed(call, NotAllowed.code, reason))
        raise ProtocolError(reason)

    def _drop(self) -> None:
        """Drop what connections that were ended have left, much at once: it may be millions."""
        self._dropped_at = time.monotonic()
        for _ in range(DROPPED):
            self._rest(more=True)  # behind its peer
            peer = self._socket.recv(zmq.NOBLOCK)
            if not self._ended.get(peer):
                self._receive_from(peer)
                return
        self._rest(more=True)

    def _on_burst(self) -> None:
        if not self.closed:
            self.relieve()

    def _refuse(self, peer: bytes, message: Message) -> None:
        reason = f"there are {self._connections.most} connections already"
        with suppress(PeerGone):
            self.send(peer, Failed(getattr(message, "call", 0), Overloaded.code, reason))
        self._loop.call_later(0.1, self.end, peer)  # the answer needs a moment to leave


def user_of(frame: zmq.Frame) -> str:
    """The role and the key that our doorman let in; "" where nobody had to ask it."""
    try:
        return str(frame.get("User-Id"))
    except zmq.ZMQError:
        return ""
