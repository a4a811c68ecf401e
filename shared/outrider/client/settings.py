"""Checks of what a user asks for: anything wrong raises a BadRequest that names the argument.

Numbers may be NumPy's, ids may come as an array, and None stands for a setting's default.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import numpy as np
from numpy.typing import NDArray

from outrider.client import formats
from outrider.core.constraints import Constraint
from outrider.core.sampling import Sampling
from outrider.core.values import CHAT_ROLES, AskedMode
from outrider.errors import BadRequest
from outrider.wire import messages as wire

Whole: TypeAlias = int | np.integer[Any]
Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
Ids: TypeAlias = Sequence[Whole] | NDArray[np.integer[Any]]
Prompt: TypeAlias = str | Ids
LogitBias: TypeAlias = Mapping[int, Number] | Mapping[str, Number] | Mapping[np.int64, Number]


MOST_STOPS, LONGEST_STOP = 16, 256
YEAR_S = 365 * 86_400.0


class TextPart(TypedDict):
    """A part of a message's content; text is the only type."""

    type: Literal["text"]
    text: str


class ChatMessage(TypedDict):
    """One message of a conversation; the parts of `content` are joined."""

    role: str
    content: str | Sequence[TextPart]


Messages: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]


class CompletionSettings(TypedDict, total=False):
    """The keywords of `create_completion` and `create_chat_completion`; None means the default."""

    max_tokens: Whole | None
    """Most tokens to generate. Default: until the context is full."""
    temperature: Number | None
    """How random the choice of a token is; 0: always the likeliest. Default: 0.1."""
    top_k: Whole | None
    """Choose among this many of the likeliest tokens; 0, the default: among all."""
    top_p: Number | None
    """Choose among the likeliest tokens that together have this probability. Default: 1, all."""
    min_p: Number | None
    """Leave out tokens less likely than this share of the likeliest one. Default: 0, none."""
    repeat_penalty: Number | None
    """Divides the logits of tokens already in the text. Default: 1, which changes nothing."""
    repeat_last_n: Whole | None
    """How many tokens back the three penalties look; -1: all. Default: 64."""
    presence_penalty: Number | None
    """Subtracted from the logits of tokens already in the text. Default: 0."""
    frequency_penalty: Number | None
    """Subtracted from a token's logit for each time it is in the text. Default: 0."""
    logit_bias: LogitBias | None
    """Added to the logits of these token ids."""
    seed: Whole | None
    """The same seed gives the same text. Default, or if negative: random, see `stats.seed`."""
    stop: str | Sequence[str] | None
    """The answer ends before the first of these texts, 16 at most; or at a control token, if one of
    them is its marker, such as `<|im_start|>`."""
    logprobs: bool | None
    """Whether tokens carry the logarithm of the probability that the target gave them."""
    ignore_eos: bool | None
    """Whether to go on after the model has ended its answer."""
    response_format: Mapping[str, object] | None
    """As OpenAI's: {"type": "json_object"}, or {"type": "json_schema", "json_schema": {"schema":
    …}} for JSON that fits a schema. The prompt should ask for it, too."""
    json_schema: Mapping[str, object] | bool | str | None
    """The answer is JSON that fits this schema; or its text."""
    grammar: str | None
    """The answer is a text of this grammar, in llama.cpp's notation (GBNF), if the pipeline was
    started with `--allow-grammar`."""
    constraint: Constraint | None
    """What the answer has to be, as `tool_calls` makes it."""
    mode: AskedMode | None
    """How target and draft share the work; the text does not depend on it. Default: the
    pipeline's own."""
    n_draft: Whole | None
    """Most drafted tokens of a block. Default: as the pipeline is set."""
    n_min: Whole | None
    """Fewest drafted tokens of a block. Default: as the pipeline is set."""
    p_min: Number | None
    """A block ends before a token whose confidence is below this. Default: as the pipeline is
    set."""
    trace: bool | None
    """Whether the answer has a `trace`: when which worker computed."""


