"""The target worker: evaluates blocks, chooses what the target says, and owns the text."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ClassVar

from outrider.core import decoding
from outrider.core.engine import Cancelled, Engine, EngineFault
from outrider.core.sampling import Sampling, Scores, Token, choose, logprob
from outrider.errors import BadRequest, OutriderError, ProtocolError
from outrider.wire import messages as wire
from outrider_services.pipeline.worker import Curve, Worker, failure


@dataclass(slots=True)
class Sequence:
    """A request's text, and the block that waits to be verified behind it."""

    slot: int
    tokens: list[Token]
    sampling: Sampling
    logprobs: bool
    round: int = 0
    drafted: tuple[Token, ...] | None = ()  # None: nothing to do
    elapsed_s: float = 0.0
    faults: int = 0
    open: bool = True


class TargetWorker(Worker):
    calibrated_rows: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 6, 8, 12, 16)
    role: ClassVar[wire.Role] = "target"

    def __init__(self, engine: Engine, owner: ThreadPoolExecutor, curve_s: Curve) -> None:
        super().__init__(engine, owner, curve_s)
        self._sequences: dict[int, Sequence] = {}
        self._turns: deque[int] = deque()  # requests with something to compute, in turn
        self._running: int | None = None
        self._questions: set[asyncio.Task[None]] = set()

    def handle(self, message: wire.Message) -> None:
        match message:
            case wire.Verify():
                self._verify(message)
            case wire.Open():
                self._open(message)
            case wire.Close(request):
                self._close(request)
            case wire.Tokenize() | wire.Detokenize() | wire.Render() | wire.Chat():
                task = asyncio.ensure_future(self._answer(message))
                self._questions.add(task)
                task.add_done_callback(self._questions.discard)

    def forget(self) -> None:
        for request in list(self._sequences):
            self._close(request)

    # ---- requests -------------------------------------------------------------------------------

    def _open(self, message: wire.Open) -> None:
        try:
            slot, sampling = self.admit(message.tokens, message.sampling)
        except OutriderError as exc:
            self.send(failure(message.request, exc))
            return
        self._sequences[message.request] = Sequence(
            slot, list(message.tokens), sampling, message.logprobs
        )
        self._queue(message.request)

    def _verify(self, message: wire.Verify) -> None:
        sequence = self._sequences.get(message.request)
        if sequence is None:
            return  # closed in the meantime
        info = self.engine.info
        room = min(self.chunk, info.context - len(sequence.tokens)) - 1
        if (
            sequence.drafted is not None
            or message.round <= sequence.round
            or message.base != len(sequence.tokens)
            or len(message.drafted) > max(room, 0)
            or any(token >= info.vocabulary.size for token in message.drafted)
        ):
            exc = ProtocolError(
                f"round {message.round} does not follow from round {sequence.round}"
            )
            self.send(failure(message.request, exc))
            return
        sequence.round, sequence.drafted = message.round, message.drafted
        self._queue(message.request)

    def _close(self, request: int) -> None:
        sequence = self._sequences.pop(request, None)
        if sequence is None:
            return
        sequence.open = False
        if request == self._running:
            self.engine.cancel()
        self.slots.give_back(sequence.slot)
        self.wake()

    def _queue(self, request: int) -> None:
        self._turns.append(request)
        self.wake()

    # ---- computing ------------------------------------------------------------------------------

    async def compute(self) -> bool:
        if self.slots.dirty:
            await self.owned(lambda: self.slots.clean(self.engine))
        if not self._turns:
            return False
        request = self._turns.popleft()
        sequence = self._sequences.get(request)
        if sequence is None or sequence.drafted is None:
            return True
        drafted = sequence.drafted
        self._running = request
        try:
            verdict = await self.owned(lambda: self._evaluate(request, sequence, drafted))
        except Cancelled:
            verdict = None  # closed, which the next turn finds
        except (EngineFault, OutriderError, ValueError) as exc:
            # the sequence is empty now; what it held is evaluated again, but not forever
            sequence.faults += 1
            verdict = None
            if sequence.faults > 1:
                self.send(failure(request, exc))
                self._close(request)
        finally:
            self._running = None
        if not sequence.open:
            return True
        if verdict is None:
            self._turns.append(request)  # the rest of the prompt, after the others' turns
            return True
        sequence.tokens.extend(verdict.tokens)
        sequence.drafted, sequence.elapsed_s = None, 0.0
        self.send(verdict)
        return True

    def _evaluate(
        self, request: int, sequence: Sequence, drafted: tuple[Token, ...]
    ) -> wire.Verdict | None:
        """On the owner thread: one pass; None while there is text before the block to evaluate."""
        began = time.perf_counter()
        base, slot = len(sequence.tokens), sequence.slot
        known = self.engine.length(slot)
        if base + len(drafted) - known > self.chunk:
            ahead = sequence.tokens[known : min(known + self.chunk, base - 1)]
            self.engine.extend(slot, ahead, 0)
            sequence.elapsed_s += time.perf_counter() - began
            return None
        block = [*sequence.tokens[known:], *drafted]
        rows = self.engine.extend(slot, block, len(drafted) + 1)
        choices = self._choices(sequence, drafted, rows)
        verdict = decoding.verify(drafted, choices, self._ends)
        logprobs = None
        if sequence.logprobs:
            pairs = zip(rows, verdict.tokens, strict=False)
            logprobs = tuple(logprob(row, token) for row, token in pairs)
        if verdict.accepted < len(drafted):
            self.engine.rewind(slot, base + verdict.accepted)
        pieces = tuple(map(self.engine.piece, verdict.tokens))
        elapsed_s = sequence.elapsed_s + time.perf_counter() - began
        return wire.Verdict(
            request,
            sequence.round,
            base,
            verdict.accepted,
            verdict.tokens,
            pieces,
            logprobs,
            elapsed_s,
        )

    @property
    def _ends(self) -> tuple[Token, ...]:
        return self.engine.info.vocabulary.ends

    @staticmethod
    def _choices(sequence: Sequence, drafted: tuple[Token, ...], rows: Scores) -> Iterator[Token]:
        """The target's choice at each row, given the prefix which that row really has."""
        history = list(sequence.tokens)
        for at, row in enumerate(rows):
            yield choose(row, sequence.sampling, history, len(history))
            history.extend(drafted[at : at + 1])

    # ---- questions about text -------------------------------------------------------------------

    async def _answer(self, question: wire.Message) -> None:
        engine = self.engine
        ask: Callable[[], wire.Message]
        match question:
            case wire.Tokenize(call, text, special):
                ask = lambda: wire.Tokens(call, tuple(engine.tokenize(text, special=special)))  # noqa: E731
            case wire.Detokenize(call, tokens):
                ask = lambda: wire.Rendered(call, self._text(tokens))  # noqa: E731
            case wire.Render(call, messages):
                ask = lambda: wire.Rendered(call, engine.render(messages))  # noqa: E731
            case wire.Chat(call, messages):
                ask = lambda: wire.Tokens(call, tuple(self._chat(messages)))  # noqa: E731
            case _:
                return
        try:
            self.send(await asyncio.to_thread(ask))
        except Exception as exc:  # whatever a text does to the tokenizer, the worker goes on
            self.send(failure(call, exc))

    def _chat(self, messages: tuple[tuple[str, str], ...]) -> list[Token]:
        """The template's markers become control tokens, those that somebody typed do not."""
        engine = self.engine
        contents = [content for _, content in messages]
        if all(
            engine.tokenize(c, special=True) == engine.tokenize(c, special=False) for c in contents
        ):
            return engine.tokenize(engine.render(messages), special=True)
        # private-use characters in the contents' places, to cut the rendered text there
        places = [chr(0xE000) + f"{n}" + chr(0xE001) for n in range(len(messages))]
        rendered = engine.render([(role, p) for (role, _), p in zip(messages, places, strict=True)])
        tokens: list[Token] = []
        for place, content in zip(places, contents, strict=True):
            before, _, rendered = rendered.partition(place)
            tokens += engine.tokenize(before, special=True) if before else []
            tokens += engine.tokenize(content, special=False) if content else []
        return tokens + engine.tokenize(rendered, special=True)

    def _text(self, tokens: tuple[Token, ...]) -> str:
        if any(token >= self.engine.info.vocabulary.size for token in tokens):
            raise BadRequest("a token id is not in the vocabulary", "tokens")
        return b"".join(map(self.engine.piece, tokens)).decode("utf-8", "replace")
