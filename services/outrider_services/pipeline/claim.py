"""The name of a pipeline belongs to one launcher, and to the processes that it started."""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

# in the environment of what a launcher starts
TOKEN = "OUTRIDER_TOKEN"  # proves who started it
KILLED = "OUTRIDER_KILLED"  # "1": what it replaces was killed, and did not crash or hang
MEASURED = "OUTRIDER_MEASURED"  # what passes cost there, in JSON: see `worker.Measured`


class Claim:
    """A lock beside the pipeline's socket; the system lets go of it when its holders are dead.

    A child that is given `fd` holds it as well, so no successor can take the socket before the
    coordinator of a killed launcher has ended.
    """

    def __init__(self, socket: Path) -> None:
        self.fd: int | None = None
        self._path = socket.with_suffix(".lock")

    def take(self) -> bool:
        """Whether it is ours now; False if somebody holds it."""
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the last holder may have removed the very file that was opened here
            if os.path.samestat(os.fstat(fd), os.stat(self._path)):
                self.fd = fd
                return True
        os.close(fd)
        return False

    def release(self) -> None:
        """Let go of it, if it is ours."""
        if self.fd is not None:
            self._path.unlink(missing_ok=True)
            os.close(self.fd)
            self.fd = None
