"""Where settings come from: flags, the environment, a file; see `options` for which there are."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs

from outrider.errors import ConfigError
from outrider_services.options import OPTIONS, as_text, checked, nearest
from outrider_services.table import Settings

# what Kubernetes tells of services named outrider, or outrider- and something
FOREIGN = re.compile(
    r"OUTRIDER(_[A-Z0-9]+)*_(SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT(_\d+_[A-Z]+(_[A-Z]+)?)?)"
)


def from_file(path: Path) -> dict[str, Any]:
    """The settings in a TOML file. Raises ConfigError naming each key that is wrong."""
    try:
        tables = tomllib.loads(path.read_text())
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}") from None
    except (ValueError, RecursionError) as exc:  # also of a number or a nest without end
        raise ConfigError(f"{path} is not TOML: {exc}") from None
    values, wrong = {}, []
    for section, table in tables.items():
        for name, value in table.items() if isinstance(table, dict) else [("", table)]:
            key = f"{section}.{name}" if name else section
            option = OPTIONS.get(key)
            if option is None:
                wrong.append(f"unknown key {key}{nearest(key, OPTIONS)}")
                continue
            texts = value if isinstance(value, list) else [value]
            try:
                read = [option.read(as_text(one)) for one in texts]
                if len(read) != 1 and not option.repeats:
                    raise ValueError("one value")
            except ValueError as exc:
                wrong.append(f"{key} must be {exc}, not {value!r}")
                continue
            values[key] = tuple(read) if option.repeats else read[0]
    if wrong:
        raise ConfigError(f"{path}: " + "; ".join(wrong))
    return values


def from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """The settings in `OUTRIDER_SECTION__KEY` variables; an empty one is unset.

    Others that only begin with OUTRIDER_ are somebody else's, such as those that Kubernetes makes
    for a service of that name. Raises ConfigError.
    """
    by_variable = {option.variable: option for option in OPTIONS.values()}
    values, wrong = {}, []
    for name, text in environment.items():
        if not is_setting(name) or not text:
            continue
        option = by_variable.get(name)
        if option is None:
            wrong.append(f"unknown variable {name}{nearest(name, by_variable)}")
            continue
        try:
            read = [option.read(one) for one in (listed(text) if option.repeats else [text])]
        except ValueError as exc:
            wrong.append(f"{name} must be {exc}, not {text!r}")
            continue
        values[option.key] = tuple(read) if option.repeats else read[0]
    if wrong:
        raise ConfigError("; ".join(wrong))
    return values


def is_setting(name: str) -> bool:
    """Whether a variable of this name is meant for us: a misspelt one should be told."""
    section = name.removeprefix("OUTRIDER_").partition("_")[0].lower()
    sections = {option.key.partition(".")[0] for option in OPTIONS.values()}
    if not name.startswith("OUTRIDER_") or name == "OUTRIDER_CONFIG" or FOREIGN.fullmatch(name):
        return False
    return "__" in name or section in sections


def listed(text: str) -> list[str]:
    """The values of a variable that has several: `a,b`, or a JSON array where one has a comma."""
    if not text.startswith("["):
        return text.split(",")
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise ValueError('a list such as a,b or a JSON array of strings such as ["a, b"]')
    return found


def config_path(given: str | None) -> Path | None:
    """The configuration file to read: the one given, else the one named in the environment, else
    the first of the usual ones that is there.
    """
    named = given or os.environ.get("OUTRIDER_CONFIG")
    if named:
        return Path(named)
    usual = (Path("outrider.toml"), platformdirs.user_config_path("outrider") / "config.toml")
    return next((path for path in usual if path.is_file()), None)


@dataclass(frozen=True, slots=True)
class Given:
    """A value that somebody gave to a setting, and where."""

    value: Any
    source: str  # "flag", "environment", "file"
    name: str  # of the flag, the variable or the file


def given(flags: Mapping[str, Any], config: str | None = None) -> dict[str, Given]:
    """What is in force of what was given: flags go before the environment, that before the file.

    Raises ConfigError.
    """
    found = {}
    if path := config_path(config):
        found.update({k: Given(v, "file", str(path)) for k, v in from_file(path).items()})
    for key, value in from_environment(os.environ).items():
        found[key] = Given(value, "environment", OPTIONS[key].variable)
    for key, value in flags.items():
        if value is not None:
            found[key] = Given(value, "flag", OPTIONS[key].flag)
    return found


def settings(flags: Mapping[str, Any], config: str | None = None) -> Settings:
    """The settings in force: what was given, else the defaults. Raises ConfigError."""
    sections: dict[str, dict[str, Any]] = {}
    for key, one in given(flags, config).items():
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = one.value
    defaults = Settings()
    changed = {s: dataclasses.replace(getattr(defaults, s), **v) for s, v in sections.items()}
    return checked(dataclasses.replace(defaults, **changed))
