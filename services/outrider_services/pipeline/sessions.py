"""Runs the sessions of the requests: gives them events, and carries out what they command.

It knows what the passes cost, and so by which rule each session decides.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace

from outrider.core.estimates import CostModel
from outrider.core.events import (
    CloseDraft,
    Command,
    Commit,
    Event,
    Failure,
    Fault,
    Finish,
    OpenDraft,
    Prefill,
    Settle,
    Start,
    Timer,
)
from outrider.core.experience import Experience
from outrider.core.gathering import Gathering
from outrider.core.reading import UNKNOWN, Held
from outrider.core.rules import FixedRule, PricedRule, Rule
from outrider.core.session import Phase, Session
from outrider.core.stats import Report, Stats
from outrider.core.values import Fragment, Mode, TokenId, Verdict, Verify
from outrider.errors import BadRequest, InternalError, OutriderError
from outrider.wire import messages as wire
from outrider_services.pipeline import journal
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.places import shared
from outrider_services.pipeline.requests import Defaults, Lengths, Request, Requests
from outrider_services.pipeline.roster import Roster, Tell
from outrider_services.pipeline.slots import shared_beginning

log = logging.getLogger(__name__)

REPORT_S = 0.1  # at least between two tables of a request's figures
ENDED = 64  # requests that are remembered for what their drafts have read

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
        self._experience: dict[Mode, Experience] = {}
        self._gathering = Gathering[int]()
        self._draft = 0  # the incarnation of the draft worker that has read these
        self._ended: deque[tuple[str | None, Held, list[TokenId]]] = deque(maxlen=ENDED)

    def measure(self) -> None:
        """A worker has joined: if both are there, what they have measured counts from now on."""
        target, draft = self._roster.get("target"), self._roster.get("draft")
        if target and draft:
            one, other = target.hello, draft.hello
            if other.incarnation != self._draft:
                self._ended.clear()  # it is another one, which has read nothing
            self._draft = other.incarnation
            curves = one.curve_s, other.curve_s, one.crowd_s, other.crowd_s
            self._experience = {
                "sync": Experience(CostModel.measured(*curves, in_turns=True)),
                "pipelined": Experience(CostModel.measured(*curves)),
            }
            self.count()

    def count(self) -> None:
        """What a step costs each request depends on how many run."""
        for experience in self._experience.values():
            experience.costs.crowd = max(1, len(self._requests.running))

    def start(self, request: Request, target: wire.Hello) -> None:
        """Begin to generate."""
        self.count()
        submit = request.submit
        lengths = Lengths.of(submit, self._defaults)
        mode = "plain" if lengths.n_max == 0 else self.mode(submit.mode)
        task = replace(request.task(target), held=self._held(request))
        stats = Stats(mode, task.sampling.seed, request.submitted, step_s=target.curve_s[0])
        request.session = Session(task, self._rule(mode, lengths), stats)
        self._metrics.started()
        try:
            started = wire.Started(submit.call, target.model, mode, request.tokens)
            self._tell(request.client, started)
            self.advance(request, Start(draft=self._roster.has_draft))
        except BadRequest as exc:
            self.fail(request, exc)

    def _held(self, request: Request) -> Held:
        """What the draft probably knows of the prompt; it is the draft worker who looks."""
        best, text = UNKNOWN, request.tokens[:-1]
        for cache, (skip, _), tokens in self._ended:
            if cache is not None and cache == request.submit.cache:
                common = shared_beginning(tokens, text)
                best = Held(skip, common) if common > max(best.end, skip) else best
        return best

    def forget(self, request: Request) -> None:
        """It is over; what its draft has read may be of use to a later one."""
        self.count()
        self._gathering.drop(request.id)
        if (session := request.session) and session.draft.held.end > session.draft.skip:
            held = session.draft.held
            self._ended.append((session.task.cache, held, session.tokens[: held.end]))

    def advance(self, request: Request, event: Event) -> None:
        """Give its session an event and carry out the commands."""
        self._advance([(request, event)])

    def advance_all(self, verdicts: Sequence[tuple[int, Verdict]]) -> None:
        """The same for requests that shared a pass, so that they can share the next."""
        running = self._requests.running
        self._advance([(running[number], one) for number, one in verdicts if number in running])

    def _advance(self, happened: Sequence[tuple[Request, Event]]) -> None:
        """The target comes first: it is idle, and all else can wait a millisecond."""
        todo: list[tuple[Request, Session, list[Command]]] = []
        for request, event in happened:
            if session := request.session:
                commands = self._handled(request, session, event)
                self._log(request, session, event, commands)
                todo.append((request, session, commands))
        for request, _, commands in todo:
            for command in commands:
                if isinstance(command, Verify):
                    self._gathering.add(request.id, command, self._clock())
        self._release()
        for request, session, commands in todo:
            self._carry_out(request, session, commands)

    def _handled(self, request: Request, session: Session, event: Event) -> list[Command]:
        """What the session commands; a mistake in it ends its request, and no other."""
        try:
            return session.handle(event, self._clock())
        except Exception as exc:  # whatever it is, somebody waits
            log.exception("request %d failed", request.number, extra=request.marks())
            return session.handle(Failure(InternalError(f"it went wrong: {exc!r}")), self._clock())

    def _release(self) -> None:
        running = self._requests.running.values()
        sessions = (one.session for one in running if one.session)
        orders = self._gathering.release(sessions, self._clock())
        if len(orders) > 1:
            self._roster.tell("target", wire.Pass(tuple(orders)))
        for number, order in orders if len(orders) == 1 else ():
            try:
                self._roster.tell("target", wire.Do(number, order))
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
                self._roster.tell("target", wire.Do(request.id, command))
            case Verify():
                pass  # it is with the others' already
            case OpenDraft() | Commit():
                self._roster.tell("draft", wire.Do(request.id, command))
            case CloseDraft():
                self._roster.tell("draft", wire.Close(request.id))
            case Fragment():
                self._metrics.fragment(request, command)
                progress = wire.Progress(
                    call, command, self._report(request, session), session.trace.take()
                )
                self._tell(request.client, progress)
            case Settle():
                session.rule.settle()
            case Finish(reason):
                report, spans = session.stats.report(), session.trace.take()
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

    def _rule(self, mode: Mode, lengths: Lengths) -> Rule:
        """Fixed numbers where somebody has set them, else what the measured costs say."""
        if mode == "plain" or lengths.are_fixed or mode not in self._experience:
            return FixedRule(mode, lengths.n_max, lengths.n_min, lengths.p_min)
        return PricedRule(mode, lengths.n_max, self._experience[mode], self._share_device())

    def mode(self, mode: str | None) -> Mode:
        """The mode to use. `auto` is pipelined if the workers share no device, else sync."""
        match mode or self._defaults.mode:
            case "plain" | "sync" | "pipelined" as chosen:
                return chosen
        return "sync" if self._share_device() else "pipelined"

    def _share_device(self) -> bool:
        """Whether both workers are there and share a device; a later draft is from elsewhere."""
        both = [member.hello.cores for member in self._roster.members]
        return len(both) == 2 and shared(*both)
