"""Questions to workers, and their answers."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

from outrider.errors import OutriderError, ProtocolError, RequestTimeout, WorkerLost, from_code
from outrider.wire import messages as wire
from outrider_services.pipeline.member import Member

ANSWER_S = 12.0  # most that a worker may take to answer a question
LAST_S = 0.05  # for what has come and was not read

Tell = Callable[[bytes, wire.Message], None]
Answer = TypeVar("Answer", wire.Tokens, wire.Rendered, wire.LabelTexts, wire.Constrainable)


class Calls:
    """Those that wait for their answers, each under a number of its own."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._waiting: dict[int, tuple[bytes, asyncio.Future[Any]]] = {}  # asked peer, who waits
        # a worker may still answer an earlier coordinator's question: no number is used again
        self._count = secrets.randbits(60)

    def lost(self, member: Member, why: str) -> None:
        """It does not answer any more: whoever waits for it gets WorkerLost."""
        for peer, answer in self._waiting.values():
            if peer == member.peer and not answer.done():
                answer.set_exception(WorkerLost(why, member.role))

    async def ask(
        self, member: Member, question: Callable[[int], wire.Message], kind: type[Answer]
    ) -> Answer:
        """Ask under a new number and wait. Raises RequestTimeout, WorkerLost or its error.

        Raises ProtocolError for an answer of another kind.
        """
        self._count += 1
        call = self._count
        role = member.role
        asked = asyncio.get_running_loop().create_future()
        self._waiting[call] = member.peer, asked
        try:
            self._tell(member.peer, question(call))
            for wait_s in (ANSWER_S, LAST_S):  # it may be there, if this process was paused
                await asyncio.wait([asked], timeout=wait_s)
            if not asked.done():
                raise RequestTimeout(f"the {role} worker has not answered in {ANSWER_S:.0f} s")
            answer = asked.result()
        finally:
            asked.cancel()
            del self._waiting[call]
        if not isinstance(answer, kind):
            raise ProtocolError(f"the {role} worker gave an answer of another kind")
        return answer

    def on_answer(self, peer: bytes, message: wire.Message) -> bool:
        """Whether `message` answers a question to `peer`; if so, give it to whoever asked."""
        match message:
            case (
                wire.Tokens(call)
                | wire.Rendered(call)
                | wire.LabelTexts(call)
                | wire.Constrainable(call)
            ):
                result: Any = message
            case wire.Failed(call, code, reason, param) if call in self._waiting:
                result = from_code(code, reason, param)
            case _:
                return False
        asked, future = self._waiting.get(call, (peer, None))
        if asked != peer:
            return False
        if future is not None and not future.done():
            if isinstance(result, OutriderError):
                future.set_exception(result)
            else:
                future.set_result(result)
        return True
