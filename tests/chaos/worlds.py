"""Worlds in virtual time: what is asked of a pipeline, and what happens to it meanwhile.

A world is drawn from a number, and the same number gives the same world again. In each, every
answer must be the reference's, and in the end nothing may be held: see `house`.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.network import Faults

from outrider.core.sampling import Sampling
from outrider.core.values import AskedMode, Role

Who = Literal["target", "draft", "client", "coordinator"]
GREEDY = Sampling(temperature=0.0)
WARM = Sampling(temperature=0.8, top_k=40, top_p=0.95, seed=11)
PENALISED = Sampling(temperature=0.8, repeat_penalty=1.3, presence_penalty=0.4, seed=5)
SAMPLINGS = (GREEDY, WARM, PENALISED)
SYSTEM = "the old river runs over the quiet meadow, "
PROMPTS = ("x", "The river", SYSTEM + "so", SYSTEM + "and under", "東京 wind and ", SYSTEM * 4)
COUNTS = (1, 2, 9, 24, 40)
LONGEST = max(COUNTS)


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, when it is made, and when its client has had enough."""

    at: float
    prompt: str
    count: int
    sampling: Sampling
    mode: AskedMode
    cache: str | None
    cancelled_after: int | None = None  # tokens
    leaves: bool = False  # it does not cancel then, but is gone


@dataclass(frozen=True, slots=True)
class Killed:
    """A process dies; another one comes in its place."""

    who: Who
    at: float
    back_s: float


@dataclass(frozen=True, slots=True)
class Paused:
    """A process, or the way to it, stands still."""

    who: Who
    at: float
    for_s: float


@dataclass(frozen=True, slots=True)
class Cut:
    """A connection breaks."""

    who: Who
    at: float


@dataclass(frozen=True, slots=True)
class Slow:
    """A device computes so many times slower."""

    who: Role
    at: float
    for_s: float
    factor: float


Event = Killed | Paused | Cut | Slow


@dataclass(frozen=True, slots=True)
class World:
    asked: tuple[Asked, ...]
    events: tuple[Event, ...] = ()
    slots: int = 4
    branches: int = 0  # that the draft can hold
    agreement: float = 0.8
    pass_s: float = 0.01
    row_s: float = 0.0001
    token_s: float = 0.001
    has_draft: bool = True
    engine_faults: float = 0.0  # probability that a pass of the draft fails
    faults: dict[str, Faults] = field(default_factory=dict)  # by whose link it is
    may_fail: frozenset[str] = frozenset()


# a message that comes twice or late to the target may cost its request, and no other
POISONED = frozenset({"request_poisoned"})  # with which two targets died, by chance
ROUGH = frozenset({"protocol_error", "busy"})
BROKEN = frozenset(
    {"worker_unavailable"}
)  # damage ended two connections of one question, by chance


def drawn(number: int, seed: int = 1) -> World:
    """World `number`."""
    rng = random.Random(f"{seed} {number}")
    pick = rng.choice

    faults = {who: _faults(rng, who) for who in ("target", "draft", "client")}
    asked = tuple(_asked(rng) for _ in range(pick((1, 2, 3, 6))))
    events = tuple(_event(rng) for _ in range(pick((0, 1, 2, 4))))
    rough = faults["target"].twice or faults["target"].overtaken
    deaths = sum(isinstance(one, Killed) and one.who == "target" for one in events)
    return World(
        asked=asked,
        events=events,
        slots=pick((1, 2, 4)),
        # of its own, so that all else of a world stays what it was
        branches=random.Random(f"branches {seed} {number}").choice((0, 2, 8)),
        agreement=pick((0.0, 0.5, 0.8, 0.95, 1.0)),
        pass_s=pick((0.002, 0.01, 0.05)),
        row_s=pick((0.0, 0.0001, 0.002)),
        token_s=pick((0.0003, 0.001, 0.01, 0.03)),
        has_draft=rng.random() < 0.95,
        engine_faults=pick((0.0, 0.0, 0.0, 0.02)),
        faults=faults,
        may_fail=(ROUGH if rough else frozenset())
        | (BROKEN if faults["target"].damaged else frozenset())
        | (POISONED if deaths > 1 else frozenset()),
    )


def _asked(rng: random.Random) -> Asked:
    pick, count = rng.choice, rng.choice(COUNTS)
    mode: AskedMode = pick(("auto", "pipelined", "sync", "plain"))
    return Asked(
        at=rng.uniform(0.0, 0.6),
        prompt=pick(PROMPTS),
        count=count,
        sampling=pick(SAMPLINGS),
        mode=mode,
        cache=pick(("", "a", None)),
        cancelled_after=rng.randrange(count) if rng.random() < 0.2 else None,
        leaves=rng.random() < 0.3,
    )


def _faults(rng: random.Random, who: str) -> Faults:
    """Nothing is lost without a word but on the draft's way: there the pipeline goes on alone."""
    delays = ((0.0, 0.0), (0.0, 0.001), (0.002, 0.004), (0.01, 0.012), (0.0, 0.05))
    if rng.random() < 0.4:
        return Faults(rng.choice(delays))
    may, is_draft = rng.choice, who == "draft"
    # of a target's messages fewer: each may cost a request
    disorder = (0.0, 0.1, 0.3) if is_draft else (0.0, 0.0, 0.05) if who == "target" else (0.0,)
    return Faults(
        delay_s=may(delays),
        lost=may((0.0, 0.0, 0.05, 0.3)) if is_draft else 0.0,
        twice=may(disorder),
        overtaken=may(disorder),
        damaged=may((0.0, 0.0, 0.02)) if is_draft else may((0.0, 0.0, 0.005)),
        lies=may((0.0, 0.0, 0.2, 1.0)) if is_draft else 0.0,
    )


def _event(rng: random.Random) -> Event:
    at = rng.uniform(0.0, 1.0)
    who: Who = rng.choice(("target", "draft", "draft", "client", "coordinator"))
    match rng.choice(("killed", "killed", "paused", "cut", "slow")):
        case "killed":
            mortal: Who = "draft" if who == "client" else who
            return Killed(mortal, at, rng.choice((0.0, 0.1, 0.5, 2.0)))
        case "paused":
            return Paused(who, at, rng.choice((0.05, 0.3, 0.9, 2.5)))
        case "cut":
            return Cut("draft" if who == "coordinator" else who, at)
    role: Role = rng.choice(("target", "draft"))
    return Slow(role, at, rng.uniform(0.1, 1.0), rng.choice((3.0, 20.0, 300.0)))


SEEN = (
    *("cut", "lost", "twice", "overtaken", "damaged", "lie", "bad frame", "paused", "slow"),
    *("target killed", "draft killed", "coordinator killed", "died with its connection"),
    *("cancelled", "left", "engine fault", "foreseen"),
)


def unseen(seen: Counter[str]) -> list[str]:
    """What of all that should have happened has not."""
    return [what for what in SEEN if not seen[what]]
