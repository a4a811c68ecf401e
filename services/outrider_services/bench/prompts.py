"""The prompts that `outrider bench` generates after, by category."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider_services.options import nearest


@dataclass(frozen=True, slots=True)
class Category:
    name: str
    chat: bool  # its prompts are messages of the user, not the beginning of the text
    prompts: tuple[str, ...]
    system: str = ""  # the first message of the chat

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The chat that asks `prompt`."""
        roles = [("system", self.system)] if self.system else []
        return [{"role": role, "content": text} for role, text in (*roles, ("user", prompt))]


def load(path: str | None, names: Sequence[str], count: int) -> list[Category]:
    """`count` prompts of each category in the file, or of those called `names`. Raises ConfigError.

    Without `path` it is the file that comes with outrider.
    """
    source = path or "prompts.toml"
    try:
        text = (Path(path) if path else files(__package__) / source).read_text("utf-8")
        table = tomllib.loads(text)
    except OSError as exc:
        raise ConfigError(f"cannot read {source}: {exc.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{source} is not TOML: {exc}") from None
    for name in names:
        if name not in table:
            raise ConfigError(f"{source} has no category {name!r}{nearest(name, table)}")
    found = [_category(source, name, table[name], count) for name in names or table]
    if not found:
        raise ConfigError(f"{source} has no category")
    return found


def _category(source: str, name: str, entry: Any, count: int) -> Category:
    system = entry.get("system", "") if isinstance(entry, dict) else ""
    match entry:
        case {"chat": bool(chat), "prompts": list(prompts)} if (
            entry.keys() <= {"chat", "prompts", "system"}
            and prompts
            and all(isinstance(text, str) for text in (*prompts, system))
            and all(prompts)
        ):
            if system and not chat:
                raise ConfigError(f"{source}: {name} has a system message, but is no chat")
            if len(prompts) < count:
                raise ConfigError(f"{source} has {len(prompts)} prompts of {name}, not {count}")
            return Category(name, chat, tuple(prompts[:count]), system)
    raise ConfigError(
        f"{source}: {name} needs chat = true or false and prompts = [text, …]; a chat may have "
        "system = text; nothing else"
    )
