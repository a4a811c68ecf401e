"""One search for the fastest draft, and for the kernels and cores that go with it.

It measures in processes of their own (`probe`) and forecasts from what each draft costs and how
often it agrees with the target.
"""

from __future__ import annotations

import functools
import time
import tomllib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from outrider.core.values import TokenId
from outrider.errors import ModelNotFound, OutriderError
from outrider_services.models import catalogue
from outrider_services.models.gguf import read_header
from outrider_services.options import offload
from outrider_services.pipeline.places import share_cores
from outrider_services.table import KERNELS, DraftOptions, Settings, TargetOptions
from outrider_services.tuning import decisions, forecasts
from outrider_services.tuning.decisions import Decision, Kernels, Trial, Variant
from outrider_services.tuning.probe import Ask, Findings, Job, Turns

WORTH = 1.02  # a re-quantised draft must be so many times as fast as the one as given
WORTH_MOVING = 1.05  # separate cores must be so many times as fast as shared ones
MANY_CORES = 4  # from here on the quick search tries separate cores, too
KERNELS_WORTH = 0.97  # other kernels must need so much of the time at most
FEW_ROWS, ALL_ROWS = (1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12, 16)  # of the target's passes
# llama_ftype of files with two or three bits to a weight: each of our types would be larger
SMALL = frozenset({10, 11, 12, 13, 19, 20, 21, 22, 23, 24, 26, 27, 28, 29, 31, 36, 37})
FOUR_BITS = frozenset({2, 3})  # Q4_0, Q4_1


def is_default(settings: Settings) -> bool:
    """Whether the models are the default pair, whose target gave the answers in texts.toml."""
    try:
        pair = catalogue.default_pair(fetch=False)
    except ModelNotFound:
        return False
    return [settings.target.model, settings.draft.model] == [str(path) for path in pair]


def on_cores(settings: Settings, target_cores: str, draft_cores: str) -> Settings:
    """The settings with these cores; unchanged if either is empty."""
    if not (target_cores and draft_cores):
        return settings
    return replace(
        settings,
        target=replace(settings.target, cores=target_cores),
        draft=replace(settings.draft, cores=draft_cores),
    )


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


