"""Checks of what a user asks for: anything wrong raises a BadRequest that names the argument.

Numbers may be NumPy's, ids may come as an array, and None stands for a setting's default.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from outrider.client import formats
from outrider.client.samplers import Number, SamplerSettings, Whole, only
from outrider.core.constraints import Constraint
from outrider.core.sampling import Sampling
from outrider.core.values import MOST_TOP_LOGPROBS, AskedMode
from outrider.errors import BadRequest
from outrider.wire import messages as wire

Ids: TypeAlias = Sequence[Whole] | NDArray[np.integer[Any]]
Prompt: TypeAlias = str | Ids
LogitBias: TypeAlias = Mapping[int, Number] | Mapping[str, Number] | Mapping[np.int64, Number]


MOST_STOPS, LONGEST_STOP = 16, 256
YEAR_S = 365 * 86_400.0


class CompletionSettings(SamplerSettings, total=False):
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
    logprobs: bool | Whole | None
    """Whether tokens carry the logarithm of the probability that the target gave them, before
    penalties, filters and temperature. A number is that of `top_logprobs` at the same time."""
    top_logprobs: Whole | None
    """With `logprobs`: of how many of the likeliest tokens at each position, 20 at most, to tell
    the same. Default: 0."""
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
    cache_prompt: bool | None
    """Whether what is read of the text may be used again by later ones. Default: true."""
    cache_key: str | None
    """What was read is only used again by requests with the same key. Default: an empty one."""
    trace: bool | None
    """Whether the answer has a `trace`: when which worker computed."""


# ---- checks: from an argument's name and value to the value as the wire has it ------------------


def flag(name: str, value: object) -> bool:
    """True or False."""
    if not isinstance(value, bool | np.bool_):
        raise wrong(name, "must be True or False", value)
    return bool(value)


def text(name: str, value: object) -> str:
    """A string that UTF-8 can express, as a plain str."""
    if not isinstance(value, str):
        raise wrong(name, "must be a string", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise wrong(name, "must be a string that UTF-8 can express", value) from None
    return str.__str__(value)


def whole(name: str, value: object) -> int:
    """A whole number, as a plain int."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong(name, "must be a whole number", value)
    plain = operator.index(value)
    if not -(1 << 63) <= plain < 1 << 63:  # the bounds of each setting are checked later
        raise BadRequest(f"{name} is out of range", param_of(name))
    return plain


