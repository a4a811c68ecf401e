"""The socket on which HTTP is taken."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace

from outrider.errors import ConfigError
from outrider_services.gateway.access import Rules, check_exposure
from outrider_services.table import ServerOptions

BACKLOG = 128
UNREAD = 128 << 10  # bytes that the kernel keeps for a client: one that does not read is noticed
FIRST_FD = 3  # of those that systemd hands over


def listen(server: ServerOptions) -> socket.socket:
    """The socket that systemd has opened for us, else one that listens as `server` says.

    Raises ConfigError where it cannot listen or must not.
    """
    rules = Rules.of(server)
    if given := handed_over():
        check_exposure(replace(server, host=given.getsockname()[0]), rules)
        return given
    check_exposure(server, rules)
    try:
        found = socket.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise ConfigError(f"--host {server.host} is no address of this machine") from None
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)  # its connections' too
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as exc:
        listener.close()
        where = url(server.host, server.port)
        if exc.errno == errno.EADDRINUSE:
            raise ConfigError(
                f"port {server.port} is taken: choose another --port, or serve with --no-gateway"
            ) from None
        raise ConfigError(f"cannot listen at {where}: {exc.strerror}") from None
    listener.setblocking(False)
    return listener


def handed_over() -> socket.socket | None:
    """The one socket of our socket unit, as sd_listen_fds(3) gives it; None without such a unit.

    Raises ConfigError for more than one, and for another kind.
    """
    count = os.environ.pop("LISTEN_FDS", "")
    if os.environ.pop("LISTEN_PID", "") != str(os.getpid()):
        return None
    given = socket.socket(fileno=FIRST_FD) if count == "1" else None
    if given is None or not listens_on_tcp(given):
        raise ConfigError("the socket unit must have one ListenStream, an address of TCP")
    given.set_inheritable(False)
    given.setblocking(False)
    given.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNREAD)
    return given


def listens_on_tcp(given: socket.socket) -> bool:
    is_inet = given.family in (socket.AF_INET, socket.AF_INET6)
    return is_inet and bool(given.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def url_of(listener: socket.socket) -> str:
    """The URL that reaches it."""
    host, port = listener.getsockname()[:2]
    return url(host, port)


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
