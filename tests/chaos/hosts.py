"""Draft or target on another host, behind a link that is slow, uneven and stands still at times."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.attack.clients import begin
from tests.attack.questions import Question, answer_to, steady
from tests.attack.service import Service
from tests.chaos.between import Worker, are_there
from tests.chaos.campaign import Plan, Result
from tests.chaos.pairs import CTX, Remembered, devices
from tests.chaos.tunnel import Hosts, Weather, why_not

from outrider.client import AsyncClient, connect
from outrider.core.values import Role, Token
from outrider.errors import OutriderError
from outrider_services.bench.prompts import load

TRIPS_MS = (0.0, 1.0, 5.0, 20.0, 80.0)
JITTER, STALL_S, EVERY_S = 0.2, 0.3, 10.0
TURNS = 2  # of each mode on each text, as long as from stall to stall; the pair has more texts
LEAST_TURN_S = 1.0
FLOOR, FLOOR_OF_A_PART = 0.98, 0.85  # of the plain rate; a short part of it shows only the worst
COUNT, COUNT_OF_PAIR = 1500, CTX // 2
JOINED_S = 60.0
PORT = 5711
ROLES: tuple[Role, ...] = ("draft", "target")


@dataclass(slots=True)
class Leg:
    """One placement at one round trip."""

    remote: Role
    trip_ms: float
    # by mode and text
    tokens: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    seconds: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    near_ties: int = 0
    complaints: list[str] = field(default_factory=list)

    def rate(self, mode: str, text: str | None = None) -> float:
        """Tokens a second, behind the first of each answer: of this text, or of all."""
        seconds = _sum(self.seconds, mode, text)
        return _sum(self.tokens, mode, text) / seconds if seconds else 0.0

    def ratio(self, text: str | None = None) -> float:
        """`auto` over `plain`."""
        plain = self.rate("plain", text)
        return self.rate("auto", text) / plain if plain else 0.0


def _sum(counts: Mapping[tuple[str, str], float], mode: str, text: str | None) -> float:
    return sum(count for (one, of), count in counts.items() if one == mode and text in (None, of))


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
    plain, auto, ratio = leg.rate("plain"), leg.rate("auto"), leg.ratio()
    floor = FLOOR if plan.share >= 1 else FLOOR_OF_A_PART
    texts = dict.fromkeys(text for _, text in leg.tokens)
    each = ", ".join(f"{text} {leg.ratio(text):.2f}" for text in texts)
    kept = auto / first.rate("auto") if first.rate("auto") else 0.0
    ties = f", {leg.near_ties} near-ties tipped" if leg.near_ties else ""
    result.add(
        f"{leg.remote} remote, round trip {leg.trip_ms:g} ms",
        f"texts right, ≥ {floor} × plain",
        f"{ratio:.2f} × plain ({auto:.1f} against {plain:.1f} tokens/s; {kept:.2f} × that at "
        f"{first.trip_ms:g} ms){f': {each}' if len(texts) > 1 else ''}{ties}",
        ratio >= floor and not leg.complaints,
    )
    where = f"hosts, {leg.remote} remote, {leg.trip_ms:g} ms, seed {plan.seed}"
    result.complaints += [f"{where}: {one}" for one in leg.complaints]


async def placed(remote: Role, trips: tuple[float, ...], plan: Plan) -> list[Leg]:
    """A pipeline whose worker of this role is on the other host, at each of these round trips."""
    legs = [Leg(remote, trip) for trip in trips]
    device, memory = devices(plan.pair), Remembered(plan.pair)
    questions = _questions(plan.pair)
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
                await _measured(leg, hosts, _Asking(leg, client, memory), questions, plan)
    legs[-1].complaints += service.left
    return legs


def _questions(pair: bool) -> dict[str, Question]:
    """By what the text is: to the pair a prompt of each category of `outrider bench`."""
    if not pair:
        question = steady(1, COUNT)
        answer_to(question)  # before the clock runs
        return {"steady": question}
    return {
        one.name: Question(one.prompts[0], COUNT_OF_PAIR, chat=one.chat)
        for one in load(None, (), 1)
    }


async def _measured(
    leg: Leg, hosts: Hosts, asking: _Asking, questions: Mapping[str, Question], plan: Plan
) -> None:
    """Plain and auto in turns, so that a change of the machine's speed meets both."""
    turn_s = max(LEAST_TURN_S, EVERY_S * min(1.0, plan.share))
    hosts.weather = Weather(leg.trip_ms / 2000, JITTER, stall_s=STALL_S, every_s=turn_s)
    texts, ties = list(questions.items()), asking.memory.near_ties
    for mode in ("plain", "auto"):  # what is learnt first is not measured
        await asking.turn(mode, *texts[0], turn_s if plan.pair else turn_s / 2)
    leg.tokens.clear()
    leg.seconds.clear()
    for number, (text, question) in enumerate(texts if plan.pair else texts * TURNS):
        for mode in ("plain", "auto") if number % 2 == 0 else ("auto", "plain"):
            await asking.turn(mode, text, question, turn_s)
    leg.near_ties = asking.memory.near_ties - ties


@dataclass(slots=True)
class _Asking:
    """One client that has something answered again and again."""

    leg: Leg
    client: AsyncClient
    memory: Remembered

    async def turn(self, mode: str, text: str, question: Question, seconds: float) -> None:
        """Have answers for so long, and count their tokens."""
        began, leg = time.monotonic(), self.leg
        while time.monotonic() - began < seconds and not leg.complaints:
            try:
                said, spent_s = await self._read(mode, question, began + seconds)
            except OutriderError as exc:
                leg.complaints.append(f"{mode}: {exc.code}, {exc}")
                return
            leg.tokens[mode, text] += max(0, len(said) - 1)
            leg.seconds[mode, text] += spent_s
            if fault := self.memory.fault(question, said):
                leg.complaints.append(f"{mode}: {fault}")

    async def _read(self, mode: str, question: Question, until: float) -> tuple[list[Token], float]:
        """The tokens, and the seconds since the first of them."""
        changes = {"mode": mode, "ignore_eos": self.memory.is_real}
        stream = await begin(self.client, question, **changes)
        said: list[Token] = []
        first_s = now = time.monotonic()
        async with stream:
            async for fragment in stream:
                now = time.monotonic()
                first_s = first_s if said else now
                said += fragment.tokens
                if now >= until:
                    break
        return said, now - first_s
