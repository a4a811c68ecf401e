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

from outrider.core.events import (
    Cancel,
    DraftLost,
    DraftReady,
)
from outrider.core.stats import Stats
from outrider.core.values import Proposal, Role, Verdict
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
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.questions import Questions
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
    """The requests of all clients, and the two workers that serve them."""

    def __init__(self, send: Send, defaults: Defaults, clock: Clock = time.monotonic) -> None:
        self._send, self._defaults, self._clock = send, defaults, clock
        listeners = self._on_joined, self._on_lost, self._on_paused
        self._roster = Roster(self._tell, *listeners, clock, defaults.tokens)
        self._clients: set[bytes] = set()
        self._requests = Requests(defaults.queue)
        self._metrics = Metrics(self._requests, self._roster, clock)
        say = self._tell, self._end
        known = self._roster, self._requests, self._metrics, defaults
        self._sessions = Sessions(*known, clock, *say)
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
            self._sessions.fail(request, WorkerLost("the pipeline was stopped"))
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
                self._metrics.beat(role, message)
            case (("target", wire.Done(number, Verdict() as done))
                  | ("draft", wire.Done(number, Proposal() as done))):  # fmt: skip
                self._metrics.done(done)
                if request := self._requests.running.get(number):
                    self._sessions.advance(request, done)
            case "target", wire.Passed(verdicts):
                for _, one in verdicts:
                    self._metrics.done(one)
                self._sessions.advance_all(verdicts)
            case _, wire.Failed(number, code, reason, param):
                self._on_failed(role, number, from_code(code, reason, param))
            case _:
                raise ProtocolError(f"{type(message).__name__} from a {role}")

    def _on_failed(self, role: Role, number: int, error: OutriderError) -> None:
        request = self._requests.running.get(number)
        if request is None:
            return
        if role == "target":
            self._sessions.fail(request, error)
        else:
            told = "request %d goes on without its draft: %s"
            log.warning(told, request.number, error, extra=request.marks())
            self._sessions.advance(request, DraftLost())

    def _on_joined(self, role: Role) -> None:
        self._metrics.joined(role)
        self._sessions.measure()
        if role == "draft":
            self._on_paused(False)

    def _on_paused(self, is_paused: bool) -> None:
        """Nobody must wait for the draft now; or it has come, perhaps back from a pause."""
        for request in list(self._requests.running.values()):
            if is_paused:  # should it come back, it will be told everything anew
                self._roster.tell("draft", wire.Close(request.id))
            self._sessions.advance(request, DraftLost() if is_paused else DraftReady())

    def _on_lost(self, role: Role, why: str) -> None:
        for request in list(self._requests.running.values()):
            if role == "target":
                self._sessions.fail(request, WorkerLost(f"{why}, and the request with it", role))
            else:
                self._sessions.advance(request, DraftLost())
        for request in list(self._requests.waiting) if role == "target" else ():
            self._sessions.fail(request, WorkerLost(why, role))

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
            case wire.Metrics(call):
                self._tell(peer, wire.MetricsReport(call, self._metrics.snapshot()))
            case wire.Stop(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
                self._stopping = True
                self._stop_if_idle()

    def health(self) -> dict[str, Any]:
        """What `outrider ps` shows; its "status" is "ok" while requests can be served."""
        uptime_s, mode = self._clock() - self._began, self._sessions.mode(None)
        told = self._roster, self._requests, self._metrics
        return health.report(*told, stopping=self._stopping, mode=mode, uptime_s=uptime_s)

    def _submit(self, request: Request) -> None:
        """Take it or say why not, without waiting: in a burst, others are right behind it."""
        try:
            if self._stopping:
                raise Overloaded("the pipeline is stopping")
            self._requests.check_room()
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
            await request.prepare(self._roster.target().hello, ask)
            request.check(self._roster.target().hello)  # it may have died with its answer
        except OutriderError as exc:
            self._sessions.fail(request, exc)
        except Exception as exc:  # whatever it is, somebody waits
            log.exception("request %d failed", request.number, extra=request.marks())
            self._sessions.fail(request, InternalError(f"it could not be prepared: {exc!r}"))
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
            self._sessions.start(request, target.hello)

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
            self._roster.tell("target", wire.Close(request.id))
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
