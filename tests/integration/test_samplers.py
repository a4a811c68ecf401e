"""Every sampler, drafted with the same settings: the text is that of the target alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pytest

from outrider.core.logprobs import top_logprobs
from outrider.core.penalties import NO_BREAKERS
from outrider.core.sampling import Sampling, choose
from outrider.engines.breakers import KnownBreakers
from outrider.engines.toy import ToyEngine

if TYPE_CHECKING:
    from tests.integration.conftest import Served

MODES: tuple[Literal["plain", "sync", "pipelined"], ...] = ("plain", "sync", "pipelined")
PROMPT = "The river runs"
COUNT = 60
DRY = {"dry_multiplier": 1.5, "dry_allowed_length": 1, "dry_penalty_last_n": -1}
BROKEN = ("the ", "r")


def alone(settings: dict[str, Any], *, broken: bool = True) -> list[int]:
    """What the target says by itself, one token at a time."""
    engine, sampling = ToyEngine(), Sampling(**settings)
    breakers = KnownBreakers(engine).of(sampling) if broken else NO_BREAKERS
    text = engine.tokenize(PROMPT, special=True)
    start = len(text)
    while len(text) < start + COUNT:
        (row,) = engine.extend(0, text[engine.length(0) :], 1)
        text.append(choose(row, sampling, text, len(text), breakers=breakers))
    return text[start:]


WARM = {"temperature": 0.9, "seed": 7}
SETTINGS: list[dict[str, Any]] = [
    {**WARM, "typical_p": 0.6},
    {**WARM, "top_n_sigma": 0.1},
    {**WARM, "dynatemp_range": 0.8, "dynatemp_exponent": 0.7},
    {"temperature": 0.0, "dynatemp_range": 0.8, "seed": 7},
    {**WARM, "xtc_probability": 0.5, "xtc_threshold": 0.05},
    {"temperature": 0.0, "xtc_probability": 0.5, "seed": 7},
    {**WARM, **DRY},
    {"temperature": 0.0, "seed": 7, **DRY, "dry_sequence_breakers": BROKEN},
    {
        **WARM, **DRY, "typical_p": 0.95, "top_n_sigma": 3.0, "dynatemp_range": 0.3, "top_k": 30,
        "xtc_probability": 0.4, "repeat_penalty": 1.1, "repeat_last_n": 20,
    },
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
async def test_plain_and_drafted_texts_are_equal_under_every_sampler(
    served: Served, settings: dict[str, Any]
) -> None:
    expected = alone(settings)
    accepted = {}
    async with served.connect() as client:
        for mode in MODES:
            done = await client.create_completion(
                PROMPT, max_tokens=COUNT, mode=mode, p_min=0.01, **settings
            )
            assert [token.id for token in done.tokens] == expected
            accepted[mode] = done.stats.acceptance_rate
    assert accepted["plain"] is None
    for mode in MODES[1:]:
        assert (accepted[mode] or 0) > 0.03


def test_the_settings_above_make_a_difference() -> None:
    for settings in SETTINGS:
        plain = {"temperature": settings["temperature"], "seed": 7}
        assert alone(settings) != alone(plain), settings
    assert alone(SETTINGS[7]) != alone(SETTINGS[7], broken=False)


async def test_samplers_that_are_left_out_are_off(served: Served) -> None:
    settings: dict[str, Any] = {**SETTINGS[-1], "samplers": ["penalties", "top_k", "temperature"]}
    left = {"repeat_penalty": 1.1, "repeat_last_n": 20, "top_k": 30}
    async with served.connect() as client:
        done = await client.create_completion(PROMPT, max_tokens=COUNT, **settings)
    assert [token.id for token in done.tokens] == alone({**WARM, **left})


@pytest.mark.parametrize("asked", [{"logprobs": True, "top_logprobs": 5}, {"logprobs": 5}], ids=str)
async def test_the_likeliest_tokens_of_each_position_are_the_targets(
    served: Served, asked: dict[str, Any]
) -> None:
    engine = ToyEngine()
    text = engine.tokenize(PROMPT, special=True)
    async with served.connect() as client:
        for mode in MODES:
            stream = await client.create_completion(
                PROMPT, max_tokens=30, temperature=1.0, top_k=3, seed=4, mode=mode, stream=True,
                **asked,
            )  # fmt: skip
            done = await stream.result()
            (choice,) = done.choices
            assert choice.logprobs is not None
            assert choice.top_logprobs is not None
            streamed = [token for fragment in stream.fragments for token in fragment.tokens]
            assert [token.top_logprobs for token in streamed] == list(choice.top_logprobs)
            history = list(text)
            engine.rewind(0, 0)
            for token, logprob, tops in zip(
                done.tokens, choice.logprobs, choice.top_logprobs, strict=True
            ):
                (row,) = engine.extend(0, history[engine.length(0) :], 1)
                assert [(one.id, one.logprob) for one in tops] == top_logprobs(row, 5)
                assert [one.piece for one in tops] == [engine.piece(one.id) for one in tops]
                by_id = {one.id: one.logprob for one in tops}
                assert by_id[token.id] == logprob
                history.append(token.id)


async def test_without_being_asked_for_no_likeliest_tokens_are_told(served: Served) -> None:
    async with served.connect() as client:
        for asked in ({}, {"logprobs": True}, {"logprobs": 0}):
            settings: dict[str, Any] = {"max_tokens": 8, **asked}
            done = await client.create_completion(PROMPT, **settings)
            assert done.choices[0].top_logprobs is None
            assert not any(token.top_logprobs for token in done.tokens)
            assert (done.choices[0].logprobs is not None) == bool(asked)


def test_run_has_llama_cpps_flags(served: Served) -> None:
    settings = {**SETTINGS[7], "dry_sequence_breakers": ("the ", "\n", "\\")}
    flags = (
        "--dry-multiplier=1.5 --dry-allowed-length=1 --dry-penalty-last-n=-1 --temp=0 -s 7 "
        f"-n {COUNT} --no-stats"
    )
    breakers = ("--dry-sequence-breaker", "the ", r"--dry-sequence-breaker=\n")
    last = r"--dry-sequence-breaker=\\"
    done = served.cli("run", "--connect=shared", *flags.split(), *breakers, last, PROMPT)
    engine = ToyEngine()
    text = b"".join(map(engine.piece, alone(settings))).decode("utf-8", "replace")
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == text
