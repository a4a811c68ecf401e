"""The target worker: evaluates blocks, chooses what the target says, and owns the text."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

from outrider.core import decoding
from outrider.core.constraints import Constraint, Matcher, decide
from outrider.core.engine import Cancelled, Engine, EngineFault
from outrider.core.events import Prefill
from outrider.core.sampling import Sampling, Scores, logprob
from outrider.core.values import MOST_TOKENS, Role, TokenId, Verdict, Verify
from outrider.engines.calibration import calibrate
from outrider.engines.constraints import Constraints
from outrider.errors import BadRequest, OutriderError, ProtocolError
from outrider.wire import messages as wire
from outrider.wire.codec import check
from outrider_services.pipeline import conversation
from outrider_services.pipeline.worker import Curve, Worker

CHUNK = 128  # most tokens of one prefill pass: a cancellation may have to wait for it
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # rows of the passes that are measured at load

Question: TypeAlias = wire.Tokenize | wire.Detokenize | wire.Render | wire.Chat | wire.Constrain


@dataclass(slots=True)
class Sequence:
    """A request's committed text, and the block behind it that waits to be verified."""

    slot: int
    tokens: list[TokenId]
    sampling: Sampling
    logprobs: bool
    asked: float  # `computed_s` when it was queued last
    begins: int  # the answer begins here
    matcher: Matcher | None = None  # of the answer's constraint
    round: int = 0
    drafted: tuple[TokenId, ...] | None = ()  # None: nothing to do
    elapsed_s: float = 0.0
    waited_s: float = 0.0
    faults: int = 0
    is_open: bool = True


