"""What a pair was found to cost where it is placed, and how often its draft agrees.

All of it is read off the spans of answers: when which worker computed, how many rows, what came.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np

from outrider.core.estimates import Costs
from outrider.core.values import Mode, Span, TokenId
from outrider_services.bench.replay import World

ENOUGH = 3  # passes over so many rows are a measurement; fewer may be an accident
MOST = 4.0  # medians: what took longer counts for no more
LONGEST = 64  # drafted tokens in the longest pass whose cost a world knows

Curve = tuple[float, ...]  # seconds of a pass over 1, 2, 3 … rows


@dataclass(frozen=True, slots=True)
class Worker:
    """One of the pair, as it told of itself, and how far away it is."""

    model: str
    device: str
    build: str
    cores: str  # of its machine, such as "0,1", or "gpu0"; "": a device of its own
    here: bool  # on the coordinator's machine; False also for a made-up device
    memory: int  # bytes
    rollback_s: float  # 0: not measured
    crowd_s: Curve  # a row each of 1, 2 … requests in one pass
    link_s: float = 0.0  # a message to it or from it, and what is done with it


@dataclass
class Timing:
    """What things took in the answers of one mode, in seconds."""

    passes: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))  # by rows
    drafted: list[float] = field(default_factory=list)  # of one token each
    read: list[float] = field(default_factory=list)  # of a token of the prompt, by the draft
    # ways there and back: from a drafted block to the pass over it, and from that to the next one
    to_target: list[float] = field(default_factory=list)
    to_draft: list[float] = field(default_factory=list)

    def add(self, spans: Iterable[Span], unread: int = 0) -> None:
        """Take in what one answer's spans show.

        The draft's first token includes reading the text before it, if so much was `unread`.
        """
        spans = list(spans)
        drafts = [span for span in spans if span.lane == "draft" and span.tokens]
        for before, span in pairwise(span for span in spans if span.lane == "target"):
            self.passes[span.rows].append(span.end - span.start)
            self._note_ways(before, span, drafts)
        others = [drafting_s(*pair) for pair in pairwise(drafts)]
        self.drafted += others
        if unread and others:
            first = drafts[0].end - drafts[0].start
            self.read.append(max(0.0, first - usual(others)) / unread)

    def _note_ways(self, before: Span, span: Span, drafts: Sequence[Span]) -> None:
        """How long the messages about a pass were under way, where one worker waited for them."""
        drafted = [one.end for one in drafts if one.end <= span.start]
        if span.rows > 1 and drafted and drafted[-1] >= before.end:
            self.to_target.append(span.start - drafted[-1])
        end = span.base + len(span.tokens)
        behind = (one.start for one in drafts if one.base == end and one.start >= span.end)
        if (began := next(behind, None)) is not None:
            self.to_draft.append(began - span.end)


def drafting_s(before: Span, span: Span) -> float:
    """Seconds of a token of `span`. A short pause behind the one `before` is a part of it."""
    took_s, pause_s = span.end - span.start, span.start - before.end
    goes_on = span.base == before.base + len(before.tokens) and pause_s < took_s
    return (took_s + pause_s * goes_on) / len(span.tokens)


def usual(seconds: Sequence[float]) -> float:
    """Their mean: what takes long now and then is paid for, too. An accident is cut to size."""
    return float(np.minimum(seconds, MOST * median(seconds)).mean())


@dataclass(frozen=True, slots=True)
class Text:
    """One answer: where the draft agreed with the target, as `bench.replay` plays it."""

    category: str
    prompt_tokens: int
    trace: dict[str, Any]

    @property
    def accepted(self) -> float:
        """The share of the tokens, each behind the right text, that the draft had right."""
        return float(np.mean(self.trace["match"]))


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that was measured of a pair."""

    target: Worker
    draft: Worker
    shares: bool  # whether both compute in the same place, so that `auto` has them take turns
    curve_s: Curve  # the target's, measured at load
    prefill_s: float  # the target's reading of a token
    read_s: float  # the draft's
    timings: Mapping[Mode, Timing]
    texts: tuple[Text, ...]
    tokens: int  # of the answers in `texts`
    near_ties: int  # tokens of them that another rounding might have chosen otherwise
    differences: tuple[str, ...] = ()  # where a mode said something else than plain
    differ_near: bool = True  # … at near-ties alone

    @property
    def pass_s(self) -> float:
        """A pass over one row."""
        return self.world("sync").verify_s[0]

    @property
    def accepted(self) -> float:
        """The share of right tokens over all texts."""
        return float(np.mean([match for text in self.texts for match in text.trace["match"]]))

    def world(self, mode: Mode) -> World:
        """What things take in this mode: while the draft drafts, or while it waits."""
        timing = self.timings[mode]
        passes = dict(timing.passes)
        if mode == "sync":  # before a plain step it computes as little as in plain mode
            passes[1] = self.timings["plain"].passes[1]
        drag = self.drag if mode == "pipelined" else 1.0
        curve = Costs(corrected(self.curve_s, passes), 0.0, 0.0).passes(LONGEST)
        return World(
            tuple(map(float, curve / drag)),
            usual(timing.drafted),
            self.target.link_s,
            self.draft.link_s,
            prefill_s=self.prefill_s,
            read_s=self.read_s,
            rollback_s=self.target.rollback_s,
            drag=drag,
        )

    @property
    def drag(self) -> float:
        """How many times as long a pass takes while the draft drafts; at least 1."""
        beside, alone = self.timings["pipelined"].passes, self.timings["sync"].passes
        seen = [n for n in beside if min(len(beside[n]), len(alone.get(n, ()))) >= ENOUGH]
        if not seen:
            return 1.0
        return max(1.0, median(usual(beside[n]) / max(usual(alone[n]), 1e-9) for n in seen))


