"""One request as a state machine: events in, commands out; no clock, no sockets, no tasks.

Words
    text         the prompt, then what the target has committed: `tokens`
    stock        drafted tokens ahead of the text, in order; those under verification come first
    block        the drafted tokens that the target verifies in one pass
    round        one pass of the target over a block, which may be empty (a plain step)
    order        asks for a round, perhaps before the verdict on the one before (`orders.py`)
    lineage      an unbroken run of drafting: it ends where the draft's stream differs from the text
    leave        the first position that the draft may not fill; each commit tells it
    hit          a drafted token that was not verified, and that the target then chose itself
    side         what may follow where the block is wrong; verified with it where rows cost little

Two rounds, a hit and a miss (`stock.py` and `stream.py` have the rule that both sides follow)
    draft        drafts d1 d2 d3                   d4  d5                  (cut) e1
    session      Verify d1 d2                      stock: d3 d4 d5
    target       chooses d1 d2 t3, t3 = d3
    session      commits d1 d2 t3: a hit, no token of the draft is lost; Verify d4 d5
    target       chooses d4 u5, u5 ≠ d5
    session      commits d4 u5: a miss, the stock is void, a lineage begins; Verify nothing

States
    phase        NEW        nothing has happened yet
                 VERIFYING  the target computes: the prompt (round 0), a block that was ordered, or
                            a plain step of its own; at the deadline the next block is due
                 WAITING    the target is idle until the draft has more, or the deadline passes
                 LOST       there is no target worker: the text is kept for the next one to read
                 OVER       Finish or Fault was commanded; later events have no effect
    draft        ABSENT     there is no draft worker
                 IDLE       there is one, but it does not draft for this request
                 DRAFTING   it does
                 PAUSED     it was too unsure to go on: it sends nothing before the next commit
                 LATE       it missed a deadline, or still reads while the target goes on: nobody
                            waits for it until it sends something

    event        in phase              leads to
    Start        NEW                   VERIFYING
    Verdict      VERIFYING             VERIFYING, WAITING or OVER
    Proposal     WAITING               WAITING or VERIFYING    (else it adds to the stock)
    Timer        WAITING               WAITING or VERIFYING, the draft being LATE
    Proposal, Timer   VERIFYING        the same, perhaps with one order more under way
    DraftReady   any but OVER          the same, the draft DRAFTING, LATE or IDLE
    DraftLost    any but OVER          the same or VERIFYING, the draft ABSENT
    TargetLost   any but OVER          LOST
    TargetReady  LOST                  VERIFYING, a round later: what the lost one says is stale
    Cancel, Failure   any but OVER     OVER

The draft worker can change no token, only how many rows the target's next pass has.
"""

from __future__ import annotations

from enum import Enum, auto

from outrider.core.answer import Answer
from outrider.core.decoding import contradiction
from outrider.core.dispatch import Dispatch
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
    Settle,
    Start,
    TargetLost,
    TargetReady,
    Task,
    Timer,
)
from outrider.core.lessons import Lessons
from outrider.core.rules import Rule
from outrider.core.stats import Stats
from outrider.core.stock import Stock
from outrider.core.values import Drafted, Fragment, Proposal, Sides, Verdict
from outrider.errors import ProtocolError

# committed tokens that a draft worker without leave may not know of yet, or one that hardly ever
UNTOLD, UNTOLD_SILENT = 256, 7  # has an idea: each message takes of the target's cores
UNHEARD = 2  # plain steps: a target tells of each as soon as it has begun the next one
OFFENCES = 3  # malformed proposals, after which a request goes on without its draft


class Phase(Enum):
    NEW, VERIFYING, WAITING, LOST, OVER = auto(), auto(), auto(), auto(), auto()


