"""Which draft is chosen, what is kept of that, and that nothing of it may stop a run."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from outrider.engines import processor
from outrider.engines.llama import library, quantise
from outrider.engines.llama.devices import Offload
from outrider.engines.toy import ToyEngine
from outrider.errors import ConfigError, ModelNotFound, ModelUnusable, RequestTimeout, WorkerLost
from outrider_services import options, sources, table
from outrider_services.models import catalogue
from outrider_services.pipeline.arguments import worker_arguments
from outrider_services.pipeline.places import share_cores
from outrider_services.table import Settings
from outrider_services.tuning import advice, decisions, forecasts, probe, search, tuner
from outrider_services.tuning.decisions import Decision, Trial, Variant
from outrider_services.tuning.probe import Findings, Job, Turns
from outrider_services.tuning.tuner import Tuner

CURVE = tuple(0.05 + 0.002 * rows for rows in range(16))
COSTS = {"off": 0.036, "q4_0": 0.017, "q4_1": 0.019, "q8_0": 0.026}
READ_S = 0.01


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
        self.without: dict[str, float] = {}  # what the target costs without these kernels: factors
        self.turns = Turns()
        self.pairs: list[tuple[Job, Job]] = []  # that took turns

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
            slower = self.without.get(job.without, 1.0) * self.target_costs(job)
            curve_s = tuple(slower * seconds for seconds in CURVE)
            return Findings(curve_s, sequences, choices, slower * READ_S)
        quant = next((kind for kind in COSTS if f".{kind}-" in job.model), "off")
        right = 10 - self.wrong.get(quant, 0)
        choices = tuple(range(2, 2 + right)) + (-1,) * (10 - right)
        cost_s = self.draft_costs(job) * COSTS[quant]
        return Findings((cost_s,), (), choices * len(job.sequences))

    def in_turns(self, target: Job, draft: Job, limit_s: float) -> Turns:
        self.pairs.append((target, draft))
        if self.error and self.fails_at == "turns":
            raise self.error
        return self.turns

    def target_costs(self, job: Job) -> float:
        return 1.0

    def draft_costs(self, job: Job) -> float:
        return 1.0

    @property
    def made(self) -> list[str]:
        return [job.kind for job in self.jobs if job.kind]

    @property
    def tried(self) -> list[tuple[str, int]]:
        """Kernels and threads of the target."""
        return [(job.without, job.threads) for job in self.jobs if len(job.rows) > 1]


class Scaling(Children):
    """On a machine whose every core makes both models faster; the draft is a tiny one."""

    def target_costs(self, job: Job) -> float:
        return 4 / min(job.threads, len(decisions.usable(job.cores)))

    def draft_costs(self, job: Job) -> float:
        return 0.03 * self.target_costs(job)


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


def with_cores(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)))


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
    assert tuner.choose([variant("off", 20.0), variant("q4_0", 20.3)]).quant == "off"
    assert tuner.choose([variant("off", 20.0), variant("q4_0", 21.0)]).quant == "q4_0"


def test_cores_are_split_only_where_that_is_clearly_faster() -> None:
    def trial(cores: str, rate: float, quant: str = "off") -> Trial:
        return Trial(cores, cores, bool(cores), 15.0, (variant(quant, rate),), CURVE)

    assert tuner.settle([trial("", 20.0), trial("0", 20.9)]).target_cores == ""
    split = tuner.settle([trial("", 20.0), trial("0", 21.1), trial("1", 22.0)])
    assert (split.target_cores, split.draft_cores) == ("1", "1")


@pytest.mark.parametrize(
    ("file_type", "found"),
    [(15, ["q4_0", "q8_0"]), (1, ["q4_0", "q8_0"]), (2, ["q4_0"]), (10, []), (24, [])],
    ids=["Q4_K_M", "F16", "Q4_0", "Q2_K", "IQ1_S"],
)
def test_types_that_cannot_help_are_not_tried(
    tmp_path: Path, file_type: int, found: list[str]
) -> None:
    assert tuner.candidates(str(gguf(tmp_path / "d.gguf", file_type)), False) == found


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
    assert decision.trials[0].kernels[-1].read_s == READ_S
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
    found = tuner.compare([1, 2, 0, 4, 0, 0, 7, 0], [1, 2, 3, 4, 5, 6, 7, 8], [4, 2, 2])
    assert found.overall == 0.5
    assert found.by_text == {"code": 0.75, "explanation": 0.0, "prose": 0.5}


def test_there_must_be_a_draft_to_tune(settings: Settings) -> None:
    for values in ({"draft__model": None}, {"draft__place": "remote"}, {"pipeline__mode": "plain"}):
        with pytest.raises(ConfigError, match="nothing to tune"):
            search.tune(changed(settings, **values), Children())


# ---- kernels, threads, turns and cores ----------------------------------------------------------


def test_kernels_that_are_clearly_faster_are_chosen_kept_and_used(default: Settings) -> None:
    children, told = Children(), list[str]()
    children.without["tiled"] = 0.8
    first = search.prepared(default, told.append, children)
    assert first.target.without == "tiled"
    decision = decisions.load(decisions.key(default))
    assert decision is not None
    assert decision.without == "tiled"
    trial = decision.trials[0]
    assert [one.without for one in trial.kernels][-1] == "tiled"
    assert trial.curve_s == trial.kernels[-1].curve_s == tuple(0.8 * cost for cost in CURVE)
    assert children.pairs[0][0].without == "tiled"
    asked = len(children.jobs)
    assert search.prepared(default, told.append, children) == first
    assert len(children.jobs) == asked
    target, draft = (worker_arguments(role, first, "address") for role in ("target", "draft"))
    assert "--without-kernels=tiled" in target
    assert not any("tiled" in argument for argument in draft)


@pytest.mark.parametrize(("factor", "chosen"), [(0.98, ""), (0.96, "tiled")])
def test_kernels_that_are_hardly_faster_change_nothing(
    settings: Settings, factor: float, chosen: str
) -> None:
    children = Children()
    children.without["tiled"] = factor
    decision = Tuner(settings, children, 60).decide()
    assert decision.without == decision.trials[0].kernels[-1].without == chosen
    assert {one.without for one in decision.trials[0].kernels} == {"", "tiled"}


def test_the_thorough_search_tries_all_kernels(settings: Settings) -> None:
    children = Children()
    children.without |= {"repack": 0.9, "flash": 0.5}
    assert search.tune(settings, children).without == "flash"
    assert {without for without, _ in children.tried} == {"", *table.KERNELS}


@pytest.mark.parametrize(
    ("values", "tried"),
    [
        ({"target__without": "flash"}, "flash"),
        ({"target__without": "none"}, ""),
        ({"pipeline__exact": True}, ""),
        ({"target__ngl": 1}, ""),
        ({"target__device": "CUDA0"}, ""),
    ],
    ids=["his-own", "none", "exact", "on-the-GPU", "on-a-named-GPU"],
)
def test_kernels_that_the_user_decided_on_are_left_alone(
    default: Settings, values: dict[str, Any], tried: str
) -> None:
    children = Children()
    children.without |= {name: 0.5 for name in table.KERNELS if name != tried}
    given = changed(default, **values)
    for _ in range(2):  # measured, and kept
        prepared = search.prepared(given, print, children)
        assert options.kernels(prepared.target.without) == options.kernels(tried)
    assert {without for without, _ in children.tried} == {tried}


def test_a_decision_on_kernels_does_not_overrule_the_user(settings: Settings) -> None:
    given = changed(settings, target__without="repack", target__threads=3)
    assert search.with_kernels(given, "tiled", 8) == given


@pytest.mark.parametrize("wrong", ["x", "tiled,x", "none,x", "Tiled", "none,flash"])
def test_kernels_that_do_not_exist_are_one_sentence(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"^'\w+' is none of the kernels tiled, repack, flash$"):
        sources.settings({"target.without": wrong})


@pytest.mark.parametrize(
    ("cores", "quick", "thorough"),
    [(2, {4}, {4}), (3, {4, 2}, {4, 2}), (6, {4, 6}, {3, 4, 6}), (16, {4, 16}, {4, 8, 16})],
)
def test_threads_are_tried_on_more_than_two_cores(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    quick: set[int],
    thorough: set[int],
) -> None:
    with_cores(monkeypatch, cores)
    for searches_all, wanted in ((False, quick), (True, thorough)):
        found = tuner.kernel_choices(settings, searches_all)
        assert found[0] == ("", 4)
        assert {threads for _, threads in found} == wanted
        assert len(found) == len({*found})
        own = changed(settings, target__threads=3)
        assert {threads for _, threads in tuner.kernel_choices(own, searches_all)} == {3}


def test_threads_that_are_clearly_faster_are_chosen_kept_and_used(
    default: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 8)
    monkeypatch.setattr(tuner, "splits", lambda settings, thorough: [])
    children = Scaling()
    for _ in range(2):  # measured, and kept
        assert search.prepared(default, print, children).target.threads == 8
    assert ("", 8) in children.tried
    assert [target.threads for target, _ in children.pairs] == [8]


def test_what_is_expected_of_shared_cores_counts_that_turns_cost_more(settings: Settings) -> None:
    children = Children(q4_0=2, q8_0=2)
    children.turns = Turns(passes=1.25, drafting=1.5)
    decision = Tuner(settings, children, 60).decide()
    trial, best = decision.chosen()
    assert best.quant == "q4_0"
    assert trial.turns == (1.25, 1.5)
    assert trial.curve_s == (CURVE[0], *(1.25 * cost for cost in CURVE[1:]))
    assert best.draft_s == 1.5 * COSTS["q4_0"]
    assert best.rate == forecasts.rate(trial.curve_s, best.draft_s, best.accepted.values(), False)
    assert best.rate < 0.9 * forecasts.rate(CURVE, COSTS["q4_0"], best.accepted.values(), False)
    ((target, draft),) = children.pairs
    assert (target.model, draft.model) == (
        settings.target.model,
        str(decisions.variant_path(str(settings.draft.model), "q4_0")),
    )
    assert (target.drafts, draft.drafts) == (False, True)


def test_where_both_compute_at_the_same_time_none_takes_turns(settings: Settings) -> None:
    children = Children()
    children.turns = Turns(passes=1.25, drafting=1.5)
    decision = Tuner(changed(settings, pipeline__mode="pipelined"), children, 60).decide()
    trial, best = decision.chosen()
    assert trial.pipelined
    assert (trial.turns, trial.curve_s, children.pairs) == ((1.0, 1.0), CURVE, [])
    assert best.draft_s == COSTS[best.quant]
    assert best.rate == forecasts.rate(CURVE, best.draft_s, best.accepted.values(), True)


def test_turns_that_cost_much_make_cores_of_their_own_worth_it(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 8)
    children = Scaling()
    assert Tuner(settings, children, 60).decide().target_cores == ""
    children.turns = Turns(2.0, 3.0)
    assert Tuner(settings, children, 60).decide().target_cores == "0,1,2,3,4,5"


@pytest.mark.parametrize(
    ("cores", "target", "draft"),
    [
        (4, "0,1,2", "3"),
        (8, "0,1,2,3,4,5", "6,7"),
        (16, "0,1,2,3,4,5,6,7,8,9,10,11", "12,13,14,15"),
    ],
)
def test_where_memory_is_the_limit_many_cores_are_split_at_the_first_start(
    default: Settings, monkeypatch: pytest.MonkeyPatch, cores: int, target: str, draft: str
) -> None:
    """Its passes and drafted tokens cost the same on all cores as on a part of them."""
    with_cores(monkeypatch, cores)
    children, told = Children(q4_0=2), list[str]()
    for _ in range(2):  # measured, and kept
        prepared = search.prepared(default, told.append, children)
        assert (prepared.target.cores, prepared.draft.cores) == (target, draft)
        assert not share_cores(prepared)  # so that the coordinator pipelines
    assert {job.cores for job in children.jobs} == {"", target, draft}
    assert len(children.pairs) == 1  # with the shared cores alone


@pytest.mark.parametrize("cores", [8, 16])
def test_where_every_core_helps_they_stay_shared(
    default: Settings, monkeypatch: pytest.MonkeyPatch, cores: int
) -> None:
    with_cores(monkeypatch, cores)
    children = Scaling()
    prepared = search.prepared(default, print, children)
    assert (prepared.target.cores, prepared.draft.cores) == ("", "")
    assert share_cores(prepared)
    assert prepared.target.threads == cores
    assert len({job.cores for job in children.jobs}) == 3  # a split was tried


def test_two_cores_are_split_by_the_thorough_search_alone(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_cores(monkeypatch, 2)
    assert len(Tuner(settings, Children(), 60).decide().trials) == 1
    tuned = search.tune(settings, Children())
    assert [trial.target_cores for trial in tuned.trials] == ["", "0"]


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


@pytest.mark.parametrize("error", [RequestTimeout("too long"), WorkerLost("it ended")])
def test_turns_that_cannot_be_measured_lose_nothing_of_the_rest(
    default: Settings, error: Exception
) -> None:
    children = Children(q4_0=2, q8_0=2)
    children.error, children.fails_at = error, "turns"
    decision = Tuner(default, children, 60).decide()
    assert decision.quant == "q4_0"
    assert decision.trials[0].turns == (1.0, 1.0)


def test_kernels_that_fail_are_not_chosen_and_lose_nothing_of_the_rest(default: Settings) -> None:
    class Untiled(Children):
        def __call__(self, job: Job, limit_s: float) -> Findings:
            if job.without:
                raise WorkerLost("it ended")
            return super().__call__(job, limit_s)

    decision = Tuner(default, Untiled(q4_0=2, q8_0=2), 60).decide()
    assert (decision.quant, decision.without) == ("q4_0", "")
    assert [one.without for one in decision.trials[0].kernels] == [""]


def test_what_took_too_long_is_not_tried_at_every_start(default: Settings) -> None:
    children, told = Children(), list[str]()
    children.error = RequestTimeout("too long")
    search.prepared(default, told.append, children)
    asked = len(children.jobs)
    as_given = changed(default, target__without="none")
    assert search.prepared(default, told.append, children) == as_given
    assert len(told) == 2
    assert len(children.jobs) == asked


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
        assert tuner.splits(other, True) == []
        assert decisions.key(other) != decisions.key(settings)


def test_another_build_of_llama_cpp_is_measured_anew(
    default: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels = tmp_path / "libggml-cpu.so"
    kernels.write_bytes(b"gcc")
    os.utime(kernels, ns=(1, 1))
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    children, counts = Children(), list[int]()

    def start_twice() -> None:
        for _ in range(2):
            search.prepared(default, lambda line: None, children)
        counts.append(len(children.jobs))

    start_twice()
    kernels.write_bytes(b"clang")
    os.utime(kernels, ns=(1, 1))  # another size at the same time
    start_twice()
    os.utime(kernels, ns=(2, 2))  # the same size at another time
    start_twice()
    assert counts == [counts[0], 2 * counts[0], 3 * counts[0]]
    kernels.write_bytes(b"gcc")
    os.utime(kernels, ns=(1, 1))  # the first is back, and so is what was found with it
    start_twice()
    assert counts[3] == counts[2] > 0


def test_a_decision_that_lacks_anything_is_none(settings: Settings, cache: Path) -> None:
    decision = Tuner(settings, Children(), 60).decide()
    decisions.save("it", decision)
    path = cache / "tuned" / "it.json"
    text = path.read_text()
    assert decisions.load("it") == decision
    for name in json.loads(text)["trials"][0]:
        lacking = json.loads(text)
        del lacking["trials"][0][name]
        path.write_text(json.dumps(lacking))
        assert decisions.load("it") is None, name
    for name in ("curve_s", "variants", "turns"):
        lacking = json.loads(text)
        lacking["trials"][0][name] = []
        path.write_text(json.dumps(lacking))
        assert decisions.load("it") is None, name


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", '{"quant": "q9"}', '{"quant": "rm", "trials": []}', "\0"),
        '{"quant": "off", "without": "x", "trials": []}',
        '{"quant": "off", "target_cores": "x", "trials": []}',
    ],
    ids=[
        *("empty", "cut", "list", "no-such-type", "not-a-type", "nul"),
        *("no-such-kernels", "no-such-cores"),
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
        {"target__without": "tiled"},
        {"target__device": "CUDA0"},
        {"target__device": "CUDA1"},
        {"target__device": "CUDA1", "target__ngl": 3},
        {"target__device": "CUDA1", "target__split": "3,1"},
        {"draft__device": "CUDA1"},
    ):
        keys.append(decisions.key(changed(settings, **values)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")  # another card is called CUDA0
    keys.append(decisions.key(changed(settings, target__device="CUDA0")))
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
    assert set(table.QUANTS) == quantise.KINDS.keys()


def test_the_texts_are_there() -> None:
    assert len(tuner.texts()) == 3
    assert all(prompt and answer for prompt, answer in tuner.texts().values())
    assert advice.CODE in tuner.texts()


# ---- the child ----------------------------------------------------------------------------------


def test_what_a_child_found_comes_back_as_it_was() -> None:
    found = {"curve_s": [0.1], "sequences": [[[1, 2], 1]], "choices": [2], "read_s": 0.01}
    out = b"noise\n" + json.dumps(["done", found]).encode()
    assert probe.read_answer(out, 0) == Findings((0.1,), (((1, 2), 1),), (2,), 0.01)


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


def test_a_child_gets_the_job_as_it_was() -> None:
    offload = Offload(3, ("CUDA0", "CUDA1"), (3.0, 1.0), 1)
    job = Job("m.gguf", 2, "0", offload, rows=(1, 4), texts=(("a", "b"),))
    read = probe.read_job(json.dumps(asdict(job)))
    assert (read.offload, read.rows, read.cores) == (offload, (1, 4), "0")
    assert json.dumps(asdict(read)) == json.dumps(asdict(job))


def test_a_real_child_says_why_it_cannot(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        probe.ask(Job(str(tmp_path / "m.gguf"), 1, rows=(1,)), 25)


# ---- two that take turns ------------------------------------------------------------------------

BEGIN = """
import json, pathlib, sys, time
job, last = json.loads(sys.argv[2]), pathlib.Path(__file__).with_name("last")
assert job["turns"]
def say(what): print(json.dumps(what), flush=True)
"""
TURNS = """
say(0)
alone_s, more = {"target": (0.1, 1.25), "draft": (0.01, 1.5)}[job["model"]]
for line in sys.stdin:
    rows, passes = json.loads(line)
    before = last.read_text() if last.exists() else ""
    last.write_text(job["model"])
    say(rows * alone_s if before == job["model"] else rows * alone_s * more)
