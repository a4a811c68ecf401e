"""A pipeline in virtual time: what of it is real, and what must be true of it in the end."""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import json
import logging
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any
from unittest import mock

from tests.chaos.campaign import Plan, Result, parts, told_by
from tests.chaos.network import Faults, Network
from tests.chaos.virtual import NothingHappens, Owner, VirtualLoop, virtual_time
from tests.chaos.worlds import (
    LONGEST,
    SEEN,
    Asked,
    Cut,
    Event,
    Killed,
    Paused,
    Slow,
    World,
    drawn,
    unseen,
)
from tests.oracle import alone

from outrider.client import Stream, connect
from outrider.core.engine import EngineFault, Part
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Role, TokenId
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyCosts, ToyEngine, ToySettings
from outrider.errors import OutriderError
from outrider.wire import transport
from outrider_services.pipeline.coordinator import Coordinator, Defaults
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.target_worker import TargetWorker
from outrider_services.pipeline.worker import Connection, Measured, Worker

CONTEXT = 512
HANG_S = 60.0  # of virtual time, behind all events: a longer wait for an outcome is a hang
REST_S = 4.0  # so long after the last outcome nothing may be held
ROWS = 16
WHOLE, ENOUGH = 10_000, 200  # worlds; so many have all that can happen in them
WITHIN_S = 7200.0


class Timed(ToyEngine):
    """A made-up device in virtual time, which fails now and then, or becomes slow."""

    def __init__(self, role: Role, world: World, owner: Owner, chance: random.Random) -> None:
        target = role == "target"
        costs = ToyCosts(world.pass_s if target else world.token_s, world.row_s, world.row_s / 10)
        super().__init__(
            ToySettings(
                role=role,
                agreement=world.agreement,
                context=CONTEXT,
                slots=world.slots,
                spare=world.branches,
                chunk=64,
                costs=costs,
            )
        )
        self.is_timed, self.factor, self.faults = False, 1.0, 0
        self._owner, self._chance = owner, chance
        self._fails = 0.0 if target else world.engine_faults

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        if self.is_timed and self._chance.random() < self._fails:
            self.faults += 1
            for part in parts:
                self.rewind(part.slot, 0)
            raise EngineFault("it happens")
        return super().extend_all(parts)

    def _wait(self, until: float) -> None:
        if self.is_timed and (seconds := until - time.monotonic()) > 0:
            self._owner.sleep(seconds * self.factor)

    def cancel(self) -> None:
        super().cancel()
        if self._cut.is_set():
            self._owner.wake()


class NoTemplate:
    """Nobody sends a chat."""

    def prepare(self) -> None: ...
    def close(self) -> None: ...


@dataclass(slots=True)
class Life:
    """One life of a worker."""

    name: str
    engine: Timed
    worker: Worker[Any]
    owner: Owner
    task: asyncio.Task[None]


@functools.lru_cache(maxsize=256)
def answer_to(prompt: str, sampling: Sampling) -> tuple[TokenId, ...]:
    engine = ToyEngine(ToySettings(context=CONTEXT))
    tokens = engine.tokenize(prompt, special=True)
    return tuple(islice(alone(engine, tokens, sampling), LONGEST))


