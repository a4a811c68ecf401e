"""DRY with sequence breakers on a real vocabulary, against llama.cpp's own sampler."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from outrider.core.noise import Scores
from outrider.core.penalties import penalise_repetition
from outrider.core.sampling import Sampling
from outrider.engines.breakers import KnownBreakers
from outrider.engines.llama.engine import LlamaEngine, LlamaSettings

pytestmark = [pytest.mark.model, pytest.mark.timeout(180)]

TEXT = (
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a - b\n\n"
    'print("add: one", add(1, 2), "sub: two", sub(1, 2))\n'
    "* first point: naïve café\n* second point: naïve café\n<|im_end|>\n<|im_end|>"
)
SETTINGS = [
    Sampling(dry_multiplier=0.8),
    Sampling(dry_multiplier=0.8, dry_allowed_length=1, dry_sequence_breakers=()),
    Sampling(
        dry_multiplier=0.5, dry_allowed_length=1, dry_sequence_breakers=("ret", "point:", "é")
    ),
    Sampling(dry_multiplier=0.5, dry_allowed_length=0, dry_sequence_breakers=(" b)", "im_end")),
]


@pytest.fixture(scope="module", params=["test_model", "default_draft"])
def engine(request: pytest.FixtureRequest) -> Iterator[LlamaEngine]:
    # exact, as all engines of this process: the library reads once which kernels to use
    settings = LlamaSettings(context=256, slots=1, threads=1, batch=64, ubatch=64, exact=True)
    engine = LlamaEngine.load(request.getfixturevalue(request.param), settings)
    yield engine
    engine.close()


def theirs(engine: LlamaEngine, given: Sampling) -> Any:
    """llama.cpp's sampler, with no text yet."""
    texts = [text.encode() for text in given.dry_sequence_breakers]
    breakers = (ctypes.c_char_p * len(texts))(*texts)
    return engine._lib.llama_sampler_init_dry(
        engine._text._vocab,
        given.dry_multiplier,
        given.dry_base,
        given.dry_allowed_length,
        given.dry_penalty_last_n,
        breakers,
        len(texts),
    )


def applied(engine: LlamaEngine, sampler: Any, size: int) -> Scores:
    """What it makes of logits that are all 0."""
    lib = engine._lib
    data = (lib.llama_token_data * size)()
    view = np.frombuffer(data, [("id", "i4"), ("logit", "f4"), ("p", "f4")])
    view["id"] = np.arange(size)
    found = lib.llama_token_data_array(data=data, size=size, selected=-1, sorted=False)
    lib.llama_sampler_apply(sampler, ctypes.byref(found))
    logits: Scores = view["logit"].copy()
    return logits


@pytest.mark.parametrize("given", SETTINGS, ids=lambda one: str(one.dry_sequence_breakers))
def test_every_token_of_a_text_is_penalised_as_by_llama_cpp(
    engine: LlamaEngine, given: Sampling
) -> None:
    size = engine.info.vocabulary.size
    text = engine.tokenize(TEXT, special=True)
    sampler, penalised = theirs(engine, given), 0
    known = KnownBreakers(engine)
    for at, token in enumerate(text):
        engine._lib.llama_sampler_accept(sampler, token)
        row: Scores = np.zeros(size, np.float32)
        recent = text[: at + 1][-given.dry_penalty_last_n :]
        rule = given.dry_multiplier, given.dry_base, given.dry_allowed_length
        penalise_repetition(row, recent, *rule, known.of(given))
        expected = applied(engine, sampler, size)
        np.testing.assert_allclose(row, expected, rtol=1e-6)
        penalised += bool(expected.any())
    engine._lib.llama_sampler_free(sampler)
    assert penalised > 5
