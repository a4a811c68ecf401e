"""The asynchronous client: a connection to a coordinator, and what is asked over it."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, Literal, TypeVar, Unpack, overload

from outrider.client import settings as asked
from outrider.client.chat import Messages, Tool, ToolChoice, conversation, names_of, tools_of
from outrider.client.hermes import Parser
from outrider.client.results import Completion
from outrider.client.settings import CompletionSettings, Ids, Prompt
from outrider.client.stream import Inbox, Stream
from outrider.errors import (
    BadRequest,
    ConfigError,
    ConnectionFailed,
    OutriderError,
    ProtocolError,
    RequestTimeout,
    from_code,
)
from outrider.wire import messages as wire
from outrider.wire.addresses import address_of
from outrider.wire.codec import check
from outrider.wire.transport import Link, PeerGone

SILENCE_S = 10.0  # the coordinator pings every second; so long it may be paused
PAUSE_S = 3.0  # between two looks at that silence, which are a second apart
ANSWER_S = 15.0  # most that a question may take
LAST_S = 0.05  # for what has come and was not read
FORKED = "a client does not outlive fork(): make one in each process"

Answer = TypeVar("Answer", wire.Tokens, wire.Rendered, wire.HealthReport, wire.MetricsReport)


class AsyncClient:
    """A connection to a pipeline, by name ("default") or address (ipc://…, tcp://…).

    Every method may raise an OutriderError: BadRequest names the argument that is wrong, and
    ConnectionFailed means that there is no coordinator, or no `async with` around the call.
    """

    def __init__(self, pipeline: str = "default", *, timeout_s: float = 3.0) -> None:
        if not isinstance(pipeline, str):
            raise ConfigError("a pipeline is given by its name or its address, as text")
        self.pipeline, self.timeout_s = pipeline, asked.seconds("timeout_s", timeout_s)
        self._calls = itertools.count(1)
        self._inboxes: dict[int, Inbox] = {}
        self._link: Link | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # of the link
        self._process = 0  # the same
        self._heard = self._looked = 0.0
        self._lost = ""  # why the last connection was

    async def __aenter__(self) -> AsyncClient:
        if self._link:
            raise BadRequest("this client is connected already: make another")
        address = address_of(self.pipeline)
        self._loop, self._process = asyncio.get_running_loop(), os.getpid()
        self._link = Link(address, self._on_message, self._on_lost)
        try:
            await self._reach(address)
        except BaseException:
            await self.close()
            raise
        return self

    async def _reach(self, address: str) -> None:
        deadline = time.monotonic() + self.timeout_s
        while True:
            try:
                await self.health(timeout_s=max(0.1, deadline - time.monotonic()))
                return
            except (ConnectionFailed, RequestTimeout):
                if time.monotonic() > deadline:
                    start = f"no coordinator answers at {address}; start one with `outrider serve`"
                    raise ConnectionFailed(self._lost or start) from None
                await asyncio.sleep(0.02)

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; whoever still waits gets ConnectionFailed. May be called again.

        In a process that was forked it does nothing: the connection is the parent's.
        """
        loop = self._loop
        if loop is None or self._process != os.getpid():
            return
        if loop is not asyncio.get_running_loop() and loop.is_running():  # in another thread
            loop.call_soon_threadsafe(self._end)
        else:
            self._end()

    def _end(self) -> None:
        link, self._link = self._link, None
        self._fail_all("the client was closed before the answer ended")
        if link:
            link.close()

    # ---- requests -------------------------------------------------------------------------------

    @overload
    async def create_completion(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion: ...
    @overload
    async def create_completion(
        self, prompt: Prompt, *, stream: Literal[True], **settings: Unpack[CompletionSettings]
    ) -> Stream: ...
    @overload
    async def create_completion(
        self, prompt: Prompt, *, stream: bool | None, **settings: Unpack[CompletionSettings]
    ) -> Completion | Stream: ...
    async def create_completion(
        self,
        prompt: Prompt,
        *,
        stream: bool | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion | Stream:
        """Generate after `prompt`, a text or token ids.

        Returns a `Completion`, or with `stream` a `Stream`. The settings are those of
        `outrider.CompletionSettings`. The text depends on prompt, seed and sampling settings alone,
        never on `mode`, `n_draft`, `n_min` or `p_min`.
        """
        return await self._answer(asked.prompt_of(prompt), None, stream, settings)

    @overload
    async def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: Literal[False] | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion: ...
    @overload
    async def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: Literal[True],
        **settings: Unpack[CompletionSettings],
    ) -> Stream: ...
    @overload
    async def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: bool | None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion | Stream: ...
    async def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: bool | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion | Stream:
        """As `create_completion`, with `messages` in the model's chat template as the prompt.

        The answer may call the functions of `tools`. With `tool_choice` "none" it is told of none;
        with "required", or a function, it is made of calls, which fit the functions' schemas.
        """
        turns, offered = conversation(messages), tools_of(tools, tool_choice)
        return await self._answer("", turns, stream, settings, offered)

    async def _answer(
        self,
        prompt: str | tuple[int, ...],
        messages: wire.Conversation | None,
        stream: bool | None,
        settings: Mapping[str, object],
        tools: wire.Tools | None = None,
    ) -> Completion | Stream:
        streamed = stream is not None and asked.flag("stream", stream)
        call = next(self._calls)
        submit = asked.submit(call, prompt, messages, settings, tools)
        parser = Parser(names_of(tools), in_pieces=streamed) if tools else None
        answer = Stream(self, call, traced=submit.trace, parser=parser)
        try:
            self._send(submit)
        except OutriderError:
            self._forget(call)
            raise
        if streamed:
            return answer
        async with answer:
            return await answer.result()

    # ---- questions ------------------------------------------------------------------------------

    async def tokenize(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The target's token ids of `text`; with `special`, markers become control tokens."""
        text, special = asked.text("text", text), asked.flag("special", special)
        return (
            await self._ask(lambda call: wire.Tokenize(call, text, special), wire.Tokens)
        ).tokens

    async def detokenize(self, tokens: Ids) -> str:
        """The text of these token ids."""
        ids = asked.token_ids("tokens", tokens)
        return (await self._ask(lambda call: wire.Detokenize(call, ids), wire.Rendered)).text

    async def apply_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
    ) -> str:
        """`messages` in the model's chat template, up to where the answer begins."""
        turns, offered = conversation(messages), tools_of(tools, tool_choice)
        question = partial(wire.Render, messages=turns, tools=offered)
        return (await self._ask(question, wire.Rendered)).text

    async def infill_prompt(
        self,
        prefix: str,
        suffix: str,
        *,
        start: str = "",
        extra: Sequence[tuple[str, str]] = (),
        room: int = 128,
    ) -> tuple[int, ...]:
        """The prompt, as token ids, that has the model fill the gap between `prefix` and `suffix`.

        `extra` files, as (name, text), stand in front; the answer goes on after `start`. What
        leaves no `room` tokens for it is left out: files first, then what is far from the gap.
        Raises BadRequest for a model that cannot fill gaps.
        """
        texts = asked.text("prefix", prefix), asked.text("suffix", suffix)
        files, start = asked.files("extra", extra), asked.text("start", start)
        room = asked.whole("room", room)
        question = lambda call: wire.Infill(call, *texts, start, files, room)  # noqa: E731
        return (await self._ask(question, wire.Tokens)).tokens

    async def health(self, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The state of coordinator, workers and requests."""
        timeout_s = asked.seconds("timeout_s", timeout_s)
        return (await self._ask(wire.Health, wire.HealthReport, timeout_s)).report

    async def metrics(self, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """What the coordinator has counted over all requests: values by metric, then by label."""
        timeout_s = asked.seconds("timeout_s", timeout_s)
        return (await self._ask(wire.Metrics, wire.MetricsReport, timeout_s)).metrics

    async def stop(self) -> None:
        """End the pipeline as soon as it has finished what it is generating."""
        await self._ask(wire.Stop, wire.HealthReport)

    async def _ask(
        self,
        question: Callable[[int], wire.Message],
        kind: type[Answer],
        timeout_s: float = ANSWER_S,
    ) -> Answer:
        call = next(self._calls)
        inbox = self._open(call)
        try:
            self._send(question(call))
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await inbox.get()
            except TimeoutError:
                await asyncio.sleep(LAST_S)  # it may be there, if this process was paused
                answer = inbox.get_nowait()
        except asyncio.QueueEmpty:
            raise RequestTimeout(f"no answer within {timeout_s:.1f} s") from None
        finally:
            self._forget(call)
        match answer:
            case wire.Failed(_, code, words, param):
                raise from_code(code, words, param)
            case OutriderError():
                raise answer
            case _ if isinstance(answer, kind):
                return answer
        raise ProtocolError(f"{type(answer).__name__} is no answer to this question")

    # ---- the connection -------------------------------------------------------------------------

    def _open(self, call: int) -> Inbox:
        """Where the messages of `call` will be put."""
        inbox = self._inboxes[call] = Inbox()
        return inbox

    def _forget(self, call: int) -> None:
        self._inboxes.pop(call, None)

    def _abandon(self, call: int) -> None:
        """Cancel `call` and forget it; from any thread, at any time, for destructors call it."""
        if self._loop is None or self._process != os.getpid() or call not in self._inboxes:
            return
        with suppress(RuntimeError):  # the loop is closed, and the connection with it
            self._loop.call_soon_threadsafe(self._drop, call)

    def _drop(self, call: int) -> None:
        if call in self._inboxes:
            self._forget(call)
            with suppress(ConnectionFailed):  # then nobody is left to cancel it
                self._send(wire.Cancel(call))

    def _connection(self) -> Link:
        """The link, if whoever asks may use it. Raises ConnectionFailed."""
        if self._link is None:
            raise ConnectionFailed("the client has no connection outside of its `with` block")
        if self._process != os.getpid():
            raise ConnectionFailed(FORKED)
        if self._loop is not asyncio.get_running_loop():
            raise ConnectionFailed("a client serves the event loop that it was opened in: make one")
        return self._link

    def _send(self, message: wire.Message) -> None:
        link = self._connection()
        check(message)
        try:
            link.send(message)
        except PeerGone:
            raise ConnectionFailed(f"the coordinator of {self.pipeline!r} is gone") from None

    def _on_message(self, message: wire.Message) -> None:
        self._heard = time.monotonic()
        call = message.id if isinstance(message, wire.Failed) else getattr(message, "call", None)
        if call in self._inboxes:
            self._inboxes[call].put_nowait(message)
            if isinstance(message, wire.Finished | wire.Failed):
                self._forget(call)

    def _on_lost(self, why: str) -> None:
        """The coordinator forgets what was asked over a connection that has ended."""
        self._lost = f"{self.pipeline!r}: {why} before the answer ended"
        self._fail_all(self._lost)

    def _fail_all(self, why: str) -> None:
        for inbox in self._inboxes.values():
            with suppress(RuntimeError):  # who waited for it in a loop that is closed does no more
                inbox.put_nowait(ConnectionFailed(why))
        self._inboxes.clear()

    async def _next(self, inbox: Inbox) -> wire.Message | OutriderError | None:
        """The next message; None after a second without one, if the coordinator still lives."""
        if self._link:
            self._connection()
        try:
            async with asyncio.timeout(1.0):  # wait_for (3.11) may swallow a cancellation
                return await inbox.get()
        except TimeoutError:
            now = time.monotonic()
            if now - self._looked > PAUSE_S:  # nobody waited, or this process was paused
                self._heard = now
            self._looked = now
            if now - self._heard > SILENCE_S:
                raise ConnectionFailed(
                    f"the coordinator of {self.pipeline!r} went away before the answer ended"
                ) from None
            return None


def connect(pipeline: str = "default", *, timeout_s: float = 3.0) -> AsyncClient:
    """A client to enter: `async with outrider.connect() as client`; see `AsyncClient`."""
    return AsyncClient(pipeline, timeout_s=timeout_s)
