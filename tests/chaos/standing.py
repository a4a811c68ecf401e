"""A coordinator in the middle of two requests, to which anybody may say anything."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.chaos import golden, mutation

import outrider
from outrider.core.events import OpenDraft, Prefill
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, Proposal, Role, Verdict
from outrider.engines.toy import ToyEngine
from outrider.errors import ProtocolError
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services.pipeline.coordinator import Coordinator, Defaults

if TYPE_CHECKING:
    from tests.chaos.fuzz import Judge

TARGET, DRAFT, CLIENT, STRANGER = b"target", b"draft", b"client", b"stranger"
PEERS = (TARGET, DRAFT, CLIENT, STRANGER)
ROUND = 100  # messages that one coordinator gets
VOCABULARY = ToyEngine().info.vocabulary


def hello(role: Role) -> wire.Hello:
    return wire.Hello(
        protocol=wire.PROTOCOL,
        version=outrider.__version__,
        role=role,
        incarnation=len(role),
        model=role,
        vocabulary=VOCABULARY,
        context=512,
        slots=4,
        device="cpu",
        cores=f"{role}:0",
        curve_s=(0.01,) * 8,
    )


class Standing:
    """The coordinator, and what it has sent."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, wire.Message]] = []
        self.core = Coordinator(lambda *one: self.sent.append(one), Defaults(), lambda: 50.0)

    async def begin(self) -> None:
        """Two requests; each has its first token, and a drafted one is in stock."""
        for peer, role in ((TARGET, "target"), (DRAFT, "draft")):
            self.core.on_message(peer, hello(role))  # type: ignore[arg-type]
            await turns()
        for call in (1, 2):
            sampling = Sampling(temperature=0.0)
            submit = wire.Submit(call, (10, 11, 12), None, sampling, 50, (), False, False,
                                 "pipelined", None, False)  # fmt: skip
            self.core.on_message(CLIENT, submit)
        await turns()
        for request in self.orders(Prefill):
            self.core.on_message(TARGET, wire.Done(request, verdict(0, 3)))
        for request in self.orders(OpenDraft):
            proposal = Proposal(1, 4, (Drafted(101, 0.9),), 0.01)
            self.core.on_message(DRAFT, wire.Done(request, proposal))

    def orders(self, kind: type) -> list[int]:
        """The requests for which this was ordered."""
        return [
            one.request
            for _, one in self.sent
            if isinstance(one, wire.Do) and isinstance(one.order, kind)
        ]

    def texts(self) -> dict[int, tuple[int, ...]]:
        """What has been committed, by request."""
        running = self.core._requests.running.values()
        return {one.id: tuple(one.session.tokens) for one in running if one.session}

    def state(self) -> Any:
        """All that a message might change."""
        core = self.core
        running = {
            one.id: (
                one.session.phase,
                one.session.dispatch.round,
                one.session.stock.lineage,
                tuple(one.session.stock.drafted),
                one.session.draft.state,
                one.session.draft.offences,
            )
            for one in core._requests.running.values()
            if one.session
        }
        members = {one.peer: one.hello.incarnation for one in core._roster.members}
        counts = len(core._requests), len(core._requests.waiting), core._stopping
        return self.texts(), running, members, counts, len(self.sent)


def verdict(round_: int, base: int) -> Verdict:
    return Verdict(0, (101,), round_, base, (b"e",), (1.0,), None, 0.01)


def apt(standing: Standing) -> list[bytes]:
    """Well-formed frames that speak of what is going on there."""
    found: list[wire.Message] = [
        hello("draft"),
        hello("target"),
        wire.Cancel(1),
        wire.Beat(3, True),
    ]
    for request in standing.orders(Prefill):
        proposal = Proposal(1, 5, (Drafted(101, 0.9), Drafted(102, 0.8)), 0.01)
        found += [
            wire.Done(request, verdict(1, 4)),
            wire.Passed(((request, verdict(1, 4)),)),
            wire.Done(request, proposal),
            wire.Done(request, proposal.changed(paused=True, drafted=())),
            wire.Failed(request, "internal_error", "no"),
        ]
    return [encode(message) for message in found]


async def bombard(judge: Judge, count: int) -> None:
    """Whatever a message does, it is nobody's else; what is refused has done nothing."""
    for _ in range(0, count, ROUND):
        standing = Standing()
        await standing.begin()
        make = mutation.Frames([*golden.frames(), *apt(standing) * 30], judge.rng)
        for _ in range(ROUND):
            one(judge, standing, make(), judge.rng.choice(PEERS))
        await turns()
        await standing.core.close()


def one(judge: Judge, standing: Standing, frame: bytes, peer: bytes) -> None:
    before = standing.state()

    def say() -> None:
        standing.core.on_message(peer, decode(frame))

    is_taken = judge.check(frame, say, ProtocolError)
    if not is_taken and standing.state() != before:
        judge.complain(frame, f"refused from the {peer.decode()}, and yet it has changed something")
    if peer != TARGET:
        texts = standing.texts()
        if any(texts.get(number, text) != text for number, text in before[0].items()):
            judge.complain(frame, f"the {peer.decode()} has changed a text")


async def turns() -> None:
    for _ in range(6):
        await asyncio.sleep(0)
