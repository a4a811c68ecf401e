"""Real processes killed or stopped at random moments, one at a time, while eight streams run."""

from __future__ import annotations

import asyncio
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

import psutil
from tests.attack.clients import SOON_S, Crowd, Outcome
from tests.attack.questions import Question, answer_to, steady
from tests.attack.service import GATEWAY, Service, Usage, environment
from tests.chaos.campaign import Plan, Result
from tests.chaos.gaps import Gaps, share
from tests.chaos.pairs import Remembered, devices
from tests.chaos.web import Browser

from outrider.client import connect
from outrider.errors import OutriderError

STREAMS, COUNT, SLOTS = 8, 100, 20
COUNT_PAIR, SLOTS_PAIR = 40, 8
WEB = ("--no-gateway=false", "--port=0")
MOMENT_S, PAUSE_S = (0.05, 0.7), (0.1, 2.0)
CALM_S = 4.0
BACK_S = 30.0  # by then what was killed has to be there again
FIRST_S, LAST_S = 60.0, 60.0
LAST_PAIR_S = 240.0  # eight answers at once take most of a minute where a row costs 50 ms
LOOK_S = 0.02
REST_S, REST_PAIR_S = 10.0, 120.0  # in which each client's last answer comes
SETTLE_S = 5.0  # in which connections that have ended are given back
VICTIMS_PAIR = ("draft", "target", "coordinator", "client")  # a gateway computes nothing
VICTIMS = ("draft", "target", "coordinator", GATEWAY, "client")
WHOLE, WHOLE_PAIR = 200, 20


@dataclass(slots=True)
class Arm:
    """One process that is struck again and again, and what came of it."""

    victim: str
    action: str  # kill, stop
    times: int
    seed: int
    pair: bool = False  # on the default pair of models
    struck: list[float] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    broken: int = 0  # answers over HTTP that ended with their gateway
    wrong: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)  # the longest wait, by strike
    back_s: list[float] = field(default_factory=list)  # until all was whole again
    usual_s: float = 0.0  # the longest in a second without one

    @property
    def name(self) -> str:
        return f"{'kill -9' if self.action == 'kill' else 'SIGSTOP'} of the {self.victim}"

    def count(self, kind: str) -> int:
        return sum(one.kind == kind for one in self.outcomes)


