"""Proxies between workers, clients and the coordinator, while eight streams run through them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field

from tests.attack.clients import Crowd
from tests.attack.questions import answer_to, steady
from tests.attack.service import Service, environment
from tests.chaos.campaign import Plan, Result
from tests.chaos.proxy import CLIENT, DRAFT, TARGET, Mischief, Proxy

from outrider.client import connect

FLAGS = ("--toy-step-ms=2", "--toy-row-ms=0.05", "--toy-draft-ms=0.3", "--parallel=12")
STREAMS, COUNT = 8, 80
WHOLE = 200_000  # messages
FIRST_S, LAST_S, LONGEST_S = 60.0, 30.0, 900.0
# what a message that comes twice or late to a target may cost: its own request, and no other
ROUGH = frozenset({"protocol_error", "busy"})


@dataclass(slots=True)
class Arm:
    """Whose messages are in trouble, how, and what may come of it."""

    name: str
    draft: Mischief = field(default_factory=Mischief)
    target: Mischief = field(default_factory=Mischief)
    client: Mischief = field(default_factory=Mischief)
    may_fail: frozenset[str] = frozenset()


ARMS = (
    Arm("draft", draft=DRAFT),
    Arm("client", client=CLIENT),
    Arm("target", target=TARGET, may_fail=ROUGH),
    Arm("all", DRAFT, TARGET, CLIENT, ROUGH),
)


@dataclass(slots=True)
class Told:
    seen: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


def run(plan: Plan) -> Result:
    """All arms, one after the other."""
    result = Result()
    for arm in ARMS:
        count = plan.times(WHOLE // len(ARMS), 2000)
        told = asyncio.run(carried(arm, count, plan.seed))
        seen = told.seen
        troubled = sum(
            seen[kind] for kind in ("late", "lost", "cut", "twice", "overtaken", "damaged", "again")
        )
        ends = ", ".join(f"{n} {kind}" for kind, n in sorted(told.outcomes.items()))
        share = troubled / max(1, seen["messages"])
        result.add(
            f"proxied messages, {arm.name}",
            f"{count:,}: texts right, 0 hangs",
            f"{seen['messages']:,}, {share:.0%} in trouble: {ends}",
            seen["messages"] >= count and not told.complaints,
        )
        result.complaints += [
            f"proxy, {arm.name}, seed {plan.seed}: {one}" for one in told.complaints
        ]
    return result


async def carried(arm: Arm, count: int, seed: int) -> Told:
    """A pipeline whose workers come through proxies, until so many messages were carried."""
    told = Told()
    questions = [steady(n, COUNT) for n in range(STREAMS)]
    for question in questions:
        answer_to(question)  # before the clock runs
    with ExitStack() as stack:
        flags = (*FLAGS, "--draft-place=remote", "--target-place=remote")
        service = stack.enter_context(Service(flags))
        ways = {
            who: stack.enter_context(
                Proxy(service.tcp, getattr(arm, who), f"{seed} {arm.name} {who}")
            )
            for who in ("target", "draft")
        }
        for role, way in ways.items():
            stack.enter_context(Worker(role, way.address, service))
        doors = [
            stack.enter_context(Proxy(service.tcp, arm.client, f"{seed} {arm.name} client {n}"))
            for n in range(STREAMS)
        ]
        if not await are_there(service.ipc, FIRST_S):
            told.complaints.append("the workers have not joined")
        choices = [lambda question=question: question for question in questions]
        addresses = [door.address for door in doors]
        async with Crowd(addresses, choices, service.pauses) as crowd:
            if not await crowd.each_has(1, 0.0, FIRST_S):
                told.complaints.append("not every client was answered at first")
            deadline = time.monotonic() + LONGEST_S
            while time.monotonic() < deadline and not told.complaints:
                await asyncio.sleep(0.1)
                if sum(one.seen["messages"] for one in (*ways.values(), *doors)) >= count:
                    break
            if not await crowd.each_has(1, time.monotonic(), LAST_S):
                told.complaints.append("not every client is answered in the end")
            await crowd.rest()
        for one in (*ways.values(), *doors):
            told.seen.update(one.seen)
    told.complaints += service.left
    _judge(arm, crowd, told)
    return told


async def are_there(address: str, within_s: float) -> bool:
    """Whether both workers join in time, wherever they are."""
    deadline = time.monotonic() + within_s
    async with connect(address) as client:
        while time.monotonic() < deadline:
            if {"target", "draft"} <= (await client.health())["workers"].keys():
                return True
            await asyncio.sleep(0.1)
    return False


class Worker:
    """A worker that connects from elsewhere."""

    def __init__(
        self,
        role: str,
        address: str,
        service: Service,
        inside: tuple[str, ...] = (),
        flags: tuple[str, ...] = FLAGS,
    ) -> None:
        self._command = [
            *(*inside, sys.executable, "-m", "outrider_services", "worker", role),
            *("--backend=toy", f"--connect={address}", *flags),
        ]
        self._service = service
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Worker:
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(self._service.runtime),
        )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _judge(arm: Arm, crowd: Crowd, told: Told) -> None:
    for one in crowd.outcomes:
        told.outcomes[one.what if one.kind == "failed" else one.kind] += 1
        if one.kind in ("wrong", "hung", "untyped"):
            told.complaints.append(f"{one.kind}: {one.what}")
        elif one.kind == "failed" and one.what not in arm.may_fail:
            told.complaints.append(f"failed: {one.what}")
    del told.complaints[20:]
