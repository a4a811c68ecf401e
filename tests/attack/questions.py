"""Questions to a pipeline on the toy engine, and the one right answer of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

from tests.oracle import alone

from outrider.core.sampling import Sampling
from outrider.core.text import TextStream
from outrider.engines.toy import ToyEngine


@dataclass(frozen=True)
class Question:
    """A request as a client makes it; `settings` are keywords of `create_completion`."""

    prompt: str
    count: int
    sampling: tuple[tuple[str, float], ...] = (("temperature", 0.0),)
    stop: tuple[str, ...] = ()
    chat: bool = False
    logprobs: bool = False
    cancelled_after: int | None = None  # tokens; None: read to the end
    mode: str = "pipelined"
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def settings(self) -> dict[str, Any]:
        """The keywords; a greedy question has a seed as well, so that nothing is drawn."""
        return {
            "max_tokens": self.count,
            "seed": 0,
            **dict(self.sampling),
            "mode": self.mode,
            "stop": list(self.stop) or None,
            "logprobs": self.logprobs or None,
            **self.extra,
        }

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.prompt}]


@lru_cache(maxsize=1024)
def answer_to(question: Question) -> tuple[int, ...]:
    """The token ids that the reference says, with the target alone, in this process."""
    engine = ToyEngine()
    messages = [(one["role"], one["content"]) for one in question.messages]
    prompt = engine.render(messages) if question.chat else question.prompt
    given: dict[str, Any] = {"seed": 0, **dict(question.sampling)}
    tokens = engine.tokenize(prompt, special=True)
    return tuple(islice(alone(engine, tokens, Sampling(**given)), question.count))


def text_of(ids: Sequence[int], stops: Sequence[str], ended: bool) -> tuple[str, bool]:
    """The text of these tokens, up to a stop string, and whether there is one.

    If they have not `ended`, what may still begin a stop string or a character is left out.
    """
    engine, stream, text = ToyEngine(), TextStream(stops), ""
    for token in ids:
        more, stopped = stream.feed(engine.piece(token))
        text += more
        if stopped:
            return text, True
    return text + (stream.end() if ended else ""), False


def fault_in(question: Question, ids: Sequence[int], text: str, reason: str | None) -> str | None:
    """What is wrong with an answer that finished for `reason`; None: it was cut by an error."""
    right, shown = answer_to(question), repr(question.prompt[:40])
    if tuple(ids) != right[: len(ids)]:
        both = zip(ids, [*right, None], strict=False)
        at = next(n for n, (one, other) in enumerate(both) if one != other)
        return f"token {at} after {shown} is wrong"
    own, stopped = text_of(ids, question.stop, reason is not None)
    if text != own:
        return f"the text after {shown} is {text!r} instead of {own!r}"
    if reason in ("stop", "length") and not stopped and len(ids) != len(right):
        return f"{len(ids)} tokens after {shown} instead of {len(right)}"
    return None


def steady(number: int, count: int) -> Question:
    """The one question that the undisturbed client `number` asks again and again."""
    return Question(f"Number {number} of those who wait for the river", count)


def answered(question: Question) -> Question:
    """The same; its answer is known from now on."""
    answer_to(question)
    return question
