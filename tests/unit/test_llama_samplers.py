"""Our filters and penalties against llama.cpp's own samplers, in the installed library.

The candidates that are left and their probabilities are compared: on random rows, in which no two
logits are equal, so that llama.cpp's unstable sorting does not matter.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from outrider.core import sampling as ours
from outrider.core.noise import IdArray, Scores, key_of
from outrider.core.sampling import Sampling
from outrider.core.values import TokenId

llama: Any = pytest.importorskip("llama_cpp")

SIZES = [1, 2, 7, 300, 5000, 151_936]
CANDIDATE = np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])  # llama_token_data
Law = dict[TokenId, float]  # the probability of each candidate that may be chosen


def row_of(size: int, seed: int, spread: float = 2.5) -> Scores:
    """Thirty likely ids above a bell, as a language model's; some are impossible."""
    random = np.random.default_rng(seed)
    row = (random.standard_normal(size) * spread).astype(np.float32)
    if size > 100:
        row[random.integers(0, size, 30)] = np.linspace(2.2, 7, 30, dtype=np.float32) * spread
    return row


def chain(given: Sampling) -> list[Any]:
    """The samplers in llama-server's order, as `common_sampler_init` makes them."""
    bias = (llama.llama_logit_bias * len(given.logit_bias))(*given.logit_bias)
    dry = (given.dry_multiplier, given.dry_base, given.dry_allowed_length, given.dry_penalty_last_n)
    three = (given.repeat_penalty, given.frequency_penalty, given.presence_penalty)
    return [
        llama.llama_sampler_init_logit_bias(1 << 20, len(given.logit_bias), bias),
        llama.llama_sampler_init_penalties(1 << 20, given.repeat_last_n, *three),
        llama.llama_sampler_init_dry(None, *dry, (ctypes.c_char_p * 0)(), 0),
        llama.llama_sampler_init_top_n_sigma(given.top_n_sigma),
        llama.llama_sampler_init_top_k(given.top_k),
        llama.llama_sampler_init_typical(given.typical_p, 0),
        llama.llama_sampler_init_top_p(given.top_p, 0),
        llama.llama_sampler_init_min_p(given.min_p, 0),
        llama.llama_sampler_init_xtc(given.xtc_probability, given.xtc_threshold, 0, 1),
        llama.llama_sampler_init_temp_ext(
            given.temperature, given.dynatemp_range, given.dynatemp_exponent
        ),
    ]


def theirs(row: Scores, given: Sampling, text: Sequence[TokenId] = ()) -> Law:
    """The law from which llama.cpp would draw."""
    data = (llama.llama_token_data * row.size)()
    view = np.frombuffer(data, CANDIDATE)
    view["id"], view["logit"] = np.arange(row.size), row
    found = llama.llama_token_data_array(data=data, size=row.size, selected=-1, sorted=False)
    for sampler in chain(given):
        for token in text:
            llama.llama_sampler_accept(sampler, token)
        llama.llama_sampler_apply(sampler, ctypes.byref(found))
        llama.llama_sampler_free(sampler)
    first = ctypes.addressof(found.data.contents)  # XTC moves the beginning
    left = (llama.llama_token_data * found.size).from_address(first)
    kept = np.frombuffer(left, CANDIDATE)
    kept = kept[kept["logit"] > -np.inf]
    return law_of(list(zip(kept["id"].tolist(), kept["logit"].tolist(), strict=True)))


def law_of(left: list[tuple[TokenId, float]]) -> Law:
    logits = np.array([logit for _, logit in left], np.float64)
    weights = np.exp(logits - logits.max())
    pairs = zip(left, weights / weights.sum(), strict=True)
    return {token: float(p) for (token, _), p in pairs}


def own(row: Scores, given: Sampling, text: Sequence[TokenId] = ()) -> Law:
    """The law from which we draw."""
    row = ours._adjust(row, given, text)
    _, top = ours.likeliest(row)
    key: IdArray = key_of(given.seed, len(text))
    found, temperature = ours._field(row, given, top, key)
    scaled = found.logits.astype(np.float64)
    if temperature == 0:
        scaled = np.where(scaled == scaled.max(), 0.0, -np.inf)
    else:
        scaled = scaled / temperature
    pairs = zip(found.ids.tolist(), scaled.tolist(), strict=True)
    return law_of([(token, logit) for token, logit in pairs if logit > -np.inf])


