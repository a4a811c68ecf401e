"""The client library: `connect()` gives an asynchronous client, `Client` is its sync twin."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import threading
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, TypeVar

from outrider.core.sampling import Sampling
from outrider.core.stats import Report
from outrider.core.values import Fragment, Span, Token
from outrider.errors import (
    ConnectionFailed,
    InternalError,
    OutriderError,
    RequestTimeout,
    from_code,
)
from outrider.wire import messages as wire
from outrider.wire.codec import check
from outrider.wire.transport import Link, PeerGone, address_of

T = TypeVar("T")
FinishReason = Literal["stop", "length", "cancelled"]
SILENCE_S = 5.0  # the coordinator pings every second: silent for so long, it is gone
ANSWER_S = 15.0


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    text: str
    index: int
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The shape of OpenAI's completion object, and what outrider knows besides."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage
    tokens: tuple[Token, ...]
    prompt_token_ids: tuple[int, ...]
    stats: Report
    trace: tuple[Span, ...] | None

    @property
    def text(self) -> str:
        return self.choices[0].text


class Stream:
    """An answer as it is committed: iterate over its fragments. Leaving `async with` cancels it."""

    def __init__(self, client: AsyncClient, call: int) -> None:
        self.model = ""
        self.prompt_token_ids: tuple[int, ...] = ()
        self.fragments: list[Fragment] = []
        self.stats: Report | None = None  # live; None until the first fragment
        self.trace: tuple[Span, ...] | None = None
        self.finish_reason: FinishReason | None = None
        self._client, self._call = client, call
        self._error: OutriderError | None = None
        self._inbox: asyncio.Queue[wire.Message | OutriderError] = asyncio.Queue()

    def __aiter__(self) -> AsyncIterator[Fragment]:
        return self

    async def __anext__(self) -> Fragment:
        while self.finish_reason is None:
            if self._error:
                raise self._error  # its one outcome, to whoever asks again
            message = await self._client._next(self._inbox)
            match message:
                case wire.Started():
                    self.model, self.prompt_token_ids = message.model, message.prompt_tokens
                case wire.Progress(_, fragment, stats):
                    self.fragments.append(fragment)
                    self.stats = stats
                    return fragment
                case wire.Finished(_, reason, stats, trace):
                    self.finish_reason, self.stats, self.trace = reason, stats, trace
                case wire.Failed(_, code, words):
                    self._client._forget(self._call)
                    self._error = from_code(code, words)
        self._client._forget(self._call)
        raise StopAsyncIteration

    async def cancel(self) -> None:
        """Stop generating; iteration ends normally. Does nothing when called again or too late."""
        if self.finish_reason is None and self._error is None:
            self._client._send(wire.Cancel(self._call))

    async def result(self) -> Completion:
        """Read to the end, and return all there is. Raises OutriderError if the request failed."""
        async for _ in self:
            pass
        tokens = tuple(token for fragment in self.fragments for token in fragment.tokens)
        text = "".join(fragment.text for fragment in self.fragments)
        logprobs = tuple(t.logprob for t in tokens if t.logprob is not None)
        prompt = len(self.prompt_token_ids)
        assert self.stats  # it has ended
        assert self.finish_reason
        return Completion(
            id=f"cmpl-{self._call}",
            object="text_completion",
            created=int(time.time()),
            model=self.model,
            choices=(CompletionChoice(text, 0, self.finish_reason, logprobs or None),),
            usage=Usage(prompt, len(tokens), prompt + len(tokens)),
            tokens=tokens,
            prompt_token_ids=self.prompt_token_ids,
            stats=self.stats,
            trace=self.trace,
        )

    async def __aenter__(self) -> Stream:
        return self

    async def __aexit__(self, *_: object) -> None:
        with suppress(ConnectionFailed):  # then nobody is left to cancel it
            await self.cancel()
        self._client._forget(self._call)


class AsyncClient:
    """A connection to a pipeline, by name ("default") or address (ipc://…, tcp://…)."""

    def __init__(self, pipeline: str = "default", *, timeout_s: float = 3.0) -> None:
        self.pipeline, self.timeout_s = pipeline, timeout_s
        self._calls = itertools.count(1)
        self._inboxes: dict[int, asyncio.Queue[wire.Message | OutriderError]] = {}
        self._link: Link | None = None
        self._heard = 0.0

    async def __aenter__(self) -> AsyncClient:
        address = address_of(self.pipeline)
        self._link = Link(address, self._on_message)
        try:
            await self._reach(address)
        except BaseException:
            self._link.close()
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
                    raise ConnectionFailed(
                        f"no coordinator answers at {address}; start one with `outrider serve`"
                    ) from None
                await asyncio.sleep(0.02)

    async def __aexit__(self, *_: object) -> None:
        if self._link:
            self._link.close()

    # ---- requests -------------------------------------------------------------------------------

    async def create_completion(
        self,
        prompt: str | Sequence[int],
        *,
        max_tokens: int | None = None,
        temperature: float = 0.1,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        repeat_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
        logit_bias: Mapping[int, float] | None = None,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        logprobs: bool = False,
        ignore_eos: bool = False,
        mode: Literal["plain", "sync", "pipelined", "auto"] | None = None,
        n_draft: int | None = None,
        n_min: int | None = None,
        p_min: float | None = None,
        stream: bool = False,
        trace: bool = False,
        messages: Sequence[Mapping[str, str]] | None = None,
    ) -> Any:
        """Generate up to `max_tokens` tokens after `prompt` (None: until the context is full).

        Returns a `Completion`, or with `stream` a `Stream`. The text depends on prompt, seed and
        sampling settings alone, never on `mode`, nor on the lengths of blocks: `n_draft` drafted
        tokens at most, `n_min` at least, none that the draft gave less than `p_min` (None: as the
        pipeline is set). Raises OutriderError.
        """
        sampling = Sampling(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repeat_penalty=repeat_penalty,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            logit_bias=tuple(sorted((logit_bias or {}).items())),
            seed=secrets.randbits(31) if seed is None or seed < 0 else seed,
        )
        call = next(self._calls)
        submit = wire.Submit(
            call=call,
            prompt=prompt if isinstance(prompt, str) else tuple(prompt),
            messages=None
            if messages is None
            else tuple((m["role"], m["content"]) for m in messages),
            sampling=sampling,
            n_predict=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            mode=mode,
            n_draft=n_draft,
            trace=trace,
            n_min=n_min,
            p_min=p_min,
        )
        answer = Stream(self, call)
        self._inboxes[call] = answer._inbox
        try:
            self._send(submit)
        except OutriderError:
            self._forget(call)
            raise
        if stream:
            return answer
        async with answer:
            return await answer.result()

    async def create_chat_completion(
        self, messages: Sequence[Mapping[str, str]], **settings: Any
    ) -> Any:
        """As `create_completion`, after the model's chat template around `messages`."""
        return await self.create_completion("", messages=messages, **settings)

    # ---- questions ------------------------------------------------------------------------------

    async def tokenize(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The target's token ids of `text`; with `special`, markers become control tokens."""
        answer = await self._ask(lambda call: wire.Tokenize(call, text, special))
        tokens: tuple[int, ...] = answer.tokens
        return tokens

    async def detokenize(self, tokens: Sequence[int]) -> str:
        answer = await self._ask(lambda call: wire.Detokenize(call, tuple(tokens)))
        return str(answer.text)

    async def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The model's chat template around `messages`, ending where the answer begins."""
        pairs = tuple((m["role"], m["content"]) for m in messages)
        return str((await self._ask(lambda call: wire.Render(call, pairs))).text)

    async def health(self, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """State of coordinator, workers and requests."""
        report: dict[str, Any] = (await self._ask(wire.Health, timeout_s)).report
        return report

    async def stop(self) -> None:
        """End the pipeline, once what it is generating is finished."""
        await self._ask(wire.Stop)

    async def _ask(self, question: Any, timeout_s: float = ANSWER_S) -> Any:
        call = next(self._calls)
        inbox = self._inboxes[call] = asyncio.Queue()
        try:
            self._send(question(call))
            async with asyncio.timeout(timeout_s):
                answer = await inbox.get()
        except TimeoutError:
            raise RequestTimeout(f"no answer within {timeout_s:.1f} s") from None
        finally:
            self._forget(call)
        if isinstance(answer, wire.Failed):
            raise from_code(answer.code, answer.message)
        return answer

    # ---- the connection -------------------------------------------------------------------------

    def _send(self, message: wire.Message) -> None:
        if self._link is None:
            raise InternalError("use the client inside `async with`")
        check(message)
        try:
            self._link.send(message)
        except PeerGone:
            raise ConnectionFailed(f"the coordinator of {self.pipeline!r} is gone") from None

    def _on_message(self, message: wire.Message) -> None:
        self._heard = time.monotonic()
        call = message.id if isinstance(message, wire.Failed) else getattr(message, "call", None)
        if call in self._inboxes:
            self._inboxes[call].put_nowait(message)

    async def _next(
        self, inbox: asyncio.Queue[wire.Message | OutriderError]
    ) -> wire.Message | OutriderError:
        while True:
            try:
                async with asyncio.timeout(1.0):  # wait_for (3.11) may swallow a cancellation
                    return await inbox.get()
            except TimeoutError:
                if time.monotonic() - self._heard > SILENCE_S:
                    raise ConnectionFailed(
                        f"the coordinator of {self.pipeline!r} went away before the answer ended"
                    ) from None

    def _forget(self, call: int) -> None:
        self._inboxes.pop(call, None)


def connect(pipeline: str = "default", *, timeout_s: float = 3.0) -> AsyncClient:
    """`async with outrider.connect() as client`: a pipeline by name or address."""
    return AsyncClient(pipeline, timeout_s=timeout_s)


class Client:
    """The synchronous twin: the same names without `await`; a stream is a plain iterator."""

    def __init__(self, pipeline: str = "default", *, timeout_s: float = 3.0) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="outrider", daemon=True)
        self._thread.start()
        self._client = connect(pipeline, timeout_s=timeout_s)
        try:
            self._wait(self._client.__aenter__())
        except BaseException:
            self._end()
            raise

    def create_completion(self, prompt: str | Sequence[int], **settings: Any) -> Any:
        """As `AsyncClient.create_completion`."""
        return self._answer(self._client.create_completion(prompt, **settings))

    def create_chat_completion(self, messages: Sequence[Mapping[str, str]], **settings: Any) -> Any:
        """As `AsyncClient.create_chat_completion`."""
        return self._answer(self._client.create_chat_completion(messages, **settings))

    def tokenize(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        return self._wait(self._client.tokenize(text, special=special))

    def detokenize(self, tokens: Sequence[int]) -> str:
        return self._wait(self._client.detokenize(tokens))

    def apply_template(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._wait(self._client.apply_template(messages))

    def health(self) -> dict[str, Any]:
        return self._wait(self._client.health())

    def close(self) -> None:
        self._wait(self._client.__aexit__())
        self._end()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self, answer: Coroutine[Any, Any, Any]) -> Any:
        got = self._wait(answer)
        return SyncStream(self, got) if isinstance(got, Stream) else got

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class SyncStream:
    """`Stream` without `await`."""

    def __init__(self, client: Client, stream: Stream) -> None:
        self._client, self._stream = client, stream

    def __iter__(self) -> Iterator[Fragment]:
        while True:
            try:
                yield self._client._wait(self._stream.__anext__())
            except StopAsyncIteration:
                return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def cancel(self) -> None:
        self._client._wait(self._stream.cancel())

    def result(self) -> Completion:
        return self._client._wait(self._stream.result())

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(self, *_: object) -> None:
        self._client._wait(self._stream.__aexit__())
