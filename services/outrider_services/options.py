"""What reads the table of settings.

The flags of the command line, the variables of the environment (`OUTRIDER_SECTION__KEY`), the keys
of the configuration file and the flags of the processes that we start all come from this table.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from outrider.engines.llama.devices import ON_PROCESSOR, PROCESSOR, Offload
from outrider.errors import ConfigError
from outrider_services.table import (
    KERNELS,
    SEEDS,
    DraftOptions,
    LinkOptions,
    Settings,
    TargetOptions,
)


@dataclass(frozen=True, slots=True)
class Option:
    """A row of the table, as a program reads it."""

    key: str  # "draft.n_max"
    kind: Any  # its type
    default: Any
    flags: tuple[str, ...]
    help: str
    metavar: str | None

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return "OUTRIDER_" + self.key.replace(".", "__").upper()

    @property
    def flag(self) -> str:
        """The spelling that names it: the first with two dashes."""
        return next(flag for flag in self.flags if flag.startswith("--"))

    def of(self, settings: Settings) -> Any:
        """Its value."""
        section, name = self.key.split(".")
        return getattr(getattr(settings, section), name)

    @property
    def repeats(self) -> bool:
        """Whether it may be given more than once."""
        return get_origin(self.kind) is tuple

    def read(self, text: str) -> Any:
        """The value that `text` stands for. Raises ValueError with what it should be."""
        kinds = [kind for kind in get_args(self.kind) if kind not in (type(None), ...)]
        if get_origin(self.kind) is Literal:
            if text not in kinds:
                raise ValueError(f"one of {', '.join(kinds)}")
            return text
        kind = kinds[0] if kinds else self.kind
        if kind is bool:
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if text.lower() not in words:
                raise ValueError("true or false")
            return words[text.lower()]
        try:
            return kind(text)
        except ValueError:
            raise ValueError({int: "a whole number", float: "a number"}.get(kind, "text")) from None


def _options() -> dict[str, Option]:
    found = {}
    for section in dataclasses.fields(Settings):
        kind: Any = section.default.__class__
        hints = get_type_hints(kind)
        for f in dataclasses.fields(kind):
            key = f"{section.name}.{f.name}"
            m = f.metadata
            found[key] = Option(
                key, hints[f.name], f.default, tuple(m["flags"]), m["help"], m["metavar"]
            )
    return found


OPTIONS = _options()


def nearest(word: str, words: Iterable[str]) -> str:
    """The end of a sentence about an unknown word: which of `words` may have been meant."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def checked(settings: Settings) -> Settings:
    """The same settings. Raises ConfigError for the first value that is out of range."""
    target, draft, pipeline = settings.target, settings.draft, settings.pipeline
    for flag, value, least, most in (
        ("--threads", target.threads, 1, 512),
        ("--threads-draft", draft.threads, 1, 512),
        ("--n-gpu-layers", target.ngl or 0, -1, 9999),
        ("--n-gpu-layers-draft", draft.ngl or 0, -1, 9999),
        ("--main-gpu", target.main_gpu or 0, 0, 255),
        ("--ctx", target.ctx, 16, 1 << 20),
        ("--n-draft", draft.n_max or 0, 0, 64),
        ("--spec-draft-n-min", draft.n_min, 0, 64 if draft.n_max is None else draft.n_max),
        ("--spec-draft-p-min", draft.p_min, 0, 1),
        ("--parallel", pipeline.parallel, 1, 64),
        ("--draft-branches", pipeline.branches, 0, 64),
        ("--draft-suffix-memory", pipeline.suffix_memory, 0, 1 << 20),
        (
            "--n-predict",
            1 if settings.sampling.n_predict is None else settings.sampling.n_predict,
            1,
            1 << 20,
        ),
        ("--seed", settings.sampling.seed, -SEEDS, SEEDS - 1),
        ("--ready-timeout", pipeline.ready_timeout_s, 1, 86400),
        ("--resume-timeout", settings.coordinator.resume_s, 0, 86400),
        ("--drain", settings.coordinator.drain_s, 0, 86400),
        ("--port", settings.server.port, 0, 65535),
        ("--timeout", settings.server.timeout_s, 1, 86400),
        ("--sse-ping-interval", settings.server.sse_ping_s, 0, 86400),
    ):
        if not least <= value <= most:
            raise ConfigError(f"{flag} must be from {least} to {most}, not {value}")
    cores(target.cores), cores(draft.cores), kernels(target.without), toy_rows(settings.toy.rows)
    offload(target), offload(draft)
    return settings


def kernels(text: str) -> frozenset[str]:
    """The kernels in a list such as "tiled,flash" to do without. Raises ConfigError."""
    found = (
        frozenset(filter(None, text.split(","))) if text not in ("auto", "none") else frozenset()
    )
    if wrong := found - set(KERNELS):
        raise ConfigError(f"{min(wrong)!r} is none of the kernels {', '.join(KERNELS)}")
    return found


def toy_rows(text: str) -> dict[int, float]:
    """What a list such as "2:1.6,5:2.4" says of passes, ascending by rows. Raises ConfigError."""
    found = {1: 1.0} if text else {}
    try:
        for part in filter(None, text.split(",")):
            rows, _, times = part.partition(":")
            found[int(rows)] = float(times)
    except ValueError:
        found[0] = 0.0
    if not all(1 <= rows <= 512 and 0 < times <= 1000 for rows, times in found.items()):
        raise ConfigError(f"--toy-rows is a list such as 2:1.6,5:2.4, not {text!r}")
    return dict(sorted(found.items()))


