"""The less common samplers, and llama-server's list of those in use, whose order is fixed here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, TypeAlias, TypedDict

import numpy as np

from outrider.core.sampling import Sampling
from outrider.errors import BadRequest

Whole: TypeAlias = int | np.integer[Any]
Number: TypeAlias = float | np.floating[Any] | np.integer[Any]


class SamplerSettings(TypedDict, total=False):
    """Keywords of `CompletionSettings`, by llama-server's names and with its meanings."""

    typical_p: Number | None
    """Choose among the tokens of most typical probability that together have this one. Default: 1,
    all."""
    top_n_sigma: Number | None
    """Leave out tokens more than so many standard deviations below the likeliest. Default: -1, as
    whatever is not above 0: none."""
    dynatemp_range: Number | None
    """The temperature is up to so much lower where the model is sure, and higher where it is not.
    Default: 0."""
    dynatemp_exponent: Number | None
    """Of the share of the highest entropy that this follows. Default: 1."""
    xtc_probability: Number | None
    """How likely XTC is to leave out, at a position, the likeliest tokens. Default: 0."""
    xtc_threshold: Number | None
    """Those are all of at least this probability but the last. Default: 0.1; above 0.5: none."""
    dry_multiplier: Number | None
    """DRY subtracts this times `dry_base` to the power of the length beyond `dry_allowed_length`
    from the logit of a token that would make a repetition longer. Default: 0, nothing."""
    dry_base: Number | None
    """See `dry_multiplier`. Default: 1.75."""
    dry_allowed_length: Whole | None
    """How many tokens may be repeated, 1,024 at most. Default: 2."""
    dry_penalty_last_n: Whole | None
    """How many tokens back DRY looks; -1: all. Default: 64."""
    dry_sequence_breakers: Sequence[str] | None
    """No repetition reaches over these texts, 16 at most. Default: line end, `:`, `"` and `*`."""
    samplers: str | Sequence[str] | None
    """The samplers in use, by llama-server's names, or its letters in one text, in its default
    order; any other is off. Default: all. Without "temperature" the temperature is 1."""


# in llama-server's default order: the settings with which each does nothing
OFF: Mapping[str, Mapping[str, float]] = MappingProxyType(
    {
        "penalties": {
            "repeat_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
        },
        "dry": {"dry_multiplier": 0.0},
        "top_n_sigma": {"top_n_sigma": -1.0},
        "top_k": {"top_k": 0},
        "typ_p": {"typical_p": 1.0},
        "top_p": {"top_p": 1.0},
        "min_p": {"min_p": 0.0},
        "xtc": {"xtc_probability": 0.0},
        "temperature": {"temperature": 1.0, "dynatemp_range": 0.0},
    }
)
LETTERS = dict(zip("edskypmxt", OFF, strict=True))
OTHER_NAMES = {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p", "typicalp": "typ_p"}
NAMES: dict[str, str] = {**{name.replace("_", ""): name for name in OFF}, **OTHER_NAMES}


def only(sampling: Sampling, samplers: Sequence[str]) -> Sampling:
    """The settings with all samplers off but these, which are names, or letters in one text.

    Without "temperature" the choice is made at temperature 1, as in llama-server. Raises BadRequest
    for one that is unknown, for one that comes twice, and for another order.
    """
    kept = [_name(one, letter=isinstance(samplers, str)) for one in samplers]
    if kept != [name for name in OFF if name in kept]:
        order = ", ".join(OFF)
        raise BadRequest(f"samplers must be in this order, each once: {order}", "samplers")
    off = {field: value for name in OFF if name not in kept for field, value in OFF[name].items()}
    return sampling.changed(**off)


def _name(given: str, letter: bool) -> str:
    name = given.lower().replace("-", "").replace("_", "")
    known = LETTERS if letter else NAMES
    if name in known:
        return known[name]
    near = [] if letter else get_close_matches(name, NAMES, 1)
    hint = f"did you mean {NAMES[near[0]]!r}?" if near else f"there are {', '.join(OFF)}"
    raise BadRequest(f"samplers has {given!r:.80}, which is not supported; {hint}", "samplers")