def corrected(curve_s: Curve, passes: Mapping[int, Sequence[float]]) -> Curve:
    """The curve that was measured at load, moved to where `passes` by their rows were seen.

    Between two numbers of rows that were seen, the factors lie on a straight line.
    """
    seen = [n for n in sorted(passes) if len(passes[n]) >= ENOUGH and n <= len(curve_s)]
    if not seen:
        return curve_s
    factors = [usual(passes[n]) / max(curve_s[n - 1], 1e-9) for n in seen]
    rows = range(1, len(curve_s) + 1)
    return tuple(map(float, np.asarray(curve_s) * np.interp(rows, seen, factors)))


def agreement(start: int, tokens: Sequence[TokenId], spans: Iterable[Span]) -> dict[str, Any]:
    """The trace of an answer that begins at position `start`: see `bench.traces.record`.

    Every drafted token counts that stood behind the right text, used or not. Positions for which
    there was none are left out.
    """
    lineages: dict[int, dict[int, tuple[TokenId, float]]] = defaultdict(dict)
    for span in spans:
        if span.lane == "draft":
            told = zip(span.tokens, span.confidences, strict=False)
            lineages[span.number].update(enumerate(told, span.base - start))
    found: dict[int, tuple[int, float]] = {}
    off_path: dict[int, list[float]] = {}
    for drafted in lineages.values():
        wrong: list[float] | None = None  # the confidences behind the first wrong token
        for at in sorted(one for one in drafted if one >= 0):
            token, confidence = drafted[at]
            if wrong is not None:
                wrong.append(confidence)
            elif at < len(tokens):
                match = int(token == tokens[at])
                found.setdefault(at, (match, confidence))
                if not match:
                    wrong = off_path.setdefault(at, [])
    known = sorted(found)
    return {
        "match": [found[at][0] for at in known],
        "confidence": [found[at][1] for at in known],
        "off_path_confidence": {
            str(n): off_path[at] for n, at in enumerate(known) if off_path.get(at)
        },
    }
