"""The draft worker: drafts token after token, and follows what the target commits.

The owner thread drafts on without asking the loop, which meanwhile takes what the target commits
and sends what was drafted: `_lock` is around whatever both touch, and held for no computation.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

from outrider.core.engine import Cancelled, Engine, EngineFault
from outrider.core.estimates import usual_acceptance
from outrider.core.sampling import Choice, Sampling, Token, propose
from outrider.errors import OutriderError
from outrider.wire import messages as wire
from outrider_services.pipeline.worker import Curve, Worker, failure

CUT_SHORT = 16  # most tokens whose evaluation is given up halfway to free the cores


@dataclass(slots=True)
class Stream:
    """A request's text as the draft sees it: what is committed, then what it drafted itself."""

    slot: int
    tokens: list[Token]
    sampling: Sampling
    lineage: int
    until: int
    vocabulary: int
    committed: int  # tokens before this position are the target's
    floors: tuple[float, ...] = ()
    likely: list[float] = field(default_factory=list)  # usual acceptances of what it drafted
    evaluated: int = 0  # tokens whose evaluation the cache may keep
    open: bool = True

    @property
    def paused(self) -> bool:
        """Whether what it drafted is too doubtful to go on from."""
        drafted = len(self.likely)
        return 0 < drafted <= len(self.floors) and math.prod(self.likely) < self.floors[drafted - 1]

    @property
    def told_to_stop(self) -> bool:
        """Whether the next token is beyond its leave; what began as a long evaluation goes on."""
        return self.until <= len(self.tokens) <= self.evaluated + CUT_SHORT

    def follow(self, base: int, tokens: tuple[Token, ...]) -> bool:
        """Take over the target's `tokens`; True if the stream had to be cut for them."""
        cut = False
        for position, token in enumerate(tokens, base):
            if position < len(self.tokens):
                if self.tokens[position] == token:
                    continue
                del self.tokens[position:]
                self.evaluated = min(self.evaluated, position)
                self.lineage += 1
                self.likely.clear()
                cut = True
            self.tokens.append(token)
        del self.likely[: len(tokens)]
        self.committed = base + len(tokens)
        return cut

    def took(self, begun: tuple[int, int, int], evaluated: int, choice: Choice | None) -> bool:
        """Note that the text up to `evaluated` was evaluated, and append what was chosen there.

        `begun`: lineage, evaluated tokens and end of the text that it was for. False: nothing was
        chosen, or the text has become another.
        """
        lineage, _, end = begun
        if lineage != self.lineage:
            return False
        self.evaluated = evaluated
        if choice is None or end != len(self.tokens):
            return False
        self.tokens.append(choice.token)
        self.likely.append(usual_acceptance(choice.confidence))
        return True


