"""Who may ask: API keys, the names by which this machine is called, and other sites' pages."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import urlsplit

from outrider.errors import ConfigError
from outrider_services.gateway.errors import Refused
from outrider_services.gateway.page import FILES
from outrider_services.table import ServerOptions

OPEN = ("/health", "/v1/health", *FILES)  # for whoever watches over the service, and the page
KEYS_LIMIT = 1 << 20  # bytes of a file of keys
LONGEST = 1024  # characters of a key

Headers: TypeAlias = Iterable[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Rules:
    """What a request must show; `keys` are digests, so that none lies around."""

    keys: tuple[bytes, ...] = ()
    hosts: frozenset[str] = frozenset()
    origins: frozenset[str] = frozenset()

    @classmethod
    def of(cls, server: ServerOptions) -> Rules:
        """Raises ConfigError for keys that cannot be read, or that others can read."""
        keys = [*server.api_key, *(read_keys(server.api_key_file) if server.api_key_file else ())]
        if any(not key.isascii() or not key.isprintable() or len(key) > LONGEST for key in keys):
            raise ConfigError("an API key must be of printable ASCII characters, 1024 at most")
        return cls(
            keys=tuple(digest(key.encode()) for key in keys if key),
            hosts=frozenset(name.lower() for name in (server.host, *server.allow_host)),
            origins=frozenset(server.allow_origin),
        )

    def check(self, path: str, headers: Headers) -> str:
        """Which key the request carries, as a short digest, "" for none. Raises Refused."""
        found = {name.lower(): value for name, value in headers}
        host = found.get(b"host", b"").decode("latin-1")
        if not self.is_ours(host):
            raise Refused(
                403,
                "host_not_allowed",
                f"this service is not called {host!r:.100}; see --allow-host",
            )
        origin = found.get(b"origin", b"").decode("latin-1")
        # a page of another site cannot read the answer, but could have us compute
        if origin and origin not in self.origins and urlsplit_host(origin) != host.lower():
            raise Refused(
                403,
                "origin_not_allowed",
                f"pages from {origin!r:.100} may not ask this service; see --allow-origin",
            )
        return "" if path in OPEN or not self.keys else self.key(found)

    def key(self, headers: dict[bytes, bytes]) -> str:
        """The same for the key alone."""
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() != b"bearer":
            given = headers.get(b"x-api-key", b"")
        hashed = digest(given.strip())
        # each is compared, whichever is equal: the time tells nothing
        if not any([hmac.compare_digest(hashed, one) for one in self.keys]):
            raise Refused(
                401,
                "invalid_api_key",
                "a key is needed that this service knows: Authorization: Bearer KEY",
            )
        return hashed.hex()[:16]

    def is_ours(self, host: str) -> bool:
        """Whether a Host header names this machine; an address always does, unlike a name.

        A page that has its own name point here (DNS rebinding) is known by that name.
        """
        name = hostname(host)
        return name in self.hosts or name == "localhost" or is_address(name)


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def hostname(host: str) -> str:
    """Without a port, in small letters."""
    name = host.lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0].removesuffix(".")


def urlsplit_host(origin: str) -> str:
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def check_exposure(server: ServerOptions, rules: Rules) -> None:
    """Raise ConfigError for an address that others reach, where nobody asks for a key."""
    if not is_loopback(server.host) and not rules.keys:
        raise ConfigError(
            f"--host {server.host} lets other machines ask: name a file of keys by --api-key-file"
        )


def read_keys(name: str) -> list[str]:
    """The keys in a file, one a line. Raises ConfigError."""
    path = Path(name).expanduser()
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            text = file.read(KEYS_LIMIT).decode()
    except OSError as exc:
        raise ConfigError(f"cannot read the API keys in {path}: {exc.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"the API keys in {path} are not text") from None
    if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o077 or status.st_uid != os.getuid():
        raise ConfigError(f"only its owner may read the API keys in {path} (chmod 600)")
    keys = [line.strip() for line in text.splitlines()]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ConfigError(f"there is no API key in {path}")
    return keys
