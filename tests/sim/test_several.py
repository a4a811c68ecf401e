"""Two targets and two drafts as they are, joined without sockets, while each is lost now and then.

Each answer is that of a target alone, none fails, and at the end nobody holds anything.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from tests.sim.test_everything_at_once import DRAFT, SYSTEM, TARGET, Fickle, House, alone

from outrider.core.events import OpenDraft, Prefill
from outrider.core.values import Mode
from outrider.engines.drafter import ModelDrafter
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.target_worker import TargetWorker

SECOND, OTHER = b"t2", b"d2"


class Street(House):
    """The same with two workers of each role."""

    def __init__(self, owners: Sequence[ThreadPoolExecutor], seed: int) -> None:
        super().__init__(owners, 0.0, seed)
        chance = random.Random(seed)
        engine, drafter = Fickle("target", 0.0, chance), ModelDrafter(Fickle("draft", 0.0, chance))
        second = TargetWorker(engine, owners[2], TargetWorker.measure(engine))
        other = DraftWorker(drafter, owners[3], DraftWorker.measure(drafter))
        self.workers: dict[bytes, Any] = {
            TARGET: self.target, DRAFT: self.draft, SECOND: second, OTHER: other
        }  # fmt: skip
        for peer, worker in self.workers.items():
            worker.send = lambda message, peer=peer: self.tell(peer, message)
        self.lost: set[bytes] = set()
        self.resumed = 0
        self.opened: Counter[bytes] = Counter()

    def tell(self, peer: bytes, message: wire.Message) -> None:
        if peer not in self.lost:
            super().tell(peer, message)

    def send(self, peer: bytes, message: wire.Message) -> None:
        if peer not in self.workers:
            super().send(peer, message)
        elif peer not in self.lost:
            told = decode(encode(message))
            match told:
                case wire.Do(_, Prefill(round=later)):
                    self.resumed += later > 0
                case wire.Do(_, OpenDraft()):
                    self.opened[peer] += 1
            asyncio.get_running_loop().call_soon(self.workers[peer]._on_message, told)

    async def lose_them(self, every_s: float, chance: random.Random) -> None:
        """The connection of one ends, again and again; it comes back a moment later."""
        while True:
            await asyncio.sleep(every_s)
            peer = chance.choice(list(self.workers))
            self.lost.add(peer)
            self.core.on_gone(peer)
            self.workers[peer].forget()
            await asyncio.sleep(every_s * chance.uniform(0.1, 1.0))
            self.lost.discard(peer)
            self.tell(peer, self.workers[peer]._hello())


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
@pytest.mark.parametrize("seed", [3, 4])
async def test_whoever_is_lost_no_answer_changes_and_none_fails(mode: Mode, seed: int) -> None:
    chance = random.Random(seed)
    with ExitStack() as stack:
        owners = [stack.enter_context(ThreadPoolExecutor(1)) for _ in range(4)]
        street = Street(owners, seed)
        loops = [asyncio.ensure_future(one._compute_forever()) for one in street.workers.values()]
        for peer, worker in street.workers.items():
            street.tell(peer, worker._hello())
        await asyncio.sleep(0.05)
        losing = asyncio.ensure_future(street.lose_them(0.05, chance))
        asked = []
        for call in range(1, 41):
            prompt = SYSTEM * chance.randint(0, 4) + b"so %d " % chance.randint(0, 9)
            leaves_s = chance.uniform(0.001, 0.3) if chance.random() < 0.2 else 0.0
            what = call, prompt, chance.randint(1, 40), mode, leaves_s
            asked.append((what, asyncio.ensure_future(street.asked(*what))))
            await asyncio.sleep(chance.uniform(0.0, 0.02))
        _, pending = await asyncio.wait([task for _, task in asked], timeout=25)
        assert not pending, f"{len(pending)} of {len(asked)} requests wait for ever"
        for (call, prompt, count, _, leaves_s), task in asked:
            expected, said = alone(prompt, count), street.texts[call]
            assert task.result() in ("length", *(["cancelled"] if leaves_s else []))
            assert said == expected[: len(said)]
            assert len(said) == count or task.result() == "cancelled"
        losing.cancel()
        assert street.resumed > 0
        assert min(street.opened[DRAFT], street.opened[OTHER]) > 0
        await asyncio.sleep(0.1)
        for worker in street.workers.values():
            assert all(holder.is_free for holder in worker.slots._holders)
        assert not street.core._requests.running
        assert losing.cancelled() or not losing.exception()
        for loop in loops:
            assert not loop.done(), loop
            loop.cancel()
        await asyncio.gather(*loops, return_exceptions=True)
        await street.core.close()
