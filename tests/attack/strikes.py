"""Signals at random moments: a process is killed, or stopped for a while and let go on."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import deque
from contextlib import suppress

import psutil
from tests.attack.service import Service

from outrider.client import connect
from outrider.errors import OutriderError

PAUSE_S = (0.1, 3.0)
KILLS = (4, 62.0)  # the launcher restarts a worker five times in a minute: one less is asked of it
BACK_S = 20.0  # by then a killed worker has to have joined again


class Striker:
    """Strikes the processes of a service, and remembers when each was struck."""

    def __init__(self, service: Service, rng: random.Random) -> None:
        self._service, self._rng = service, rng
        self._kills: dict[str, deque[float]] = {}
        self.struck: list[tuple[str, float, float]] = []  # role, from, until

    async def stop(self, role: str, guest: psutil.Process | None = None) -> None:
        """SIGSTOP, and SIGCONT a while later: to the service's process of `role`, or to `guest`."""
        process = guest or self._service.processes().get(role)
        if process is None:
            return
        began = time.monotonic()
        try:
            process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(self._rng.uniform(*PAUSE_S))
        finally:
            with suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
            ended = time.monotonic()
            if not guest:
                self._service.pauses.add(began, ended)
            self.struck.append((role, began, ended))

    def may_kill(self, role: str) -> bool:
        """Whether the launcher would still start it again."""
        most, within_s = KILLS
        kills = self._kills.setdefault(role, deque())
        while kills and time.monotonic() - kills[0] >= within_s:
            kills.popleft()
        return len(kills) < most

    async def until_it_may_kill(self, role: str) -> None:
        if not self.may_kill(role):
            await asyncio.sleep(self._kills[role][0] + KILLS[1] - time.monotonic())

    async def kill(self, role: str) -> bool:
        """SIGKILL; whether another one has joined in its place in time, for which requests wait."""
        process = self._service.processes().get(role)
        began = time.monotonic()
        if process is not None:
            self._kills.setdefault(role, deque()).append(began)
            with suppress(psutil.Error):
                process.kill()
        with self._service.pauses.meanwhile():
            back = await joined(self._service, {role}, BACK_S, but=process)
        self.struck.append((role, began, time.monotonic()))
        return back

    async def moment(self) -> None:
        """A random moment."""
        await asyncio.sleep(self._rng.uniform(0.2, 1.2))


async def joined(
    service: Service, roles: set[str], within_s: float, but: psutil.Process | None = None
) -> bool:
    """Whether the service reports workers of all `roles`, in processes other than `but`."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        processes = service.processes()
        if "launcher" not in processes:
            return False
        if roles <= processes.keys() and but not in processes.values():
            with suppress(OutriderError):
                async with connect(service.ipc, timeout_s=1.0) as client:
                    if roles <= (await client.health(timeout_s=1.0))["workers"].keys():
                        return True
        await asyncio.sleep(0.1)
    return False
