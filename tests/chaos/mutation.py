"""Well-formed input made malformed: bytes, lengths, types and places, drawn by a seed."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

# what stands where another value was: msgpack
STRANGE = (
    b"\xc0", b"\xc2", b"\xc3", b"\xc1", b"\x00", b"\xff", b"\x90", b"\x80", b"\x81\xa1a\x01",
    b"\x93\x01\x02\x03", b"\xa0", b"\xa3\xed\xa0\x80", b"\xa1x", b"\xc4\x01\xff",
    b"\xcb\x7f\xf8" + bytes(6),
    b"\xcb\x7f\xf0" + bytes(6), b"\xcb\xff\xf0" + bytes(6), b"\xcb\x80" + bytes(7),
    b"\xcf" + b"\xff" * 8, b"\xcf\x80" + bytes(7), b"\xcf\x7f" + b"\xff" * 7,
    b"\xd3\x80" + bytes(7),
    b"\xce\xff\xff\xff\xff", b"\xd2\x80\x00\x00\x00", b"\xca\x7f\xc0\x00\x00",
    b"\xd6\xff\x00\x00\x00\x01", b"\xd4\x05\x00", b"\xc7\x00\x01",
    b"\x91" * 40 + b"\xc0", b"\xdc\x10\x01" + b"\xc0" * 0x1001, b"\x82\xa1a\x01\xa1a\x02",
)  # fmt: skip
# announces more than there is
LENGTHS = (
    b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xc9\xff\xff\xff\xff\x01", b"\xdc\xff\xff", b"\xde\xff\xff", b"\xda\xff\xff", b"\xc5\xff\xff",
    b"\x9f", b"\x8f", b"\xbf", b"\xd9\xff", b"\xc4\xff",
)  # fmt: skip
DEEP = (10, 100, 1023, 1025, 20_000)

Node = tuple[int, int]  # where it begins and ends


@lru_cache(maxsize=4096)
def nodes(frame: bytes) -> list[Node]:
    """Each value in a frame of msgpack that is well formed, outer ones first."""
    found: list[Node] = []

    def value(at: int) -> int:
        number = len(found)
        found.append((at, at))
        end, inner = _head(frame, at)
        for _ in range(inner):
            end = value(end)
        found[number] = at, end
        return end

    value(0)
    return found


SIZED = {  # code → bytes of the length, values for each, bytes behind each
    0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4,
}  # fmt: skip
FIXED = {
    0xC0: 1, 0xC2: 1, 0xC3: 1, 0xCA: 5, 0xCB: 9, 0xCC: 2, 0xCD: 3, 0xCE: 5, 0xCF: 9,
    0xD0: 2, 0xD1: 3, 0xD2: 5, 0xD3: 9,
}  # fmt: skip
CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _head(frame: bytes, at: int) -> tuple[int, int]:
    """Where the value's own bytes end, and how many values are in it."""
    code = frame[at]
    if code < 0x80 or code >= 0xE0:
        return at + 1, 0
    if code < 0x90:
        return at + 1, 2 * (code & 15)
    if code < 0xA0:
        return at + 1, code & 15
    if code < 0xC0:
        return at + 1 + (code & 31), 0
    if code in FIXED:
        return at + FIXED[code], 0
    if code in CONTAINERS:
        width, each = CONTAINERS[code]
        return at + 1 + width, each * int.from_bytes(frame[at + 1 : at + 1 + width])
    width = SIZED[code]
    return at + 1 + width + int.from_bytes(frame[at + 1 : at + 1 + width]), 0


class Frames:
    """Malformed frames, one after the other."""

    def __init__(self, golden: Sequence[bytes], rng: random.Random) -> None:
        self._golden = [(frame, nodes(frame)) for frame in golden]
        self._rng = rng

    def __call__(self) -> bytes:
        rng = self._rng
        frame, places = self._golden[int(rng.random() * len(self._golden))]
        for _ in range(1 if rng.random() < 0.8 else 2):
            if places[-1][1] > len(frame):
                break  # the first one has made it shorter
            frame = MUTATIONS[int(rng.random() * len(MUTATIONS))](rng, frame, places, self._other)
        return frame

    def _other(self) -> bytes:
        """Some value of another frame."""
        frame, places = self._rng.choice(self._golden)
        start, end = self._rng.choice(places)
        return frame[start:end]


Other = Callable[[], bytes]


def _flip(rng: random.Random, frame: bytes, _: list[Node], __: Other) -> bytes:
    changed = bytearray(frame)
    for _n in range(1 + int(rng.random() * 3)):
        changed[int(rng.random() * len(changed))] = int(rng.random() * 256)
    return bytes(changed)


def _cut(rng: random.Random, frame: bytes, _: list[Node], __: Other) -> bytes:
    return frame[: int(rng.random() * len(frame))]


def _append(rng: random.Random, frame: bytes, _: list[Node], other: Other) -> bytes:
    return frame + (other() if rng.random() < 0.5 else rng.randbytes(1 + int(rng.random() * 40)))


