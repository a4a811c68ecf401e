"""Making the engine that a worker computes with: a model file loaded, or a made-up model."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from outrider.core.engine import Engine
from outrider.engines import suffix
from outrider.engines.calibration import CHEAP
from outrider.engines.llama import library
from outrider.errors import ConfigError, ModelNotFound
from outrider_services.options import kernels, offload, toy_rows
from outrider_services.table import Settings

PASS = 128  # tokens: no worker evaluates more at once, and room for more would lie idle


def load_engine(role: str, settings: Settings, progress: Callable[[float], None]) -> Engine:
    """The engine of a worker of `role`; its model is the target of `settings`, whatever the role.

    `progress` is called with the share that is loaded, from 0 to 1. Raises OutriderError.
    """
    if settings.pipeline.backend == "toy":
        return _toy(role, settings)
    return _llama(role, settings, progress)


def build_of(settings: Settings) -> str:
    """What the worker of these settings computes with: library, compiler, and what it leaves out.

    Its model is the target of `settings`, whatever its role.
    """
    if settings.pipeline.backend == "toy":
        return "made up"
    if settings.target.model == suffix.NAME:
        return "no model"
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        version = "(unknown)"
    found = f"llama-cpp-python {version}, built by {library.built_by() or 'an unknown compiler'}"
    without = ",".join(sorted(kernels(settings.target.without)))
    exact = "; exact" if settings.pipeline.exact else ""
    return found + (f"; without {without}" if without else "") + exact


def _llama(role: str, settings: Settings, progress: Callable[[float], None]) -> Engine:
    from outrider.engines.llama.engine import LlamaEngine, LlamaSettings

    target, pipeline = settings.target, settings.pipeline
    if not target.model:
        raise ModelNotFound("say which model: -m FILE")
    threads = min(target.threads, len(os.sched_getaffinity(0)))
    without = kernels(target.without)
    try:
        chosen = LlamaSettings(
            context=target.ctx,
            slots=pipeline.parallel,
            threads=threads,
            ubatch=PASS,
            offload=offload(target),
            exact=pipeline.exact,
            drafts=role == "draft",
            tiled="tiled" not in without,
            repack="repack" not in without,
            flash_attention="flash" not in without,
            unified=None if role == "target" and not pipeline.exact else False,
            branches=pipeline.branches,
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from None
    return LlamaEngine.load(Path(target.model), chosen, progress)


def _toy(role: str, settings: Settings) -> Engine:
    from outrider.engines.toy import ToyCosts, ToyEngine, ToySettings

    toy = settings.toy
    step_ms = toy.step_ms if role == "target" else toy.draft_ms
    draft_row_ms = toy.draft_ms if toy.draft_row_ms is None else toy.draft_row_ms
    row_ms = toy.row_ms if role == "target" else draft_row_ms
    curve_s = _curve(toy_rows(toy.rows), step_ms / 1000) if role == "target" else ()
    spare = settings.pipeline.branches
    costs = ToyCosts(step_ms / 1000, row_ms / 1000, row_ms / 1000 / 10, curve_s)
    return ToyEngine(
        ToySettings(
            role="target" if role == "target" else "draft",
            agreement=toy.agreement,
            context=settings.target.ctx,
            slots=settings.pipeline.parallel,
            spare=spare if costs.of(4, 4) < CHEAP * costs.of(1, 1) else 0,
            costs=costs,
            vocabulary_variant=toy.variant,
        )
    )


def _curve(points: Mapping[int, float], step_s: float) -> tuple[float, ...]:
    """Seconds of passes over 1, 2, 3 … rows, on straight lines through `points`."""
    if not points:
        return ()
    rows = range(1, max(points) + 1)
    return tuple(map(float, step_s * np.interp(rows, list(points), list(points.values()))))
