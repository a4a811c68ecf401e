"""Coordinator and both workers as they are, joined without sockets: many requests, leaving at will.

Each answer is that of a target alone; nobody waits for ever; at the end nothing is held.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outrider.core.engine import EngineFault, Part
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Mode, TokenId
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyCosts, ToyEngine, ToySettings
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services.pipeline.coordinator import Coordinator, Defaults
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.target_worker import TargetWorker

GREEDY = Sampling(temperature=0.0)
SLOTS, CONTEXT = 8, 600
SYSTEM = b"the old river runs over the quiet meadow and under the silver moon, "
TARGET, DRAFT, CLIENT = b"t", b"d", b"c"


class Fickle(ToyEngine):
    """Now and then a pass fails; what is taken back is so much that a multiple of `apart` is left.

    So do models that keep states of a text, and not what each token added.
    """

    def __init__(self, role: Any, faults: float, chance: random.Random, apart: int = 1) -> None:
        costs = ToyCosts(1e-3, 1e-5, 1e-6) if role == "target" else ToyCosts(2e-4, 1e-5, 1e-6)
        super().__init__(ToySettings(role=role, slots=SLOTS, context=CONTEXT, costs=costs))
        self.faults, self.chance = 0.0, chance
        self.wanted, self.apart = faults, apart

    def rewind(self, slot: int, length: int) -> None:
        if length < self.length(slot):
            length -= length % self.apart
        super().rewind(slot, length)

    def copy(self, source: int, slot: int, length: int) -> None:
        super().copy(source, slot, length - length % self.apart)

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        if self.chance.random() < self.faults:
            for part in parts:
                self.rewind(part.slot, 0)
            raise EngineFault("it happens")
        return super().extend_all(parts)


class House:
    """All of a pipeline but sockets and processes; each message is bytes on its way."""

    def __init__(
        self, owners: Sequence[ThreadPoolExecutor], faults: float, seed: int, apart: int = 1
    ) -> None:
        chance = random.Random(seed)
        self.target_engine = Fickle("target", 0.0, chance, apart)
        self.draft_engine = Fickle("draft", faults, chance, apart)
        drafter = ModelDrafter(self.draft_engine)
        measured = TargetWorker.measure(self.target_engine), DraftWorker.measure(drafter)
        self.draft_engine.faults = faults
        self.target = TargetWorker(self.target_engine, owners[0], measured[0])
        self.draft = DraftWorker(drafter, owners[1], measured[1])
        self.core = Coordinator(self.send, Defaults(queue=200))
        self.texts: dict[int, list[TokenId]] = {}
        self.outcomes: dict[int, asyncio.Future[str]] = {}
        for worker, peer in ((self.target, TARGET), (self.draft, DRAFT)):
            setattr(worker, "send", functools.partial(self.tell, peer))  # noqa: B010

    def tell(self, peer: bytes, message: wire.Message) -> None:
        loop, told = asyncio.get_running_loop(), decode(encode(message))
        loop.call_soon(self.core.on_message, peer, told)

    def send(self, peer: bytes, message: wire.Message) -> None:
        loop, told = asyncio.get_running_loop(), decode(encode(message))
        match peer, told:
            case b"t", _:
                loop.call_soon(self.target._on_message, told)
            case b"d", _:
                loop.call_soon(self.draft._on_message, told)
            case _, wire.Progress(call, fragment):
                self.texts[call] += [token.id for token in fragment.tokens]
            case _, wire.Finished(call, reason):
                self.outcomes[call].set_result(reason)
            case _, wire.Failed(call, _, reason):
                self.outcomes[call].set_result(reason)

    async def asked(self, call: int, prompt: bytes, count: int, mode: Mode, leaves_s: float) -> str:
        self.texts[call] = []
        outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.outcomes[call] = outcome
        submit = wire.Submit(
            call,
            tuple(prompt),
            None,
            GREEDY,
            count,
            (),
            False,
            False,
            mode,
            None,
            False,
            cache="" if call % 3 else f"{call % 2}",
        )
        self.tell(CLIENT, submit)
        if leaves_s:
            await asyncio.wait([outcome], timeout=leaves_s)
            self.tell(CLIENT, wire.Cancel(call))
        return await outcome

    async def lose_the_draft(self, every_s: float) -> None:
        """Its connection ends, again and again; each time it comes back a moment later."""
        while every_s:
            await asyncio.sleep(every_s)
            self.core.on_gone(DRAFT)
            self.draft.forget()
            await asyncio.sleep(every_s / 4)
            self.tell(DRAFT, self.draft._hello())


@functools.lru_cache
def alone(prompt: bytes, count: int) -> list[TokenId]:
    engine = ToyEngine(ToySettings(context=CONTEXT))
    row = engine.extend(0, tuple(prompt), 1)[0]
    said: list[TokenId] = []
    for _ in range(count):
        said.append(int(row.argmax()))
        row = engine.extend(0, said[-1:], 1)[0]
    return said


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
@pytest.mark.parametrize(
    ("faults", "lost_every_s", "apart"),
    [(0.0, 0.0, 1), (0.01, 0.0, 1), (0.0, 0.1, 1), (0.0, 0.0, 8), (0.01, 0.1, 64)],
)
async def test_many_requests_come_and_leave_at_will(
    mode: Mode, faults: float, lost_every_s: float, apart: int
) -> None:
    chance = random.Random(7)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        house = House((one, other), faults, seed=7, apart=apart)
        tasks = [
            asyncio.ensure_future(worker._compute_forever())
            for worker in (house.target, house.draft)
        ]
        house.tell(TARGET, house.target._hello())
        house.tell(DRAFT, house.draft._hello())
        await asyncio.sleep(0.05)
        losing = asyncio.ensure_future(house.lose_the_draft(lost_every_s))
        asked = []
        for call in range(1, 61):
            prompt = SYSTEM * chance.randint(0, 4) + b"so %d " % chance.randint(0, 9)
            leaves_s = chance.uniform(0.001, 0.3) if chance.random() < 0.3 else 0.0
            what = call, prompt, chance.randint(1, 40), mode, leaves_s
            asked.append((what, asyncio.ensure_future(house.asked(*what))))
            await asyncio.sleep(chance.uniform(0.0, 0.01))
        _, pending = await asyncio.wait([task for _, task in asked], timeout=40)
        assert not pending, f"{len(pending)} of {len(asked)} requests wait for ever"
        for (call, prompt, count, _, leaves_s), task in asked:
            expected, said = alone(prompt, count), house.texts[call]
            assert task.result() in ("length", *(["cancelled"] if leaves_s else []))
            assert said == expected[: len(said)]
            assert len(said) == count or task.result() == "cancelled"
        losing.cancel()
        await asyncio.sleep(0.05)
        for worker in (house.target, house.draft):
            assert all(holder.is_free for holder in worker.slots._holders)
        assert not house.target._sequences
        assert not house.draft._rides
        assert not house.core._requests.running
        assert not any(one._orders for one in house.core._sessions._gatherings.values())
        assert losing.cancelled() or not losing.exception()
        for running in tasks:
            assert not running.done(), running
            running.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await house.core.close()
