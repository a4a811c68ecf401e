"""How far a download is: a bar on a terminal, a line at every tenth elsewhere; on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

# (bytes done, bytes in all, what is being fetched)
Progress = Callable[[int, int, str], None]


def no_progress(done_bytes: int, total_bytes: int, label: str) -> None:
    """Tells nobody."""


@contextmanager
def progress_reporter(console: Console | None = None) -> Iterator[Progress]:
    """A callback that shows each label's progress for as long as the context lasts."""
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
    tenths: dict[str, int] = {}

    def report(done_bytes: int, total_bytes: int, label: str) -> None:
        tenth = 10 * done_bytes // total_bytes
        if tenth > tenths.get(label, -1):
            tenths[label] = tenth
            console.print(f"{label}: {10 * tenth} % of {total_bytes / 1e6:,.0f} MB", soft_wrap=True)

    return report
