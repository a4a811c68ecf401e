"""The coordinator: turns messages into events of sessions, and their commands into messages.

It holds no socket: `send` and `on_message` are joined to a ROUTER by `outrider_services.cli`, and
to each other in tests. Nothing here waits for anything but an answer, and no answer for long.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import outrider
from outrider import session as core
from outrider import wire
from outrider.errors import (
    BadRequest,
    IncompatiblePair,
    OutriderError,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    WorkerLost,
    from_code,
)
from outrider.policy import Mode, Policy
from outrider.session import Command, Session
from outrider.stats import Stats
from outrider.transport import PeerGone
from outrider_services.pairing import check_pair

log = logging.getLogger(__name__)

ANSWER_S = 10.0  # for a question to a worker
BEAT_LOST_S = 1.0  # four missing heartbeats
PING_S = 1.0
BAD_FRAMES = 8  # after which a peer is not listened to any more
NO_ENDS = -1e6  # the bias that keeps end tokens from being chosen

Send = Callable[[bytes, wire.Message], None]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that does not say."""

    mode: str = "auto"
    n_draft: int = 5
    n_min: int = 0
    p_min: float = 0.0
    queue: int = 64  # requests that may wait for a free sequence


@dataclass(slots=True)
class Peer:
    """A worker that was welcomed."""

    id: bytes
    hello: wire.Hello
    heard: float
    steps: int = 0
    moved: float = 0.0  # when it last finished an evaluation, or had none to do

    def stall_s(self) -> float:
        """No evaluation takes longer than this: 128 rows at the price of single ones, and half more."""
        return max(8.0, 200 * self.hello.step_s)


@dataclass(slots=True)
class Running:
    """A request that has a session."""

    id: int
    client: bytes
    submit: wire.Submit
    session: Session
    sampling: wire.Sampling
    timer: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class Waiting:
    """A request that waits for a free sequence, its prompt already in tokens."""

    client: bytes
    submit: wire.Submit
    tokens: tuple[int, ...] = field(default=())


