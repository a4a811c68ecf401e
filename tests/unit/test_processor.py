"""The processor as the kernel describes it."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from outrider.engines import processor

INTEL = """processor\t: 0
model name\t: Some Xeon @ 2.00GHz
flags\t\t: fpu avx2 amx_int8

processor\t: 1
model name\t: Another
flags\t\t: fpu
"""
ARM = """processor\t: 0
Features\t: fp asimd
CPU part\t: 0xd0c
"""


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(processor, "CPUINFO", path)
    return path


def test_the_first_core_is_described(cpuinfo: Path) -> None:
    cpuinfo.write_text(INTEL)
    assert processor.name() == "Some Xeon @ 2.00GHz"
    assert processor.instructions() == {"fpu", "avx2", "amx_int8"}
    assert processor.kind() == ["Some Xeon @ 2.00GHz", "fpu avx2 amx_int8", ""]


def test_where_the_kernel_tells_no_name_the_architecture_is_told(cpuinfo: Path) -> None:
    cpuinfo.write_text(ARM)
    assert processor.name() == platform.machine()
    assert processor.instructions() == {"fp", "asimd"}
    cpuinfo.unlink()
    assert processor.name() == platform.machine()
    assert processor.instructions() == frozenset()
