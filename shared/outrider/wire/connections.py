"""What is known of connections: descriptors, origins, bad frames, what waits and what weighs.

ZeroMQ owns the descriptors, and tells of each that it has accepted or lost. It has no call that
ends one connection; but one that is shut down here is found broken by its thread, which cleans up.
"""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import sys
import termios
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf

import psutil

from outrider.errors import ConnectionFailed
from outrider.wire.doors import borrowed

MOST = 4096  # connections, or a quarter of what there may be of open files besides our own
OURS = 64  # files that the process has open itself
SPARE_FILES = 16  # that a context and a socket hold open, and a few more
SPARE = 64  # connections beyond that, which are told so; of more the oldest ends
BAD_FRAMES = 8  # that an origin may send at first; one more each second
ORIGINS = 1024  # whose bad frames are remembered
UNSURE_S = 0.25  # so long a message may be on its way from a connection that has ended
HEAVY = 128 << 20  # bytes by which the process may grow before a connection must end
SUSPECT = 64 << 10  # bytes on their way from which on a connection may be the one
MESSAGE = 64  # bytes that ZeroMQ holds a message in
FRAMING = 9  # bytes around each frame on its way, at most
SEAL = 64  # bytes by which encryption makes a frame longer, at most
RECEIVED = slice(128, 136)  # where Linux tells what a TCP connection has received, in `tcp_info`


@dataclass(slots=True)
class Connection:
    """One that ZeroMQ has accepted; `peer` is None until it has sent something."""

    fd: int
    is_surplus: bool
    is_worker: bool = False
    peer: bytes | None = None
    is_mute: bool = True
    is_shut: bool = False
    origin: str = ""
    user: str = ""  # the role of its key, and the key; "": it came by a way that has none
    traffic: int = 0  # bytes that were read since somebody looked
    read: int = 0  # bytes of whole messages, and what ZeroMQ puts around them, at most
    spoke: float = 0.0  # when the last one came