def compare(law: Law, other: Law) -> None:
    """Equal but for rounding, by which a token at the edge of a filter may be in or out."""
    for token in law.keys() | other.keys():
        one, two = law.get(token, 0.0), other.get(token, 0.0)
        assert abs(one - two) <= 2e-4 + 2e-3 * max(one, two)
    assert abs(len(law) - len(other)) <= max(1, len(law) // 200)


ONE = [
    {"typical_p": 0.1},
    {"typical_p": 0.5},
    {"typical_p": 0.95},
    {"top_n_sigma": 0.5},
    {"top_n_sigma": 1.0},
    {"top_n_sigma": 2.0},
    {"dynatemp_range": 0.5},
    {"dynatemp_range": 2.0, "dynatemp_exponent": 0.3},
    {"dynatemp_range": 0.5, "dynatemp_exponent": 2.0},
    {"temperature": 0.0, "dynatemp_range": 0.4},
    {"temperature": 0.0},
    {"xtc_probability": 1.0},
    {"xtc_probability": 1.0, "xtc_threshold": 0.02},
    {"xtc_probability": 1.0, "xtc_threshold": 0.6},
    {"temperature": 0.0, "xtc_probability": 1.0, "xtc_threshold": 0.05},
    {"temperature": 0.0, "typical_p": 0.2},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
]
SEVERAL = [
    {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "temperature": 0.8},
    {"top_k": 20, "typical_p": 0.7, "top_p": 0.9, "temperature": 1.3},
    {"top_n_sigma": 1.0, "top_k": 12, "dynatemp_range": 0.5},
    {"top_n_sigma": 1.0, "dynatemp_range": 0.5},
    {"top_n_sigma": 1.5, "min_p": 0.02, "dynatemp_range": 0.5, "dynatemp_exponent": 1.5},
    {"top_k": 30, "min_p": 0.01, "xtc_probability": 1.0, "xtc_threshold": 0.05, "temperature": 1.5},
    {"top_p": 0.8, "xtc_probability": 1.0, "xtc_threshold": 0.03, "dynatemp_range": 1.0},
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", ONE + SEVERAL, ids=str)
def test_the_candidates_and_their_probabilities_are_llama_cpps(
    given: dict[str, Any], size: int
) -> None:
    settings = Sampling(**{"temperature": 1.0, **given})
    for seed in range(1 if size > 10_000 else 4):
        row = row_of(size, seed)
        compare(own(row, settings), theirs(row, settings))


PENALTIES = [
    {"dry_multiplier": 0.8},
    {"dry_multiplier": 5.0, "dry_base": 1.0, "dry_allowed_length": 1},
    {"dry_multiplier": 0.3, "dry_base": 2.5, "dry_allowed_length": 0, "dry_penalty_last_n": 20},
    {"dry_multiplier": 0.01, "dry_base": 1.1, "dry_allowed_length": 4},
    {"dry_multiplier": 1.0, "dry_allowed_length": 63},
    {"dry_multiplier": 2.0, "dry_allowed_length": 64},
    {"repeat_penalty": 1.3, "repeat_last_n": 10, "dry_multiplier": 0.5, "top_k": 30},
    {"presence_penalty": 0.5, "frequency_penalty": 0.2, "dry_multiplier": 0.5},
    {"dry_multiplier": 0.5, "typical_p": 0.9, "logit_bias": ((1, 2.0), (3, -1.0))},
]


LEAST = {63: 1, 64: 0}  # texts of which something is penalised, by the allowed length


def texts() -> list[list[TokenId]]:
    random = np.random.default_rng(3)
    made = [random.integers(0, letters, 90).tolist() for letters in (1, 2, 3, 5, 20)]
    return [*made, [], [1], [1, 1], [0, 1, 2, 3] * 10, [4, *[2] * 63], [*range(64), 9, 0, 1]]


@pytest.mark.parametrize("given", PENALTIES, ids=str)
def test_what_is_repeated_is_penalised_as_by_llama_cpp(given: dict[str, Any]) -> None:
    settings, checked = Sampling(**{"temperature": 1.0, **given}), 0
    for number, text in enumerate(texts()):
        row = row_of(40, number)
        compare(own(row, settings, text), theirs(row, settings, text))
        checked += own(row, settings, text) != own(row, Sampling(temperature=1.0), text)
    assert checked >= LEAST.get(settings.dry_allowed_length, 4)


def test_repetitions_of_any_length_are_counted_as_by_llama_cpp() -> None:
    """The penalty grows so slowly here that each token more can be seen."""
    row = row_of(30, 0, spread=0.1)
    for length in (20, 100, 300):
        text = [*range(length // 4), 29, *range(length // 4)] * 2
        text = [token % 29 for token in text]
        settings = Sampling(
            temperature=1.0, dry_multiplier=0.01, dry_base=1.02, dry_penalty_last_n=len(text)
        )
        compare(own(row, settings, text), theirs(row, settings, text))


@pytest.mark.parametrize(
    "wrong",
    [
        lambda one: one.changed(typical_p=0.6),
        lambda one: one.changed(top_n_sigma=1.2),
        lambda one: one.changed(dynatemp_exponent=1.4),
        lambda one: one.changed(xtc_threshold=0.2),
        lambda one: one.changed(dry_allowed_length=1),
    ],
    ids=["typical", "sigma", "dynatemp", "xtc", "dry"],
)
def test_control_other_settings_are_told_apart(wrong: Callable[[Sampling], Sampling]) -> None:
    for given in (
        Sampling(temperature=1.0, typical_p=0.5),
        Sampling(temperature=1.0, top_n_sigma=1.0),
        Sampling(temperature=1.0, dynatemp_range=0.5, dynatemp_exponent=2.0),
        Sampling(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.05),
        Sampling(temperature=1.0, dry_multiplier=1.0),
    ):
        row, text = row_of(40, 5, spread=1.0), [1, 2, 3, 1, 2, 3, 1]
        row[:3] = 2.6, 2.5, 2.4
        if own(row, given, text) != own(row, wrong(given), text):
            with pytest.raises(AssertionError):
                compare(own(row, wrong(given), text), theirs(row, given, text))
            return
    pytest.fail("the settings make no difference at all")
