"""Events and commands of sessions as lines for the log, without anybody's text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass
from typing import Any

from outrider.core.events import OpenDraft, Prefill
from outrider.core.values import Value
from outrider.wire.messages import Failed

SHOWN = 16  # most items of a tuple to write out; of a longer one only their number is written
HIDDEN = {
    "piece", "pieces", "text", "sampling", "logprobs", "top_logprobs", "margins", "floors", "ends",
    "constraint",
}  # fmt: skip


def line(number: int, event: Any, commands: Iterable[Any], state: str) -> str:
    """A line such as `request 3: Verdict(…) -> Verify(…), Commit(…); VERIFYING, draft DRAFTING`."""
    led_to = ", ".join(map(brief, commands)) or "nothing"
    return f"request {number}: {brief(event)} -> {led_to}; {state}"


def outcome(last: Any) -> str:
    """How a request ended, in the words for the log; a message might quote somebody's text."""
    if isinstance(last, Failed):
        return f"failed ({last.code})"
    return f"{last.reason}, {last.stats.generated_tokens} tokens"


def brief(value: Any) -> str:
    """The value with its short fields; text is left out."""
    if isinstance(value, Value):
        names: Iterable[str] = value.__struct_fields__
    elif is_dataclass(value):
        names = [field.name for field in fields(value)]
    elif isinstance(value, tuple):
        return f"[{', '.join(map(brief, value))}]" if len(value) <= SHOWN else f"({len(value)})"
    else:
        return f"{value:.4g}" if isinstance(value, float) else f"{value}"
    shown = {name: brief(getattr(value, name)) for name in names if name not in HIDDEN}
    if isinstance(value, Prefill | OpenDraft):
        shown["tokens"] = f"({len(value.tokens)})"  # a prompt is nobody's to read
    return f"{type(value).__name__}({', '.join(f'{n}={v}' for n, v in shown.items())})"
