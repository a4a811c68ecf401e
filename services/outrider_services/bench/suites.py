"""Questions in the files of others: Spec-Bench's and HumanEval's, a JSON object on each line.

Spec-Bench (arXiv 2401.07851, and FastChat's before it) has `category` and `turns`, messages of one
user, of which the first is asked. HumanEval (arXiv 2107.03374) has `task_id` and `prompt`, the
beginning of a program.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider_services.bench.prompts import Category
from outrider_services.options import nearest

MOST_BYTES = 64 << 20  # of a file, unpacked


def load(path: str, names: Sequence[str], count: int) -> list[Category]:
    """The first `count` questions of each category, or of those called `names`.

    Raises ConfigError.
    """
    found: dict[tuple[str, bool], list[str]] = {}
    for number, line in enumerate(_text(path).splitlines(), 1):
        if line.strip():
            category, chat, question = _question(path, number, line)
            found.setdefault((category, chat), []).append(question)
    known = {category for category, _ in found}
    for name in names:
        if name not in known:
            raise ConfigError(f"{path} has no category {name!r}{nearest(name, known)}")
    wanted = [key for key in found if key[0] in (names or known)]
    for category, _ in wanted:
        if len(found[category, _]) < count:
            few = len(found[category, _])
            raise ConfigError(f"{path} has {few} questions of {category}, not {count}")
    if not wanted:
        raise ConfigError(f"{path} has no question")
    return [Category(name, chat, tuple(found[name, chat][:count])) for name, chat in wanted]


def _text(path: str) -> str:
    try:
        with gzip.open(path) if path.endswith(".gz") else Path(path).open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except (OSError, EOFError) as exc:
        reason = getattr(exc, "strerror", None) or "it is not packed by gzip"
        raise ConfigError(f"cannot read {path}: {reason}") from None
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path} has more than {MOST_BYTES >> 20} MiB")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not UTF-8") from None


def _question(path: str, number: int, line: str) -> tuple[str, bool, str]:
    """The category of the question on a line, whether it is a message, and the question."""
    try:
        told: Any = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        told = None
    match told:
        case {"category": str(category), "turns": [str(question), *_]} if category and question:
            return category, True, question
        case {"task_id": str(task), "prompt": str(question)} if question:
            return task.partition("/")[0] or "tasks", False, question
    raise ConfigError(
        f"{path}, line {number}: a question is an object with category and turns (Spec-Bench), "
        "or with task_id and prompt (HumanEval)"
    )
