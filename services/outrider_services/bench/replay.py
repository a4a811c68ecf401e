"""The real session on recorded acceptance traces, in virtual time with given costs.

A trace tells, at every position of an answer, whether the draft agreed with the target, how sure it
was, and how sure it was of what it drafted behind a token that was wrong; see `traces.record`. Here
the right token at position p is the number p, and a wrong one is p + WRONG.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from outrider.core.decoding import verify
from outrider.core.estimates import CostModel
from outrider.core.events import (
    Command,
    Commit,
    Event,
    Finish,
    OpenDraft,
    Prefill,
    Settle,
    Start,
    Task,
    Timer,
)
from outrider.core.experience import Experience
from outrider.core.rules import PricedRule, Rule
from outrider.core.session import Session
from outrider.core.stats import Stats
from outrider.core.stream import Begun, Stream
from outrider.core.values import Drafted, Proposal, TokenId, Verdict, Verify

WRONG = 10**6


@dataclass(frozen=True)
class World:
    """What things take, in seconds."""

    verify_s: tuple[float, ...]  # a pass over 1, 2, 3 … rows
    draft_s: float  # a drafted token
    link_s: float = 0.00025  # a message, each way
    cuts: bool = True  # whether drafting is broken off once the text it was for has changed
    prompt: int = 1  # tokens
    prefill_s: float = 0.0  # the target's reading of one of them
    read_s: float = 0.0  # the draft's

    def experience(self) -> Experience:
        costs = CostModel(self.verify_s, self.draft_s, 2 * self.link_s, self.read_s)
        return Experience(costs)

    def alone_s(self, length: int) -> float:
        """Seconds of an answer of `length` tokens by plain steps, reading the prompt included."""
        steps_s = (length - 1) * (self.verify_s[0] + 2 * self.link_s)
        return self.prompt * self.prefill_s + steps_s

    def rule(self, mode: Any) -> PricedRule:
        return PricedRule(mode, 64, self.experience())


def curve(milliseconds: dict[int, float], rows: int = 65) -> tuple[float, ...]:
    """Seconds of a pass over 1 … `rows` rows, on straight lines through those that are given."""
    at, cost = list(milliseconds), list(milliseconds.values())
    slope = (cost[-1] - cost[-2]) / (at[-1] - at[-2])
    many = np.arange(1, rows + 1)
    seconds = (np.interp(many, at, cost) + np.maximum(many - at[-1], 0) * slope) / 1000
    return tuple(map(float, seconds))


@dataclass
class Replay:
    """One answer played again; `due` holds what is still to happen, by time."""

    trace: dict[str, Any]
    rule: Rule
    world: World
    due: list[tuple[float, int, str, Any]] = field(default_factory=list)
    stream: Stream | None = None
    busy: int | None = None  # number of the token that the draft computes; None: idle
    unsent: list[Drafted] = field(default_factory=list)
    unsent_at: tuple[int, int] = (0, 0)  # their lineage and first position
    unsent_s: float = 0.0  # what they took
    over: bool = False

    def speedup(self) -> float:
        """Play the answer. How many times as fast it was as with a plain step for every token.

        The time from the question to the last token counts.
        """
        self.count = itertools.count()
        length = len(self.trace["match"])
        task = Task(tuple(range(self.world.prompt)), length, (), frozenset(), 10**6, 10**9)
        self.session = Session(task, self.rule, Stats(self.rule.mode))
        self.handle(Start(draft=True), 0.0)
        while not self.over:
            now, _, kind, data = heapq.heappop(self.due)
            getattr(self, kind)(data, now)
        assert self.session.stats.last_commit is not None
        return self.world.alone_s(length) / self.session.stats.last_commit

    def at(self, when: float, kind: str, data: Any) -> None:
        heapq.heappush(self.due, (when, next(self.count), kind, data))

    def handle(self, event: Event, now: float) -> None:
        """Give the session the event, and carry out its commands."""
        for command in self.session.handle(event, now):
            self.execute(command, now)
        if self.session.deadline is not None:
            self.at(max(self.session.deadline, now), "handle", Timer())

    def execute(self, command: Command, now: float) -> None:
        link_s = self.world.link_s
        match command:
            case Prefill():
                read_s = self.world.prompt * self.world.prefill_s
                self.at(now + read_s, "verified", Verify(0, self.world.prompt, ()))
            case Verify(_, _, drafted):
                pass_s = self.world.verify_s[len(drafted)]
                self.at(now + 2 * link_s + pass_s, "verified", command)
            case OpenDraft() | Commit():
                self.at(now + link_s, "told", command)
            case Settle():
                self.session.rule.settle()
            case Finish():
                self.over = True

    # ---- what happens ---------------------------------------------------------------------------

    def verified(self, order: Verify, now: float) -> None:
        """The target has verified the block: what is right at a position is its number."""
        right = range(order.base, order.base + len(order.drafted) + 1)
        tokens = verify(order.drafted, right).tokens
        verdict = Verdict(
            accepted=len(tokens) - 1,
            tokens=tokens,
            round=order.round,
            base=order.base,
            pieces=(b"",) * len(tokens),
            margins=(0.0,) * len(tokens),
            elapsed_s=self.world.verify_s[len(order.drafted)],
        )
        self.handle(verdict, now)

    def told(self, order: OpenDraft | Commit, now: float) -> None:
        if isinstance(order, OpenDraft):
            self.stream = Stream.opened(order, 10**9)
            if order.recall:
                self.recall(self.stream, order.recall, now)
        else:
            assert self.stream is not None
            cut = self.stream.commit(order, 10**9)
            if (cut or self.stream.is_to_stop) and self.world.cuts:
                self.busy = None
                self.tell(now)
        self.draft(now)

    def recall(self, stream: Stream, count: int, now: float) -> None:
        """Read the text, and say what would have been drafted for its last tokens."""
        text = stream.tokens
        ends = range(len(text) - count, len(text))
        took_s = (len(text) - 1 - stream.read) * self.world.read_s
        stream.read = len(text) - 1
        recalled = tuple(self.recorded(text[:end]) for end in ends)
        proposal = Proposal(stream.lineage, len(text), (), took_s, recalled=recalled)
        self.at(now + took_s + self.world.link_s, "handle", proposal)

    def draft(self, now: float) -> None:
        stream = self.stream
        if stream and self.busy is None and stream.has_work:
            self.busy, begun = next(self.count), stream.begin()
            unread = max(0, len(begun.tokens) - 1 - begun.read)
            took_s = self.world.draft_s + unread * self.world.read_s
            self.at(now + took_s, "computed", (self.busy, begun, took_s))

    def computed(self, what: tuple[int, Begun, float], now: float) -> None:
        number, begun, took_s = what
        if number != self.busy or self.stream is None:
            return
        self.busy = None
        drafted = self.recorded(begun.tokens)
        if self.stream.took(begun, len(begun.tokens), [drafted]):
            self.unsent.append(drafted)
            self.unsent_s += took_s
            self.unsent_at = begun.lineage, len(begun.tokens) + 1 - len(self.unsent)
        self.draft(now)
        self.tell(now)

    def tell(self, now: float) -> None:
        """Send what was drafted: at once, or, in turns, all together when the draft has to wait."""
        assert self.stream
        if self.unsent and (self.busy is None or not self.stream.floors):
            proposal = Proposal(
                lineage=self.unsent_at[0],
                position=self.unsent_at[1],
                drafted=tuple(self.unsent),
                elapsed_s=self.unsent_s,
                paused=self.stream.is_paused,
            )
            self.at(now + self.world.link_s, "handle", proposal)
            self.unsent, self.unsent_s = [], 0.0

    def recorded(self, tokens: Sequence[TokenId]) -> Drafted:
        """What the draft drafts behind `tokens`, some of which may be wrong."""
        position = len(tokens)
        first_wrong = next((p for p, token in enumerate(tokens) if token != p), None)
        if first_wrong is not None:
            at = str(first_wrong - self.world.prompt)
            paths = self.trace["off_path_confidence"].get(at, [0.5])
            depth = min(position - first_wrong - 1, len(paths) - 1)
            return Drafted(position + WRONG, paths[depth])
        index = position - self.world.prompt
        if index >= len(self.trace["match"]):
            return Drafted(position + WRONG, 0.5)
        token = position if self.trace["match"][index] else position + WRONG
        return Drafted(token, self.trace["confidence"][index])
