"""What well-formed input looks like to each decoder: the beginnings of everything malformed."""

from __future__ import annotations

import functools
import json
import struct
from contextlib import suppress
from typing import Any, get_args

from msgspec import inspect

from outrider.errors import BadRequest
from outrider.wire import messages as wire
from outrider.wire.codec import encode
from outrider.wire.messages import Message
from outrider_services.options import OPTIONS

KINDS: tuple[type[Message], ...] = get_args(Message)
MOST = 12  # samples of one type
FEW = 6  # settings in a file


@functools.cache
def frames() -> tuple[bytes, ...]:
    """Several frames of each kind of message, with the extremes and all alternatives of a field."""
    return tuple(encode(message) for kind in KINDS for message in messages(kind))


def messages(kind: type[Message]) -> list[Message]:
    found: list[Message] = samples(inspect.type_info(kind))
    if kind is wire.Hello:
        return [one.changed(protocol=wire.PROTOCOL) for one in found]
    return found


def samples(kind: inspect.Type) -> list[Any]:
    """A few values of this type."""
    match kind:
        case inspect.IntType(ge=least, le=most):
            low = -(2**63) if least is None else least
            high = 2**63 - 1 if most is None else most
            return [min(max(7, low), high), low, high]
        case inspect.FloatType(ge=least, le=most):
            lowest = -1.5 if least is None else least
            return [max(0.25, lowest), lowest, 3.5 if most is None else most]
        case inspect.StrType(max_length=most):
            return [text[:most] for text in ("river", "", "東京 🚀")]
        case inspect.BytesType():
            return [b"A", b"", b"\xff\x00"]
        case inspect.BoolType():
            return [True, False]
        case inspect.NoneType():
            return [None]
        case inspect.LiteralType(values=values):
            return list(values)
        case inspect.VarTupleType(item_type=item, min_length=least):
            inner = samples(item)
            return [tuple(inner[: max(2, least or 0)]), tuple(inner[: least or 0])]
        case inspect.TupleType(item_types=items):
            return _side_by_side([samples(item) for item in items])
        case inspect.DictType(key_type=key, value_type=value):
            return [dict(zip(samples(key), samples(value), strict=False)), {}]
        case inspect.UnionType(types=types):
            return [one for inner in map(samples, types) for one in inner][:MOST]
        case inspect.StructType(cls=cls, fields=fields):
            columns = [samples(field.type) for field in fields]
            made = [_made(cls, fields, row) for row in _side_by_side(columns)]
            return [one for one in made if one is not None] or [cls()]
    raise NotImplementedError(kind)


def _made(cls: Any, fields: Any, row: tuple[Any, ...]) -> Any:
    """A value of this class; None if these fields do not go together."""
    with suppress(BadRequest):
        return cls(**{field.name: value for field, value in zip(fields, row, strict=True)})
    return None


def _side_by_side(columns: list[list[Any]]) -> list[tuple[Any, ...]]:
    """Rows in which each value of each column occurs, as far as `MOST` rows have room."""
    count = min(max(map(len, columns), default=1), MOST)
    return [tuple(column[n % len(column)] for column in columns) for n in range(count)]


# ---- HTTP ---------------------------------------------------------------------------------------

_SAMPLED = {
    "model": "m",
    "stream": False,
    "temperature": 0.5,
    "top_k": 40,
    "top_p": 0.9,
    "seed": 7,
    "stop": ["a", "b"],
    "logit_bias": {"5": -1.5},
    "speculative.n_max": 6,
    "dry_sequence_breakers": ["."],
    "response_format": {"type": "json_object"},
}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        **_SAMPLED,
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        "tools": [_TOOL],
        "tool_choice": "auto",
        "max_tokens": 9,
    },
    "/v1/completions": {**_SAMPLED, "prompt": "Hi", "max_tokens": 9, "logprobs": 2},
    "/completion": {**_SAMPLED, "prompt": [1, 2, 3], "n_predict": 4, "n_probs": 3},
    "/infill": {
        "input_prefix": "def f():",
        "input_suffix": "return 1",
        "input_extra": [{"text": "import os", "filename": "a.py"}],
        "n_predict": 4,
    },
    "/tokenize": {"content": "a river", "add_special": True},
    "/detokenize": {"tokens": [65, 66]},
    "/apply-template": {"messages": [{"role": "user", "content": "Hi"}]},
}


def bodies() -> tuple[tuple[str, bytes], ...]:
    """Paths, and what may be sent there."""
    return tuple((path, json.dumps(body).encode()) for path, body in BODIES.items())


# ---- files --------------------------------------------------------------------------------------


def toml() -> tuple[bytes, ...]:
    """Files with a few settings each, at their defaults or with a value of their type."""
    found = []
    for first in range(0, len(OPTIONS), FEW):
        sections: dict[str, list[str]] = {}
        for option in list(OPTIONS.values())[first : first + FEW]:
            section, name = option.key.split(".")
            value = 7 if option.default is None else option.default
            text = "true" if value is True else "false" if value is False else json.dumps(value)
            sections.setdefault(section, []).append(f"{name} = {text}")
        lines = [line for name, rows in sections.items() for line in (f"[{name}]", *rows)]
        found.append("\n".join(lines).encode())
    return tuple(found)


def gguf() -> bytes:
    """A small file with a pair of each type, an array of texts and two tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    pairs = [text("general.architecture") + struct.pack("<I", 8) + text("qwen2")]
    pairs.append(text("general.alignment") + struct.pack("<II", 4, 32))
    pairs.append(text("a.float") + struct.pack("<If", 6, 0.5))
    pairs.append(text("a.truth") + struct.pack("<IB", 7, 1))
    tokens = b"".join(map(text, ("a", "the", "river")))
    pairs.append(text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 3) + tokens)
    pairs.append(text("scores") + struct.pack("<IIQ3f", 9, 6, 3, 0.1, 0.2, 0.3))
    tensors = [text(f"t{n}") + struct.pack("<IQQIQ", 2, 32, 4, 2, n * 96) for n in range(2)]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs + tensors)
    return head + bytes(-len(head) % 32) + bytes(96 + 72)
