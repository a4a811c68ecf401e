"""What limits of control groups leave, read from made-up trees of /proc and /sys."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from outrider.engines.memory import available_memory

MIB = 1 << 20
MACHINE = 8192 * MIB
V2 = "35 24 0:30 {inside} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 24 0:30 {inside} /sys/fs/cgroup/memory rw,nosuid - cgroup cgroup rw,memory\n"
OTHERS = (
    "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n"
    "33 24 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
)


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(available=MACHINE)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)


def system(root: Path, groups: str, mounts: str) -> Path:
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(groups)
    (root / "proc/self/mountinfo").write_text(OTHERS + mounts)
    return root


def unified(group: Path, limit: int | str, used: int = 0, files: int = 0) -> None:
    """A group of version 2; numbers are MiB."""
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit if isinstance(limit, str) else limit * MIB}\n")
    (group / "memory.current").write_text(f"{used * MIB}\n")
    stat = f"anon 77\ninactive_file {files * MIB}\nactive_file 0\nactive_file_more 5\n"
    (group / "memory.stat").write_text(stat)


def legacy(group: Path, limit: int | None, used: int = 0, files: int = 0) -> None:
    """A group of version 1; numbers are MiB, None is no limit."""
    group.mkdir(parents=True, exist_ok=True)
    limit_bytes = 9223372036854771712 if limit is None else limit * MIB
    (group / "memory.limit_in_bytes").write_text(f"{limit_bytes}\n")
    (group / "memory.usage_in_bytes").write_text(f"{used * MIB}\n")
    stat = f"active_file 7\ntotal_inactive_file 0\ntotal_active_file {files * MIB}\n"
    (group / "memory.stat").write_text(stat)


@pytest.mark.parametrize(
    ("limits", "left"),
    [
        ({"a/b": 700}, 700),
        ({"a/b": "max", "a": 900}, 900),
        ({"a/b": 700, "a": 300, "": "max"}, 300),
        ({"a/b": "max", "": 600}, 600),
        ({"a/b": 10**6}, MACHINE // MIB),
        ({"a/b": "nonsense", "a": "max"}, MACHINE // MIB),
        ({"a/c": 100, "a/b/below": 100}, MACHINE // MIB),
        ({}, MACHINE // MIB),
    ],
)
def test_the_smallest_limit_on_the_way_to_the_root_counts(
    tmp_path: Path, limits: dict[str, int | str], left: int
) -> None:
    root = system(tmp_path, "0::/a/b\n", V2.format(inside="/"))
    for group, limit in limits.items():
        unified(root / "sys/fs/cgroup" / group, limit)
    assert available_memory(root) == left * MIB


def test_what_is_in_use_is_not_left_but_for_pages_of_files(tmp_path: Path) -> None:
    root = system(tmp_path, "0::/a\n", V2.format(inside="/"))
    unified(root / "sys/fs/cgroup/a", 700, used=500, files=120)
    assert available_memory(root) == 320 * MIB
    unified(root / "sys/fs/cgroup/a", 700, used=900)
    assert available_memory(root) == 0


def test_the_older_interface_is_read_too(tmp_path: Path) -> None:
    groups = "9:name=systemd:/x\n4:cpu,cpuacct:/y\n3:hugetlb,memory:/a/b\n0::/\n"
    root = system(tmp_path, groups, V1.format(inside="/"))
    top = root / "sys/fs/cgroup/memory"
    legacy(top, None)
    legacy(top / "a/b", 700, used=100, files=30)
    assert available_memory(root) == 630 * MIB
    legacy(top / "a", 500)
    assert available_memory(root) == 500 * MIB


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/docker/abc", "/docker/abc"),  # the host's path, of which only this part is mounted
        ("/", "/"),  # a namespace of its own
        ("/../other", "/"),
        ("/elsewhere", "/docker/abc"),
    ],
)
def test_in_a_container_its_own_limit_is_found(tmp_path: Path, path: str, inside: str) -> None:
    root = system(tmp_path, f"4:memory:{path}\n", V1.format(inside=inside))
    legacy(root / "sys/fs/cgroup/memory", 700)
    legacy(root / "sys/fs/cgroup/other", 1)  # where `..` would lead
    assert available_memory(root) == 700 * MIB


@pytest.mark.parametrize("groups", ["", "nonsense", "4:memory:/a\n", "0::/a\n"])
def test_without_control_groups_the_machine_counts(tmp_path: Path, groups: str) -> None:
    assert available_memory(tmp_path) == MACHINE
    root = system(tmp_path, groups, "nonsense\n")
    assert available_memory(root) == MACHINE
