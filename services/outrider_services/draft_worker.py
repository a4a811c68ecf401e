"""The draft worker: drafts token after token, and follows what the target commits."""

from __future__ import annotations

import math
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar

from outrider import wire
from outrider.engine import Cancelled, Engine, EngineFault
from outrider.errors import OutriderError
from outrider.estimates import usual_acceptance
from outrider.sampling import Choice, Sampling, Token, choose
from outrider_services.worker import Curve, Worker, failure

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


class DraftWorker(Worker):
    calibrated_rows: ClassVar[tuple[int, ...]] = (1,)
    role: ClassVar[wire.Role] = "draft"

    def __init__(self, engine: Engine, owner: ThreadPoolExecutor, curve_s: Curve) -> None:
        super().__init__(engine, owner, curve_s)
        self._streams: dict[int, Stream] = {}
        self._turns: deque[int] = deque()
        self._running: Stream | None = None

    def handle(self, message: wire.Message) -> None:
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
                await self._step(request, stream)
                return True
        return False

    def _has_work(self, stream: Stream) -> bool:
        """A prompt is prefilled before anything may be drafted; nothing follows an end token."""
        if len(stream.tokens) - stream.evaluated > self.chunk:
            return True
        drafted = len(stream.tokens) > stream.committed
        ended = drafted and stream.tokens[-1] in self.engine.info.vocabulary.ends
        return len(stream.tokens) < stream.until and not ended and not stream.paused

    async def _step(self, request: int, stream: Stream) -> None:
        lineage, end = stream.lineage, len(stream.tokens)
        began = time.perf_counter()
        self._running = stream
        try:
            tokens = stream.tokens[stream.evaluated : stream.evaluated + self.chunk]
            start = stream.evaluated
            choice = await self.owned(lambda: self._evaluate(stream, start, tokens, end))
        except Cancelled:
            return
        except (EngineFault, ValueError) as exc:
            if stream.open:
                self.send(failure(request, exc))
                self._close(request)
            return
        finally:
            self._running = None
        if not stream.open:
            return
        if lineage == stream.lineage:
            stream.evaluated = start + len(tokens)
        if choice is None or lineage != stream.lineage or end != len(stream.tokens):
            return  # more of the prompt to come, or the target has said meanwhile what comes here
        confidence = min(choice.confidence, 1.0)
        stream.tokens.append(choice.token)
        stream.likely.append(float(usual_acceptance((confidence,))[0]))
        drafted = (choice.token,), (confidence,), time.perf_counter() - began
        self.send(wire.Drafted(request, lineage, end, *drafted, stream.paused))

    def _evaluate(self, stream: Stream, start: int, tokens: list[Token], end: int) -> Choice | None:
        """On the owner thread: the token at position `end`, once all before it is evaluated."""
        if self.engine.length(stream.slot) > start:
            self.engine.rewind(stream.slot, start)
        last = start + len(tokens) == end
        rows = self.engine.extend(stream.slot, tokens, 1 if last else 0)
        if not last:
            return None
        history = [*stream.tokens[:start], *tokens]
        return choose(rows[0], stream.sampling, history, end, n_vocab=stream.vocabulary)