class Struck:
    """The service of an arm, its clients, and the strikes."""

    def __init__(self, arm: Arm) -> None:
        self.arm, self.rng = arm, random.Random(f"{arm.seed} {arm.action} {arm.victim}")
        self.is_web = arm.victim == GATEWAY
        self.roles = {"launcher", "coordinator", "target", "draft"} | (
            {GATEWAY} if self.is_web else set()
        )
        self.gaps = Gaps()
        self.slots = SLOTS_PAIR if arm.pair else SLOTS
        if arm.pair and arm.victim == "client":
            self.slots *= 2  # those who are stopped go on asking: nobody is to wait for a place
        self.device, self.memory = devices(arm.pair, parallel=self.slots), Remembered(arm.pair)
        self.guests: asyncio.subprocess.Process | None = None

    async def run(self) -> None:
        arm, flags = self.arm, (*self.device.flags, *(WEB if self.is_web else ()))
        questions = [steady(n, COUNT) for n in range(STREAMS)]
        if arm.pair:
            endless = {"ignore_eos": True}
            questions = [replace(one, count=COUNT_PAIR, extra=endless) for one in questions]
        for question in () if arm.pair else questions:
            answer_to(question)  # before the clock runs
        service = Service(flags, program="tests.chaos.serving")
        try:
            with service:
                async with self._crowd(service, questions) as crowd:
                    async with self._browser(service):
                        await self._strike(service, crowd)
                    arm.outcomes = crowd.outcomes
                    await self._end(service, crowd)
        except (RuntimeError, TimeoutError) as exc:
            arm.complaints.append(str(exc) or "something did not start")
        finally:
            await self._dismiss()
        arm.complaints += service.left
        self._judge()

    @asynccontextmanager
    async def _crowd(self, service: Service, questions: Sequence[Question]) -> AsyncIterator[Crowd]:
        choices = [lambda question=question: question for question in questions]
        places = (service.ipc, service.tcp)
        judge = self.memory.judge if self.arm.pair else None
        async with Crowd(places, choices, service.pauses, self.gaps.note, judge) as crowd:
            yield crowd

    @asynccontextmanager
    async def _browser(self, service: Service) -> AsyncIterator[None]:
        """Answers over HTTP, where the gateway is the victim."""
        if not self.is_web:
            yield
            return
        async with Browser(service.url, 2) as browser:
            yield
        self.arm.broken, self.arm.wrong = browser.broken, browser.wrong

    # ---- the strikes ----------------------------------------------------------------------------

    async def _strike(self, service: Service, crowd: Crowd) -> None:
        arm = self.arm
        if not await crowd.each_has(1, 0.0, FIRST_S):
            arm.complaints.append("not every client was answered before the first strike")
            return
        calm = time.monotonic()
        await asyncio.sleep(CALM_S)
        usual = self.gaps.usual(calm, time.monotonic())
        before = service.usage()
        for number in range(arm.times):
            await asyncio.sleep(self.rng.uniform(*MOMENT_S))
            arm.struck.append(time.monotonic())
            if not await self._once(service):
                arm.complaints.append(f"the {arm.victim} is not back after strike {number}")
                return
            arm.back_s.append(time.monotonic() - arm.struck[-1])
            await self._go_on()
        if not await crowd.each_has(1, time.monotonic(), LAST_PAIR_S if arm.pair else LAST_S):
            arm.complaints.append("not every client is answered afterwards")
        arm.gaps_s = [self.gaps.longest(at) for at in arm.struck]
        arm.usual_s = usual
        await self._dismiss()
        arm.complaints += await _grown(before, service)

    async def _once(self, service: Service) -> bool:
        """Strike; whether all is whole again in time."""
        process = await self._victim(service)
        if process is None:
            return False
        with service.pauses.meanwhile():
            if self.arm.action == "kill":
                process.kill()
                return await self._back(service, process)
            process.send_signal(signal.SIGSTOP)
            try:
                await asyncio.sleep(self.rng.uniform(*PAUSE_S))
            finally:
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
            return await self._back(service, None)

    async def _go_on(self) -> None:
        """Until each stream has: one with which a worker dies twice is set aside, by right."""
        back = time.monotonic()
        for _ in range(round(BACK_S / LOOK_S)):
            if self.gaps.has_all(back):
                return
            await asyncio.sleep(LOOK_S)
        self.arm.complaints.append(f"not every stream has gone on {BACK_S:.0f} s afterwards")

    async def _victim(self, service: Service) -> psutil.Process | None:
        if self.arm.victim != "client":
            return service.processes().get(self.arm.victim)
        if self.guests is None or self.guests.returncode is not None:
            self.guests = await _clients(service)
        return psutil.Process(self.guests.pid)

    async def _back(self, service: Service, dead: psutil.Process | None) -> bool:
        """Whether all processes are there, none of them is `dead`, and both workers have joined."""
        if dead is not None and self.guests is not None:
            async with asyncio.timeout(BACK_S):
                await self.guests.wait()
            return True
        deadline = time.monotonic() + BACK_S
        while time.monotonic() < deadline:
            there = service.processes()
            if self.roles <= there.keys() and dead not in there.values():
                with suppress(OutriderError):
                    async with connect(service.ipc, timeout_s=1.0) as client:
                        if {"target", "draft"} <= (await client.health(timeout_s=1.0))[
                            "workers"
                        ].keys():
                            return True
            await asyncio.sleep(0.05)
        return False

    # ---- the end --------------------------------------------------------------------------------

    async def _end(self, service: Service, crowd: Crowd) -> None:
        """Nothing runs any more, and every sequence is free: as many as there are run at once."""
        await self._dismiss()
        await crowd.rest(REST_PAIR_S if self.arm.pair else REST_S)
        try:
            async with connect(service.ipc) as client:
                for _ in range(100):
                    requests = (await client.health())["requests"]
                    if not any(requests.values()):
                        break
                    await asyncio.sleep(0.05)
                else:
                    self.arm.complaints.append(f"requests that nobody waits for: {requests}")
                streams = [
                    await client.create_completion(
                        "all at once",
                        max_tokens=400 if self.arm.pair else 1500,  # none ends before all run
                        mode="plain",
                        stream=True,
                        ignore_eos=True,
                    )
                    for _ in range(self.slots)
                ]
                for stream in streams:
                    async with asyncio.timeout(LAST_S):
                        await stream.__anext__()
                running = (await client.health())["requests"]["running"]
                if running != self.slots:
                    self.arm.complaints.append(f"{running} of {self.slots} sequences can be used")
                for stream in streams:
                    await stream.cancel()
        except OutriderError as exc:
            self.arm.complaints.append(f"the pipeline cannot be asked in the end: {exc}")

    async def _dismiss(self) -> None:
        """Clients in a process of their own end, and so do their connections."""
        if self.guests is not None and self.guests.returncode is None:
            self.guests.kill()
            async with asyncio.timeout(2 * SOON_S):
                await self.guests.wait()

    def _judge(self) -> None:
        arm = self.arm
        for kind in ("wrong", "hung", "untyped", "failed"):
            found = [one for one in arm.outcomes if one.kind == kind]
            if found:
                kinds = Counter(one.what for one in found).most_common(1)[0]
                arm.complaints.append(f"{len(found)} × {kind}, mostly: {kinds[0]}")
        arm.complaints += [f"over HTTP: {one}" for one in arm.wrong[:3]]


