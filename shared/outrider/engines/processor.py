"""This machine's processor, as the kernel describes it in /proc/cpuinfo."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def fields() -> dict[str, str]:
    """What is told of the first core, by name; the names differ from maker to maker."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found


def name() -> str:
    """The name of its model; where the kernel tells none, of its architecture."""
    return fields().get("model name") or platform.machine()


def instructions() -> frozenset[str]:
    """What it can do beside the usual, such as "avx2"."""
    found = fields()
    return frozenset((found.get("flags") or found.get("Features", "")).split())


def kind() -> list[str]:
    """Its model, and the instructions that it has: whoever agrees in these computes as fast."""
    found = fields()
    return [found.get(name, "") for name in ("model name", "flags", "Features")]
