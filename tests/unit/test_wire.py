"""The codec: every message survives the way, and nothing else than a message comes out of it."""

from __future__ import annotations

import copy
import math
import struct
import tracemalloc
from collections.abc import Callable
from typing import Any, get_args

import msgpack
import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import inspect

from outrider.core.events import Commit, Prefill
from outrider.core.sampling import Sampling
from outrider.core.stats import Stats
from outrider.core.values import Proposal, Verdict
from outrider.errors import BadRequest, ProtocolError
from outrider.wire import messages as wire
from outrider.wire.codec import check, decode, encode
from outrider.wire.messages import FRAME_LIMIT, Message

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=50)
KINDS: tuple[type[Message], ...] = get_args(Message)
NAMES = [kind.__name__ for kind in KINDS]
HUGE = [2**31, 2**63, 2**64 - 1, -1, -(2**63)]


# --- messages with any values that their types allow ----------------------------------------------

simple = st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4)
anything = st.recursive(
    simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner)
)


def some(kind: inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a type, as its own declaration bounds them."""
    match kind:
        case inspect.IntType(ge=least, le=most):
            return st.integers(
                -(2**63) if least is None else least, 2**63 - 1 if most is None else most
            )
        case inspect.FloatType(ge=least, le=most):
            return st.floats(least, most, allow_nan=False)
        case inspect.StrType(max_length=most):
            return st.text(max_size=most if most and most < 6 else 6)
        case inspect.BytesType():
            return st.binary(max_size=6)
        case inspect.BoolType():
            return st.booleans()
        case inspect.NoneType():
            return st.none()
        case inspect.LiteralType(values=values):
            return st.sampled_from(values)
        case inspect.VarTupleType(item_type=item, min_length=least):
            return st.lists(some(item), min_size=least or 0, max_size=4).map(tuple)
        case inspect.TupleType(item_types=items):
            return st.tuples(*map(some, items))
        case inspect.DictType(key_type=key, value_type=value):
            return st.dictionaries(some(key), some(value), max_size=4)
        case inspect.UnionType(types=types):
            return st.one_of(*map(some, types))
        case inspect.StructType(cls=cls, fields=fields):
            return st.builds(cls, **{field.name: some(field.type) for field in fields})
        case inspect.AnyType():
            return anything
    raise NotImplementedError(kind)


def ours(message: Message) -> Message:
    """A greeting of another protocol is read differently: see below."""
    if isinstance(message, wire.Hello):
        return message.changed(protocol=wire.PROTOCOL)
    return message


messages: dict[type[Message], st.SearchStrategy[Message]] = {
    kind: some(inspect.type_info(kind)).map(ours) for kind in KINDS
}


@pytest.mark.parametrize("kind", KINDS, ids=NAMES)
def test_every_message_survives_the_way(kind: type[Message]) -> None:
    @quiet
    @given(messages[kind])
    def survives(message: Message) -> None:
        back = decode(encode(message))
        assert type(back) is kind
        assert back == message

    survives()


def test_no_two_messages_share_a_tag_and_all_are_frozen() -> None:
    assert len({kind.__struct_config__.tag for kind in KINDS}) == len(KINDS)
    assert all(kind.__struct_config__.frozen for kind in KINDS)


def test_a_frame_is_one_array_that_begins_with_its_tag() -> None:
    frame = encode(wire.Do(7, Commit(3, (1, 2), 9)))
    assert msgpack.unpackb(frame) == ["do", 7, ["commit", 3, [1, 2], 9, []]]


@pytest.mark.parametrize(
    "pieces", [(b"\xf0\x9f", b"\x9a\x80"), (b"\xff\x00",), (b"",)], ids=["half", "any", "empty"]
)
def test_pieces_are_bytes_and_need_not_be_text(pieces: tuple[bytes, ...]) -> None:
    verdict = wire.Done(1, Verdict(0, (1,) * len(pieces), 1, 1, pieces))
    assert decode(encode(verdict)) == verdict


@pytest.mark.parametrize("protocol", [0, 1, 99])
@pytest.mark.parametrize("rest", [[], [5], [[], {}, None, b"", "x", 1.5] * 3], ids=len)
def test_of_another_protocols_greeting_only_the_beginning_counts(
    protocol: int, rest: list[object]
) -> None:
    hello = decode(frame("hello", protocol, "9.9", "draft", *rest))
    assert isinstance(hello, wire.Hello)
    assert (hello.protocol, hello.version, hello.role) == (protocol, "9.9", "draft")


# --- what is not a message ------------------------------------------------------------------------


def frame(*fields: Any) -> bytes:
    packed: bytes = msgpack.packb(fields)
    return packed


def refused(data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        decode(data)
    assert len(str(caught.value)) < 400  # whatever the peer wrote
    return str(caught.value)


def nested(levels: int, opening: bytes, inside: bytes = b"\xc0") -> bytes:
    return opening * levels + inside


PROPOSAL = ["proposal", 2, 3, [[4, 0.5]], 0.1, 0.0, False]
VERDICT = ["verdict", 0, [4], 2, 3, [b"x"], [1.5], None, 0.1, 0.0]
DRAFTED = ("done", 1, PROPOSAL)
VERIFIED = ("done", 1, VERDICT)


def with_value(value: object, *path: int) -> bytes:
    """The frame `DRAFTED` with another value at the end of this path of indices."""
    fields = copy.deepcopy(list(DRAFTED))
    inner: Any = fields
    for at in path[:-1]:
        inner = inner[at]
    inner[path[-1]] = value
    return frame(*fields)


REPORT = msgspec.to_builtins(Stats().report())

BAD = [
    pytest.param(b"", id="nothing"),
    pytest.param(b"\xc1", id="a-byte-that-msgpack-never-uses"),
    pytest.param(frame(), id="an-empty-array"),
    pytest.param(msgpack.packb({"type": "who"}), id="a-map"),
    pytest.param(msgpack.packb("who"), id="a-bare-tag"),
    pytest.param(msgpack.packb(5), id="a-number"),
    pytest.param(frame("unheard-of"), id="an-unknown-tag"),
    pytest.param(frame("Done", *DRAFTED[1:]), id="a-tag-in-other-case"),
    pytest.param(frame(b"who"), id="a-tag-in-bytes"),
    pytest.param(frame(["who"]), id="a-tag-in-an-array"),
    pytest.param(frame(*DRAFTED)[:-1], id="cut-short"),
    pytest.param(frame(*DRAFTED) + b"\xc0", id="something-behind-it"),
    pytest.param(frame(*DRAFTED) * 2, id="two-messages"),
    pytest.param(frame(*DRAFTED[:-1]), id="a-field-missing"),
    pytest.param(frame(*DRAFTED, 0), id="a-field-too-many"),
    pytest.param(frame("done", 1, PROPOSAL[:-4]), id="a-field-missing-further-in"),
    pytest.param(frame("done", 1, [*PROPOSAL, 0]), id="a-field-too-many-further-in"),
    pytest.param(frame("done", 1, ["verify", 1, 1, []]), id="an-order-for-a-report"),
    pytest.param(frame("do", 1, PROPOSAL), id="a-report-for-an-order"),
    pytest.param(frame("who", None), id="a-field-where-there-is-none"),
    pytest.param(b"\x91\xa3\xff\xfe\xfd", id="a-tag-that-is-not-utf-8"),
    pytest.param(frame("tokenize", 1, b"text", True), id="bytes-for-text"),
    pytest.param(frame("done", 1, [*VERDICT[:5], ["eA=="], *VERDICT[6:]]), id="text-for-bytes"),
    pytest.param(frame("hello", 2, "9.9"), id="a-foreign-greeting-without-a-role"),
    pytest.param(frame("hello", 2, "9.9", "boss"), id="a-foreign-greeting-of-no-role"),
    pytest.param(frame("hello", 2, 9.9, "draft"), id="a-foreign-greeting-without-a-version"),
    pytest.param(frame("hello", -1, "9.9", "draft"), id="a-foreign-greeting-of-no-protocol"),
    pytest.param(frame("hello", True, "9.9", "draft"), id="a-greeting-whose-protocol-is-a-truth"),
    pytest.param(frame("beat", 1, 1), id="a-number-for-a-truth"),
    pytest.param(frame("hello", *[0] * 11), id="numbers-for-everything"),
    pytest.param(frame("finished", 1, "bored", REPORT, []), id="a-reason-that-is-none"),
    pytest.param(frame("finished", 1, "stop", [True, *REPORT[1:]], []), id="a-truth-for-a-count"),
    pytest.param(frame("finished", 1, "stop", [[], *REPORT[1:]], []), id="an-array-for-a-count"),
    pytest.param(frame("finished", 1, "stop", REPORT[:-7], []), id="statistics-cut-short"),
    pytest.param(frame("labels", 1, 0, 0), id="a-count-of-0"),
    pytest.param(frame("labels", 1, 0, 4097), id="a-count-that-is-too-high"),
    pytest.param(frame("healthreport", 1, {"x": msgpack.ExtType(5, b"x")}), id="an-extension-type"),
    pytest.param(frame("healthreport", 1, {"x": msgpack.Timestamp(1)}), id="a-timestamp"),
    pytest.param(nested(500, b"\x91"), id="nested-arrays"),
    pytest.param(nested(500, b"\x81\xa1a"), id="nested-maps"),
    pytest.param(nested(100_000, b"\x91"), id="nesting-beyond-the-stack"),
    pytest.param(frame("close", 0)[:-1] + nested(900, b"\x91"), id="nesting-inside-a-message"),
    pytest.param(
        frame("healthreport", 1, 0)[:-1] + nested(100_000, b"\x81\xa1a"),
        id="nesting-where-anything-goes",
    ),
    pytest.param(b"\xdd\xff\xff\xff\xff", id="an-array-of-a-claimed-4-billion"),
    pytest.param(b"\xdf\xff\xff\xff\xff", id="a-map-of-a-claimed-4-billion"),
    pytest.param(b"\xc6\xff\xff\xff\xff", id="bytes-of-a-claimed-4-gigabytes"),
    pytest.param(b"\xdb\xff\xff\xff\xff", id="a-text-of-a-claimed-4-gigabytes"),
    pytest.param(frame("healthreport", 1, {str(n): n for n in range(257)}), id="a-map-too-large"),
    pytest.param(frame("healthreport", 1, {"x": {5: 1}}), id="a-number-for-a-key-further-in"),
    pytest.param(
        frame("healthreport", 1, {"x": [0] * ((1 << 18) + 1)}), id="an-array-too-long-further-in"
    ),
    pytest.param(frame("detokenize", 1, [0] * ((1 << 18) + 1)), id="an-array-too-long"),
    pytest.param(frame("do", 1, ["verify", 1, 1, [0] * 1025]), id="a-block-too-long"),
    pytest.param(frame("refused", "v" * 257, ""), id="a-word-too-long"),
    pytest.param(frame("tokenize", 1, "\u00e9" * (FRAME_LIMIT // 2), True), id="a-frame-too-long"),
]


@pytest.mark.parametrize("data", BAD)
def test_what_is_not_a_message_is_a_protocol_error(data: bytes) -> None:
    refused(data)


def test_the_good_frames_that_the_bad_ones_vary_are_good() -> None:
    for good, kind in ((DRAFTED, Proposal), (VERIFIED, Verdict)):
        message = decode(frame(*good))
        assert isinstance(message, wire.Done)
        assert isinstance(message.done, kind)
    assert isinstance(decode(frame("finished", 1, "stop", REPORT, [])), wire.Finished)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *(((1,), value) for value in (-1, 2**63, 2**64 - 1)),
        *((path, value) for path in ((2, 1), (2, 2)) for value in HUGE),
        *(
            (path, value)
            for path in ((1,), (2, 1), (2, 2))
            for value in (True, False, 1.0, "1", b"1", None, [1], math.nan, math.inf)
        ),
    ],
    ids=repr,
)
def test_an_integer_field_takes_integers_of_its_range_only(
    path: tuple[int, ...], value: object
) -> None:
    refused(with_value(value, *path))


@pytest.mark.parametrize("value", [*HUGE, True, 1.0, "1", None, math.nan], ids=repr)
def test_a_token_is_a_small_integer(value: object) -> None:
    refused(with_value(value, 2, 3, 0, 0))


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, -0.1, 1.1, 2, True, "0.5", None], ids=repr
)
def test_a_confidence_is_a_probability(value: object) -> None:
    refused(with_value(value, 2, 3, 0, 1))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e7, True, "1", None], ids=repr)
def test_a_duration_is_finite_and_not_negative(value: object) -> None:
    refused(with_value(value, 2, 4))


@pytest.mark.parametrize("value", [-1.0, 100.5, math.nan, "1", None, True], ids=repr)
def test_a_setting_out_of_range_is_no_message(value: object) -> None:
    order = msgspec.to_builtins(Prefill((1, 2), Sampling(), False))
    assert isinstance(decode(frame("do", 1, order)), wire.Do)
    refused(frame("do", 1, [*order[:2], [value, *order[2][1:]], *order[3:]]))


def test_the_longest_frame_is_taken_and_a_byte_more_is_not() -> None:
    overhead = len(encode(wire.Tokenize(1, "x" * 70_000, True))) - 70_000
    longest = wire.Tokenize(1, "x" * (FRAME_LIMIT - overhead), True)
    assert len(encode(longest)) == FRAME_LIMIT
    assert decode(encode(longest)) == longest
    with pytest.raises(BadRequest, match="exceeds the limit"):
        encode(wire.Tokenize(1, longest.text + "x", True))
    refused(frame("tokenize", 1, longest.text + "x", True))


def test_the_peers_own_words_are_cut_in_the_error() -> None:
    refused(frame("finished", 1, "\x1b[2J" + "evil" * 50_000, {}, None))
    assert "\x1b" not in refused(frame("x\x1b[2J\n" * 3))


# --- mutants of good frames -----------------------------------------------------------------------


def only_protocol_errors(data: bytes) -> None:
    try:
        message = decode(data)
    except ProtocolError:
        return
    assert isinstance(message, KINDS)
    again = encode(message)  # and what was let in is one that we could have sent
    assert encode(decode(again)) == again


@settings(quiet, max_examples=400)
@given(st.binary(max_size=64))
@example(b"\x91\xa3who")
def test_random_bytes_raise_nothing_else(data: bytes) -> None:
    only_protocol_errors(data)


@settings(quiet, max_examples=400)
@given(st.sampled_from(NAMES), st.lists(anything | st.binary(max_size=4), max_size=12))
def test_random_fields_behind_a_tag_raise_nothing_else(name: str, fields: list[Any]) -> None:
    only_protocol_errors(frame(name.lower(), *fields))


def flip(data: bytearray, at: int, value: int) -> None:
    data[at % len(data)] ^= value or 1


def lengthen(data: bytearray, at: int, value: int) -> None:
    data[at % len(data) : at % len(data)] = struct.pack(">BI", 0xDD, value * 0x01010101)


def cut_off(data: bytearray, at: int, value: int) -> None:
    del data[at % len(data) :]


def repeat(data: bytearray, at: int, value: int) -> None:
    data[at % len(data) : at % len(data)] = data[: value % 16]


CHANGES: list[Callable[[bytearray, int, int], None]] = [flip, lengthen, cut_off, repeat]


@settings(quiet, max_examples=1500)
@given(
    st.one_of(*messages.values()),
    st.lists(
        st.tuples(st.sampled_from(CHANGES), st.integers(0, 1000), st.integers(0, 255)),
        min_size=1,
        max_size=3,
    ),
)
def test_a_damaged_frame_raises_nothing_else(
    message: Message, damage: list[tuple[Callable[[bytearray, int, int], None], int, int]]
) -> None:
    data = bytearray(encode(message))
    for change, at, value in damage:
        if data:
            change(data, at, value)
    only_protocol_errors(bytes(data))


# --- what a peer would not take is not sent -------------------------------------------------------

SETTINGS = Sampling(0.5, 1, 0.9, 0.1, 1.1, 64, 0.2, 0.3, ((1, 2.0),), 7)
SUBMIT = wire.Submit(1, "a", None, SETTINGS, 5, (), False, False, None, None, False)


@settings(quiet, max_examples=100)
@given(st.one_of(*messages.values()))
def test_a_message_within_its_bounds_passes_the_check(message: Message) -> None:
    check(message)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        pytest.param({"n_predict": 0}, "max_tokens", id="no-tokens"),
        pytest.param({"n_predict": 2**31}, "max_tokens", id="too-many-tokens"),
        pytest.param({"n_draft": -1}, "n_draft", id="a-negative-draft"),
        pytest.param({"n_min": -1}, "n_min", id="a-negative-least-draft"),
        pytest.param({"p_min": 1.5}, "p_min", id="a-probability-above-one"),
        pytest.param({"mode": "fast"}, "mode", id="an-unknown-mode"),
        pytest.param({"stop": ("x",) * 17}, "stop", id="too-many-stop-strings"),
        pytest.param({"stop": ("x" * 257,)}, "stop", id="a-stop-string-too-long"),
        pytest.param({"top_logprobs": 21}, "top_logprobs", id="too-many-top-logprobs"),
        pytest.param({"prompt": (1, -1)}, "prompt", id="a-negative-token"),
        pytest.param({"prompt": "\udcff"}, None, id="a-prompt-that-is-not-utf-8"),
        pytest.param({"prompt": "x" * FRAME_LIMIT}, None, id="a-prompt-that-fills-the-frame"),
    ],
)
def test_the_senders_mistake_is_named(changes: dict[str, Any], param: str | None) -> None:
    check(SUBMIT)
    with pytest.raises(BadRequest) as caught:
        check(SUBMIT.changed(**changes))
    assert caught.value.param == param


# --- values ---------------------------------------------------------------------------------------


def test_a_changed_value_is_otherwise_the_same() -> None:
    assert wire.Tokenize(5, "a", True).changed(call=9) == wire.Tokenize(9, "a", True)
    assert SETTINGS.changed(seed=8).changed(seed=7) == SETTINGS


def test_the_core_checks_settings_by_the_bounds_of_the_wire() -> None:
    with pytest.raises(BadRequest, match="temperature must be a number from 0 to 100"):
        Sampling(temperature=101)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(msgpack.packb([[]] * 262_000), id="an-array"),
        pytest.param(b"\xdd\x00\x03\xff\xfe" + b"\x91\x91\x90" * 262_142, id="nested-arrays"),
        pytest.param(frame("submit", 1, [{}] * 1_000_000), id="in-the-place-of-a-text"),
        pytest.param(frame("healthreport", 1, {"x": [{}] * 1_000_000}), id="in-a-report"),
    ],
)
def test_a_megabyte_of_nonsense_is_not_built_before_it_is_refused(data: bytes) -> None:
    """Else each such frame takes the coordinator 50 ms and 70 MiB."""
    tracemalloc.start()
    try:
        refused(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()
