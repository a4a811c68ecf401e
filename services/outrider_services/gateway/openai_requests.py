"""OpenAI's requests, and what they ask for."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, Field

from outrider_services.gateway.asking import Ask
from outrider_services.gateway.fields import Flag, Ids, Length, Sampled, length
from outrider_services.gateway.forms import CallId, Constrained, ToolCall, WithTools

Role: TypeAlias = Literal["system", "developer", "user", "assistant", "tool", "function"]
Tops: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=20)]


class StreamOptions(BaseModel):
    include_usage: Flag | None = None


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    role: Role
    content: str | Annotated[list[TextPart], Field(max_length=1024)] | None = None
    name: Annotated[str, Field(max_length=256)] | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128)] | None = None
    tool_call_id: CallId | None = None

    def plain(self) -> dict[str, Any]:
        """As the client library takes it."""
        parts = self.content
        text = "".join(part.text for part in parts) if isinstance(parts, list) else parts
        found: dict[str, Any] = {"role": self.role, "content": text}
        if self.tool_calls:
            found["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.role in ("tool", "function"):
            found.update(name=self.name, tool_call_id=self.tool_call_id)
        return found


Messages: TypeAlias = Annotated[list[Message], Field(min_length=1, max_length=1024)]


class Streamed(Sampled):
    """What both of OpenAI's requests have."""

    max_tokens: Length | None = None
    stream_options: StreamOptions | None = None

    @property
    def wants_usage(self) -> bool:
        """Whether a streamed answer is to end with its usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(Streamed, Constrained, WithTools):
    """The body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: Length | None = None
    logprobs: Flag | None = None
    top_logprobs: Tops | None = None

    def ask(self) -> Ask:
        """What it asks for. Raises BadRequest."""
        most = length("max_tokens", self.max_tokens)
        if self.max_completion_tokens is not None:
            most = length("max_completion_tokens", self.max_completion_tokens)
        settings = self.settings(
            most,
            {**self.form(), "constraint": self.one_call()},
            logprobs=bool(self.logprobs),
            tops=self.top_logprobs,
        )
        return Ask(
            messages=[one.plain() for one in self.messages],
            tools=self.offered(),
            tool_choice=self.choice(),
            settings=settings,
        )


class CompletionRequest(Streamed, Constrained):
    """The body of /v1/completions; a list of prompts may have one."""

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[Ids], Field(min_length=1, max_length=1)]
    )
    logprobs: Tops | None = None

    def ask(self) -> Ask:
        """What it asks for. Raises BadRequest."""
        settings = self.settings(
            length("max_tokens", self.max_tokens),
            self.form(),
            logprobs=self.logprobs is not None,
            tops=self.logprobs,
        )
        return Ask(prompt=only(self.prompt), settings=settings)


def only(prompt: str | list[int] | list[str] | list[list[int]]) -> str | list[int]:
    """The one prompt that is asked for."""
    match prompt:
        case [str() | list() as one]:
            return one
    return prompt  # type: ignore[return-value]  # mypy does not see that lists of others are gone
