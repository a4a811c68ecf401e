"""An answer while it comes."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Protocol

from outrider.client.hermes import Parser, gathered
from outrider.client.inboxes import Inbox
from outrider.client.results import Completion, CompletionChoice, FinishReason, Usage
from outrider.core.stats import Report
from outrider.core.values import Fragment, Span
from outrider.errors import ConnectionFailed, OutriderError, WorkerLost, from_code
from outrider.wire import messages as wire


class Feeder(Protocol):
    """What a stream needs of the client that it belongs to."""

    def _open(self, call: int) -> Inbox: ...
    async def _next(self, inbox: Inbox) -> wire.Message | OutriderError | None: ...
    def _cancel(self, inbox: Inbox) -> None: ...
    def _abandon(self, inbox: Inbox) -> None: ...
    def _release(self, inbox: Inbox) -> None: ...
    def _adopt(self, inbox: Inbox) -> None: ...


class Stream:
    """An answer as it is committed: iterate over its fragments.

    Leaving `async with` cancels it; so does dropping it, for nobody can read it any more. If the
    answer may call tools, its calls come in the fragments' `tool_calls`, and not in their texts.
    When the coordinator is restarted or the connection lost, it goes on with the very next token.
    """

    def __init__(
        self, client: Feeder, call: int, *, traced: bool = False, parser: Parser | None = None
    ) -> None:
        self.model = ""
        self.prompt_token_ids: tuple[int, ...] = ()
        self.fragments: list[Fragment] = []
        self.stats: Report | None = None  # live to 0.1 s; None until the first fragment
        self.spans: list[Span] = []  # of the trace, those that have come
        self.trace: tuple[Span, ...] | None = None
        self.finish_reason: FinishReason | None = None
        self._client, self._call, self._traced = client, call, traced
        self._parser = parser
        self._error: OutriderError | None = None
        self._inbox: Inbox = client._open(call)

    def __del__(self) -> None:
        self._abandon()

    def _abandon(self) -> None:
        """Cancel it from whatever thread this is, and keep nothing for it: nobody will read it."""
        if self.finish_reason is None and self._error is None:
            self._client._abandon(self._inbox)

    def __aiter__(self) -> AsyncIterator[Fragment]:
        return self

    async def __anext__(self) -> Fragment:
        while self.finish_reason is None:
            if self._error:
                raise self._error  # again and again: it has no other outcome
            match await self._client._next(self._inbox):
                case wire.Started(_, model, _, prompt) if self.model in ("", model):
                    self.model, self.prompt_token_ids = model, prompt
                case wire.Started(_, model):  # it is resumed, but not by the same
                    self._client._abandon(self._inbox)
                    reason = f"{model} is served now, and the answer was begun by {self.model}"
                    self._error = WorkerLost(reason, "target")
                case wire.Progress(_, fragment, stats, spans):
                    self.stats = stats or self.stats
                    self.spans += spans
                    return self._kept(fragment)
                case wire.Finished(_, reason, stats, spans):
                    self.finish_reason, self.stats = reason, stats
                    if self._traced:
                        self.trace = (*self.spans, *spans)
                    if rest := self._rest():
                        return rest
                case wire.Failed(_, code, words, param):
                    self._error = from_code(code, words, param)
                case OutriderError() as error:
                    self._error = error
        raise StopAsyncIteration

    def _kept(self, fragment: Fragment) -> Fragment:
        """The fragment, kept; with what its text has brought of tool calls apart."""
        if self._parser:
            text, calls = self._parser.feed(fragment.text)
            fragment = fragment.changed(text=text, tool_calls=calls)
        self.fragments.append(fragment)
        return fragment

    def _rest(self) -> Fragment | None:
        """The answer has ended: what was held back of it, if anything was."""
        if self._parser is None:
            return None
        text, calls = self._parser.end()
        if text or calls:
            last = self.fragments[-1].round if self.fragments else 0
            self.fragments.append(Fragment(last, text, (), (), calls))
        if self.finish_reason == "stop" and any(one.tool_calls for one in self.fragments):
            self.finish_reason = "tool_calls"
        return self.fragments[-1] if text or calls else None

    async def cancel(self) -> None:
        """Stop generating; iteration ends normally. Does nothing when called again or too late."""
        if self.finish_reason is None and self._error is None:
            self._client._cancel(self._inbox)

    async def result(self) -> Completion:
        """Read to the end and return the whole answer. Raises OutriderError if there is none."""
        async for _ in self:
            pass
        return self._whole()

    def _whole(self) -> Completion:
        tokens = tuple(token for fragment in self.fragments for token in fragment.tokens)
        text = "".join(fragment.text for fragment in self.fragments)
        calls = gathered(delta for fragment in self.fragments for delta in fragment.tool_calls)
        logprobs = tuple(t.logprob for t in tokens if t.logprob is not None)
        tops = tuple(t.top_logprobs for t in tokens if t.top_logprobs)
        prompt = len(self.prompt_token_ids)
        assert self.stats  # it has ended
        assert self.finish_reason
        return Completion(
            id=f"cmpl-{self._call}",
            object="text_completion",
            created=int(time.time()),
            model=self.model,
            choices=(
                CompletionChoice(
                    text, 0, self.finish_reason, logprobs or None, tops or None, calls
                ),
            ),
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