def number(name: str, value: object) -> float:
    """A number, as a plain float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong(name, "must be a number", value)
    try:
        return float(value)
    except OverflowError:
        raise BadRequest(f"{name} is out of range", param_of(name)) from None


def seconds(name: str, value: object) -> float:
    """A time to wait, as a plain float; the longest is a year."""
    plain = number(name, value)
    if not plain >= 0.0:  # nor is NaN
        raise BadRequest(f"{name} must be a number of seconds, not {plain}", param_of(name))
    return min(plain, YEAR_S)


def token_ids(name: str, value: object) -> tuple[int, ...]:
    """Token ids, from a sequence or an array."""
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise wrong(name, "must be a sequence of token ids", value)
    return tuple(whole(f"{name}[{n}]", one) for n, one in enumerate(value))


def prompt_of(value: object) -> str | tuple[int, ...]:
    """A prompt: text or token ids."""
    value = listed(value)
    if isinstance(value, str):
        return text("prompt", value)
    if not isinstance(value, list | tuple):
        raise wrong("prompt", "must be a string or a sequence of token ids", value)
    return token_ids("prompt", value)


def files(name: str, value: object) -> tuple[tuple[str, str], ...]:
    """Files as (name, text) pairs."""
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise wrong(name, "must be a sequence of (name, text) pairs", value)
    for n, one in enumerate(value):
        if not isinstance(one, list | tuple) or len(one) != 2:
            raise wrong(f"{name}[{n}]", "must be a (name, text) pair", one)
    return tuple(
        (text(f"{name}[{n}]", a), text(f"{name}[{n}]", b)) for n, (a, b) in enumerate(value)
    )


def _stop(name: str, value: object) -> tuple[str, ...]:
    value = listed(value)
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, list | tuple):
        raise wrong(name, "must be a string or a sequence of strings", value)
    if len(value) > MOST_STOPS:
        raise BadRequest(f"{name} has {len(value)} texts, more than {MOST_STOPS}", name)
    stops = tuple(text(f"{name}[{n}]", one) for n, one in enumerate(value))
    longest = max(map(len, stops), default=0)
    if longest > LONGEST_STOP:
        raise BadRequest(f"{name} must be of {LONGEST_STOP} letters at most, not {longest}", name)
    return tuple(filter(None, stops))  # an empty one stops nothing


def _breakers(name: str, value: object) -> tuple[str, ...]:
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise wrong(name, "must be a sequence of strings", value)
    return tuple(text(f"{name}[{n}]", one) for n, one in enumerate(value))


def _samplers(name: str, value: object) -> str | tuple[str, ...]:
    return text(name, value) if isinstance(value, str) else _breakers(name, value)


def _logprobs(name: str, value: object) -> bool | int:
    return flag(name, value) if isinstance(value, bool | np.bool_) else _top_logprobs(name, value)


def _top_logprobs(name: str, value: object) -> int:
    count = whole(name, value)
    if not 0 <= count <= MOST_TOP_LOGPROBS:
        raise wrong(name, f"must be a whole number from 0 to {MOST_TOP_LOGPROBS}", value)
    return count


def _mode(name: str, value: object) -> str:
    mode = text(name, value)
    if mode not in get_args(AskedMode):
        raise wrong(name, f"must be one of {', '.join(get_args(AskedMode))}", mode)
    return mode


def _logit_bias(name: str, value: object) -> tuple[tuple[int, float], ...]:
    if not isinstance(value, Mapping):
        raise wrong(name, "must be a mapping from token ids to numbers", value)
    biases = {_bias_id(name, token): bias for token, bias in value.items()}
    return tuple((token, number(f"{name}[{token}]", biases[token])) for token in sorted(biases))


def _bias_id(name: str, value: object) -> int:
    # JSON's keys are strings, so OpenAI's library takes ids as strings
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        return int(value)
    return whole(f"a token id of {name}", value)


def listed(value: object) -> object:
    """Make arrays and other iterables lists of plain values; leave single values and text alone."""
    if isinstance(value, str | bytes | bytearray | memoryview | Mapping | Set | list | tuple):
        return value
    if isinstance(value, np.ndarray):
        listed: object = value.tolist()
        return listed
    return list(value) if isinstance(value, Iterable) else value


def wrong(place: str, rule: str, value: object) -> BadRequest:
    found = repr(value) if isinstance(value, str | float | bool) else type(value).__name__
    return BadRequest(f"{place} {rule}, not {found:.80}", param_of(place))


def param_of(place: str) -> str:
    """The argument that `place` is a part of."""
    return place.removeprefix("a token id of ").partition("[")[0].partition(".")[0]


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
    "typical_p": number,
    "top_n_sigma": number,
    "dynatemp_range": number,
    "dynatemp_exponent": number,
    "xtc_probability": number,
    "xtc_threshold": number,
    "dry_multiplier": number,
    "dry_base": number,
    "dry_allowed_length": whole,
    "dry_penalty_last_n": whole,
    "dry_sequence_breakers": _breakers,
    "samplers": _samplers,
    "logit_bias": _logit_bias,
    "seed": whole,
    "stop": _stop,
    "logprobs": _logprobs,
    "top_logprobs": _top_logprobs,
    "ignore_eos": flag,
    "response_format": formats.response_format,
    "json_schema": formats.json_schema,
    "grammar": formats.grammar,
    "constraint": formats.made,
    "mode": _mode,
    "n_draft": whole,
    "n_min": whole,
    "p_min": number,
    "cache_prompt": flag,
    "cache_key": text,
    "trace": flag,
}


def submit(
    call: int,
    prompt: str | tuple[int, ...],
    messages: wire.Conversation | None,
    settings: Mapping[str, object],
    tools: wire.Tools | None = None,
) -> wire.Submit:
    """The request as the wire has it. Raises BadRequest, which names the setting."""
    for name in settings.keys() - CHECKS.keys():
        near = get_close_matches(name, CHECKS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise BadRequest(f"there is no setting {name!r}{hint}", name)
    given = {n: CHECKS[n](n, value) for n, value in settings.items() if value is not None}
    if given.get("seed", -1) < 0:
        given["seed"] = secrets.randbits(31)
    named = {name: given[name] for name in Sampling.__struct_fields__ if name in given}
    sampling = Sampling(**named)
    if "samplers" in given:
        sampling = only(sampling, given["samplers"])
    logprobs, top_logprobs = _asked_logprobs(given)
    return wire.Submit(
        call=call,
        prompt=prompt,
        messages=messages,
        sampling=sampling,
        n_predict=given.get("max_tokens"),
        stop=given.get("stop", ()),
        ignore_eos=given.get("ignore_eos", False),
        logprobs=logprobs,
        mode=given.get("mode"),
        n_draft=given.get("n_draft"),
        trace=given.get("trace", False),
        n_min=given.get("n_min"),
        p_min=given.get("p_min"),
        cache=given.get("cache_key", "") if given.get("cache_prompt", True) else None,
        top_logprobs=top_logprobs,
        tools=tools,
        constraint=formats.constraint_of(given, tools),
    )


def _asked_logprobs(given: Mapping[str, Any]) -> tuple[bool, int]:
    """Whether to tell log-probabilities, and of how many more tokens."""
    logprobs, top = given.get("logprobs", False), given.get("top_logprobs", 0)
    if not isinstance(logprobs, bool):
        if top not in (0, logprobs):
            raise BadRequest(f"logprobs says {logprobs} and top_logprobs {top}", "top_logprobs")
        return True, logprobs
    if top and not logprobs:
        raise BadRequest("top_logprobs is only told with logprobs=True", "top_logprobs")
    return logprobs, top
