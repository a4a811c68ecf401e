"""Which draft is fastest here: the file as given, or one re-quantised for this processor.

The text never depends on the draft, so speed alone decides: the planner's forecast from what each
variant costs and how often it agrees with the target. Found once and kept, see `variants`.
"""

from __future__ import annotations

import functools
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from outrider.core import price
from outrider.core.estimates import Costs
from outrider.core.values import TokenId
from outrider.errors import ConfigError, ModelNotFound, OutriderError, RequestTimeout
from outrider_services.models import catalogue
from outrider_services.models.gguf import read_header
from outrider_services.options import Draft, Settings, Target
from outrider_services.pipeline.places import share_cores
from outrider_services.tuning import decisions, probe
from outrider_services.tuning.decisions import Decision, Trial, Variant
from outrider_services.tuning.probe import Findings, Job

USUAL_S = 15  # what the quick form takes, about
LIMIT_S = 60.0  # after which it is given up
THOROUGH_LIMIT_S = 900.0
LINK_S = 5e-4  # messages of a pass
WORTH = 1.02  # a re-quantised draft must be so much faster than the one as given
WORTH_MOVING = 1.05  # and separate cores than shared ones
FEW_ROWS, ALL_ROWS = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12, 16)
# llama_ftype of files with two or three bits to a weight: every type here would be larger
SMALL = frozenset({10, 11, 12, 13, 19, 20, 21, 22, 23, 24, 26, 27, 28, 29, 31, 36, 37})
FOUR_BITS = frozenset({2, 3})  # Q4_0, Q4_1

Tell = Callable[[str], None]
Ask = Callable[[Job, float], Findings]


# ---- for run and serve --------------------------------------------------------------------------


def prepared(settings: Settings, tell: Tell, ask: Ask = probe.ask) -> Settings:
    """The settings with the draft that `draft.quant` means. `auto` never fails."""
    if not tunable(settings) or settings.draft.quant == "off":
        return settings
    if settings.draft.quant != "auto":
        return with_draft(settings, settings.draft.quant, ask)
    if settings.target.place != "spawn":
        return settings
    try:
        return _automatic(settings, tell, ask)
    except (OutriderError, OSError) as exc:
        tell(f"The draft is used as given; preparing a faster one failed: {exc}")
        return settings


def tunable(settings: Settings) -> bool:
    """Whether a draft worker of a model of its own is to be started here."""
    draft, pipeline = settings.draft, settings.pipeline
    speculates = pipeline.mode != "plain" and draft.n_max != 0
    here = draft.model is not None and draft.place == "spawn"
    return pipeline.backend == "llama" and speculates and here


def _automatic(settings: Settings, tell: Tell, ask: Ask) -> Settings:
    name = decisions.key(settings)
    decision = decisions.load(name)
    if decision is None and is_default(settings):
        tell(f"Preparing a draft for this processor, once (about {USUAL_S} s) ...")
        with decisions.locked():
            decision = decisions.load(name)  # another process may have just been at it
            if decision is None:
                decision = _decide_quickly(settings, name, ask)
        tell(described(decision))
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
    """Whether it is the pair that the texts' answers are of."""
    try:
        pair = catalogue.default_pair(fetch=False)
    except ModelNotFound:
        return False
    return [settings.target.model, settings.draft.model] == [str(path) for path in pair]


def with_draft(settings: Settings, quant: str, ask: Ask = probe.ask) -> Settings:
    """The settings with the draft re-quantised so, which is made if it is not there."""
    source = str(settings.draft.model)
    path = decisions.variant_path(source, quant)
    if not path.exists():
        with decisions.locked():
            if not path.exists():
                ask(Job(str(path), 1, source=source, kind=quant), LIMIT_S)
    return replace(settings, draft=replace(settings.draft, model=str(path)))


def on_cores(settings: Settings, target_cores: str, draft_cores: str) -> Settings:
    """The settings with these cores, if any are said."""
    if not (target_cores and draft_cores):
        return settings
    return replace(
        settings,
        target=replace(settings.target, cores=target_cores),
        draft=replace(settings.draft, cores=draft_cores),
    )


def described(decision: Decision) -> str:
    """The choice in one sentence."""
    if not decision.trials:
        return "Draft: used as given."
    trial = decision.trials[0]
    given = trial.variants[0]
    best = next(one for one in trial.variants if one.quant == decision.quant)
    gain = f"expect {best.rate / trial.plain_rate:.1f}x the target alone"
    if best is given:
        return f"Draft: used as given, no other type is faster here; {gain}."
    return (
        f"Draft: re-quantised to {best.quant}, {1000 * best.draft_s:.1f} ms a token instead of "
        f"{1000 * given.draft_s:.1f}; {gain}, instead of {given.rate / trial.plain_rate:.1f}x."
    )


def headline(trial: Trial) -> str:
    """How a placement shares the cores."""
    where = "on the same cores"
    if trial.target_cores or trial.draft_cores:
        where = f"target on {trial.target_cores or 'all'}, draft on {trial.draft_cores or 'all'}"
    how = "at the same time" if trial.pipelined else "in turn"
    return f"{where}, {how}; the target alone: {trial.plain_rate:.1f} tokens/s"


