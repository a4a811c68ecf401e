"""OpenAI's answers: whole, or as the chunks of a stream.

A chunk is put together from text that was made once for all chunks, and what is new in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import outrider
from outrider.client import ToolCall
from outrider.client.hermes import gathered
from outrider.core.stats import Report
from outrider.core.values import Fragment, Token, ToolCallDelta
from outrider_services.gateway.asking import Answer
from outrider_services.gateway.figures import provenance, timings
from outrider_services.gateway.sse import DONE, dump, event

FINGERPRINT = f"outrider-{outrider.__version__}"


class Form:
    """How one answer is told, by `parts` and `end`, or by `whole`."""

    prefix: ClassVar[str]  # of the answer's id
    kind: ClassVar[str]  # of the whole answer
    chunk_kind: ClassVar[str]

    def __init__(self, answer: Answer, model: str, *, usage: bool, provenance: bool) -> None:
        self.answer, self.model = answer, model
        self.id = f"{self.prefix}-{answer.name}"
        self._usage, self._provenance = usage, provenance
        self._spans = 0  # of the trace, that were told
        self._head = dump(self._named(self.chunk_kind))[:-1]
        self._tail = ',"usage":null}' if usage else "}"
        # around the text of a chunk that has nothing else to tell
        self._around = dump(self.piece("\0", None, None)).split(dump("\0"))

    # ---- for the two forms ----------------------------------------------------------------------

    def start(self) -> bytes:
        """The events before the first fragment."""
        return b""

    def choice(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        """The choice of a whole answer."""
        raise NotImplementedError

    def piece(
        self, text: str, finish: str | None, logprobs: Any, calls: Sequence[ToolCallDelta] = ()
    ) -> dict[str, Any]:
        """The choice of a chunk."""
        raise NotImplementedError

    def logprobs(self, tokens: Sequence[Token]) -> Any:
        """The log-probabilities of these tokens; None if they were not asked for."""
        raise NotImplementedError

    # ---- a stream -------------------------------------------------------------------------------

    def part(self, fragment: Fragment) -> bytes:
        """The events of a fragment: none if there is nothing to tell yet."""
        logprobs = self.logprobs(fragment.tokens)
        if not (logprobs or fragment.tool_calls or self._provenance):
            before, after = self._around
            text = f'{self._head},"choices":[{before}{dump(fragment.text)}{after}]{self._tail}'
            return event(text) if fragment.text else b""
        piece = self.piece(fragment.text, None, logprobs, fragment.tool_calls)
        return self._chunk(piece, fragment)

    def end(self) -> bytes:
        """The events behind the last fragment."""
        report = self.report()
        more = {"timings": timings(report, len(self.answer.stream.prompt_token_ids))}
        found = self._chunk(self.piece("", self.finish(), None), None, more)
        if self._usage:
            usage = dump({"choices": [], "usage": self.usage()})
            found += event(f"{self._head},{usage[1:]}")
        return found + DONE

    def _chunk(
        self, choice: dict[str, Any], fragment: Fragment | None, more: dict[str, Any] | None = None
    ) -> bytes:
        rest = dict(more or {})
        if self._provenance:
            spans = self.answer.stream.spans
            new, self._spans = spans[self._spans :], len(spans)
            rest["outrider"] = provenance(fragment, new, self.answer.stream.stats)
        elif more:
            rest["outrider"] = {"stats": self.report().as_dict()}
        added = f",{dump(rest)[1:-1]}" if rest else ""
        return event(f'{self._head},"choices":[{dump(choice)}]{added}{self._tail}')

    # ---- a whole answer -------------------------------------------------------------------------

    def whole(self) -> dict[str, Any]:
        stream, report = self.answer.stream, self.report()
        fragments = stream.fragments
        tokens = [token for fragment in fragments for token in fragment.tokens]
        figures: dict[str, Any] = {"stats": report.as_dict()}
        if self._provenance:
            every = Fragment(0, "", tuple(tokens), ())
            figures = provenance(every, stream.trace or stream.spans, report)
        return {
            **self._named(self.kind),
            "choices": [self.choice(self.answer.text, self.finish(), self.logprobs(tokens))],
            "usage": self.usage(),
            "timings": timings(report, len(stream.prompt_token_ids)),
            "outrider": figures,
        }

    def _named(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.answer.created,
            "model": self.model,
            "system_fingerprint": FINGERPRINT,
        }

    def usage(self) -> dict[str, Any]:
        prompt, answer = len(self.answer.stream.prompt_token_ids), self.report().generated_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
            "prompt_tokens_details": {"cached_tokens": self.report().cached_tokens},
        }

    def finish(self) -> str:
        assert self.answer.stream.finish_reason  # it has ended
        return self.answer.stream.finish_reason

    def report(self) -> Report:
        assert self.answer.stream.stats  # it has ended
        return self.answer.stream.stats


class ChatForm(Form):
    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def start(self) -> bytes:
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return event(f'{self._head},"choices":[{dump(choice)}]{self._tail}')

    def choice(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        deltas = [one for fragment in self.answer.stream.fragments for one in fragment.tool_calls]
        if deltas:
            message.update(content=text or None, tool_calls=[*map(called, gathered(deltas))])
        return {"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish}

    def piece(
        self, text: str, finish: str | None, logprobs: Any, calls: Sequence[ToolCallDelta] = ()
    ) -> dict[str, Any]:
        delta: dict[str, Any] = {} if finish else {"content": text}
        if calls:
            told = {"tool_calls": pieces(calls)}
            delta = {"content": text, **told} if text else told
        return {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: Sequence[Token]) -> Any:
        known = [token for token in tokens if token.logprob is not None and token.piece]
        if not known:
            return None
        return {
            "content": [
                {
                    "token": token.text,
                    "logprob": token.logprob,
                    "bytes": list(token.piece),
                    "top_logprobs": [
                        {"token": one.text, "logprob": one.logprob, "bytes": list(one.piece)}
                        for one in token.top_logprobs
                    ],
                }
                for token in known
            ],
            "refusal": None,
        }


class CompletionForm(Form):
    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, answer: Answer, model: str, *, usage: bool, provenance: bool) -> None:
        super().__init__(answer, model, usage=usage, provenance=provenance)
        self._offset = 0  # characters of the tokens that were told

    def choice(self, text: str, finish: str | None, logprobs: Any) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def piece(
        self, text: str, finish: str | None, logprobs: Any, calls: Sequence[ToolCallDelta] = ()
    ) -> dict[str, Any]:
        return self.choice(text, finish, logprobs)

    def logprobs(self, tokens: Sequence[Token]) -> Any:
        known = [token for token in tokens if token.logprob is not None and token.piece]
        if not known:
            return None
        offsets = []
        for token in known:
            offsets.append(self._offset)
            self._offset += len(token.text)
        return {
            "tokens": [token.text for token in known],
            "token_logprobs": [token.logprob for token in known],
            "top_logprobs": [
                {one.text: one.logprob for one in token.top_logprobs} for token in known
            ]
            if any(token.top_logprobs for token in known)
            else None,
            "text_offset": offsets,
        }


def called(call: ToolCall) -> dict[str, Any]:
    """A whole call as OpenAI has it."""
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def pieces(deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    """What a chunk tells of calls, each once: clients add up chunks, not parts of one."""
    found: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.index not in found:
            named = {"id": delta.id, "type": "function"} if delta.id else {}
            function = {"name": delta.name} if delta.name else {}
            found[delta.index] = {
                "index": delta.index,
                **named,
                "function": {**function, "arguments": ""},
            }
        found[delta.index]["function"]["arguments"] += delta.arguments
    return list(found.values())
