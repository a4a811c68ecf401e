"""Draft or target on another host, behind a link that is slow, uneven and stands still at times."""

from __future__ import annotations

import asyncio
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tests.attack.questions import Question, answer_to, steady
from tests.attack.service import Service
from tests.chaos.between import Worker, are_there
from tests.chaos.campaign import Plan, Result
from tests.chaos.pairs import CTX, Remembered, devices
from tests.chaos.tunnel import Hosts, Weather, why_not

from outrider.client import AsyncClient, Stream, connect
from outrider.core.values import Role, Token
from outrider.errors import OutriderError

TRIPS_MS = (0.0, 1.0, 5.0, 20.0, 80.0)
JITTER, STALL_S, EVERY_S = 0.2, 0.3, 10.0
# turns of each mode, as long as from stall to stall; the pair writes little in one
TURNS, TURNS_OF_PAIR = 2, 5
LEAST_TURN_S = 1.0
FLOOR, FLOOR_OF_A_PART = 0.98, 0.85  # of the plain rate; a short part of it shows only the worst
COUNT, CTX_COUNT = 1500, CTX - 32
JOINED_S = 60.0
PORT = 5711
ROLES: tuple[Role, ...] = ("draft", "target")


@dataclass(slots=True)
class Leg:
    """One placement at one round trip."""

    remote: Role
    trip_ms: float
    tokens: dict[str, int] = field(default_factory=lambda: {"plain": 0, "auto": 0})
    seconds: dict[str, float] = field(default_factory=lambda: {"plain": 0.0, "auto": 0.0})
    near_ties: int = 0
    complaints: list[str] = field(default_factory=list)

    def rate(self, mode: str) -> float:
        return self.tokens[mode] / self.seconds[mode] if self.seconds[mode] else 0.0


def run(plan: Plan) -> Result:
    """Both placements at every round trip; where that cannot be, the table says why."""
    result = Result()
    trips = TRIPS_MS if plan.share >= 0.2 else TRIPS_MS[2:3]
    if reason := why_not():
        result.add("two hosts", "texts right, never below plain", f"skipped: {reason}", None)
        return result
    for role in ROLES:
        legs = asyncio.run(placed(role, trips, plan))
        for leg in legs:
            _tell(plan, leg, legs[0], result)
    return result


def _tell(plan: Plan, leg: Leg, first: Leg, result: Result) -> None:
    plain, auto = leg.rate("plain"), leg.rate("auto")
    floor = FLOOR if plan.share >= 1 else FLOOR_OF_A_PART
    ratio = auto / plain if plain else 0.0
    kept = auto / first.rate("auto") if first.rate("auto") else 0.0
    ties = f", {leg.near_ties} near-ties tipped" if leg.near_ties else ""
    result.add(
        f"{leg.remote} remote, round trip {leg.trip_ms:g} ms",
        f"texts right, ≥ {floor} × plain",
        f"{ratio:.2f} × plain ({auto:.1f} against {plain:.1f} tokens/s; {kept:.2f} × that at "
        f"{first.trip_ms:g} ms){ties}",
        ratio >= floor and not leg.complaints,
    )
    where = f"hosts, {leg.remote} remote, {leg.trip_ms:g} ms, seed {plan.seed}"
    result.complaints += [f"{where}: {one}" for one in leg.complaints]


async def placed(remote: Role, trips: tuple[float, ...], plan: Plan) -> list[Leg]:
    """A pipeline whose worker of this role is on the other host, at each of these round trips."""
    legs = [Leg(remote, trip) for trip in trips]
    device, memory = devices(plan.pair), Remembered(plan.pair)
    question = Question("Write a story about a river", CTX_COUNT) if plan.pair else steady(1, COUNT)
    if not plan.pair:
        answer_to(question)  # before the clock runs
    with ExitStack() as stack:
        hosts = stack.enter_context(Hosts(plan.seed))
        address = f"tcp://{hosts.addresses[0]}:{PORT}"
        there = f"--{remote}-place=remote", f"--listen={address}", f"--insecure={address}"
        flags = (*device.flags, *there, *device.here(remote))
        service = stack.enter_context(Service(flags, inside=hosts.inside(0)))
        its_flags = (*device.worker(remote), f"--insecure={address}")
        worker = Worker(remote, address, service, hosts.inside(1), its_flags)
        stack.enter_context(worker)
        if not await are_there(service.ipc, JOINED_S):
            legs[0].complaints.append("the two workers do not find each other")
            return legs
        async with connect(service.ipc) as client:
            for leg in legs:
                await _measured(leg, hosts, _Asking(leg, client, question, memory), plan)
    legs[-1].complaints += service.left
    return legs


async def _measured(leg: Leg, hosts: Hosts, asking: _Asking, plan: Plan) -> None:
    """Plain and auto in turns, so that a change of the machine's speed meets both."""
    turn_s = max(LEAST_TURN_S, EVERY_S * min(1.0, plan.share))
    hosts.weather = Weather(leg.trip_ms / 2000, JITTER, stall_s=STALL_S, every_s=turn_s)
    for mode in ("plain", "auto"):  # what is learnt first is not measured
        await asking.turn(mode, turn_s if plan.pair else turn_s / 2)
    leg.tokens, leg.seconds = {"plain": 0, "auto": 0}, {"plain": 0.0, "auto": 0.0}
    for number in range(TURNS_OF_PAIR if plan.pair and plan.share >= 1 else TURNS):
        for mode in ("plain", "auto") if number % 2 == 0 else ("auto", "plain"):
            await asking.turn(mode, turn_s)
    leg.near_ties = asking.memory.near_ties


@dataclass(slots=True)
class _Asking:
    """One client that has the same answered again and again."""

    leg: Leg
    client: AsyncClient
    question: Question
    memory: Remembered

    async def turn(self, mode: str, seconds: float) -> None:
        """Have answers for so long, and count their tokens."""
        began, leg = time.monotonic(), self.leg
        while (now := time.monotonic()) - began < seconds and not leg.complaints:
            try:
                said = await self._read(mode, began + seconds)
            except OutriderError as exc:
                leg.complaints.append(f"{mode}: {exc.code}, {exc}")
                return
            leg.tokens[mode] += len(said)
            leg.seconds[mode] += time.monotonic() - now
            if fault := self.memory.fault(self.question, said):
                leg.complaints.append(f"{mode}: {fault}")

    async def _read(self, mode: str, until: float) -> list[Token]:
        settings: Any = {**self.question.settings, "mode": mode, "ignore_eos": self.memory.is_real}
        stream: Stream = await self.client.create_completion(
            self.question.prompt, stream=True, **settings
        )
        said: list[Token] = []
        async with stream:
            async for fragment in stream:
                said += fragment.tokens
                if time.monotonic() >= until:
                    break
        return said
