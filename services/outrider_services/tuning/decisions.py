"""What tuning keeps in the cache: re-quantised drafts, and which one was chosen for what.

A decision holds for one pair of files and one build of llama.cpp, on the same devices: one kind of
processor with the same share of its cores, and GPUs of the same names. When any of that changes, so
does its key, and it is not found any more.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import platformdirs

from outrider.engines import processor
from outrider.engines.llama import library
from outrider.errors import ConfigError, ModelUnusable
from outrider_services import options, table
from outrider_services.models import fetching
from outrider_services.pipeline.places import VISIBLE
from outrider_services.table import DraftOptions, Settings, TargetOptions

LOCK_S = 300.0  # how long to wait for another process that tunes


@dataclass(frozen=True, slots=True)
class Variant:
    """A draft of one type, and what was measured of it in one trial."""

    quant: str  # "off": the file as given
    bytes: int
    draft_s: float  # one drafted token
    acceptance: float  # the share of its tokens that the target chooses itself, over all texts
    rate: float  # tokens per second to expect
    accepted: dict[str, float]  # that share on each text, by the text's name


@dataclass(frozen=True, slots=True)
class Kernels:
    """Kernels and threads of the target that were tried, and what it costs with them."""

    without: str  # the kernels that it does without, see `options.kernels`; "": it uses all
    threads: int
    curve_s: tuple[float, ...]  # of a pass over 1, 2, 3 … rows
    read_s: float  # of a token that is only read
    usual_s: float  # of a usual request: what decides


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to share the cores, and what was measured of each draft there."""

    target_cores: str
    draft_cores: str
    pipelined: bool  # whether draft and target compute at the same time, on cores of their own
    plain_rate: float  # tokens per second of the target alone
    variants: tuple[Variant, ...]  # the first is the draft as given
    curve_s: tuple[float, ...]  # of a pass of the target over 1, 2, 3 … rows
    kernels: tuple[Kernels, ...] = ()  # the last was chosen
    # how many times its costs alone a pass and a drafted token cost in turns; in `curve_s` and
    # `draft_s` that is counted
    turns: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Decision:
    """What was chosen, and all that was measured to choose it."""

    quant: str  # "off": the file as given
    target_cores: str = ""  # empty: as the settings say
    draft_cores: str = ""
    without: str = ""  # kernels that the target does without
    threads: int = 0  # of the target; 0: as the settings say
    trials: tuple[Trial, ...] = ()

    def chosen(self) -> tuple[Trial, Variant]:
        """The trial on the cores that were chosen, and the draft. Raises LookupError."""
        for trial in self.trials:
            for one in trial.variants:
                if self.is_on(trial) and one.quant == self.quant:
                    return trial, one
        raise LookupError("what was chosen was not tried")

    def is_on(self, trial: Trial) -> bool:
        """Whether the workers are to have the cores of this trial."""
        if not self.target_cores:
            return trial == self.trials[0]
        chosen = self.target_cores, self.draft_cores
        return (trial.target_cores, trial.draft_cores) == chosen


def folder(name: str) -> Path:
    """Where `drafts` or `tuned` lie."""
    return platformdirs.user_cache_path("outrider") / name


def identity(path: str) -> list[str | int]:
    """What changes whenever the file does, without reading it. Raises OSError."""
    status = os.stat(path)
    return [os.path.realpath(path), status.st_size, status.st_mtime_ns]


def variant_path(source: str, quant: str) -> Path:
    """Where the draft in `source` lies, once it is re-quantised to this type. Raises OSError."""
    if quant == "off":
        return Path(source)
    digest = hashlib.sha256(json.dumps(identity(source)).encode()).hexdigest()
    return folder("drafts") / f"{Path(source).stem}.{quant}-{digest[:12]}.gguf"


@contextmanager
def locked() -> Iterator[None]:
    """Hold off other processes that tune, and remove what killed ones left unfinished.

    Raises ModelUnusable if the folder cannot be written.
    """
    drafts = folder("drafts")
    with ExitStack() as stack:
        try:
            drafts.mkdir(parents=True, exist_ok=True)
            stack.enter_context(fetching.locked(drafts / "lock", LOCK_S))
        except OSError as exc:
            raise ModelUnusable(f"{drafts} cannot be written: {exc.strerror}") from exc
        remove_unfinished()
        stack.callback(remove_unfinished)
        yield


def remove_unfinished() -> None:
    for path in folder("drafts").glob("*.partial"):
        path.unlink(missing_ok=True)


# ---- decisions ----------------------------------------------------------------------------------


def key(settings: Settings) -> str:
    """A name made of all that a decision depends on. Raises OSError without the model files."""
    target, draft, pipeline = settings.target, settings.draft, settings.pipeline
    what = [
        *(identity(str(one.model)) for one in (target, draft)),
        *([one.threads, usable(one.cores), where(one)] for one in (target, draft)),
        [pipeline.mode, pipeline.exact, target.without],
        identity(str(kernels)) if (kernels := library.kernels()) else [],
        processor.kind(),
        [version(name) for name in ("outrider", "llama-cpp-python")],
    ]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def usable(cores: str) -> list[int]:
    """The cores in the list; all that we may use if it is empty. Raises ConfigError."""
    return sorted(options.cores(cores) or os.sched_getaffinity(0))


def where(worker: TargetOptions | DraftOptions) -> Any:
    """The devices for a worker's layers, and what changes which ones their names mean; 0 for none.

    Raises ConfigError.
    """
    offload = options.offload(worker)
    return [asdict(offload), *map(os.environ.get, VISIBLE)] if offload.layers else 0


def version(package: str) -> str:
    """The installed version of the package; "" if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def load(name: str) -> Decision | None:
    """The decision under this key; None if there is none that can be read."""
    with suppress(OSError, ValueError, TypeError, LookupError, ConfigError):
        return from_json(json.loads(_file(name).read_text("utf-8")))
    return None


def save(name: str, decision: Decision) -> None:
    """Keep the decision under this key. Raises OSError."""
    path = _file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{secrets.token_hex(4)}")
    try:
        unfinished.write_text(json.dumps(asdict(decision), indent=1), "utf-8")
        unfinished.rename(path)
    finally:
        unfinished.unlink(missing_ok=True)


def from_json(found: dict[str, Any]) -> Decision:
    """The decision in `found`. Raises what `load` expects if it is none."""
    decision = Decision(**{**found, "trials": tuple(map(_trial, found["trials"]))})
    if decision.trials:
        decision.chosen()
    if decision.quant not in ("off", *table.QUANTS):
        raise ValueError(f"no such type: {decision.quant}")
    options.cores(decision.target_cores), options.cores(decision.draft_cores)
    options.kernels(decision.without)
    return decision


def _trial(found: dict[str, Any]) -> Trial:
    variants = tuple(Variant(**one) for one in found["variants"])
    curve_s = tuple(map(float, found["curve_s"]))
    if not curve_s or not all(one.accepted for one in variants):
        raise ValueError("something was not measured")
    tried = tuple(Kernels(**{**one, "curve_s": tuple(one["curve_s"])}) for one in found["kernels"])
    passes, drafting = map(float, found["turns"])
    more: dict[str, Any] = {"kernels": tried, "turns": (passes, drafting)}
    return Trial(**{**found, "variants": variants, "curve_s": curve_s, **more})


def _file(name: str) -> Path:
    return folder("tuned") / f"{name}.json"
