"""How a command that waits is ended by SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

from outrider_services.pipeline.launcher import first_of

NUMBERS = (signal.SIGINT, signal.SIGTERM)


def signalled() -> asyncio.Future[int]:
    """A future of the exit status that a signal asks for; done once a signal has come."""
    loop = asyncio.get_running_loop()
    stop: asyncio.Future[int] = loop.create_future()

    def on(number: int) -> None:
        if not stop.done():
            stop.set_result(128 + number)

    for number in NUMBERS:
        loop.add_signal_handler(number, on, number)
    return stop


async def until_signalled(work: Coroutine[Any, Any, None]) -> int:
    """Do `work`; the exit status of the signal that ended it first, else 0."""
    stop = signalled()
    task = asyncio.ensure_future(work)
    try:
        await first_of(task, stop)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
            return stop.result()
        task.result()
        return 0
    finally:
        for number in NUMBERS:  # uvloop would leave its own, which do nothing without it
            asyncio.get_running_loop().remove_signal_handler(number)