def _replace(rng: random.Random, frame: bytes, places: list[Node], _: Other) -> bytes:
    start, end = rng.choice(places)
    return frame[:start] + rng.choice(STRANGE) + frame[end:]


def _splice(rng: random.Random, frame: bytes, places: list[Node], other: Other) -> bytes:
    start, end = rng.choice(places)
    return frame[:start] + other() + frame[end:]


def _drop(rng: random.Random, frame: bytes, places: list[Node], _: Other) -> bytes:
    start, end = rng.choice(places)
    return frame[:start] + frame[end:]


def _repeat(rng: random.Random, frame: bytes, places: list[Node], _: Other) -> bytes:
    start, end = rng.choice(places)
    return frame[:end] + frame[start:end] * rng.choice((1, 1, 3)) + frame[end:]


def _swap(rng: random.Random, frame: bytes, places: list[Node], _: Other) -> bytes:
    (a, b), (c, d) = sorted((rng.choice(places), rng.choice(places)))
    if b > c:
        return frame[:a]
    return frame[:a] + frame[c:d] + frame[b:c] + frame[a:b] + frame[d:]


def _lie(rng: random.Random, frame: bytes, places: list[Node], _: Other) -> bytes:
    start, _end = rng.choice(places)
    return frame[:start] + rng.choice(LENGTHS) + frame[start + 1 :]


def _nest(rng: random.Random, frame: bytes, places: list[Node], _: Other) -> bytes:
    start, _end = rng.choice(places)
    if rng.random() < 0.95:
        return frame[:start] + b"\x91" * int(1 + rng.random() * 30) + frame[start:]
    opening = rng.choice((b"\x91", b"\x81\x01", b"\x81\x90"))
    return frame[:start] + opening * rng.choice(DEEP) + frame[start:]


MUTATIONS = (_flip, _flip, _cut, _append, _replace, _replace, _replace, _splice, _splice, _drop,
             _repeat, _swap, _lie, _nest)  # fmt: skip


# ---- text and files -----------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1 << 31, 1 << 63, -(1 << 64), 10**400, 0.5, 1e308, -0.0,
    "", "x", "\ud800",
    "\x00", [], [[]], [None], {}, {"a": 1}, {"type": "object"}, [1, "a"], "y" * 5000, [0] * 5000,
)  # fmt: skip
TEXTS = (
    b"NaN", b"Infinity", b"1e999", b"\\ud800", b"\xff", b"\x00", b"[" * 500, b'{"a":' * 500, b'"',
    b"\n", b"9" * 5000, b"=", b"[[", b"1979-05-27", b"'''", b"{", b"}", b"true", b"0x", b"_",
    b"\xef\xbb\xbf",
)  # fmt: skip


def body(rng: random.Random, golden: bytes) -> bytes:
    """A malformed body in JSON, or one of well-formed JSON with strange values."""
    if rng.random() < 0.4:
        return text(rng, golden)
    value = json.loads(golden)
    for _ in range(rng.choice((1, 1, 2, 5))):
        _change(rng, value)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def _change(rng: random.Random, value: Any) -> None:
    """Put something strange into a random place of it."""
    while True:
        inner = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(list(inner)) if inner else None
        if key is None:
            return
        if isinstance(value[key], dict | list) and value[key] and rng.random() < 0.7:
            value = value[key]
            continue
        if isinstance(value, dict) and rng.random() < 0.2:
            value[rng.choice(("n", "echo", "", "role", "\ud800", "a" * 300))] = value.pop(key)
        else:
            value[key] = copy.deepcopy(rng.choice(VALUES))
        return


def text(rng: random.Random, golden: bytes) -> bytes:
    """The same with something strange in it, something twice or something missing."""
    found = golden
    for _ in range(rng.choice((1, 1, 2, 5))):
        start, end = sorted((rng.randrange(len(found) + 1), rng.randrange(len(found) + 1)))
        end = min(end, start + rng.choice((0, 1, 8, 200)))
        match rng.randrange(4):
            case 0:
                found = found[:start] + rng.choice(TEXTS) + found[end:]
            case 1:
                found = found[:start] + found[end:]
            case 2:
                found = found[:end] + found[start:end] + found[end:]
            case _:
                found = found[:start] + bytes((rng.randrange(256),)) + found[start + 1 :]
    return found


NUMBERS = (0, 1, 2, 3, 8, 9, 12, 13, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 62)


def file(rng: random.Random, golden: bytes) -> bytes:
    """A binary file with other numbers, bytes, or an early end."""
    changed = bytearray(golden)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(changed))
        match rng.randrange(4):
            case 0:
                changed[at] = rng.randrange(256)
            case 1:
                number = rng.choice(NUMBERS)
                layout = "<Q" if rng.random() < 0.5 else "<I"
                raw = struct.pack(
                    layout, number & (0xFFFFFFFFFFFFFFFF if layout == "<Q" else 0xFFFFFFFF)
                )
                changed[at : at + len(raw)] = raw
            case 2:
                del changed[at : at + rng.choice((1, 4, 8, 100))]
            case _:
                del changed[at:]
        if not changed:
            break
    return bytes(changed)
