"""The arms one after the other, each on a fresh pipeline while undisturbed clients ask."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from tests.attack.arms import Arm
from tests.attack.clients import SOON_S, Crowd, Outcome
from tests.attack.questions import Question, answer_to, steady
from tests.attack.service import Service, Usage, environment
from tests.attack.strikes import Striker, joined

SLOWER, MORE_MEMORY = 1.5, 1.3  # most that an attack may do to a time and to a process's memory
SLACK = 1 << 21  # bytes; a process may hold so much more in any case
CALM = 3  # answers of each client before the attack, behind a first one; of a share fewer
AFTERWARDS = 1  # right answers of each client once it is over
FIRST_S, SETTLE_S, RECOVER_S = 60.0, 10.0, 20.0

# a device that is mostly waited for: two cores are enough for all of it
FLAGS = ("--toy-step-ms=20", "--toy-row-ms=0.2", "--toy-draft-ms=2", "--parallel=12")
COUNTS = {2: 60, 8: 40}  # tokens of an answer, by how many streams share the target


@dataclass
class Result:
    """What became of an arm."""

    arm: Arm
    told: str = ""
    outcomes: list[Outcome] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)
    usual_s: float = 0.0
    slowest: float | None = None  # the slowest answer against its usual time
    noise: float = 1.0  # the twin's slowest at the same time against its own
    before: dict[str, Usage] = field(default_factory=dict)
    after: dict[str, Usage] = field(default_factory=dict)
    cpu_s: float = float("nan")  # of the coordinator, from the attack on
    complaints: list[str] = field(default_factory=list)
    log: str = ""

    def count(self, kind: str) -> int:
        return sum(outcome.kind == kind for outcome in self.outcomes)

    @property
    def codes(self) -> Counter[str]:
        return Counter(outcome.what for outcome in self.outcomes if outcome.kind == "failed")


class Times:
    """What answers take in calm: (arm's kind, client) → seconds."""

    def __init__(self) -> None:
        self._seen: defaultdict[tuple[str, int], list[float]] = defaultdict(list)

    def add(self, kind: str, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            if outcome.kind == "right":
                self._seen[kind, outcome.client].append(outcome.took_s)

    def usual(self, kind: str, client: int) -> float:
        """The median; infinite before there is any."""
        seen = self._seen[kind, client]
        return statistics.median(seen) if seen else float("inf")


class Campaign:
    """`async with Campaign(…) as one: await one.run(arm)`.

    Beside the attacked pipeline runs a twin that nobody attacks, with one client: what makes its
    answers slower is the machine, and counts against nobody.
    """

    def __init__(self, share: float, seed: int, logs: Path | None = None) -> None:
        self.share, self.seed, self.logs = share, seed, logs
        self.times = Times()
        self.twins: list[Outcome] = []  # of the twin

    @asynccontextmanager
    async def twin(self) -> AsyncIterator[None]:
        """Keep the twin up."""
        with Service(FLAGS) as service:
            async with Crowd([service.ipc], [_always(steady(99, COUNTS[2]))], service.pauses) as it:
                self.twins = it.outcomes
                await it.each_has(1 + CALM, 0.0, 20.0)
                self.times.add("twin", it.outcomes[1:])
                yield

    async def run(self, arm: Arm) -> Result:
        result = Result(arm)
        questions = [steady(n, COUNTS[arm.streams]) for n in range(arm.streams)]
        for question in questions:
            answer_to(question)  # before the clock runs
        limit = (arm.descriptors, arm.descriptors) if arm.descriptors else None
        service = Service(FLAGS, unread=arm.unread, descriptors=limit)
        try:
            with service:
                choices = [_always(question) for question in questions]
                async with Crowd([service.ipc, service.tcp], choices, service.pauses) as crowd:
                    await self._attack(arm, service, crowd, result)
                    result.log = service.log()
        except (RuntimeError, TimeoutError) as exc:
            result.complaints.append(str(exc) or "an attacker did not start")
        result.complaints += service.left
        if self.logs:
            self.logs.mkdir(parents=True, exist_ok=True)
            (self.logs / f"{arm.name}.log").write_text(result.log)
        return result

    # ---- the phases of an arm -------------------------------------------------------------------

    async def _attack(self, arm: Arm, service: Service, crowd: Crowd, result: Result) -> None:
        kind = await self._calm(arm, service, crowd, result)
        cpu_s = _coordinators_cpu_s(service.usage())
        began = time.monotonic()
        first = len(crowd.outcomes)
        result.told = await self._strike(arm, service, result)
        if arm.timed:  # so that there is something to compare
            await crowd.each_has(1, began, 4 * SOON_S)
        ended = time.monotonic()
        roles = {"target", "draft"}
        if not await joined(service, roles, RECOVER_S):
            there = service.processes()
            gone = sorted(({"launcher", "coordinator"} | roles) - there.keys())
            result.complaints.append(
                f"not whole again after {RECOVER_S:.0f} s"
                + (f": no {', '.join(gone)}" if gone else "")
            )
        elif not await crowd.each_has(AFTERWARDS, ended, RECOVER_S):
            result.complaints.append(f"not every client is answered {RECOVER_S:.0f} s afterwards")
        result.after = await _settled(service, result.before)
        result.cpu_s = _coordinators_cpu_s(result.after) - cpu_s
        result.outcomes = [o for o in crowd.outcomes[first:] if o.ended >= began]
        self._judge(kind, ended, result)

    async def _calm(self, arm: Arm, service: Service, crowd: Crowd, result: Result) -> str:
        """Learn what an answer takes; returns the kind under which these times are kept."""
        kind = arm.name if arm.polite else f"{arm.streams} streams"
        if not await crowd.each_has(1, 0.0, FIRST_S):
            result.complaints.append("not every client was answered before the attack")
        result.before = service.usage()
        for _ in range(3):
            polite = await self._attacker(arm, service, reads=True) if arm.polite else None
            since, first = time.monotonic(), len(crowd.outcomes)
            try:
                if arm.timed:
                    await crowd.each_has(CALM if self.share >= 1 else 1, since, 6 * SOON_S)
            finally:
                lasted = polite is None or polite.returncode is None
                if polite:
                    await _end(polite)
            if lasted:  # libzmq may have aborted it
                break
        calm = [one for one in crowd.outcomes[first:] if one.began >= since]
        self.times.add(kind, calm)
        usual = [self.times.usual(kind, n) for n in range(arm.streams)] if arm.timed else [0.0]
        result.usual_s = max(usual)
        return kind

    async def _strike(self, arm: Arm, service: Service, result: Result) -> str:
        """Attack; returns what the attackers tell."""
        rng = random.Random(f"{self.seed} {arm.name}")
        striker = Striker(service, rng)
        match arm.action:
            case "none":
                await asyncio.sleep(arm.seconds(self.share / 4))
            case "attacker":
                return await self._attackers(arm, service)
            case "fake":
                fake = await self._attacker(arm, service)
                await asyncio.sleep(0.5)  # it greets by now
                if not await striker.kill(arm.role):
                    result.complaints.append(f"the {arm.role} does not come back beside a fake")
                return _words(await _told(fake, arm.seconds(self.share)))
            case "stop":
                return await self._stop(arm, service, striker, result)
            case "kill":
                return await self._kill(arm, striker, result)
        return "nothing"

    async def _stop(self, arm: Arm, service: Service, striker: Striker, result: Result) -> str:
        """Stop a process of the service, or clients that are a process of their own."""
        guests = await self._attacker(arm, service) if arm.job else None
        try:
            for _ in range(arm.times(self.share)):
                await striker.moment()
                await striker.stop(arm.role, psutil.Process(guests.pid) if guests else None)
            if guests:
                await striker.moment()
                guests.terminate()
                told = await _told(guests, 2 * SOON_S)
                result.complaints += [
                    f"{count} × {what} of those stopped"
                    for what, count in told.items()
                    if what != "right"
                ]
                return f"{len(striker.struck)} times, {_words(told)}"
        finally:
            if guests:
                await _end(guests)
        return f"{len(striker.struck)} times"

    async def _kill(self, arm: Arm, striker: Striker, result: Result) -> str:
        for number in range(arm.times(self.share)):
            await striker.moment()
            await striker.until_it_may_kill(arm.role)
            if not await striker.kill(arm.role):
                result.complaints.append(f"the {arm.role} does not come back from death {number}")
                break
        return f"{len(striker.struck)} times"

    # ---- attackers ------------------------------------------------------------------------------

    async def _attackers(self, arm: Arm, service: Service) -> str:
        started = [await self._attacker(arm, service, n) for n in range(arm.attackers)]
        within_s = arm.seconds(self.share)
        told = await asyncio.gather(*(_told(one, within_s) for one in started))
        return "; ".join(map(_words, told))

    async def _attacker(
        self, arm: Arm, service: Service, number: int = 0, reads: bool = False
    ) -> asyncio.subprocess.Process:
        """One that has begun. Raises TimeoutError."""
        arguments = {
            "ipc": service.ipc,
            "tcp": service.tcp,
            "count": arm.times(self.share) // arm.attackers,
            "within": 10 * SOON_S if reads else arm.seconds(self.share),
            "seed": self.seed + number,
        }
        started = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "tests.attack.attackers",
            arm.job,
            *(f"--{name}={value}" for name, value in arguments.items()),
            *(["--reads"] if reads else []),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            env=environment(service.runtime),
        )
        assert started.stdout
        try:
            async with asyncio.timeout(4 * SOON_S):
                await started.stdout.readline()
        except BaseException:
            await _end(started)
            raise
        return started

    # ---- the verdict ----------------------------------------------------------------------------

    def _judge(self, kind: str, ended: float, result: Result) -> None:
        arm, complain = result.arm, result.complaints.append
        for what in ("wrong", "hung", "untyped"):
            found = [outcome for outcome in result.outcomes if outcome.kind == what]
            if found:
                complain(f"{len(found)} × {what}, the first: {found[0].what}")
        for code, count in result.codes.items():
            complain(f"{count} × {code}")
        if arm.timed:
            self.judge_times(kind, ended, result)
        result.complaints += grown(result.before, result.after)

    def judge_times(self, kind: str, ended: float, result: Result) -> None:
        """Compare the answers that began before `ended` with their usual times."""
        ratios = [
            (
                outcome.took_s / self.times.usual(kind, outcome.client),
                self._noise(outcome, result.began),
            )
            for outcome in result.outcomes
            if outcome.kind == "right" and outcome.began < ended
        ]
        if not ratios:
            result.complaints.append("no undisturbed answer came while it was attacked")
            return
        result.slowest, result.noise = max(ratios, key=lambda pair: pair[0] / pair[1])
        if result.slowest > SLOWER * result.noise:
            result.complaints.append(f"an answer took {result.slowest:.2f} × its usual time")

    def _noise(self, outcome: Outcome, since: float) -> float:
        """How much slower than usual, at most, an answer of the twin was at the same time.

        Only those that began after `since` count: between two arms nobody may have listened.
        """
        usual = self.times.usual("twin", 0)
        took = [
            other.took_s / usual
            for other in self.twins
            if since <= other.began < outcome.ended and other.ended > outcome.began
        ]
        return max(1.0, *took) if took else 1.0


def _always(question: Question) -> Callable[[], Question]:
    return lambda: question


def _coordinators_cpu_s(usage: dict[str, Usage]) -> float:
    return usage["coordinator"].cpu_s if "coordinator" in usage else float("nan")


def grown(before: dict[str, Usage], after: dict[str, Usage]) -> list[str]:
    """What of a process is more than it may be."""
    found = []
    for role in sorted(before.keys() & after.keys()):
        old, new = before[role], after[role]
        if new.memory > MORE_MEMORY * old.memory + SLACK:
            found.append(f"memory of the {role} {new.memory / old.memory:.2f} ×")
        if new.descriptors > old.descriptors:
            found.append(f"{new.descriptors} descriptors of the {role}, not {old.descriptors}")
    return found


async def _settled(service: Service, before: dict[str, Usage]) -> dict[str, Usage]:
    """What the processes use once they had time to give back what they hold."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        after = service.usage()
        if not grown(before, after) or time.monotonic() > deadline:
            return after
        await asyncio.sleep(0.2)


async def _told(attacker: asyncio.subprocess.Process, within_s: float) -> dict[str, int]:
    """Wait for its end; what it tells, or how it failed."""
    assert attacker.stdout
    try:
        async with asyncio.timeout(within_s + 4 * SOON_S):
            line = await attacker.stdout.read()
            await attacker.wait()
    except TimeoutError:
        return {"attacker that had to be killed": 1}
    finally:
        await _end(attacker)
    if not line:
        return {f"attacker that failed with status {attacker.returncode}": 1}
    told: dict[str, int] = json.loads(line)
    return told


def _words(told: dict[str, int]) -> str:
    return ", ".join(f"{count} {what}" for what, count in told.items())


async def _end(attacker: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        attacker.kill()
    await attacker.wait()
