"""Reading the header of a GGUF file, enough to refuse a wrong or truncated one before loading it.

llama.cpp would crash, or name one of its internal checks; here every refusal is one plain sentence.
Counts and lengths in the file are not trusted: each item takes up bytes, so whatever they claim,
reading ends where the file ends.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

from outrider.errors import ModelNotFound, ModelUnusable

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_DIMENSIONS = 4
MAX_KEPT_TEXT = 1 << 16  # bytes; names and chat templates are shorter, and no more is needed

STRING, ARRAY = 8, 9
# value type -> struct code
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
# tensor type -> (weights in a block, bytes of a block)
BLOCKS = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    9: (32, 36), 10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210),
    15: (256, 292), 16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18),
    21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8),
    28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18), 42: (64, 18),
}  # fmt: skip

Value = str | int | float | bool


@dataclass(frozen=True, slots=True)
class Header:
    """What is used of a header."""

    version: int
    values: dict[str, Value]  # scalars and texts; arrays (token tables) are skipped
    tensors: int
    promised_bytes: int  # the least size of a complete file


class _Malformed(Exception):
    """What is wrong: the end of a sentence that begins with the file's name."""


class _Reader:
    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def number(self, code: str) -> int | float | bool:
        layout = struct.Struct("<" + code)
        number: int | float | bool
        (number,) = layout.unpack_from(self.data, self.at)
        self.at += layout.size
        return number

    def count(self) -> int:
        return int(self.number("Q"))

    def text(self) -> str:
        length = self.count()
        start, self.at = self.at, self.at + length
        self.inside()
        return self.data[start : start + min(length, MAX_KEPT_TEXT)].decode("utf-8", "replace")

    def inside(self) -> None:
        if self.at > len(self.data):
            raise struct.error("past the end")

    def skip_array(self) -> None:
        kind, count = int(self.number("I")), self.count()
        if kind in SCALARS:
            self.at += count * struct.calcsize("<" + SCALARS[kind])
            self.inside()
        elif kind == STRING:
            self.skip_texts(count)
        else:
            raise _Malformed(f"has a metadata array of the unknown type {kind}")

    def skip_texts(self, count: int) -> None:
        # a bare loop, for a vocabulary has hundreds of thousands and is skipped at every start
        data, at, length_at = self.data, self.at, struct.Struct("<Q").unpack_from
        for _ in range(count):
            at += 8 + length_at(data, at)[0]
        self.at = at
        self.inside()


def read_header(path: Path) -> Header:
    """The header of the GGUF file at `path`. Raises ModelNotFound, and ModelUnusable if it is no
    GGUF file or ends within its header.
    """
    if not path.exists():
        raise ModelNotFound(f"no model file at {path}")
    if not path.is_file():
        raise ModelUnusable(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            return _parse_file(path, file.fileno(), file.read(len(MAGIC)))
    except OSError as exc:
        raise ModelUnusable(f"{path} cannot be read: {exc.strerror or exc}") from exc
    except _Malformed as exc:
        raise ModelUnusable(f"{path} {exc}; fetch it again or take another file") from exc


def check_gguf(path: Path) -> Header:
    """The header of a complete GGUF file. Raises ModelNotFound, ModelUnusable."""
    header = read_header(path)
    size = path.stat().st_size
    if size < header.promised_bytes:
        raise ModelUnusable(
            f"{path} is truncated: {size:,} bytes, its header promises {header.promised_bytes:,}; "
            "fetch it again"
        )
    return header


def _parse_file(path: Path, descriptor: int, magic: bytes) -> Header:
    if magic != MAGIC:
        raise ModelUnusable(f"{path} is not a GGUF file (its first bytes are {magic!r})")
    with mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ) as data:
        try:
            return _parse(_Reader(data))
        except (struct.error, OverflowError) as exc:
            raise _Malformed(f"is truncated: {len(data):,} bytes end within its header") from exc


def _parse(reader: _Reader) -> Header:
    reader.at = len(MAGIC)
    version = int(reader.number("I"))
    if version not in VERSIONS:
        raise _Malformed(f"has GGUF version {version}, not {VERSIONS[0]} or {VERSIONS[1]}")
    tensors, pairs = reader.count(), reader.count()
    values = dict(filter(None, (_pair(reader) for _ in range(pairs))))
    data_bytes = max((_tensor_end(reader) for _ in range(tensors)), default=0)
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise _Malformed(f"has an alignment of {alignment!r}, not a power of two")
    data_start = -(-reader.at // alignment) * alignment
    promised = data_start + data_bytes if tensors else reader.at
    return Header(version, values, tensors, promised)


def _pair(reader: _Reader) -> tuple[str, Value] | None:
    key, kind = reader.text(), int(reader.number("I"))
    if kind == STRING:
        return key, reader.text()
    if kind in SCALARS:
        return key, reader.number(SCALARS[kind])
    if kind != ARRAY:
        raise _Malformed(f"has metadata of the unknown type {kind}")
    reader.skip_array()
    return None


def _tensor_end(reader: _Reader) -> int:
    """Where the data of the tensor described next end, in bytes from the start of all data."""
    reader.text()
    dimensions = int(reader.number("I"))
    if dimensions > MAX_DIMENSIONS:
        raise _Malformed(f"has a tensor of {dimensions} dimensions")
    weights = 1
    for _ in range(dimensions):
        weights *= reader.count()
    kind, offset = int(reader.number("I")), reader.count()
    # of a type that is newer than this table, the offset alone still bounds the size from below
    per_block, block_bytes = BLOCKS.get(kind, (1, 0))
    return offset + weights // per_block * block_bytes
