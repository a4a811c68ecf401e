"""The coordinator: turns messages into events of sessions, and their commands into messages.

It holds no socket: `pipeline.processes` joins `send` and `on_message` to a ROUTER, tests join them
to stand-ins. It waits only for answers to its own questions, and never for long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

import outrider
from outrider.core.estimates import CostModel
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
    Prefill,
    Settle,
    Start,
    Timer,
)
from outrider.core.experience import Experience
from outrider.core.rules import FixedRule, PricedRule, Rule
from outrider.core.session import Session
from outrider.core.stats import Stats
from outrider.core.values import Fragment, Mode, Proposal, Role, Verdict, Verify
from outrider.errors import (
    BadRequest,
    InternalError,
    OutriderError,
    Overloaded,
    ProtocolError,
    WorkerLost,
    from_code,
)
from outrider.wire import messages as wire
from outrider.wire.transport import PeerGone
from outrider_services.pipeline import journal
from outrider_services.pipeline.places import shared
from outrider_services.pipeline.questions import Questions
from outrider_services.pipeline.requests import Defaults, Lengths, Request, Requests
from outrider_services.pipeline.roster import Roster

__all__ = ["Coordinator", "Defaults"]

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at the workers
PING_S = 1.0

Send = Callable[[bytes, wire.Message], None]
Clock = Callable[[], float]  # seconds, never going back


class Coordinator:
    """The requests of all clients, and the two workers that serve them."""

    def __init__(self, send: Send, defaults: Defaults, clock: Clock = time.monotonic) -> None:
        self._send, self._defaults, self._clock = send, defaults, clock
        listeners = self._on_joined, self._on_lost, self._on_paused
        self._roster = Roster(self._tell, *listeners, clock, defaults.tokens)
        self._experience: dict[Mode, Experience] = {}
        self._clients: set[bytes] = set()
        self._requests = Requests(defaults.queue)
        self._questions = Questions(self._roster, self._tell)
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = clock()
        self._stopping = self._closed = False
        self.stopped = asyncio.Event()

    # ---- messages -------------------------------------------------------------------------------

    def on_message(self, peer: bytes, message: wire.Message) -> None:
        """Take one message. Raises ProtocolError, and nothing else, if it is out of place."""
        if self._closed:
            return
        match message:
            case wire.Done() | wire.Beat() | wire.Failed():
                self._on_worker(peer, message)
            case wire.Hello():
                self._roster.on_hello(peer, message)
            case wire.Submit() | wire.Cancel() | wire.Health() | wire.Stop():
                self._on_client(peer, message)
            case wire.Tokenize() | wire.Detokenize() | wire.Render():
                self._clients.add(peer)
                self._spawn(self._questions.answer(peer, message))
            case _:
                if not self._roster.on_answer(peer, message):
                    raise ProtocolError(f"unexpected {type(message).__name__}")

    def on_gone(self, peer: bytes) -> None:
        """The connection of `peer` has ended."""
        if self._closed:
            return
        self._roster.on_gone(peer)
        self._questions.on_gone(peer)
        if peer in self._clients:
            self._clients.discard(peer)
            for request in self._requests:
                if request.client == peer:
                    self._cancel(request)

    def ping(self) -> None:
        """Show everybody that the coordinator lives; find out who is gone."""
        for peer in [*self._roster.peers, *self._clients]:
            self._tell(peer, wire.Ping())

    async def run(self) -> None:
        """Watch over workers and clients until stopped."""
        pinged = self._clock()
        while not self.stopped.is_set():
            self.look()
            if self._clock() - pinged >= PING_S:
                self.ping()
                pinged = self._clock()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), LOOK_S)

    def look(self) -> None:
        """Drop workers that have fallen silent or make no progress."""
        self._roster.look()

    async def close(self) -> None:
        """End every request with an error; cancel what is being prepared or asked for."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for request in self._requests:
            self._fail(request, WorkerLost("the pipeline was stopped"))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._questions.close()
        await self._roster.close()

    # ---- workers --------------------------------------------------------------------------------

    def _on_worker(self, peer: bytes, message: wire.Message) -> None:
        if self._roster.on_answer(peer, message):
            return
        role = self._roster.role_of(peer)
        match role, message:
            case None, _:
                pass
            case _, wire.Beat():
                self._roster.on_beat(role, message)
            case (("target", wire.Done(number, Verdict() as done))
                  | ("draft", wire.Done(number, Proposal() as done))):  # fmt: skip
                if request := self._requests.running.get(number):
                    self._advance(request, done)
            case _, wire.Failed(number, code, reason, param):
                self._on_failed(role, number, from_code(code, reason, param))
            case _:
                raise ProtocolError(f"{type(message).__name__} from a {role}")

    def _on_failed(self, role: Role, number: int, error: OutriderError) -> None:
        request = self._requests.running.get(number)
        if request is None:
            return
        if role == "target":
            self._fail(request, error)
        else:
            log.warning("request %d goes on without its draft: %s", request.number, error)
            self._advance(request, DraftLost())

    def _on_joined(self, role: Role) -> None:
        target, draft = self._roster.get("target"), self._roster.get("draft")
        if target and draft:
            curves = target.hello.curve_s, draft.hello.curve_s
            modes: tuple[Mode, ...] = ("sync", "pipelined")
            self._experience = {mode: Experience(CostModel.measured(*curves)) for mode in modes}
        if role == "draft":
            self._on_paused(False)

    def _on_paused(self, is_paused: bool) -> None:
        """Nobody must wait for the draft now; or it has come, perhaps back from a pause."""
        for request in list(self._requests.running.values()):
            if is_paused:  # should it come back, it will be told everything anew
                self._tell_role("draft", wire.Close(request.id))
            self._advance(request, DraftLost() if is_paused else DraftReady())

    def _on_lost(self, role: Role, why: str) -> None:
        for request in list(self._requests.running.values()):
            if role == "target":
                self._fail(request, WorkerLost(f"{why}, and the request with it", role))
            else:
                self._advance(request, DraftLost())
        for request in list(self._requests.waiting) if role == "target" else ():
            self._fail(request, WorkerLost(why, role))

    # ---- clients --------------------------------------------------------------------------------

    def _on_client(self, peer: bytes, message: wire.Message) -> None:
        self._clients.add(peer)
        match message:
            case wire.Submit(call) if self._requests.find(peer, call) is None:
                self._submit(self._requests.add(peer, message, self._clock()))
            case wire.Cancel(call):
                if request := self._requests.find(peer, call):
                    self._cancel(request)
            case wire.Health(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
            case wire.Stop(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
                self._stopping = True
                self._stop_if_idle()

    def health(self) -> dict[str, Any]:
        """What `outrider ps` shows; its "status" is "ok" while requests can be served."""
        workers = self._roster.report()
        requests = {"running": len(self._requests.running), "waiting": len(self._requests.waiting)}
        return {
            "status": "ok" if "target" in workers else "loading",
            "version": outrider.__version__,
            "mode": self._mode(None),
            "workers": workers,
            "refused": dict(self._roster.refusals),
            "requests": requests,
            "uptime_s": self._clock() - self._began,
        }

    def _submit(self, request: Request) -> None:
        """Take it or say why not, without waiting: in a burst, others are right behind it."""
        try:
            if self._stopping:
                raise Overloaded("the pipeline is stopping")
            self._requests.check_room()
            Lengths.of(request.submit, self._defaults)
            self._defaults.check(request.submit)
        except OutriderError as exc:
            self._fail(request, exc)
        else:
            request.preparing = self._spawn(self._prepare(request))

    async def _prepare(self, request: Request) -> None:
        """Turn the prompt into tokens, then start the request or let it wait."""
        try:
            ask = partial(self._questions.ask, request.client)
            await request.prepare(self._roster.target().hello, ask)
            request.check(self._roster.target().hello)  # it may have died with its answer
        except OutriderError as exc:
            self._fail(request, exc)
        except Exception as exc:  # whatever it is, somebody waits
            log.exception("request %d failed", request.number)
            self._fail(request, InternalError(f"it could not be prepared: {exc!r}"))
        else:
            request.preparing = None
            self._requests.waiting.append(request)
            self._admit()

    def _admit(self) -> None:
        """Start waiting requests while the target has sequences free."""
        while target := self._roster.get("target"):
            request = self._requests.next(target.hello.slots)
            if request is None:
                return
            self._start(request, target.hello)

    def _start(self, request: Request, target: wire.Hello) -> None:
        submit = request.submit
        lengths = Lengths.of(submit, self._defaults)
        mode = "plain" if lengths.n_max == 0 else self._mode(submit.mode)
        task = request.task(target)
        stats = Stats(mode, task.sampling.seed, request.submitted, step_s=target.curve_s[0])
        request.session = Session(task, self._rule(mode, lengths), stats)
        try:
            started = wire.Started(submit.call, target.model, mode, request.tokens)
            self._tell(request.client, started)
            self._advance(request, Start(draft=self._roster.has_draft))
        except BadRequest as exc:
            self._fail(request, exc)

    def _rule(self, mode: Mode, lengths: Lengths) -> Rule:
        """Fixed numbers where somebody has set them, else what the measured costs say."""
        if mode == "plain" or lengths.are_fixed or mode not in self._experience:
            return FixedRule(mode, lengths.n_max, lengths.n_min, lengths.p_min)
        return PricedRule(mode, lengths.n_max, self._experience[mode], self._share_device())

    def _mode(self, mode: str | None) -> Mode:
        """The mode to use. `auto` is pipelined if the workers share no device, else sync."""
        match mode or self._defaults.mode:
            case "plain" | "sync" | "pipelined" as chosen:
                return chosen
        return "sync" if self._share_device() else "pipelined"

    def _share_device(self) -> bool:
        """Whether both workers are there and share a device; a later draft is from elsewhere."""
        both = [member.hello.cores for member in self._roster.members]
        return len(both) == 2 and shared(*both)

    def _cancel(self, request: Request) -> None:
        if request.session:
            self._advance(request, Cancel())
        else:
            stats = Stats(seed=request.submit.sampling.seed).report()
            self._end(request, wire.Finished(request.submit.call, "cancelled", stats))

    # ---- sessions -------------------------------------------------------------------------------

    def _advance(self, request: Request, event: Event) -> None:
        """Give the session an event and carry out its commands."""
        session = request.session
        if session is None:
            return
        commands = session.handle(event, self._clock())
        if log.isEnabledFor(logging.DEBUG):
            state = f"{session.phase.name}, draft {session.draft.state.name}"
            log.debug("%s", journal.line(request.number, event, commands, state))
        for command in commands:
            try:
                self._execute(request, session, command)
            except BadRequest as exc:
                self._fail(request, exc)
                return
        if request.timer:
            request.timer.cancel()
            request.timer = None
        if session.deadline is not None:
            delay = max(0.0, session.deadline - self._clock())
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(delay, self._advance, request, Timer())

    def _execute(self, request: Request, session: Session, command: Command) -> None:
        call = request.submit.call
        match command:
            case Prefill() | Verify():
                self._tell_role("target", wire.Do(request.id, command))
            case OpenDraft() | Commit():
                self._tell_role("draft", wire.Do(request.id, command))
            case CloseDraft():
                self._tell_role("draft", wire.Close(request.id))
            case Fragment():
                report, spans = session.stats.report(), session.trace.take()
                self._tell(request.client, wire.Progress(call, command, report, spans))
            case Settle():
                session.settle()
            case Finish(reason):
                report, spans = session.stats.report(), session.trace.take()
                self._end(request, wire.Finished(call, reason, report, spans))
            case Fault(error):
                self._end(request, wire.failure(call, error))

    def _fail(self, request: Request, error: OutriderError) -> None:
        if request.session:
            self._advance(request, Failure(error))
        else:
            self._end(request, wire.failure(request.submit.call, error))

    def _end(self, request: Request, last: wire.Message) -> None:
        """Give a request its one outcome; free whatever it held."""
        if not self._requests.end(request):
            return
        if self._requests.running.pop(request.id, None):
            self._tell_role("target", wire.Close(request.id))
        if request.client in self._clients:
            try:
                self._tell(request.client, last)
            except BadRequest as exc:
                self._tell(request.client, wire.failure(request.submit.call, exc))
        self._admit()
        self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if self._stopping and not self._requests:
            # the last messages need a moment to leave
            asyncio.get_running_loop().call_later(0.05, self.stopped.set)

    def _tell(self, peer: bytes, message: wire.Message) -> None:
        """Send, if the peer is there. Raises BadRequest for a message that is too long."""
        try:
            self._send(peer, message)
        except PeerGone:
            # later: the caller may be in the middle of what this changes
            asyncio.get_running_loop().call_soon(self.on_gone, peer)

    def _tell_role(self, role: Role, message: wire.Message) -> None:
        if member := self._roster.get(role):
            self._tell(member.peer, message)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
