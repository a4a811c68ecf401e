"""Which draft is fastest here: the file as given, or one that is re-quantised for this processor.

The text never depends on the draft, so speed alone decides: the forecast from what each variant
costs and how often it agrees with the target. Found once and kept, see `decisions`.
"""

from __future__ import annotations

import functools
import time
import tomllib
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from outrider.core.values import TokenId
from outrider.errors import ConfigError, ModelNotFound, OutriderError, RequestTimeout
from outrider_services.models import catalogue
from outrider_services.models.gguf import read_header
from outrider_services.options import QUANTS, DraftOptions, Settings, TargetOptions
from outrider_services.pipeline.places import share_cores
from outrider_services.tuning import advice, decisions, forecasts, probe
from outrider_services.tuning.decisions import Decision, Trial, Variant
from outrider_services.tuning.probe import Findings, Job

USUAL_S = 15  # about what the quick search takes, before a first run
LIMIT_S = 60.0  # after which it is given up
THOROUGH_LIMIT_S = 900.0  # the same for `outrider tune`
WORTH = 1.02  # a re-quantised draft must be so many times as fast as the one as given
WORTH_MOVING = 1.05  # separate cores must be so many times as fast as shared ones
FEW_ROWS, ALL_ROWS = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12, 16)  # of the target's passes
# llama_ftype of files with two or three bits to a weight: each of our types would be larger
SMALL = frozenset({10, 11, 12, 13, 19, 20, 21, 22, 23, 24, 26, 27, 28, 29, 31, 36, 37})
FOUR_BITS = frozenset({2, 3})  # Q4_0, Q4_1

Tell = Callable[[str], None]
Ask = Callable[[Job, float], Findings]


# ---- for run and serve --------------------------------------------------------------------------


def prepared(settings: Settings, tell: Tell, ask: Ask = probe.ask) -> Settings:
    """The settings with the draft that `draft.quant` means; `tell` is called with lines to show.

    Raises OutriderError where a type was asked for that cannot be made; `auto` never fails.
    """
    if tunable(settings) and settings.draft.quant in QUANTS:
        return with_draft(settings, settings.draft.quant, ask)
    if not automatic(settings):
        return settings
    try:
        return _automatic(settings, tell, ask)
    except (OutriderError, OSError) as exc:
        tell(f"The draft is used as given; preparing a faster one failed: {exc}")
        return settings


def tunable(settings: Settings) -> bool:
    """Whether a draft worker with a model file is to be started here."""
    draft, pipeline = settings.draft, settings.pipeline
    speculates = pipeline.mode != "plain" and draft.n_max != 0
    here = draft.model is not None and draft.place == "spawn"
    return pipeline.backend == "llama" and speculates and here


def automatic(settings: Settings) -> bool:
    """Whether the choice of the draft's type is left to what was measured."""
    return tunable(settings) and settings.draft.quant == "auto" and settings.target.place == "spawn"


def kept(settings: Settings) -> Decision | None:
    """The decision that `prepared` would keep to without measuring anything, if there is one."""
    with suppress(OutriderError, OSError):
        return decisions.load(decisions.key(settings)) if automatic(settings) else None
    return None


def _automatic(settings: Settings, tell: Tell, ask: Ask) -> Settings:
    name = decisions.key(settings)
    decision = decisions.load(name)
    if decision is None and is_default(settings):
        tell(f"Preparing a draft for this processor, once (about {USUAL_S} s) ...")
        with decisions.locked():
            decision = decisions.load(name)  # another process may just have made it
            if decision is None:
                decision = _decide_quickly(settings, name, ask)
        tell(advice.described(decision))
    if decision is None:
        return settings
    settings = with_draft(settings, decision.quant, ask)
    return on_cores(settings, decision.target_cores, decision.draft_cores)


def _decide_quickly(settings: Settings, name: str, ask: Ask) -> Decision:
    try:
        decision = Tuner(settings, ask, LIMIT_S).decide()
    except RequestTimeout:
        decisions.save(name, Decision("off"))  # it would take as long the next time
        raise
    decisions.save(name, decision)
    return decision


def is_default(settings: Settings) -> bool:
    """Whether the models are the default pair, whose target gave the answers in texts.toml."""
    try:
        pair = catalogue.default_pair(fetch=False)
    except ModelNotFound:
        return False
    return [settings.target.model, settings.draft.model] == [str(path) for path in pair]