"""
PAIR = (Job("target", 1, rows=(1,)), Job("draft", 1, rows=(1,)))


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A script in place of the command that measures."""
    script = tmp_path / "fake.py"
    monkeypatch.setattr(probe, "MEASURE", (sys.executable, str(script)))
    return script


@pytest.fixture
def partners(monkeypatch: pytest.MonkeyPatch) -> list[probe.Partner]:
    """The processes that were started."""
    found: list[probe.Partner] = []

    class Noted(probe.Partner):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            found.append(self)

    monkeypatch.setattr(probe, "Partner", Noted)
    return found


def test_what_turns_cost_is_told_from_what_each_costs_alone(
    fake: Path, partners: list[probe.Partner]
) -> None:
    """The one that was not the last to compute needs longer."""
    fake.write_text(BEGIN + TURNS)
    found = probe.PROBE.in_turns(*PAIR, 25)
    assert found.passes == pytest.approx(1.25)
    assert found.drafting == pytest.approx(1.5)
    assert [one.process.returncode for one in partners] == [-9, -9]


@pytest.mark.parametrize(
    "wrong",
    [
        "raise SystemExit(1)",
        "say(0); raise SystemExit(1)",
        "say(0); input(); raise SystemExit(1)",
        "print('noise', flush=True); input()",
    ],
    ids=["at-once", "when-loaded", "when-asked", "says-something-else"],
)
@pytest.mark.parametrize("role", ["target", "draft"])
def test_one_that_dies_ends_both(
    fake: Path, partners: list[probe.Partner], role: str, wrong: str
) -> None:
    fake.write_text(f"{BEGIN}if job['model'] == '{role}': {wrong}\n{TURNS}")
    with pytest.raises(WorkerLost, match="ended"):
        probe.in_turns(*PAIR, 25)
    assert len(partners) == 2
    assert None not in [one.process.returncode for one in partners]


