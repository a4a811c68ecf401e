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

from outrider.core.branches import RANKS, Branch, Branches, Found, Ranks, chosen
from outrider.core.decoding import joined, leads_to, verify
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
from outrider.core.orders import Orders
from outrider.core.priced import PricedRule
from outrider.core.promise import UNTOLD, sight
from outrider.core.rules import Rule
from outrider.core.session import Session
from outrider.core.stats import Stats
from outrider.core.stream import Begun, Stream
from outrider.core.values import Block, Drafted, Proposal, TokenId, Verify, ids_of

WRONG = 10**6
GOLDEN = 0.618034  # its multiples are spread evenly: what is drawn with it is always the same
NEARSIGHTED = 0.5  # how sure a draft is that lacks what it would have to know
# number of the pass, the main line's text, what it is for besides, seconds
Step = tuple[int, Begun | None, list[tuple[Branches, Branch, tuple[TokenId, ...]]], float]


@dataclass(frozen=True)
class World:
    """What things take, in seconds."""

    verify_s: tuple[float, ...]  # a pass over 1, 2, 3 … rows
    draft_s: float  # a drafted token
    link_s: float = 0.00025  # a message between coordinator and target, each way
    draft_link_s: float | None = None  # … and draft; None: the same
    cuts: bool = True  # whether drafting is broken off once the text it was for has changed
    prompt: int = 1  # tokens
    prefill_s: float = 0.0  # the target's reading of one of them
    read_s: float = 0.0  # the draft's
    rollback_s: float = 0.0  # added to the pass behind a block of which some had to be taken back
    drag: float = 1.0  # a pass takes so many times as long beside a draft that computes
    sides: int = 0  # branches that the target can verify beside a block
    rows_s: tuple[float, ...] = ()  # the draft's pass over 1, 2 … rows, where it drafts branches

    @property
    def to_draft_s(self) -> float:
        """What a message to or from the draft takes."""
        return self.link_s if self.draft_link_s is None else self.draft_link_s

    def experience(self) -> Experience:
        costs = CostModel(
            self.verify_s,
            self.draft_s,
            2 * self.link_s,
            self.read_s,
            rollback_s=self.rollback_s,
        )
        return Experience(costs)

    def alone_s(self, length: int) -> float:
        """Seconds of an answer of `length` tokens by plain steps, reading the prompt included.

        The target goes on by itself: only the first step waits for messages.
        """
        steps_s = (length - 1) * self.verify_s[0] + 2 * self.link_s
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
    orders: Orders = field(default_factory=Orders)  # of the target
    block: Block | None = ()  # what it verifies; None: it is idle
    length: int = 0  # of its text
    owed_s: float = 0.0  # for what it has to take back
    unread: int = 0  # tokens of a side, which it evaluates again
    busy: int | None = None  # number of the token that the draft computes; None: idle
    unsent: list[Drafted] = field(default_factory=list)
    unsent_at: tuple[int, int] = (0, 0)  # their lineage and first position
    unsent_s: float = 0.0  # what they took
    over: bool = False
    ranks: Ranks = field(default_factory=Ranks)
    skip: int = 0  # tokens that the draft has not read

    def speedup(self) -> float:
        """Play the answer. How many times as fast it was as with a plain step for every token.

        The time from the question to the last token counts.
        """
        last = self.play().last_commit
        assert last is not None
        return self.world.alone_s(len(self.trace["match"])) / last

    def play(self) -> Stats:
        """Play the answer; what its session has counted."""
        self.count = itertools.count()
        length, self.length = len(self.trace["match"]), self.world.prompt
        prompt, sides = tuple(range(self.world.prompt)), self.world.sides
        task = Task(prompt, length, (), frozenset(), 10**6, 10**9, sides=sides)
        self.session = Session(task, self.rule, Stats(self.rule.mode))
        self.handle(Start(draft=True), 0.0)
        while not self.over:
            now, _, kind, data = heapq.heappop(self.due)
            getattr(self, kind)(data, now)
        return self.session.stats

    def at(self, when: float, kind: str, data: Any) -> None:
        heapq.heappush(self.due, (when, next(self.count), kind, data))

    def handle(self, event: Event, now: float) -> None:
        """Give the session the event, and carry out its commands."""
        for command in self.session.handle(event, now):
            self.execute(command, now)
        if self.session.deadline is not None:
            self.at(max(self.session.deadline, now), "handle", Timer())

    def execute(self, command: Command, now: float) -> None:
        match command:
            case Prefill():
                read_s = self.world.prompt * self.world.prefill_s
                self.at(now + read_s, "verified", 0.0)
            case Verify():
                self.at(now + self.world.link_s, "ordered", command)
            case OpenDraft() | Commit():
                self.at(now + self.world.to_draft_s, "told", command)
            case Settle():
                self.session.rule.settle()
            case Finish():
                self.over = True

    # ---- what happens ---------------------------------------------------------------------------

    def ordered(self, order: Verify, now: float) -> None:
        self.orders.add(order)
        if self.block is None:
            self.go_on(now)

    def go_on(self, now: float) -> None:
        """The target begins what it can without waiting for a message."""
        self.block = self.orders.take(range(self.length))
        if self.block is not None:
            beside = sum(len(side.drafted) for side in self.orders.sides)
            again, self.unread = self.unread, 0
            pass_s = self.world.verify_s[len(self.block) + beside + again]
            pass_s *= self.world.drag if self.busy is not None else 1.0
            # a pass that reads again is no measurement of its rows
            reads, took_s = bool(self.owed_s or again), pass_s + self.owed_s
            self.at(now + took_s, "verified", 0.0 if reads else pass_s)

    def verified(self, pass_s: float, now: float) -> None:
        """The target has verified the block: what is right at a position is its number."""
        base, block = self.length, self.block or ()
        beside = sum(len(side.drafted) for side in self.orders.sides)
        found = verify(block, range(base, base + len(block) + 1))
        if number := leads_to(found, base, block, self.orders.sides):
            behind = ids_of(self.orders.sides[number - 1].drafted[1:])
            begins = base + len(found.tokens)
            behind_found = verify(behind, range(begins, begins + len(behind) + 1))
            self.unread = 1 + behind_found.accepted
            found = joined(found, behind_found, number)
        tokens, is_whole = found.tokens, found.accepted == len(block) and not number
        self.length += len(tokens)
        self.orders.judged(is_whole)
        self.owed_s = 0.0 if is_whole else self.world.rollback_s
        verdict = found.changed(
            round=self.orders.round,
            base=base,
            pieces=(b"",) * len(tokens),
            margins=self.margins(base, len(tokens)),
            elapsed_s=pass_s,
            beside=beside,
            rows=len(block) + beside + 1 if pass_s else 0,
        )
        self.at(now + self.world.link_s, "handle", verdict)
        self.go_on(now)

    def margins(self, base: int, count: int) -> tuple[float, ...]:
        """By how much the `count` tokens from position `base` won."""
        begins = base - self.world.prompt
        recorded = self.trace.get("margin", [])[begins : begins + count]
        return (*recorded, *[UNTOLD] * (count - len(recorded)))

    def told(self, order: OpenDraft | Commit, now: float) -> None:
        if isinstance(order, OpenDraft):
            self.skip = order.skip
            self.stream = Stream.opened(order, 10**9)
            if self.world.rows_s:
                self.stream.branches = Branches(self.ranks)
            if order.recall:
                self.recall(self.stream, order.recall, now)
        else:
            assert self.stream is not None
            cut = self.stream.commit(order, 10**9)
            if (cut or self.stream.is_to_stop) and self.world.cuts:
                self.busy = None
                self.tell(now)
            if self.stream.adopted:
                self.foresaw(self.stream, now)
        self.draft(now)

    def recall(self, stream: Stream, count: int, now: float) -> None:
        """Read the text, and say what would have been drafted for its last tokens."""
        text = stream.tokens
        ends = range(len(text) - count, len(text))
        took_s = (len(text) - 1 - stream.read) * self.world.read_s
        stream.read = len(text) - 1
        recalled = tuple(self.recorded(text[:end]) for end in ends)
        proposal = Proposal(stream.lineage, len(text), (), took_s, recalled=recalled)
        self.at(now + took_s + self.world.to_draft_s, "handle", proposal)

    def draft(self, now: float) -> None:
        stream = self.stream
        if stream is None or self.busy is not None:
            return
        passes_s = self.world.rows_s or (self.world.draft_s,)
        main = [stream.reach] if stream.has_work else []
        room = len(passes_s) - 1 - len(stream.branches.begun if stream.branches else ())
        growing = [(value, one, stream.branches) for value, one in stream.candidates(10**9)]
        lines, branches = chosen(main, growing, room, passes_s)
        if not (lines or branches):
            return
        self.busy, begun = next(self.count), stream.begin()
        unread = max(0, len(begun.tokens) - 1 - begun.read) if lines else 0
        took_s = passes_s[lines + len(branches) - 1] + unread * self.world.read_s
        parts = [
            (whose, one, (*begun.tokens[: one.place], *one.tokens))
            for one, whose in branches
            if whose
        ]
        what = self.busy, begun if lines else None, parts, took_s
        self.at(now + took_s, "computed", what)

    def computed(self, what: Step, now: float) -> None:
        number, begun, branches, took_s = what
        stream = self.stream
        if number != self.busy or stream is None:
            return
        self.busy = None
        for whose, branch, text in branches:
            whose.grow(branch, self.found(text))
        if begun:
            found = self.found(begun.tokens)
            if stream.took(begun, len(begun.tokens), [found.drafted], found.others):
                self.unsent.append(found.drafted)
                self.unsent_s += took_s
                self.unsent_at = begun.lineage, len(begun.tokens) + 1 - len(self.unsent)
        if sides := stream.news():
            self.at(now + self.world.to_draft_s, "handle", sides)
        self.draft(now)
        self.tell(now)

    def foresaw(self, stream: Stream, now: float) -> None:
        """A commit has led onto a branch: what that has drafted is there at once."""
        stream.adopted, position = None, stream.committed
        stream.read = max(stream.read, len(stream.tokens) - 1)
        if stream.foreseen:
            proposal = Proposal(stream.lineage, position, stream.foreseen, 0.0, foreseen=True)
            self.at(now + self.world.to_draft_s, "handle", proposal)

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
            self.at(now + self.world.to_draft_s, "handle", proposal)
            self.unsent, self.unsent_s = [], 0.0

    def found(self, tokens: Sequence[TokenId]) -> Found:
        """What the draft drafts behind `tokens`, and what it would have drafted in its place."""
        drafted, position = self.recorded(tokens), len(tokens)
        others = [position + WRONG * (2 + n) for n in range(len(RANKS))]
        rank = self.trace.get("rank_at_miss", {}).get(str(position - self.world.prompt), 99)
        if drafted.token != position and rank - 2 < len(others):
            others[rank - 2] = position
        return Found(drafted, tuple(others))

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
        if self.skip and position * GOLDEN % 1 > sight(position - self.skip):
            return Drafted(position + WRONG, NEARSIGHTED)  # it would have to know more
        token = position if self.trace["match"][index] else position + WRONG
        return Drafted(token, self.trace["confidence"][index])
