"""The synchronous client: the asynchronous one on an event loop in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Generic, Literal, TypeVar, Unpack, overload

from outrider.client.asynchronous import ANSWER_S, AsyncClient
from outrider.client.chat import Messages, Tool, ToolChoice
from outrider.client.connection import FORKED
from outrider.client.results import Completion, FinishReason
from outrider.client.settings import CompletionSettings, Ids, Prompt
from outrider.client.stream import Stream
from outrider.core.stats import Report
from outrider.core.values import Fragment, Span
from outrider.errors import ConnectionFailed, OutriderError
from outrider.wire.connections import check_room
from outrider.wire.keys import ClientRole, Keys

T = TypeVar("T")
Work = Callable[[], Coroutine[Any, Any, T]]


class Call(Generic[T]):
    """Work for a loop in another thread, and its outcome.

    It is there before it begins: whatever interrupts who waits for it, it can be given up.
    """

    def __init__(self, work: Work[T]) -> None:
        self.outcome: Future[T] = Future()
        self._work = work
        self._task: asyncio.Task[T] | None = None

    def begin(self) -> None:
        """On the loop."""
        self._task = asyncio.ensure_future(self._work())
        self._task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[T]) -> None:
        if task.cancelled():
            self.outcome.set_exception(ConnectionFailed("the call was given up"))
        elif error := task.exception():
            self.outcome.set_exception(error)
        else:
            self.outcome.set_result(task.result())

    def give_up(self) -> None:
        """On the loop: nobody waits for the outcome."""
        if self._task and not self._task.cancel() and not self._task.exception():
            abandon(self._task.result())


def abandon(answer: object) -> None:
    """Cancel `answer` if it is a stream: nobody will read it."""
    if isinstance(answer, Stream):
        answer._abandon()


def serve(loop: asyncio.AbstractEventLoop, client: AsyncClient, ended: asyncio.Event) -> None:
    """What a client's thread does."""

    async def until_ended() -> None:
        await ended.wait()
        await client.close()
        calls = asyncio.all_tasks() - {asyncio.current_task()}  # other threads' calls: they fail
        await asyncio.gather(*calls, return_exceptions=True)

    loop.run_until_complete(until_ended())
    loop.close()


def end(loop: asyncio.AbstractEventLoop, ended: asyncio.Event, process: int) -> None:
    """Let `serve` end, if it is in this process; from any thread."""
    if process == os.getpid():
        with suppress(RuntimeError):  # it has ended
            loop.call_soon_threadsafe(ended.set)


