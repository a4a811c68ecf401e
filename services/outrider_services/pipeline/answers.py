"""What the target worker answers to questions about text, on threads beside the model's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

from outrider.core.constraints import Constraint, Matcher
from outrider.core.engine import Engine
from outrider.core.values import MOST_TOKENS, TokenId
from outrider.engines.constraints import Constraints
from outrider.errors import BadRequest
from outrider.wire import messages as wire
from outrider.wire.codec import check
from outrider_services.pipeline import conversation, infill
from outrider_services.templates.chat_template import ChatTemplate

Question: TypeAlias = (
    wire.Tokenize | wire.Detokenize | wire.Render | wire.Chat | wire.Infill | wire.Constrain
)


class Answers:
    """Answers one question about text after the other, and compiles one constraint at a time.

    Many threads that read would leave little to the model's; who compiles does not delay who reads.
    """

    def __init__(self, engine: Engine, send: Callable[[wire.Message], None]) -> None:
        self.template = ChatTemplate(engine)
        self.tasks: set[asyncio.Task[None]] = set()
        self._engine, self._send = engine, send
        self._constraints = Constraints(engine)
        self._reading, self._compiling = asyncio.Lock(), asyncio.Lock()

    def take(self, question: Question) -> None:
        """Answer it when its turn comes."""
        self.spawn(self._answer(question))

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run what waits for an answer."""
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def matcher(self, constraint: Constraint) -> Matcher:
        """What says what the constraint allows. Raises BadRequest for one that makes no sense."""
        async with self._compiling:
            return await asyncio.to_thread(self._constraints.matcher, constraint)

    async def _answer(self, question: Question) -> None:
        try:
            if isinstance(question, wire.Constrain):
                await self.matcher(question.constraint)
                self._send(wire.Constrainable(question.call))
                return
            async with self._reading:
                answer = await asyncio.to_thread(self._checked, question)
            self._send(answer)
        except Exception as exc:  # no text may end the worker
            self._send(wire.failure(question.call, exc))

    def _checked(self, question: Question) -> wire.Message:
        """The answer. Raises BadRequest for one that does not fit a message."""
        answer = self.reply(question)
        if isinstance(answer, wire.Tokens) and len(answer.tokens) > MOST_TOKENS:
            raise BadRequest(f"the text has {len(answer.tokens)} tokens, more than {MOST_TOKENS}")
        try:
            check(answer)
        except BadRequest as exc:
            raise BadRequest(f"the answer is too long: {exc}") from None
        return answer

    def reply(self, question: Question) -> wire.Message:
        """The answer to a question about text."""
        engine, template = self._engine, self.template
        match question:
            case wire.Tokenize(call, text, special):
                return wire.Tokens(call, tuple(engine.tokenize(text, special=special)))
            case wire.Detokenize(call, tokens):
                return wire.Rendered(call, self._text(tokens))
            case wire.Render(call, turns, tools):
                return wire.Rendered(call, conversation.text(engine, template, turns, tools))
            case wire.Chat(call, turns, tools):
                ids = conversation.token_ids(engine, template, turns, tools)
                return wire.Tokens(call, tuple(ids))
            case wire.Infill(call):
                return wire.Tokens(call, tuple(infill.token_ids(engine, question)))
            case wire.Constrain(call):
                return wire.Constrainable(call)

    def _text(self, tokens: tuple[TokenId, ...]) -> str:
        if any(token >= self._engine.info.vocabulary.size for token in tokens):
            raise BadRequest("a token id is not in the vocabulary", "tokens")
        return b"".join(map(self._engine.piece, tokens)).decode("utf-8", "replace")
