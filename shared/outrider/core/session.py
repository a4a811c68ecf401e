"""One request as a state machine: events in, commands out; no clock, no sockets, no tasks.

Words
    text         the prompt, then what the target has committed: `tokens`
    stock        drafted tokens ahead of the text, in order; those under verification come first
    block        the drafted tokens that the target verifies in one pass
    round        one pass of the target over a block, which may be empty (a plain step)
    lineage      an unbroken run of drafting: it ends where the draft's stream differs from the text
    leave        the first position that the draft may not fill; each commit tells it
    hit          a drafted token that was not verified, and that the target then chose itself

Two rounds, a hit and a miss (`stock.py` and `stream.py` have the rule that both sides follow)
    draft        drafts d1 d2 d3                   d4  d5                  (cut) e1
    session      Verify d1 d2                      stock: d3 d4 d5
    target       chooses d1 d2 t3, t3 = d3
    session      commits d1 d2 t3: a hit, no token of the draft is lost; Verify d4 d5
    target       chooses d4 u5, u5 ≠ d5
    session      commits d4 u5: a miss, the stock is void, a lineage begins; Verify nothing

States
    phase        NEW        nothing has happened yet
                 VERIFYING  the target computes: the prompt (round 0) or a block
                 WAITING    the target is idle until the draft has more, or the deadline passes
                 OVER       Finish or Fault was commanded; later events have no effect
    draft        ABSENT     there is no draft worker
                 IDLE       there is one, but it does not draft for this request
                 DRAFTING   it does
                 PAUSED     it was too unsure to go on: it sends nothing before the next commit
                 LATE       it missed a deadline: nobody waits for it until it sends something

    event        in phase              leads to
    Start        NEW                   VERIFYING
    Verdict      VERIFYING             VERIFYING, WAITING or OVER
    Proposal     WAITING               WAITING or VERIFYING    (else it only adds to the stock)
    Timer        WAITING               WAITING or VERIFYING, the draft being LATE
    DraftReady   any but OVER          the same, the draft DRAFTING or IDLE
    DraftLost    any but OVER          the same or VERIFYING, the draft ABSENT
    Cancel, Failure   any but OVER     OVER

The draft worker can change no token, only how many rows the target's next pass has.
"""

from __future__ import annotations

from enum import Enum, auto

from outrider.core.decoding import contradiction
from outrider.core.draft_record import DraftRecord, DraftState
from outrider.core.events import (
    Cancel,
    CloseDraft,
    Command,
    Commit,
    DraftLost,
    DraftReady,
    Event,
    Failure,
    Fault,
    Finish,
    OpenDraft,
    Settle,
    Start,
    Task,
    Timer,
)
from outrider.core.rules import Rule
from outrider.core.stats import Stats
from outrider.core.stock import Judged, Stock
from outrider.core.text import TextStream
from outrider.core.tracing import Trace
from outrider.core.values import (
    Fragment,
    Proposal,
    Reason,
    Token,
    TokenId,
    Verdict,
    Verify,
    ids_of,
)
from outrider.errors import ProtocolError

BLOCK_PATIENCE_S = 2.0  # longest wait for a block that is sent as a whole
UNTOLD = 256  # committed tokens that a draft worker without leave may not know of yet
OFFENCES = 3  # after this many malformed proposals a request goes on without its draft


class Phase(Enum):
    NEW, VERIFYING, WAITING, OVER = auto(), auto(), auto(), auto()