# ---- checks: from an argument's name and value to the value as the wire has it ------------------


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise _wrong(name, "must be True or False", value)
    return bool(value)


def text(name: str, value: object) -> str:
    """A string that UTF-8 can express, as a plain str."""
    if not isinstance(value, str):
        raise _wrong(name, "must be a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(name, "must be a string that UTF-8 can express", value) from None
    return str.__str__(value)


def whole(name: str, value: object) -> int:
    """A whole number, as a plain int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise _wrong(name, "must be a whole number", value)
    plain = operator.index(value)
    if not -(1 << 63) <= plain < 1 << 63:  # the bounds of each setting are checked later
        raise BadRequest(f"{name} is out of range", _param(name))
    return plain


def number(name: str, value: object) -> float:
    """A number, as a plain float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, "must be a number", value)
    try:
        return float(value)
    except OverflowError:
        raise BadRequest(f"{name} is out of range", _param(name)) from None


def seconds(name: str, value: object) -> float:
    """A time to wait, as a plain float; the longest is a year."""
    plain = number(name, value)
    if not plain >= 0.0:  # nor is NaN
        raise BadRequest(f"{name} must be a number of seconds, not {plain}", _param(name))
    return min(plain, YEAR_S)


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids, from a sequence or an array."""
    value = _listed(value)
    if not isinstance(value, list | tuple):
        raise _wrong(name, "must be a sequence of token ids", value)
    return tuple(whole(f"{name}[{n}]", one) for n, one in enumerate(value))


def prompt_of(value: object) -> str | tuple[int, ...]:
    """A prompt: text or token ids."""
    value = _listed(value)
    if isinstance(value, str):
        return text("prompt", value)
    if not isinstance(value, list | tuple):
        raise _wrong("prompt", "must be a string or a sequence of token ids", value)
    return token_ids("prompt", value)


def conversation(value: object) -> tuple[tuple[str, str], ...]:
    """Messages as (role, content) pairs."""
    value = _listed(value)
    if not isinstance(value, list | tuple):
        raise _wrong("messages", "must be a sequence of messages", value)
    return tuple(_message(f"messages[{n}]", one) for n, one in enumerate(value))


def _message(place: str, value: object) -> tuple[str, str]:
    if dump := getattr(value, "model_dump", None):  # an object of OpenAI's library
        value = dump(exclude_none=True)
    # a name is for the application: chat templates have no place for it
    message = _fields(place, value, ("role", "content"), ignored="name")
    role, content = (message[key] for key in ("role", "content"))
    if not isinstance(content, str):
        parts = _listed(content)
        if not isinstance(parts, list | tuple):
            raise _wrong(f"{place}.content", "must be a string or a list of parts", content)
        content = "".join(_part(f"{place}.content[{n}]", one) for n, one in enumerate(parts))
    role = text(f"{place}.role", role)
    if role not in CHAT_ROLES:
        raise _wrong(f"{place}.role", f"must be one of {', '.join(CHAT_ROLES)}", role)
    return role, text(f"{place}.content", content)


def _part(place: str, value: object) -> str:
    if isinstance(value, Mapping) and value.get("type", "text") != "text":  # an image, say
        raise _wrong(f"{place}.type", "must be 'text'", value["type"])
    part = _fields(place, value, ("type", "text"))
    return text(f"{place}.text", part["text"])


def _fields(
    place: str, value: object, names: tuple[str, str], ignored: str = ""
) -> Mapping[object, object]:
    """`value`, if it has these fields and all others are None, as OpenAI's objects have some."""
    if not isinstance(value, Mapping):
        raise _wrong(place, "must be a mapping", value)
    for name in names:
        if name not in value:
            raise BadRequest(f"{place} has no {name!r}", _param(place))
    for name in value:
        if name not in (*names, ignored) and value[name] is not None:
            raise BadRequest(f"{place} has an unknown field {name!r:.80}", _param(place))
    return value


