"""`outrider bench --record`: traces of where a draft agrees with its target.

Nothing is timed. Both models are asked in this process, token by token; with that, `bench.replay`
can play the answer again with any costs and any policy, without the models.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from outrider.core.engine import Engine
from outrider.core.sampling import Sampling, Scores, decide, propose
from outrider.core.values import Drafted, TokenId
from outrider.engines import suffix
from outrider.errors import BadRequest, ConfigError
from outrider_services.bench.prompts import Category
from outrider_services.models.loading import load_engine
from outrider_services.pipeline.arguments import own_settings
from outrider_services.pipeline.vocabularies import Texts, check_pair
from outrider_services.table import Settings
from outrider_services.terminal import tell

OFF_PATH = 12  # tokens that are recorded behind one that is wrong
GREEDY = Sampling(temperature=0.0)


def write(path: str, settings: Settings, categories: tuple[Category, ...], count: int) -> None:
    """Record the greedy answer of `count` tokens to each prompt in the JSON file at `path`.

    The file is whole after every answer. Raises OutriderError.
    """
    if settings.draft.model == suffix.NAME:
        raise ConfigError("--record is about a draft model: say -md FILE")
    found: dict[str, Any] = {}
    _save(path, found)
    with ExitStack() as stack:
        engines: list[Engine] = []
        for role in ("target", "draft"):
            engines.append(load_engine(role, own_settings(role, settings), lambda done: None))
            stack.callback(engines[-1].close)
        target, draft = engines
        require_fit(target, draft)
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


def require_fit(target: Engine, draft: Engine) -> None:
    """Raises IncompatiblePair if the two mean different texts by some token."""

    def texts_of(engine: Engine) -> Texts:
        async def texts(start: int, count: int) -> tuple[str, ...]:
            return tuple(map(engine.label, range(start, start + count)))

        return texts

    ours, theirs = target.info.vocabulary, draft.info.vocabulary
    asyncio.run(check_pair(ours, theirs, texts_of(target), texts_of(draft)))


def rendered(target: Engine, category: Category, prompt: str) -> str:
    """The text that the target reads; with its chat template, if the category is a chat."""
    if not category.chat:
        return prompt
    messages = category.messages(prompt)
    return target.render([(message["role"], message["content"]) for message in messages])


def _save(path: str, found: dict[str, Any]) -> None:
    try:
        Path(path).write_text(json.dumps(found) + "\n", "utf-8")
    except OSError as exc:
        raise ConfigError(f"cannot write {path}: {exc.strerror}") from None


def record(target: Engine, draft: Engine, prompt: Sequence[TokenId], count: int) -> dict[str, Any]:
    """A trace of the greedy answer to `prompt`, of `count` tokens or up to the end token.

    `match` and `confidence` have an entry for each token of the answer: whether the draft chose it
    too (1 or 0), and how probable the draft found its own choice; `margin` by how much the token
    won, in logits, which costs nothing to know beforehand. Where the draft chose another token,
    `rank_at_miss` has, by position, the place of the right token in the draft's list, from 1, and
    `off_path_confidence` how sure it was of each token drafted behind its own choice.
    """
    known = target.info.vocabulary.size
    match: list[int] = []
    confidence: list[float] = []
    off_path: dict[str, list[float]] = {}
    ranks: dict[str, int] = {}
    text = list(prompt)
    margins: list[float] = []
    right, margin = _said(target, text)
    for position in range(count):
        row = _row(draft, text)
        choice = _chosen(draft, row, text, known)
        match.append(int(choice.token == right))
        confidence.append(choice.confidence)
        if choice.token != right:
            score = row[right] if right < len(row) else -math.inf  # it may not know the token
            ranks[str(position)] = 1 + int((row[:known] > score).sum())
            off_path[str(position)] = _goes_on(draft, [*text, choice.token], known)
        margins.append(round(margin, 2))
        text.append(right)
        if right in target.info.vocabulary.ends:
            break
        right, margin = _said(target, text)
    for engine in (target, draft):
        engine.rewind(0, 0)
    behind = {"rank_at_miss": ranks, "off_path_confidence": off_path}
    return {"match": match, "confidence": confidence, "margin": margins, **behind}


def _goes_on(draft: Engine, text: list[TokenId], known: int) -> list[float]:
    """How sure the draft is of each of the next tokens, were all that it drafts right."""
    found = []
    for _ in range(OFF_PATH):
        choice = _choice(draft, text, known)
        found.append(choice.confidence)
        text.append(choice.token)
    return found


def _said(target: Engine, text: Sequence[TokenId]) -> tuple[TokenId, float]:
    """What the target says after `text`, and by how much that won."""
    return decide(_row(target, text), GREEDY, text, len(text))


def _choice(engine: Engine, text: Sequence[TokenId], known: int | None = None) -> Drafted:
    """The likeliest token after `text`, among the ids below `known`."""
    return _chosen(engine, _row(engine, text), text, known)


def _chosen(
    engine: Engine, row: Scores, text: Sequence[TokenId], known: int | None = None
) -> Drafted:
    size = engine.info.vocabulary.size
    return propose(row, GREEDY, text, len(text), n_vocab=min(known or size, size))


def _row(engine: Engine, text: Sequence[TokenId]) -> Scores:
    """The logits of what may follow `text`.

    The KV cache of `engine` must hold a beginning of `text`; that is not evaluated again.
    """
    kept = min(engine.length(0), len(text) - 1)
    if engine.length(0) > kept:
        engine.rewind(0, kept)
        kept = engine.length(0)
    while len(text) - kept > engine.info.chunk:
        engine.extend(0, text[kept : kept + engine.info.chunk], 0)
        kept += engine.info.chunk
    row: Scores = engine.extend(0, text[kept:], 1)[0]
    return row
