"""What both workers are: a loop that talks to the coordinator, and one thread that owns the model.

The loop never computes. It takes every message at once: a cancellation reaches a running decode,
and heartbeats go on while the model works.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import ClassVar, Generic, NamedTuple, Protocol, TypeVar

import psutil

import outrider
from outrider.core.drafter import DrafterInfo
from outrider.core.engine import ModelInfo
from outrider.core.values import Role, TokenId
from outrider.errors import BadRequest, ConnectionFailed, NotAllowed, from_code
from outrider.wire import messages as wire
from outrider.wire.keys import Credentials
from outrider.wire.transport import Link, PeerGone
from outrider_services.pipeline.places import place
from outrider_services.pipeline.slots import Slots, Taken

log = logging.getLogger(__name__)

BEAT_S = 0.25
RETRY_S = 0.05
SILENCE_S = 60.0  # a worker ends if its coordinator is silent for so long, its own pauses apart
Curve = tuple[float, ...]


class Measured(NamedTuple):
    """What the model's passes cost, in seconds: see `wire.Hello`."""

    curve_s: Curve
    crowd_s: Curve = ()
    rollback_s: float = 0.0

    @classmethod
    def told(cls, text: str) -> Measured | None:
        """What an earlier worker of this place told, in JSON; None if it did not."""
        if not text:
            return None
        curve_s, crowd_s, rollback_s = json.loads(text)
        return cls(tuple(curve_s), tuple(crowd_s), rollback_s)


Status = Callable[[str, float | str], None]
T = TypeVar("T")


class Model(Protocol):
    """What every worker needs of the engine or drafter that it drives."""

    @property
    def info(self) -> ModelInfo | DrafterInfo: ...
    def label(self, token: TokenId) -> str: ...
    def cancel(self) -> None: ...
    def close(self) -> None: ...


M = TypeVar("M", bound=Model)
Loader = Callable[[Callable[[float], None]], M]


@dataclass(frozen=True, slots=True)
class Connection:
    """How a worker reaches its coordinator."""

    address: str
    timeout_s: float  # for the first answer
    delay_s: float = 0.0  # added to each message, either way: a made-up link
    token: str = field(default="", repr=False)  # of the launcher
    follows_killed: bool = False  # see `wire.Hello`
    credentials: Credentials | None = None  # where the link needs keys
    build: str = ""  # what the worker computes with, for people to read
    measured: Measured | None = None  # by the worker that was here before, with the same model