class Session:
    """The life of one request, from the event `Start` to the command `Finish` or `Fault`."""

    def __init__(self, task: Task, rule: Rule, stats: Stats) -> None:
        self.task, self.rule, self.stats = task, rule, stats
        self.answer = Answer(task)
        self.tokens = self.answer.tokens
        self.stock = Stock()
        self.draft = DraftRecord.of(task.held)
        self.phase = Phase.NEW
        self.dispatch = Dispatch(self)
        self.commits = self.missed = 0  # verdicts so far, and how often one was not there
        self.deadline: float | None = None  # when `Timer` is wanted
        self.lessons = Lessons(self)

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in `event`, which happened at `now` (seconds); return what to do, in order."""
        if self.phase is Phase.OVER:
            return []
        match event:
            case Verdict():
                return self._on_verdict(event, now)
            case Proposal():
                return self._on_proposal(event, now)
            case Sides():
                return self._on_sides(event, now)
            case Timer():
                return self._on_timer(now)
            case Start(draft):
                return self._start(draft, now)
            case DraftReady():
                return self._on_draft_ready()
            case DraftLost():
                self.draft.state = DraftState.ABSENT
                return self._advance(now)
            case TargetLost():
                self.phase, self.deadline = Phase.LOST, None
                self.dispatch.lost()
                return []
            case TargetReady():
                return self._resume()
            case Cancel():
                return self._cancel()
            case Failure(error):
                return self._end(Fault(error))

    # ---- events ---------------------------------------------------------------------------------

    def _start(self, draft: bool, now: float) -> list[Command]:
        self.stats.started, self.stats.resumed = now, self.answer.resumed
        if self.answer.ended:  # all of it was received before
            return self._end(Finish(self.answer.ended))
        return [*self._read(), *(self._on_draft_ready() if draft else [])]

    def _resume(self) -> list[Command]:
        """Go on with a target that has nothing of the text yet; the stock is as good as before."""
        if self.phase is not Phase.LOST:
            return []
        return self._read()

    def _read(self) -> list[Command]:
        self.phase, self.deadline = Phase.VERIFYING, None
        return [self.task.reading(tuple(self.tokens), self.dispatch.begin())]

    def _on_draft_ready(self) -> list[Command]:
        """If the rule wants drafts, let the draft read the text; else it stays idle."""
        draft, task = self.draft, self.task
        if draft.rides:
            return []
        draft.state = DraftState.IDLE
        if not self.rule.drafts or draft.offences >= OFFENCES:
            return []
        text, busy = len(self.tokens), self.phase is Phase.VERIFYING
        reading = self.rule.reads(text, text - len(task.prompt), self.answer.room, busy, draft.held)
        if not reading.tokens:
            return []
        draft.opened(is_awaited=self.rule.awaits_reading)
        draft.told, draft.skip = text, text - reading.tokens
        draft.read = draft.skip + reading.known
        stream = self.stock.open(self.tokens)
        self._grant()
        opening = task.opening(self.stock.lineage, text, stream)
        leave = {"until": draft.until, "floors": draft.floors}
        if self.rule.mode == "pipelined":  # in turns the target would wait for that
            opening = opening.changed(foresees=True, sides=task.sides)
        return [opening.changed(skip=draft.skip, recall=reading.recall, **leave)]

    def _on_proposal(self, proposal: Proposal, now: float) -> list[Command]:
        draft, count = self.draft, len(proposal.drafted)
        if not draft.rides:
            return []
        if proposal.lineage < self.stock.lineage:
            self.stats.created += count
            self.stats.discarded["stale"] += count
            self.lessons.trace.add(proposal, 0, now, proposal.lineage)
            return []
        follows = self.stock.may_be(proposal, self.tokens)
        if not (follows and draft.may_send(proposal, self.task.vocabulary)):
            return self._offend(now)
        self.stats.created += count
        self.stats.foreseen += proposal.foreseen
        self.stats.computed(self.stats.draft, now, proposal.elapsed_s)
        self.lessons.trace.add(proposal, 0, now, proposal.lineage)
        self.lessons.proposed(proposal, now, waits=self.phase is Phase.WAITING)
        if not (self.stock.drafted or proposal.recalled):
            self.rule.offered(bool(proposal.drafted))
        if not proposal.drafted:
            self.rule.recalled(proposal.hindsight(self.tokens), proposal.elapsed_s)
        draft.state = DraftState.PAUSED if proposal.paused else DraftState.DRAFTING
        draft.read = proposal.position
        self.lessons.judged(self.stock.take(proposal, self.tokens), "miss")
        return self._advance(now)

    def _on_sides(self, told: Sides, now: float) -> list[Command]:
        """They go along with the next block; nobody waits for them."""
        if not self.draft.rides:
            return []
        if not self.stock.may_tell(told, self.task.vocabulary):
            return self._offend(now)
        self.stock.take_sides(told)
        return []

    def _on_verdict(self, verdict: Verdict, now: float) -> list[Command]:
        drafted = self.dispatch.answered(verdict)
        if drafted is None:
            return self._missed(verdict)
        ends, vocabulary, side = self.task.ends, self.task.vocabulary, self.dispatch.side
        if wrong := contradiction(verdict, drafted, ends, vocabulary, side):
            return self._end(Fault(ProtocolError(f"the target worker broke the protocol: {wrong}")))
        self.phase, self.deadline = Phase.WAITING, None
        block = self.dispatch.orders.block - verdict.forbidden
        way = self.stock.way(block, verdict.base, side)
        self.lessons.verified(verdict, way, now, self.commits)
        fragment = self._commit(verdict, way)
        if self.answer.ended:
            self.stats.discarded["stop"] += len(self.stock) - block - verdict.forbidden
            self.rule.ended(len(self.tokens) - len(self.task.prompt))
            return [fragment, *self._end(Finish(self.answer.ended))]
        judged = self.stock.commit(block, verdict, self.tokens, side)
        if judged.differed:
            self.draft.begins_anew(now)
        is_wrong = side is not None or verdict.accepted < block
        self.lessons.judged(judged, "correction" if is_wrong else "miss")
        self.draft.told_at = now
        if self.dispatch.committed(not is_wrong and not verdict.forbidden, now):
            self.phase = Phase.VERIFYING
        return self._go_on(fragment, now)

    def _missed(self, verdict: Verdict) -> list[Command]:
        """It is of a round that is over; or it came before the one that it follows.

        Then that one may never come, and the target reads anew what is known.
        """
        if verdict.base <= len(self.tokens) or self.dispatch.is_reading or self.phase is Phase.LOST:
            return []
        self.missed += 1
        self.dispatch.lost()
        if self.missed > OFFENCES:
            return self._end(Fault(ProtocolError("the target's verdicts come out of order")))
        return self._read()

    def _go_on(self, fragment: Fragment, now: float) -> list[Command]:
        """Give the target what it is to do next, then tell the draft and the client."""
        draft = self.draft
        joining = self._leave_or_join()
        following, before = self._order(now), draft.until
        self._grant()
        if draft.state is DraftState.PAUSED:
            draft.state = DraftState.DRAFTING
        # a draft that has no leave, and had none, need not hear of every commit
        has_leave = max(before, draft.until) > len(self.tokens)
        most = UNTOLD if not has_leave else UNTOLD_SILENT if self.rule.is_silent else 0
        tell = [self._tell()] if draft.rides and len(self.tokens) - draft.told > most else []
        # the workers first: the client's fragment can wait a microsecond
        settle = [Settle()] if self.phase is Phase.VERIFYING else []
        return [*joining, *following, *tell, fragment, *settle]

    def _leave_or_join(self) -> list[Command]:
        """A draft that would have to read on without drafting leaves; later it may be worth it."""
        if self.draft.state is DraftState.IDLE:
            return self._on_draft_ready()
        if self.draft.rides and self.rule.dismisses and not self.block:
            self.stats.discarded["dismissed"] += len(self.stock)
            self.stock.drop()
            self.draft.state = DraftState.IDLE
            return [CloseDraft()]
        return []

    def _on_timer(self, now: float) -> list[Command]:
        if self.deadline is None or now < self.deadline:
            return []
        if self.draft.rides and self.phase is Phase.WAITING:
            self.draft.state = DraftState.LATE
        return self._advance(now)

    def _cancel(self) -> list[Command]:
        self.stats.discarded["cancelled"] += len(self.stock)
        held = self.answer.rest()
        last = [Fragment(self.commits, held, (), ())] if held else []
        return [*last, *self._end(Finish("cancelled"))]

    def _end(self, last: Command) -> list[Command]:
        close = [CloseDraft()] if self.draft.rides else []
        self.phase, self.deadline = Phase.OVER, None
        self.stock.drop()
        return [*close, last]

    def _commit(self, verdict: Verdict, way: tuple[Drafted, ...]) -> Fragment:
        """Append the verdict's tokens, up to the end of the answer; `way` was drafted there."""
        text, done = self.answer.take(verdict.told(len(way)))
        self.stats.committed(done, truncated=max(0, verdict.accepted - len(done)))
        number, self.commits = self.commits, self.commits + 1
        return Fragment(number, text, tuple(done), way)

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
        lead = self.dispatch.lead(busy=self.phase is Phase.VERIFYING)
        draft.until = len(self.tokens) + max(0, min(lead, self.answer.room - 1))
        draft.granted = max(draft.granted, draft.until)
        draft.floors = self.rule.floors if lead else ()

    def _tell(self) -> Commit:
        """The text that the draft does not know yet, and its leave."""
        draft = self.draft
        base, draft.told = draft.told, len(self.tokens)
        return Commit(base, tuple(self.tokens[base:]), draft.until, draft.floors)

    def _advance(self, now: float) -> list[Command]:
        """Give the target its next block, unless it has enough, or the rule waits for the draft."""
        if self.phase not in (Phase.WAITING, Phase.VERIFYING):
            return []
        was_idle = self.phase is Phase.WAITING
        draft, following = self.draft, self._order(now)
        settle = [Settle()] if following else []
        before, drafted_to = draft.until, len(self.tokens) + len(self.stock)
        if was_idle:
            self._grant()
        # the draft is told only what it cannot know: that it may go further, or must stop early
        goes_further = draft.until > before
        stops_early = drafted_to < before and draft.until != before
        if not draft.rides or self.has_ended or not (goes_further or stops_early):
            return [*following, *settle]
        if draft.state is DraftState.PAUSED:
            draft.state = DraftState.DRAFTING
        return [*following, self._tell(), *settle]

    @property
    def reach(self) -> int:
        """The target, of which nothing more is heard, may have evaluated the text up to here."""
        drafted, leave = len(self.tokens) + len(self.stock), self.dispatch.orders.leave
        beside = self.dispatch.orders.beside
        return max(drafted, beside, min(drafted + UNHEARD, leave))

    @property
    def block(self) -> int:
        """How many drafted tokens the target verifies now, as far as is known here."""
        return len(self.dispatch.orders.rest(self.tokens) or ())

    @property
    def is_drafting(self) -> bool:
        """Whether the draft computes, as far as is known here."""
        draft, drafted_to = self.draft, len(self.tokens) + len(self.stock)
        works = draft.state in (DraftState.DRAFTING, DraftState.LATE)
        return works and drafted_to < draft.until and not self.has_ended

    @property
    def takes_turns(self) -> bool:
        """Whether its draft drafts while the target is idle."""
        return self.rule.mode == "sync" and self.draft.rides and self.rule.drafts

    @property
    def has_ended(self) -> bool:
        """Whether the stock ends with an end token, behind which the draft does not go on."""
        return bool(self.stock.drafted) and self.stock.drafted[-1].token in self.task.ends

    def _order(self, now: float) -> list[Command]:
        """What the target is to be asked for now."""
        following, self.deadline = self.dispatch.next(now, self.phase is Phase.WAITING)
        self.phase = Phase.VERIFYING if following else self.phase
        return [*following]
