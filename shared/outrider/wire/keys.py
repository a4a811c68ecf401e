"""The keys of links beyond this machine: CURVE, which encrypts, and proves both sides.

A directory that only its owner can enter has one secret key a role, in `ROLE.key`, and in `trusted`
the public keys of others, a line each: a role, the key, and whatever helps to recognise it. Who
listens is the coordinator; who connects has the role that its key has in the coordinator's list.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeAlias, cast

import platformdirs
import zmq
from zmq.utils import z85

from outrider.errors import ConfigError, ConnectionFailed
from outrider.wire.addresses import is_local
from outrider.wire.rights import KEY_ROLES, KeyRole

Holder: TypeAlias = Literal["coordinator", "client", "admin", "draft", "target"]
HOLDERS: tuple[Holder, ...] = ("coordinator", *KEY_ROLES)
ClientRole: TypeAlias = Literal["client", "admin"]
Keys: TypeAlias = str | os.PathLike[str] | None  # a directory; None: the usual one

VARIABLE = "OUTRIDER_LINKS__KEYS"  # names the directory
SIZE = 32  # bytes of a key
LIMIT = 1 << 18  # bytes of a file of ours
LOCK_S = 5.0  # most that another may take to change the list
SECRET = "secret"  # what a secret key's line begins with: nobody takes it for a public one


@dataclass(frozen=True, slots=True)
class KeyPair:
    public: bytes
    secret: bytes = field(repr=False)

    @classmethod
    def random(cls) -> KeyPair:
        return cls(*map(z85.decode, zmq.curve_keypair()))

    @classmethod
    def of(cls, secret: bytes) -> KeyPair:
        return cls(z85.decode(zmq.curve_public(z85.encode(secret))), secret)


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a link beyond this machine needs: keys of our own, and the coordinator's public one."""

    own: KeyPair
    coordinator: bytes


@dataclass(frozen=True, slots=True)
class Trusted:
    """A public key of somebody else, and who that is."""

    holder: Holder
    public: bytes
    remarks: tuple[str, ...] = ()  # where the key was made; of a coordinator, its address perhaps

    @property
    def address(self) -> str:
        """Where this coordinator is; "": wherever no other is known to be."""
        return next((one for one in self.remarks if "://" in one), "")

    @property
    def line(self) -> str:
        return " ".join((self.holder, self.public.hex(), *self.remarks))

    @classmethod
    def of(cls, line: str) -> Trusted:
        """Raises ValueError, which does not repeat the line: it may be a secret."""
        holder, key, *remarks = (*line.split(), "", "")
        if holder not in HOLDERS:
            raise ValueError(f"it begins with none of {', '.join(HOLDERS)}")
        with suppress(ValueError):
            public = bytes.fromhex(key)
            if len(public) == SIZE:
                shown = tuple(one[:256] for one in remarks if one and one.isascii())
                return cls(holder, public, tuple(filter(str.isprintable, shown))[:8])
        raise ValueError(f"what follows {holder} is not {2 * SIZE} hexadecimal digits")


def trusted_in(text: str) -> tuple[Trusted, ...]:
    """The public keys in `text`, a line each. Raises ConfigError for a line that has none."""
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip() and not line.lstrip().startswith("#"):
            try:
                found.append(Trusted.of(line))
            except ValueError as exc:
                raise ConfigError(f"line {number} is not a public key: {exc}") from None
    return tuple(found)