class Worker(ABC, Generic[M]):
    """A worker of one role; subclasses handle its messages and choose what to compute next."""

    role: ClassVar[Role]

    def __init__(self, model: M, owner: ThreadPoolExecutor, measured: Measured) -> None:
        self.model = model
        self.steps = 0
        self.slots = Slots(model.info.slots)
        self._computed_s = 0.0
        self._since: float | None = None  # when the running computation began; None: there is none
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._owner = owner
        self._measured = measured
        self._link: Link | None = None
        self._delay_s, self._token, self._build = 0.0, "", ""
        self._follows_killed = False
        self._incarnation = secrets.randbits(62)
        self._silent_beats = 0
        self._welcomed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._work = asyncio.Event()

    # ---- for the subclasses ---------------------------------------------------------------------

    @abstractmethod
    def handle(self, message: wire.Message) -> None:
        """Take one message that is meant for this role; must not wait."""

    @abstractmethod
    async def compute(self) -> bool:
        """Do one piece of work; False if there is none."""

    @abstractmethod
    def forget(self) -> None:
        """Drop all requests: the coordinator knows none of them."""

    @staticmethod
    @abstractmethod
    def measure(model: M) -> Measured:
        """On the owner thread: the seconds for `Hello`."""

    def admit(
        self, tokens: Sequence[TokenId], cache: str | None, skip: int = 0, base: int | None = None
    ) -> Taken:
        """A sequence for a new request with this text, which is certain up to `base`.

        Raises BadRequest or Overloaded.
        """
        info = self.model.info
        if not 0 < len(tokens) < info.context:
            raise BadRequest(f"{len(tokens)} tokens do not fit the context of {info.context}")
        if info.vocabulary and max(tokens) >= info.vocabulary.size:
            raise BadRequest(f"token {max(tokens)} is not in the vocabulary", "prompt")
        return self.slots.take(tokens[:base], cache, skip)

    def send(self, message: wire.Message) -> None:
        """Send if possible: a coordinator that is gone has forgotten the request, too."""
        if self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._send_now, message)
        else:
            self._send_now(message)

    def _send_now(self, message: wire.Message) -> None:
        if self._link is None:
            return
        try:
            self._link.send(message)
        except PeerGone as exc:
            log.debug("not sent: %s (%s)", type(message).__name__, exc)
        except BadRequest as exc:  # it is too long
            log.warning("not sent as it is: %s", exc)
            match message:
                case wire.Passed(verdicts):
                    for number, verdict in verdicts:
                        self._send_now(wire.Done(number, verdict))
                case wire.Done(number) | wire.LabelTexts(number):
                    self._send_now(wire.failure(number, exc))

    async def owned(self, function: Callable[[], T]) -> T:
        """Run `function` on the thread that owns the model."""
        self.steps += 1
        self._since = time.perf_counter()
        try:
            return await asyncio.get_running_loop().run_in_executor(self._owner, function)
        finally:
            self._computed_s, self._since = self.computed_s, None

    @property
    def computed_s(self) -> float:
        """Seconds that the model has computed so far, for all requests together.

        The growth since a request asked for work is the time that it waited behind others.
        """
        if self._since is None:
            return self._computed_s
        return self._computed_s + time.perf_counter() - self._since

    def wake(self) -> None:
        """There may be something to compute."""
        self._work.set()

    # ---- running --------------------------------------------------------------------------------

    async def run(self, connection: Connection, status: Status) -> None:
        """Serve until cancelled. Raises OutriderError if refused, or without a coordinator."""
        self._delay_s, self._token = connection.delay_s, connection.token
        self._build, self._follows_killed = connection.build, connection.follows_killed
        on = self._on_arrival, self._on_lost, self._on_up
        self._link = Link(connection.address, *on, connection.credentials)
        tasks = [asyncio.ensure_future(c) for c in (self._beat(), self._compute_forever())]
        try:
            await self._join(connection)
            if self._welcomed.done():
                status("ready", 1.0)
            await asyncio.wait([self.ended, *tasks], return_when=asyncio.FIRST_COMPLETED)
            for task in [self.ended, *tasks]:
                if task.done():
                    task.result()
        finally:
            self.forget()  # so that nothing is left to compute
            self.model.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._link.close()

    async def _join(self, connection: Connection) -> None:
        deadline = time.monotonic() + connection.timeout_s
        while not (self._welcomed.done() or self.ended.done()):
            assert self._link
            if self._link.refusal:
                raise NotAllowed(self._link.refusal)
            if time.monotonic() > deadline:
                start = (
                    f"no coordinator answers at {connection.address}; start one: `outrider serve`"
                )
                raise ConnectionFailed(self._link.hindrance or start)
            self.send(self._hello())
            answers = {self.ended, self._welcomed}
            await asyncio.wait(answers, timeout=RETRY_S, return_when=asyncio.FIRST_COMPLETED)

    def _on_arrival(self, message: wire.Message) -> None:
        if self._delay_s:
            asyncio.get_running_loop().call_later(self._delay_s, self._on_message, message)
        else:
            self._on_message(message)

    def _on_up(self) -> None:
        if self._welcomed.done():  # again: perhaps the coordinator is another, and knows nobody
            self.send(self._hello())

    def _on_lost(self, why: str) -> None:
        log.info("%s", why)
        self.forget()

    def _on_message(self, message: wire.Message) -> None:
        self._silent_beats = 0
        match message:
            case wire.Welcome():
                self.forget()
                if not self._welcomed.done():
                    self._welcomed.set_result(None)
            case wire.Who():
                self.send(self._hello())
            case wire.Refused(code, reason):
                if not self.ended.done():
                    self.ended.set_exception(from_code(code, reason))
            case wire.Ping(number):
                if number and self._welcomed.done():
                    self.send(self._beat_of(number))
            case wire.Labels(call, start, count):
                vocabulary = self.model.info.vocabulary
                end = min(start + count, vocabulary.size) if vocabulary else start
                ids = range(start, end)
                self.send(wire.LabelTexts(call, tuple(map(self.model.label, ids))))
            case _:
                self.handle(message)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            if self._welcomed.done():
                self.send(self._beat_of(0))
                self._silent_beats += 1
                if self._silent_beats * BEAT_S > SILENCE_S:
                    raise ConnectionFailed(f"the coordinator has been silent for {SILENCE_S:.0f} s")

    def _beat_of(self, ping: int) -> wire.Beat:
        return wire.Beat(self.steps, self._since is not None, self.computed_s, ping)

    async def _compute_forever(self) -> None:
        while True:
            self._work.clear()
            while await self.compute():
                pass
            await self._work.wait()

    def _hello(self) -> wire.Hello:
        info = self.model.info
        return wire.Hello(
            protocol=wire.PROTOCOL,
            version=outrider.__version__,
            role=self.role,
            incarnation=self._incarnation,
            model=info.name[:256],
            vocabulary=info.vocabulary,
            context=info.context,
            slots=info.slots,
            device=info.device[:256],
            cores=place(info.units)[:256],
            curve_s=self._measured.curve_s,
            crowd_s=self._measured.crowd_s,
            token=self._token,
            memory=psutil.Process().memory_info().rss,
            build=self._build[:256],
            rollback_s=self._measured.rollback_s,
            sides=info.spare if self.role == "target" else 0,
            follows_killed=self._follows_killed,
        )


async def serve(
    make: type[Worker[M]],
    load: Loader[M],
    connection: Connection,
    status: Status,
) -> None:
    """Load the model on its owner thread, join the coordinator, serve, and free the model."""
    loop = asyncio.get_running_loop()
    owner = ThreadPoolExecutor(1, thread_name_prefix="engine")
    try:

        def report(done: float) -> None:
            loop.call_soon_threadsafe(status, "loading", done)

        model: M = await loop.run_in_executor(owner, load, report)
        try:
            measured = connection.measured
            if measured is None:  # a worker that was lost is waited for: the next one saves this
                measured = await loop.run_in_executor(owner, make.measure, model)
                status("measured", json.dumps(measured))
            await make(model, owner, measured).run(connection, status)
        finally:
            await loop.run_in_executor(owner, model.close)
    finally:
        owner.shutdown()
