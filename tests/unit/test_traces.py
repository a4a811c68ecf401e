"""What is recorded of a target and its draft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.engines.toy import ToyEngine, ToySettings
from outrider.errors import BadRequest, ConfigError, IncompatiblePair
from outrider_services.bench import traces
from outrider_services.bench.prompts import Category
from outrider_services.bench.traces import record
from outrider_services.table import PipelineOptions, Settings, TargetOptions, ToyOptions

SETTINGS = Settings(
    target=TargetOptions(ctx=64),
    pipeline=PipelineOptions(backend="toy"),
    toy=ToyOptions(step_ms=0.01, row_ms=0.001, draft_ms=0.01),
)
CATEGORIES = (Category("prose", False, ("The ",)), Category("chat", True, ("Hi", "Ho"), "Be kind."))


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
    assert {len(path) for path in trace["off_path_confidence"].values()} == {traces.OFF_PATH}
    assert target.length(0) == draft.length(0) == 0


def test_recording_follows_the_target_even_where_the_draft_strays() -> None:
    target, draft = engines(0.0)
    again, same = engines(1.0)
    prompt = target.tokenize("The ", special=True)
    assert sum(record(target, draft, prompt, 50)["match"]) == 0
    assert sum(record(again, same, prompt, 50)["match"]) == 50


def test_a_file_has_a_trace_of_each_prompt(tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    traces.write(str(path), SETTINGS, CATEGORIES, 9)
    found = json.loads(path.read_text())
    assert list(found) == ["prose", "chat 1", "chat 2"]
    for trace in found.values():
        assert len(trace["match"]) == len(trace["confidence"]) == 9
    assert found["prose"]["prompt"] == "The "
    assert "Be kind." in found["chat 1"]["prompt"]


def test_what_cannot_be_recorded_is_one_error(tmp_path: Path) -> None:
    path = str(tmp_path / "traces.json")
    with pytest.raises(BadRequest, match="prose: 4 \\+ 64 tokens exceed the context"):
        traces.write(path, SETTINGS, CATEGORIES, 64)
    with pytest.raises(ConfigError, match="cannot write"):
        traces.write(str(tmp_path / "none" / "traces.json"), SETTINGS, CATEGORIES, 9)


def test_a_draft_of_another_vocabulary_is_refused() -> None:
    target, _ = engines(0.8)
    draft = ToyEngine(replace(ToySettings(role="draft"), vocabulary_variant=1))
    with pytest.raises(IncompatiblePair):
        traces.require_fit(target, draft)
