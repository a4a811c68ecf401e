"""How an answer, and the command that shows it, is ended by SIGINT or SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import time

from outrider.client import Stream
from outrider_services.commands.printing import Printer

UNREAD_S = 1.0  # most that an interrupted answer waits for somebody who reads it
TWICE_S = 2.0  # in a conversation, a second Ctrl-C within this time means the answer, too


class Interrupts:
    """The first Ctrl-C ends the answer and shows what there is; the second, and SIGTERM, quit.

    In a conversation, Ctrl-C once too often does not: what was said would be lost.
    """

    def __init__(self) -> None:
        self.status = 0
        self._printer: Printer | None = None
        self._stream: Stream | None = None
        self._converses = False
        self._stopped = 0.0  # when the answer was to end
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on, number)

    def begin(self, stream: Stream, printer: Printer) -> None:
        """An answer has begun, which the next Ctrl-C is to end."""
        self._stream, self._printer = stream, printer

    def end(self) -> None:
        """No answer is on its way, but others will come: the next Ctrl-C is a first one again."""
        self._stream, self.status, self._converses = None, 0, True

    def _on(self, number: int) -> None:
        if number == signal.SIGINT and self._is_once_too_often():
            return
        first, self.status = self.status == 0, 128 + number
        if first and number == signal.SIGINT and self._stream is not None:
            self._stopped = time.monotonic()
            self._cancelling = asyncio.ensure_future(self._stream.cancel())
            self._show()
        elif self._task:
            self._task.cancel()

    def _is_once_too_often(self) -> bool:
        """Whether this Ctrl-C was meant for an answer that has ended, or ends in a moment."""
        is_stopping = self.status != 0 and time.monotonic() - self._stopped < TWICE_S
        return self._converses and (self._stream is None or is_stopping)

    def _show(self) -> None:
        """Quit if nobody takes what there is to show."""
        if self._stream is None:
            return
        if self._printer and self._printer.waited_s > UNREAD_S and self._task:
            self._task.cancel()
        else:
            asyncio.get_running_loop().call_later(0.1, self._show)
