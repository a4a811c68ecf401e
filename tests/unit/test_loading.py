"""Which engine a worker gets, from the settings of its role."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.core.stream import AT_ONCE
from outrider.engines.toy import ToyEngine
from outrider.errors import ConfigError, ModelNotFound
from outrider_services.models.loading import PASS, build_of, load_engine
from outrider_services.options import checked
from outrider_services.pipeline.target_worker import CHUNK, ROWS
from outrider_services.table import PipelineOptions, Settings, TargetOptions, ToyOptions

TOY = Settings(
    target=TargetOptions(ctx=128),
    pipeline=PipelineOptions(backend="toy", parallel=2),
    toy=ToyOptions(agreement=1.0, step_ms=1.0, draft_ms=0.1),
)


def silent(done: float) -> None:
    """Tells nobody."""


def test_a_made_up_model_has_the_context_and_slots_of_the_settings() -> None:
    for role in ("target", "draft"):
        engine = load_engine(role, TOY, silent)
        try:
            assert engine.info.name == f"toy-{role}"
            assert (engine.info.context, engine.info.slots) == (128, 2)
        finally:
            engine.close()


def test_passes_of_a_made_up_target_cost_what_the_list_says() -> None:
    settings = replace(TOY, toy=replace(TOY.toy, step_ms=20.0, rows="4:2,2:1.5"))
    target, draft = (load_engine(role, settings, silent) for role in ("target", "draft"))
    assert isinstance(target, ToyEngine)
    assert isinstance(draft, ToyEngine)
    costs = target.settings.costs
    expected = [0.020, 0.030, 0.035, 0.040, 0.045]
    assert [costs.of(n, n) for n in range(1, 6)] == pytest.approx(expected)
    assert draft.settings.costs.curve_s == ()
    target.close()
    draft.close()


@pytest.mark.parametrize("rows", ["x", "2", "2:", "0:1", "2:0", "2:nan", "2:1e9", "600:2"])
def test_a_list_of_costs_that_is_none_is_one_sentence(rows: str) -> None:
    with pytest.raises(ConfigError, match="--toy-rows is a list such as"):
        checked(replace(TOY, toy=replace(TOY.toy, rows=rows)))


def test_what_a_worker_computes_with_is_told() -> None:
    assert build_of(TOY) == "made up"
    exact = PipelineOptions(exact=True)
    told = build_of(Settings(target=TargetOptions(without="tiled,flash"), pipeline=exact))
    assert told.startswith("llama-cpp-python ")
    assert told.endswith("; without flash,tiled; exact")


def test_another_vocabulary_does_not_fit() -> None:
    one = load_engine("target", TOY, silent)
    other = load_engine("draft", replace(TOY, toy=replace(TOY.toy, variant=1)), silent)
    assert one.info.vocabulary != other.info.vocabulary
    for engine in (one, other):
        engine.close()


def test_without_a_model_the_flag_is_named() -> None:
    with pytest.raises(ModelNotFound, match="-m FILE"):
        load_engine("target", Settings(), silent)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    settings = Settings(target=TargetOptions(model=str(tmp_path / "none.gguf")))
    with pytest.raises(ModelNotFound, match=r"none\.gguf"):
        load_engine("draft", settings, silent)


def test_settings_that_exclude_each_other_are_an_error(tmp_path: Path) -> None:
    target = TargetOptions(model=str(tmp_path / "m.gguf"), ngl=-1)
    with pytest.raises(ConfigError, match="exact"):
        load_engine("target", Settings(target=target, pipeline=PipelineOptions(exact=True)), silent)


def test_there_is_room_for_the_largest_pass_of_a_worker() -> None:
    assert max(CHUNK, AT_ONCE, *ROWS) == PASS


@pytest.mark.parametrize("without", ["auto", "none", "tiled", "repack", "flash", "tiled,flash"])
def test_the_target_does_without_the_kernels_of_the_settings(
    monkeypatch: pytest.MonkeyPatch, without: str
) -> None:
    engine = pytest.importorskip("outrider.engines.llama.engine")
    monkeypatch.setattr(engine.LlamaEngine, "load", lambda path, settings, progress: settings)
    target = TargetOptions(model="m.gguf", without=without)
    loaded: Any = load_engine("target", Settings(target=target), silent)
    used = {"tiled": loaded.tiled, "repack": loaded.repack, "flash": loaded.flash_attention}
    assert used == {name: name not in without.split(",") for name in used}
