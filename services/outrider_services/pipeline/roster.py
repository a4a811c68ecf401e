"""The workers of a pipeline: who has joined, whether they fit, whether they are still alive.

There may be several of each role. All targets have the same model, so any of them gives the same
text; all drafts fit it. `pairs` says who serves which request.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from types import MappingProxyType
from typing import Any

import outrider
from outrider.core.values import Role
from outrider.errors import (
    ConfigError,
    IncompatiblePair,
    OutriderError,
    Overloaded,
    ProtocolError,
    WorkerLost,
)
from outrider.wire import messages as wire
from outrider_services.pipeline.calls import Answer, Calls, Tell
from outrider_services.pipeline.member import SILENT_S, Member
from outrider_services.pipeline.vocabularies import check_pair

log = logging.getLogger(__name__)

MOST = 16  # workers of each role
LOST_S = 10.0  # so long a worker may be paused, or its machine


class Roster:
    """At most `MOST` target workers and as many draft workers; one, where the launcher starts it.

    `on_joined` and `on_lost` are told of each, and `on_paused` of a draft that nobody must wait
    for, and then of its return; `on_hung` of one of ours that is lost although its process may be
    there.
    """

    def __init__(
        self,
        tell: Tell,
        on_joined: Callable[[Member], None],
        on_lost: Callable[[Member, str], None],
        on_paused: Callable[[Member, bool], None],
        clock: Callable[[], float] = time.monotonic,
        tokens: Mapping[Role, str] = MappingProxyType({}),  # without one, anybody may join
        both: frozenset[Role] = frozenset(),  # … and here, too
        on_hung: Callable[[Role], None] = lambda _: None,
    ) -> None:
        self.refusals: dict[str, str] = {}
        self._tell, self._on_joined, self._on_lost = tell, on_joined, on_lost
        self._on_paused, self._clock, self._looked = on_paused, clock, clock()
        self._tokens, self._both, self._on_hung = tokens, both, on_hung
        self._members: dict[bytes, Member] = {}  # by peer, in the order in which they joined
        self._joining: dict[bytes, asyncio.Task[None]] = {}
        self._calls = Calls(tell)

    # ---- who is there ---------------------------------------------------------------------------

    @property
    def members(self) -> list[Member]:
        return list(self._members.values())

    def of(self, role: Role) -> list[Member]:
        """Those of this role, the first to join first."""
        return [member for member in self._members.values() if member.role == role]

    @property
    def drafts(self) -> list[Member]:
        """The drafts that can be counted on."""
        return [member for member in self.of("draft") if not member.is_silent]

    def tell(self, member: Member | None, message: wire.Message) -> None:
        """Send it to this worker, if it is still here."""
        if member and member.peer in self._members:
            self._tell(member.peer, message)

    def report(self) -> dict[str, dict[str, Any]]:
        """What `outrider ps` shows of the workers, by name."""
        return {
            member.name: {
                "role": member.role,
                "model": member.hello.model,
                "device": member.hello.device,
                "context": member.hello.context,
                "slots": member.hello.slots,
                "step_s": member.hello.curve_s[0],
                "link_s": member.link_s,
                "silent": member.is_silent,
                "cores": member.hello.cores.rpartition(":")[2],  # the host is nobody's business
                "here": member.hello.cores.startswith(f"{socket.gethostname()}:"),
                "memory": member.hello.memory,
                "build": member.hello.build,
                "rollback_s": member.hello.rollback_s,
            }
            for member in self._members.values()
        }

    def costs(self) -> dict[str, dict[str, float]]:
        """What `outrider doctor` asks for: by role, the seconds that `Hello` tells, by number.

        Of several workers of a role those of the first to join.
        """
        found = {}
        for member in (*self.of("target")[:1], *self.of("draft")[:1]):
            role, hello = member.hello.role, member.hello
            for name, curve_s in ((role, hello.curve_s), (f"{role}_crowd", hello.crowd_s)):
                found[name] = {str(n): seconds for n, seconds in enumerate(curve_s, 1)}
        return found

    @property
    def peers(self) -> list[bytes]:
        """The connections of those that are here or about to join."""
        return [*self._members, *self._joining]

    def target(self) -> Member:
        """A target worker, for questions about text. Raises WorkerLost if there is none."""
        if targets := self.of("target"):
            return targets[0]
        refused = self.refusals.get("target")
        why = f": {refused}" if refused else "; it may be loading, or being restarted"
        raise WorkerLost(f"no target worker is connected{why}", "target")

    def member_of(self, peer: bytes) -> Member | None:
        """The worker that `peer` speaks for; an unknown peer is asked who it is."""
        member = self._members.get(peer)
        if member:
            member.hear(self._clock())
            if member.is_silent:
                member.is_silent = False
                self._on_paused(member, False)
        elif peer not in self._joining:
            self._tell(peer, wire.Who())
        return member

    # ---- joining --------------------------------------------------------------------------------

    def on_hello(self, peer: bytes, hello: wire.Hello) -> None:
        """Refuse the worker, or compare it with those of the other role and then welcome it."""
        if peer in self._joining or peer in self._members:
            return  # it is being compared, or was welcomed already
        role = hello.role
        known = [one for one in self.of(role) if one.hello.incarnation == hello.incarnation]
        if hello.protocol != wire.PROTOCOL:
            reason = (
                f"the {role} worker speaks protocol {hello.protocol} (outrider "
                f"{ascii(hello.version)[1:-1]:.40}), the coordinator {wire.PROTOCOL} "
                f"(outrider {outrider.__version__})"
            )
            self._refuse(peer, hello, ProtocolError(reason))
        elif not (self._is_ours(hello) or role in self._both):
            reason = (
                f"this pipeline starts its {role} worker itself; to let others join, start "
                f"it with --{role}-place both"
            )
            self._refuse(peer, hello, ConfigError(reason))
        elif role == "target" and hello.vocabulary is None:
            self._refuse(peer, hello, ProtocolError("a target without a vocabulary"))
        elif self._is_full(role) and not known:
            self._tell(peer, self._taken(role))
        else:
            for one in known:
                self.lose(one, f"the {one.name} worker's connection was interrupted")
            self._joining[peer] = asyncio.ensure_future(self._join(peer, hello))

    async def _join(self, peer: bytes, hello: wire.Hello) -> None:
        now = self._clock()
        member = Member(peer, hello, now, now)
        try:
            await self._compare(member)
            self._check_model(member)
        except OutriderError as exc:
            self._refuse(peer, hello, exc)
            return
        finally:
            self._joining.pop(peer, None)
        if self._is_full(hello.role):
            self._tell(peer, self._taken(hello.role))
            return
        member.heard = member.moved = self._clock()
        member.name = self._free_name(hello.role)
        self._members[peer] = member
        self.refusals.pop(hello.role, None)
        self._tell(peer, wire.Welcome())
        log.info("%s worker: %s on %s", member.name, hello.model, hello.device)
        self._on_joined(member)

    async def _compare(self, member: Member) -> None:
        """Compare it with all of the other role, also with those that come meanwhile.

        Raises IncompatiblePair for a draft that does not fit; those that do not fit a target leave.
        """
        compared: set[Member] = set()
        while others := [one for one in self._opposite(member) if one not in compared]:
            other = others[0]
            compared.add(other)
            is_target = member.role == "target"
            target, draft = (member, other) if is_target else (other, member)
            try:
                await self._check(target, draft)
            except OutriderError as exc:
                if other.peer not in self._members:
                    continue  # it has left meanwhile: that says nothing of this one
                if not is_target:
                    raise
                # nothing goes without a target, so the draft must leave
                self.lose(other, str(exc))
                self._refuse(other.peer, other.hello, exc)

    def _opposite(self, member: Member) -> list[Member]:
        """Those that it must fit: of the targets one, for their vocabularies are equal."""
        return self.of("draft") if member.role == "target" else self.of("target")[:1]

    def _check_model(self, member: Member) -> None:
        """Raise ConfigError for a target whose text might be another than that of the others."""
        for other in self.of("target") if member.role == "target" else ():
            mine, theirs = member.hello, other.hello
            for what, new, old in (
                ("model", mine.model, theirs.model),
                ("vocabulary", mine.vocabulary, theirs.vocabulary),
                ("context", mine.context, theirs.context),
            ):
                if new != old:
                    shown = f": {new} here, {old} there" if what != "vocabulary" else ""
                    raise ConfigError(f"its {what} is not that of the other target worker{shown}")

    def _most(self, role: Role) -> int:
        return 1 if role in self._tokens and role not in self._both else MOST

    def _is_full(self, role: Role) -> bool:
        return len(self.of(role)) >= self._most(role)

    def _taken(self, role: Role) -> wire.Refused:
        """The answer to one whose place is not free: it may come again."""
        many = f"is a {role} worker" if self._most(role) == 1 else f"are {MOST} {role} workers"
        return wire.Refused(Overloaded.code, f"there {many} already")

    def _free_name(self, role: Role) -> str:
        """The role and the lowest number that is free; the first has none."""
        names = {member.name for member in self._members.values()}
        every = (role, *(f"{role}-{number}" for number in range(2, MOST + 1)))
        return next(name for name in every if name not in names)

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
        if not self.of(hello.role) and self._is_ours(hello):  # else it is none of us
            self.refusals[hello.role] = wire.words(error)
        self._tell(peer, wire.Refused(error.code, wire.words(error)))

    # ---- leaving --------------------------------------------------------------------------------

    def on_beat(self, member: Member, beat: wire.Beat) -> None:
        if beat.steps != member.steps or not beat.busy:
            member.steps, member.moved = beat.steps, member.heard

    def look(self) -> None:
        """Drop workers that are silent or make no progress; to be called a few times a second."""
        now, before = self._clock(), self._looked
        self._looked = now
        for member in self.members:
            name = member.name
            if now - before > SILENT_S:  # this process was paused: it has to read first
                member.heard = member.moved = now
            silence_s = now - member.heard
            if silence_s > LOST_S:
                self._hung(member)
                self.lose(member, f"the {name} worker has not been heard of for {LOST_S:.0f} s")
            elif silence_s > SILENT_S:
                if member.role == "draft" and not member.is_silent:
                    member.is_silent = True
                    self._on_paused(member, True)
            elif now - member.moved > member.stall_s():
                self._tell(member.peer, wire.Refused(WorkerLost.code, "it makes no progress"))
                self._hung(member)
                self.lose(member, f"the {name} worker makes no progress")

    def _hung(self, member: Member) -> None:
        if self._is_ours(member.hello):
            self._on_hung(member.role)

    def on_gone(self, peer: bytes) -> None:
        """The connection `peer` has ended."""
        if task := self._joining.pop(peer, None):
            task.cancel()
        if member := self._members.get(peer):
            self.lose(member, f"the {member.name} worker is gone")

    def lose(self, member: Member, why: str) -> None:
        """Forget the worker; whoever waits for its answers gets WorkerLost."""
        if self._members.get(member.peer) is not member:
            return
        del self._members[member.peer]
        log.warning("%s", why)
        self._calls.lost(member, why)
        self._on_lost(member, why)

    # ---- questions ------------------------------------------------------------------------------

    async def ask(
        self, member: Member, question: Callable[[int], wire.Message], kind: type[Answer]
    ) -> Answer:
        """As `Calls.ask`."""
        return await self._calls.ask(member, question, kind)

    def on_answer(self, peer: bytes, message: wire.Message) -> bool:
        """As `Calls.on_answer`."""
        return self._calls.on_answer(peer, message)

    async def close(self) -> None:
        for task in list(self._joining.values()):
            task.cancel()
        await asyncio.gather(*self._joining.values(), return_exceptions=True)
