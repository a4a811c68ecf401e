"""The target worker: evaluates blocks, chooses what the target says, and owns the text."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from outrider.core.constraints import Constraint
from outrider.core.engine import Cancelled, Engine, EngineFault, Part
from outrider.core.events import Prefill
from outrider.core.orders import MOST_WAITING
from outrider.core.stragglers import Stragglers
from outrider.core.values import Role, Verdict, Verify
from outrider.engines.calibration import calibrate, calibrate_crowd, calibrate_rollback
from outrider.errors import OutriderError, ProtocolError
from outrider.wire import messages as wire
from outrider_services.pipeline.answers import Answers
from outrider_services.pipeline.passes import Passes, Sequence, Share
from outrider_services.pipeline.slots import Taken
from outrider_services.pipeline.verifying import Outcome, Verifying
from outrider_services.pipeline.worker import Connection, Measured, Status, Worker

log = logging.getLogger(__name__)

CHUNK = 128  # most tokens of one prefill pass: a cancellation may have to wait for it
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # rows of the passes that are measured at load


class TargetWorker(Worker[Engine]):
    role: ClassVar[Role] = "target"

    def __init__(self, model: Engine, owner: ThreadPoolExecutor, measured: Measured) -> None:
        super().__init__(model, owner, measured)
        self.chunk = min(CHUNK, model.info.chunk)
        slots, spare = model.info.slots, model.info.spare
        self._passes = Passes(self.chunk, model.length, range(slots, slots + spare))
        self._verifying = Verifying(model)
        self._sequences: dict[int, Sequence] = {}
        self._turns: deque[Sequence] = deque()  # those with something to compute; the first is next
        self._running: list[Sequence] = []
        self._stragglers = Stragglers[int]()
        self._answers = Answers(model, lambda message: self.send(message))

    @staticmethod
    def measure(model: Engine) -> Measured:
        return Measured(calibrate(model, ROWS), calibrate_crowd(model), calibrate_rollback(model))

    async def run(self, connection: Connection, status: Status) -> None:
        preparing = asyncio.ensure_future(asyncio.to_thread(self._answers.template.prepare))
        try:
            await super().run(connection, status)
        finally:
            self._answers.template.close()
            await asyncio.wait([preparing])

    def handle(self, message: wire.Message) -> None:
        match message:
            case wire.Do(request, Verify() as order):
                self._verify(request, order)
            case wire.Pass(orders):
                for request, order in orders:
                    self._verify(request, order)
            case wire.Do(request, Prefill() as order):
                self._open(request, order)
            case wire.Close(request):
                self._close(request)
            case (
                wire.Tokenize()
                | wire.Detokenize()
                | wire.Render()
                | wire.Chat()
                | wire.Infill()
                | wire.Constrain()
            ):
                self._answers.take(message)

    def forget(self) -> None:
        for request in list(self._sequences):
            self._close(request)

    # ---- requests -------------------------------------------------------------------------------

    def _open(self, request: int, order: Prefill) -> None:
        known = self._sequences.get(request)
        if known and order.round <= known.orders.latest:
            return  # it has come twice, or late
        self._close(request)  # a slot must not be lost
        try:
            taken = self.admit(order.tokens, order.cache)
        except OutriderError as exc:
            self.send(wire.failure(request, exc))
            return
        self._sequences[request] = sequence = Sequence(
            request=request,
            slot=taken.slot,
            tokens=list(order.tokens),
            sampling=order.sampling,
            logprobs=order.logprobs,
            asked=self.computed_s,
            taken=taken,
            top_logprobs=order.top_logprobs,
            begins=order.begins or len(order.tokens),
        )
        sequence.orders.add(Verify(order.round, len(order.tokens), ()))
        sequence.orders.take(sequence.tokens)
        if order.constraint:
            self._answers.spawn(self._constrain(sequence, order.constraint))
        else:
            self._queue(sequence)

    async def _constrain(self, sequence: Sequence, constraint: Constraint) -> None:
        """Queue a new request once its constraint is compiled, as it usually is already."""
        try:
            matcher = await self._answers.matcher(constraint)
        except Exception as exc:  # no constraint may end the worker
            if sequence.is_open:
                self.send(wire.failure(sequence.request, exc))
                self._close(sequence.request)
            return
        if sequence.is_open:
            sequence.matcher = matcher
            self._queue(sequence)

    def _queue(self, sequence: Sequence) -> None:
        self._turns.append(sequence)
        self.wake()

    def _verify(self, request: int, order: Verify) -> None:
        sequence = self._sequences.get(request)
        if sequence is None or order.round <= sequence.orders.latest:
            return  # closed in the meantime; or it has come twice, or late
        info, orders = self.model.info, sequence.orders
        orders.make_room(sequence.tokens)
        room = min(self.chunk, info.context - order.base) - 1
        if (
            order.round != orders.latest + 1  # the one between may never come
            or len(orders.waiting) >= MOST_WAITING
            or (order.base > len(sequence.tokens) and not order.follows)
            or len(order.drafted) > max(room, 0)
            or not order.fits(info.context, info.vocabulary.size)
        ):
            reason = f"round {order.round} does not follow from round {orders.latest}"
            self.send(wire.failure(request, ProtocolError(reason)))
            return
        orders.add(order)
        if sequence.drafted is None:
            self._stragglers.asked(request, time.perf_counter())
            self._go_on(sequence)

    def _go_on(self, sequence: Sequence) -> None:
        """Its next block or plain step, without waiting for a message if it needs none."""
        text = sequence.tokens
        has_ended = len(text) > sequence.begins and text[-1] in self.model.info.vocabulary.ends
        sequence.drafted = None if has_ended else sequence.orders.take(text)
        sequence.sides = sequence.orders.sides
        if sequence.drafted is not None:
            sequence.asked = self.computed_s
            self._queue(sequence)

    def _close(self, request: int) -> None:
        sequence = self._sequences.pop(request, None)
        if sequence is None:
            return
        sequence.is_open = False
        self._stragglers.gone(request)
        if sequence in self._turns:
            self._turns.remove(sequence)
        if sequence in self._running and not any(one.is_open for one in self._running):
            self.model.cancel()  # nobody waits for the pass any more
        self.slots.give_back(sequence.slot, sequence.tokens)
        self.wake()

    # ---- computing ------------------------------------------------------------------------------

    async def compute(self) -> bool:
        if beginning := [one for one in self._turns if one.taken and self._can_begin(one.taken)]:
            await self.owned(lambda: self._begin(beginning))
            for sequence in beginning:
                if sequence.is_open:  # else its slot may be another's by now
                    sequence.taken = None
                    self.slots.begin(sequence.slot)
        await self._gather()
        shares = self._passes.next(self._turns)
        if not shares:
            return False
        self._running = [share.sequence for share in shares]
        for sequence in self._running:
            self._turns.remove(sequence)
            sequence.waited_s += self.computed_s - sequence.asked
        try:
            outcomes = await self.owned(lambda: self._evaluate(shares))
        finally:
            self._running = []
        verdicts: list[tuple[int, Verdict]] = []
        for share, outcome in zip(shares, outcomes, strict=True):
            sequence = share.sequence
            if not sequence.is_open:
                continue
            if isinstance(outcome, Verdict):
                self._judge(sequence, outcome)
                verdicts.append((sequence.request, outcome))
            else:
                self._again(sequence, outcome)
        if verdicts:
            # together, so that the requests can share their next pass, too
            told = wire.Passed(tuple(verdicts))
            self._tell(told if len(verdicts) > 1 else wire.Done(*verdicts[0]))
        return True

    def _judge(self, sequence: Sequence, verdict: Verdict) -> None:
        """Take over what was chosen, and go on."""
        accepts_all = verdict.accepted == len(sequence.drafted or ()) and not verdict.side
        is_whole = accepts_all and not sequence.forbidden
        sequence.tokens.extend(verdict.tokens)
        sequence.orders.judged(is_whole)
        sequence.drafted, sequence.elapsed_s, sequence.waited_s = None, 0.0, 0.0
        sequence.forbidden = sequence.faults = 0
        self._go_on(sequence)
        if sequence.drafted is None:
            self._stragglers.answered(sequence.request, time.perf_counter())

    def _tell(self, verdicts: wire.Done | wire.Passed) -> None:
        """Send them; where the next pass need not wait for what they lead to, once it has begun."""
        if self._turns:
            asyncio.get_running_loop().call_soon(self.send, verdicts)
        else:
            self.send(verdicts)

    async def _gather(self) -> None:
        """Wait a moment for requests that would otherwise just miss the pass."""
        while self._turns and (wait_s := self._stragglers.expected(time.perf_counter())) > 0:
            self._work.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._work.wait()

    def _can_begin(self, taken: Taken) -> bool:
        """Whether what it is to copy is there; one who is just reading it is waited for."""
        source = next((one for one in self._turns if one.slot == taken.source), None)
        if source is None or taken.source == taken.slot or not self.slots.still_holds(taken):
            return True
        return not source.taken and self.model.length(taken.source) >= taken.kept

    def _begin(self, sequences: list[Sequence]) -> None:
        """On the owner thread: each gets what other texts have left of its own."""
        for sequence in sequences:
            if (taken := sequence.taken) is None:
                continue
            slot, source = taken.slot, taken.source
            held = min(self.slots.held(taken), self.model.length(source)) if source >= 0 else 0
            try:
                self.model.rewind(slot, held if source == slot else 0)
                if held and source != slot:
                    self.model.copy(source, slot, held)
            except EngineFault as exc:  # it is read anew
                log.warning("a text is read anew: %s", exc)
                self.model.rewind(slot, 0)
            sequence.cached = self.model.length(slot)

    def _again(self, sequence: Sequence, failure: Exception | None) -> None:
        """It has its next turn after the others; after a second `failure` it has none."""
        if failure is not None and not isinstance(failure, Cancelled):
            sequence.failures += 1
            sequence.sides = ()
            sequence.faults += 1  # its slot is empty: its text is evaluated again, but once
            if sequence.faults > 1:
                self.send(wire.failure(sequence.request, failure))
                self._close(sequence.request)
                return
        sequence.asked = self.computed_s
        self._turns.append(sequence)

    def _evaluate(self, shares: list[Share]) -> list[Outcome]:
        """On the owner thread: one pass. Where it fails for a sequence, its slot is empty."""
        began = time.perf_counter()
        shares = [self._verifying.legal(share) for share in shares]
        parts = [Part(one.sequence.slot, one.tokens, one.rows, one.forks) for one in shares]
        try:
            scores = self.model.extend_all(parts)
        except Cancelled as exc:
            return [exc] * len(shares)
        except (EngineFault, OutriderError, ValueError) as exc:
            for part in parts:
                self.model.rewind(part.slot, 0)
            self._verifying.free(shares)
            return [exc] * len(shares)
        found = [
            self._verifying.judged(share, rows) for share, rows in zip(shares, scores, strict=True)
        ]
        self._verifying.free(shares)
        elapsed_s = time.perf_counter() - began
        self._stragglers.passed(elapsed_s)
        reads = any(len(share.tokens) > share.rows for share in shares)
        rows = 0 if reads else sum(share.all_rows for share in shares)
        for at, (share, one) in enumerate(zip(shares, found, strict=True)):
            share.sequence.elapsed_s += elapsed_s
            if isinstance(one, Verdict):
                spent_s, requests = share.sequence.elapsed_s, len(shares)
                found[at] = one.changed(elapsed_s=spent_s, rows=rows, requests=requests)
        return found
