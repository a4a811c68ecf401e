"""What a user is shown: tables on stdout; on stderr single lines, and how far things are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.text import Text

from outrider_services import logs, outlet

# called with: bytes done, bytes in all, what is being fetched
Progress = Callable[[int, int, str], None]


def tell(line: str) -> None:
    """One line for the user, on stderr."""
    sys.stderr.write(line + "\n")
    outlet.settle()


def note(text: Text) -> None:
    """The same with colours, where stderr is a terminal that has any."""
    Console(stderr=True).print(text, soft_wrap=True)
    outlet.settle()


def show(table: RenderableType) -> None:
    """Print on stdout; where a program reads it, in whole lines, however long."""
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


class News:
    """How far the processes are: on a terminal one line that changes, elsewhere nothing.

    What a process says itself is shown line by line on both; with `as_json` each is a record.
    """

    def __init__(self, console: Console | None = None, *, as_json: bool = False) -> None:
        self._console = console or Console(stderr=True)
        self._shown = logs.for_programs if as_json else logs.for_people
        self._states: dict[str, str] = {}  # by role
        self._status = self._console.status("") if self._console.is_terminal else None

    def __enter__(self) -> News:
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status:
            self._status.stop()

    def report(self, role: str, state: str, done: float) -> None:
        """`done` is the share of the model that is loaded, from 0 to 1."""
        self._states[role] = f"{role} {state}" + (f" {done:.0%}" if state == "loading" else "")
        if self._status:
            self._status.update(", ".join(self._states.values()))

    def log(self, role: str, line: str) -> None:
        sys.stderr.write(self._shown(role, line) + "\n")


# ---- downloads ----------------------------------------------------------------------------------


def no_progress(done_bytes: int, total_bytes: int, label: str) -> None:
    """For those who want to be told nothing."""


@contextmanager
def progress_reporter(console: Console | None = None) -> Iterator[Progress]:
    """A callback that shows the progress of each label: a bar on a terminal, elsewhere a line at
    every tenth. It may be called for as long as the context lasts.
    """
    console = console or Console(stderr=True)
    if console.is_terminal:
        with _bars(console) as report:
            yield report
    else:
        yield _lines(console)


@contextmanager
def _bars(console: Console) -> Iterator[Progress]:
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=console) as shown:
        tasks: dict[str, bars.TaskID] = {}

        def report(done_bytes: int, total_bytes: int, label: str) -> None:
            if label not in tasks:
                tasks[label] = shown.add_task(label)
            shown.update(tasks[label], completed=done_bytes, total=total_bytes)

        yield report


def _lines(console: Console) -> Progress:
    tenths: dict[str, int] = {}  # by label: how many were shown

    def report(done_bytes: int, total_bytes: int, label: str) -> None:
        tenth = 10 * done_bytes // total_bytes
        if tenth > tenths.get(label, -1):
            tenths[label] = tenth
            console.print(f"{label}: {10 * tenth} % of {total_bytes / 1e6:,.0f} MB", soft_wrap=True)

    return report
