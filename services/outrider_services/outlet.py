"""What leaves by stdout and stderr, where perhaps nobody reads it: no signal may wait for that.

A pipe that is full, a terminal after Ctrl-S and a stopped reader block whoever writes. So only
threads write here that a process can end without, and with `os.write`, which holds no lock that the
end of the interpreter waits for.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO, TypeVar, cast

MOST = 1000  # texts that wait for a reader
PATIENCE_S = 0.05  # most that `settle` waits for a reader who may be there
LAST_S = 0.5  # the same at the end of the process
LINES, WITHIN_S = 20, 10.0  # so many log lines of one kind are shown in so many seconds
KINDS = 1000  # of log lines that are counted

T = TypeVar("T")


def write_all(fd: int, data: bytes) -> None:
    """Write all of `data`, however long that takes. Raises OSError."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:  # whoever shares it with us has made it so
            select.select([], [fd], [])


class Outlet:
    """A text stream that never keeps its writer waiting: what does not fit is dropped and counted.

    A thread writes to `fd`, in order. The number of dropped texts is written once there is room.
    """

    def __init__(self, fd: int, encoding: str = "utf-8") -> None:
        self.encoding, self.closed = encoding, False
        self._fd = fd
        self._texts: deque[str] = deque()
        self._dropped = 0
        self._is_full = self._is_stuck = False
        self._changed = threading.Condition()
        self._pending = 0  # texts that are not written yet
        threading.Thread(target=self._write_forever, name="outlet", daemon=True).start()

    # ---- as a stream ----------------------------------------------------------------------------

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def flush(self) -> None:
        """Nothing: see `settle`."""

    def write(self, text: str) -> int:
        with self._changed:
            # after a gap there is to be room for many: else every text tells of one
            self._is_full = len(self._texts) >= (MOST // 2 if self._is_full else MOST)
            if self._is_full:
                self._dropped += text.count("\n")
            else:
                self._put(text)
        return len(text)

    def settle(self, within_s: float = PATIENCE_S) -> None:
        """Wait until all is written, but not for long, and not again for a reader who let us."""
        with self._changed:
            if not self._is_stuck:
                self._is_stuck = not self._changed.wait_for(lambda: not self._pending, within_s)

    # ---- the thread -----------------------------------------------------------------------------

    def _put(self, text: str) -> None:
        if self._dropped:
            self._texts.append(f"outrider: {self._dropped} lines were dropped, as nobody read\n")
            self._dropped, self._pending = 0, self._pending + 1
        if text:
            self._texts.append(text)
            self._pending += 1
        self._changed.notify_all()

    def _next(self) -> str:
        with self._changed:
            if not self._texts and self._dropped:
                self._put("")
            self._changed.wait_for(lambda: self._texts)
            return self._texts.popleft()

    def _write_forever(self) -> None:
        while True:
            text = self._next()
            with suppress(OSError):  # nobody will ever read it
                write_all(self._fd, text.encode(self.encoding, "replace"))
            with self._changed:
                self._pending -= 1
                if not self._pending:
                    self._is_stuck = False
                    self._changed.notify_all()

    def last(self) -> None:
        """At the end of the process: a moment for what is still to be written."""
        self._is_stuck = False
        self.settle(LAST_S)


def install() -> None:
    """Let stderr be an `Outlet` for the rest of this process."""
    err = sys.__stderr__
    if err and sys.stderr is err:
        err.flush()
        outlet = Outlet(err.fileno(), err.encoding)
        sys.stderr = cast(TextIO, outlet)
        atexit.register(outlet.last)


def settle() -> None:
    """Let what was written to stderr be there before what stdout is given next."""
    if settled := getattr(sys.stderr, "settle", None):  # an `Outlet`, or what stands before one
        settled()


class Few(logging.Filter):
    """Shows few log lines of one kind at a time, and tells how many more there were.

    A kind is a template of messages. Lines for debugging all pass.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[str, tuple[float, int]] = {}  # since when how many

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno <= logging.DEBUG:
            return True
        kind, now = f"{record.name} {record.msg}", self._clock()
        since, count = self._kinds.pop(kind, (now, 0))
        hidden = 0
        if now - since >= WITHIN_S:
            hidden, since, count = max(0, count - LINES), now, 0
        count += 1
        self._kinds[kind] = since, count
        if len(self._kinds) > KINDS:
            self._kinds.pop(next(iter(self._kinds)))
        note = f" ({hidden} more like this were not shown)" if hidden else ""
        if count == LINES:
            note += f" (more like this in the next {WITHIN_S:.0f} s will be counted, not shown)"
        if note:
            record.msg, record.args = record.getMessage() + note, ()
        return count <= LINES


# ---- stdout -------------------------------------------------------------------------------------


async def in_thread(work: Callable[[], T]) -> T:
    """Do what may block for ever where neither a cancellation nor the end of the process waits."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def settle(result: Callable[[], None]) -> None:
        if not done.done():
            result()

    def run() -> None:
        try:
            value = work()
        except Exception as exc:
            error = exc
            result = lambda: done.set_exception(error)  # noqa: E731
        else:
            result = lambda: done.set_result(value)  # noqa: E731
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result)

    threading.Thread(target=run, name="patience", daemon=True).start()
    return await done


async def put(text: str) -> None:
    """Write all of `text` on stdout, as long as nobody reads it. Raises BrokenPipeError."""
    out = sys.__stdout__
    if not out or sys.stdout is not out:  # somebody wants it elsewhere
        sys.stdout.write(text)
        return
    out.flush()
    data = text.encode(out.encoding, "replace")
    await in_thread(lambda: write_all(out.fileno(), data))
