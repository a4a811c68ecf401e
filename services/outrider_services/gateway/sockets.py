"""The socket on which HTTP is taken."""

from __future__ import annotations

import errno
import socket

from outrider.errors import ConfigError
from outrider_services.gateway.access import Rules, check_exposure
from outrider_services.options import ServerOptions

BACKLOG = 128
UNREAD = 128 << 10  # bytes that the kernel keeps for a client: one that does not read is noticed


def listen(server: ServerOptions) -> socket.socket:
    """A socket that listens as `server` says. Raises ConfigError where it cannot or must not."""
    check_exposure(server, Rules.of(server))
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


def url_of(listener: socket.socket) -> str:
    """The URL that reaches it."""
    host, port = listener.getsockname()[:2]
    return url(host, port)


def url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
