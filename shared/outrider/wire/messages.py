"""The messages between client, coordinator and workers, and their bytes.

A frame is one msgpack array `[tag, field, …]`. It is decoded with explicit limits and converted to
a frozen, bounded struct before anybody looks at it. A message carries what its receiver needs to
tell it from a stale one: request ids are drawn from the coordinator's incarnation and never reused,
drafted tokens name their lineage and position, verdicts their round and base. A connection belongs
to one incarnation (`Hello`), so later messages on it need not repeat it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgpack
import msgspec
from msgspec import Meta

from outrider.errors import BadRequest, ProtocolError

__all__ = ["FRAME_LIMIT", "PROTOCOL", "Message", "check", "decode", "encode"]

PROTOCOL = 1
FRAME_LIMIT = 1 << 20  # bytes; a prompt of 200,000 tokens fits
LIMITS: dict[str, Any] = {
    "max_str_len": FRAME_LIMIT,
    "max_bin_len": FRAME_LIMIT,
    "max_array_len": 1 << 18,
    "max_map_len": 256,
    "max_ext_len": 0,
    "strict_map_key": True,
}

Id = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenIds = Annotated[tuple[TokenId, ...], Meta(max_length=1 << 18)]
Block = Annotated[tuple[TokenId, ...], Meta(max_length=1024)]
Seconds = Annotated[float, Meta(ge=0.0, le=1e6)]
Probability = Annotated[float, Meta(ge=0.0, le=1.0)]
Floors = Annotated[tuple[float, ...], Meta(max_length=64)]
Word = Annotated[str, Meta(max_length=256)]
Line = Annotated[str, Meta(max_length=4096)]
Text = Annotated[str, Meta(max_length=FRAME_LIMIT)]
Role = Literal["target", "draft"]
# lane, start, end, rows; round and base, or lineage and position; what was chosen or drafted
Span = tuple[Role, float, float, Count, Count, Count, Block]
StatsTable = dict[Word, int | float | Word | None]


class Base(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    pass


class Fingerprint(Base, frozen=True):
    """`outrider.core.engine.Vocabulary` on the wire."""

    kind: Word
    size: Count
    bos: TokenId | None
    eos: TokenId | None
    adds_bos: bool
    adds_eos: bool
    ends: Annotated[tuple[TokenId, ...], Meta(max_length=1024)]
    digest: Word


class Sampling(Base, frozen=True):
    """`outrider.core.sampling.Sampling` on the wire."""

    temperature: float
    top_k: Count
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: Annotated[int, Meta(ge=-1, le=(1 << 31) - 1)]
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Annotated[tuple[tuple[TokenId, float], ...], Meta(max_length=4096)]
    seed: Id


def with_bias(sampling: Sampling, bias: tuple[tuple[int, float], ...]) -> Sampling:
    """The same settings with these logit biases."""
    return msgspec.structs.replace(sampling, logit_bias=bias)


def renumbered(message: Any, call: int) -> Any:
    """The same question or answer as call number `call`."""
    return msgspec.structs.replace(message, call=call)


class Tagged(Base, frozen=True, tag_field="type", tag=str.lower):
    pass


# ---- workers and coordinator, at any time -------------------------------------------------------


class Hello(Tagged, frozen=True):
    """A worker's first word on a connection, and its answer to `Who`.

    The first three fields are the same in every protocol: see `_greeting_of_another_protocol`.
    """

    protocol: Count
    version: Word
    role: Role
    incarnation: Id
    model: Word
    fingerprint: Fingerprint
    context: Count
    slots: Count
    device: Word
    cores: Word  # where it computes: "host:0,1", "host:gpu0", "host:gpu*"; "": a device of its own
    curve_s: Annotated[tuple[Seconds, ...], Meta(min_length=1, max_length=64)]  # see `calibrate`


class Welcome(Tagged, frozen=True):
    """The worker is taken; whatever it held for an earlier coordinator is void."""


class Refused(Tagged, frozen=True):
    code: Word
    reason: Line


class Who(Tagged, frozen=True):
    """The coordinator does not know this connection: say `Hello` again."""


class Beat(Tagged, frozen=True):
    """Sent every quarter of a second; `steps` counts evaluations, so a hung model shows."""

    steps: Id
    busy: bool


class Ping(Tagged, frozen=True):
    """Asks nothing: sending it tells the coordinator whether the connection still stands."""


# ---- coordinator and target worker --------------------------------------------------------------


class Open(Tagged, frozen=True):
    """Prefill these tokens, choose the next and answer with the verdict of round 0."""

    request: Id
    tokens: TokenIds
    sampling: Sampling
    logprobs: bool


class Verify(Tagged, frozen=True):
    """Evaluate the last committed token and `drafted`, which starts at position `base`."""

    request: Id
    round: Count
    base: Count
    drafted: Block


class Verdict(Tagged, frozen=True):
    """`tokens` follow position `base`: the accepted ones, then the target's own."""

    request: Id
    round: Count
    base: Count
    accepted: Count
    tokens: Block
    pieces: Annotated[tuple[bytes, ...], Meta(max_length=1024)]
    logprobs: Annotated[tuple[float, ...], Meta(max_length=1024)] | None
    elapsed_s: Seconds


class Close(Tagged, frozen=True):
    """Forget the request, cutting short what is being computed for it."""

    request: Id


class Failed(Tagged, frozen=True):
    """The call or request `id` came to nothing."""

    id: Id
    code: Word
    message: Line


# ---- coordinator and draft worker ---------------------------------------------------------------