def _stop(name: str, value: object) -> tuple[str, ...]:
    value = _listed(value)
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise _wrong(name, "must be a string or a sequence of strings", value)
    if len(value) > MOST_STOPS:
        raise BadRequest(f"{name} has {len(value)} texts, more than {MOST_STOPS}", name)
    stops = tuple(text(f"{name}[{n}]", one) for n, one in enumerate(value))
    longest = max(map(len, stops), default=0)
    if longest > LONGEST_STOP:
        raise BadRequest(f"{name} must be of {LONGEST_STOP} letters at most, not {longest}", name)
    return tuple(filter(None, stops))  # an empty one stops nothing


def _mode(name: str, value: object) -> str:
    mode = text(name, value)
    if mode not in get_args(AskedMode):
        raise _wrong(name, f"must be one of {', '.join(get_args(AskedMode))}", mode)
    return mode


def _logit_bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise _wrong(name, "must be a mapping from token ids to numbers", value)
    biases = {_bias_id(name, token): bias for token, bias in value.items()}
    return tuple((token, number(f"{name}[{token}]", biases[token])) for token in sorted(biases))


def _bias_id(name: str, value: object) -> int:
    # JSON's keys are strings, so OpenAI's library takes ids as strings
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        return int(value)
    return whole(f"a token id of {name}", value)


def _listed(value: object) -> object:
    """Make arrays and other iterables lists of plain values; leave single values and text alone."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set | list | tuple):
        return value
    if isinstance(value, np.ndarray):
        listed: object = value.tolist()
        return listed
    return list(value) if isinstance(value, Iterable) else value


def _wrong(place: str, rule: str, value: object) -> BadRequest:
    found = repr(value) if isinstance(value, str | float | bool) else type(value).__name__
    return BadRequest(f"{place} {rule}, not {found:.80}", _param(place))


def _param(place: str) -> str:
    """The argument that `place` is a part of."""
    return place.removeprefix("a token id of ").partition("[")[0]


CHECKS: dict[str, Callable[[str, object], Any]] = {
    "max_tokens": whole,
    "temperature": number,
    "top_k": whole,
    "top_p": number,
    "min_p": number,
    "repeat_penalty": number,
    "repeat_last_n": whole,
    "presence_penalty": number,
    "frequency_penalty": number,
    "logit_bias": _logit_bias,
    "seed": whole,
    "stop": _stop,
    "logprobs": flag,
    "ignore_eos": flag,
    "response_format": formats.response_format,
    "json_schema": formats.json_schema,
    "grammar": formats.grammar,
    "constraint": formats.made,
    "mode": _mode,
    "n_draft": whole,
    "n_min": whole,
    "p_min": number,
    "trace": flag,
}


def submit(
    call: int,
    prompt: str | tuple[int, ...],
    messages: tuple[tuple[str, str], ...] | None,
    settings: Mapping[str, object],
) -> wire.Submit:
    """The request as the wire has it. Raises BadRequest, which names the setting."""
    for name in settings.keys() - CHECKS.keys():
        near = get_close_matches(name, CHECKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadRequest(f"there is no setting {name!r}{hint}", name)
    given = {n: CHECKS[n](n, value) for n, value in settings.items() if value is not None}
    if given.get("seed", -1) < 0:
        given["seed"] = secrets.randbits(31)
    sampling = {name: given[name] for name in Sampling.__struct_fields__ if name in given}
    return wire.Submit(
        call=call,
        prompt=prompt,
        messages=messages,
        sampling=Sampling(**sampling),
        n_predict=given.get("max_tokens"),
        stop=given.get("stop", ()),
        ignore_eos=given.get("ignore_eos", False),
        logprobs=given.get("logprobs", False),
        mode=given.get("mode"),
        n_draft=given.get("n_draft"),
        trace=given.get("trace", False),
        n_min=given.get("n_min"),
        p_min=given.get("p_min"),
        constraint=formats.constraint_of(given),
    )
