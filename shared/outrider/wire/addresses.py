"""Where sockets lie: names of pipelines, their addresses, and who can reach those."""

from __future__ import annotations

import ipaddress
import os
import socket
import stat
from pathlib import Path

from outrider.errors import ConfigError
from outrider.wire.doors import AWAY


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


def remove_socket(path: Path) -> None:
    """Remove what a dead coordinator has left, its name also where that was just put aside."""
    for one in (path, Path(f"{path}{AWAY}")):
        one.unlink(missing_ok=True)


def address_of(pipeline: str) -> str:
    """The ZeroMQ address of a pipeline given by name or by address."""
    return pipeline if "://" in pipeline else f"ipc://{socket_path(pipeline)}"


def is_answered(path: str) -> bool:
    """Whether somebody listens at this Unix socket; ZeroMQ would take it from them in silence."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except (OSError, ValueError):
            return False
        return True


def is_local(address: str) -> bool:
    """Whether only this machine reaches what listens at this tcp:// address."""
    host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
