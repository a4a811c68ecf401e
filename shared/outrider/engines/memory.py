"""How much memory is left: of the machine, and of what containers and services are allowed.

The kernel kills a process that exceeds the limit of its control group, without a word. So the
limits of that group and of all around it are read, in both versions of the interface.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import psutil


class Names(NamedTuple):
    """The files of a group, and the keys of its pages of files in `memory.stat`."""

    limit: str
    used: str
    files: tuple[str, str]


# by the type of the file system
INTERFACES = {
    "cgroup2": Names("memory.max", "memory.current", ("inactive_file", "active_file")),
    "cgroup": Names(
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_inactive_file", "total_active_file"),
    ),
}


def available_memory(root: Path = Path("/")) -> int:
    """Bytes that this process can still take; `root` is where /proc and /sys are looked for."""
    return min([int(psutil.virtual_memory().available), *_left(root)])


def _left(root: Path) -> Iterator[int]:
    """The bytes that each limit leaves, from our own group to the outermost that can be seen."""
    for names, group, top in _groups(root):
        for place in (group, *group.parents):
            with suppress(OSError, ValueError):  # there is none, or it says "max"
                limit = int((place / names.limit).read_text())
                used = int((place / names.used).read_text())
                stat = (line.split() for line in (place / "memory.stat").read_text().splitlines())
                # the kernel gives these up before it kills
                files = sum(int(value) for key, value in stat if key in names.files)
                yield max(0, limit - used + files)
            if place == top:
                break


def _groups(root: Path) -> Iterator[tuple[Names, Path, Path]]:
    """Our own group and the outermost one, as directories, of each interface that is mounted."""
    with suppress(OSError, ValueError):
        own: dict[str, str] = {}
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers or "memory" in controllers.split(","):
                own["cgroup" if controllers else "cgroup2"] = path
        for line in (root / "proc/self/mountinfo").read_text().splitlines():
            place, _, system = line.partition(" - ")
            kind, _, options = system.split(" ", 2)
            if kind in own and (kind == "cgroup2" or "memory" in options.split(",")):
                inside, mounted = place.split()[3:5]
                top = root / mounted.lstrip("/")
                yield INTERFACES[kind], top / _below(own[kind], inside), top


def _below(path: str, inside: str) -> PurePosixPath:
    """`path` as it is seen where only what lies `inside` is mounted; the mount itself if it is not.

    In a container the two are often equal; in a namespace of its own the path may begin with `..`.
    """
    group = PurePosixPath(path)
    is_below = group.is_relative_to(inside) and ".." not in group.parts
    return group.relative_to(inside) if is_below else PurePosixPath()
