from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.errors import ModelNotFound, ModelUnusable
from outrider_services.models.gguf import check_gguf, read_header

F32, Q4_1, UNHEARD_OF = 0, 3, 99


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, dims: tuple[int, ...], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


PAIRS = (
    pair("general.architecture", 8, text("llama")),
    pair("general.alignment", 4, struct.pack("<I", 64)),
    pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("b")),
    pair("scores", 9, struct.pack("<IQ", 6, 2) + struct.pack("<2f", 0, 1)),
    pair("flag", 7, b"\x01"),
)
TENSORS = (tensor("first", (4, 2), F32, 0), tensor("last", (32, 3), Q4_1, 64))
DATA_BYTES = 64 + 3 * 20  # the last tensor: three blocks of 20 bytes


def header(
    pairs: tuple[bytes, ...] = PAIRS, tensors: tuple[bytes, ...] = TENSORS, version: int = 3
) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(pairs))
    return b"GGUF" + counts + b"".join(pairs) + b"".join(tensors)


def whole(alignment: int = 64) -> bytes:
    head = header()
    return head + bytes(-len(head) % alignment) + bytes(DATA_BYTES)


def test_a_whole_file_is_accepted_and_described(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole())
    found = check_gguf(path)
    assert (found.version, found.tensors, found.promised_bytes) == (3, 2, len(whole()))
    assert found.values == {
        "general.architecture": "llama",
        "general.alignment": 64,
        "flag": True,
    }


def test_a_file_cut_at_any_byte_is_refused_as_unusable(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    data = whole()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(ModelUnusable, match=r"truncated" if length >= 4 else r"not a GGUF"):
            check_gguf(path)


def test_a_truncated_file_is_told_both_sizes(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole()[:-1])
    size = len(whole())
    with pytest.raises(ModelUnusable, match=f"{size - 1:,} bytes, its header promises {size:,}"):
        check_gguf(path)


def test_padding_behind_the_last_tensor_is_no_fault(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole() + bytes(4))
    check_gguf(path)


def test_a_tensor_type_newer_than_ours_is_left_to_the_loader(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(header((), (tensor("odd", (7,), UNHEARD_OF, 0),)) + bytes(64))
    check_gguf(path)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        pytest.param(b"<html>", r"is not a GGUF file \(its first bytes are b'<htm'\)", id="a-page"),
        pytest.param(b"", r"first bytes are b''", id="empty"),
        pytest.param(header(version=1), r"version 1, not 2 or 3", id="version-1"),
        pytest.param(header((pair("k", 77, b""),)), r"unknown type 77", id="unknown-type"),
        pytest.param(
            header((pair("k", 9, struct.pack("<IQ", 9, 1)),)), r"type 9", id="array-of-arrays"
        ),
        pytest.param(
            header((pair("general.alignment", 4, struct.pack("<I", 0)),)),
            r"alignment of 0",
            id="alignment-0",
        ),
        pytest.param(
            header((), (tensor("t", (1,) * 5, F32, 0),)), r"5 dimensions", id="five-dimensions"
        ),
        pytest.param(
            b"GGUF" + struct.pack("<IQQ", 3, 2**63, 2**63), r"truncated", id="absurd-counts"
        ),
        pytest.param(
            header((pair("k", 9, struct.pack("<IQ", 8, 2**64 - 1)),)),
            r"truncated",
            id="absurd-array",
        ),
        pytest.param(
            header((), (tensor("t", (2**64 - 1,) * 4, F32, 2**64 - 1),)),
            r"its header promises",
            id="absurd-tensor",
        ),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelUnusable, match=reason) as caught:
        check_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_no_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no model file at") as missing:
        read_header(tmp_path / "absent")
    assert not isinstance(missing.value, ModelUnusable)
    with pytest.raises(ModelUnusable, match="is not a file"):
        read_header(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads everything")
def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(whole())
    path.chmod(0)
    with pytest.raises(ModelUnusable, match="cannot be read"):
        check_gguf(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", b"GGUF\x03\x00\x00\x00"]))
def test_garbage_is_refused_and_nothing_else_happens(
    tmp_path: Path, garbage: bytes, start: bytes
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(start + garbage)
    try:
        check_gguf(path)
    except ModelUnusable:
        return
    assert start  # without the magic nothing is accepted


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(0, len(header()) - 1), st.integers(0, 255))
def test_a_changed_byte_never_escapes_as_another_error(tmp_path: Path, at: int, value: int) -> None:
    data = bytearray(whole())
    data[at] = value
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with contextlib.suppress(ModelUnusable):
        check_gguf(path)