class TargetWorker(Worker[Engine]):
    role: ClassVar[Role] = "target"

    def __init__(self, model: Engine, owner: ThreadPoolExecutor, curve_s: Curve) -> None:
        super().__init__(model, owner, curve_s)
        self.chunk = min(CHUNK, model.info.chunk)
        self._sequences: dict[int, Sequence] = {}
        self._turns: deque[int] = deque()  # requests with something to compute; the first is next
        self._running: int | None = None
        self._questions: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Lock()  # many threads that read would leave little to the model's
        self._compiling = asyncio.Lock()  # the same; and who compiles does not delay who reads
        self._constraints = Constraints(model)

    @staticmethod
    def measured(model: Engine) -> Curve:
        return calibrate(model, ROWS)

    def handle(self, message: wire.Message) -> None:
        match message:
            case wire.Do(request, Verify() as order):
                self._verify(request, order)
            case wire.Do(request, Prefill() as order):
                self._open(request, order)
            case wire.Close(request):
                self._close(request)
            case (
                wire.Tokenize() | wire.Detokenize() | wire.Render() | wire.Chat() | wire.Constrain()
            ):
                self._spawn(self._answer(message))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._questions.add(task)
        task.add_done_callback(self._questions.discard)

    def forget(self) -> None:
        for request in list(self._sequences):
            self._close(request)

    # ---- requests -------------------------------------------------------------------------------

    def _open(self, request: int, order: Prefill) -> None:
        self._close(request)  # nobody asks twice for the same, but a slot must not be lost
        try:
            slot = self.admit(order.tokens)
        except OutriderError as exc:
            self.send(wire.failure(request, exc))
            return
        sequence = self._sequences[request] = Sequence(
            slot=slot,
            tokens=list(order.tokens),
            sampling=order.sampling,
            logprobs=order.logprobs,
            asked=self.computed_s,
            begins=len(order.tokens),
        )
        if order.constraint:
            self._spawn(self._constrain(request, sequence, order.constraint))
        else:
            self._queue(request)

    async def _constrain(self, request: int, sequence: Sequence, constraint: Constraint) -> None:
        """Queue a new request once its constraint is compiled, as it usually is already."""
        try:
            async with self._compiling:
                matcher = await asyncio.to_thread(self._constraints.matcher, constraint)
        except Exception as exc:  # no constraint may end the worker
            if sequence.is_open:
                self.send(wire.failure(request, exc))
                self._close(request)
            return
        if sequence.is_open:
            sequence.matcher = matcher
            self._queue(request)

    def _queue(self, request: int) -> None:
        self._turns.append(request)
        self.wake()

    def _verify(self, request: int, order: Verify) -> None:
        sequence = self._sequences.get(request)
        if sequence is None:
            return  # closed in the meantime
        info = self.model.info
        room = min(self.chunk, info.context - len(sequence.tokens)) - 1
        if (
            sequence.drafted is not None
            or order.round <= sequence.round
            or order.base != len(sequence.tokens)
            or len(order.drafted) > max(room, 0)
            or any(token >= info.vocabulary.size for token in order.drafted)
        ):
            reason = f"round {order.round} does not follow from round {sequence.round}"
            self.send(wire.failure(request, ProtocolError(reason)))
            return
        sequence.round, sequence.drafted = order.round, order.drafted
        sequence.asked = self.computed_s
        self._queue(request)

    def _close(self, request: int) -> None:
        sequence = self._sequences.pop(request, None)
        if sequence is None:
            return
        sequence.is_open = False
        if request == self._running:
            self.model.cancel()
        self.slots.give_back(sequence.slot)
        self.wake()

    # ---- computing ------------------------------------------------------------------------------

    async def compute(self) -> bool:
        if self.slots.dirty:
            await self.owned(lambda: self.slots.clean(lambda slot: self.model.rewind(slot, 0)))
        if not self._turns:
            return False
        request = self._turns.popleft()
        sequence = self._sequences.get(request)
        if sequence is None or sequence.drafted is None:
            return True
        sequence.waited_s += self.computed_s - sequence.asked
        verdict = await self._pass(request, sequence, sequence.drafted)
        if not sequence.is_open:
            return True
        if verdict is None:
            sequence.asked = self.computed_s
            self._turns.append(request)  # the rest of the text, after the turns of the others
            return True
        sequence.tokens.extend(verdict.tokens)
        sequence.drafted, sequence.elapsed_s, sequence.waited_s = None, 0.0, 0.0
        self.send(wire.Done(request, verdict))
        return True

    async def _pass(
        self, request: int, sequence: Sequence, drafted: tuple[TokenId, ...]
    ) -> Verdict | None:
        """One pass; None if there is more to evaluate, or the request was closed."""
        self._running = request
        try:
            return await self.owned(lambda: self._attempt(sequence, drafted))
        except Cancelled:
            return None  # the request was closed; the next turn finds out
        except (EngineFault, OutriderError, ValueError) as exc:
            # the slot is empty now: its text is evaluated again, but only once
            sequence.faults += 1
            if sequence.faults > 1:
                self.send(wire.failure(request, exc))
                self._close(request)
            return None
        finally:
            self._running = None

    def _attempt(self, sequence: Sequence, drafted: tuple[TokenId, ...]) -> Verdict | None:
        """On the owner thread: `_evaluate`; where it fails, the slot is empty afterwards."""
        try:
            return self._evaluate(sequence, drafted)
        except (OutriderError, ValueError):
            self.model.rewind(sequence.slot, 0)
            raise

    def _evaluate(self, sequence: Sequence, drafted: tuple[TokenId, ...]) -> Verdict | None:
        """On the owner thread: one pass; None if it only brought the text nearer to the block."""
        began = time.perf_counter()
        base, slot = len(sequence.tokens), sequence.slot
        known = self.model.length(slot)
        if base + len(drafted) - known > self.chunk:
            ahead = sequence.tokens[known : min(known + self.chunk, base - 1)]
            self.model.extend(slot, ahead, 0)
            sequence.elapsed_s += time.perf_counter() - began
            return None
        asked = len(drafted)
        if sequence.matcher:  # what it forbids is not verified
            answer = sequence.tokens[sequence.begins :]
            drafted = drafted[: sequence.matcher.legal(answer, drafted)]
        block = [*sequence.tokens[known:], *drafted]
        rows = self.model.extend(slot, block, len(drafted) + 1)
        margins: list[float] = []
        choices = self._choices(sequence, drafted, rows, margins)
        verdict = decoding.verify(drafted, choices, self.model.info.vocabulary.ends)
        logprobs = None
        if sequence.logprobs:
            pairs = zip(rows, verdict.tokens, strict=False)
            logprobs = tuple(logprob(row, token) for row, token in pairs)
        if verdict.accepted < len(drafted):
            self.model.rewind(slot, base + verdict.accepted)
        return verdict.changed(
            round=sequence.round,
            base=base,
            pieces=tuple(map(self.model.piece, verdict.tokens)),
            margins=tuple(margins),
            logprobs=logprobs,
            elapsed_s=sequence.elapsed_s + time.perf_counter() - began,
            waited_s=sequence.waited_s,
            forbidden=asked - len(drafted),
        )

    @staticmethod
    def _choices(
        sequence: Sequence, drafted: tuple[TokenId, ...], rows: Scores, margins: list[float]
    ) -> Iterator[TokenId]:
        """The target's choice at each row, given the prefix that this row was evaluated with.

        The margin of each choice is appended to `margins`.
        """
        history = list(sequence.tokens)
        for at, row in enumerate(rows):
            token, margin = decide(
                row, sequence.sampling, history, sequence.matcher, sequence.begins
            )
            margins.append(margin)
            yield token
            history.extend(drafted[at : at + 1])

    # ---- questions about text -------------------------------------------------------------------

    async def _answer(self, question: Question) -> None:
        try:
            is_heavy = isinstance(question, wire.Constrain)
            async with self._compiling if is_heavy else self._reading:
                answer = await asyncio.to_thread(self._checked_reply, question)
            self.send(answer)
        except Exception as exc:  # no text may end the worker
            self.send(wire.failure(question.call, exc))

    def _checked_reply(self, question: Question) -> wire.Message:
        """The answer. Raises BadRequest for one that does not fit a message."""
        answer = self._reply(question)
        if isinstance(answer, wire.Tokens) and len(answer.tokens) > MOST_TOKENS:
            raise BadRequest(f"the text has {len(answer.tokens)} tokens, more than {MOST_TOKENS}")
        try:
            check(answer)
        except BadRequest as exc:
            raise BadRequest(f"the answer is too long: {exc}") from None
        return answer

    def _reply(self, question: Question) -> wire.Message:
        engine = self.model
        match question:
            case wire.Tokenize(call, text, special):
                return wire.Tokens(call, tuple(engine.tokenize(text, special=special)))
            case wire.Detokenize(call, tokens):
                return wire.Rendered(call, self._text(tokens))
            case wire.Render(call, messages):
                return wire.Rendered(call, conversation.text(engine, messages))
            case wire.Constrain(call, constraint):
                self._constraints.matcher(constraint)
                return wire.Constrainable(call)
            case wire.Chat(call, messages):
                return wire.Tokens(call, tuple(conversation.token_ids(engine, messages)))

    def _text(self, tokens: tuple[TokenId, ...]) -> str:
        if any(token >= self.model.info.vocabulary.size for token in tokens):
            raise BadRequest("a token id is not in the vocabulary", "tokens")
        return b"".join(map(self.model.piece, tokens)).decode("utf-8", "replace")
