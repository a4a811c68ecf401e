"""What it costs when the draft that serves dies in mid-request and another one stands by.

Made-up devices: the draft that the pipeline starts is the slower one, the other joins it and is
killed again and again. Told are the seconds from that to the next block and to the first block that
the other has drafted, and how often the slower one was chosen while both were there.
Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_several`.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from typing import NamedTuple

import numpy as np
import uvloop

from outrider.client import AsyncClient, connect
from outrider_services import sources
from outrider_services.pipeline.launcher import Launcher
from outrider_services.terminal import News

COUNT = 160  # tokens of an answer
KILLED_AT = 30


class Loss(NamedTuple):
    """Seconds from the death of the draft that served."""

    next_s: float  # to the next block
    drafted_s: float  # to the first drafted by the other
    longest_s: float  # between two blocks, from then on


async def joined(client: AsyncClient, count: int) -> dict[str, str]:
    """Wait for so many drafts; the model of each by its name."""
    while True:
        workers = (await client.health())["workers"]
        drafts = {name: one["model"] for name, one in workers.items() if one["role"] == "draft"}
        if len(drafts) == count:
            return drafts
        await asyncio.sleep(0.02)


async def lost(client: AsyncClient, name: str, step_ms: float) -> tuple[str | None, Loss]:
    """One answer, and the death of the draft that rides ahead of it: who that was."""
    command = (sys.executable, "-m", "outrider_services", "worker", "draft", "--backend=toy")
    flags = (f"--connect={name}", f"--toy-step-ms={step_ms}", "--toy-draft-ms=2")
    other = await asyncio.create_subprocess_exec(
        *command, *flags, stdout=asyncio.subprocess.DEVNULL
    )
    await joined(client, 2)
    stream = await client.create_completion(
        secrets.token_hex(8), max_tokens=COUNT, stream=True, mode="pipelined"
    )
    served, killed, drafted, gaps = None, 0.0, 0.0, [0.0]
    last, generated = time.monotonic(), 0
    async for fragment in stream:
        now = time.monotonic()
        generated += len(fragment.tokens)
        if killed:
            gaps.append(now - last)
            # the block that the target was at is still of the one that died
            drafted = drafted or (now if fragment.drafted and len(gaps) > 2 else 0.0)
        elif generated > KILLED_AT:
            (slot,) = (await client.health())["slots"].values()
            served, killed = slot["draft"], time.monotonic()
            other.kill()
        last = now
    await other.wait()
    await joined(client, 1)
    return served, Loss(gaps[1], (drafted or last) - killed, max(gaps))


async def measured(times: int, step_ms: float) -> None:
    values = {"pipeline.backend": "toy", "toy.step_ms": step_ms, "toy.draft_ms": 8.0}
    settings = sources.settings({**values, "draft.place": "both"})
    name = f"several-{secrets.token_hex(4)}"
    with News() as news:
        async with Launcher(settings, name, news.report, news.log), connect(name) as client:
            found = [await lost(client, name, step_ms) for _ in range(times)]
    slower = sum(served == "draft" for served, _ in found)
    print(f"the slower of two drafts was chosen {slower} times of {times}")
    for field, told in zip(
        Loss._fields,
        ("to the next block", "to the other's first block", "longest gap from then on"),
        strict=True,
    ):
        seconds = [getattr(loss, field) for _, loss in found]
        median, worst = (1000 * float(np.quantile(seconds, share)) for share in (0.5, 0.99))
        print(f"{told}: median {median:.0f} ms, p99 {worst:.0f} ms; a pass takes {step_ms:.0f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30)
    parser.add_argument("--step-ms", type=float, default=40.0)
    own = parser.parse_args()
    uvloop.run(measured(own.times, own.step_ms))
