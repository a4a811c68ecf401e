"""The real session on recorded acceptance traces, in virtual time with given costs.

A trace says at every position of an answer whether the draft agreed with the target, how sure it
was, and how sure it went on being behind a token that was wrong. The right token of position p is
p here; whatever is wrong, or stands behind something wrong, is another.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outrider.core.estimates import CostModel, usual_acceptance
from outrider.core.rules import Experience, Pilot, Policy
from outrider.core.sampling import Sampling
from outrider.core.session import (
    Command,
    Commit,
    Drafted,
    Finish,
    OpenDraft,
    Prefill,
    RoundResult,
    Session,
    Task,
    Verify,
)
from outrider.core.stats import Stats
from outrider_services.pipeline.draft_worker import Stream

WRONG = 10**6


@dataclass(frozen=True)
class World:
    """Seconds of a pass over 1, 2, … rows, of a drafted token, and of a message each way."""

    verify_s: tuple[float, ...]
    draft_s: float
    link_s: float = 0.00025
    cuts: bool = True  # a token that is being drafted for a text that is no more is cut short

    def experience(self) -> Experience:
        return Experience(CostModel(self.verify_s, self.draft_s, 2 * self.link_s))

    def pilot(self, mode: Any) -> Pilot:
        return Pilot(mode, 64, self.experience())


def curve(milliseconds: dict[int, float], rows: int = 65) -> tuple[float, ...]:
    """Pass costs between and beyond those measured for some numbers of rows."""
    at, cost = list(milliseconds), list(milliseconds.values())
    slope = (cost[-1] - cost[-2]) / (at[-1] - at[-2])
    many = np.arange(1, rows + 1)
    seconds = (np.interp(many, at, cost) + np.maximum(many - at[-1], 0) * slope) / 1000
    return tuple(map(float, seconds))


@dataclass
class Replay:
    trace: dict[str, Any]
    policy: Policy | Pilot
    world: World
    events: list[tuple[float, int, str, Any]] = field(default_factory=list)
    stream: Stream | None = None
    busy: int | None = None  # number of the token that the draft computes; None: idle
    unsent: list[Drafted] = field(default_factory=list)
    unsent_at: tuple[int, int] = (0, 0)  # their lineage and first position
    over: bool = False

    def speedup(self) -> float:
        """Over the target alone, which takes a plain step for every token but the first."""
        self.count = itertools.count()
        length = len(self.trace["match"])
        task = Task((0,), length, (), frozenset(), 10**6, 10**9)
        self.session = Session(task, self.policy, Stats(self.policy.mode))
        self.run(self.session.start(0.0, draft=True), 0.0)
        while not self.over:
            now, _, kind, data = heapq.heappop(self.events)
            self.run(getattr(self, kind)(data, now) or [], now)
            if self.session.deadline is not None:
                self.at(max(self.session.deadline, now), "timer", None)
        stats = self.session.stats
        assert stats.last_commit is not None
        assert stats.prefilled is not None
        alone_s = (length - 1) * (self.world.verify_s[0] + 2 * self.world.link_s)
        return alone_s / (stats.last_commit - stats.prefilled)

    def at(self, when: float, kind: str, data: Any) -> None:
        heapq.heappush(self.events, (when, next(self.count), kind, data))

    def run(self, commands: list[Command], now: float) -> None:
        link_s = self.world.link_s
        for command in commands:
            match command:
                case Prefill():
                    self.at(now, "verdict", Verify(0, 1, ()))
                case Verify(_, _, drafted):
                    self.at(now + 2 * link_s + self.pass_s(drafted), "verdict", command)
                case OpenDraft() | Commit():
                    self.at(now + link_s, "told", command)
                case Finish():
                    self.over = True
        if any(isinstance(command, Verify) for command in commands):
            self.policy.settle()

    def pass_s(self, drafted: tuple[int, ...]) -> float:
        return self.world.verify_s[len(drafted)]

    # ---- what happens ---------------------------------------------------------------------------

    def verdict(self, block: Verify, now: float) -> list[Command]:
        right = range(block.base, block.base + len(block.drafted))
        pairs = zip(block.drafted, right, strict=True)
        accepted = next((n for n, (a, b) in enumerate(pairs) if a != b), len(block.drafted))
        tokens = tuple(range(block.base, block.base + accepted + 1))
        pieces = (b"",) * len(tokens)
        elapsed_s = self.pass_s(block.drafted)
        result = RoundResult(block.round, block.base, accepted, tokens, pieces, None, elapsed_s)
        return self.session.on_verdict(result, now)

    def told(self, command: OpenDraft | Commit, now: float) -> None:
        if isinstance(command, OpenDraft):
            lineage, until, base = command.lineage, command.until, command.base
            self.stream = Stream(0, list(command.tokens), Sampling(), lineage, until, WRONG, base)
            self.stream.floors = command.floors
        else:
            assert self.stream is not None
            self.stream.until, self.stream.floors = command.until, command.floors
            cut = self.stream.follow(command.base, command.tokens)
            if (cut or self.stream.told_to_stop) and self.world.cuts:
                self.busy = None
                self.tell(now)
        self.draft(now)

    def draft(self, now: float) -> None:
        stream = self.stream
        if not stream or self.busy is not None or stream.paused:
            return
        if len(stream.tokens) < stream.until:
            self.busy = next(self.count)
            begun = self.busy, stream.lineage, len(stream.tokens)
            self.at(now + self.world.draft_s, "computed", begun)

    def computed(self, begun: tuple[int, int, int], now: float) -> None:
        number, lineage, position = begun
        if number != self.busy or self.stream is None:
            return
        self.busy = None
        if (lineage, position) == (self.stream.lineage, len(self.stream.tokens)):
            token = self.recorded(self.stream.tokens)
            self.stream.evaluated = len(self.stream.tokens)
            self.stream.tokens.append(token.token)
            self.stream.likely.append(usual_acceptance(token.confidence))
            self.unsent.append(token)
            self.unsent_at = lineage, position + 1 - len(self.unsent)
        self.draft(now)
        self.tell(now)

    def tell(self, now: float) -> None:
        """Say what was drafted: in turns all of it together, when the draft has to wait."""
        assert self.stream
        if self.unsent and (self.busy is None or not self.stream.floors):
            said = *self.unsent_at, self.unsent, self.stream.paused
            self.at(now + self.world.link_s, "drafted", said)
            self.unsent = []

    def drafted(self, said: tuple[int, int, list[Drafted], bool], now: float) -> list[Command]:
        lineage, position, drafted, paused = said
        elapsed_s = len(drafted) * self.world.draft_s
        return self.session.on_drafted(lineage, position, drafted, elapsed_s, now, paused)

    def timer(self, _: None, now: float) -> list[Command]:
        return self.session.on_timer(now)

    def recorded(self, tokens: list[int]) -> Drafted:
        position = len(tokens)
        first_wrong = next((p for p, token in enumerate(tokens) if token != p), None)
        if first_wrong is not None:
            paths = self.trace["off_path_confidence"].get(str(first_wrong - 1), [0.5])
            depth = min(position - first_wrong - 1, len(paths) - 1)
            return Drafted(position + WRONG, paths[depth])
        index = position - 1  # the prompt has one token
        if index >= len(self.trace["match"]):
            return Drafted(position + WRONG, 0.5)
        token = position if self.trace["match"][index] else position + WRONG
        return Drafted(token, self.trace["confidence"][index])
