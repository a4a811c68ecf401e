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

from outrider.core.events import Cancel
from outrider.core.stats import Stats
from outrider.core.values import Proposal, Role, Sides, Verdict
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
from outrider_services.pipeline import health, journal
from outrider_services.pipeline.absence import Absence
from outrider_services.pipeline.member import Member
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.questions import Questions
from outrider_services.pipeline.recovery import Recovery
from outrider_services.pipeline.requests import Defaults, Lengths, Request, Requests
from outrider_services.pipeline.roster import Roster
from outrider_services.pipeline.sessions import Sessions

__all__ = ["Coordinator", "Defaults"]

log = logging.getLogger(__name__)

LOOK_S = 0.25  # between two looks at the workers
PING_S = 1.0

Send = Callable[[bytes, wire.Message], None]
Clock = Callable[[], float]  # seconds, never going back


class Coordinator:
    """The requests of all clients, and the workers that serve them."""

    def __init__(
        self,
        send: Send,
        defaults: Defaults,
        clock: Clock = time.monotonic,
        on_hung: Callable[[Role], None] = lambda _: None,  # a worker that is to be started anew
    ) -> None:
        self._send, self._defaults, self._clock = send, defaults, clock
        listeners = self._on_joined, self._on_lost, self._on_paused
        joining = defaults.tokens, defaults.both, on_hung
        self._roster = Roster(self._tell, *listeners, clock, *joining)
        self._absence = Absence(self._roster, defaults.resume_s, clock)
        self._clients: set[bytes] = set()
        self._requests = Requests(defaults.queue)
        self._metrics = Metrics(self._requests, self._roster, clock)
        say = self._tell, self._end
        known = self._roster, self._requests, self._metrics, defaults
        self._sessions = Sessions(*known, clock, *say)
        self._recovery = Recovery(self._requests, self._sessions, self._absence, self._metrics)
        self._questions = Questions(self._roster, self._absence, self._tell)
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
            case wire.Done() | wire.Passed() | wire.Beat() | wire.Failed():
                self._on_worker(peer, message)
            case wire.Hello():
                self._roster.on_hello(peer, message)
            case wire.Submit() | wire.Cancel() | wire.Health() | wire.Metrics() | wire.Stop():
                self._on_client(peer, message)
            case wire.Tokenize() | wire.Detokenize() | wire.Render() | wire.Infill():
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
        ping = self._metrics.ping()
        for peer in [*self._roster.peers, *self._clients]:
            self._tell(peer, ping)

    async def run(self) -> None:
        """Watch over workers and clients until stopped."""
        pinged = self._clock()
        while not self.stopped.is_set():
            self.look()
            if self._clock() - pinged >= PING_S:
                self.ping()
                pinged = self._clock()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self.stopped.wait()

    def look(self) -> None:
        """Drop workers that have fallen silent or make no progress, and who waited too long."""
        self._roster.look()
        self._recovery.look()

    async def close(self) -> None:
        """End every request with an error; cancel what is being prepared or asked for."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for request in self._requests:
            self._sessions.fail(request, WorkerLost("the pipeline was stopped"))
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._questions.close()
        await self._roster.close()

    # ---- workers --------------------------------------------------------------------------------

    def _on_worker(self, peer: bytes, message: wire.Message) -> None:
        if self._roster.on_answer(peer, message):
            return
        member = self._roster.member_of(peer)
        if member is None:
            return
        match member.role, message:
            case _, wire.Beat():
                self._roster.on_beat(member, message)
                self._metrics.beat(member, message)
            case "target", wire.Done(number, Verdict() as done):
                self._metrics.done(done)
                if request := self._served(member, number):
                    self._sessions.advance(request, done)
                    self._recovery.settle()
            case "draft", wire.Done(number, Proposal() as done):
                self._metrics.done(done)
                if request := self._served(member, number):
                    self._sessions.drafted(request, done)
            case "draft", wire.Done(number, Sides() as told):
                if request := self._served(member, number):
                    self._sessions.drafted(request, told)
            case "target", wire.Passed(verdicts):
                for _, one in verdicts:
                    self._metrics.done(one)
                served = [(self._served(member, number), one) for number, one in verdicts]
                self._sessions.advance_all([(one, said) for one, said in served if one])
                self._recovery.settle()
            case _, wire.Failed(number, code, reason, param):
                self._on_failed(member, number, from_code(code, reason, param))
            case role, _:
                raise ProtocolError(f"{type(message).__name__} from a {role}")

    def _served(self, member: Member, number: int) -> Request | None:
        """The request, if this worker serves it: else what it says of it does not count."""
        request = self._requests.running.get(number)
        if request and member in (request.target, request.draft):
            return request
        self._metrics.stale["other_worker" if request else "over"] += 1
        return None

    def _on_failed(self, member: Member, number: int, error: OutriderError) -> None:
        request = self._served(member, number)
        if request is None:
            return
        if member.role == "target":
            self._sessions.fail(request, error)
        else:
            told = "request %d goes on without the %s worker: %s"
            log.warning(told, request.number, member.name, error, extra=request.marks())
            # what failed may be an earlier ride, of before a pause
            self._roster.tell(member, wire.Close(request.id))
            self._sessions.failed_draft(request, member)

    def _on_joined(self, member: Member) -> None:
        self._metrics.joined(member)
        self._roster.tell(member, self._metrics.ping())  # how far away is it?
        if member.role == "draft":
            self._sessions.seat()
        else:
            self._recovery.joined(member)
            self._admit()

    def _on_paused(self, member: Member, is_paused: bool) -> None:
        """Nobody must wait for this draft now; or it has come back from a pause."""
        if not is_paused:
            self._sessions.seat()
        for request in self._requests.of(member) if is_paused else ():
            # should it come back, it will be told everything anew
            self._roster.tell(member, wire.Close(request.id))
            self._sessions.lost_draft(request)

    def _on_lost(self, member: Member, why: str) -> None:
        if member.role == "target":
            self._recovery.lost(member, why)
        else:
            for request in self._requests.of(member):
                self._sessions.lost_draft(request)
        self._sessions.lost(member)

    # ---- clients --------------------------------------------------------------------------------

    def _on_client(self, peer: bytes, message: wire.Message) -> None:
        self._clients.add(peer)
        match message:
            case wire.Submit(call) if self._requests.find(peer, call) is None:
                former = self._requests.named(message.key)
                self._submit(self._requests.add(peer, message, self._clock()), former)
            case wire.Cancel(call):
                if request := self._requests.find(peer, call):
                    self._cancel(request)
            case wire.Health(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
            case wire.Metrics(call):
                self._tell(peer, wire.MetricsReport(call, self._metrics.snapshot()))
            case wire.Stop(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
                self._stopping = True
                self._stop_if_idle()

    def health(self) -> dict[str, Any]:
        """What `outrider ps` shows; its "status" is "ok" while requests can be served."""
        uptime_s = self._clock() - self._began
        told = self._roster, self._requests, self._metrics, self._sessions.pairs
        return health.report(*told, stopping=self._stopping, uptime_s=uptime_s)

    def _submit(self, request: Request, former: Request | None) -> None:
        """Take it or say why not, without waiting: in a burst, others are right behind it.

        The `former` of its name is the same, asked for over a connection that is gone: it goes on
        behind what its client has received.
        """
        try:
            if former and not former.is_asked_by(request.submit):
                raise BadRequest("another request has this key", "key")
            if former:
                self._cancel(former)
                self._requests.name(request)
            self._metrics.resumed["connection"] += bool(former or request.submit.received)
            if self._stopping:
                raise Overloaded("the pipeline is stopping")
            self._requests.check_room(request)
            Lengths.of(request.submit, self._defaults)
            self._defaults.check(request.submit)
        except OutriderError as exc:
            self._sessions.fail(request, exc)
        else:
            request.preparing = self._spawn(self._prepare(request))

    async def _prepare(self, request: Request) -> None:
        """Turn the prompt into tokens, then start the request or let it wait."""
        try:
            ask = partial(self._questions.ask, request.client)
            await request.prepare((await self._absence.target()).hello, ask)
            request.check((await self._absence.target()).hello)  # it may be another by now
        except OutriderError as exc:
            self._sessions.fail(request, exc)
        except Exception as exc:  # whatever it is, somebody waits
            log.exception("request %d failed", request.number, extra=request.marks())
            self._sessions.fail(request, InternalError(f"it could not be prepared: {exc!r}"))
        else:
            request.preparing = None
            # one that had begun has waited already
            wait = self._requests.waiting
            (wait.appendleft if request.submit.received else wait.append)(request)
            self._admit()

    def _admit(self) -> None:
        """Start waiting requests while a target has sequences free."""
        while self._requests.waiting:
            target = self._sessions.pairs.target_for(self._requests.waiting[0])
            if target is None:
                return
            self._sessions.start(self._requests.next(target), target)

    def _cancel(self, request: Request) -> None:
        if request.session:
            self._sessions.advance(request, Cancel())
        else:
            stats = Stats(seed=request.submit.sampling.seed).report()
            self._end(request, wire.Finished(request.submit.call, "cancelled", stats))

    def _end(self, request: Request, last: wire.Message) -> None:
        """Give a request its one outcome; free whatever it held."""
        if not self._requests.end(request):
            return
        log.info("request %d: %s", request.number, journal.outcome(last), extra=request.marks())
        self._metrics.ended(request, last)
        if self._requests.running.pop(request.id, None):
            self._sessions.forget(request)
            self._roster.tell(request.target, wire.Close(request.id))
            self._recovery.settle()
            self._recovery.go_on()
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

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
