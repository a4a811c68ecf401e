"""Which draft is fastest here: the file as given, or one that is re-quantised for this processor.

The text never depends on the draft, so speed alone decides: the forecast from what each variant
costs and how often it agrees with the target. Found once and kept, see `decisions`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from outrider.engines import suffix
from outrider.errors import ConfigError, OutriderError, RequestTimeout
from outrider_services.table import QUANTS, Settings
from outrider_services.tuning import advice, decisions
from outrider_services.tuning.decisions import Decision
from outrider_services.tuning.probe import PROBE, Ask, Job
from outrider_services.tuning.tuner import Tuner, is_default, on_cores

USUAL_S = 30  # about what the quick search takes, before a first run
LIMIT_S = 120.0  # after which it is given up
THOROUGH_LIMIT_S = 900.0  # the same for `outrider tune`

Tell = Callable[[str], None]


def prepared(settings: Settings, tell: Tell, ask: Ask = PROBE) -> Settings:
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
    here = draft.model not in (None, suffix.NAME) and draft.place != "remote"
    return pipeline.backend == "llama" and speculates and here


def automatic(settings: Settings) -> bool:
    """Whether the choice of the draft's type is left to what was measured."""
    return (
        tunable(settings) and settings.draft.quant == "auto" and settings.target.place != "remote"
    )


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
    with_draft(settings, decision.quant, ask)  # so that the file is there
    return decided(settings, decision)


def decided(settings: Settings, decision: Decision) -> Settings:
    """The settings as the decision changes them; its draft may still have to be made.

    Raises OSError.
    """
    path = decisions.variant_path(str(settings.draft.model), decision.quant)
    settings = replace(settings, draft=replace(settings.draft, model=str(path)))
    settings = on_cores(settings, decision.target_cores, decision.draft_cores)
    return with_kernels(settings, decision.without, decision.threads)


def _decide_quickly(settings: Settings, name: str, ask: Ask) -> Decision:
    try:
        decision = Tuner(settings, ask, LIMIT_S).decide()
    except RequestTimeout:
        decisions.save(name, Decision("off"))  # it would take as long the next time
        raise
    decisions.save(name, decision)
    return decision


def with_draft(settings: Settings, quant: str, ask: Ask = PROBE) -> Settings:
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


def with_kernels(settings: Settings, without: str, threads: int) -> Settings:
    """The settings with these kernels and threads for the target, where the user left them."""
    target = settings.target
    if target.without != "auto":
        return settings
    changed = replace(target, without=without or "none", threads=threads or target.threads)
    return replace(settings, target=changed)


def tune(settings: Settings, ask: Ask = PROBE) -> Decision:
    """Measure thoroughly, and keep the decision for `run` and `serve`. Raises OutriderError."""
    if not tunable(settings) or settings.target.place == "remote":
        raise ConfigError("there is nothing to tune: it takes a target and a draft, both run here")
    try:
        with decisions.locked():
            decision = Tuner(settings, ask, THOROUGH_LIMIT_S, thorough=True).decide()
            decisions.save(decisions.key(settings), decision)
    except OSError as exc:
        raise ConfigError(f"the decision cannot be kept: {exc}") from exc
    return decision
