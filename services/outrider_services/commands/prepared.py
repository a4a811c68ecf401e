"""What every command does with its settings before it starts a pipeline: which models to load."""

from __future__ import annotations

from dataclasses import replace

from outrider.engines import suffix
from outrider.errors import ModelNotFound
from outrider_services.models import catalogue
from outrider_services.table import Settings
from outrider_services.terminal import progress_reporter, tell

DEMONSTRATED = 5  # drafted tokens in a block, where a model drafts for itself
SAME_MODEL = (
    "No draft model was given: the target drafts for itself. This demonstrates the machinery "
    "(expect an acceptance near 100 %) and accelerates nothing."
)


def with_files(settings: Settings, *, fetch: bool) -> Settings:
    """The settings with model files in place of names. Raises ModelNotFound, ModelUnusable.

    Without any model flag they are the default pair. A target without a draft keeps none, and a
    draft without a model its name.
    """
    target, draft = settings.target, settings.draft
    if settings.pipeline.backend == "toy":
        return settings
    offline = settings.pipeline.offline
    with progress_reporter() as progress:

        def find(model: str | None, hf: str | None) -> str | None:
            name = f"hf://{hf}" if hf else model
            if name is None or name == suffix.NAME:
                return name
            may = (fetch or bool(hf) or name.startswith("hf://")) and not offline
            return str(catalogue.resolve(name, fetch=may, offline=offline, progress=progress))

        target_path, draft_path = find(target.model, target.hf), find(draft.model, draft.hf)
        if target_path is None and target.place != "remote":
            pair = catalogue.default_pair(fetch=fetch, offline=offline, progress=progress)
            target_path = str(pair[0])
            draft_path = draft_path or str(pair[1])
    return replace(
        settings,
        target=replace(target, model=target_path, hf=None),
        draft=replace(draft, model=draft_path, hf=None),
    )


def with_file_of_worker(settings: Settings, role: str) -> Settings:
    """The same for a single worker, whose model is the target of its settings, whatever its role.

    Raises ModelNotFound, ModelUnusable.
    """
    target = settings.target
    if settings.pipeline.backend == "toy" or (role == "draft" and target.model == suffix.NAME):
        return settings
    if not (target.model or target.hf):
        raise ModelNotFound(f"say which model the {role} worker is to load: -m FILE or -hf REPO")
    with progress_reporter() as progress:
        name = f"hf://{target.hf}" if target.hf else str(target.model)
        fetch = name.startswith("hf://")
        offline = settings.pipeline.offline
        path = catalogue.resolve(name, fetch=fetch, offline=offline, progress=progress)
    return replace(settings, target=replace(target, model=str(path), hf=None))


def has_draft(settings: Settings) -> bool:
    """Whether a draft takes part in the pipeline."""
    there = settings.pipeline.backend == "toy" or settings.draft.model is not None
    return there and settings.draft.n_max != 0 and settings.pipeline.mode != "plain"


def with_free_draft(settings: Settings) -> Settings:
    """A target that has no draft gets the one that needs no model."""
    draft = settings.draft
    if draft.model or draft.place == "remote" or settings.pipeline.backend == "toy":
        return settings
    return replace(settings, draft=replace(draft, model=suffix.NAME))


def with_some_draft(settings: Settings) -> Settings:
    """A target that has no draft drafts for itself, as a demonstration; the user is told."""
    draft = settings.draft
    if settings.pipeline.backend == "toy" or draft.model or draft.place == "remote":
        return settings
    if draft.n_max == 0 or settings.pipeline.mode == "plain":
        return settings
    tell(SAME_MODEL)
    pipeline = settings.pipeline
    if pipeline.mode == "auto":
        pipeline = replace(pipeline, mode="pipelined")
    # a draft as slow as its target is never ahead: without whole blocks there were none to see
    n_max = DEMONSTRATED if draft.n_max is None else draft.n_max
    draft = replace(draft, model=settings.target.model, n_max=n_max, n_min=n_max)
    return replace(settings, draft=draft, pipeline=pipeline)