class Connections:
    """Those that are open now."""

    def __init__(
        self, most: int | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        # libzmq accepts faster than anybody here can see, and where it runs out of files it aborts
        self.most = min(MOST, (files - OURS) // 4) if most is None else most
        self._clock = clock
        self._unmet_at: dict[int, float] = {}  # when a connection ended that had said nothing yet
        self._by_fd: dict[int, Connection] = {}
        self._by_peer: dict[bytes, Connection] = {}
        self._workers: set[bytes] = set()
        self._unsure: dict[bytes, Connection] = {}  # whose this may be, the last of them
        self._over: dict[bytes, None] = {}  # peers whose connections are, the last of them

    def __len__(self) -> int:
        return len(self._by_fd)

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._by_fd.values())

    def of(self, peer: bytes) -> Connection | None:
        return self._by_peer.get(peer)

    def accept(self, fd: int) -> Connection:
        """It is open. If it is one too many it may stay until it is told so.

        Far beyond that the oldest of those ends: a worker that comes now must be able to say so.
        """
        now = self._clock()
        found = self._by_fd[fd] = Connection(fd, is_surplus=len(self) >= self.most, spoke=now)
        if self.is_crowded:
            oldest = next(self._surplus(), found)
            oldest.is_shut = True
            shut(oldest.fd)
        return found

    def _surplus(self) -> Iterator[Connection]:
        """Those that are too many, the oldest first."""
        for one in self:
            if one.is_surplus and not (one.is_worker or one.is_shut):
                yield one

    @property
    def is_crowded(self) -> bool:
        """Whether some of those that are too many must end before they can be told so."""
        return len(self) > self.most + SPARE

    def make_room(self) -> None:
        """End those that are too many, but no workers."""
        for one in self._surplus():
            one.is_shut = True
            shut(one.fd)

    def meet(self, peer: bytes, fd: int, origin: str, user: str = "") -> bool:
        """`peer` has spoken, with this descriptor; False if that connection is over already.

        Where it may have been another connection, nothing is noted: it will speak again.
        """
        connection = self._by_fd.get(fd)
        if connection is None or peer in self._over:
            return False
        connection.is_mute = False
        if connection.peer is None and self._clock() - self._unmet_at.get(fd, -inf) > UNSURE_S:
            connection.peer, connection.origin, connection.user = peer, origin, user
            connection.is_worker = peer in self._workers
            self._by_peer[peer] = connection
            self._unsure.pop(peer, None)
        elif connection.peer is None:
            self._unsure[peer] = connection
            if len(self._unsure) > SPARE:
                del self._unsure[next(iter(self._unsure))]
        return True

    def heard(self, connection: Connection, size: int) -> None:
        """A message of so many bytes was read from it."""
        connection.traffic += size + MESSAGE
        connection.read += size + FRAMING + (SEAL if connection.user else 0)
        connection.spoke = self._clock()

    def trust(self, peer: bytes) -> None:
        """It is a worker, and always has room."""
        self._workers.add(peer)
        if connection := self.of(peer) or self._unsure.get(peer):
            connection.is_worker = True

    def is_worker(self, peer: bytes) -> bool:
        return peer in self._workers

    def forget(self, peer: bytes) -> None:
        """Everybody has been told that it is gone."""
        self._workers.discard(peer)

    def admit(self, peer: bytes) -> bool:
        """False if it is one too many, still. Whoever was let in once stays."""
        connection = self._by_peer.get(peer)
        if connection is None or connection.is_worker:
            return True
        if connection.is_surplus and len(self) > self.most:
            return False
        connection.is_surplus = False
        return True

    def lose(self, fd: int) -> bytes | None:
        """It is over; return its peer, if that has spoken."""
        connection = self._by_fd.pop(fd, None)
        if connection is None:
            return None
        if connection.peer is None:
            self._unmet_at[fd] = self._clock()
            return None
        self._over[connection.peer] = None
        if len(self._over) > MOST:
            del self._over[next(iter(self._over))]
        return connection.peer if self._by_peer.pop(connection.peer, None) else None

    def end(self, peer: bytes) -> bool:
        """End the connection and forget its peer; False if it has not been met yet."""
        connection = self._by_peer.pop(peer, None)
        if connection is None:
            return peer in self._over
        shut(connection.fd)
        return True

    def shut_if_mute(self, connection: Connection) -> None:
        """End the connection if it has not said anything."""
        if connection.is_mute and self._by_fd.get(connection.fd) is connection:
            shut(connection.fd)


@dataclass(slots=True)
class Backlog:
    """Frames that wait for a peer, the oldest first."""

    frames: deque[bytes] = field(default_factory=deque)
    size: int = 0  # bytes

    def append(self, frame: bytes) -> None:
        self.frames.append(frame)
        self.size += len(frame)

    def popleft(self) -> None:
        self.size -= len(self.frames.popleft())


class Patience:
    """How many bad frames each origin may still send; reconnecting does not change it.

    An origin is a process on this machine, or another machine.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._left: dict[str, tuple[float, float]] = {}  # bad frames left, and when that was so

    def spend(self, origin: str) -> bool:
        """Count one; False if it is one too many."""
        now = self._clock()
        left, when = self._left.pop(origin, (float(BAD_FRAMES), now))
        left = min(left + now - when, float(BAD_FRAMES))
        if len(self._left) >= ORIGINS:
            self._left.pop(next(iter(self._left)))
        self._left[origin] = max(left - 1.0, 0.0), now
        return left >= 1.0


class Scales:
    """Tells which connection makes the process heavy.

    ZeroMQ takes in a message of many frames whole, before anybody sees it, and does not tell how
    many bytes it holds for whom. The one to blame is where most is on its way: unread on either
    side, read just now, or received and not read yet, which only TCP tells. If it is none of those,
    what was taken may be nobody's fault, but only once: then it is the one that has been silent
    for longest, of those that are no workers.
    """

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._light = self._process.memory_info().rss  # what is nobody's fault
        self._most = self._light + HEAVY  # what that may become

    def blame(
        self,
        connections: Connections,
        waiting: Callable[[bytes], int],
        *,
        is_draining: bool = False,
    ) -> Connection | None:
        """The connection that must end; `waiting` tells the bytes that wait for a peer besides.

        While it `is_draining` what ended connections have left, that may be what weighs.
        """
        try:
            size = self._process.memory_info().rss
        except OSError:  # there is no file left to ask with
            return None
        is_heavy = size - self._light >= HEAVY
        others = [one for one in connections if not one.is_worker] if is_heavy else []

        def weight(one: Connection) -> int:
            bytes_waiting = waiting(one.peer) if one.peer else 0
            return one.traffic + unread(one.fd) + untold(one) + bytes_waiting

        blamed = max(others, key=weight, default=None)
        if blamed and weight(blamed) < SUSPECT:
            blamed = None
        if is_heavy and blamed is None and not is_draining:
            if self._light < self._most:
                self._light = min(size, self._most)
            else:
                blamed = min(
                    others, key=lambda one: (one.peer is not None, one.spoke), default=None
                )
        for one in connections:
            one.traffic = 0
        return blamed


def untold(connection: Connection) -> int:
    """Bytes that came over TCP and are part of no message that was read; 0 for other sockets."""
    with suppress(OSError), borrowed(connection.fd) as tcp:
        info = tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RECEIVED.stop)
        return max(0, int.from_bytes(info[RECEIVED], sys.byteorder) - connection.read)
    return 0


def unread(fd: int) -> int:
    """Bytes in the kernel that were sent over `fd` and not read yet, both ways together."""
    total = 0
    for request in (termios.FIONREAD, termios.TIOCOUTQ):
        with suppress(OSError):
            (count,) = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))
            total += count
    return total


def shut(fd: int) -> None:
    """End the connection at `fd`; if it is none, nothing happens."""
    with suppress(OSError), borrowed(fd) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def check_room() -> None:
    """Raise ConnectionFailed if no socket can be opened for want of descriptors.

    libzmq does not say so: where its own threads can open none, it ends the process.
    """
    held: list[int] = []
    try:
        while len(held) < SPARE_FILES:
            held.append(os.eventfd(0))
    except OSError as exc:
        raise ConnectionFailed(
            f"cannot open a socket: {exc.strerror}; close files, or raise the limit (ulimit -n)"
        ) from None
    finally:
        for descriptor in held:
            os.close(descriptor)