class DraftWorker(Worker):
    calibrated_rows: ClassVar[tuple[int, ...]] = (1,)
    role: ClassVar[wire.Role] = "draft"

    def __init__(self, engine: Engine, owner: ThreadPoolExecutor, curve_s: Curve) -> None:
        super().__init__(engine, owner, curve_s)
        self._streams: dict[int, Stream] = {}
        self._turns: deque[int] = deque()
        self._running: Stream | None = None
        self._lock = threading.Lock()

    def handle(self, message: wire.Message) -> None:
        with self._lock:
            self._handle(message)

    def _handle(self, message: wire.Message) -> None:
        match message:
            case wire.Commit(request, base, tokens, until, floors):
                stream = self._streams.get(request)
                if stream is None or stream.committed != base:
                    return
                stream.until, stream.floors = min(until, self.engine.info.context), floors
                if (stream.follow(base, tokens) or stream.told_to_stop) and stream is self._running:
                    self.engine.cancel()  # what it computes is not wanted, or not now
                self.wake()
            case wire.Draft():
                self._open(message)
            case wire.Close(request):
                self._close(request)

    def forget(self) -> None:
        with self._lock:
            for request in list(self._streams):
                self._close(request)

    def _open(self, message: wire.Draft) -> None:
        info = self.engine.info
        try:
            slot, sampling = self.admit(message.tokens, message.sampling)
        except OutriderError as exc:
            self.send(failure(message.request, exc))
            return
        self._streams[message.request] = Stream(
            slot=slot,
            tokens=list(message.tokens),
            sampling=sampling,
            lineage=message.lineage,
            until=min(message.until, info.context),
            vocabulary=min(message.vocabulary, info.vocabulary.size),
            committed=message.base,
            floors=message.floors,
            likely=[1.0] * (len(message.tokens) - message.base),
        )
        self._turns.append(message.request)
        self.wake()

    def _close(self, request: int) -> None:
        stream = self._streams.pop(request, None)
        if stream is None:
            return
        stream.open = False
        if stream is self._running:
            self.engine.cancel()
        self._turns.remove(request)
        self.slots.give_back(stream.slot)
        self.wake()

    # ---- computing ------------------------------------------------------------------------------

    async def compute(self) -> bool:
        if self.slots.dirty:
            await self.owned(lambda: self.slots.clean(self.engine))
        for request in list(self._turns):
            stream = self._streams[request]
            if self._has_work(stream):
                self._turns.remove(request)
                self._turns.append(request)
                await self._ride(request, stream)
                return True
        return False

    def _has_work(self, stream: Stream) -> bool:
        """A prompt is prefilled before anything may be drafted; nothing follows an end token."""
        if not stream.open:
            return False
        if len(stream.tokens) - stream.evaluated > self.chunk:
            return True
        drafted = len(stream.tokens) > stream.committed
        ended = drafted and stream.tokens[-1] in self.engine.info.vocabulary.ends
        return len(stream.tokens) < stream.until and not ended and not stream.paused

    async def _ride(self, request: int, stream: Stream) -> None:
        loop = asyncio.get_running_loop()

        def post(message: wire.Drafted) -> None:
            loop.call_soon_threadsafe(self.send, message)

        self._running = stream
        try:
            await self.owned(lambda: self._draft(request, stream, post))
        except (EngineFault, ValueError) as exc:
            if stream.open:
                self.send(failure(request, exc))
                with self._lock:
                    self._close(request)
        finally:
            self._running = None

    def _draft(self, request: int, stream: Stream, post: Callable[[wire.Drafted], None]) -> None:
        """On the owner thread: draft until the stream has to wait, or another one may want to.

        Where draft and target take turns nobody waits for a single token: they are sent together.
        """
        unsent: wire.Drafted | None = None
        started = False
        while True:
            with self._lock:
                going_on = self._has_work(stream) and not (started and len(self._turns) > 1)
                if unsent and not (going_on and stream.floors and stream.lineage == unsent.lineage):
                    post(unsent)
                    unsent = None
                if not going_on:
                    return
                begun = stream.lineage, stream.evaluated, len(stream.tokens)
                text = stream.tokens[: stream.evaluated + self.chunk]
            began, started = time.perf_counter(), True
            self.steps += 1
            try:
                choice = self._evaluate(stream, text, *begun[1:])
            except Cancelled:
                continue
            with self._lock:
                if not stream.took(begun, len(text), choice):
                    continue  # more of the prompt to come, or the target said what comes here
                assert choice
                elapsed_s = time.perf_counter() - began
                told = (choice.token,), (choice.confidence,), elapsed_s, stream.paused
                unsent = joined(unsent, wire.Drafted(request, begun[0], begun[2], *told))

    def _evaluate(self, stream: Stream, text: list[Token], start: int, end: int) -> Choice | None:
        """The token at position `end`, if `text`, evaluated up to `start`, goes so far."""
        if self.engine.length(stream.slot) > start:
            self.engine.rewind(stream.slot, start)
        last = len(text) == end
        rows = self.engine.extend(stream.slot, text[start:], 1 if last else 0)
        if not last:
            return None
        return propose(rows[0], stream.sampling, text, end, n_vocab=stream.vocabulary)


def joined(one: wire.Drafted | None, other: wire.Drafted) -> wire.Drafted:
    """Both as one message, the `other` being what follows."""
    if one is None:
        return other
    return wire.Drafted(
        one.request,
        one.lineage,
        one.position,
        (*one.tokens, *other.tokens),
        (*one.confidences, *other.confidences),
        one.elapsed_s + other.elapsed_s,
        other.paused,
    )
