"""The draft worker: lets its drafter ride ahead, and follows what the target commits.

The owner thread drafts on without asking the loop. Meanwhile the loop takes what the target commits
and sends what was drafted. `_lock` guards whatever both touch; nobody computes while holding it.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import ClassVar

from outrider.core.branches import Branch
from outrider.core.constraints import Constraint
from outrider.core.drafter import Drafter, Opening
from outrider.core.engine import Cancelled, EngineFault
from outrider.core.events import Commit, OpenDraft
from outrider.core.stream import Begun, Stream
from outrider.core.values import Drafted, Proposal, Role
from outrider.errors import OutriderError
from outrider.wire import messages as wire
from outrider_services.pipeline.branching import Branching
from outrider_services.pipeline.slots import Taken
from outrider_services.pipeline.worker import Measured, Worker

TOGETHER = 4  # most unread tokens of a text that shares a step with others
MOST_FAILURES = 2  # after more of the steps that it shared have failed, a text shares none any more


@dataclass(slots=True, eq=False)
class Ride:
    """A request that this worker drafts for."""

    request: int
    slot: int
    stream: Stream
    opening: Opening  # as far as the order to open says it
    taken: Taken  # what it gets from other texts
    skip: int  # so many tokens at the beginning of its text need not be read
    recall: int  # tokens at the end of its text for which it is to say what it would have drafted
    asked: float  # `computed_s` when it began to wait for its turn
    waited_s: float = 0.0  # for others, since it sent something
    began: float | None = None  # when it began to read for the token that comes next
    unsent: Proposal | None = None
    is_ready: bool = True  # the drafter has prepared the constraint
    is_new: bool = True  # the drafter does not know its text yet
    is_alone: bool = False  # a step that it shared has failed, and none alone has come off since
    failures: int = 0  # of steps that it shared
    is_open: bool = True

    @property
    def has_work(self) -> bool:
        return self.is_open and self.is_ready and (self.recall > 0 or self.stream.has_work)

    @property
    def shares(self) -> bool:
        """Whether its next step is short, and may be one with those of others."""
        unread = len(self.stream.tokens) - self.stream.read
        is_alone = self.is_alone or self.failures > MOST_FAILURES
        return not (self.recall or is_alone) and unread <= TOGETHER


class DraftWorker(Worker[Drafter]):
    role: ClassVar[Role] = "draft"

    def __init__(self, model: Drafter, owner: ThreadPoolExecutor, measured: Measured) -> None:
        super().__init__(model, owner, measured)
        self._rides: dict[int, Ride] = {}  # by request
        self._turns: deque[Ride] = deque()  # the same; the first has the next turn
        self._running: list[Ride] = []  # those whose texts the step is for …
        self._growing: list[Ride] = []  # … and those whose branches are
        self._lock = threading.Lock()
        self._branching: Branching[Ride] = Branching(model, self._lock)
        self._preparing: set[asyncio.Task[None]] = set()

    @staticmethod
    def measure(model: Drafter) -> Measured:
        return Measured((model.token_s, model.read_s), model.crowd_s[: model.info.slots])

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
        if ride not in self._running and not had_work:
            ride.asked = self.computed_s
        step = (*self._running, *self._growing)
        is_unwanted = cut or (stream.is_to_stop and not self._growing)
        if step and is_unwanted and all(one is ride for one in step):
            self.model.cancel()  # what it computes is not wanted, or not now
        if cut and stream.foreseen:
            foreseen = Proposal(
                stream.lineage, stream.committed, stream.foreseen, 0.0, foreseen=True
            )
            # behind what the owner thread has posted before
            self._post(asyncio.get_running_loop().call_soon, ride, foreseen)
        self.wake()

    def _open(self, request: int, order: OpenDraft) -> None:
        known = self._rides.get(request)
        if known and order.lineage <= known.stream.lineage:
            return  # it has come twice, or late
        self._close(request)  # a draft that was given up and is wanted again begins anew
        try:
            skip = min(order.skip, len(order.tokens) - 1)
            taken = self.admit(order.tokens, order.cache, skip, order.base)
        except OutriderError as exc:
            self.send(wire.failure(request, exc))
            return
        stream = Stream.opened(order, self.model.info.context)
        if taken.source >= 0:
            stream.read = taken.kept
        if order.foresees:
            self._branching.begin(stream)
        ride = Ride(
            request=request,
            slot=taken.slot,
            stream=stream,
            opening=Opening(
                sampling=order.sampling,
                vocabulary=order.vocabulary,
                constraint=order.constraint,
                begins=order.begins,
                cache=order.cache,
                tells=order.sides > 0,
            ),
            taken=taken,
            skip=skip,
            recall=order.recall,
            asked=self.computed_s,
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
        step = (*self._running, *self._growing)
        if ride in step and not any(one.is_open for one in step):
            self.model.cancel()
        self._turns.remove(ride)
        self.slots.give_back(ride.slot, ride.stream.tokens[: ride.stream.read])
        self.wake()

    # ---- computing ------------------------------------------------------------------------------

    async def compute(self) -> bool:
        with self._lock:
            with_work = any(ride.has_work for ride in self._turns)
            if not (with_work or self._branching.has_work(self._turns)):
                return False
        post = asyncio.get_running_loop().call_soon_threadsafe
        await self.owned(lambda: self._draft(post))
        return True

    def _draft(self, post: Callable[..., object]) -> None:
        """On the owner thread: draft until every stream has to wait. `post` calls on the loop."""
        while True:
            riders, branches = self._next_step(post)
            if not (riders or branches):
                return
            self.steps += 1
            try:
                if riders and riders[0].recall:
                    self._post(post, riders[0], self._recalled(riders[0]))
                else:
                    self._step(riders, branches, post)
            except (EngineFault, OutriderError, ValueError) as exc:
                self._on_failure(riders, exc, post, [ride for _, ride in branches])
            with self._lock:
                self._running, self._growing = [], []
                for ride in riders:
                    ride.asked = self.computed_s

    def _next_step(
        self, post: Callable[..., object]
    ) -> tuple[list[Ride], list[tuple[Branch, Ride]]]:
        """Those who have the next step, in turn, and branches; none: there is nothing to draft."""
        for ride in list(self._turns):
            try:
                self._branching.adopt(ride)
            except (EngineFault, OutriderError, ValueError) as exc:
                self._on_failure([ride], exc, post, [ride])
        self._branching.tidy(self._turns)
        branches: list[tuple[Branch, Ride]] = []
        with self._lock:
            with_work = [ride for ride in self._turns if ride.has_work]
            riders = [ride for ride in with_work if ride.shares]
            if with_work and not with_work[0].shares:
                riders = with_work[:1]
            else:
                lines, branches = self._branching.share(riders, self._turns)
                riders = riders[:lines]
            for ride in riders:
                self._turns.remove(ride)
                self._turns.append(ride)
                ride.waited_s += self.computed_s - ride.asked
            self._running, self._growing = riders, [ride for _, ride in branches]
        return riders, branches

    def _step(
        self,
        riders: list[Ride],
        branches: Sequence[tuple[Branch, Ride]],
        post: Callable[..., object],
    ) -> None:
        """Draft one token more for each of the riders, or read on, and one for each branch."""
        now = time.perf_counter()
        for ride in riders:
            ride.began = now if ride.began is None else ride.began
        riders = self._known(riders, post)
        growing = self._branching.grown(branches, self._turns)
        if not (riders or growing):
            return
        with self._lock:
            all_begun = [ride.stream.begin() for ride in riders]
        for at, (ride, begun) in enumerate(zip(riders, all_begun, strict=True)):
            self.model.cut(ride.slot, begun.read)
            # some models can only go back farther
            all_begun[at] = replace(begun, read=min(begun.read, self.model.read(ride.slot)))
        texts = [(ride.slot, begun.tokens) for ride, begun in zip(riders, all_begun, strict=True)]
        texts += [(one.branch.slot, one.text) for one in growing]
        try:
            found = self.model.propose_all(texts)
        except Cancelled:
            for ride in riders:
                ride.began = None
            found = []
        else:
            for ride in riders[:1]:
                ride.is_alone &= len(texts) > 1
        with self._lock:
            for ride, begun, drafted in zip(riders, all_begun, found, strict=False):
                if not ride.is_open:
                    continue
                self._took(ride, begun, drafted, len(riders), post)
            for one, drafted in zip(growing, found[len(riders) :], strict=False):
                self._branching.took(one, drafted)
            for ride in riders:
                self._send_whole(ride, post)
            for ride in {*riders, *(ride for _, ride in branches)} if found else ():
                if ride.is_open and (sides := ride.stream.news()):
                    post(self.send, wire.Done(ride.request, sides))
            if found and all(len(one.tokens) - one.read <= TOGETHER for one in all_begun):
                self._branching.took_s(len(texts), time.perf_counter() - now)

    def _took(
        self,
        ride: Ride,
        begun: Begun,
        drafted: tuple[Drafted, ...],
        riders: int,
        post: Callable[..., object],
    ) -> None:
        """What a step has brought for one of the `riders` becomes a proposal, or a part of one."""
        stream = ride.stream
        others = self.model.others(ride.slot) if stream.branches else ()
        taken = stream.took(begun, self.model.read(ride.slot), drafted, others)
        if not taken and not stream.is_silent:
            ride.began = None if drafted else ride.began
            return  # there is more text to read, or the target has said what comes here
        proposal = Proposal(
            lineage=begun.lineage,
            position=len(begun.tokens),
            drafted=taken,
            elapsed_s=time.perf_counter() - (ride.began or 0.0),
            waited_s=ride.waited_s,
            paused=stream.is_paused or stream.is_silent,
            requests=riders,
        )
        if ride.unsent and ride.unsent.lineage != proposal.lineage:
            self._post(post, ride, ride.unsent)
            ride.unsent = None
        ride.unsent = ride.unsent.joined(proposal) if ride.unsent else proposal
        ride.began, ride.waited_s = None, 0.0

    def _send_whole(self, ride: Ride, post: Callable[..., object]) -> None:
        """Send what was drafted, unless more follows that nobody waits for singly (sync mode)."""
        unsent, stream = ride.unsent, ride.stream
        follows = ride.has_work and stream.floors and unsent and unsent.lineage == stream.lineage
        if unsent and not follows:
            self._post(post, ride, unsent)
            ride.unsent = None

    def _post(self, post: Callable[..., object], ride: Ride, proposal: Proposal) -> None:
        post(self.send, wire.Done(ride.request, proposal))

    def _on_failure(
        self,
        riders: list[Ride],
        exc: Exception,
        post: Callable[..., object],
        growing: Sequence[Ride] = (),
    ) -> None:
        """One alone is given up; of several each is tried alone, from the beginning of its text.

        So is one whose branches shared the step. None of them has branches from now on.
        """
        with self._lock:
            for ride in (*riders, *growing):
                self._branching.end(ride)
            for ride in riders:
                if len(riders) > 1 or growing:
                    ride.is_alone, ride.is_new, ride.began = True, True, None
                    ride.failures += 1
                    ride.taken = Taken(ride.slot)
                    ride.stream.read = ride.skip
                elif ride.is_open:
                    post(self.send, wire.failure(ride.request, exc))
                    self._close(ride.request)

    def _recalled(self, ride: Ride) -> Proposal:
        """What the drafter would have drafted in place of the last tokens of the text."""
        self._know(ride)
        began = time.perf_counter()
        with self._lock:
            begun, count, ride.recall = ride.stream.begin(), ride.recall, 0
        try:
            recalled = self.model.recall(ride.slot, begun.tokens, count)
        except Cancelled:
            recalled = ()
        with self._lock:
            ride.stream.took(begun, self.model.read(ride.slot), ())
            ride.stream.is_silent = False
            waited_s, ride.waited_s = ride.waited_s, 0.0
        return Proposal(
            lineage=begun.lineage,
            position=len(begun.tokens),
            drafted=(),
            elapsed_s=time.perf_counter() - began,
            waited_s=waited_s,
            paused=not recalled,
            recalled=recalled,
        )

    def _known(self, riders: list[Ride], post: Callable[..., object]) -> list[Ride]:
        """Those whose texts the drafter knows now. One that it cannot take is given up alone."""
        for ride in riders:
            try:
                self._know(ride)
            except (EngineFault, OutriderError, ValueError) as exc:
                self._on_failure([ride], exc, post)
        return [ride for ride in riders if not ride.is_new]

    def _know(self, ride: Ride) -> None:
        """Tell the drafter of the text, if it does not know it yet."""
        if not ride.is_new:
            return
        taken = ride.taken
        with self._lock:
            known = self.slots.held(taken)
        # what was to be kept is gone: no more is read than was asked for
        skip = taken.skip if known > taken.skip else ride.skip
        opening = ride.opening._replace(skip=skip, known=known, source=taken.source)
        self.model.open(taken.slot, opening)
        with self._lock:
            ride.is_new = False
            ride.stream.read = min(ride.stream.read, self.model.read(taken.slot))
            if ride.is_open:  # else the slot may be another's by now
                self.slots.begin(taken.slot, skip)
