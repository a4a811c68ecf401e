"""A long time of mixed load, while processes are killed or stopped again and again."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from tests.attack.arms import LOST
from tests.attack.clients import SOON_S, Crowd, Outcome
from tests.attack.questions import Question, answer_to
from tests.attack.service import ROLES, Service, Usage, end_on_sigterm
from tests.attack.strikes import BACK_S, Striker, joined

from outrider.engines.toy import WORDS
from outrider_services.terminal import show, tell

DESCRIPTION = """An hour of mixed load on the toy engine: three streams are always on, with prompts
of many lengths, greedy and sampled, as chats, with stop strings, with log-probabilities, some of
them cancelled. Every 20 s a process is killed or stopped: the target and the draft either way, the
coordinator only stopped, for it is the service.

Every answer is compared with the reference. Each minute a line is printed, at the end a table and
a verdict. The exit status is 1 if a text was wrong, a client waited 5 s without token, end or error
(time in which we had stopped a process not counted), an answer failed otherwise than with its
target, or something has grown: the private memory of coordinator or launcher, last tenth of the
time against the first one after a warm-up, to more than 1.1 times, or their threads, or the
descriptors of any process; or if a process is left at the end. Everything is on loopback, in a
runtime directory of its own, and is ended."""

FLAGS = ("--toy-step-ms=10", "--toy-row-ms=0.1", "--toy-draft-ms=1", "--parallel=4")
STREAMS, GROWTH = 3, 1.1
LASTING = ("coordinator", "launcher")  # the others are restarted
STRIKES = (
    ("kill", "target"),
    ("stop", "target"),
    ("kill", "draft"),
    ("stop", "draft"),
    ("stop", "coordinator"),
)
WARM_UP = 0.05  # part of the time, but at least so many seconds, or a quarter
WARM_UP_S = 60.0
Sample = tuple[float, dict[str, Usage]]


def mixed(rng: random.Random) -> Question:
    """A question of any kind."""
    prompt = " ".join(rng.choice(WORDS).decode() for _ in range(rng.choice((1, 4, 20, 80, 250))))
    sampling: dict[str, float] = {"temperature": 0.0}
    if rng.random() < 0.6:
        sampling = {"temperature": rng.choice((0.3, 0.8, 1.2)), "seed": rng.randrange(1 << 31)}
        sampling |= rng.choice(({}, {"top_k": 20}, {"top_p": 0.9}, {"min_p": 0.05}))
        sampling |= rng.choice(({}, {}, {"repeat_penalty": 1.2}, {"presence_penalty": 0.5}))
    count = rng.choice((1, 10, 60, 120, 250))
    return Question(
        prompt,
        count,
        tuple(sampling.items()),
        stop=rng.choice(((), (), ("er", "wind "), ("ü",))),
        chat=rng.random() < 0.25,
        logprobs=rng.random() < 0.25,
        cancelled_after=rng.randrange(count) if rng.random() < 0.2 else None,
        mode=rng.choice(("auto", "pipelined", "sync", "plain")),
    )


class Soak:
    """The load, the strikes and what is counted."""

    def __init__(self, service: Service, seconds: float, every: float, seed: int) -> None:
        self.service, self.seconds, self.every = service, seconds, every
        self.rng = random.Random(seed)
        self.striker = Striker(service, self.rng)
        self.samples: list[Sample] = []
        self.started: dict[str, set[int]] = {role: set() for role in ROLES}
        self.first: dict[str, Usage] = {}
        self.last: dict[str, Usage] = {}
        self.complaints: list[str] = []
        self.outcomes: list[Outcome] = []
        self._began = 0.0

    async def run(self) -> None:
        pool = [mixed(self.rng) for _ in range(40 if self.seconds < 300 else 300)]
        for question in pool:
            answer_to(question)  # before the clock runs
        choices = [lambda: self.rng.choice(pool)] * STREAMS
        places = (self.service.ipc, self.service.tcp)
        async with Crowd(places, choices, self.service.pauses) as crowd:
            self.outcomes = crowd.outcomes
            await crowd.each_has(2, 0.0, 4 * SOON_S)
            self.first = self.service.usage()
            self._began = time.monotonic()
            tasks = [asyncio.ensure_future(each) for each in (self._strikes(), self._watch())]
            try:
                await asyncio.sleep(self.seconds)
                self.complaints += [repr(t.exception()) for t in tasks if t.done()]
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            await self._end(crowd)

    async def _end(self, crowd: Crowd) -> None:
        """Let it recover; look at what it holds then."""
        if not await joined(self.service, {"target", "draft"}, BACK_S):
            self.complaints.append(f"target and draft are not back {BACK_S:.0f} s after the last")
        if not await crowd.each_has(2, time.monotonic(), BACK_S):
            self.complaints.append("not every client is answered at the end")
        for _ in range(25):  # a connection that has just ended is closed a moment later
            self.last = self.service.usage()
            if not self._more():
                break
            await asyncio.sleep(0.2)
        await crowd.rest()

    # ---- meanwhile ------------------------------------------------------------------------------

    async def _strikes(self) -> None:
        """One strike each `every` seconds; each kind comes once before any comes again."""
        left: list[tuple[str, str]] = []
        due = time.monotonic()
        while True:
            due += self.every
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            left = left or self.rng.sample(STRIKES, len(STRIKES))
            action, role = left.pop()
            if action == "stop" or not self.striker.may_kill(role):
                await self.striker.stop(role)
            elif not await self.striker.kill(role):
                self.complaints.append(f"the {role} does not come back after {self._now():.0f} s")

    async def _watch(self) -> None:
        """Take samples; print a line every minute."""
        sample_s = min(5.0, max(0.2, self.seconds / 100))
        line_s = min(60.0, self.seconds / 2)
        due = line_s
        while True:
            usage = self.service.usage()
            self.samples.append((self._now(), usage))
            for role, process in self.service.processes().items():
                self.started[role].add(process.pid)
            if self._now() >= due:
                due += line_s
                show(self.line(usage))
            await asyncio.sleep(sample_s)

    def _now(self) -> float:
        return time.monotonic() - self._began

    def line(self, usage: dict[str, Usage]) -> str:
        """How things stand."""
        kinds = Counter(one.kind for one in self.outcomes)
        codes = Counter(one.what for one in self.outcomes if one.kind == "failed")
        failed = ", ".join(f"{n} {code}" for code, n in sorted(codes.items())) or "none"
        restarts = {r: len(self.started[r]) - 1 for r in ("target", "draft")}
        uses = ", ".join(
            f"{role} {one.memory / 2**20:.1f} MiB {one.descriptors} files {one.threads} threads"
            for role, one in usage.items()
        )
        return (
            f"{self._now() / 60:.1f} min: {len(self.outcomes)} answers, {kinds['right']} right, "
            f"{kinds['wrong']} wrong, {kinds['hung']} hung, {kinds['untyped']} untyped, failed: "
            f"{failed}; strikes {len(self.striker.struck)}, restarts {restarts}; {uses}"
        )

    # ---- the verdict ----------------------------------------------------------------------------

    def growth(self, role: str) -> float:
        """Private memory in the last tenth of the time against the first one after a warm-up."""
        start = min(max(WARM_UP * self.seconds, WARM_UP_S), self.seconds / 4)
        tenth = (self.seconds - start) / 10

        def median(since: float, until: float) -> float:
            found = [u[role].memory for at, u in self.samples if since <= at <= until and role in u]
            return statistics.median(found) if found else float("nan")

        return median(self.seconds - tenth, self.seconds + tenth) / median(start, start + tenth)

    def verdict(self) -> list[str]:
        """All that is not as it should be."""
        found = list(self.complaints)
        for kind in ("wrong", "hung", "untyped"):
            those = [one for one in self.outcomes if one.kind == kind]
            if those:
                found.append(f"{len(those)} × {kind}, the first: {those[0].what}")
        unasked = Counter(
            one.what for one in self.outcomes if one.kind == "failed" and not self._is_due(one)
        )
        found += [f"{n} × {code} that no death explains" for code, n in unasked.items()]
        for role in LASTING:
            if not self.growth(role) <= GROWTH:
                found.append(f"memory of the {role} {self.growth(role):.2f} ×")
        gone = [role for role in ROLES if not (role in self.last and role in self.first)]
        found += [f"there is no {role}" for role in gone]
        return found + self._more() + self.service.left

    def _more(self) -> list[str]:
        """What processes hold more of than at first. A worker's threads come as they are needed."""
        found = []
        for role in self.first.keys() & self.last.keys():
            first, last = self.first[role], self.last[role]
            if last.descriptors > first.descriptors:
                found.append(
                    f"{last.descriptors} descriptors of the {role}, not {first.descriptors}"
                )
            if last.threads > first.threads and role in LASTING:
                found.append(f"{last.threads} threads of the {role}, not {first.threads}")
        return sorted(found)

    def _is_due(self, outcome: Outcome) -> bool:
        """Whether it failed with its target."""
        return outcome.what in LOST and any(
            role == "target" and began <= outcome.ended and until + 1.0 >= outcome.began
            for role, began, until in self.striker.struck
        )

    def table(self) -> Table:
        table = Table("process", "started", "private MiB", "growth", "files", "threads", box=None)
        for role in ROLES:
            pair = (self.first.get(role), self.last.get(role))
            if not (pair[0] and pair[1]):
                table.add_row(role, str(len(self.started[role])), "gone")
                continue
            first, last = pair[0], pair[1]
            table.add_row(
                role,
                str(len(self.started[role])),
                f"{first.memory / 2**20:.1f}→{last.memory / 2**20:.1f}",
                f"{self.growth(role):.2f}" if role in LASTING else "-",
                f"{first.descriptors}→{last.descriptors}",
                f"{first.threads}→{last.threads}",
            )
        return table


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seconds", type=float, default=3600.0, metavar="S", help="how long (default: 3600)")
    add("--every", type=float, default=20.0, metavar="S", help="from strike to strike (20)")
    add("--seed", type=int, default=1, metavar="N", help="of all that is random (default: 1)")
    add("--log", type=Path, metavar="FILE", help="where to leave the pipeline's log")
    parsed = parser.parse_args(arguments)
    if not (1 <= parsed.seconds <= 86400 and parsed.every >= 1):
        parser.error("--seconds must be from 1 to 86400, --every at least 1")
    end_on_sigterm()
    with Service(FLAGS) as service:
        soak = Soak(service, parsed.seconds, parsed.every, parsed.seed)
        try:
            asyncio.run(soak.run())
        finally:
            if parsed.log:
                parsed.log.write_text(service.log())
    show(soak.line(soak.last))
    show(soak.table())
    found = soak.verdict()
    show("\n".join(found) or "No text was wrong, and nothing has grown.")
    if found:
        tell(f"seed {parsed.seed}: {len(found)} things are not as they should be")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
