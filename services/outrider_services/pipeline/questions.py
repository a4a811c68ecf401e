"""Clients' questions about text, which the target worker answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Coroutine
from typing import Any

from outrider.errors import OutriderError, Overloaded
from outrider.wire import messages as wire
from outrider_services.pipeline.roster import Roster, Tell

MOST, MOST_OF_ONE = 256, 64  # questions that wait for their answers, of all and of one client

Question = wire.Tokenize | wire.Detokenize | wire.Render


class Questions:
    """Passes them on, up to so many at once."""

    def __init__(self, roster: Roster, tell: Tell) -> None:
        self._roster, self._tell = roster, tell
        self._waiting: Counter[bytes] = Counter()

    def ask(self, client: bytes, question: Question) -> Coroutine[Any, Any, None] | None:
        """What puts the question and passes the answer on; None if there are too many already."""
        if self._waiting[client] >= MOST_OF_ONE or self._waiting.total() >= MOST:
            self._fail(client, question, Overloaded("too many questions wait for their answers"))
            return None
        self._waiting[client] += 1
        return self._pass_on(client, question)

    async def _pass_on(self, client: bytes, question: Question) -> None:
        try:
            target = self._roster.target()
            answer = await self._roster.ask(target, lambda call: question.changed(call=call))
            self._tell(client, answer.changed(call=question.call))
        except OutriderError as exc:
            self._fail(client, question, exc)
        finally:
            self._waiting[client] -= 1
            self._waiting = +self._waiting  # only those who wait

    def _fail(self, client: bytes, question: Question, error: OutriderError) -> None:
        self._tell(client, wire.failure(question.call, error))
