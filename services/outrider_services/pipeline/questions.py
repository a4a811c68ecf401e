"""Questions about text, which the target worker answers: clients' own, and those about prompts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from outrider.errors import (
    ConnectionFailed,
    InternalError,
    OutriderError,
    Overloaded,
    WorkerLost,
)
from outrider.wire import messages as wire
from outrider_services.pipeline.absence import Absence
from outrider_services.pipeline.calls import Tell
from outrider_services.pipeline.roster import Roster

log = logging.getLogger(__name__)

MOST, MOST_OF_ONE = 512, 64  # questions that wait for their answers, of all and of one client
MOST_CHARACTERS = 8 << 20  # in all these
AT_ONCE = 2  # of one client's questions that the worker has; so others are soon in turn
TARGETS = 2  # that a question is put to, if the first is lost with it

Asked = wire.Tokenize | wire.Detokenize | wire.Render | wire.Infill
Answer = TypeVar("Answer", wire.Tokens, wire.Rendered, wire.Constrainable)


@dataclass(slots=True)
class Place:
    """What one client has asked and not been answered yet."""

    count: int = 0
    is_gone: bool = False
    turn: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))


class Questions:
    """Puts them to the worker in turn; one that nobody waits for any more is not put."""

    def __init__(self, roster: Roster, absence: Absence, tell: Tell) -> None:
        self._roster, self._absence, self._tell = roster, absence, tell
        self._places: dict[bytes, Place] = {}
        self._count = self._characters = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    async def ask(
        self, client: bytes, question: Callable[[int], wire.Message], kind: type[Answer]
    ) -> Answer:
        """The answer to the question that `question` makes of a number; as `Roster.ask`.

        While there is no target it waits for the next. Raises Overloaded if too many wait.
        """
        characters = length(question(0))
        place = self._places.get(client, Place())
        if (
            place.count >= MOST_OF_ONE
            or self._count >= MOST
            or self._characters + characters > MOST_CHARACTERS
        ):
            raise Overloaded("too many questions wait for their answers")
        self._places[client] = place
        self._note(client, place, 1, characters)
        put: asyncio.Task[Answer] | None = None

        def over(_: object) -> None:
            self._note(client, place, -1, -characters)

        try:
            await place.turn.acquire()  # who gives up meanwhile was never in the worker's way
            put = asyncio.ensure_future(self._put(place, question, kind))
            self._tasks.add(put)
            put.add_done_callback(self._tasks.discard)
            put.add_done_callback(over)
            put.add_done_callback(_heard)
            return await asyncio.shield(put)  # what the worker has cannot be called back
        finally:
            if put is None:
                over(None)

    def _note(self, client: bytes, place: Place, count: int, characters: int) -> None:
        """So many more, or fewer, wait for their answers."""
        place.count += count
        self._count += count
        self._characters += characters
        if not place.count and self._places.get(client) is place:
            del self._places[client]

    async def _put(
        self, place: Place, question: Callable[[int], wire.Message], kind: type[Answer]
    ) -> Answer:
        try:
            for left in reversed(range(TARGETS)):
                target = await self._absence.target()
                if place.is_gone:
                    break
                try:
                    return await self._roster.ask(target, question, kind)
                except WorkerLost:
                    if not left:
                        raise
            raise ConnectionFailed("nobody waits for the answer")
        finally:
            place.turn.release()

    async def answer(self, client: bytes, asked: Asked) -> None:
        """Answer a client's question, or say why not."""
        ids = isinstance(asked, wire.Tokenize | wire.Infill)
        kind: Any = wire.Tokens if ids else wire.Rendered
        try:
            answer = await self.ask(client, lambda call: asked.changed(call=call), kind)
            self._tell(client, answer.changed(call=asked.call))
        except OutriderError as exc:
            self._tell(client, wire.failure(asked.call, exc))
        except Exception as exc:  # whatever it is, somebody waits
            log.exception("a question failed")
            self._tell(client, wire.failure(asked.call, InternalError(f"it failed: {exc!r}")))

    def on_gone(self, client: bytes) -> None:
        """What it has asked is not put any more."""
        if place := self._places.get(client):
            place.is_gone = True

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _heard(put: asyncio.Task[Any]) -> None:
    """What it failed with is nobody's any more if whoever asked has left."""
    if not put.cancelled():
        put.exception()


def length(question: wire.Message) -> int:
    """About how many characters are in it."""
    match question:
        case wire.Tokenize(_, text):
            return len(text)
        case wire.Detokenize(_, tokens):
            return 4 * len(tokens)
        case wire.Infill(_, prefix, suffix, start, extra):
            return sum(map(len, (prefix, suffix, start, *(text for _, text in extra))))
        case wire.Render(_, turns, tools) | wire.Chat(_, turns, tools):
            said = sum(len(turn.content) for turn in turns)
            called = sum(len(call.arguments) for turn in turns for call in turn.tool_calls)
            return said + called + (len(tools.functions) if tools else 0)
        case wire.Constrain(_, constraint):
            return len(constraint.text)
    return 0
