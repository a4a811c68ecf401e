"""Messages to bytes and back.

A frame is one msgpack array `[name, field, …]`. It is decoded with explicit limits and converted to
a frozen, bounded struct before anybody looks at it.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from outrider.core.values import Count, Role, Word
from outrider.errors import BadRequest, ProtocolError
from outrider.wire.messages import FRAME_LIMIT, PROTOCOL, Hello, Message

LIMITS: dict[str, Any] = {
    "max_str_len": FRAME_LIMIT,
    "max_bin_len": FRAME_LIMIT,
    "max_array_len": 1 << 18,
    "max_map_len": 256,
    "max_ext_len": 0,
    "strict_map_key": True,
}


def check(message: Message) -> None:
    """Raise BadRequest if a peer would not accept `message`: the mistake is its sender's."""
    try:
        value = msgspec.to_builtins(message, builtin_types=(bytes,))
        msgspec.convert(value, type(message), builtin_types=(bytes,))
        encode(message)
    except msgspec.ValidationError as exc:
        reason, _, place = str(exc).partition(" - at `$[")
        name = message.__struct_fields__[int(place.partition("]")[0]) - 1]  # behind the tag
        name = {"n_predict": "max_tokens"}.get(name, name)
        raise BadRequest(f"{name} is not as it should be: {reason}", name) from None
    except ProtocolError as exc:
        raise BadRequest(str(exc)) from None
    except UnicodeEncodeError:
        raise BadRequest("a prompt or a setting is not text that UTF-8 can express") from None


def encode(message: Message) -> bytes:
    """The frame of `message`. Raises ProtocolError if it exceeds `FRAME_LIMIT`."""
    frame: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    if len(frame) > FRAME_LIMIT:
        raise ProtocolError(f"a message of {len(frame)} bytes exceeds the limit of {FRAME_LIMIT}")
    return frame


def _greeting_of_another_protocol(start: list[Any]) -> Hello:
    """Just the fields that say why its sender is refused; what follows them may be anything."""
    protocol, version, role = msgspec.convert(start, tuple[Count, Word, Role])
    return Hello(
        protocol=protocol,
        version=version,
        role=role,
        incarnation=0,
        model="",
        vocabulary=None,
        context=0,
        slots=0,
        device="",
        cores="",
        curve_s=(0.0,),
    )


def decode(frame: bytes) -> Message:
    """The message in `frame`. Raises ProtocolError for anything that is not one of ours."""
    try:  # many kinds of error, among them RecursionError: translated once, here
        if len(frame) > FRAME_LIMIT:
            raise ValueError("too long")
        value = msgpack.unpackb(frame, **LIMITS)
        if isinstance(value, list) and value[:1] == ["hello"] and value[1:2] != [PROTOCOL]:
            return _greeting_of_another_protocol(value[1:4])
        message: Message = msgspec.convert(value, Message, builtin_types=(bytes,))
    except Exception as exc:
        # the peer's own text may be in `exc`: keep its kind, cut its words
        reason = f"{type(exc).__name__}: {exc!s:.100}"
        raise ProtocolError(f"undecodable frame of {len(frame)} bytes ({reason!r})") from exc
    return message
