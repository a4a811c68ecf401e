"""This machine's processor, as the kernel describes it in /proc/cpuinfo."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


def fields() -> dict[str, str]:
    """What the kernel says of the first core, by name; names differ from maker to maker."""
    found: dict[str, str] = {}
    with suppress(OSError):
        for line in CPUINFO.read_text().splitlines():
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    return found


def name() -> str:
    """The name of its model, or of its architecture if the kernel names no model."""
    return fields().get("model name") or platform.machine()


def instructions() -> frozenset[str]:
    """The instruction sets that it has beside the usual ones, such as "avx2"."""
    found = fields()
    return frozenset((found.get("flags") or found.get("Features", "")).split())


def kind() -> list[str]:
    """Its model and its instruction sets: processors with the same are taken to be as fast."""
    found = fields()
    return [found.get(name, "") for name in ("model name", "flags", "Features")]
