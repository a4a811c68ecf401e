"""The coordinator: turns messages into events of sessions, and their commands into messages.

It holds no socket: `send` and `on_message` are joined to a ROUTER by `pipeline.processes`, and to
workers in the same process by tests. It waits for nothing but answers, and for none long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Any

import outrider
from outrider.core import session as core
from outrider.core.estimates import CostModel
from outrider.core.rules import LONGEST, Experience, Mode, Pilot, Policy
from outrider.core.session import Command, Session
from outrider.core.stats import Stats
from outrider.errors import (
    BadRequest,
    OutriderError,
    Overloaded,
    ProtocolError,
    WorkerLost,
    from_code,
)
from outrider.wire import messages as wire
from outrider.wire.transport import PeerGone
from outrider_services.pipeline.places import shared
from outrider_services.pipeline.roster import Member, Roster

log = logging.getLogger(__name__)

LOOK_S = 0.25
PING_S = 1.0
BAD_FRAMES = 8  # after which a peer is not listened to any more
NEVER = -1e6  # the bias that keeps end tokens from being chosen

Send = Callable[[bytes, wire.Message], None]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that does not say."""

    mode: str = "auto"
    n_draft: int | None = None  # most drafted tokens in a block; None: what the costs say
    n_min: int = 0
    p_min: float = 0.0
    queue: int = 64  # requests that may wait for a free sequence


@dataclass(slots=True)
class Request:
    """A client's request: first its prompt is prepared, then it waits, then it has a session."""

    id: int
    client: bytes
    submit: wire.Submit
    submitted: float
    tokens: tuple[int, ...] = ()
    session: Session | None = None
    sampling: wire.Sampling | None = None
    timer: asyncio.TimerHandle | None = None

    @property
    def key(self) -> tuple[bytes, int]:
        return self.client, self.submit.call


