"""A worker without its launcher: when it is started again, and when that would help nobody."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from outrider.errors import (
    ConnectionFailed,
    IncompatiblePair,
    NotAllowed,
    OutriderError,
    Overloaded,
    WorkerLost,
)
from outrider_services.pipeline import lone
from outrider_services.pipeline.launcher import RESTARTS
from outrider_services.pipeline.lone import LoneWorker
from outrider_services.table import Settings


class Scripted(LoneWorker):
    """One whose ends are known beforehand."""

    def __init__(self, ends: Iterable[OutriderError]) -> None:
        self.told: list[str] = []
        self.starts = 0
        self._script = iter(ends)
        tell = lambda role, line: self.told.append(line)  # noqa: E731
        super().__init__("draft", Settings(), "tcp://big:5701", lambda *_: None, tell)

    async def _run_once(self, on_ready: object) -> OutriderError:
        self.starts += 1
        return next(self._script)


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lone, "BACKOFF_S", (0.0, 0.0))


async def run(*ends: OutriderError) -> tuple[Scripted, OutriderError]:
    worker = Scripted(ends)
    with pytest.raises(OutriderError) as caught:
        await worker.run(lambda: None)
    return worker, caught.value


@pytest.mark.parametrize("error", [NotAllowed("no"), IncompatiblePair("no")])
async def test_what_another_start_does_not_cure_ends_it(error: OutriderError) -> None:
    worker, raised = await run(error)
    assert (raised, worker.starts, worker.told) == (error, 1, [])


async def test_one_that_dies_is_started_again_but_not_for_ever() -> None:
    deaths = [WorkerLost(f"death {n}", "draft") for n in range(50)]
    worker, raised = await run(*deaths)
    assert worker.starts == RESTARTS[0] + 1
    assert raised is deaths[RESTARTS[0]]
    assert len(worker.told) == RESTARTS[0]
    assert "death 0; starting it again" in worker.told[0]


async def test_a_coordinator_that_is_not_there_is_waited_for_without_end() -> None:
    away: list[OutriderError] = [ConnectionFailed("nobody"), Overloaded("one is there already")]
    worker, raised = await run(*away * 50, NotAllowed("last"))
    assert worker.starts == 101
    assert str(raised) == "last"


def test_the_process_is_told_what_it_needs_and_no_secret() -> None:
    worker = Scripted([])
    assert worker._arguments[:3] == ["worker", "draft", "--connect=tcp://big:5701"]
    assert "--log-format=json" in worker._arguments
