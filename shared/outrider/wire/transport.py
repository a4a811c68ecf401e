"""Typed messages over ZeroMQ: one ROUTER (`Router`) that the coordinator binds, and the DEALERs
(`Link`) that workers and clients connect.

Both call their handler for each message, in order, on the event loop. They never wait: a send that
would block fails, so no queue grows without bound. The ROUTER gives every connection an id of its
own; no identity is set, so nobody can steal one. Sending to a connection that is gone raises
`PeerGone`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from outrider.errors import ConfigError, ConnectionFailed, ProtocolError
from outrider.wire.codec import decode, encode
from outrider.wire.messages import FRAME_LIMIT, Message

log = logging.getLogger(__name__)

BURST = 64  # messages handled before other tasks get their turn
OPTIONS = {
    zmq.LINGER: 0,
    zmq.IMMEDIATE: 1,  # nothing is queued for a peer that is not there
    zmq.MAXMSGSIZE: FRAME_LIMIT,
    zmq.HANDSHAKE_IVL: 2000,
    zmq.HEARTBEAT_IVL: 200,
    zmq.HEARTBEAT_TIMEOUT: 600,
    zmq.HEARTBEAT_TTL: 600,
    zmq.CONNECT_TIMEOUT: 500,
    zmq.RECONNECT_IVL: 50,
    zmq.RECONNECT_IVL_MAX: 1000,
    zmq.SNDHWM: 1000,
    zmq.RCVHWM: 1000,
}


class PeerGone(Exception):
    """The connection is gone, or its peer has stopped reading."""


class _Endpoint:
    """A socket on the event loop, read whenever ZeroMQ's edge-triggered descriptor says so."""

    def __init__(self, kind: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._context = zmq.Context(io_threads=1)
        self._socket: zmq.Socket[bytes] = self._context.socket(kind)
        for option, value in OPTIONS.items():
            self._socket.setsockopt(option, value)
        self._fd = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self._drain)
        self.closed = False

    def _send(self, frames: list[bytes]) -> None:
        try:
            self._socket.send_multipart(frames, zmq.NOBLOCK)
        except zmq.ZMQError as exc:
            raise PeerGone(exc.strerror) from exc
        finally:
            # sending may swallow the edge that announces a message: look for one
            if not self.closed and int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
                self._loop.call_soon(self._drain)

    def _resolve(self, address: str) -> None:
        """Let the next address be one of IPv6, `tcp://[::1]:5701`; others stay as they were."""
        self._socket.setsockopt(zmq.IPV6, int("[" in address))

    def _drain(self) -> None:
        for _ in range(BURST):
            if self.closed:
                return
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._receive(frames)
        self._loop.call_soon(self._drain)

    def _receive(self, frames: list[bytes]) -> None:
        raise NotImplementedError

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        if not self._loop.is_closed():
            self._loop.remove_reader(self._fd)
        self._socket.close(linger=0)
        self._context.term()


class Router(_Endpoint):
    """The coordinator's socket; peers are named by the bytes of their connection id."""

    def __init__(
        self,
        on_message: Callable[[bytes, Message], None],
        on_bad_frame: Callable[[bytes, ProtocolError], None],
        on_disconnect: Callable[[], None],
    ) -> None:
        super().__init__(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._on_message, self._on_bad_frame = on_message, on_bad_frame
        self._on_disconnect = on_disconnect
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._monitor_fd = int(self._monitor.getsockopt(zmq.FD))
        self._loop.add_reader(self._monitor_fd, self._drain_monitor)
        self._loop.call_soon(self._drain_monitor)  # until it was found empty, ZeroMQ wakes nobody
        self.addresses: list[str] = []

    def bind(self, address: str) -> str:
        """Bind; return the address for clients, with its real port. Raises ConfigError."""
        self._resolve(address)
        try:
            self._socket.bind(address)
        except zmq.ZMQError as exc:
            raise ConfigError(f"cannot listen on {address}: {exc.strerror}") from exc
        bound: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self.addresses.append(bound)
        return bound

    def send(self, peer: bytes, message: Message) -> None:
        """Send now. Raises PeerGone, or ProtocolError for a message that is too long."""
        self._send([peer, encode(message)])

    def _receive(self, frames: list[bytes]) -> None:
        try:
            if len(frames) != 2:
                raise ProtocolError(f"a message of {len(frames) - 1} frames instead of one")
            message = decode(frames[1])
        except ProtocolError as exc:
            self._on_bad_frame(frames[0], exc)
            return
        self._on_message(frames[0], message)

    def _drain_monitor(self) -> None:
        while not self.closed:
            try:
                parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))
            except zmq.Again:
                return
            # the ROUTER forgets the connection at about the same time: look a moment later
            self._loop.call_later(0.002, self._on_disconnect)

    def close(self) -> None:
        if not self.closed:
            self._loop.remove_reader(self._monitor_fd)
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
        super().close()


class Link(_Endpoint):
    """A worker's or client's connection to the coordinator; it reconnects by itself.

    Raises ConnectionFailed for something that is no address.
    """

    def __init__(self, address: str, on_message: Callable[[Message], None]) -> None:
        super().__init__(zmq.DEALER)
        self._on_message = on_message
        self._resolve(address)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as exc:
            self.close()
            raise ConnectionFailed(f"{address!r} is not an address: {exc.strerror}") from exc

    def send(self, message: Message) -> None:
        """Send now. Raises PeerGone while there is no connection, else as `Router.send`."""
        self._send([encode(message)])

    def _receive(self, frames: list[bytes]) -> None:
        try:
            message = decode(frames[-1])
        except ProtocolError as exc:
            log.warning("dropped: %s", exc)
            return
        self._on_message(message)


def runtime_dir() -> Path:
    """The user's own directory for sockets (mode 0700, which is what keeps others out).

    Raises ConfigError where there cannot be one.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(base) / "outrider" if base else Path(f"/tmp/outrider-{os.getuid()}")
    try:
        for missing in reversed([one for one in (path, *path.parents) if not one.exists()]):
            missing.mkdir(mode=0o700, exist_ok=True)  # `parents=True` would leave them to the umask
        status = path.lstat()
    except OSError as exc:
        raise ConfigError(
            f"there can be no directory {path}: {exc.strerror}; set XDG_RUNTIME_DIR to one of yours"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ConfigError(f"{path} must be a directory that only its owner can enter (chmod 700)")
    return path


def socket_path(name: str) -> Path:
    """Where the pipeline `name` listens. Raises ConfigError for a name that cannot be one."""
    if not name or not all(c.isalnum() or c in "-_." for c in name) or name.startswith("."):
        raise ConfigError(f"{name!r} cannot name a pipeline: use letters, digits, '-', '_' and '.'")
    path = runtime_dir() / f"{name}.sock"
    if len(bytes(path)) > 100:  # the kernel's limit is 107
        raise ConfigError(
            f"the socket path {path} is too long; set XDG_RUNTIME_DIR to a shorter one"
        )
    return path


def address_of(pipeline: str) -> str:
    """The ZeroMQ address of a pipeline given by name or by address."""
    return pipeline if "://" in pipeline else f"ipc://{socket_path(pipeline)}"


def check_exposure(address: str, insecure: tuple[str, ...]) -> None:
    """Raise ConfigError for an address open to other machines, unless it is in `insecure`."""
    if address.startswith("ipc://") or address in insecure:
        return
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = host == "localhost"
    if not local:
        raise ConfigError(
            f"{address} is open to the network and has no authentication: listen on loopback and "
            f"reach it through ssh -L, or say --insecure {address}"
        )