async def _grown(before: dict[str, Usage], service: Service) -> list[str]:
    """Descriptors that a process holds for good. Clients connect again and again: a few may be."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = service.usage()
        found = [
            f"{after[role].descriptors} descriptors of the {role}, not {before[role].descriptors}"
            for role in sorted(before.keys() & after.keys())
            if after[role].descriptors > before[role].descriptors + 4
        ]
        if not found or time.monotonic() > deadline:
            return found
        await asyncio.sleep(0.2)


async def _clients(service: Service) -> asyncio.subprocess.Process:
    """Eight clients in a process of their own, that have begun."""
    arguments = {"ipc": service.ipc, "tcp": service.tcp, "count": 1, "within": 600, "seed": 1}
    started = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.attack.attackers", "clients"),
        *(f"--{name}={value}" for name, value in arguments.items()),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=environment(service.runtime),
    )
    assert started.stdout
    async with asyncio.timeout(4 * SOON_S):
        await started.stdout.readline()
    return started


def arms(plan: Plan, action: str, victims: Sequence[str] = ()) -> list[Arm]:
    victims = victims or (VICTIMS_PAIR if plan.pair else VICTIMS)
    times = plan.times(WHOLE_PAIR if plan.pair else WHOLE, 2)
    return [Arm(victim, action, times, plan.seed, plan.pair) for victim in victims]


async def struck(found: Sequence[Arm], jobs: int) -> Sequence[Arm]:
    """Let these happen, `jobs` at once."""
    free = asyncio.Semaphore(jobs)

    async def one(arm: Arm) -> None:
        async with free:
            await Struck(arm).run()

    await asyncio.gather(*map(one, found))
    return found


def table(plan: Plan, found: Sequence[Arm]) -> Result:
    result = Result()
    for arm in found:
        ends = ", ".join(
            f"{arm.count(kind)} {kind}" for kind in ("right", "wrong", "failed", "hung")
        )
        web = f", {arm.broken} over HTTP cut with it" if arm.broken else ""
        wanted = f"{arm.times}, 8 streams: texts right, 0 errors, 0 left"
        measured = f"{len(arm.struck)}: {ends}{web}"
        enough = len(arm.struck) == arm.times and arm.count("right") >= STREAMS
        result.add(arm.name, wanted, measured, enough and not arm.complaints)
        result.complaints += [f"{arm.name}, seed {arm.seed}: {one}" for one in arm.complaints]
        if arm.action == "kill":
            _times(plan, arm, result)
    return result


def _times(plan: Plan, arm: Arm, result: Result) -> None:
    """What the issue aims at; on a part of the whole it is told, and not judged."""
    aims = {
        "draft": (0.1, "draft lost: extra gap"),
        "target": (5.0, "target killed: extra gap"),
        "coordinator": (3.0, "coordinator killed: extra gap"),
    }
    if arm.victim not in aims or not arm.gaps_s:
        return
    most, quantity = aims[arm.victim]
    extra = [max(0.0, gap - arm.usual_s) for gap in arm.gaps_s]
    half, last = share(extra, 0.5), share(extra, 0.99)
    passed = last <= most if plan.share >= 1 else None
    measured = f"p50 {half * 1000:.0f} ms, p99 {last * 1000:.0f} ms"
    if arm.victim == "target" and arm.back_s:  # loading and measuring are a part of it
        measured += f"; back after p50 {share(arm.back_s, 0.5) * 1000:.0f} ms"
    result.add(quantity, f"p99 ≤ {most * 1000:.0f} ms", measured, passed)


def kill(plan: Plan) -> Result:
    return table(plan, asyncio.run(struck(arms(plan, "kill"), plan.jobs)))


def stop(plan: Plan) -> Result:
    return table(plan, asyncio.run(struck(arms(plan, "stop"), plan.jobs)))
