"""What a benchmark is asked for: which arms answer which prompts, and how often."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, get_args

from outrider.core.rules import MOST_DRAFTED
from outrider.core.values import AskedMode
from outrider.errors import ConfigError
from outrider_services.bench import peers, prompts, suites
from outrider_services.bench.results import PLAIN
from outrider_services.options import nearest

SUITE_RESTARTS = 10
MODES: tuple[AskedMode, ...] = get_args(AskedMode)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to generate; with `length`, every block has exactly so many drafted tokens."""

    name: str
    mode: AskedMode
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt as it stands in the file: without the chat template."""

    category: str
    number: int  # in its category, from 0
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What the command line asks for, checked."""

    arms: tuple[Arm, ...]
    peers: tuple[str, ...]
    peer_n_max: tuple[int, ...]  # draft lengths that each peer may try
    categories: tuple[prompts.Category, ...]
    count: int  # tokens of each answer
    repetitions: int  # of each prompt
    restarts: int  # of all processes; each has all repetitions
    warmup: int  # answers of each arm that do not count, after each start
    lanes: bool  # whether traces for the picture of the lanes are wanted


def read_plan(parsed: Any) -> Plan:
    """The plan that the flags mean. Raises ConfigError for whatever could not be measured."""
    names = [name.strip() for name in parsed.arms.split(",") if name.strip()]
    names = list(dict.fromkeys([PLAIN, *names]))  # the baseline is always measured
    arms = tuple(read_arm(name) for name in names if name not in peers.PEERS)
    restarts = (
        (SUITE_RESTARTS if parsed.suite else 1) if parsed.restarts is None else parsed.restarts
    )
    for flag, value, least in (
        ("--restarts", restarts, 1),
        ("--n-predict", parsed.n_predict, 2),  # the first token has no speed
        ("--repetitions", parsed.repetitions, 1),
        ("--warmup", parsed.warmup, 0),
        ("--per-category", parsed.per_category, 1),
    ):
        if value < least:
            raise ConfigError(f"{flag} must be at least {least}, not {value}")
    required = parsed.require_speedup
    if required is not None and "auto" not in names:
        raise ConfigError("--require-speedup is about the arm auto, which --arms leaves out")
    if required is not None and not (required > 0 and math.isfinite(required)):
        raise ConfigError(f"--require-speedup must be above 0, not {required:g}")
    chosen = [name.strip() for name in (parsed.category or "").split(",") if name.strip()]
    return Plan(
        arms=arms,
        peers=tuple(name for name in names if name in peers.PEERS),
        peer_n_max=read_ranges(parsed.peer_n_max),
        categories=tuple(
            suites.load(parsed.suite, chosen, parsed.per_category)
            if parsed.suite
            else prompts.load(parsed.prompts, chosen, parsed.per_category)
        ),
        count=parsed.n_predict,
        repetitions=parsed.repetitions,
        restarts=restarts,
        warmup=parsed.warmup,
        lanes=parsed.lanes is not None,
    )


def read_arm(name: str) -> Arm:
    """The arm of this name: `auto`, or `sync:4` for blocks of one length. Raises ConfigError."""
    mode, colon, length = name.partition(":")
    known = next((known for known in MODES if known == mode), None)
    if known is None:
        raise ConfigError(f"there is no arm {name!r}{nearest(mode, (*MODES, *peers.PEERS))}")
    if not colon:
        return Arm(name, known)
    if mode == PLAIN or not length.isdecimal() or not 1 <= int(length) <= MOST_DRAFTED:
        raise ConfigError(
            f"an arm of one length is like sync:4, 1 to {MOST_DRAFTED} long, not {name!r}"
        )
    return Arm(name, known, int(length))


def read_ranges(text: str) -> tuple[int, ...]:
    """The numbers that a list such as `1-4,8` names, ascending. Raises ConfigError."""
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, dash, last = part.strip().partition("-")
        ends = (first, last if dash else first)
        if not all(end.isdecimal() and 1 <= int(end) <= MOST_DRAFTED for end in ends):
            raise ConfigError(f"--peer-n-max is like 1-4,8, from 1 to {MOST_DRAFTED}, not {text!r}")
        found.update(range(int(ends[0]), int(ends[1]) + 1))
    if not found:
        raise ConfigError(f"--peer-n-max names no number: {text!r}")
    return tuple(sorted(found))