class Draft(Tagged, frozen=True):
    """Draft what follows `tokens`, up to but not including position `until`.

    Those from position `base` on are not committed yet: the next `Commit` begins there.
    """

    request: Id
    lineage: Count
    base: Count
    tokens: TokenIds
    sampling: Sampling
    until: Count
    vocabulary: Count  # ids from here on do not exist in the target
    floors: Floors = ()


class Commit(Tagged, frozen=True):
    """The text from `base` on; where it differs from what was drafted, a new lineage starts.

    With n drafted tokens ahead of it, the draft goes on only if the product of their usual
    acceptances (`outrider.core.estimates`) is at least the n-th of `floors`, or there is no n-th.
    """

    request: Id
    base: Count
    tokens: Block
    until: Count
    floors: Floors = ()


class Drafted(Tagged, frozen=True):
    request: Id
    lineage: Count
    position: Count
    tokens: Block
    confidences: Annotated[tuple[Probability, ...], Meta(max_length=1024)]
    elapsed_s: Seconds
    paused: bool = False  # by the floors: nothing follows before the next commit


# ---- questions about text: client → coordinator → target worker, and back -----------------------


class Tokenize(Tagged, frozen=True):
    call: Id
    text: Text
    special: bool


class Detokenize(Tagged, frozen=True):
    call: Id
    tokens: TokenIds


class Render(Tagged, frozen=True):
    """Apply the chat template to (role, content) pairs."""

    call: Id
    messages: Annotated[tuple[tuple[Word, Text], ...], Meta(max_length=1024)]


class Chat(Tagged, frozen=True):
    """The token ids of a conversation, where markers typed in its contents are plain text."""

    call: Id
    messages: Annotated[tuple[tuple[Word, Text], ...], Meta(max_length=1024)]


class Labels(Tagged, frozen=True):
    """The vocabulary's texts of ids start … start + count - 1."""

    call: Id
    start: Count
    count: Annotated[int, Meta(ge=1, le=4096)]


class Tokens(Tagged, frozen=True):
    call: Id
    tokens: TokenIds


class Rendered(Tagged, frozen=True):
    call: Id
    text: Text


class LabelTexts(Tagged, frozen=True):
    call: Id
    texts: Annotated[tuple[Text, ...], Meta(max_length=4096)]


# ---- client and coordinator ---------------------------------------------------------------------


class Submit(Tagged, frozen=True):
    """Generate after `prompt` (text, token ids, or chat messages)."""

    call: Id
    prompt: Text | TokenIds
    messages: Annotated[tuple[tuple[Word, Text], ...], Meta(max_length=1024)] | None
    sampling: Sampling
    n_predict: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)] | None
    stop: Annotated[tuple[Word, ...], Meta(max_length=16)]
    ignore_eos: bool
    logprobs: bool
    mode: Literal["plain", "sync", "pipelined", "auto"] | None
    n_draft: Count | None
    trace: bool
    n_min: Count | None = None
    p_min: Probability | None = None


class Cancel(Tagged, frozen=True):
    call: Id


class Health(Tagged, frozen=True):
    call: Id


class Stop(Tagged, frozen=True):
    """Finish what runs, then end the pipeline."""

    call: Id


class Started(Tagged, frozen=True):
    call: Id
    model: Word
    mode: Word
    prompt_tokens: TokenIds


class FragmentToken(Base, frozen=True):
    id: TokenId
    text: Text
    position: Count
    kind: Literal["drafted", "corrected", "bonus", "plain"]
    logprob: float | None


class Fragment(Tagged, frozen=True):
    """One committed block; `drafted` is the block that was verified, for `--verbose`."""

    call: Id
    round: Count
    text: Text
    tokens: Annotated[tuple[FragmentToken, ...], Meta(max_length=1024)]
    drafted: Annotated[tuple[tuple[TokenId, Probability], ...], Meta(max_length=1024)]
    stats: StatsTable


class Finished(Tagged, frozen=True):
    call: Id
    reason: Literal["stop", "length", "cancelled"]
    stats: StatsTable
    trace: tuple[Span, ...] | None


class HealthReport(Tagged, frozen=True):
    call: Id
    report: dict[str, Any]


Message = (
    Hello | Welcome | Refused | Who | Beat | Ping
    | Open | Verify | Verdict | Close | Failed
    | Draft | Commit | Drafted
    | Tokenize | Detokenize | Render | Chat | Labels | Tokens | Rendered | LabelTexts
    | Submit | Cancel | Health | Stop | Started | Fragment | Finished | HealthReport
)  # fmt: skip


def check(message: Message) -> None:
    """What a peer would not accept from us is its sender's mistake. Raises BadRequest."""
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
    """The frame of `message`. Raises ProtocolError where it exceeds `FRAME_LIMIT`."""
    frame: bytes = msgpack.packb(msgspec.to_builtins(message, builtin_types=(bytes,)))
    if len(frame) > FRAME_LIMIT:
        raise ProtocolError(f"a message of {len(frame)} bytes exceeds the limit of {FRAME_LIMIT}")
    return frame


def _greeting_of_another_protocol(start: list[Any]) -> Hello:
    """Enough of it to say exactly why its sender is refused, whatever fields follow."""
    protocol, version, role = msgspec.convert(start, tuple[Count, Word, Role])
    nothing = Fingerprint("", 0, None, None, False, False, (), "")
    return Hello(protocol, version, role, 0, "", nothing, 0, 0, "", "", (0.0,))


def decode(frame: bytes) -> Message:
    """The message in `frame`. Raises ProtocolError for whatever is not one of ours."""
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
