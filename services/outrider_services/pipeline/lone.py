"""One worker of a pipeline whose coordinator is on another machine, kept up as a launcher would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from outrider.core.values import Role
from outrider.errors import (
    ConnectionFailed,
    OutriderError,
    Overloaded,
    RequestTimeout,
    WorkerLost,
    from_code,
)
from outrider_services import logs
from outrider_services.options import to_flags
from outrider_services.pipeline.claim import KILLED, MEASURED
from outrider_services.pipeline.launcher import (
    BACKOFF_S,
    RESTARTS,
    STOP_S,
    Log,
    Report,
    begun,
    lines,
)
from outrider_services.table import Settings

# the coordinator may come, or come back; of these no number is too many
PASSING = (ConnectionFailed, Overloaded, RequestTimeout)


class LoneWorker:
    """`run` is to be cancelled. Its process ends with it, and also if ours is killed."""

    def __init__(
        self, role: Role, settings: Settings, address: str, report: Report, log: Log
    ) -> None:
        settings = replace(settings, log=replace(settings.log, format="json"))
        flags = to_flags(settings, ("target", "pipeline", "toy", "links", "log"))
        self._arguments = ["worker", role, f"--connect={address}", *flags]
        self._role, self._report, self._log = role, report, log
        self._error: OutriderError | None = None
        self._was_killed, self._measured = False, ""
        self._ends: deque[float] = deque(maxlen=RESTARTS[0] + 1)  # when it died of itself

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Run the worker, and again when it ends by itself.

        Raises its error where another start would not help, or it has died too often.
        """
        delay_s, most_s = BACKOFF_S
        while True:
            began = time.monotonic()
            error = await self._run_once(on_ready)
            if not isinstance(error, (WorkerLost, *PASSING)):
                raise error
            if isinstance(error, WorkerLost):
                self._ends.append(time.monotonic())
                if len(self._ends) > RESTARTS[0] and self._ends[-1] - self._ends[0] < RESTARTS[1]:
                    raise error
            if time.monotonic() - began > RESTARTS[1]:
                delay_s = BACKOFF_S[0]
            self._report(self._role, "ended", 0.0)
            again = f"{error}; starting it again in {delay_s:.1f} s"
            self._log(self._role, logs.as_json("warning", self._role, again))
            await asyncio.sleep(delay_s)
            delay_s = min(4 * delay_s, most_s)

    async def _run_once(self, on_ready: Callable[[], None]) -> OutriderError:
        """What it ended with."""
        self._error = None
        reading, writing = os.pipe()  # it ends when nobody holds the writing end any more
        try:
            past = {KILLED: str(int(self._was_killed)), MEASURED: self._measured}
            process = await begun(self._arguments, (reading,), past)
            try:
                await asyncio.gather(
                    self._read(process.stdout, on_ready), self._forward(process.stderr)
                )
                status = await process.wait()
            finally:
                await end(process)
        finally:
            os.close(reading)
            os.close(writing)
        self._was_killed = status == -signal.SIGKILL and self._error is None
        told = f"the {self._role} process ended by itself with status {status}"
        return self._error or WorkerLost(told, self._role)

    async def _read(
        self, stream: asyncio.StreamReader | None, on_ready: Callable[[], None]
    ) -> None:
        assert stream
        async for line in lines(stream):
            try:
                state, detail, *rest = json.loads(line)
            except (ValueError, TypeError):  # it is something else
                self._log(self._role, line)
                continue
            self._on_state(str(state), detail, rest, on_ready)

    def _on_state(
        self, state: str, detail: Any, rest: list[Any], on_ready: Callable[[], None]
    ) -> None:
        if state == "error":
            self._error = from_code(detail, rest[0] if rest else "")
            return
        if state == "measured":
            self._measured = str(detail)
            return
        self._report(self._role, state, float(detail))
        if state == "ready":
            on_ready()

    async def _forward(self, stream: asyncio.StreamReader | None) -> None:
        assert stream
        async for line in lines(stream):
            self._log(self._role, line)


async def end(process: asyncio.subprocess.Process) -> None:
    """End it, politely first."""
    if process.returncode is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(STOP_S):
                await process.wait()
            return
        process.kill()
    await process.wait()
