"""A client's connection to a coordinator, and how what was asked outlives it."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from contextlib import suppress

from outrider.client import settings as asked
from outrider.client.inboxes import Inbox, Inboxes, Repeatable
from outrider.errors import ConfigError, ConnectionFailed, OutriderError
from outrider.wire import messages as wire
from outrider.wire.addresses import address_of
from outrider.wire.codec import check
from outrider.wire.transport import LOST, Link, PeerGone

SILENCE_S = 10.0  # the coordinator pings every second; so long it may be paused
PAUSE_S = 3.0  # between two looks at that silence, which are a second apart
LOOK_S = 0.2  # between two looks at whether a coordinator that is gone will come back
MISSES = 2  # looks without its socket: it has not died, but left
FORKED = "a client does not outlive fork(): make one in each process"


class Connection:
    """The link, and the inboxes of what was asked over it."""

    def __init__(self, pipeline: str, timeout_s: float, resume_s: float) -> None:
        if not isinstance(pipeline, str):
            raise ConfigError("a pipeline is given by its name or its address, as text")
        self.pipeline, self.timeout_s = pipeline, asked.seconds("timeout_s", timeout_s)
        self.resume_s = asked.seconds("resume_s", resume_s)
        self._calls = itertools.count(1)
        self._inboxes = Inboxes()
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the link
        self._process = 0  # the same
        self._heard = self._looked = 0.0
        self._lost = ""  # why the last connection was
        self._may_return = False  # a coordinator was there, and has not been given up
        self._gone: float | None = None  # since when it is waited for
        self._misses = 0
        self._looking: asyncio.TimerHandle | None = None

    def _end(self) -> None:
        link, self._link = self._link, None
        self._may_return = False
        self._stop_looking()
        self._inboxes.fail("the client was closed before the answer ended")
        if link:
            link.close()

    def _open(self, call: int) -> Inbox:
        """Where the messages of `call` will be put."""
        return self._inboxes.open(call)

    def _cancel(self, inbox: Inbox) -> None:
        message = wire.Cancel(inbox.call)
        if inbox in self._inboxes and self._may_return:
            if not inbox.is_on_its_way or not self._is_sent(message):
                self._inboxes.take(inbox.cancelled())  # nobody is left to cancel it
        else:
            self._send(message)

    def _abandon(self, inbox: Inbox) -> None:
        """Cancel a call and forget it; from any thread, at any time, for destructors call it."""
        if self._loop is None or self._process != os.getpid() or inbox not in self._inboxes:
            return
        with suppress(RuntimeError):  # the loop is closed, and the connection with it
            self._loop.call_soon_threadsafe(self._drop, inbox)

    def _release(self, inbox: Inbox) -> None:
        """Another connection goes on with this call, wherever it stands."""
        if inbox in self._inboxes:
            self._inboxes.forget(inbox)
            if self._link and inbox.is_on_its_way:
                with suppress(ConnectionFailed):  # then nobody is left to cancel it
                    self._send(wire.Cancel(inbox.call))

    def _adopt(self, inbox: Inbox) -> None:
        """Ask here for what has not come of a call that another connection has released."""
        question = self._inboxes.adopt(inbox, next(self._calls))
        if question is None:
            self._inboxes.forget(inbox)
            inbox.put_nowait(ConnectionFailed("it was asked of too many pipelines in vain"))
        elif self._is_sent(question):
            inbox.is_on_its_way = True
        else:
            self._await_return()

    def _drop(self, inbox: Inbox) -> None:
        if inbox in self._inboxes:
            self._inboxes.forget(inbox)
            with suppress(ConnectionFailed):  # then nobody is left to cancel it
                self._send(wire.Cancel(inbox.call))

    def _connection(self) -> Link:
        """The link, if whoever asks may use it. Raises ConnectionFailed."""
        if self._link is None:
            raise ConnectionFailed("the client has no connection outside of its `with` block")
        if self._process != os.getpid():
            raise ConnectionFailed(FORKED)
        if self._loop is not asyncio.get_running_loop():
            raise ConnectionFailed("a client serves the event loop that it was opened in: make one")
        return self._link

    def _put(self, inbox: Inbox, message: Repeatable) -> None:
        """Ask, at once or when the coordinator is there again."""
        inbox.asked = message
        if self._may_return:
            inbox.is_on_its_way = self._is_sent(message)
            if not inbox.is_on_its_way:
                self._await_return()
        else:
            self._send(message)
            inbox.is_on_its_way = True

    def _send(self, message: wire.Message) -> None:
        if not self._is_sent(message):
            raise ConnectionFailed(f"the coordinator of {self.pipeline!r} is gone")

    def _is_sent(self, message: wire.Message) -> bool:
        """Send it; False if there is no coordinator now. Raises ConnectionFailed, BadRequest."""
        link = self._connection()
        check(message)
        try:
            link.send(message)
        except PeerGone:
            return False
        return True

    def _on_message(self, message: wire.Message) -> None:
        self._heard = time.monotonic()
        self._inboxes.take(message)

    def _on_lost(self, why: str) -> None:
        """The coordinator forgets what was asked over a connection that has ended."""
        self._lost = f"{self.pipeline!r}: {why} before the answer ended"
        if why != LOST or not self.resume_s:  # to ask again would be in vain
            self._inboxes.fail(self._lost)
        else:
            self._inboxes.lost(self._lost)
            self._await_return()

    def _await_return(self) -> None:
        if self._gone is None:
            self._gone, self._misses = time.monotonic(), 0
            self._look()

    def _look(self) -> None:
        """Give up what waits for a coordinator that has not come back, or will not."""
        assert self._gone is not None
        assert self._loop
        path = address_of(self.pipeline).removeprefix("ipc://")
        self._misses += path.startswith("/") and not os.path.exists(path)
        if self._misses >= MISSES or time.monotonic() - self._gone > self.resume_s:
            self._may_return, self._gone = False, None
            self._inboxes.fail(self._lost or f"the coordinator of {self.pipeline!r} is gone")
        else:
            self._looking = self._loop.call_later(LOOK_S, self._look)

    def _stop_looking(self) -> None:
        self._gone = None
        if self._looking:
            self._looking.cancel()

    def _on_up(self) -> None:
        """There is a connection, perhaps again: ask for what has not come."""
        self._stop_looking()
        self._may_return, self._heard = self.resume_s > 0, time.monotonic()
        for inbox, question in self._inboxes.again(lambda: next(self._calls), self._lost):
            try:
                self._send(question)
                inbox.is_on_its_way = True
            except OutriderError as exc:
                self._inboxes.forget(inbox)
                inbox.put_nowait(exc)

    async def _next(self, inbox: Inbox) -> wire.Message | OutriderError | None:
        """The next message; None after a second without one, if the coordinator still lives."""
        if self._link:
            self._connection()
        try:
            async with asyncio.timeout(1.0):  # wait_for (3.11) may swallow a cancellation
                return await inbox.get()
        except TimeoutError:
            now = time.monotonic()
            # nobody waited, this process was paused, or the coordinator is to come back
            if now - self._looked > PAUSE_S or self._gone is not None:
                self._heard = now
            self._looked = now
            if now - self._heard > SILENCE_S:
                raise ConnectionFailed(
                    f"the coordinator of {self.pipeline!r} went away before the answer ended"
                ) from None
            return None