class Keyring:
    """The directory of keys at `directory`; the usual one without. Nothing is read before need.

    Every method may raise ConfigError: for what is not there, and for what others can read.
    """

    def __init__(self, directory: Keys = None) -> None:
        named = directory or os.environ.get(VARIABLE)
        usual = platformdirs.user_config_path("outrider") / "curve"
        self.directory = Path(os.path.expanduser(named)) if named else usual
        self._known: tuple[object, dict[bytes, KeyRole]] = (None, {})

    # ---- our own --------------------------------------------------------------------------------

    def has(self, holder: Holder) -> bool:
        return os.path.exists(self._path(holder))

    def make(self, holder: Holder) -> KeyPair:
        """A new secret key, for which there must be none yet."""
        pair = KeyPair.random()
        self._write(self._path(holder), f"{SECRET} {pair.secret.hex()}\n", os.O_EXCL)
        return pair

    def pair(self, holder: Holder) -> KeyPair:
        """Our keys as `holder`."""
        path = self._path(holder)
        if not self.has(holder):
            raise ConfigError(
                f"there is no key of the role {holder} in {self.directory}: "
                f"`outrider keys new {holder}` makes one"
            )
        word, _, key = self._read(path).strip().partition(" ")
        with suppress(ValueError):
            secret = bytes.fromhex(key)
            if word == SECRET and len(secret) == SIZE:
                return KeyPair.of(secret)
        raise ConfigError(f"{path} is not a key of outrider's: remove it, and make another")

    def own(self, holder: Holder) -> Trusted:
        """What others are to trust: our public key as `holder`."""
        return Trusted(holder, self.pair(holder).public, (socket.gethostname(),))

    # ---- others' --------------------------------------------------------------------------------

    @property
    def _list(self) -> Path:
        return self.directory / "trusted"

    def trusted(self) -> tuple[Trusted, ...]:
        """Whom we trust."""
        if not os.path.exists(self._list):
            return ()
        try:
            return trusted_in(self._read(self._list))
        except ConfigError as exc:
            raise ConfigError(f"{self._list}: {exc}") from None

    def trust(self, new: Iterable[Trusted]) -> None:
        """Trust these, too. A coordinator takes the place of a former one of its machine."""
        self._write(self.directory / "lock", "", os.O_TRUNC)
        with open(self.directory / "lock") as lock, locked(lock.fileno()):
            kept = {self._place_of(one): one for one in self.trusted()}
            for one in new:
                roles = {other.holder for other in kept.values() if other.public == one.public}
                if roles - {one.holder}:
                    raise ConfigError(f"this key is trusted as {min(roles)} already")
                kept[self._place_of(one)] = one
            fresh = self.directory / "trusted.new"
            self._write(fresh, "".join(f"{one.line}\n" for one in kept.values()), os.O_TRUNC)
            fresh.replace(self._list)

    @staticmethod
    def _place_of(one: Trusted) -> object:
        return one.remarks if one.holder == "coordinator" else one.public

    def role_of(self, public: bytes) -> KeyRole | None:
        """The role in which this key may connect; what the list says now counts. None: in none."""
        try:
            around, status = self.directory.stat(), self._list.stat()
        except OSError:
            return None
        state = (status.st_mtime_ns, status.st_ino, status.st_size, status.st_mode, around.st_mode)
        if self._known[0] != state:
            peers = [one for one in self.trusted() if one.holder != "coordinator"]
            self._known = state, {one.public: cast(KeyRole, one.holder) for one in peers}
        return self._known[1].get(public)

    def coordinator(self, address: str) -> bytes:
        """The public key of the coordinator at `address`."""
        known = [one for one in self.trusted() if one.holder == "coordinator"]
        found = {one.public for one in known if one.address == address}
        found = found or {one.public for one in known if not one.address}
        if not found:
            raise ConfigError(
                f"no coordinator is trusted for {address}: give what `outrider keys show "
                "coordinator` prints there to `outrider keys trust` here"
            )
        if len(found) > 1:
            raise ConfigError(
                f"several coordinators are trusted, and none of them for {address}: "
                f"say which by `outrider keys trust --at {address}`"
            )
        return found.pop()

    def check_listening(self) -> None:
        """Raise ConfigError unless a coordinator can prove itself, and knows somebody."""
        self.pair("coordinator")
        if not any(one.holder != "coordinator" for one in self.trusted()):
            raise ConfigError(
                f"no key is trusted in {self.directory}, so nobody could connect: give what "
                "`outrider keys new ROLE` prints elsewhere to `outrider keys trust` here"
            )

    # ---- files ----------------------------------------------------------------------------------

    def _path(self, holder: Holder) -> Path:
        return self.directory / f"{holder}.key"

    def _read(self, path: Path) -> str:
        """The text of a file that nobody else can read or change."""
        try:
            self._check(self.directory.stat(), self.directory, "700")
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                self._check(os.fstat(fd), path, "600")
                return file.read(LIMIT).decode("ascii")
        except OSError as exc:
            raise ConfigError(f"cannot read {path}: {exc.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path} is not a file of keys") from None

    def _check(self, status: os.stat_result, path: Path, mode: str) -> None:
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise ConfigError(
                f"only its owner may read {path}: `chmod {mode} {path}`, and make new keys if "
                "somebody else has read it"
            )
        if not (stat.S_ISDIR if mode == "700" else stat.S_ISREG)(status.st_mode):
            raise ConfigError(f"{path} is not a {'directory' if mode == '700' else 'file'} of keys")

    def _write(self, path: Path, text: str, how: int) -> None:
        try:
            self.directory.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.mkdir(mode=0o700, exist_ok=True)
            self._check(self.directory.stat(), self.directory, "700")
            flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how
            with open(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
                file.write(text)
        except OSError as exc:
            raise ConfigError(f"cannot write {path}: {exc.strerror}") from None


@contextmanager
def locked(fd: int) -> Iterator[None]:
    """Meanwhile nobody else changes the list. Raises ConfigError if somebody does for long."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ConfigError("somebody else changes the list of trusted keys") from None
            time.sleep(0.02)
    try:
        yield
    finally:
        fcntl.flock(fd, fcntl.LOCK_UN)


def needs_keys(address: str, keys: Keys = None, *, insecure: bool = False) -> bool:
    """Whether the link at `address` is to have keys. Raises ConfigError for what is no address.

    Beyond this machine it is, unless `insecure`; on this machine it is if a directory is named.
    """
    if address.startswith("ipc://") or insecure:
        return False
    if not address.startswith("tcp://"):
        raise ConfigError(f"{address!r} is no address of a pipeline: use tcp:// or ipc://")
    return not is_local(address) or bool(keys or os.environ.get(VARIABLE))


def credentials(
    address: str, role: KeyRole, keys: Keys = None, *, insecure: bool = False
) -> Credentials | None:
    """What a link to `address` needs to speak as `role`; None where no keys are needed.

    Raises ConfigError where they are needed and not there, ConnectionFailed for no address.
    """
    if role not in KEY_ROLES:
        raise ConfigError(f"{role!r} is no role of a key: there are {', '.join(KEY_ROLES)}")
    if not address.startswith(("ipc://", "tcp://")):
        raise ConnectionFailed(f"{address!r} is not an address: use tcp:// or ipc://")
    if not needs_keys(address, keys, insecure=insecure):
        return None
    ring = Keyring(keys)
    return Credentials(ring.pair(role), ring.coordinator(address))
