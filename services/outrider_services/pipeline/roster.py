"""The workers of a pipeline: who has joined, whether they fit, whether they are still alive."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeVar

import outrider
from outrider.core.values import Role
from outrider.errors import (
    ConfigError,
    IncompatiblePair,
    OutriderError,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    WorkerLost,
    from_code,
)
from outrider.wire import messages as wire
from outrider_services.pipeline.vocabularies import check_pair

log = logging.getLogger(__name__)

ANSWER_S = 12.0  # most that a worker may take to answer a question
LAST_S = 0.05  # for what has come and was not read
SILENT_S = 1.0  # four missing heartbeats: nobody waits for such a draft
LOST_S = 10.0  # so long a worker may be paused, or its machine

Tell = Callable[[bytes, wire.Message], None]
Answer = TypeVar("Answer", wire.Tokens, wire.Rendered, wire.LabelTexts, wire.Constrainable)


@dataclass(slots=True)
class Member:
    """A worker that was welcomed, and the one connection that speaks for it."""

    peer: bytes
    hello: wire.Hello
    heard: float
    moved: float  # when it last finished an evaluation, or had none to do
    steps: int = 0
    is_silent: bool = False

    def hear(self, now: float) -> None:
        """It has said something. A time in which it was paused is none without progress."""
        if now - self.heard > SILENT_S:
            self.moved += now - self.heard
        self.heard = now

    def stall_s(self) -> float:
        """Most seconds of an evaluation: 128 rows at the price of single ones, and half more."""
        return max(8.0, 200 * self.hello.curve_s[0])


def taken(role: Role) -> wire.Refused:
    """The answer to one whose place is not free: it may come again."""
    return wire.Refused(Overloaded.code, f"there is a {role} worker already")


class Roster:
    """At most one target worker and one draft worker.

    `on_joined` and `on_lost` are told of each, and `on_paused` of a draft that nobody must wait
    for, and then of its return.
    """

    def __init__(
        self,
        tell: Tell,
        on_joined: Callable[[Role], None],
        on_lost: Callable[[Role, str], None],
        on_paused: Callable[[bool], None],
        clock: Callable[[], float] = time.monotonic,
        tokens: Mapping[Role, str] = MappingProxyType({}),  # without one, anybody may join
    ) -> None:
        self.refusals: dict[str, str] = {}
        self._tell, self._on_joined, self._on_lost = tell, on_joined, on_lost
        self._on_paused, self._clock, self._looked = on_paused, clock, clock()
        self._tokens = tokens
        self._members: dict[Role, Member] = {}
        self._joining: dict[bytes, asyncio.Task[None]] = {}
        self._answers: dict[int, tuple[bytes, asyncio.Future[Any]]] = {}  # asked peer, who waits
        self._questions = 0

    # ---- who is there ---------------------------------------------------------------------------

    def get(self, role: Role) -> Member | None:
        return self._members.get(role)

    def tell(self, role: Role, message: wire.Message) -> None:
        """Send it to the worker of this role, if there is one."""
        if member := self.get(role):
            self._tell(member.peer, message)

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    def report(self) -> dict[Role, dict[str, str | int | float]]:
        """What `outrider ps` shows of the workers, by role."""
        return {
            member.hello.role: {
                "model": member.hello.model,
                "device": member.hello.device,
                "context": member.hello.context,
                "slots": member.hello.slots,
                "step_s": member.hello.curve_s[0],
            }
            for member in self._members.values()
        }

    @property
    def peers(self) -> list[bytes]:
        """The connections of those that are here or about to join."""
        return [*(member.peer for member in self.members), *self._joining]

    @property
    def has_draft(self) -> bool:
        """Whether there is a draft that can be counted on."""
        return "draft" in self._members and not self._members["draft"].is_silent

    def target(self) -> Member:
        """The target worker. Raises WorkerLost if there is none."""
        if target := self._members.get("target"):
            return target
        refused = self.refusals.get("target")
        why = f": {refused}" if refused else "; it may be loading, or being restarted"
        raise WorkerLost(f"no target worker is connected{why}", "target")

    def role_of(self, peer: bytes) -> Role | None:
        """The role that `peer` speaks for; an unknown peer is asked who it is."""
        for role, member in self._members.items():
            if member.peer == peer:
                member.hear(self._clock())
                if member.is_silent:
                    member.is_silent = False
                    self._on_paused(False)
                return role
        if peer not in self._joining:
            self._tell(peer, wire.Who())
        return None

    # ---- joining --------------------------------------------------------------------------------

    def on_hello(self, peer: bytes, hello: wire.Hello) -> None:
        """Refuse the worker, or compare it with the other one and then welcome it."""
        known = self._members.get(hello.role)
        again = known is not None and known.hello.incarnation == hello.incarnation
        if peer in self._joining or (known and again and known.peer == peer):
            return  # it is being compared, or was welcomed already
        if hello.protocol != wire.PROTOCOL:
            reason = (
                f"the {hello.role} worker speaks protocol {hello.protocol} (outrider "
                f"{ascii(hello.version)[1:-1]:.40}), the coordinator {wire.PROTOCOL} "
                f"(outrider {outrider.__version__})"
            )
            self._refuse(peer, hello, ProtocolError(reason))
        elif not self._is_ours(hello):
            reason = (
                f"this pipeline starts its {hello.role} worker itself; to let others join, start "
                f"it with --{hello.role}-place remote"
            )
            self._refuse(peer, hello, ConfigError(reason))
        elif hello.role == "target" and hello.vocabulary is None:
            self._refuse(peer, hello, ProtocolError("a target without a vocabulary"))
        elif known and not again:
            self._tell(peer, taken(hello.role))
        else:
            if known:
                self.lose(hello.role, f"the {hello.role} worker's connection was interrupted")
            self._joining[peer] = asyncio.ensure_future(self._join(peer, hello))

    async def _join(self, peer: bytes, hello: wire.Hello) -> None:
        now = self._clock()
        member = Member(peer, hello, now, now)
        opposite: Role = "draft" if hello.role == "target" else "target"
        other = compared = None
        try:
            # while the two are compared, the other may leave and a new one come: compare again
            while (other := self._members.get(opposite)) is not compared:
                if other:
                    is_target = hello.role == "target"
                    target, draft = (member, other) if is_target else (other, member)
                    await self._check(target, draft)
                compared = other
        except OutriderError as exc:
            if hello.role == "draft" or other is None:
                self._refuse(peer, hello, exc)
                return
            # nothing goes without a target, so the draft must leave
            self.lose("draft", str(exc))
            self._refuse(other.peer, other.hello, exc)
        finally:
            self._joining.pop(peer, None)
        if hello.role in self._members:
            self._tell(peer, taken(hello.role))
            return
        member.heard = member.moved = self._clock()
        self._members[hello.role] = member
        self.refusals.pop(hello.role, None)
        self._tell(peer, wire.Welcome())
        log.info("%s worker: %s on %s", hello.role, hello.model, hello.device)
        self._on_joined(hello.role)

    async def _check(self, target: Member, draft: Member) -> None:
        def texts(member: Member) -> Callable[[int, int], Awaitable[tuple[str, ...]]]:
            async def ask(start: int, count: int) -> tuple[str, ...]:
                asked = lambda call: wire.Labels(call, start, count)  # noqa: E731
                answer = await self.ask(member, asked, wire.LabelTexts)
                if len(answer.texts) != count:
                    raise IncompatiblePair("a worker cannot tell the texts of its tokens")
                return answer.texts

            return ask

        ours, theirs = target.hello.vocabulary, draft.hello.vocabulary
        if ours and theirs:  # else the draft takes the target's ids as they are
            await check_pair(ours, theirs, texts(target), texts(draft))

    def _is_ours(self, hello: wire.Hello) -> bool:
        """Whether the launcher started it, or starts none of its role."""
        token = self._tokens.get(hello.role)
        return token is None or hmac.compare_digest(token.encode(), hello.token.encode())

    def _refuse(self, peer: bytes, hello: wire.Hello, error: OutriderError) -> None:
        log.warning("%s worker refused: %s", hello.role, error)
        if hello.role not in self._members and self._is_ours(hello):  # else it is none of us
            self.refusals[hello.role] = wire.words(error)
        self._tell(peer, wire.Refused(error.code, wire.words(error)))

    # ---- leaving --------------------------------------------------------------------------------

    def on_beat(self, role: Role, beat: wire.Beat) -> None:
        member = self._members[role]
        if beat.steps != member.steps or not beat.busy:
            member.steps, member.moved = beat.steps, member.heard

    def look(self) -> None:
        """Drop workers that are silent or make no progress; to be called a few times a second."""
        now, before = self._clock(), self._looked
        self._looked = now
        for role, member in list(self._members.items()):
            if now - before > SILENT_S:  # this process was paused: it has to read first
                member.heard = member.moved = now
            silence_s = now - member.heard
            if silence_s > LOST_S:
                self.lose(role, f"the {role} worker has not been heard of for {LOST_S:.0f} s")
            elif silence_s > SILENT_S:
                if role == "draft" and not member.is_silent:
                    member.is_silent = True
                    self._on_paused(True)
            elif now - member.moved > member.stall_s():
                self._tell(member.peer, wire.Refused(WorkerLost.code, "it makes no progress"))
                self.lose(role, f"the {role} worker makes no progress")

    def on_gone(self, peer: bytes) -> None:
        """The connection `peer` has ended."""
        if task := self._joining.pop(peer, None):
            task.cancel()
        for role, member in list(self._members.items()):
            if member.peer == peer:
                self.lose(role, f"the {role} worker is gone")

    def lose(self, role: Role, why: str) -> None:
        """Forget the worker of `role`; whoever waits for its answers gets WorkerLost."""
        if member := self._members.pop(role, None):
            log.warning("%s", why)
            for peer, answer in self._answers.values():
                if peer == member.peer and not answer.done():
                    answer.set_exception(WorkerLost(why, role))
            self._on_lost(role, why)

    # ---- questions ------------------------------------------------------------------------------

    async def ask(
        self, member: Member, question: Callable[[int], wire.Message], kind: type[Answer]
    ) -> Answer:
        """Ask under a new number and wait. Raises RequestTimeout, WorkerLost or its error.

        Raises ProtocolError for an answer of another kind.
        """
        self._questions += 1
        call = self._questions
        role = member.hello.role
        asked = asyncio.get_running_loop().create_future()
        self._answers[call] = member.peer, asked
        try:
            self._tell(member.peer, question(call))
            for wait_s in (ANSWER_S, LAST_S):  # it may be there, if this process was paused
                await asyncio.wait([asked], timeout=wait_s)
            if not asked.done():
                raise RequestTimeout(f"the {role} worker has not answered in {ANSWER_S:.0f} s")
            answer = asked.result()
        finally:
            asked.cancel()
            del self._answers[call]
        if not isinstance(answer, kind):
            raise ProtocolError(f"the {role} worker gave an answer of another kind")
        return answer

    def on_answer(self, peer: bytes, message: wire.Message) -> bool:
        """Whether `message` answers a question to `peer`; if so, give it to whoever asked."""
        match message:
            case (
                wire.Tokens(call)
                | wire.Rendered(call)
                | wire.LabelTexts(call)
                | wire.Constrainable(call)
            ):
                result: Any = message
            case wire.Failed(call, code, reason, param) if call in self._answers:
                result = from_code(code, reason, param)
            case _:
                return False
        asked, future = self._answers.get(call, (peer, None))
        if asked != peer:
            return False
        if future is not None and not future.done():
            if isinstance(result, OutriderError):
                future.set_exception(result)
            else:
                future.set_result(result)
        return True

    async def close(self) -> None:
        for task in list(self._joining.values()):
            task.cancel()
        await asyncio.gather(*self._joining.values(), return_exceptions=True)
