"""The draft worker: lets its drafter ride ahead, and follows what the target commits.

The owner thread drafts on without asking the loop. Meanwhile the loop takes what the target commits
and sends what was drafted. `_lock` guards whatever both touch; nobody computes while holding it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar

from outrider.core.constraints import Constraint
from outrider.core.drafter import Drafter
from outrider.core.engine import Cancelled, EngineFault
from outrider.core.events import Commit, OpenDraft
from outrider.core.sampling import Sampling
from outrider.core.stream import Stream
from outrider.core.values import Drafted, Proposal, Role, TokenId
from outrider.errors import OutriderError
from outrider.wire import messages as wire
from outrider_services.pipeline.worker import Curve, Worker


@dataclass(slots=True)
class Ride:
    """A request that this worker drafts for."""

    request: int
    slot: int
    stream: Stream
    sampling: Sampling
    vocabulary: int  # ids from here on do not exist in the target
    skip: int  # tokens at the beginning of its text that are not read
    recall: int  # tokens at the end of its text for which it is to say what it would have drafted
    asked: float  # `computed_s` when it began to wait for its turn
    constraint: Constraint | None
    begins: int  # the answer, to which the constraint applies, begins here
    is_ready: bool  # the drafter has prepared the constraint
    is_new: bool = True  # the drafter does not know its text yet
    is_open: bool = True

    @property
    def has_work(self) -> bool:
        return self.is_open and self.is_ready and (self.recall > 0 or self.stream.has_work)


class DraftWorker(Worker[Drafter]):
    role: ClassVar[Role] = "draft"

    def __init__(self, model: Drafter, owner: ThreadPoolExecutor, curve_s: Curve) -> None:
        super().__init__(model, owner, curve_s)
        self._rides: dict[int, Ride] = {}  # by request
        self._turns: deque[Ride] = deque()  # the same; the first has the next turn
        self._running: Ride | None = None
        self._lock = threading.Lock()
        self._preparing: set[asyncio.Task[None]] = set()

    @staticmethod
    def measured(model: Drafter) -> Curve:
        return (model.token_s, model.read_s)

    # ---- what the coordinator says --------------------------------------------------------------

    def handle(self, message: wire.Message) -> None:
        with self._lock:
            match message:
                case wire.Do(request, Commit() as order):
                    if ride := self._rides.get(request):
                        self._commit(ride, order)
                case wire.Do(request, OpenDraft() as order):
                    self._open(request, order)
                case wire.Close(request):
                    self._close(request)

    def forget(self) -> None:
        with self._lock:
            for request in list(self._rides):
                self._close(request)

    def _commit(self, ride: Ride, order: Commit) -> None:
        stream = ride.stream
        if stream.committed != order.base:
            return
        had_work = stream.has_work
        cut = stream.commit(order, self.model.info.context)
        if ride is not self._running and not had_work:
            ride.asked = self.computed_s
        if ride is self._running and (cut or stream.is_to_stop):
            self.model.cancel()  # what it computes is not wanted, or not now
        self.wake()

    def _open(self, request: int, order: OpenDraft) -> None:
        self._close(request)  # a draft that was given up and is wanted again begins anew
        try:
            slot = self.admit(order.tokens)
        except OutriderError as exc:
            self.send(wire.failure(request, exc))
            return
        stream = Stream.opened(order, self.model.info.context)
        ride = Ride(
            request=request,
            slot=slot,
            stream=stream,
            sampling=order.sampling,
            vocabulary=order.vocabulary,
            skip=stream.read,
            recall=order.recall,
            asked=self.computed_s,
            constraint=order.constraint,
            begins=order.begins,
            is_ready=order.constraint is None,
        )
        if order.constraint:
            task = asyncio.ensure_future(self._prepare(ride, order.constraint))
            self._preparing.add(task)
            task.add_done_callback(self._preparing.discard)
        self._rides[request] = ride
        self._turns.append(ride)
        self.wake()

    async def _prepare(self, ride: Ride, constraint: Constraint) -> None:
        """Have the drafter prepare the constraint; the others' rides go on meanwhile."""
        with suppress(OutriderError):  # `open` will say it again
            await asyncio.to_thread(self.model.prepare, constraint)
        ride.is_ready, ride.asked = True, self.computed_s
        self.wake()

    def _close(self, request: int) -> None:
        ride = self._rides.pop(request, None)
        if ride is None:
            return
        ride.is_open = False
        if ride is self._running:
            self.model.cancel()
        self._turns.remove(ride)
        self.slots.give_back(ride.slot)
        self.wake()

    # ---- computing ------------------------------------------------------------------------------

    async def compute(self) -> bool:
        if self.slots.dirty:
            await self.owned(lambda: self.slots.clean(self.model.forget))
        ride = next((ride for ride in self._turns if ride.has_work), None)
        if ride is None:
            return False
        self._turns.remove(ride)
        self._turns.append(ride)
        await self._ride(ride)
        return True

    async def _ride(self, ride: Ride) -> None:
        loop = asyncio.get_running_loop()

        def post(proposal: Proposal) -> None:
            loop.call_soon_threadsafe(self.send, wire.Done(ride.request, proposal))

        waited_s = self.computed_s - ride.asked
        self._running = ride
        try:
            await self.owned(lambda: self._draft(ride, waited_s, post))
        except (EngineFault, OutriderError, ValueError) as exc:
            if ride.is_open:
                self.send(wire.failure(ride.request, exc))
                with self._lock:
                    self._close(ride.request)
        finally:
            self._running, ride.asked = None, self.computed_s

    def _draft(self, ride: Ride, waited_s: float, post: Callable[[Proposal], None]) -> None:
        """On the owner thread: draft until the stream has to wait, or another ride may want a turn.

        In sync mode nobody waits for single tokens, so they are sent together.
        """
        stream = ride.stream
        if ride.recall and ride.is_open:
            post(self._recalled(ride, waited_s))
            waited_s = 0.0
        unsent: Proposal | None = None
        started, began = False, None  # when it began to read for the token that comes next
        while True:
            with self._lock:
                going_on = ride.has_work and not (started and len(self._turns) > 1)
                is_whole = not (going_on and stream.floors)
                if unsent and (is_whole or stream.lineage != unsent.lineage):
                    post(unsent)
                    unsent = None
                if not going_on:
                    return
                begun = stream.begin()
            began, started = time.perf_counter() if began is None else began, True
            self.steps += 1
            try:
                drafted = self._propose(ride, begun.read, begun.tokens)
            except Cancelled:
                began = None
                continue
            with self._lock:
                taken = stream.took(begun, self.model.read(ride.slot), drafted)
                if not taken and not stream.is_silent:
                    began = None if drafted else began
                    continue  # there is more text to read, or the target has said what comes here
                proposal = Proposal(
                    lineage=begun.lineage,
                    position=len(begun.tokens),
                    drafted=taken,
                    elapsed_s=time.perf_counter() - began,
                    waited_s=waited_s,
                    paused=stream.is_paused or stream.is_silent,
                )
                unsent, waited_s = unsent.joined(proposal) if unsent else proposal, 0.0
                began = None

    def _recalled(self, ride: Ride, waited_s: float) -> Proposal:
        """What the drafter would have drafted in place of the last tokens of the text."""
        began = time.perf_counter()
        with self._lock:
            begun, count, ride.recall = ride.stream.begin(), ride.recall, 0
        self._know(ride)
        try:
            recalled = self.model.recall(ride.slot, begun.tokens, count)
        except Cancelled:
            recalled = ()
        with self._lock:
            ride.stream.took(begun, self.model.read(ride.slot), ())
            ride.stream.is_silent = False
        return Proposal(
            lineage=begun.lineage,
            position=len(begun.tokens),
            drafted=(),
            elapsed_s=time.perf_counter() - began,
            waited_s=waited_s,
            paused=not recalled,
            recalled=recalled,
        )

    def _know(self, ride: Ride) -> None:
        """Tell the drafter of the text, if it does not know it yet."""
        if ride.is_new:
            self.model.open(
                ride.slot, ride.sampling, ride.vocabulary, ride.skip, ride.constraint, ride.begins
            )
            ride.is_new = False

    def _propose(self, ride: Ride, read: int, text: tuple[TokenId, ...]) -> tuple[Drafted, ...]:
        """What the drafter proposes behind `text`, of which it knows the first `read` tokens."""
        self._know(ride)
        self.model.cut(ride.slot, read)
        return self.model.propose(ride.slot, text)
