"""`outrider bench --record`: where a draft agrees with its target, for policies to be tried on.

Nothing is timed: both models are asked in this process, one token after the other, and what they
say is all that `bench.replay` needs to play an answer again under any costs and policy.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from outrider.core.engine import Engine
from outrider.errors import BadRequest, ConfigError
from outrider.wire import messages as wire
from outrider_services.bench.prompts import Category
from outrider_services.bench.replay import record
from outrider_services.commands.serve import tell
from outrider_services.options import Settings
from outrider_services.pipeline.launcher import own_settings
from outrider_services.pipeline.processes import load_engine
from outrider_services.pipeline.vocabularies import Texts, check_pair


def write(path: str, settings: Settings, categories: tuple[Category, ...], count: int) -> None:
    """Record the greedy answer of `count` tokens to each prompt in the JSON file at `path`.

    The file is whole after every answer. Raises OutriderError.
    """
    found: dict[str, Any] = {}
    _save(path, found)
    with ExitStack() as stack:
        engines: list[Engine] = []
        for role in ("target", "draft"):
            engines.append(load_engine(role, own_settings(role, settings), lambda done: None))
            stack.callback(engines[-1].close)
        target, draft = engines
        check(target, draft)
        for category in categories:
            for number, prompt in enumerate(category.prompts, 1):
                name = category.name if len(category.prompts) == 1 else f"{category.name} {number}"
                text = rendered(target, category, prompt)
                tokens = target.tokenize(text, special=True)
                if len(tokens) + count > min(target.info.context, draft.info.context):
                    raise BadRequest(f"{name}: {len(tokens)} + {count} tokens exceed the context")
                trace = record(target, draft, tokens, count)
                found[name] = {"prompt": text, "prompt_tokens": len(tokens), **trace}
                _save(path, found)
                agreed, answered = sum(trace["match"]), len(trace["match"])
                tell(f"{name}: the draft agrees at {agreed} of {answered} tokens")


def check(target: Engine, draft: Engine) -> None:
    """Raises IncompatiblePair."""

    def texts_of(engine: Engine) -> Texts:
        async def texts(start: int, count: int) -> tuple[str, ...]:
            return tuple(map(engine.label, range(start, start + count)))

        return texts

    ours, theirs = (
        wire.Fingerprint(**asdict(engine.info.vocabulary)) for engine in (target, draft)
    )
    asyncio.run(check_pair(ours, theirs, texts_of(target), texts_of(draft)))


def rendered(target: Engine, category: Category, prompt: str) -> str:
    if not category.chat:
        return prompt
    messages = category.messages(prompt)
    return target.render([(message["role"], message["content"]) for message in messages])


def _save(path: str, found: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(found) + "\n", "utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from None
