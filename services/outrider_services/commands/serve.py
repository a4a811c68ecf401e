"""`outrider serve`, and what `outrider run` shares with it: which models, how far they are."""

from __future__ import annotations

import asyncio
import signal
import sys
from dataclasses import replace
from typing import Any

import uvloop
from rich.console import Console

from outrider.errors import ModelNotFound
from outrider_services.models import catalogue
from outrider_services.options import Settings
from outrider_services.pipeline.launcher import Launcher, first_of
from outrider_services.terminal import progress_reporter
from outrider_services.tuning import search

SAME_MODEL = (
    "No draft model was given: the target drafts for itself. This demonstrates the machinery "
    "(expect an acceptance near 100 %) and accelerates nothing."
)


def tell(line: str) -> None:
    """One line for the user, on stderr."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def with_paths(settings: Settings, *, fetch: bool) -> Settings:
    """The settings with model files instead of names. Raises ModelNotFound, ModelUnusable.

    Without any model flag it is the default pair. A target without a draft has none.
    """
    target, draft = settings.target, settings.draft
    if settings.pipeline.backend == "toy":
        return settings
    offline = settings.pipeline.offline
    with progress_reporter() as progress:

        def find(model: str | None, hf: str | None) -> str | None:
            name = f"hf://{hf}" if hf else model
            if name is None:
                return None
            may = (fetch or bool(hf) or name.startswith("hf://")) and not offline
            return str(catalogue.resolve(name, fetch=may, offline=offline, progress=progress))

        target_path, draft_path = find(target.model, target.hf), find(draft.model, draft.hf)
        if target_path is None and target.place == "spawn":
            pair = catalogue.default_pair(fetch=fetch, offline=offline, progress=progress)
            target_path = str(pair[0])
            draft_path = draft_path or str(pair[1])
    return replace(
        settings,
        target=replace(target, model=target_path, hf=None),
        draft=replace(draft, model=draft_path, hf=None),
    )


def with_paths_of_worker(settings: Settings, role: str) -> Settings:
    """The same for a worker on its own, whose model is the target of its settings."""
    target = settings.target
    if settings.pipeline.backend == "toy":
        return settings
    if not (target.model or target.hf):
        raise ModelNotFound(f"say which model the {role} worker is to load: -m FILE or -hf REPO")
    with progress_reporter() as progress:
        name = f"hf://{target.hf}" if target.hf else str(target.model)
        fetch = name.startswith("hf://")
        offline = settings.pipeline.offline
        path = catalogue.resolve(name, fetch=fetch, offline=offline, progress=progress)
    return replace(settings, target=replace(target, model=str(path), hf=None))


class News:
    """Tells how far the processes are: one line that changes on a terminal, else one per event."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._states: dict[str, str] = {}
        self._status = self._console.status("") if self._console.is_terminal else None

    def __enter__(self) -> News:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def report(self, role: str, state: str, done: float) -> None:
        self._states[role] = f"{role} {state}" + (f" {done:.0%}" if state == "loading" else "")
        if self._status:
            self._status.update(", ".join(self._states.values()))

    def log(self, role: str, line: str) -> None:
        tell(f"[{role}] {line}")


def serve(settings: Settings, parsed: Any) -> int:
    """Start the pipeline, and keep it up until a signal or `outrider stop`."""
    settings = search.prepared(with_paths(settings, fetch=parsed.pull), tell)
    return uvloop.run(_serve(settings, parsed.name))


async def _serve(settings: Settings, name: str) -> int:
    stop = signalled()
    draft = has_draft(settings)
    news = News()
    launcher = Launcher(settings, name, news.report, news.log, draft=draft)
    with news:
        entered = asyncio.ensure_future(launcher.__aenter__())
        await first_of(entered, stop)
        if not entered.done():
            entered.cancel()
            await asyncio.wait([entered])
            return stop.result()
        entered.result()
    try:
        if not draft and settings.draft.place == "spawn":
            tell("No draft model was given: generating in plain mode.")
        where = [name, *launcher.addresses]
        tell(f"Ready: outrider run --connect {' | '.join(where)}")
        await first_of(launcher.failed, stop)
        if stop.done():
            return stop.result()
        launcher.failed.result()
        return 0
    finally:
        await launcher.stop()


def has_draft(settings: Settings) -> bool:
    """Whether a draft worker is to be started here."""
    there = settings.pipeline.backend == "toy" or settings.draft.model is not None
    return there and settings.draft.n_max != 0 and settings.pipeline.mode != "plain"


def signalled() -> asyncio.Future[int]:
    """Becomes the exit status that SIGINT or SIGTERM asks for."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()

    def on(number: int) -> None:
        if not stop.done():
            stop.set_result(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on, number)
    return stop