class Session:
    """The life of one request, from the event `Start` to the command `Finish` or `Fault`."""

    def __init__(self, task: Task, rule: Rule, stats: Stats) -> None:
        self.task, self.rule, self.stats = task, rule, stats
        self.tokens: list[TokenId] = list(task.prompt)
        self.stock = Stock()
        self.draft = DraftRecord.of(task.held)
        self.phase = Phase.NEW
        self.round = 0
        self.block = 0  # drafted tokens in the latest pass that the target was asked for
        self.deadline: float | None = None  # when `Timer` is wanted
        self.trace = Trace(task.trace)
        self._sent = 0.0  # when that pass was asked for
        self._waited_s = 0.0  # time since the last commit that workers spent on other requests
        self._text = TextStream(task.stop)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in `event`, which happened at `now` (seconds); return what to do, in order."""
        if self.phase is Phase.OVER:
            return []
        match event:
            case Verdict():
                return self._on_verdict(event, now)
            case Proposal():
                return self._on_proposal(event, now)
            case Timer():
                return self._on_timer(now)
            case Start(draft):
                return self._start(draft, now)
            case DraftReady():
                return self._on_draft_ready()
            case DraftLost():
                self.draft.state = DraftState.ABSENT
                return self._advance(now)
            case Cancel():
                return self._cancel()
            case Failure(error):
                return self._end(Fault(error))

    # ---- events ---------------------------------------------------------------------------------

    def _start(self, draft: bool, now: float) -> list[Command]:
        self.phase, self.stats.started = Phase.VERIFYING, now
        return [self.task.prefill, *(self._on_draft_ready() if draft else [])]

    def _on_draft_ready(self) -> list[Command]:
        """If the rule wants drafts, let the draft read the text; else it stays idle."""
        draft, task = self.draft, self.task
        if draft.rides:
            return []
        draft.state = DraftState.IDLE
        if not self.rule.drafts or draft.offences >= OFFENCES:
            return []
        text, busy = len(self.tokens), self.phase is Phase.VERIFYING
        reading = self.rule.reads(text, text - len(task.prompt), self._room(), busy, draft.held)
        if not reading.tokens:
            return []
        draft.state = DraftState.DRAFTING
        draft.told, draft.skip = text, text - reading.tokens
        draft.read = draft.skip + reading.known
        stream = self.stock.open(self.tokens)
        self._grant()
        order = OpenDraft(
            lineage=self.stock.lineage,
            base=text,
            tokens=stream,
            sampling=task.sampling,
            vocabulary=task.vocabulary,
            ends=tuple(sorted(task.ends)),
            until=draft.until,
            floors=draft.floors,
            skip=draft.skip,
            recall=reading.recall,
            cache=task.cache,
            constraint=task.constraint,
            begins=len(task.prompt),
        )
        return [order]

    def _on_proposal(self, proposal: Proposal, now: float) -> list[Command]:
        draft, count = self.draft, len(proposal.drafted)
        if not draft.rides:
            return []
        if proposal.lineage < self.stock.lineage:
            self.stats.created += count
            self.stats.discarded["stale"] += count
            self.trace.add(proposal, 0, now)
            return []
        follows = self.stock.may_be(proposal, self.tokens)
        if not (follows and draft.may_send(proposal, self.task.vocabulary)):
            return self._offend(now)
        self.stats.created += count
        self.stats.computed(self.stats.draft, now, proposal.elapsed_s)
        self.trace.add(proposal, 0, now)
        self._learn_costs(proposal, now)
        if not proposal.drafted:
            self.rule.recalled(proposal.hindsight(self.tokens), proposal.elapsed_s)
        draft.state = DraftState.PAUSED if proposal.paused else DraftState.DRAFTING
        draft.read = proposal.position
        self._learn(self.stock.take(proposal, self.tokens), "miss")
        return self._advance(now)

    def _on_verdict(self, verdict: Verdict, now: float) -> list[Command]:
        expected = (self.round, len(self.tokens))
        if self.phase is not Phase.VERIFYING or (verdict.round, verdict.base) != expected:
            return []  # of a round that is over
        drafted = ids_of(self.stock.drafted[: self.block])
        if wrong := contradiction(verdict, drafted, self.task.ends, self.task.vocabulary):
            return self._end(Fault(ProtocolError(f"the target worker broke the protocol: {wrong}")))
        self.phase, self.deadline = Phase.WAITING, None
        self.block -= verdict.forbidden  # those were not evaluated
        self._measure(verdict, now)
        fragment, reason = self._commit(verdict)
        if reason:
            self.stats.discarded["stop"] += len(self.stock) - self.block - verdict.forbidden
            self.rule.ended(len(self.tokens) - len(self.task.prompt))
            return [fragment, *self._end(Finish(reason))]
        judged = self.stock.commit(self.block, verdict, self.tokens)
        if judged.differed:
            self.draft.next_at = now + self.draft.gap_s  # the draft begins anew
        self._learn(judged, "correction" if verdict.accepted < self.block else "miss")
        self.draft.told_at = now
        return self._go_on(fragment, now)

    def _go_on(self, fragment: Fragment, now: float) -> list[Command]:
        """The target is idle again: give it its next block, then tell the draft and the client."""
        draft = self.draft
        joining = self._leave_or_join()
        following, before = self._verify(now), draft.until
        self._grant()
        if draft.state is DraftState.PAUSED:
            draft.state = DraftState.DRAFTING
        # a draft that has no leave, and had none, need not hear of every commit
        has_leave = max(before, draft.until) > len(self.tokens)
        untold = len(self.tokens) - draft.told
        tell = [self._tell()] if draft.rides and (has_leave or untold > UNTOLD) else []
        # the workers first: the client's fragment can wait a microsecond
        settle = [Settle()] if following else []
        return [*joining, *following, *tell, fragment, *settle]

    def _leave_or_join(self) -> list[Command]:
        """A draft that would have to read on without drafting leaves; later it may be worth it."""
        if self.draft.state is DraftState.IDLE:
            return self._on_draft_ready()
        if self.draft.rides and self.rule.dismisses:
            self.stats.discarded["dismissed"] += len(self.stock)
            self.stock.drafted.clear()
            self.draft.state = DraftState.IDLE
            return [CloseDraft()]
        return []

    def _on_timer(self, now: float) -> list[Command]:
        if self.deadline is None or now < self.deadline:
            return []
        if self.draft.rides:
            self.draft.state = DraftState.LATE
        return self._advance(now)

    def _cancel(self) -> list[Command]:
        self.stats.discarded["cancelled"] += len(self.stock)
        held = self._text.end()
        last = [Fragment(self.round, held, (), ())] if held else []
        return [*last, *self._end(Finish("cancelled"))]

    def _end(self, last: Command) -> list[Command]:
        close = [CloseDraft()] if self.draft.rides else []
        self.phase, self.deadline = Phase.OVER, None
        self.stock.drafted.clear()
        return [*close, last]

    # ---- the text -------------------------------------------------------------------------------

    def _commit(self, verdict: Verdict) -> tuple[Fragment, Reason | None]:
        """Append the verdict's tokens, up to the end of the answer; say why it ended, if it did."""
        text, done = "", list[Token]()
        reason: Reason | None = None
        for token in verdict.told(self.block):
            done.append(token)
            self.tokens.append(token.id)
            if token.id in self.task.ends:
                reason = "stop"
            else:
                released, stopped = self._text.feed(token.piece)
                text += released
                reason = "stop" if stopped else "length" if self._room() <= 0 else None
            if reason:
                text += self._text.end()
                break
        self.stats.committed(done, truncated=max(0, verdict.accepted - len(done)))
        drafted = tuple(self.stock.drafted[: self.block])
        return Fragment(self.round, text, tuple(done), drafted), reason

    def _room(self) -> int:
        """How many tokens may still be generated."""
        room = self.task.context - len(self.tokens)
        if self.task.n_predict is not None:
            generated = len(self.tokens) - len(self.task.prompt)
            room = min(room, self.task.n_predict - generated)
        return room

    # ---- what is learnt -------------------------------------------------------------------------

    def _learn(self, judged: Judged, reason: str) -> None:
        """Learn from the drafted tokens that the text has shown to be right or wrong."""
        for one in judged.agreed:
            self.rule.observe(True, one.confidence)
        if judged.differed:
            self.rule.observe(False, judged.differed.confidence)
        self.stats.hits += judged.hits
        self.stats.discarded[reason] += judged.discarded

    def _learn_costs(self, proposal: Proposal, now: float) -> None:
        """Learn what drafting costs. Waiting behind other requests is not part of it."""
        draft, elapsed_s = self.draft, proposal.elapsed_s
        if self.phase is Phase.WAITING:
            self._waited_s += proposal.waited_s
        if not proposal.drafted:
            return
        each_s = elapsed_s / len(proposal.drafted)
        draft.gap_s += 0.2 * (each_s - draft.gap_s)
        draft.next_at = now + each_s
        turn_s = max(0.0, now - draft.told_at - elapsed_s - proposal.waited_s)
        begin_s = turn_s if proposal.position == len(self.tokens) else None
        confidences = [one.confidence for one in proposal.drafted]
        self.rule.drafted(each_s, confidences, begin_s, proposal.requests)

    def _measure(self, verdict: Verdict, now: float) -> None:
        """Record how long the round took, and how much of that the target computed."""
        stats, block, last_commit = self.stats, self.block, self.stats.last_commit
        stats.computed(stats.target, now, verdict.elapsed_s)
        stats.cached += verdict.cached
        self.trace.add(verdict, block + 1, now)
        if last_commit is not None:
            round_trip_s = max(0.0, now - self._sent - verdict.waited_s)
            spent_s = max(0.0, now - last_commit - self._waited_s - verdict.waited_s)
            rows, requests = verdict.rows, verdict.requests
            if rows:  # else it also read a prompt
                self.rule.verified(rows, verdict.elapsed_s, round_trip_s, requests)
            self.rule.committed(len(verdict.tokens), spent_s)
            if rows == requests:  # else it shows no plain step
                stats.stepped(now - self._sent)
        self._waited_s = 0.0
        stats.count(block, verdict.accepted, now, verdict.forbidden)

    # ---- the draft, and the next pass -----------------------------------------------------------

    def _offend(self, now: float) -> list[Command]:
        self.draft.offences += 1
        if self.draft.offences < OFFENCES:
            return []
        self.draft.state = DraftState.IDLE  # and stays so
        return [CloseDraft(), *self._advance(now)]

    def _grant(self) -> None:
        """Set the draft's leave as the rule wants it now."""
        draft = self.draft
        lead = self.rule.lead(busy=self.phase is Phase.VERIFYING)
        draft.until = len(self.tokens) + max(0, min(lead, self._room() - 1))
        draft.granted = max(draft.granted, draft.until)
        draft.floors = self.rule.floors if lead else ()

    def _tell(self) -> Commit:
        """The text that the draft does not know yet, and its leave."""
        draft = self.draft
        base, draft.told = draft.told, len(self.tokens)
        return Commit(base, tuple(self.tokens[base:]), draft.until, draft.floors)

    def _advance(self, now: float) -> list[Command]:
        """If the target is idle, give it its next block, unless the rule waits for the draft."""
        if self.phase is not Phase.WAITING:
            return []
        draft, self.deadline = self.draft, None
        following = self._verify(now)
        before, drafted_to = draft.until, len(self.tokens) + len(self.stock)
        self._grant()
        # the draft is told only what it cannot know: that it may go further, or must stop early
        goes_further = draft.until > before
        stops_early = drafted_to < before and draft.until != before
        settle = [Settle()] if following else []
        if not draft.rides or self._has_ended or not (goes_further or stops_early):
            return [*following, *settle]
        if draft.state is DraftState.PAUSED:
            draft.state = DraftState.DRAFTING
        return [*following, self._tell(), *settle]

    @property
    def _has_ended(self) -> bool:
        """Whether the stock ends with an end token, behind which the draft does not go on."""
        return bool(self.stock.drafted) and self.stock.drafted[-1].token in self.task.ends

    def _verify(self, now: float) -> list[Command]:
        draft, drafted = self.draft, self.stock.drafted
        room = self._room() - 1
        is_coming = draft.state is DraftState.DRAFTING and not self._has_ended
        next_s = max(0.0, draft.next_at - now) if is_coming and len(drafted) < room else None
        block = self.rule.decide([one.confidence for one in drafted], room, next_s)
        if block is None:
            block_s = self.rule.block_s(len(self.tokens) - draft.read)
            self.deadline = now + min(draft.patience_s + block_s, BLOCK_PATIENCE_S)
            return []
        self.phase, self.block, self._sent = Phase.VERIFYING, block, now
        self.round += 1
        return [Verify(self.round, len(self.tokens), ids_of(drafted[:block]))]