def with_draft(settings: Settings, quant: str, ask: Ask = probe.ask) -> Settings:
    """The settings with the draft re-quantised to this type. The file is made if it is not there.

    Raises OutriderError.
    """
    source = str(settings.draft.model)
    path = decisions.variant_path(source, quant)
    if not path.exists():
        with decisions.locked():
            if not path.exists():
                ask(Job(str(path), 1, source=source, kind=quant), LIMIT_S)
    return replace(settings, draft=replace(settings.draft, model=str(path)))


def on_cores(settings: Settings, target_cores: str, draft_cores: str) -> Settings:
    """The settings with these cores; unchanged if either is empty."""
    if not (target_cores and draft_cores):
        return settings
    return replace(
        settings,
        target=replace(settings.target, cores=target_cores),
        draft=replace(settings.draft, cores=draft_cores),
    )


# ---- deciding -----------------------------------------------------------------------------------


def tune(settings: Settings, ask: Ask = probe.ask) -> Decision:
    """Measure thoroughly, and keep the decision for `run` and `serve`. Raises OutriderError."""
    if not tunable(settings) or settings.target.place != "spawn":
        raise ConfigError("there is nothing to tune: it takes a target and a draft, both run here")
    try:
        with decisions.locked():
            decision = Tuner(settings, ask, THOROUGH_LIMIT_S, thorough=True).decide()
            decisions.save(decisions.key(settings), decision)
    except OSError as exc:
        raise ConfigError(f"the decision cannot be kept: {exc}") from exc
    return decision


def choose(found: Sequence[Variant]) -> Variant:
    """The fastest; but the first, which is the draft as given, unless another is clearly faster."""
    best = max(found, key=lambda one: one.rate)
    return best if best.rate > WORTH * found[0].rate else found[0]


def candidates(source: str, thorough: bool) -> list[str]:
    """The types that may be faster than the file `source` is."""
    file_type = read_header(Path(source)).values.get("general.file_type")
    if file_type in SMALL:
        return []
    if file_type in FOUR_BITS:
        return ["q4_0"]  # the file's output matrix may still have more bits
    return ["q4_0", "q4_1", "q8_0"] if thorough else ["q4_0", "q8_0"]