class House:
    """All of a pipeline but its processes and sockets."""

    def __init__(self, world: World, seed: str, loop: VirtualLoop) -> None:
        self.world, self.loop, self.seed = world, loop, seed
        self.network = Network(loop, seed)
        self.network.faults = world.faults
        self.seen, self.complaints = self.network.seen, list[str]()
        self.lives: dict[Role, Life] = {}
        self.core: Coordinator | None = None
        self._running: asyncio.Task[None] | None = None
        self._count = 0

    # ---- who is there ---------------------------------------------------------------------------

    def found(self) -> None:
        """A coordinator begins, and knows nobody."""
        self.core = Coordinator(self.network.send, Defaults(), self.loop.time)
        self.network.core = self.core
        self._running = asyncio.ensure_future(self.core.run())

    def lose_coordinator(self) -> None:
        assert self._running
        self._running.cancel()
        self.network.core = None
        self.network.cut_all()
        if self.core:
            self.core._closed = True  # the dead do nothing
            for task in (*self.core._tasks, *self.core._questions._tasks):
                task.cancel()

    def start(self, role: Role) -> None:
        """A worker begins: without a template's process, and measured by what its costs are."""
        self._count += 1
        name, owner = f"{role}-{self._count}", Owner(self.loop)
        thread: Any = owner  # for a worker
        engine = Timed(role, self.world, owner, random.Random(f"{self.seed} {name}"))
        costs = engine.settings.costs
        most = self.world.slots + self.world.branches
        crowd = tuple(costs.of(n, n) for n in range(1, most + 1))
        worker: Worker[Any]
        if role == "target":
            curve = tuple(costs.of(n, n) for n in range(1, ROWS + 1))
            worker = target = TargetWorker(
                engine, thread, Measured(curve, crowd[: self.world.slots])
            )
            target._answers.template = NoTemplate()  # type: ignore[assignment]
        else:
            drafter = ModelDrafter(engine)
            drafter.token_s, drafter.read_s = costs.of(1, 1), costs.prefill_row_s
            drafter.crowd_s = crowd
            worker = DraftWorker(drafter, thread, DraftWorker.measure(drafter))
        engine.is_timed = True
        running = worker.run(Connection(f"ipc://sim/{name}", timeout_s=HANG_S), lambda *_: None)
        self.lives[role] = Life(name, engine, worker, owner, asyncio.ensure_future(running))

    async def kill(self, role: Role) -> None:
        life = self.lives.pop(role, None)
        if life is None:
            return
        self.seen["engine fault"] += life.engine.faults
        if link := self.network.links.pop(life.name, None):
            link.close()  # what it says from now on nobody hears
        life.task.cancel()
        life.owner.end()
        with suppress(asyncio.CancelledError, OutriderError):
            await life.task

    # ---- what happens ---------------------------------------------------------------------------

    async def happen(self, event: Event) -> None:
        await asyncio.sleep(event.at)
        match event:
            case Killed("coordinator", _, back_s) if self.network.core:
                self.seen["coordinator killed"] += 1
                self.lose_coordinator()
                await asyncio.sleep(back_s)
                self.found()
            case Killed(("target" | "draft") as role, _, back_s) if role in self.lives:
                self.seen[f"{role} killed"] += 1
                await self.kill(role)
                await asyncio.sleep(back_s)
                self.start(role)
            case Paused(who, _, for_s):
                self.seen["paused"] += 1
                for link in self._links(who):
                    link.hold(for_s)
            case Cut(who):
                for link in self._links(who)[:1]:
                    link.cut()
            case Slow(who, _, for_s, factor) if life := self.lives.get(who):
                self.seen["slow"] += 1
                life.engine.factor = factor if who == "draft" else min(factor, 20.0)
                await asyncio.sleep(for_s)
                life.engine.factor = 1.0

    def _links(self, who: str) -> list[Any]:
        """Of a coordinator all."""
        links = [one for one in self.network.links.values() if not one.closed]
        return [one for one in links if who == "coordinator" or one.name.startswith(who)]

    async def ask(self, number: int, asked: Asked) -> None:
        """One client, and what comes of its request."""
        await asyncio.sleep(asked.at)
        stream: Stream | None = None
        try:
            async with connect(f"ipc://sim/client-{number}", timeout_s=HANG_S) as client:
                stream = await client.create_completion(
                    asked.prompt,
                    stream=True,
                    max_tokens=asked.count,
                    mode=asked.mode,
                    cache_prompt=asked.cache is not None,
                    cache_key=asked.cache or "",
                    **settings_of(asked.sampling),
                )
                await self._read(stream, asked)
        except OutriderError as exc:
            if exc.code not in self.world.may_fail:
                self.complaints.append(f"request {number} failed: {exc.code}, {exc}")
            self.seen["failed"] += 1
        except Exception as exc:
            self.complaints.append(f"request {number}: {exc!r}")
        if stream is not None:
            self._judge(number, asked, stream)

    async def _read(self, stream: Stream, asked: Asked) -> None:
        limit, is_cancelled = asked.cancelled_after, False
        async for _ in stream:
            if limit is None or is_cancelled or len(ids_of(stream)) < limit:
                continue
            self.seen["left" if asked.leaves else "cancelled"] += 1
            if asked.leaves:
                return
            is_cancelled = True
            with suppress(OutriderError):  # its coordinator is gone just now
                await stream.cancel()

    def _judge(self, number: int, asked: Asked, stream: Stream) -> None:
        said = ids_of(stream)
        right = answer_to(asked.prompt, asked.sampling)[: asked.count]
        self.seen["tokens"] += len(said)
        if said != right[: len(said)]:
            self.complaints.append(f"request {number}: a wrong token")
        elif stream.finish_reason in ("stop", "length") and said != right:
            self.complaints.append(f"request {number}: {len(said)} tokens of {len(right)}")

    # ---- from the first event to the last -------------------------------------------------------

    async def live(self) -> None:
        world = self.world
        self.found()
        self.start("target")
        if world.has_draft:
            self.start("draft")
        happening = [asyncio.ensure_future(self.happen(event)) for event in world.events]
        asking = [asyncio.ensure_future(self.ask(n, one)) for n, one in enumerate(world.asked)]
        if happening:
            await asyncio.wait(happening)
            for task in happening:
                task.result()
        _, waiting = await asyncio.wait(asking, timeout=HANG_S)
        if waiting:
            self.complaints.append(f"{len(waiting)} requests wait for ever")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        self.network.is_calm = True
        await asyncio.sleep(REST_S)
        self._look_for_leaks()
        for role in list(self.lives):
            await self.kill(role)
        if self.core and self._running:
            self._running.cancel()
            await self.core.close()

    def _look_for_leaks(self) -> None:
        """All requests are over: nobody may hold anything for one."""
        core, held = self.core, self.complaints.append
        if core is None or "target" not in self.lives:
            held("the pipeline is not whole at the end")
            return
        if len(core._requests) or core._requests.running or core._requests.waiting:
            held("the coordinator holds a request that is over")
        if any(one._orders for one in core._sessions._gatherings.values()):
            held("an order waits for a pass that nobody wants")
        if {one.hello.role for one in core._roster.members} != self.lives.keys():
            held("a worker has not joined again")
        for role, life in self.lives.items():
            if life.task.done():
                held(f"the {role} worker has ended: {life.task!r}")
            # the last word about a request may be lost, or come before one that was overtaken
            is_sure = self.world.faults.get(role, Faults()).is_orderly
            if is_sure and not all(one.is_free for one in life.worker.slots._holders):
                held(f"the {role} worker holds a sequence")


