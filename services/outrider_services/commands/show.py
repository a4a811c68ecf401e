"""`outrider show`: the settings that `run` and `serve` would use, and where each came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from typing import Any

from outrider.errors import OutriderError
from outrider_services import sources
from outrider_services.commands.prepared import with_files
from outrider_services.options import OPTIONS, Option, Parser, given_flags
from outrider_services.table import Settings
from outrider_services.tuning import search

SECTIONS = tuple(section.name for section in fields(Settings))
SECRETS = ("_key", "_keys", "_password")  # a setting whose name ends so is nobody's to read
HIDDEN = "***"


@dataclass(frozen=True, slots=True)
class Line:
    """A setting with its value and its source."""

    option: Option
    value: Any
    source: str  # "flag", "environment", "file", "tuned" or "default"
    name: str | None = None  # of the flag, the variable or the file

    @property
    def shown(self) -> Any:
        """The value, if it may be seen."""
        return HIDDEN if self.value and self.option.key.endswith(SECRETS) else self.value

    def as_toml(self) -> str:
        """As a configuration file would have it; what has no value is a comment."""
        source = f"{self.source} {self.name}" if self.name else self.source
        value = self.shown
        setting = f"# {self.option.key}" if value is None else f"{self.option.key} = {toml(value)}"
        return f"{setting:<40}  # {source}"


def flags(parser: Parser) -> None:
    parser.description = (
        "Show every setting that run and serve would use with the same flags, and where it came "
        "from. What is printed is a configuration file."
    )
    parser.add_argument("--json", action="store_true", help="as a JSON object")


def show(settings: Settings, parsed: Any) -> int:
    """Print them; nothing is started, fetched or measured."""
    # from the sources again: in `settings`, what `auto` means for this command's log is decided
    given = sources.given(given_flags(parsed), parsed.config)
    found = lines(given, sources.settings(given_flags(parsed), parsed.config))
    if parsed.json:
        shown = {
            line.option.key: {"value": line.shown, "source": line.source, "name": line.name}
            for line in found
        }
        print(json.dumps(shown, indent=2))
    else:
        print("\n".join(line.as_toml() for line in found))
    return 0


def lines(given: Mapping[str, sources.Given], settings: Settings) -> list[Line]:
    """All settings, in the order of the table."""
    files = with_files_here(settings)
    used = tuned(files)
    found = []
    for key, option in OPTIONS.items():
        value, one = option.of(used), given.get(key)
        is_from_hub = key.endswith(".model") and key.replace("model", "hf") in given
        if value != option.of(files):
            found.append(Line(option, value, "tuned"))
        elif one is None:
            found.append(Line(option, option.default if is_from_hub else value, "default"))
        else:
            found.append(Line(option, one.value, one.source, one.name))
    return found


def with_files_here(settings: Settings) -> Settings:
    """The settings with model files in place of names, if the files are here."""
    here = replace(settings, pipeline=replace(settings.pipeline, offline=True))
    with suppress(OutriderError):
        here = with_files(here, fetch=False)
    return replace(settings, target=here.target, draft=here.draft)


def tuned(settings: Settings) -> Settings:
    """The settings as what was measured here earlier changes them."""
    decision = search.kept(settings)
    with suppress(OSError):
        return search.decided(settings, decision) if decision else settings
    return settings


def toml(value: Any) -> str:
    """A value as TOML spells it."""
    if isinstance(value, tuple):
        return f"[{', '.join(map(toml, value))}]"
    # of what a setting may be, JSON spells as TOML does
    return json.dumps(value, ensure_ascii=False)