class Client:
    """`AsyncClient` without `await`; a stream is a plain iterator. Threads may share it.

    It connects when it is made, and then raises ConnectionFailed if there is no coordinator.
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
        self._client = AsyncClient(
            pipeline,
            timeout_s=timeout_s,
            resume_s=resume_s,
            keys=keys,
            role=role,
            insecure=insecure,
        )
        check_room()  # the loop, too, has descriptors
        self._loop, ended = asyncio.new_event_loop(), asyncio.Event()
        self._lock = threading.RLock()  # nothing is given to a loop that is closing
        self._closed = False
        self._process = os.getpid()
        # the thread does not know this object: one that is dropped ends as if it were closed
        self._thread = threading.Thread(
            target=serve, args=(self._loop, self._client, ended), name="outrider", daemon=True
        )
        self._end = weakref.finalize(self, end, self._loop, ended, self._process)
        self._end.atexit = False
        self._thread.start()
        try:
            self._wait(self._client.__aenter__)
        except BaseException:
            self.close()
            raise

    @property
    def pipeline(self) -> str:
        """The name or address that was given."""
        return self._client.pipeline

    @property
    def timeout_s(self) -> float:
        """How long connecting may take, in seconds."""
        return self._client.timeout_s

    @property
    def resume_s(self) -> float:
        """How long answers wait for a coordinator that is gone, in seconds."""
        return self._client.resume_s

    @overload
    def create_completion(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion: ...
    @overload
    def create_completion(
        self, prompt: Prompt, *, stream: Literal[True], **settings: Unpack[CompletionSettings]
    ) -> SyncStream: ...
    @overload
    def create_completion(
        self, prompt: Prompt, *, stream: bool | None, **settings: Unpack[CompletionSettings]
    ) -> Completion | SyncStream: ...
    def create_completion(
        self,
        prompt: Prompt,
        *,
        stream: bool | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion | SyncStream:
        """Generate after `prompt`, a text or token ids.

        Returns a `Completion`, or with `stream` a `SyncStream`. The settings are those of
        `outrider.CompletionSettings`. The text depends on prompt, seed and sampling settings alone,
        never on `mode`, `n_draft`, `n_min` or `p_min`.
        """
        return self._answer(
            lambda: self._client.create_completion(prompt, stream=stream, **settings)
        )

    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: Literal[False] | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion: ...
    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: Literal[True],
        **settings: Unpack[CompletionSettings],
    ) -> SyncStream: ...
    @overload
    def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: bool | None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion | SyncStream: ...
    def create_chat_completion(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
        stream: bool | None = None,
        **settings: Unpack[CompletionSettings],
    ) -> Completion | SyncStream:
        """As `create_completion`, with `messages` in the model's chat template as the prompt.

        The answer may call the functions of `tools`. With `tool_choice` "none" it is told of none;
        with "required", or a function, it is made of calls, which fit the functions' schemas.
        """
        return self._answer(
            lambda: self._client.create_chat_completion(
                messages, tools=tools, tool_choice=tool_choice, stream=stream, **settings
            )
        )

    def tokenize(self, text: str, *, special: bool = True) -> tuple[int, ...]:
        """The target's token ids of `text`; with `special`, markers become control tokens."""
        return self._wait(lambda: self._client.tokenize(text, special=special))

    def detokenize(self, tokens: Ids) -> str:
        """The text of these token ids."""
        return self._wait(lambda: self._client.detokenize(tokens))

    def apply_template(
        self,
        messages: Messages,
        *,
        tools: Sequence[Tool] | None = None,
        tool_choice: ToolChoice | None = None,
    ) -> str:
        """`messages` in the model's chat template, up to where the answer begins."""
        return self._wait(
            lambda: self._client.apply_template(messages, tools=tools, tool_choice=tool_choice)
        )

    def infill_prompt(
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
        return self._wait(
            lambda: self._client.infill_prompt(prefix, suffix, start=start, extra=extra, room=room)
        )

    def health(self, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """The state of coordinator, workers and requests."""
        return self._wait(lambda: self._client.health(timeout_s=timeout_s))

    def metrics(self, *, timeout_s: float = ANSWER_S) -> dict[str, Any]:
        """What the coordinator has counted over all requests: values by metric, then by label."""
        return self._wait(lambda: self._client.metrics(timeout_s=timeout_s))

    def stop(self) -> None:
        """End the pipeline as soon as it has finished what it is generating."""
        self._wait(self._client.stop)

    def close(self) -> None:
        """End the connection; whoever still waits gets ConnectionFailed. May be called again.

        In a process that was forked it does nothing: the connection is the parent's.
        """
        if self._process == os.getpid():
            with self._lock:
                self._closed = True
            self._end()
            self._thread.join()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self, answer: Work[Completion | Stream]) -> Completion | SyncStream:
        got = None
        try:
            got = self._wait(answer)
            return SyncStream(self, got) if isinstance(got, Stream) else got
        except BaseException:
            abandon(got)
            raise

    def _wait(self, work: Work[T]) -> T:
        call = Call(work)
        try:
            self._begin(call)
            return call.outcome.result()
        except BaseException:  # Ctrl-C: nobody waits for the answer any more
            if self._process == os.getpid():
                with suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(call.give_up)
            raise

    def _begin(self, call: Call[Any]) -> None:
        if self._process != os.getpid():  # before the lock: the parent may have held it
            raise ConnectionFailed(FORKED)
        with self._lock:
            if self._closed:
                raise ConnectionFailed("the client is closed")
            self._loop.call_soon_threadsafe(call.begin)


class SyncStream:
    """`Stream` without `await`: iterate over its fragments.

    Leaving `with` cancels it, and so do dropping it and a Ctrl-C while it waits for a fragment.
    """

    def __init__(self, client: Client, stream: Stream) -> None:
        self._client, self._stream = client, stream

    def __iter__(self) -> Iterator[Fragment]:
        return self

    def __next__(self) -> Fragment:
        if self.finish_reason is not None:
            raise StopIteration  # even after the client was closed
        try:
            return self._client._wait(self._stream.__anext__)
        except StopAsyncIteration:
            raise StopIteration from None
        except OutriderError:
            raise
        except BaseException:  # Ctrl-C
            with suppress(ConnectionFailed):
                self._client._begin(Call(self._stream.cancel))
            raise

    @property
    def model(self) -> str:
        """The target's name; "" until the first fragment."""
        return self._stream.model

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        """The prompt as the target reads it; empty until the first fragment."""
        return self._stream.prompt_token_ids

    @property
    def fragments(self) -> list[Fragment]:
        """Those that have come so far."""
        return self._stream.fragments

    @property
    def stats(self) -> Report | None:
        """The figures so far; None until the first fragment."""
        return self._stream.stats

    @property
    def spans(self) -> list[Span]:
        """Those of the trace that have come so far."""
        return self._stream.spans

    @property
    def trace(self) -> tuple[Span, ...] | None:
        """When which worker computed; None before the end, or if it was not asked for."""
        return self._stream.trace

    @property
    def finish_reason(self) -> FinishReason | None:
        """None until the end."""
        return self._stream.finish_reason

    def cancel(self) -> None:
        """Stop generating; iteration ends normally. Does nothing when called again or too late."""
        if self.finish_reason is None:
            self._client._wait(self._stream.cancel)

    def result(self) -> Completion:
        """Read to the end and return the whole answer. Raises OutriderError if there is none."""
        for _ in self:
            pass
        return self._stream._whole()

    def __enter__(self) -> SyncStream:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ConnectionFailed):  # then nobody is left to cancel it
            self.cancel()