class Coordinator:
    """The requests of all clients, and the two workers that serve them."""

    def __init__(self, send: Send, defaults: Defaults) -> None:
        self._send, self._defaults = send, defaults
        self._roster = Roster(self._tell, self._on_joined, self._on_lost)
        self._experience: dict[Mode, Experience] = {}
        self._clients: set[bytes] = set()
        self._bad_frames: dict[bytes, int] = {}
        self._requests: dict[tuple[bytes, int], Request] = {}  # by client and its number: all
        self._running: dict[int, Request] = {}
        self._waiting: deque[Request] = deque()
        # ids start at random, so that none can be of an earlier coordinator; questions use low ones
        self._next_id = secrets.randbits(61) + (1 << 61)
        self._tasks: set[asyncio.Task[None]] = set()
        self._began = time.monotonic()
        self._stopping = self._closed = False
        self.stopped = asyncio.Event()

    # ---- messages -------------------------------------------------------------------------------

    def on_message(self, peer: bytes, message: wire.Message) -> None:
        """Take one message; nothing that a peer sends raises."""
        if self._closed or self._bad_frames.get(peer, 0) >= BAD_FRAMES:
            return
        match message:
            case wire.Verdict() | wire.Drafted() | wire.Beat() | wire.Failed():
                self._on_worker(peer, message)
            case wire.Hello():
                self._roster.on_hello(peer, message)
            case wire.Submit() | wire.Cancel() | wire.Health() | wire.Stop():
                self._on_client(peer, message)
            case wire.Tokenize() | wire.Detokenize() | wire.Render():
                self._clients.add(peer)
                self._spawn(self._forward(peer, message))
            case _:
                if not self._roster.on_answer(peer, message):
                    self.on_bad_frame(peer, ProtocolError(f"unexpected {type(message).__name__}"))

    def on_bad_frame(self, peer: bytes, error: ProtocolError) -> None:
        count = self._bad_frames[peer] = self._bad_frames.get(peer, 0) + 1
        log.warning("dropped: %s", error)
        if count == BAD_FRAMES:
            log.warning("a peer sent %d bad frames and is no longer listened to", count)
            self._on_gone(peer)
        if len(self._bad_frames) > 1024:
            self._bad_frames.pop(next(iter(self._bad_frames)))

    def on_disconnect(self) -> None:
        """Some connection has ended: find out whose."""
        for peer in [*(member.peer for member in self._roster.members), *self._clients]:
            self._tell(peer, wire.Ping())

    async def run(self) -> None:
        """Watch over workers and clients until stopped."""
        pinged = 0.0
        while not self.stopped.is_set():
            self._roster.look()
            if time.monotonic() - pinged >= PING_S:
                self.on_disconnect()
                pinged = time.monotonic()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopped.wait(), LOOK_S)

    async def close(self) -> None:
        """End what still runs, each request with one error; whoever leaves now may."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        for request in list(self._requests.values()):
            self._fail(request, WorkerLost("the pipeline was stopped"))
        await asyncio.gather(*self._tasks, return_exceptions=True)
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
            case "target", wire.Verdict():
                self._on_verdict(message)
            case "draft", wire.Drafted():
                self._on_drafted(message)
            case _, wire.Failed(number, code, reason):
                self._on_failed(role, number, from_code(code, reason))
            case _:
                self.on_bad_frame(peer, ProtocolError(f"{type(message).__name__} from a {role}"))

    def _on_verdict(self, message: wire.Verdict) -> None:
        if request := self._running.get(message.request):
            result = core.RoundResult(
                message.round,
                message.base,
                message.accepted,
                message.tokens,
                message.pieces,
                message.logprobs,
                message.elapsed_s,
            )
            self._advance(request, lambda session, now: session.on_verdict(result, now))

    def _on_drafted(self, message: wire.Drafted) -> None:
        if request := self._running.get(message.request):
            pairs = zip(message.tokens, message.confidences, strict=False)
            drafted = [core.Drafted(token, confidence) for token, confidence in pairs]
            if len(message.tokens) != len(message.confidences):
                drafted = []  # an offence, as an empty draft is
            at = message.lineage, message.position
            elapsed_s, paused = message.elapsed_s, message.paused
            self._advance(
                request,
                lambda session, now: session.on_drafted(*at, drafted, elapsed_s, now, paused),
            )

    def _on_failed(self, role: wire.Role, number: int, error: OutriderError) -> None:
        request = self._running.get(number)
        if request is None:
            return
        if role == "target":
            self._fail(request, error)
        else:
            log.warning("a request goes on without its draft: %s", error)
            self._advance(request, Session.on_draft_lost)

    def _on_joined(self, role: wire.Role) -> None:
        target, draft = self._roster.get("target"), self._roster.get("draft")
        if target and draft:
            curves = target.hello.curve_s, draft.hello.curve_s[0]
            modes: tuple[Mode, ...] = ("sync", "pipelined")
            self._experience = {mode: Experience(CostModel(*curves)) for mode in modes}
        if role == "draft":
            for request in list(self._running.values()):
                self._advance(request, lambda session, now: session.on_draft_ready())

    def _on_lost(self, role: wire.Role, why: str) -> None:
        for request in list(self._running.values()):
            if role == "target":
                self._fail(request, WorkerLost(f"{why}, and the request with it", role))
            else:
                self._advance(request, Session.on_draft_lost)
        for request in list(self._waiting) if role == "target" else ():
            self._fail(request, WorkerLost(why, role))

    def _on_gone(self, peer: bytes) -> None:
        if self._closed:
            return
        self._roster.on_gone(peer)
        if peer in self._clients:
            self._clients.discard(peer)
            for request in [r for r in self._requests.values() if r.client == peer]:
                self._cancel(request)

    # ---- clients --------------------------------------------------------------------------------

    def _on_client(self, peer: bytes, message: wire.Message) -> None:
        self._clients.add(peer)
        match message:
            case wire.Submit(call) if (peer, call) not in self._requests:
                self._next_id += 1
                request = Request(self._next_id, peer, message, time.monotonic())
                self._requests[request.key] = request
                self._spawn(self._prepare(request))
            case wire.Cancel(call) if (peer, call) in self._requests:
                self._cancel(self._requests[peer, call])
            case wire.Health(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
            case wire.Stop(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
                self._stopping = True
                self._stop_if_idle()

    def health(self) -> dict[str, Any]:
        """What `outrider ps` shows; `status` is "ok" as soon as requests can be served."""
        workers = {
            member.hello.role: {
                "model": member.hello.model,
                "device": member.hello.device,
                "context": member.hello.context,
                "slots": member.hello.slots,
                "step_s": member.hello.curve_s[0],
            }
            for member in self._roster.members
        }
        return {
            "status": "ok" if "target" in workers else "loading",
            "version": outrider.__version__,
            "mode": self._mode(None),
            "workers": workers,
            "refused": dict(self._roster.refusals),
            "requests": {"running": len(self._running), "waiting": len(self._waiting)},
            "uptime_s": time.monotonic() - self._began,
        }

    async def _forward(self, peer: bytes, question: Any) -> None:
        """Let the target worker answer a client."""
        try:
            target = self._roster.target()
            answer = await self._roster.ask(target, lambda call: wire.renumbered(question, call))
            self._tell(peer, wire.renumbered(answer, question.call))
        except OutriderError as exc:
            self._tell(peer, wire.Failed(question.call, exc.code, str(exc)))

    async def _prepare(self, request: Request) -> None:
        """Turn the prompt into tokens, then start the request or let it wait."""
        try:
            if self._stopping:
                raise Overloaded("the pipeline is stopping")
            if len(self._requests) > self._defaults.queue:
                raise Overloaded(f"{self._defaults.queue} requests are running or waiting already")
            _check_lengths(request.submit, self._defaults.n_draft)
            target = self._roster.target()
            request.tokens = await self._tokens(target, request.submit)
            _check(request, target)
        except OutriderError as exc:
            self._fail(request, exc)
            return
        if request.key in self._requests:  # not cancelled in the meantime
            self._waiting.append(request)
            self._admit()

    async def _tokens(self, target: Member, submit: wire.Submit) -> tuple[int, ...]:
        prompt, messages = submit.prompt, submit.messages

        def question(call: int) -> wire.Message:
            if messages is not None:
                return wire.Chat(call, messages)
            return wire.Tokenize(call, str(prompt), True)

        if messages is None and not isinstance(prompt, str):
            return prompt
        answer = await self._roster.ask(target, question)
        tokens: tuple[int, ...] = answer.tokens
        return tokens

    def _admit(self) -> None:
        """Start what waits, as far as the target has sequences free."""
        while self._waiting and (target := self._roster.get("target")):
            if len(self._running) >= target.hello.slots:
                return
            self._start(self._waiting.popleft(), target)

    def _start(self, request: Request, target: Member) -> None:
        submit, vocabulary = request.submit, target.hello.fingerprint
        sampling = submit.sampling
        if submit.ignore_eos:
            never = tuple((end, NEVER) for end in vocabulary.ends)
            sampling = wire.with_bias(sampling, (*sampling.logit_bias, *never))
        task = core.Task(
            prompt=request.tokens,
            n_predict=submit.n_predict,
            stop=submit.stop,
            ends=frozenset(vocabulary.ends),
            context=target.hello.context,
            vocabulary=vocabulary.size,
            trace=submit.trace,
        )
        defaults = self._defaults
        n_max = defaults.n_draft if submit.n_draft is None else submit.n_draft
        mode = "plain" if n_max == 0 else self._mode(submit.mode)
        policy = self._policy(mode, LONGEST if n_max is None else min(n_max, LONGEST), submit)
        stats = Stats(mode, sampling.seed, request.submitted, step_s=target.hello.curve_s[0])
        request.session, request.sampling = Session(task, policy, stats), sampling
        self._running[request.id] = request
        self._tell(
            request.client, wire.Started(submit.call, target.hello.model, mode, request.tokens)
        )
        drafts = self._roster.get("draft") is not None
        self._advance(request, lambda session, now: session.start(now, drafts))

    def _policy(self, mode: Mode, n_max: int, submit: wire.Submit) -> Policy | Pilot:
        """Fixed numbers where they are asked for, else what the measured costs say."""
        n_min = self._defaults.n_min if submit.n_min is None else submit.n_min
        p_min = self._defaults.p_min if submit.p_min is None else submit.p_min
        if mode == "plain" or n_min > 0 or p_min > 0 or mode not in self._experience:
            return Policy(mode, n_max, min(n_min, n_max), p_min)
        return Pilot(mode, n_max, self._experience[mode])

    def _mode(self, mode: str | None) -> Mode:
        """`auto`: pipelined where draft and target have devices of their own, else synchronous."""
        match mode or self._defaults.mode:
            case "plain" | "sync" | "pipelined" as chosen:
                return chosen
        target, draft = self._roster.get("target"), self._roster.get("draft")
        if target is None or draft is None:
            return "pipelined"  # a draft that comes later comes from elsewhere
        return "sync" if shared(target.hello.cores, draft.hello.cores) else "pipelined"

    def _cancel(self, request: Request) -> None:
        if request.session:
            self._advance(request, lambda session, now: session.on_cancel())
        else:
            stats = asdict(Stats(seed=request.submit.sampling.seed).report())
            self._end(request, wire.Finished(request.submit.call, "cancelled", stats, None))

    # ---- sessions -------------------------------------------------------------------------------

    def _advance(self, request: Request, event: Callable[[Session, float], list[Command]]) -> None:
        """Give the session an event and carry out its commands."""
        session = request.session
        if session is None:
            return
        commands = event(session, time.monotonic())
        for command in commands:
            self._execute(request, session, command)
        if any(isinstance(command, core.Verify) for command in commands):
            session.policy.settle()  # the target is busy now, and nobody waits for us
        if request.timer:
            request.timer.cancel()
            request.timer = None
        if session.deadline is not None:
            delay = max(0.0, session.deadline - time.monotonic())
            loop = asyncio.get_running_loop()
            request.timer = loop.call_later(delay, self._advance, request, Session.on_timer)

    def _execute(self, request: Request, session: Session, command: Command) -> None:
        match command:
            case core.Verify(round_, base, drafted):
                self._tell_role("target", wire.Verify(request.id, round_, base, drafted))
            case core.Commit(base, tokens, until, floors):
                self._tell_role("draft", wire.Commit(request.id, base, tokens, until, floors))
            case core.Emit():
                self._tell(request.client, _fragment(request, session, command))
            case core.Prefill():
                assert request.sampling is not None  # set with the session
                logprobs = request.submit.logprobs
                opened = wire.Open(request.id, request.tokens, request.sampling, logprobs)
                self._tell_role("target", opened)
            case core.OpenDraft(lineage, base, tokens, until, floors):
                assert request.sampling is not None
                size = session.task.vocabulary
                leave = request.sampling, until, size, floors
                draft = wire.Draft(request.id, lineage, base, tokens, *leave)
                self._tell_role("draft", draft)
            case core.CloseDraft():
                self._tell_role("draft", wire.Close(request.id))
            case core.Finish(reason):
                trace = tuple(session.trace) if session.task.trace else None
                stats = asdict(session.stats.report())
                self._end(request, wire.Finished(request.submit.call, reason, stats, trace))
            case core.Fault(message):
                self._fail(request, ProtocolError(message))

    def _fail(self, request: Request, error: OutriderError) -> None:
        if request.session:
            request.session.over = True
            self._tell_role("draft", wire.Close(request.id))
        self._end(request, wire.Failed(request.submit.call, error.code, str(error)))

    def _end(self, request: Request, last: wire.Message) -> None:
        """The one outcome of a request; whatever it held is free again."""
        if self._requests.pop(request.key, None) is None:
            return
        if request.timer:
            request.timer.cancel()
        if request in self._waiting:
            self._waiting.remove(request)
        if self._running.pop(request.id, None):
            self._tell_role("target", wire.Close(request.id))
        if request.client in self._clients:
            self._tell(request.client, last)
        self._admit()
        self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if self._stopping and not self._requests:
            # a moment for the last messages to leave
            asyncio.get_running_loop().call_later(0.05, self.stopped.set)

    # ---- sending --------------------------------------------------------------------------------

    def _tell(self, peer: bytes, message: wire.Message) -> None:
        try:
            self._send(peer, message)
        except PeerGone:
            # not at once: the caller may be in the middle of what this changes
            asyncio.get_running_loop().call_soon(self._on_gone, peer)
        except ProtocolError as exc:
            log.error("not sent: %s", exc)

    def _tell_role(self, role: wire.Role, message: wire.Message) -> None:
        if member := self._roster.get(role):
            self._tell(member.peer, message)

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_lengths(submit: wire.Submit, n_draft: int | None) -> None:
    """Raises BadRequest."""
    n_max = n_draft if submit.n_draft is None else submit.n_draft
    n_max = LONGEST if n_max is None else min(n_max, LONGEST)
    if submit.n_min is not None and submit.n_min > n_max:
        raise BadRequest(f"n_min is {submit.n_min}, more than n_draft, {n_max}", "n_min")


def _check(request: Request, target: Member) -> None:
    """Raises BadRequest."""
    tokens, context = request.tokens, target.hello.context
    size = target.hello.fingerprint.size
    if unknown := [token for token, _ in request.submit.sampling.logit_bias if token >= size]:
        raise BadRequest(f"logit_bias names token {unknown[0]} of {size}", "logit_bias")
    if not tokens:
        raise BadRequest("the prompt is empty", "prompt")
    if max(tokens) >= size:
        raise BadRequest(f"token {max(tokens)} is not in the target's vocabulary", "prompt")
    if len(tokens) >= context:
        raise BadRequest(
            f"the prompt has {len(tokens)} tokens, and a context of {context} leaves no room for "
            "an answer: shorten it or raise --ctx",
            "prompt",
        )


def _fragment(request: Request, session: Session, emit: core.Emit) -> wire.Fragment:
    tokens = tuple(
        wire.FragmentToken(
            token.id,
            token.piece.decode("utf-8", "replace"),
            token.position,
            token.kind,
            token.logprob,
        )
        for token in emit.tokens
    )
    drafted = tuple((drafted.token, drafted.confidence) for drafted in emit.drafted)
    stats = asdict(session.stats.report())
    return wire.Fragment(request.submit.call, emit.round, emit.text, tokens, drafted, stats)