def splits(settings: Settings) -> list[tuple[str, str]]:
    """Ways to give target and draft cores of their own; none if the user has said which to use."""
    target, draft = settings.target, settings.draft
    untouched = (target.threads, draft.threads) == (TargetOptions().threads, DraftOptions().threads)
    if settings.pipeline.mode != "auto" or target.cores or draft.cores or not untouched:
        return []
    cores = [str(core) for core in decisions.usable("")]
    counts = sorted({1, len(cores) // 4} - {0}) if len(cores) > 1 else []
    return [(",".join(cores[:-k]), ",".join(cores[-k:])) for k in counts]


@functools.cache
def texts() -> dict[str, tuple[str, str]]:
    """Prompts and answers to try a draft on, by their names."""
    file = resources.files("outrider_services.tuning") / "texts.toml"
    found = tomllib.loads(file.read_text("utf-8"))["text"]
    return {text["name"]: (text["prompt"], text["answer"]) for text in found}


@dataclass(frozen=True, slots=True)
class Agreement:
    """The share of a draft's tokens that the target chooses itself."""

    overall: float
    by_text: dict[str, float]


@dataclass
class Tuner:
    """One search. However it ends, it deletes the files that it has made and not chosen."""

    settings: Settings
    ask: Ask
    limit_s: float
    thorough: bool = False
    made: list[Path] = field(default_factory=list)  # re-quantised drafts
    # the texts in the target's tokens, and how many of them are the answer
    sequences: tuple[tuple[tuple[TokenId, ...], int], ...] = ()
    expected: tuple[TokenId, ...] = ()  # the target's own tokens in their answers
    agreements: dict[str, Agreement] = field(default_factory=dict)  # by type: cores change none
    began: float = field(default_factory=time.monotonic)

    def decide(self) -> Decision:
        kept: set[Path] = set()
        try:
            trials = [self._trial(self.settings)]
            for cores in splits(self.settings) if self.thorough else []:
                trials.append(self._trial(on_cores(self.settings, *cores)))
            decision = settle(trials)
            kept.add(self._path(decision.quant))
            return decision
        finally:
            for path in {*self.made} - kept:
                path.unlink(missing_ok=True)

    def _trial(self, settings: Settings) -> Trial:
        """Measure every draft with the cores of `settings`."""
        mode = settings.pipeline.mode
        pipelined = mode == "pipelined" or (mode == "auto" and not share_cores(settings))
        target = self._target(settings)
        if not self.sequences:
            self.expected = target.choices or tuple(
                token for tokens, answers in target.sequences for token in tokens[-answers:]
            )
            self.sequences = target.sequences
        found: list[Variant] = []
        for quant in ("off", *candidates(str(settings.draft.model), self.thorough)):
            if not self.thorough and hopeless(quant, found, target.curve_s, pipelined):
                continue
            draft_s = self._draft(settings, quant)
            agreed = self.agreements[quant]
            rate = forecasts.rate(target.curve_s, draft_s, agreed.by_text.values(), pipelined)
            size = self._path(quant).stat().st_size
            found.append(Variant(quant, size, draft_s, agreed.overall, rate, agreed.by_text))
        cores = (settings.target.cores, settings.draft.cores)
        plain_rate = forecasts.plain_rate(target.curve_s)
        return Trial(*cores, pipelined, plain_rate, tuple(found), target.curve_s)

    def _target(self, settings: Settings) -> Findings:
        target = settings.target
        job = Job(
            str(target.model),
            target.threads,
            target.cores,
            target.ngl,
            settings.pipeline.exact,
            rows=ALL_ROWS if self.thorough else FEW_ROWS,
            repeats=2 if self.thorough else 1,
            texts=() if self.sequences else tuple(texts().values()),
            chooses=not is_default(self.settings),  # the answers are what the default target chose
        )
        return self._ask(job)

    def _draft(self, settings: Settings, quant: str) -> float:
        """Seconds of a drafted token; how often it agrees with the target is kept, too."""
        draft, path = settings.draft, self._path(quant)
        job = Job(
            str(path),
            draft.threads,
            draft.cores,
            draft.ngl,
            settings.pipeline.exact,
            drafts=True,
            rows=(1,),
            repeats=9 if self.thorough else 3,
            sequences=() if quant in self.agreements else self.sequences,
        )
        if not path.exists():
            job = replace(job, source=str(draft.model), kind=quant)
            self.made.append(path)
        found = self._ask(job)
        if quant not in self.agreements:
            counts = [answer for _, answer in self.sequences]
            self.agreements[quant] = compare(found.choices, self.expected, counts)
        return found.curve_s[0]

    def _ask(self, job: Job) -> Findings:
        return self.ask(job, self.limit_s - (time.monotonic() - self.began))

    def _path(self, quant: str) -> Path:
        return decisions.variant_path(str(self.settings.draft.model), quant)


def compare(
    drafted: Sequence[TokenId], expected: Sequence[TokenId], counts: Sequence[int]
) -> Agreement:
    """Where draft and target agree in the answers, of which each has so many of the tokens."""
    same = [one == other for one, other in zip(drafted, expected, strict=True)]
    by_text, start = {}, 0
    for name, count in zip(texts(), counts, strict=True):
        by_text[name] = sum(same[start : start + count]) / count
        start += count
    return Agreement(sum(same) / len(same), by_text)


def hopeless(
    quant: str, found: Sequence[Variant], curve_s: tuple[float, ...], pipelined: bool
) -> bool:
    """Whether q8_0 could not beat q4_0 even if it agreed as often as the draft as given.

    It reads nearly twice as many bytes, which makes its tokens dearer by at least a quarter.
    """
    if quant != "q8_0" or len(found) < 2:
        return False
    given, small = found
    hoped = forecasts.rate(curve_s, 1.25 * small.draft_s, given.accepted.values(), pipelined)
    return hoped <= small.rate


def settle(trials: Sequence[Trial]) -> Decision:
    """The best draft of the first trial, unless one of another trial is clearly faster."""
    best, chosen = trials[0], choose(trials[0].variants)
    for trial in trials[1:]:
        other = choose(trial.variants)
        if other.rate > max(chosen.rate, WORTH_MOVING * choose(trials[0].variants).rate):
            best, chosen = trial, other
    moved = best is not trials[0]
    cores = (best.target_cores, best.draft_cores) if moved else ("", "")
    return Decision(chosen.quant, *cores, tuple(trials))
