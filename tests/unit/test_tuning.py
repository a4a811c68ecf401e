"""Which draft is chosen, what is kept of that, and that nothing of it may stop a run."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.engines import processor
from outrider.engines.llama import quantise
from outrider.errors import ConfigError, ModelNotFound, ModelUnusable, RequestTimeout, WorkerLost
from outrider_services import options, sources
from outrider_services.models import catalogue, library
from outrider_services.options import Settings
from outrider_services.tuning import advice, decisions, forecasts, probe, search
from outrider_services.tuning.decisions import Decision, Trial, Variant
from outrider_services.tuning.probe import Findings, Job
from outrider_services.tuning.search import Tuner

CURVE = tuple(0.05 + 0.002 * rows for rows in range(16))
COSTS = {"off": 0.036, "q4_0": 0.017, "q4_1": 0.019, "q8_0": 0.026}


def gguf(path: Path, file_type: int) -> Path:
    """A file with a header that says its type, and no weights."""
    name = b"general.file_type"
    pair = struct.pack("<Q", len(name)) + name + struct.pack("<II", 4, file_type)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair)
    return path


class Children:
    """Stands in for the processes that measure: costs as told, files of a byte."""

    def __init__(self, **wrong: int) -> None:
        self.jobs: list[Job] = []
        self.wrong = wrong  # of the ten tokens of each answer, by type
        self.error: Exception | None = None
        self.fails_at = ""

    def __call__(self, job: Job, limit_s: float) -> Findings:
        self.jobs.append(job)
        if self.error and job.kind == self.fails_at:
            raise self.error
        if job.kind:
            Path(job.model).parent.mkdir(parents=True, exist_ok=True)
            Path(job.model).write_bytes(b"x")
        if len(job.rows) > 1:
            sequences = ((tuple(range(12)), 10),) * len(job.texts)
            choices = tuple(range(2, 12)) * len(sequences) if job.chooses else ()
            return Findings(CURVE, sequences, choices)
        quant = next((kind for kind in COSTS if f".{kind}-" in job.model), "off")
        right = 10 - self.wrong.get(quant, 0)
        choices = tuple(range(2, 2 + right)) + (-1,) * (10 - right)
        return Findings((COSTS[quant],), (), choices * len(job.sequences))

    @property
    def made(self) -> list[str]:
        return [job.kind for job in self.jobs if job.kind]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "outrider"


@pytest.fixture
def settings(tmp_path: Path, cache: Path) -> Settings:
    target, draft = (gguf(tmp_path / f"{role}.gguf", 15) for role in ("target", "draft"))
    return sources.settings({"target.model": str(target), "draft.model": str(draft)})


@pytest.fixture
def default(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> Settings:
    pair = (Path(str(settings.target.model)), Path(str(settings.draft.model)))
    monkeypatch.setattr(catalogue, "default_pair", lambda *, fetch: pair)
    return settings


def changed(settings: Settings, **values: Any) -> Settings:
    for name, value in values.items():
        section, _, key = name.partition("__")
        part = replace(getattr(settings, section), **{key: value})
        settings = replace(settings, **{section: part})
    return settings


def variant(quant: str, rate: float, draft_s: float = 0.02) -> Variant:
    return Variant(quant, 1, draft_s, 0.8, rate, {"code": 0.8})


# ---- the choice ---------------------------------------------------------------------------------


def test_a_forecast_never_falls_below_the_target_alone() -> None:
    alone = forecasts.plain_rate(CURVE)
    for pipelined in (False, True):
        assert forecasts.rate(CURVE, 0.5, [0.0, 0.0], pipelined) == pytest.approx(alone)
        assert forecasts.rate(CURVE, 0.001, [1.0, 1.0], pipelined) > 2 * alone


def test_a_draft_that_costs_the_target_nothing_is_worth_more_than_one_in_turn() -> None:
    assert forecasts.rate(CURVE, 0.02, [0.8], True) > forecasts.rate(CURVE, 0.02, [0.8], False)


def test_a_text_on_which_nothing_is_gained_does_not_hide_what_is_gained_on_another() -> None:
    """Where it does not pay the draft is left alone, so the average acceptance tells too little."""
    steep = tuple(0.05 * (1 + 0.5 * more) for more in range(8))
    alone, average = forecasts.plain_rate(steep), forecasts.rate(steep, 0.005, [0.5], False)
    both = forecasts.rate(steep, 0.005, [0.95, 0.05], False)
    assert average == pytest.approx(alone)
    assert both > 1.1 * alone


def test_as_given_stays_unless_another_is_clearly_faster() -> None:
    assert search.choose([variant("off", 20.0), variant("q4_0", 20.3)]).quant == "off"
    assert search.choose([variant("off", 20.0), variant("q4_0", 21.0)]).quant == "q4_0"


def test_cores_are_split_only_where_that_is_clearly_faster() -> None:
    def trial(cores: str, rate: float, quant: str = "off") -> Trial:
        return Trial(cores, cores, bool(cores), 15.0, (variant(quant, rate),), CURVE)

    assert search.settle([trial("", 20.0), trial("0", 20.9)]).target_cores == ""
    split = search.settle([trial("", 20.0), trial("0", 21.1), trial("1", 22.0)])
    assert (split.target_cores, split.draft_cores) == ("1", "1")


@pytest.mark.parametrize(
    ("file_type", "found"),
    [(15, ["q4_0", "q8_0"]), (1, ["q4_0", "q8_0"]), (2, ["q4_0"]), (10, []), (24, [])],
    ids=["Q4_K_M", "F16", "Q4_0", "Q2_K", "IQ1_S"],
)
def test_types_that_cannot_help_are_not_tried(
    tmp_path: Path, file_type: int, found: list[str]
) -> None:
    assert search.candidates(str(gguf(tmp_path / "d.gguf", file_type)), False) == found


def test_the_faster_draft_wins_and_the_losers_are_deleted(settings: Settings, cache: Path) -> None:
    children = Children(off=1, q4_0=2, q4_1=2, q8_0=1)
    decision = search.tune(settings, children)
    assert decision.quant == "q4_0"
    assert children.made == ["q4_0", "q4_1", "q8_0"]  # once each, for all placements
    assert [path.name for path in (cache / "drafts").glob("*.gguf")] == [
        decisions.variant_path(str(settings.draft.model), "q4_0").name
    ]
    measured = {one.quant: one.acceptance for one in decision.trials[0].variants}
    assert measured == {"off": 0.9, "q4_0": 0.8, "q4_1": 0.8, "q8_0": 0.9}
    assert decision.trials[0].curve_s == CURVE
    assert decisions.load(decisions.key(settings)) == decision


def test_a_draft_that_loses_its_sense_is_not_taken(settings: Settings, cache: Path) -> None:
    decision = Tuner(settings, Children(q4_0=9, q8_0=9), 60).decide()
    assert decision.quant == "off"
    assert list((cache / "drafts").glob("*.gguf")) == []


def test_a_larger_type_is_not_tried_where_it_cannot_win(settings: Settings, cache: Path) -> None:
    children = Children(off=2, q4_0=2)
    Tuner(settings, children, 60).decide()
    assert children.made == ["q4_0"]


def test_agreement_is_told_text_by_text() -> None:
    found = search.compare([1, 2, 0, 4, 0, 0, 7, 0], [1, 2, 3, 4, 5, 6, 7, 8], [4, 2, 2])
    assert found.overall == 0.5
    assert found.by_text == {"code": 0.75, "explanation": 0.0, "prose": 0.5}


def test_there_must_be_a_draft_to_tune(settings: Settings) -> None:
    for values in ({"draft__model": None}, {"draft__place": "remote"}, {"pipeline__mode": "plain"}):
        with pytest.raises(ConfigError, match="nothing to tune"):
            search.tune(changed(settings, **values), Children())


# ---- in run and serve ---------------------------------------------------------------------------


def test_the_default_pair_is_tuned_once_with_a_line_before_and_after(default: Settings) -> None:
    told: list[str] = []
    children = Children(off=1, q4_0=2, q8_0=1)
    first = search.prepared(default, told.append, children)
    assert first.draft.model == str(decisions.variant_path(str(default.draft.model), "q4_0"))
    assert told[0].startswith("Preparing a draft")
    assert "q4_0, 17.0 ms a token instead of 36.0" in told[1]
    assert len(told) == 2
    asked = len(children.jobs)
    assert search.prepared(default, told.append, children) == first
    assert (len(told), len(children.jobs)) == (2, asked)


def test_the_answers_are_the_default_targets_own_and_are_not_evaluated(default: Settings) -> None:
    children = Children()
    Tuner(default, children, 60).decide()
    assert not children.jobs[0].chooses


def test_another_pair_is_left_as_given_without_a_word(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "default_pair", lambda *, fetch: (Path("a"), Path("b")))
    children, told = Children(), list[str]()
    assert search.prepared(settings, told.append, children) == settings
    assert (told, children.jobs) == ([], [])


@pytest.mark.parametrize(
    "values",
    [
        {"draft__quant": "off"},
        {"draft__model": None},
        {"draft__place": "remote"},
        {"target__place": "remote"},
        {"draft__n_max": 0},
        {"pipeline__mode": "plain"},
        {"pipeline__backend": "toy"},
    ],
    ids=lambda values: "-".join(map(str, *values.items())),
)
def test_without_a_draft_of_ours_nothing_happens(default: Settings, values: dict[str, Any]) -> None:
    changed_settings = changed(default, **values)
    children, told = Children(), list[str]()
    assert search.prepared(changed_settings, told.append, children) == changed_settings
    assert (told, children.jobs) == ([], [])


def test_a_type_is_made_without_measuring_and_then_found(settings: Settings) -> None:
    children, told = Children(), list[str]()
    wanted = changed(settings, draft__quant="q8_0")
    for _ in range(2):
        prepared = search.prepared(wanted, told.append, children)
        assert prepared.draft.model == str(
            decisions.variant_path(str(settings.draft.model), "q8_0")
        )
    assert [(job.kind, job.rows) for job in children.jobs] == [("q8_0", ())]
    assert told == []


def test_a_type_that_cannot_be_made_is_an_error(settings: Settings) -> None:
    children = Children()
    children.error, children.fails_at = ModelUnusable("no"), "q4_0"
    with pytest.raises(ModelUnusable):
        search.prepared(changed(settings, draft__quant="q4_0"), print, children)


@pytest.mark.parametrize("fails_at", ["", "q4_0", "q8_0"])
def test_a_child_that_fails_costs_a_line_and_leaves_no_file(
    default: Settings, cache: Path, fails_at: str
) -> None:
    children, told = Children(off=0, q4_0=3), list[str]()
    children.error, children.fails_at = WorkerLost("it ended with status -9"), fails_at
    assert search.prepared(default, told.append, children) == default
    assert told[1:] == [
        "The draft is used as given; preparing a faster one failed: it ended with status -9"
    ]
    assert list((cache / "drafts").glob("*.gguf")) == []
    assert decisions.load(decisions.key(default)) is None


def test_what_took_too_long_is_not_tried_at_every_start(default: Settings) -> None:
    children, told = Children(), list[str]()
    children.error = RequestTimeout("too long")
    search.prepared(default, told.append, children)
    assert search.prepared(default, told.append, children) == default
    assert len(told) == 2
    assert len(children.jobs) == 1


def test_a_directory_that_cannot_be_written_costs_a_line(default: Settings, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("in the way")
    told: list[str] = []
    assert search.prepared(default, told.append, Children()) == default
    assert "cannot be written" in told[-1]


def test_what_would_be_kept_to_is_known_without_measuring(settings: Settings) -> None:
    assert search.kept(settings) is None
    decision = Tuner(settings, Children(), 60).decide()
    decisions.save(decisions.key(settings), decision)
    assert search.kept(settings) == decision
    assert search.kept(changed(settings, draft__quant="q4_0")) is None
    assert search.kept(changed(settings, pipeline__mode="plain")) is None
    assert search.kept(changed(settings, draft__model="/nowhere.gguf")) is None


# ---- what is kept -------------------------------------------------------------------------------


def test_a_draft_that_has_vanished_is_made_again(default: Settings, cache: Path) -> None:
    decisions.save(decisions.key(default), Decision("q4_0"))
    children = Children()
    prepared = search.prepared(default, print, children)
    assert children.made == ["q4_0"]
    assert Path(str(prepared.draft.model)).exists()


def test_a_split_is_used_by_those_who_leave_the_cores_to_us(settings: Settings) -> None:
    decisions.save(decisions.key(settings), Decision("off", "0", "0"))
    prepared = search.prepared(settings, print, Children())
    assert (prepared.target.cores, prepared.draft.cores) == ("0", "0")
    for values in ({"target__cores": "0"}, {"draft__threads": 1}, {"pipeline__mode": "sync"}):
        other = changed(settings, **values)
        assert search.prepared(other, print, Children()) == other
        assert search.splits(other) == []


UNMEASURED = (
    '{"quant": "off", "target_cores": "", "draft_cores": "", "trials": [{"pipelined": true, '
    '"target_cores": "", "draft_cores": "", "plain_rate": 9.0, "variants": []%s}]}'
)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"quant": "q9"}', '{"quant": "rm", "trials": []}', "\0"),
        UNMEASURED % "",
        UNMEASURED % ', "curve_s": [1]',
    ],
    ids=[
        *("empty", "cut", "list", "no-such-type", "not-a-type", "nul"),
        *("without-the-curve", "without-what-was-chosen"),
    ],
)
def test_a_damaged_decision_is_none_and_is_made_again(
    default: Settings, cache: Path, text: str
) -> None:
    name = decisions.key(default)
    (cache / "tuned").mkdir(parents=True)
    (cache / "tuned" / f"{name}.json").write_text(text)
    assert decisions.load(name) is None
    search.prepared(default, lambda line: None, Children())
    assert decisions.load(name) is not None


def test_whatever_changes_what_is_measured_changes_the_key(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    core = str(min(os.sched_getaffinity(0)))
    keys = [decisions.key(settings)]
    assert keys == [decisions.key(changed(settings, draft__n_max=3))]
    for values in (
        {"target__threads": 1},
        {"draft__threads": 1},
        {"draft__cores": core},
        {"pipeline__mode": "sync"},
        {"pipeline__exact": True},
    ):
        keys.append(decisions.key(changed(settings, **values)))
    os.utime(str(settings.draft.model), ns=(1, 1))
    keys.append(decisions.key(settings))
    monkeypatch.setattr(processor, "kind", lambda: ["another"])
    keys.append(decisions.key(settings))
    monkeypatch.setattr(library, "kernels", lambda: Path(__file__))
    keys.append(decisions.key(settings))
    if len(os.sched_getaffinity(0)) > 1:  # else all cores are that one
        assert len(set(keys)) == len(keys)


def test_what_was_left_unfinished_is_removed(settings: Settings, cache: Path) -> None:
    (cache / "drafts").mkdir(parents=True)
    (cache / "drafts" / "d.gguf.partial").touch()
    with decisions.locked():
        assert list((cache / "drafts").glob("*.partial")) == []


def test_every_type_has_a_number() -> None:
    assert set(options.QUANTS) == quantise.KINDS.keys()


def test_the_texts_are_there() -> None:
    assert len(search.texts()) == 3
    assert all(prompt and answer for prompt, answer in search.texts().values())
    assert advice.CODE in search.texts()


# ---- the child ----------------------------------------------------------------------------------


def test_what_a_child_found_comes_back_as_it_was() -> None:
    found = {"curve_s": [0.1], "sequences": [[[1, 2], 1]], "choices": [2]}
    out = b"noise\n" + json.dumps(["done", found]).encode()
    assert probe.read_answer(out, 0) == Findings((0.1,), (((1, 2), 1),), (2,))


def test_the_error_of_a_child_is_raised_here() -> None:
    with pytest.raises(ModelUnusable, match="why"):
        probe.read_answer(b'["error", "model_unusable", "why"]', 0)


@pytest.mark.parametrize("out", [b"", b"Killed\n", b"[]", b'["done"]', b"3"])
def test_a_child_that_dies_is_an_error_with_its_status(out: bytes) -> None:
    with pytest.raises(WorkerLost, match="status -9"):
        probe.read_answer(out, -9)


def test_a_child_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 60\n")
    script.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(script))
    with pytest.raises(RequestTimeout, match="0 s"):
        probe.ask(Job("m.gguf", 1), 0.2)


def test_a_real_child_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        probe.ask(Job(str(tmp_path / "m.gguf"), 1, rows=(1,)), 25)