class Coordinator:
    """One target worker, at most one draft worker, and the requests they serve."""

    def __init__(self, send: Send, defaults: Defaults) -> None:
        self._send, self._defaults = send, defaults
        self._workers: dict[str, Peer] = {}
        self._refusals: dict[str, str] = {}
        self._clients: set[bytes] = set()
        self._bad_frames: dict[bytes, int] = {}
        self._running: dict[int, Running] = {}
        self._calls: dict[tuple[bytes, int], Running | Waiting | None] = {}  # None: being prepared
        self._waiting: deque[Waiting] = deque()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._next_id = secrets.randbits(62)  # requests and questions; never reused
        self._tasks: set[asyncio.Task[None]] = set()
        self._joining: dict[bytes, int] = {}
        self._began = time.monotonic()
        self.stopped = asyncio.Event()
        self._stopping = False

    # ---- messages -------------------------------------------------------------------------------

    def on_message(self, peer: bytes, message: wire.Message) -> None:
        if self._bad_frames.get(peer, 0) >= BAD_FRAMES:
            return
        match message:
            case wire.Hello():
                self._on_hello(peer, message)
            case wire.Submit() | wire.Cancel() | wire.Health() | wire.Stop():
                self._on_client(peer, message)
            case wire.Tokenize() | wire.Detokenize() | wire.Render():
                self._clients.add(peer)
                self._spawn(self._forward(peer, message))
            case _:
                self._on_worker(peer, message)

    def on_bad_frame(self, peer: bytes, error: ProtocolError) -> None:
        count = self._bad_frames[peer] = self._bad_frames.get(peer, 0) + 1
        if count <= BAD_FRAMES:
            log.warning("dropped: %s", error)
        if count == BAD_FRAMES:
            log.warning("a peer sent %d bad frames and is no longer listened to", count)
            self._on_gone(peer)
        if len(self._bad_frames) > 1024:
            self._bad_frames.pop(next(iter(self._bad_frames)))

    def on_disconnect(self) -> None:
        """Some connection ended: find out whose."""
        for peer in [*(w.id for w in self._workers.values()), *self._clients]:
            self._tell(peer, wire.Ping())

    async def run(self) -> None:
        """Watch over the workers until stopped."""
        while not self.stopped.is_set():
            now = time.monotonic()
            for role, worker in list(self._workers.items()):
                if now - worker.heard > BEAT_LOST_S:
                    self._lose(role, f"the {role} worker has not been heard of for {BEAT_LOST_S} s")
                elif now - worker.moved > worker.stall_s():
                    self._tell(worker.id, wire.Refused("worker_unavailable", "it makes no progress"))
                    self._lose(role, f"the {role} worker makes no progress")
            try:
                await asyncio.wait_for(self.stopped.wait(), BEAT_LOST_S / 4)
            except TimeoutError:
                continue
        for task in self._tasks:
            task.cancel()
        for running in list(self._running.values()):
            self._fail(running, WorkerLost("the pipeline was stopped"))

    # ---- workers --------------------------------------------------------------------------------

    def _on_hello(self, peer: bytes, hello: wire.Hello) -> None:
        known = self._workers.get(hello.role)
        if known and known.id == peer and known.hello.incarnation == hello.incarnation:
            return
        if self._joining.get(peer) == hello.incarnation:
            return
        if hello.protocol != wire.PROTOCOL:
            reason = (
                f"the {hello.role} worker speaks protocol {hello.protocol} (outrider "
                f"{hello.version}), the coordinator {wire.PROTOCOL} (outrider {outrider.__version__})"
            )
            self._refuse(peer, hello.role, ProtocolError(reason))
            return
        if known and known.hello.incarnation != hello.incarnation:
            reason = f"there is a {hello.role} worker already"
            self._tell(peer, wire.Refused("invalid_config", reason))
            return
        if known:  # the same process, by a new connection
            self._lose(hello.role, f"the {hello.role} worker's connection was interrupted")
        self._joining[peer] = hello.incarnation
        self._spawn(self._join(peer, hello))

    async def _join(self, peer: bytes, hello: wire.Hello) -> None:
        worker = Peer(peer, hello, time.monotonic(), moved=time.monotonic())
        other_role = "draft" if hello.role == "target" else "target"
        try:
            other = self._workers.get(other_role)
            if other:
                pair = {hello.role: worker, other_role: other}
                await self._check(pair["target"], pair["draft"])
        except OutriderError as exc:
            if hello.role == "draft" or other is None:
                self._refuse(peer, hello.role, exc)
                return
            # the target is what matters: the draft has to go
            self._refuse(other.id, "draft", exc)
            self._lose("draft", str(exc))
        finally:
            self._joining.pop(peer, None)
        worker.heard = worker.moved = time.monotonic()
        self._workers[hello.role] = worker
        self._refusals.pop(hello.role, None)
        self._tell(peer, wire.Welcome())
        log.info("%s worker: %s on %s", hello.role, hello.model, hello.device)
        if hello.role == "draft":
            for running in list(self._running.values()):
                self._execute(running, running.session.on_draft_ready())

    async def _check(self, target: Peer, draft: Peer) -> None:
        def texts(worker: Peer) -> Callable[[int, int], Any]:
            async def ask(start: int, count: int) -> tuple[str, ...]:
                answer = await self._ask(worker, lambda c: wire.Labels(c, start, count))
                if not isinstance(answer, wire.LabelTexts) or len(answer.texts) != count:
                    raise IncompatiblePair("a worker cannot tell the texts of its tokens")
                return answer.texts

            return ask

        prints = target.hello.fingerprint, draft.hello.fingerprint
        await check_pair(*prints, texts(target), texts(draft))

    def _refuse(self, peer: bytes, role: str, error: OutriderError) -> None:
        log.warning("%s worker refused: %s", role, error)
        self._refusals[role] = str(error)
        self._tell(peer, wire.Refused(error.code, str(error)))

    def _on_worker(self, peer: bytes, message: wire.Message) -> None:
        match message:
            case wire.Tokens(call) | wire.Rendered(call) | wire.LabelTexts(call):
                self._answer(call, message)
                return
            case wire.Failed(call, code, reason) if call in self._answers:
                self._answer(call, from_code(code, reason))
                return
        role = next((r for r, w in self._workers.items() if w.id == peer), None)
        if role is None:
            if peer not in self._joining:
                self._tell(peer, wire.Who())
            return
        worker = self._workers[role]
        worker.heard = time.monotonic()
        match message:
            case wire.Beat(steps, busy):
                if steps != worker.steps or not busy:
                    worker.steps, worker.moved = steps, worker.heard
            case wire.Verdict() if role == "target":
                if running := self._running.get(message.request):
                    values = (getattr(message, f) for f in core.RoundResult.__slots__)
                    self._step(running, core.RoundResult(*values))
            case wire.Drafted() if role == "draft":
                self._on_drafted(message)
            case wire.Failed(request, code, reason):
                if running := self._running.get(request):
                    if role == "target":
                        self._fail(running, from_code(code, reason))
                    else:
                        log.warning("request goes on without a draft: %s", reason)
                        self._execute(running, running.session.on_draft_lost(self._now()))
            case _:
                self.on_bad_frame(peer, ProtocolError(f"{type(message).__name__} from a {role}"))

    def _step(self, running: Running, result: core.RoundResult) -> None:
        self._execute(running, running.session.on_verdict(result, self._now()))

    def _on_drafted(self, message: wire.Drafted) -> None:
        running = self._running.get(message.request)
        if running is None:
            return  # closed in the meantime
        pairs = zip(message.tokens, message.confidences, strict=False)
        drafted = [core.Drafted(token, confidence) for token, confidence in pairs]
        if len(drafted) != len(message.tokens):
            drafted = []  # not one confidence for each token: an offence, as an empty draft is
        event = running.session.on_drafted
        self._execute(
            running, event(message.lineage, message.position, drafted, message.elapsed_s, self._now())
        )

    def _lose(self, role: str, why: str) -> None:
        if self._workers.pop(role, None) is None:
            return
        log.warning("%s", why)
        for running in list(self._running.values()):
            if role == "target":
                self._fail(running, WorkerLost(f"{why}; the request cannot go on", role))
            else:
                self._execute(running, running.session.on_draft_lost(self._now()))
        if role == "target":
            for waiting in list(self._waiting):
                self._reject(waiting.client, waiting.submit.call, WorkerLost(why, role))
            self._waiting.clear()

    def _on_gone(self, peer: bytes) -> None:
        for role, worker in list(self._workers.items()):
            if worker.id == peer:
                self._lose(role, f"the {role} worker is gone")
        self._joining.pop(peer, None)
        if peer in self._clients:
            self._clients.discard(peer)
            for client, call in [key for key in self._calls if key[0] == peer]:
                self._cancel(client, call)

    # ---- clients --------------------------------------------------------------------------------

    def _on_client(self, peer: bytes, message: wire.Message) -> None:
        self._clients.add(peer)
        match message:
            case wire.Submit(call):
                if (peer, call) not in self._calls:
                    self._calls[peer, call] = None
                    self._spawn(self._prepare(peer, message))
            case wire.Cancel(call):
                self._cancel(peer, call)
            case wire.Health(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
            case wire.Stop(call):
                self._tell(peer, wire.HealthReport(call, self.health()))
                self._stopping = True
                self._stop_if_idle()

    def health(self) -> dict[str, Any]:
        """What `outrider ps` shows; `status` is "ok" as soon as requests can be served."""
        workers = {
            role: {
                "model": worker.hello.model,
                "device": worker.hello.device,
                "context": worker.hello.context,
                "slots": worker.hello.slots,
                "step_s": worker.hello.step_s,
            }
            for role, worker in self._workers.items()
        }
        return {
            "status": "ok" if "target" in workers else "loading",
            "version": outrider.__version__,
            "mode": self._mode(None),
            "workers": workers,
            "refused": dict(self._refusals),
            "requests": {"running": len(self._running), "waiting": len(self._waiting)},
            "uptime_s": time.monotonic() - self._began,
        }

    async def _forward(self, peer: bytes, message: Any) -> None:
        try:
            target = self._target()
            answer = await self._ask(target, lambda c: wire.renumbered(message, c))
            self._tell(peer, wire.renumbered(answer, message.call))
        except OutriderError as exc:
            self._tell(peer, wire.Failed(message.call, exc.code, str(exc)))

    async def _prepare(self, client: bytes, submit: wire.Submit) -> None:
        """Turn the prompt into tokens, then start the request or let it wait."""
        try:
            if self._stopping:
                raise Overloaded("the pipeline is stopping")
            if len(self._waiting) >= self._defaults.queue:
                raise Overloaded(f"{len(self._waiting)} requests are waiting already")
            target = self._target()
            tokens = await self._tokens(target, submit)
            context = target.hello.context
            if not tokens:
                raise BadRequest("the prompt is empty", "prompt")
            if len(tokens) >= context:
                raise BadRequest(
                    f"the prompt has {len(tokens)} tokens, and the context of {context} leaves no "
                    "room for an answer: shorten it or raise --ctx",
                    "prompt",
                )
        except OutriderError as exc:
            self._reject(client, submit.call, exc)
            return
        if (client, submit.call) in self._calls:  # not cancelled in the meantime
            waiting = Waiting(client, submit, tokens)
            self._calls[client, submit.call] = waiting
            self._waiting.append(waiting)
            self._admit()

    async def _tokens(self, target: Peer, submit: wire.Submit) -> tuple[int, ...]:
        prompt, special = submit.prompt, True
        if submit.messages is not None:
            messages = submit.messages
            rendered = await self._ask(target, lambda c: wire.Render(c, messages))
            prompt = rendered.text
        if not isinstance(prompt, str):
            return prompt
        text = prompt
        answer = await self._ask(target, lambda c: wire.Tokenize(c, text, special))
        tokens: tuple[int, ...] = answer.tokens
        return tokens

    def _admit(self) -> None:
        """Start what waits, as far as the target has sequences free."""
        target = self._workers.get("target")
        while target and self._waiting and len(self._running) < target.hello.slots:
            waiting = self._waiting.popleft()
            self._start(waiting, target)

    def _start(self, waiting: Waiting, target: Peer) -> None:
        submit, prints = waiting.submit, target.hello.fingerprint
        sampling = submit.sampling
        if submit.ignore_eos:
            bias = (*sampling.logit_bias, *((end, NO_ENDS) for end in prints.ends))
            sampling = wire.with_bias(sampling, bias)
        task = core.Task(
            prompt=waiting.tokens,
            n_predict=submit.n_predict,
            stop=submit.stop,
            ends=frozenset(prints.ends),
            context=target.hello.context,
            vocabulary=prints.size,
            trace=submit.trace,
        )
        policy = self._policy(submit)
        stats = Stats(mode=policy.mode, seed=sampling.seed, step_s=target.hello.step_s)
        self._next_id += 1
        running = Running(
            self._next_id, waiting.client, submit, Session(task, policy, stats), sampling
        )
        self._running[running.id] = running
        self._calls[waiting.client, submit.call] = running
        self._tell(running.client, wire.Started(submit.call, policy.mode, waiting.tokens))
        self._execute(running, running.session.start(self._now(), "draft" in self._workers))

    def _policy(self, submit: wire.Submit) -> Policy:
        defaults = self._defaults
        n_max = defaults.n_draft if submit.n_draft is None else submit.n_draft
        mode = self._mode(submit.mode) if n_max else "plain"
        return Policy(mode, n_max, min(defaults.n_min, n_max), defaults.p_min)

    def _mode(self, mode: str | None) -> Mode:
        """`auto`: pipelined where draft and target have devices of their own, else synchronous."""
        match mode or self._defaults.mode:
            case "plain" | "sync" | "pipelined" as chosen:
                return chosen
        target, draft = self._workers.get("target"), self._workers.get("draft")
        if target is None or draft is None:
            return "pipelined"  # harmless without a draft, and right for one that comes from afar
        return "sync" if _share_cores(target.hello.cores, draft.hello.cores) else "pipelined"

    def _cancel(self, client: bytes, call: int) -> None:
        match self._calls.get((client, call)):
            case Running() as running:
                self._execute(running, running.session.on_cancel())
            case Waiting() as waiting:
                self._waiting.remove(waiting)
                self._reject_as_cancelled(client, call)
            case None if (client, call) in self._calls:
                self._reject_as_cancelled(client, call)

    def _reject_as_cancelled(self, client: bytes, call: int) -> None:
        self._calls.pop((client, call), None)
        self._tell(client, wire.Finished(call, "cancelled", asdict(Stats().report()), None))

    def _reject(self, client: bytes, call: int, error: OutriderError) -> None:
        if self._calls.pop((client, call), self) is not self:
            self._tell(client, wire.Failed(call, error.code, str(error)))

    # ---- sessions -------------------------------------------------------------------------------

    def _execute(self, running: Running, commands: list[Command]) -> None:
        for command in commands:
            self._command(running, command)
        if running.timer:
            running.timer.cancel()
            running.timer = None
        deadline = running.session.deadline
        if deadline is not None and running.id in self._running:
            delay = max(0.0, deadline - self._now())
            running.timer = asyncio.get_running_loop().call_later(delay, self._on_timer, running)

    def _on_timer(self, running: Running) -> None:
        self._execute(running, running.session.on_timer(self._now()))

    def _command(self, running: Running, command: Command) -> None:
        request, session = running.id, running.session
        match command:
            case core.Prefill():
                prompt, logprobs = session.task.prompt, running.submit.logprobs
                self._tell_role("target", wire.Open(request, prompt, running.sampling, logprobs))
            case core.Verify(round_, base, drafted):
                self._tell_role("target", wire.Verify(request, round_, base, drafted))
            case core.OpenDraft(lineage, base, tokens, until):
                sampling, size = running.sampling, session.task.vocabulary
                draft = wire.Draft(request, lineage, base, tokens, sampling, until, size)
                self._tell_role("draft", draft)
            case core.Commit(base, tokens, until):
                self._tell_role("draft", wire.Commit(request, base, tokens, until))
            case core.CloseDraft():
                self._tell_role("draft", wire.Close(request))
            case core.Emit():
                self._tell(running.client, _fragment(running, command))
            case core.Finish(reason):
                trace = tuple(session.trace) if session.task.trace else None
                stats = asdict(session.stats.report())
                self._end(running, wire.Finished(running.submit.call, reason, stats, trace))
            case core.Fault(message):
                self._fail(running, ProtocolError(message))

    def _fail(self, running: Running, error: OutriderError) -> None:
        running.session.over = True
        self._tell_role("draft", wire.Close(running.id))
        self._end(running, wire.Failed(running.submit.call, error.code, str(error)))

    def _end(self, running: Running, last: wire.Message) -> None:
        if self._running.pop(running.id, None) is None:
            return
        if running.timer:
            running.timer.cancel()
        self._calls.pop((running.client, running.submit.call), None)
        self._tell_role("target", wire.Close(running.id))
        self._tell(running.client, last)
        self._admit()
        self._stop_if_idle()

    def _stop_if_idle(self) -> None:
        if self._stopping and not self._running and not self._waiting:
            # a moment for the last messages to leave
            asyncio.get_running_loop().call_later(0.05, self.stopped.set)

    # ---- small things ---------------------------------------------------------------------------

    @staticmethod
    def _now() -> float:
        return time.monotonic()

    def _target(self) -> Peer:
        if "target" in self._workers:
            return self._workers["target"]
        refused = self._refusals.get("target")
        why = f": {refused}" if refused else "; it may be loading, or being restarted"
        raise WorkerLost(f"no target worker is connected{why}", "target")

    def _tell(self, peer: bytes, message: wire.Message) -> None:
        try:
            self._send(peer, message)
        except PeerGone:
            # not now: the caller may be in the middle of something that this would change
            asyncio.get_running_loop().call_soon(self._on_gone, peer)
        except ProtocolError as exc:
            log.error("not sent: %s", exc)

    def _tell_role(self, role: str, message: wire.Message) -> None:
        if role in self._workers:
            self._tell(self._workers[role].id, message)

    async def _ask(self, worker: Peer, question: Callable[[int], wire.Message]) -> Any:
        """Send the question with a number of its own and wait for the answer, but not for long."""
        self._next_id += 1
        call = self._next_id
        answer = self._answers[call] = asyncio.get_running_loop().create_future()
        try:
            self._tell(worker.id, question(call))
            return await asyncio.wait_for(answer, ANSWER_S)
        except TimeoutError:
            role = worker.hello.role
            raise RequestTimeout(f"the {role} worker has not answered in {ANSWER_S:.0f} s") from None
        finally:
            del self._answers[call]

    def _answer(self, call: int, answer: Any) -> None:
        future = self._answers.get(call)
        if future is None or future.done():
            return
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)

    def _spawn(self, coroutine: Any) -> None:
        task = asyncio.ensure_future(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _fragment(running: Running, emit: core.Emit) -> wire.Fragment:
    tokens = tuple(
        wire.FragmentToken(t.id, t.piece.decode("utf-8", "replace"), t.position, t.kind, t.logprob)  # type: ignore[arg-type]
        for t in emit.tokens
    )
    drafted = tuple((d.token, d.confidence) for d in emit.drafted)
    stats = asdict(running.session.stats.report())
    return wire.Fragment(running.submit.call, emit.round, emit.text, tokens, drafted, stats)


def _share_cores(one: str, other: str) -> bool:
    """Whether two workers' "host:core,core" have a core in common; "" is a device of its own."""
    if not one or not other:
        return False
    (host, cores), (other_host, others) = (place.rsplit(":", 1) for place in (one, other))
    return host == other_host and not set(cores.split(",")).isdisjoint(others.split(","))
