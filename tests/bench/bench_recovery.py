"""How long an answer stands still when a process dies: the draft, the target, the coordinator.

Each is killed while a sampled answer is streamed, again and again, and the tokens are compared with
those of the undisturbed answer. Of the target's gap, loading is told apart (from the start of its
process until it is ready), and reading (until the first token of the same text, read anew). Run at
the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_recovery [--kills N]`. Settings come
from the environment, such as OUTRIDER_PIPELINE__BACKEND=toy for devices that are made up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import uvloop

from outrider.client import AsyncClient, Stream, connect
from outrider_services import sources
from outrider_services.commands.prepared import with_files
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News
from outrider_services.tuning import search

PROMPT = "Write a Python class that keeps a list of books, with a method for each thing to do."
ASKED: dict[str, Any] = {"temperature": 0.7, "seed": 5, "ignore_eos": True}
AFTER_S = 1.0  # so long after a death the gaps are looked at, if there was a commit by then
LIMITS_MS = {"draft": 100, "target": 500, "coordinator": 3000}


@dataclass(slots=True)
class Gaps:
    """Milliseconds that a role's deaths have cost; of a target, without what must be."""

    extra: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    wrong: int = 0

    def line(self, role: str) -> str:
        ranked, limit = sorted(self.extra), LIMITS_MS[role]
        p99 = ranked[min(len(ranked) - 1, int(0.99 * len(ranked)))]
        verdict = "as aimed at" if p99 <= limit else "MORE THAN AIMED AT"
        extra, whole = statistics.median(ranked), statistics.median(self.whole)
        return (
            f"{role:12} {len(ranked):3} deaths; extra gap: median {extra:6.0f}, p99 {p99:6.0f}, "
            f"limit {limit} ms: {verdict}; whole gap: median {whole:.0f} ms; "
            f"wrong answers: {self.wrong}"
        )


class Bench:
    """One pipeline, whose processes are killed."""

    def __init__(self, settings: Settings, own: argparse.Namespace) -> None:
        self.settings, self.own = settings, own
        self.chance = random.Random(own.seed)
        self.at: dict[tuple[str, str], float] = {}  # when a role was last in a state
        self.gaps = {role: Gaps() for role in own.roles}
        self.expected: list[int] = []

    async def run(self) -> None:
        name = f"recovery-{secrets.token_hex(4)}"
        with News() as news:

            def report(role: str, state: str, done: float) -> None:
                self.at[role, state] = time.monotonic()
                news.report(role, state, done)

            launcher = Launcher(self.settings, name, report, lambda *_: None)
            async with launcher, connect(name, resume_s=60) as client:
                whole = await client.create_completion(PROMPT, max_tokens=self.own.tokens, **ASKED)
                self.expected = [token.id for token in whole.tokens]
                for turn in range(self.own.kills):
                    for role in self.own.roles:
                        await self.kill(launcher, client, role)
                    print(f"{turn + 1} of {self.own.kills}", file=sys.stderr)
        for role, gaps in self.gaps.items():
            print(gaps.line(role))

    async def kill(self, launcher: Launcher, client: AsyncClient, role: str) -> None:
        """Once: read some tokens, kill, and read on."""
        await joined(client)
        (child,) = (one for one in launcher._children if one.role == role)
        child.starts.clear()  # these deaths are not to add up to a reason for giving up
        assert child.process
        stream: Stream = await client.create_completion(
            PROMPT, max_tokens=self.own.tokens, stream=True, **ASKED
        )
        times, dead = list[float](), None
        count, least = 0, self.chance.randrange(10, self.own.tokens // 3)
        async for fragment in stream:
            times.append(time.monotonic())
            count += len(fragment.tokens)
            if dead is None and count >= least:
                await asyncio.sleep(self.chance.random() * 0.05)
                dead, before = time.monotonic(), count
                os.kill(child.process.pid, signal.SIGKILL)
            elif dead is not None and times[-1] > dead + AFTER_S:
                await stream.cancel()
        assert dead is not None
        said = [token.id for one in stream.fragments for token in one.tokens]
        gaps = self.gaps[role]
        gaps.wrong += said != self.expected[: len(said)]
        usual = statistics.median(b - a for a, b in pairwise(times) if b < dead)
        later = [(max(a, dead), b) for a, b in pairwise(times) if b > dead]
        whole = max(b - a for a, b in later)
        extra = whole - usual
        if role == "target":
            load = self.at["target", "ready"] - self.at["target", "starting"]
            extra = whole - load - await self.reading(client, before)
        gaps.whole.append(1000 * whole)
        gaps.extra.append(1000 * extra)

    async def reading(self, client: AsyncClient, count: int) -> float:
        """Seconds until the first token behind the text that was there."""
        prompt = [*await client.tokenize(PROMPT), *self.expected[:count]]
        asked = {**ASKED, "max_tokens": 1, "mode": "plain", "cache_prompt": False}
        began = time.monotonic()
        await client.create_completion(prompt, **asked)
        return time.monotonic() - began


async def joined(client: AsyncClient) -> None:
    await client.detokenize([])  # waits for a coordinator and a target
    while len((await client.health())["workers"]) < 2:  # noqa: ASYNC110  # other processes
        await asyncio.sleep(0.02)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    roles = [*LIMITS_MS]
    parser.add_argument("--kills", type=int, default=20, help="of each role")
    parser.add_argument("--roles", nargs="+", choices=roles, default=roles)
    parser.add_argument("--tokens", type=int, default=300, help="of the answer")
    parser.add_argument("--seed", type=int, default=1, help="of the moments")
    own = parser.parse_args()
    settings = search.prepared(with_files(sources.settings({}), fetch=False), print)
    patient = replace(settings.coordinator, resume_s=600.0)
    uvloop.run(Bench(replace(settings, coordinator=patient), own).run())
    return 0


if __name__ == "__main__":
    sys.exit(main())
