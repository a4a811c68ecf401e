"""Clients that ask and judge: each answer is right, wrong, a typed error, a hang, or untyped."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from tests.attack.questions import Question, fault_in
from tests.attack.service import Pauses

from outrider.client import AsyncClient, Stream, connect
from outrider.core.values import Token
from outrider.errors import OutriderError

HANG_S = 20.0  # a longer wait for a token, an end or an error is a hang, on a busy machine too
SOON_S = 5.0  # in which whatever else is waited for mostly comes
LOOK_S = 0.1
AGAIN_S = 0.1  # after an answer that failed

Kind = Literal["right", "wrong", "failed", "hung", "untyped"]
Heard = Callable[[int, float], None]  # a client's number, and when something has come for it
# what is wrong with an answer: its question, tokens and text, and why it has ended
Judge = Callable[[Question, Sequence[Token], str, str | None], str | None]
T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """How one question ended; times are of the monotonic clock."""

    client: int
    kind: Kind
    what: str  # of a failure its code, else what was wrong
    began: float
    ended: float

    @property
    def took_s(self) -> float:
        return self.ended - self.began


class Hung(Exception):
    """Neither a token nor an end nor an error came in time."""


class Client:
    """One client that asks one question after the other until told to end.

    `choose` says which; all outcomes are appended to `outcomes`.
    """

    def __init__(
        self,
        number: int,
        address: str,
        choose: Callable[[], Question],
        pauses: Pauses,
        outcomes: list[Outcome],
        heard: Heard | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.number, self.address = number, address
        self._choose, self._pauses, self._outcomes = choose, pauses, outcomes
        self._heard, self._judge = heard, judge
        self.over = False

    async def run(self) -> None:
        while not self.over:
            began = time.monotonic()
            try:
                async with connect(self.address) as client:
                    await self._converse(client)
            except OutriderError as exc:  # it could not connect
                self._note("failed", exc.code, began)
                await asyncio.sleep(AGAIN_S)

    async def _converse(self, client: AsyncClient) -> None:
        while not self.over:
            outcome = await self._ask(client, self._choose())
            if outcome.kind == "hung":
                return  # as somebody would who lost patience: connect again
            if outcome.kind != "right":
                await asyncio.sleep(AGAIN_S)

    async def _ask(self, client: AsyncClient, question: Question) -> Outcome:
        began = time.monotonic()
        stream: Stream | None = None
        try:
            stream = await self._patiently(begin(client, question))
            await self._read(stream, question)
        except OutriderError as exc:
            kind, what = "failed", exc.code
        except Hung:
            kind, what = "hung", f"after {len(_ids(stream))} tokens"
        except Exception as exc:  # what no user should ever see
            kind, what = "untyped", f"{type(exc).__name__}: {exc}"
        else:
            kind, what = "right", ""
        if stream is not None and (fault := self._fault(stream, question)):
            kind, what = "wrong", fault
        if stream is not None and kind == "hung":
            with suppress(OutriderError):
                await stream.cancel()
        return self._note(kind, what, began)  # type: ignore[arg-type]

    async def _read(self, stream: Stream, question: Question) -> None:
        asked = False
        while True:
            try:
                await self._patiently(stream.__anext__())
            except StopAsyncIteration:
                return
            if self._heard:
                self._heard(self.number, time.monotonic())
            limit = question.cancelled_after
            if limit is not None and not asked and len(_ids(stream)) >= limit:
                asked = True
                await stream.cancel()

    async def _patiently(self, step: Awaitable[T]) -> T:
        """Wait for `step`. Raises Hung; the time of our own pauses does not count."""
        task = asyncio.ensure_future(step)
        since = time.monotonic()
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=LOOK_S)
                now = time.monotonic()
                if not task.done() and now - since - self._pauses.within(since, now) > HANG_S:
                    raise Hung
            return task.result()
        finally:
            task.cancel()  # and see what it raised, or asyncio complains
            await asyncio.gather(task, return_exceptions=True)

    def _fault(self, stream: Stream, question: Question) -> str | None:
        """What is wrong with what has come so far, or with the whole if it has ended by itself."""
        text = "".join(one.text for one in stream.fragments)
        logprobs = [token.logprob for one in stream.fragments for token in one.tokens]
        if question.logprobs and not all(one is not None and one <= 0 for one in logprobs):
            return "a token without its logprob"
        if self._judge:
            tokens = [token for one in stream.fragments for token in one.tokens]
            return self._judge(question, tokens, text, stream.finish_reason)
        return fault_in(question, _ids(stream), text, stream.finish_reason)

    def _note(self, kind: Kind, what: str, began: float) -> Outcome:
        outcome = Outcome(self.number, kind, what, began, time.monotonic())
        self._outcomes.append(outcome)
        return outcome


async def begin(client: AsyncClient, question: Question, **changes: Any) -> Stream:
    """Ask it; `changes` are settings other than its own."""
    settings: Any = {**question.settings, **changes}
    if question.chat:
        chat: Stream = await client.create_chat_completion(
            question.messages, stream=True, **settings
        )
        return chat
    stream: Stream = await client.create_completion(question.prompt, stream=True, **settings)
    return stream


def _ids(stream: Stream | None) -> list[int]:
    return [token.id for one in stream.fragments for token in one.tokens] if stream else []


class Crowd:
    """`async with Crowd(…)`: clients that keep asking; `choices` has one chooser for each."""

    def __init__(
        self,
        addresses: Iterable[str],
        choices: Sequence[Callable[[], Question]],
        pauses: Pauses,
        heard: Heard | None = None,
        judge: Judge | None = None,
    ) -> None:
        self.outcomes: list[Outcome] = []
        places = list(addresses)
        self._clients = [
            Client(n, places[n % len(places)], choose, pauses, self.outcomes, heard, judge)
            for n, choose in enumerate(choices)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Crowd:
        self._tasks = [asyncio.ensure_future(client.run()) for client in self._clients]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def rest(self, within_s: float = 2 * SOON_S) -> None:
        """Let each finish what it has asked, and ask no more; their connections end."""
        for client in self._clients:
            client.over = True
        await asyncio.wait(self._tasks, timeout=within_s)

    async def each_has(self, count: int, since: float, within_s: float) -> bool:
        """Wait until every client has `count` right answers that began after `since`."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            right = Counter(
                o.client for o in self.outcomes if o.kind == "right" and o.began >= since
            )
            if all(right[client.number] >= count for client in self._clients):
                return True
            await asyncio.sleep(0.05)
        return False
