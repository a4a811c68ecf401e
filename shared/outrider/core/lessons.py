"""What a session learns from what its workers do: for its rule, its figures and its trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outrider.core.dispatch import Dispatch
from outrider.core.draft_record import DraftRecord, DraftState
from outrider.core.events import Task
from outrider.core.plain_step import by_itself
from outrider.core.rules import Rule
from outrider.core.stats import Stats
from outrider.core.stock import Judged
from outrider.core.tracing import Trace
from outrider.core.values import Drafted, Proposal, Verdict


class Situation(Protocol):
    """What a session knows."""

    task: Task
    rule: Rule
    stats: Stats
    draft: DraftRecord
    dispatch: Dispatch
    tokens: list[int]

    @property
    def is_drafting(self) -> bool:
        """Whether the draft computes."""


class Lessons:
    """Those of one request; times are seconds on the session's clock."""

    def __init__(self, situation: Situation) -> None:
        self._now = situation
        self.trace = Trace(situation.task.trace)
        self._was_free = False  # what was proposed last
        self._was_late = False  # the draft, at the last verdict
        self._waited_s = 0.0  # time since the last commit that workers spent on other requests

    def judged(self, judged: Judged, reason: str) -> None:
        """Drafted tokens have turned out right or wrong; those behind are void for this reason."""
        for one in judged.agreed:
            self._now.rule.observe(True, one.confidence)
        if judged.differed:
            self._now.rule.observe(False, judged.differed.confidence)
        self._now.stats.hits += judged.hits
        self._now.stats.discarded[reason] += judged.discarded

    def proposed(self, proposal: Proposal, now: float, waits: bool) -> None:
        """What drafting costs. Waiting behind other requests is not part of it.

        `waits`: the target is idle until the draft has more.
        """
        draft, elapsed_s = self._now.draft, proposal.elapsed_s
        if waits:
            self._waited_s += proposal.waited_s
        each_s = draft.heard(proposal, now)
        if each_s is None:
            return
        turn_s = max(0.0, now - draft.told_at - elapsed_s - proposal.waited_s)
        begin_s = turn_s if proposal.position == len(self._now.tokens) else None
        confidences = [one.confidence for one in proposal.drafted]
        # where no model has proposed, nothing is learnt of what its tokens take; and the next time
        # it reads first what it has left out
        is_free = any(one.free for one in proposal.drafted)
        known_s = None if is_free or self._was_free else each_s
        self._was_free = is_free
        self._now.rule.drafted(known_s, confidences, begin_s, proposal.requests)

    def verified(self, verdict: Verdict, way: Sequence[Drafted], now: float, number: int) -> None:
        """How long a round took, and how much of that the target computed.

        `way`: the drafted tokens that lie where the target has gone, of round `number`.
        """
        stats, rule, dispatch = self._now.stats, self._now.rule, self._now.dispatch
        orders, last_commit = dispatch.orders, stats.last_commit
        rule.said(verdict.margins)
        stats.computed(stats.target, now, verdict.elapsed_s)
        stats.cached += min(verdict.cached, len(self._now.task.prompt))
        block, beside = orders.block - verdict.forbidden, verdict.beside
        self.trace.add(verdict, block + beside + 1, now, number)
        round_s = dispatch.pace.answered(verdict, block + beside + 1, now)
        if last_commit is not None and not dispatch.is_reading:
            spent_s = max(0.0, now - last_commit - self._waited_s - verdict.waited_s)
            rows, requests = verdict.rows, verdict.requests
            shared = stats.draft.share(now - verdict.elapsed_s, now, self._now.is_drafting)
            if rows:  # else it also read text
                rule.verified(rows, verdict.elapsed_s, round_s, requests, shared)
            is_late = self._now.draft.state is DraftState.LATE and not block
            # nobody has waited for one that was late already
            rule.committed(len(verdict.tokens), None if is_late and self._was_late else spent_s)
            self._was_late = is_late
            if rows == requests:  # else it shows no plain step
                step_s = by_itself(verdict.elapsed_s, round_s) / rule.drag**shared
                stats.stepped(step_s + verdict.waited_s)
        self._waited_s = 0.0
        stats.beside += beside
        taken = self._taken(verdict, way) if verdict.side else 0
        stats.count(block + taken, verdict.accepted, now, verdict.forbidden)
        stats.repeated += sum(one.free for one in way[: verdict.accepted])

    def _taken(self, verdict: Verdict, way: Sequence[Drafted]) -> int:
        """How many tokens the side has that was right. Behind its first, it is a draft like any."""
        side, stats = self._now.dispatch.side, self._now.stats
        assert side is not None  # it is no contradiction
        begins = side.place - verdict.base + 1
        for at, one in enumerate(way[begins : len(verdict.tokens)], begins):
            self._now.rule.observe(at < verdict.accepted, one.confidence)
        stats.sides += 1
        stats.created += len(side.drafted)
        return len(side.drafted)
