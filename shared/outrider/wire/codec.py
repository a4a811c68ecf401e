"""Messages to bytes and back.

A frame is one msgpack array `[name, field, …]`. Each field is checked against the type and the
bounds of a frozen struct while it is read.
"""

from __future__ import annotations

from typing import Any

import msgpack
import msgspec

from outrider.core.values import Count, Role, Word
from outrider.errors import BadRequest, ProtocolError
from outrider.wire.messages import FRAME_LIMIT, PROTOCOL, Hello, Message

GREETING_LIMIT = 1 << 16  # bytes of a greeting in another protocol
LIMITS: dict[str, Any] = {
    "max_array_len": 1 << 12,
    "max_map_len": 256,
    "max_ext_len": 0,
    "strict_map_key": True,
}

# It stops at the first byte that does not fit, so a frame of nonsense costs microseconds. Whoever
# builds what is in the frame first, and then looks at it, pays up to 50 ms for a nested megabyte.
_decoder = msgspec.msgpack.Decoder(Message)
_encoder = msgspec.msgpack.Encoder()


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
    except UnicodeEncodeError:
        raise BadRequest("a prompt or a setting is not text that UTF-8 can express") from None


def encode(message: Message) -> bytes:
    """The frame of `message`. Raises BadRequest if it exceeds `FRAME_LIMIT`."""
    frame = _encoder.encode(message)
    if len(frame) > FRAME_LIMIT:
        raise BadRequest(f"a message of {len(frame)} bytes exceeds the limit of {FRAME_LIMIT}")
    return frame


def _greeting_of_another_protocol(frame: bytes) -> Hello | None:
    """Just the fields that say why its sender is refused; what follows them may be anything."""
    if b"\xa5hello" not in frame[:16] or len(frame) > GREETING_LIMIT:
        return None
    try:
        value = msgpack.unpackb(frame, **LIMITS)
        name, *start = value[:4]
        protocol, version, role = msgspec.convert(start, tuple[Count, Word, Role])
    except Exception:  # whatever it is, it is no greeting
        return None
    if name != "hello" or protocol == PROTOCOL:
        return None
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
        message: Message = _decoder.decode(frame)
    except Exception as exc:
        if greeting := _greeting_of_another_protocol(frame):
            return greeting
        # the peer's own text may be in `exc`: keep its kind, cut its words
        reason = f"{type(exc).__name__}: {exc!s:.100}"
        raise ProtocolError(f"undecodable frame of {len(frame)} bytes ({reason!r})") from exc
    return message
