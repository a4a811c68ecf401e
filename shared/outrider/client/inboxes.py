"""What a client has asked for and not got yet, and how it asks again over a new connection.

An answer goes on behind what has come of it: the request names itself by a key, and tells the
tokens that were received. So nothing is said twice and nothing is lost, whether the coordinator
still knows the request or was restarted meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TypeAlias

from outrider.core.stats import Report, Stats
from outrider.core.values import Fragment, Received
from outrider.errors import ConnectionFailed, OutriderError
from outrider.wire import messages as wire

MOST_VAIN = 5  # connections that were lost one after the other without a word of an answer

Repeatable: TypeAlias = wire.Submit | wire.Tokenize | wire.Detokenize | wire.Render | wire.Infill


class Inbox(asyncio.Queue[wire.Message | OutriderError]):
    """Where the messages of a call are put; `call` is the number that it has now."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.call = call
        self.asked: Repeatable | None = None  # None: it cannot be asked again
        self.is_on_its_way = False  # it was asked over the connection that there is
        self._started: wire.Started | None = None
        self._said: list[Fragment] = []
        self._stats: Report | None = None
        self._vain = 0

    def take(self, message: wire.Message) -> None:
        """Put a message, and note what it brings."""
        match message:
            case wire.Started():
                self._started = message
            case wire.Progress(_, fragment, stats):
                self._said.append(fragment)
                self._stats, self._vain = stats or self._stats, 0
        self.put_nowait(message)

    def again(self, call: int) -> Repeatable | None:
        """The question for what has not come, under a new number; None: it was in vain too often.

        A prompt that was told as token ids is not read a second time.
        """
        self.call = call
        self._vain += 1
        if self.asked is None or self._vain > MOST_VAIN:
            return None
        asked = self.asked.changed(call=call)
        if isinstance(asked, wire.Submit) and self._started:
            received = tuple(Received(t.id, t.piece) for one in self._said for t in one.tokens)
            prompt = self._started.prompt_tokens
            asked = asked.changed(prompt=prompt, messages=None, tools=None, received=received)
        return asked

    def cancelled(self) -> wire.Finished:
        """Its outcome where nobody is left to say it."""
        seed = self.asked.sampling.seed if isinstance(self.asked, wire.Submit) else 0
        return wire.Finished(self.call, "cancelled", self._stats or Stats(seed=seed).report())


class Inboxes:
    """Those of all calls that have not ended."""

    def __init__(self) -> None:
        self._by_call: dict[int, Inbox] = {}

    def __len__(self) -> int:
        return len(self._by_call)

    def __contains__(self, inbox: Inbox) -> bool:
        return self._by_call.get(inbox.call) is inbox

    def open(self, call: int) -> Inbox:
        inbox = self._by_call[call] = Inbox(call)
        return inbox

    def forget(self, inbox: Inbox) -> None:
        if inbox in self:
            del self._by_call[inbox.call]

    def take(self, message: wire.Message) -> None:
        """Put it where it belongs; one of a call that has ended is dropped."""
        call = message.id if isinstance(message, wire.Failed) else getattr(message, "call", None)
        inbox = self._by_call.get(call) if call is not None else None
        if inbox is not None:
            inbox.take(message)
            if isinstance(message, wire.Finished | wire.Failed):
                self.forget(inbox)

    def fail(self, why: str) -> None:
        """All end with ConnectionFailed."""
        for inbox in list(self._by_call.values()):
            self._fail(inbox, why)

    def lost(self, why: str) -> None:
        """The connection has ended, and with it what cannot be asked again."""
        for inbox in list(self._by_call.values()):
            inbox.is_on_its_way = False
            if inbox.asked is None:
                self._fail(inbox, why)

    def again(self, number: Callable[[], int], why: str) -> Iterator[tuple[Inbox, Repeatable]]:
        """Each that is to be asked over a new connection; one that was in vain too often ends."""
        for inbox in list(self._by_call.values()):
            if inbox.asked is None or inbox.is_on_its_way:
                continue
            self.forget(inbox)
            question = inbox.again(number())
            self._by_call[inbox.call] = inbox
            if question:
                yield inbox, question
            else:
                self._fail(inbox, why)

    def adopt(self, inbox: Inbox, call: int) -> Repeatable | None:
        """Take over one of another connection's; what to ask for it here, as `Inbox.again`."""
        inbox.is_on_its_way = False
        question = inbox.again(call)
        self._by_call[call] = inbox
        return question

    def _fail(self, inbox: Inbox, why: str) -> None:
        self.forget(inbox)
        with suppress(RuntimeError):  # who waited for it in a loop that is closed does no more
            inbox.put_nowait(ConnectionFailed(why))
