"""Runs the sessions of the requests: gives them events, and carries out what they command.

It knows what the passes cost, and so by which rule each session decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

from outrider.core.draft_record import DraftRecord
from outrider.core.events import (
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
    Prefill,
    Settle,
    Start,
    TargetLost,
    TargetReady,
    Timer,
)
from outrider.core.gathering import Gathering
from outrider.core.priced import PricedRule
from outrider.core.rules import FixedRule, Rule
from outrider.core.session import OFFENCES, Phase, Session
from outrider.core.stats import Report, Stats
from outrider.core.values import Fragment, Proposal, Sides, Verdict, Verify
from outrider.errors import BadRequest, InternalError, OutriderError
from outrider.wire import messages as wire
from outrider_services.pipeline import journal
from outrider_services.pipeline.calls import Tell
from outrider_services.pipeline.member import Member
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.pairs import Pairs
from outrider_services.pipeline.requests import Defaults, Lengths, Request, Requests
from outrider_services.pipeline.roster import Roster

log = logging.getLogger(__name__)

REPORT_S = 0.1  # at least between two tables of a request's figures

End = Callable[[Request, wire.Message], None]  # gives a request its one outcome


class Sessions:
    """The sessions of the requests that run."""

    def __init__(
        self,
        roster: Roster,
        requests: Requests,
        metrics: Metrics,
        defaults: Defaults,
        clock: Callable[[], float],
        tell: Tell,
        end: End,
    ) -> None:
        self._roster, self._requests, self._defaults = roster, requests, defaults
        self._metrics, self._clock, self._tell, self._end = metrics, clock, tell, end
        self.pairs = Pairs(roster, requests, defaults)
        self._gatherings: dict[Member, Gathering[int]] = {}  # by target

    def count(self) -> None:
        """What a step costs each request depends on who else runs; so does whether the target may
        go on by itself with it: drafts that share its device must have their turns.
        """
        self.pairs.count()
        sessions: dict[Member | None, list[Session]] = {}
        for request in self._requests.running.values():
            if request.session:
                sessions.setdefault(request.target, []).append(request.session)
        for together in sessions.values():
            for session in together:
                session.dispatch.together = together

    def start(self, request: Request, target: Member) -> None:
        """Begin to generate."""
        submit = request.submit
        lengths = Lengths.of(submit, self._defaults)
        if lengths.n_max > 0 and self.pairs.mode(submit.mode, None, None) != "plain":
            request.draft = self.pairs.draft_for(request, begins=True)
        self.pairs.count()
        rule = self._rule(request, lengths)
        task = request.task(target.hello)
        task = replace(task, held=self.pairs.held(request, request.draft))
        step_s = target.hello.curve_s[0]
        stats = Stats(rule.mode, task.sampling.seed, request.submitted, step_s=step_s)
        request.session = Session(task, rule, stats)
        self.count()
        self._metrics.started()
        try:
            model = target.hello.model
            self._tell(request.client, wire.Started(submit.call, model, rule.mode, request.tokens))
            self.advance(request, Start(draft=request.draft is not None))
        except BadRequest as exc:
            self.fail(request, exc)

    def forget(self, request: Request) -> None:
        """It is over; its place with its draft may be another's."""
        if gathering := self._gatherings.get(request.target) if request.target else None:
            gathering.drop(request.id)
        self.pairs.ended(request)
        self.count()
        self.seat()

    # ---- workers that come and go ---------------------------------------------------------------

    def lost_target(self, request: Request) -> None:
        """Its target is gone: it keeps its text for another one."""
        self._gathering(request).drop(request.id)
        request.target = None
        self.advance(request, TargetLost())

    def resume(self, request: Request, target: Member) -> None:
        """Go on with this target, at this target's costs."""
        request.target = target
        if session := request.session:
            session.rule = self._rule(request, Lengths.of(request.submit, self._defaults))
        self.count()
        self.advance(request, TargetReady())
        if request.draft is None:
            self._give_draft(request)

    def seat(self) -> None:
        """Give a draft to those that ride without one, as far as there are places."""
        for request in list(self._requests.running.values()):
            if request.draft is None:
                self._give_draft(request)

    def drafted(self, request: Request, proposal: Proposal | Sides) -> None:
        """Its draft has sent this; one that keeps breaking the rules does not ride any more."""
        session, draft = request.session, request.draft
        if session is None or draft is None:
            return
        lineage, offences = session.stock.lineage, session.draft.offences
        self._metrics.stale["over"] += not session.draft.rides
        self.advance(request, proposal)
        self._metrics.stale["lineage"] += proposal.lineage < lineage
        self._metrics.stale["malformed"] += session.draft.offences > offences
        if session.draft.offences >= OFFENCES:
            self.failed_draft(request, draft)

    def failed_draft(self, request: Request, draft: Member) -> None:
        """This draft is of no use to this request."""
        request.failed_drafts.add(draft.hello.incarnation)
        self.lost_draft(request)

    def lost_draft(self, request: Request) -> None:
        """Its draft does not ride any more; another one that stands by takes over."""
        request.draft = None
        self.advance(request, DraftLost())
        self._give_draft(request)

    def _give_draft(self, request: Request) -> None:
        session = request.session
        if session is None or session.phase is Phase.OVER or session.rule.mode == "plain":
            return
        request.draft = self.pairs.draft_for(request)
        if request.draft is None:
            return
        self.pairs.count()
        # what is known of the one before does not hold for this one
        session.draft = DraftRecord.of(self.pairs.held(request, request.draft))
        session.rule = self._rule(request, Lengths.of(request.submit, self._defaults))
        session.stats.mode = session.rule.mode
        self.advance(request, DraftReady())

    # ---- events and commands --------------------------------------------------------------------

    def advance(self, request: Request, event: Event) -> None:
        """Give its session an event and carry out the commands."""
        self._advance([(request, event)])

    def advance_all(self, verdicts: Sequence[tuple[Request, Verdict]]) -> None:
        """The same for requests that shared a pass, so that they can share the next."""
        self._advance(verdicts)

    def _advance(self, happened: Sequence[tuple[Request, Event]]) -> None:
        """The target comes first: it is idle, and all else can wait a millisecond."""
        todo: list[tuple[Request, Session, list[Command]]] = []
        for request, event in happened:
            if session := request.session:
                commands = self._handled(request, session, event)
                # a verdict commits something, unless it is not on what was asked for last
                self._metrics.stale["round"] += isinstance(event, Verdict) and not commands
                self._log(request, session, event, commands)
                todo.append((request, session, commands))
        for request, _, commands in todo:
            for command in commands:
                if isinstance(command, Verify):
                    self._gathering(request).add(request.id, command, self._clock())
        for target in dict.fromkeys(request.target for request, _, _ in todo):
            self._release(target)
        for request, session, commands in todo:
            self._carry_out(request, session, commands)

    def _handled(self, request: Request, session: Session, event: Event) -> list[Command]:
        """What the session commands; a mistake in it ends its request, and no other."""
        try:
            return session.handle(event, self._clock())
        except Exception as exc:  # whatever it is, somebody waits
            log.exception("request %d failed", request.number, extra=request.marks())
            return session.handle(Failure(InternalError(f"it went wrong: {exc!r}")), self._clock())

    def _gathering(self, request: Request) -> Gathering[int]:
        assert request.target is not None  # else it does not run
        return self._gatherings.setdefault(request.target, Gathering())

    def _release(self, target: Member | None) -> None:
        gathering = self._gatherings.get(target) if target else None
        if gathering is None:
            return
        running = self._requests.running
        sessions = {
            key: one.session for key, one in running.items() if one.target is target and one.session
        }
        orders = gathering.release(sessions, self._clock())
        if len(orders) > 1:
            self._roster.tell(target, wire.Pass(tuple(orders)))
        for number, order in orders if len(orders) == 1 else ():
            try:
                self._roster.tell(target, wire.Do(number, order))
            except BadRequest as exc:
                self.fail(self._requests.running[number], exc)

    @staticmethod
    def _log(request: Request, session: Session, event: Event, commands: list[Command]) -> None:
        if log.isEnabledFor(logging.DEBUG):
            state = f"{session.phase.name}, draft {session.draft.state.name}"
            line = journal.line(request.number, event, commands, state)
            log.debug("%s", line, extra=request.marks())

    def _carry_out(self, request: Request, session: Session, commands: Sequence[Command]) -> None:
        for command in commands:
            try:
                self._execute(request, session, command)
            except BadRequest as exc:
                self.fail(request, exc)
                return
        if request.timer:
            request.timer.cancel()
            request.timer = None
        if session.deadline is not None:
            delay = max(0.0, session.deadline - self._clock())
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(delay, self.advance, request, Timer())

    def _execute(self, request: Request, session: Session, command: Command) -> None:
        call = request.submit.call
        match command:
            case Prefill():
                self._roster.tell(request.target, wire.Do(request.id, command))
            case Verify():
                pass  # it is with the others' already
            case OpenDraft() | Commit():
                self._roster.tell(request.draft, wire.Do(request.id, command))
            case CloseDraft():
                self._roster.tell(request.draft, wire.Close(request.id))
            case Fragment():
                self._metrics.fragment(request, command)
                progress = wire.Progress(
                    call, command, self._report(request, session), session.lessons.trace.take()
                )
                self._tell(request.client, progress)
            case Settle():
                session.rule.settle()
            case Finish(reason):
                report, spans = session.stats.report(), session.lessons.trace.take()
                self._end(request, wire.Finished(call, reason, report, spans))
            case Fault(error):
                self._end(request, wire.failure(call, error))

    def _report(self, request: Request, session: Session) -> Report | None:
        """The figures so far, with the last fragment all; None if they were told just now."""
        now, is_over = self._clock(), session.phase is Phase.OVER
        if request.reported is not None and now - request.reported < REPORT_S and not is_over:
            return None
        request.reported = now
        return session.stats.report()

    def fail(self, request: Request, error: OutriderError) -> None:
        """It comes to nothing."""
        if request.session:
            self.advance(request, Failure(error))
        else:
            self._end(request, wire.failure(request.submit.call, error))

    def _rule(self, request: Request, lengths: Lengths) -> Rule:
        """Fixed numbers where somebody has set them, else what the measured costs say."""
        target, draft = request.target, request.draft
        mode = self.pairs.mode(request.submit.mode, target, draft) if lengths.n_max else "plain"
        if mode == "plain" or lengths.are_fixed or target is None or draft is None:
            return FixedRule(mode, lengths.n_max, lengths.n_min, lengths.p_min)
        experience = self.pairs.experience(target, draft, mode)
        return PricedRule(mode, lengths.n_max, experience, self.pairs.share_device(target, draft))

    def lost(self, member: Member) -> None:
        """This worker has gone."""
        self._gatherings.pop(member, None)
        self.pairs.forget(member)