def splits(settings: Settings, thorough: bool) -> list[tuple[str, str]]:
    """Ways to give target and draft cores of their own; none if the user has said which to use.

    Where there are few cores, only the thorough search tries them.
    """
    target, draft = settings.target, settings.draft
    untouched = (target.threads, draft.threads) == (TargetOptions().threads, DraftOptions().threads)
    if settings.pipeline.mode != "auto" or target.cores or draft.cores or not untouched:
        return []
    cores = [str(core) for core in decisions.usable("")]
    counts = sorted({1, len(cores) // 4} - {0}) if len(cores) > 1 else []
    if not thorough:
        counts = counts[-1:] if len(cores) >= MANY_CORES else []
    return [(",".join(cores[:-k]), ",".join(cores[-k:])) for k in counts]


def kernel_choices(settings: Settings, thorough: bool) -> list[tuple[str, int]]:
    """Kernels to do without, and threads: first as llama.cpp and the settings have it."""
    target = settings.target
    if target.without != "auto":
        return [("" if target.without == "none" else target.without, target.threads)]
    usual = [("", target.threads)]
    if settings.pipeline.exact or offload(target).layers or settings.pipeline.backend != "llama":
        return usual
    found = [*usual, *((name, target.threads) for name in (KERNELS if thorough else ("tiled",)))]
    cores = len(decisions.usable(target.cores))
    if target.threads == TargetOptions().threads and cores > 2:
        others = sorted({cores, (cores + 1) // 2} - {min(cores, target.threads)})
        found += [("", threads) for threads in (others if thorough else others[-1:])]
    return found


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
            for cores in splits(self.settings, self.thorough):
                with suppress(OutriderError):  # what was found before counts
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
        tried = self._kernels(settings, pipelined)
        curve_s = tried[-1].curve_s
        found: list[Variant] = []
        for quant in ("off", *candidates(str(settings.draft.model), self.thorough)):
            if not self.thorough and hopeless(quant, found, curve_s, pipelined):
                continue
            draft_s = self._draft(settings, quant)
            agreed = self.agreements[quant]
            rate = forecasts.rate(curve_s, draft_s, agreed.by_text.values(), pipelined)
            size = self._path(quant).stat().st_size
            found.append(Variant(quant, size, draft_s, agreed.overall, rate, agreed.by_text))
        turns = Turns() if pipelined else self._turns(settings, tried[-1], choose(found).quant)
        # before a plain step nothing was drafted, so that costs what it does alone
        curve_s = (curve_s[0], *(turns.passes * seconds for seconds in curve_s[1:]))
        variants = tuple(in_turns(one, curve_s, turns) for one in found) if not pipelined else found
        return Trial(
            settings.target.cores,
            settings.draft.cores,
            pipelined,
            forecasts.plain_rate(curve_s),
            tuple(variants),
            curve_s,
            tuple(tried),
            (turns.passes, turns.drafting),
        )

    def _kernels(self, settings: Settings, pipelined: bool) -> list[Kernels]:
        """What the target costs with each choice of kernels and threads; the last is the best."""
        found: list[Kernels] = []
        for without, threads in kernel_choices(settings, self.thorough):
            try:
                measured = self._target(settings, without, threads)
            except OutriderError:
                if not found:
                    raise
                continue  # this one cannot be used here
            if not self.sequences:
                self.expected = measured.choices or tuple(
                    token for tokens, answers in measured.sequences for token in tokens[-answers:]
                )
                self.sequences = measured.sequences
            usual_s = forecasts.usual_s(measured.curve_s, measured.read_s, pipelined)
            tried = Kernels(without, threads, measured.curve_s, measured.read_s, usual_s)
            found.append(tried)
        best = min(found, key=lambda one: one.usual_s)
        if best.usual_s > KERNELS_WORTH * found[0].usual_s:
            best = found[0]
        return [*(one for one in found if one != best), best]

    def _target_job(self, settings: Settings, without: str, threads: int) -> Job:
        target = settings.target
        model, exact, layers = str(target.model), settings.pipeline.exact, offload(target)
        return Job(model, threads, target.cores, layers, exact, rows=(1,), without=without)

    def _draft_job(self, settings: Settings, quant: str) -> Job:
        draft = settings.draft
        model, exact, layers = str(self._path(quant)), settings.pipeline.exact, offload(draft)
        return Job(model, draft.threads, draft.cores, layers, exact, drafts=True, rows=(1,))

    def _target(self, settings: Settings, without: str, threads: int) -> Findings:
        job = replace(
            self._target_job(settings, without, threads),
            rows=ALL_ROWS if self.thorough else FEW_ROWS,
            repeats=2,
            texts=() if self.sequences else tuple(texts().values()),
            # the answers are what the default target chose
            chooses=not (self.sequences or is_default(self.settings)),
        )
        return self._ask(job)

    def _turns(self, settings: Settings, kernels: Kernels, quant: str) -> Turns:
        """How much more passes and drafted tokens cost in turns on the same cores."""
        target = self._target_job(settings, kernels.without, kernels.threads)
        with suppress(OutriderError):  # what was found before counts
            return self.ask.in_turns(target, self._draft_job(settings, quant), self._left_s)
        return Turns()

    def _draft(self, settings: Settings, quant: str) -> float:
        """Seconds of a drafted token; how often it agrees with the target is kept, too."""
        job = replace(
            self._draft_job(settings, quant),
            repeats=9 if self.thorough else 3,
            sequences=() if quant in self.agreements else self.sequences,
        )
        path = self._path(quant)
        if not path.exists():
            job = replace(job, source=str(settings.draft.model), kind=quant)
            self.made.append(path)
        found = self._ask(job)
        if quant not in self.agreements:
            counts = [answer for _, answer in self.sequences]
            self.agreements[quant] = compare(found.choices, self.expected, counts)
        return found.curve_s[0]

    def _ask(self, job: Job) -> Findings:
        return self.ask(job, self._left_s)

    @property
    def _left_s(self) -> float:
        return self.limit_s - (time.monotonic() - self.began)

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


def in_turns(one: Variant, curve_s: tuple[float, ...], turns: Turns) -> Variant:
    """The variant at what it costs in turns, and what is to be expected then."""
    draft_s = turns.drafting * one.draft_s
    rate = forecasts.rate(curve_s, draft_s, one.accepted.values(), False)
    return replace(one, draft_s=draft_s, rate=rate)


def settle(trials: Sequence[Trial]) -> Decision:
    """The best draft of the first trial, unless one of another trial is clearly faster."""
    best, chosen = trials[0], choose(trials[0].variants)
    for trial in trials[1:]:
        other = choose(trial.variants)
        if other.rate > max(chosen.rate, WORTH_MOVING * choose(trials[0].variants).rate):
            best, chosen = trial, other
    moved = best is not trials[0]
    cores = (best.target_cores, best.draft_cores) if moved else ("", "")
    kernels = best.kernels[-1] if best.kernels else None
    without, threads = (kernels.without, kernels.threads) if kernels else ("", 0)
    return Decision(chosen.quant, *cores, without, threads, tuple(trials))
