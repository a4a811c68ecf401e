"""A whole answer: the shape of OpenAI's object, and what outrider knows besides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from outrider.client.hermes import ToolCall
from outrider.core.stats import Report
from outrider.core.values import Reason, Span, Token, TopLogprob

FinishReason = Reason | Literal["tool_calls"]


@dataclass(frozen=True, slots=True)
class CompletionChoice:
    """The answer; `logprobs` has one number per token, if they were asked for.

    `top_logprobs` has for each token the likeliest ones at its position, if they were asked for.
    All are the target's own, before penalties, filters and temperature.
    If it may call tools, its calls are in `tool_calls` and not in `text`.
    """

    text: str
    index: int
    finish_reason: FinishReason
    logprobs: tuple[float, ...] | None
    top_logprobs: tuple[tuple[TopLogprob, ...], ...] | None
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """How many tokens the prompt and the answer have."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer; `choices` has exactly one element."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: tuple[CompletionChoice, ...]
    usage: Usage
    tokens: tuple[Token, ...]
    prompt_token_ids: tuple[int, ...]
    stats: Report
    trace: tuple[Span, ...] | None  # None unless it was asked for

    @property
    def text(self) -> str:
        """The text of the answer."""
        return self.choices[0].text

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The tools that the answer calls."""
        return self.choices[0].tool_calls