def test_one_that_cannot_load_its_model_says_why(fake: Path) -> None:
    fake.write_text(BEGIN + "say(['error', 'model_unusable', 'why'])")
    with pytest.raises(ModelUnusable, match=r"^why$"):
        probe.in_turns(*PAIR, 25)


@pytest.mark.parametrize("wrong", ["time.sleep(60)", "say(0); time.sleep(60)"])
def test_ones_that_hang_are_ended_in_time(
    fake: Path, partners: list[probe.Partner], wrong: str
) -> None:
    fake.write_text(f"{BEGIN}{wrong}\n")
    with pytest.raises(RequestTimeout, match="took more than 0 s"):
        probe.in_turns(*PAIR, 0.3)
    assert [one.process.returncode for one in partners] == [-9, -9]


def test_a_real_partner_says_why_it_cannot(tmp_path: Path) -> None:
    nowhere = Job(str(tmp_path / "m.gguf"), 1, rows=(1,))
    with pytest.raises(ModelNotFound, match="no such file"):
        probe.in_turns(nowhere, nowhere, 25)


def test_a_child_passes_as_often_as_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passes: list[tuple[int, int]] = []

    class Noted(ToyEngine):
        def extend(self, slot: int, tokens: Any, rows: int) -> Any:
            passes.append((self.length(slot), rows))
            return super().extend(slot, tokens, rows)

    engine: Any = Noted()
    monkeypatch.setattr("sys.stdin", io.StringIO("[1, 3]\n[6, 1]\n"))
    probe._take_turns(engine)
    read, *seconds = map(json.loads, capsys.readouterr().out.splitlines())
    assert read == 0
    assert len(seconds) == 2
    assert min(seconds) > 0
    text = probe.TURN_TEXT
    assert passes == [(0, 0), (text, 1), (text + 1, 1), (text + 2, 1), (text, 6)]
    assert engine.length(0) == text