def cores(text: str) -> set[int]:
    """The cores in a list such as "0,2-3". Raises ConfigError, also for those we may not use."""
    found: set[int] = set()
    try:
        for part in filter(None, text.split(",")):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    except ValueError:
        raise ConfigError(f"{text!r} is not a list of cores such as 0,2-3") from None
    if missing := found - os.sched_getaffinity(0):
        raise ConfigError(f"this process may not use core {min(missing)}")
    return found


def offload(worker: TargetOptions | DraftOptions) -> Offload:
    """Which layers of a worker's model are for which devices. Raises ConfigError."""
    names = tuple(name.strip() for name in worker.device.split(",") if name.strip())
    if {name.lower() for name in names} & {*PROCESSOR}:
        if len(names) > 1:
            raise ConfigError(f"{worker.device!r} names the processor and other devices")
        return ON_PROCESSOR
    split = shares(worker.split) if isinstance(worker, TargetOptions) else ()
    main = worker.main_gpu if isinstance(worker, TargetOptions) else None
    is_asked = bool(names or split) or main is not None
    layers = worker.ngl if worker.ngl is not None else -1 if is_asked else 0
    return Offload(layers, names, split, main) if layers else ON_PROCESSOR


def shares(text: str) -> tuple[float, ...]:
    """The shares in a list such as "3,1". Raises ConfigError."""
    try:
        found = tuple(float(part) for part in re.split("[,/]", text) if part)
    except ValueError:
        found = (-1.0,)
    if any(not 0 <= share < math.inf for share in found) or (found and not sum(found)):
        raise ConfigError(f"{text!r} is not a list of shares such as 3,1")
    return found


def reach(links: LinkOptions, pipeline: str) -> dict[str, Any]:
    """What `outrider.connect` is to be called with besides the name or address of the pipeline."""
    return {"keys": links.keys or None, "insecure": pipeline in links.insecure}


def as_text(value: Any) -> str:
    """A value as a flag or a file would spell it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- the command line ---------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, but mistakes raise ConfigError, and no flag is guessed from its beginning."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> Any:
        raise ConfigError(f"{message[0].lower()}{message[1:]}; see `{self.prog} --help`")

    def check_flags(self, arguments: Sequence[str]) -> None:
        """Raises ConfigError for an unknown flag: argparse reads `-modle x` as `-m odle x`."""
        known = self._option_string_actions
        for argument in arguments:
            if argument == "--":
                return
            name = argument.partition("=")[0]
            if not name.startswith("-") or name == "-" or " " in name or name in known:
                continue
            if not self._negative_number_matcher.match(name):
                raise ConfigError(f"unknown flag {name}{nearest(name, known)}")

    def with_values(self, arguments: Sequence[str]) -> list[str]:
        """The arguments with `=true` behind each bare switch: argparse would take the prompt in
        `-v PROMPT` for its value.
        """
        end = list(arguments).index("--") if "--" in arguments else len(arguments)
        found = []
        for at, argument in enumerate(arguments):
            action = self._option_string_actions.get(argument) if at < end else None
            spelt = [*arguments[at + 1 : at + 2]] in (["true"], ["false"])
            is_switch = action is not None and action.nargs == "?" and not spelt
            found.append(f"{argument}=true" if is_switch else argument)
        return found


def add_options(parser: Parser, sections: Sequence[str], without: Iterable[str] = ()) -> None:
    """Give `parser` the flags of these sections of the table, but for the keys in `without`."""
    for section in sections:
        group = parser.add_argument_group(section)
        for option in OPTIONS.values():
            if option.key.startswith(f"{section}.") and option.key not in without and option.flags:
                _add(group, option)


def _add(group: Any, option: Option) -> None:
    def read(text: str) -> Any:
        try:
            return option.read(text)
        except ValueError as exc:
            raise argparse.ArgumentTypeError(f"must be {exc}, not {text!r}") from None

    shown = (
        "" if option.default in (None, (), "", False) else f" (default {as_text(option.default)})"
    )
    several = "; as a variable a,b or a JSON array" if option.repeats else ""
    more: dict[str, Any] = {"metavar": option.metavar}
    if option.repeats:
        more["action"] = "append"
    elif option.kind is bool:
        more.update(nargs="?", const=True, metavar=option.metavar or "BOOL")
    elif get_origin(option.kind) is Literal:
        more["metavar"] = "{" + ",".join(get_args(option.kind)) + "}"
    group.add_argument(
        *option.flags,
        dest=option.key,
        type=read,
        default=None,
        help=f"{option.help}{several}{shown} [{option.variable}]".replace("%", "%%"),
        **more,
    )


def given_flags(parsed: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave, by their keys."""
    return {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in vars(parsed).items()
        if key in OPTIONS and value is not None
    }


def to_flags(settings: Settings, sections: Sequence[str]) -> list[str]:
    """The flags by which a process of ours gets the same settings, without defaults and secrets."""
    flags = []
    for option in OPTIONS.values():
        value = option.of(settings)
        section = option.key.partition(".")[0]
        if section not in sections or value == option.default or value is None or not option.flags:
            continue
        for one in value if option.repeats else [value]:
            flags.append(f"{option.flag}={as_text(one)}")
    return flags
