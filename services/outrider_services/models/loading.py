"""Making the engine that a worker computes with: a model file loaded, or a made-up model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from outrider.core.engine import Engine
from outrider.errors import ConfigError, ModelNotFound
from outrider_services.options import Settings, kernels

PASS = 128  # tokens: no worker evaluates more at once, and room for more would lie idle


def load_engine(role: str, settings: Settings, progress: Callable[[float], None]) -> Engine:
    """The engine of a worker of `role`; its model is the target of `settings`, whatever the role.

    `progress` is called with the share that is loaded, from 0 to 1. Raises OutriderError.
    """
    if settings.pipeline.backend == "toy":
        return _toy(role, settings)
    return _llama(role, settings, progress)


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
            gpu_layers=target.ngl,
            exact=pipeline.exact,
            drafts=role == "draft",
            tiled="tiled" not in without,
            repack="repack" not in without,
            flash_attention="flash" not in without,
            unified=None if role == "target" and not pipeline.exact else False,
        )
    except ValueError as exc:
        raise ConfigError(str(exc)) from None
    return LlamaEngine.load(Path(target.model), chosen, progress)


def _toy(role: str, settings: Settings) -> Engine:
    from outrider.engines.toy import ToyCosts, ToyEngine, ToySettings

    toy = settings.toy
    step_ms = toy.step_ms if role == "target" else toy.draft_ms
    row_ms = toy.row_ms if role == "target" else toy.draft_ms
    costs = ToyCosts(step_ms / 1000, row_ms / 1000, row_ms / 1000 / 10)
    return ToyEngine(
        ToySettings(
            role="target" if role == "target" else "draft",
            agreement=toy.agreement,
            context=settings.target.ctx,
            slots=settings.pipeline.parallel,
            costs=costs,
            vocabulary_variant=toy.variant,
        )
    )
