"""Virtual time for a whole pipeline: an event loop that never waits for the real clock.

What a worker computes on a thread of its own, an `Owner` computes here in turns with the loop. So
only one of them runs at a time, and all that happens depends on a seed alone.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

from greenlet import getcurrent, greenlet

T = TypeVar("T")
START_S = 1000.0  # what the clock shows at first


class NothingHappens(Exception):
    """Everybody waits, and nothing is due: in real life for ever."""


class _Selector:
    """Looks whether something has come; if not, lets the clock of its loop go on."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop, self._real = loop, selectors.DefaultSelector()

    def select(self, timeout: float | None = None) -> list[Any]:
        if events := self._real.select(0):
            return events
        if timeout is None:
            raise NothingHappens
        self._loop.now += max(0.0, timeout)
        return []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while nobody has anything to do."""

    def __init__(self) -> None:
        self.now = START_S
        super().__init__(_Selector(self))  # type: ignore[arg-type]
        self.set_default_executor(_AtOnce())

    def time(self) -> float:
        return self.now


class _AtOnce(ThreadPoolExecutor):
    """For `asyncio.to_thread`: what takes no virtual time is done here and now."""

    def submit(self, function: Callable[..., T], /, *args: Any, **more: Any) -> Future[T]:
        return done(function, *args, **more)


def done(function: Callable[..., T], *args: Any, **more: Any) -> Future[T]:
    """What `function` has come to, as a future."""
    future: Future[T] = Future()
    try:
        future.set_result(function(*args, **more))
    except Exception as exc:
        future.set_exception(exc)
    return future


class Owner(Executor):
    """Computes in turns with the loop, on a stack of its own, so that it can `sleep` meanwhile."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop
        self._jobs: deque[Callable[[], None]] = deque()
        self._own = greenlet(self._main)
        self._back = getcurrent()
        self._busy = self._over = False
        self._waking: asyncio.Handle | None = None

    def submit(self, function: Callable[..., T], /, *args: Any, **more: Any) -> Future[T]:
        future: Future[T] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function(*args, **more)
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)

        self._jobs.append(job)
        if not self._busy:
            self._loop.call_soon(self._switch)
        return future

    def sleep(self, seconds: float) -> None:
        """Inside a job: let the loop go on for so long, or until somebody calls `wake`."""
        if not self._over:
            self._waking = self._loop.call_later(seconds, self._switch)
            self._back.switch()

    def wake(self) -> None:
        """End its sleep."""
        if self._waking:
            self._waking.cancel()
            self._waking = self._loop.call_soon(self._switch)

    def end(self) -> None:
        """Let it finish what it does without any time passing."""
        self._over = True
        if self._waking:
            self._waking.cancel()
        while self._busy:
            self._switch()

    def _switch(self) -> None:
        """On the loop: it is its turn, until it sleeps or has nothing to do."""
        self._waking, self._back = None, getcurrent()
        self._own.switch()

    def _main(self) -> None:
        while True:
            self._busy = True
            while self._jobs:
                self._jobs.popleft()()
            self._busy = False
            self._back.switch()


@contextmanager
def virtual_time() -> Iterator[VirtualLoop]:
    """Inside, the clocks of this process show the loop's time. It is closed behind."""
    loop = VirtualLoop()
    with mock.patch.multiple(time, monotonic=loop.time, perf_counter=loop.time):
        try:
            yield loop
        finally:
            _finish(loop)
            loop.close()


def _finish(loop: VirtualLoop) -> None:
    """Cancel what still runs there."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
