"""Simulated devices: what is recorded of two engines, and the ideal that virtual time gives."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.engines.toy import ToyEngine, ToySettings
from outrider.errors import ConfigError
from outrider_services.bench.simulated import ideal, read_numbers
from outrider_services.bench.traces import record
from outrider_services.options import Settings, Toy


def engines(agreement: float) -> tuple[ToyEngine, ToyEngine]:
    return (
        ToyEngine(ToySettings(role="target", agreement=agreement)),
        ToyEngine(ToySettings(role="draft", agreement=agreement)),
    )


def test_a_trace_says_where_the_draft_agrees_and_how_sure_it_is_elsewhere() -> None:
    target, draft = engines(0.8)
    trace = record(target, draft, target.tokenize("The ", special=True), 400)
    assert sum(trace["match"]) / 400 == pytest.approx(0.8, abs=0.06)
    assert len(trace["confidence"]) == 400
    misses = {str(at) for at, match in enumerate(trace["match"]) if not match}
    assert trace["off_path_confidence"].keys() == misses
    assert target.length(0) == draft.length(0) == 0


def test_recording_follows_the_target_even_where_the_draft_strays() -> None:
    target, draft = engines(0.0)
    again, same = engines(1.0)
    prompt = target.tokenize("The ", special=True)
    assert sum(record(target, draft, prompt, 50)["match"]) == 0
    assert sum(record(again, same, prompt, 50)["match"]) == 50


def test_the_ideal_stays_within_its_limits_and_grows_with_the_draft() -> None:
    found = []
    for agreement in (0.5, 0.8, 0.95):
        toy = Toy(agreement=agreement, step_ms=20.0, draft_ms=2.0)
        found.append(ideal(replace(Settings(), toy=toy), 200))
        assert 1.0 <= found[-1] <= min(1 / (1 - agreement) * 1.3, 20 / 2 + 1)
    assert found == sorted(found)


@pytest.mark.parametrize("text", ["", "a", "0", "1", "0.5,,0.6", "0.5,nan", "-0.1"])
def test_numbers_that_cannot_be_simulated_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--acceptance"):
        read_numbers("--acceptance", text, 1)
    assert read_numbers("--acceptance", "0.5,0.9", 1) == (0.5, 0.9)