def is_chosen(decision: Decision, trial: Trial) -> bool:
    moved = bool(decision.target_cores)
    cores = (decision.target_cores, decision.draft_cores)
    first = decision.trials[:1] == (trial,)
    return (trial.target_cores, trial.draft_cores) == cores if moved else first


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
    """The fastest; the first, which is as given, unless another is clearly so."""
    best = max(found, key=lambda one: one.rate)
    return best if best.rate > WORTH * found[0].rate else found[0]


def candidates(source: str, thorough: bool) -> list[str]:
    """The types that may be faster than the file as given."""
    file_type = read_header(Path(source)).values.get("general.file_type")
    if file_type in SMALL:
        return []
    if file_type in FOUR_BITS:
        return ["q4_0"]  # its output matrix may still be finer
    return ["q4_0", "q4_1", "q8_0"] if thorough else ["q4_0", "q8_0"]


def splits(settings: Settings) -> list[tuple[str, str]]:
    """Cores for target and draft, where the user left both to us."""
    target, draft = settings.target, settings.draft
    untouched = (target.threads, draft.threads) == (Target().threads, Draft().threads)
    if settings.pipeline.mode != "auto" or target.cores or draft.cores or not untouched:
        return []
    cores = [str(core) for core in decisions.usable("")]
    counts = sorted({1, len(cores) // 4} - {0}) if len(cores) > 1 else []
    return [(",".join(cores[:-k]), ",".join(cores[-k:])) for k in counts]


@functools.cache
def texts() -> tuple[tuple[str, str], ...]:
    """Prompts and answers to try a draft on."""
    file = resources.files("outrider_services.tuning") / "texts.toml"
    return tuple((t["prompt"], t["answer"]) for t in tomllib.loads(file.read_text("utf-8"))["text"])


@dataclass
class Tuner:
    """One search. The files that it makes and does not choose are deleted, however it ends."""

    settings: Settings
    ask: Ask
    limit_s: float
    thorough: bool = False
    made: list[Path] = field(default_factory=list)
    sequences: tuple[tuple[tuple[TokenId, ...], int], ...] = ()  # the texts, in the target's tokens
    expected: tuple[TokenId, ...] = ()  # what the target says in their answers
    acceptances: dict[str, float] = field(default_factory=dict)
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
        """Every variant with the cores of `settings`."""
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
            draft_s, acceptance = self._draft(settings, quant)
            rate = price.forecast(Costs(target.curve_s, draft_s, LINK_S), acceptance, pipelined)
            size = self._path(quant).stat().st_size
            found.append(Variant(quant, size, draft_s, acceptance, rate))
        cores = (settings.target.cores, settings.draft.cores)
        return Trial(*cores, pipelined, 1 / (target.curve_s[0] + LINK_S), tuple(found))

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
            texts=() if self.sequences else texts(),
            chooses=not is_default(self.settings),  # the answers are what the default target chose
        )
        return self._ask(job)

    def _draft(self, settings: Settings, quant: str) -> tuple[float, float]:
        """Seconds of a drafted token, and the share of tokens on which target and draft agree."""
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
            sequences=() if quant in self.acceptances else self.sequences,
        )
        if not path.exists():
            job = replace(job, source=str(draft.model), kind=quant)
            self.made.append(path)
        found = self._ask(job)
        if quant not in self.acceptances:
            pairs = list(zip(found.choices, self.expected, strict=True))
            self.acceptances[quant] = sum(one == other for one, other in pairs) / len(pairs)
        return found.curve_s[0], self.acceptances[quant]

    def _ask(self, job: Job) -> Findings:
        return self.ask(job, self.limit_s - (time.monotonic() - self.began))

    def _path(self, quant: str) -> Path:
        return decisions.variant_path(str(self.settings.draft.model), quant)


def hopeless(
    quant: str, found: Sequence[Variant], curve_s: tuple[float, ...], pipelined: bool
) -> bool:
    """Whether q8_0 could not beat q4_0 even if it agreed as often as the draft as given.

    It reads nearly twice as many bytes; that makes its tokens dearer by at least a quarter.
    """
    if quant != "q8_0" or len(found) < 2:
        return False
    given, small = found
    hoped = price.forecast(
        Costs(curve_s, 1.25 * small.draft_s, LINK_S), given.acceptance, pipelined
    )
    return hoped <= small.rate


def settle(trials: Sequence[Trial]) -> Decision:
    """The best variant of the first placement, unless another placement is clearly faster."""
    best, chosen = trials[0], choose(trials[0].variants)
    for trial in trials[1:]:
        other = choose(trial.variants)
        if other.rate > max(chosen.rate, WORTH_MOVING * choose(trials[0].variants).rate):
            best, chosen = trial, other
    moved = best is not trials[0]
    cores = (best.target_cores, best.draft_cores) if moved else ("", "")
    return Decision(chosen.quant, *cores, tuple(trials))
