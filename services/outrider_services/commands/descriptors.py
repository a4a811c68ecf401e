"""How many files and sockets this process, and those that it starts, may hold open."""

from __future__ import annotations

import resource
from contextlib import suppress

from outrider.errors import ConfigError

LEAST = 256  # two workers, a coordinator with some clients, or a launcher
MOST = 65536  # some systems allow 10^9, and tables are as long


def raise_limit() -> None:
    """Raise the soft limit to the hard one, or to `MOST`. Raises ConfigError if it is too low."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (MOST if limit == resource.RLIM_INFINITY else limit for limit in limits)
    wanted = min(hard, MOST)
    if soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
            soft = wanted
    if soft < LEAST:
        raise ConfigError(
            f"this process may hold {soft} files open at once, and needs {LEAST}: "
            "raise the limit (ulimit -n)"
        )