def settings_of(sampling: Sampling) -> dict[str, Any]:
    names = ("temperature", "seed", "top_k", "top_p", "repeat_penalty", "presence_penalty")
    return {name: getattr(sampling, name) for name in names}


def ids_of(stream: Stream) -> tuple[TokenId, ...]:
    return tuple(token.id for fragment in stream.fragments for token in fragment.tokens)


class _Errors(logging.Handler):
    """What anybody calls an error is one of the world."""

    def __init__(self, complaints: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._complaints = complaints

    def emit(self, record: logging.LogRecord) -> None:
        self._complaints.append(f"logged: {record.getMessage()} {record.exc_info!r:.300}")


def those_with_links() -> list[Any]:
    """The modules of workers and clients that make connections."""
    rooms = ("outrider.client.", "outrider_services.pipeline.")
    loaded = [module for name, module in list(sys.modules.items()) if name.startswith(rooms)]
    return [module for module in loaded if getattr(module, "Link", None) is transport.Link]


def run(world: World, seed: str = "") -> House:
    """Let it happen, until nothing is left to happen."""
    with virtual_time() as loop, ExitStack() as stack:
        house = House(world, seed, loop)
        for module in those_with_links():
            stack.enter_context(mock.patch.object(module, "Link", house.network.link))
        complain = house.complaints.append
        loop.set_exception_handler(lambda _, told: complain(f"unhandled: {told}"))
        errors, root = _Errors(house.complaints), logging.getLogger()
        root.addHandler(errors)
        try:
            loop.run_until_complete(house.live())
        except NothingHappens:
            complain("everybody waits for somebody, and nothing is due")
        finally:
            root.removeHandler(errors)
            for life in house.lives.values():
                life.owner.end()
    return house


def campaign(plan: Plan) -> Result:
    """All worlds, by as many processes as the plan has."""
    count = plan.times(WHOLE, 20)
    calls = [
        ("--first", first, "--count", some, "--seed", plan.seed)
        for first, some in parts(count, plan.jobs)
    ]
    told = told_by("tests.chaos.house", calls, plan.jobs, WITHIN_S)
    result, seen = Result(), Counter[str]()
    for one in told:
        seen.update(one["seen"])
        result.complaints += one["complaints"]
    bad = sum(one["bad"] for one in told)
    result.add(
        "simulated worlds",
        f"{count:,}: texts right, 0 hangs, leaks",
        f"{count:,}, {bad} of them wrong; {seen['messages']:,} messages, {seen['tokens']:,} tokens",
        bad == 0,
    )
    troubles = ", ".join(f"{seen[what]:,} {what}" for what in SEEN)
    if missing := unseen(seen) if count >= ENOUGH else []:
        result.complaints.append(f"never seen: {', '.join(missing)}")
    result.add("troubles in them", "all kinds", troubles, not missing)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="Some worlds of `scripts/chaos`.")
    for name in ("first", "count", "seed"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parsed = parser.parse_args()
    logging.disable(logging.WARNING)
    seen: Counter[str] = Counter()
    complaints: list[str] = []
    bad = 0
    for number in range(parsed.first, parsed.first + parsed.count):
        house = run(drawn(number, parsed.seed), f"{parsed.seed} {number}")
        seen.update(house.seen)
        complaints += [f"world {number}, seed {parsed.seed}: {one}" for one in house.complaints[:3]]
        if number % 100 == 0:
            gc.collect()
        bad += bool(house.complaints)
    json.dump({"seen": seen, "bad": bad, "complaints": complaints[:200]}, sys.stdout)


if __name__ == "__main__":
    main()
