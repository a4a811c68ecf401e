"""The asynchronous client: a connection to a coordinator, and what is asked over it."""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, TypeVar, Unpack, overload

from outrider.client import settings as asked
from outrider.client.chat import Messages, Tool, ToolChoice, conversation, names_of, tools_of
from outrider.client.connection import Connection
from outrider.client.hermes import Parser
from outrider.client.inboxes import Repeatable
from outrider.client.results import Completion
from outrider.client.settings import CompletionSettings, Ids, Prompt
from outrider.client.stream import Stream
from outrider.errors import (
    BadRequest,
    ConnectionFailed,
    NotAllowed,
    OutriderError,
    ProtocolError,
    RequestTimeout,
    from_code,
)
from outrider.wire import messages as wire
from outrider.wire.addresses import address_of
from outrider.wire.keys import ClientRole, Keys, credentials
from outrider.wire.transport import Link

ANSWER_S = 15.0  # most that a question may take
LAST_S = 0.05  # for what has come and was not read

Answer = TypeVar("Answer", wire.Tokens, wire.Rendered, wire.HealthReport, wire.MetricsReport)


class AsyncClient(Connection):
    """A connection to a pipeline, by name ("default") or address (ipc://…, tcp://…).

    Beyond this machine it needs keys, as `outrider keys` makes them: from the directory `keys`,
    the one that OUTRIDER_LINKS__KEYS names, or the usual one. It speaks as `role`; only "admin"
    may `stop` the pipeline. With `insecure` it goes without, where the coordinator does, too.

    Every method may raise an OutriderError: BadRequest names the argument that is wrong,
    ConnectionFailed means that there is no coordinator, or no `async with` around the call, and
    NotAllowed that the key is not trusted there, or not for that. If the coordinator was there and
    is gone, answers wait for `resume_s` seconds, and then go on where they stood.
    """

    def __init__(
        self,
        pipeline: str = "default",
        *,
        timeout_s: float = 3.0,
        resume_s: float = 15.0,
        keys: Keys = None,
        role: ClientRole = "client",
        insecure: bool = False,
    ) -> None:
        super().__init__(pipeline, timeout_s, resume_s)
        self._credentials = partial(credentials, role=role, keys=keys, insecure=insecure)

    async def __aenter__(self) -> AsyncClient:
        if self._link:
            raise BadRequest("this client is connected already: make another")
        address = address_of(self.pipeline)
        own = self._credentials(address)
        self._loop, self._process = asyncio.get_running_loop(), os.getpid()
        self._link = Link(address, self._on_message, self._on_lost, self._on_up, own)
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
                link = self._connection()
                if link.refusal:
                    raise NotAllowed(link.refusal) from None
                if time.monotonic() > deadline:
                    start = f"no coordinator answers at {address}; start one with `outrider serve`"
                    raise ConnectionFailed(self._lost or link.hindrance or start) from None
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
        submit = submit.changed(key=secrets.token_hex(16))
        parser = Parser(names_of(tools), in_pieces=streamed) if tools else None
        answer = Stream(self, call, traced=submit.trace, parser=parser)
        try:
            self._put(answer._inbox, submit)
        except OutriderError:
            self._inboxes.forget(answer._inbox)
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
            message = question(call)
            if isinstance(message, Repeatable):
                self._put(inbox, message)
            else:
                self._send(message)
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await inbox.get()
            except TimeoutError:
                await asyncio.sleep(LAST_S)  # it may be there, if this process was paused
                answer = inbox.get_nowait()
        except asyncio.QueueEmpty:
            raise RequestTimeout(f"no answer within {timeout_s:.1f} s") from None
        finally:
            self._inboxes.forget(inbox)
        match answer:
            case wire.Failed(_, code, words, param):
                raise from_code(code, words, param)
            case OutriderError():
                raise answer
            case _ if isinstance(answer, kind):
                return answer
        raise ProtocolError(f"{type(answer).__name__} is no answer to this question")
