"""What happens to a cluster under load when nodes die and replicas come and go; and its figures.

Run as `scripts/cluster`: each part prints a row of what was wanted and what was measured.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from itertools import pairwise
from typing import Any

import psutil
from ray import serve
from tests.chaos.campaign import Row
from tests.cluster.clock import Ticking
from tests.cluster.town import ON_DRAFT, Asked, Town, said

from outrider_services.bench.planning import Devices, measured, plans
from outrider_services.cluster.upstream import LOST_S
from outrider_services.table import Settings
from outrider_services.terminal import show, tell

STREAMS = 32
LONG, SHORT = 500, 40  # tokens
SLOW = {"toy.step_ms": "20", "toy.draft_ms": "2", "toy.row_ms": "0.05"}


async def kill(town: Town) -> list[Row]:
    """A node with one of two pairs dies under 32 streams."""
    first, second = town.node(pair=1), town.node(pair=1)
    await town.deploy({**SLOW, "replicas": "2", "pipeline.parallel": "32"})
    prompts = [said(f"Tell me of ship number {n}.") for n in range(STREAMS)]
    calm = await asyncio.gather(*(town.ask(one, LONG) for one in prompts))
    asking = asyncio.gather(*(town.ask(one, LONG) for one in prompts))
    await asyncio.sleep(1.5)
    struck = time.monotonic()
    await asyncio.to_thread(town.kill, second)
    answers = await asking
    gaps = [one.longest_s for one in answers]
    waits = [waited(one, struck) for one in answers]
    hit = [wait for wait in waits if wait > LOST_S]
    town.node(pair=1)
    back_s = await town.until(lambda: town.replicas() == 2, 120.0)
    after = await asyncio.gather(*(town.ask(one, SHORT) for one in prompts[:8]))
    right = sum(a.text == b.text and not b.error for a, b in zip(calm, answers, strict=True))
    errors = [one.error for one in (*calm, *answers, *after) if one.error]
    usual = statistics.median(one.longest_s for one in calm)
    told = (
        f"{right} right, {len(errors)} errors; {len(hit)} went on elsewhere after p50 "
        f"{statistics.median(hit or [0]):.1f} s, most {max(gaps):.1f} s (undisturbed "
        f"{usual:.1f} s); replaced after {back_s:.1f} s"
    )
    town.cluster.remove_node(first, True)
    passed = right == STREAMS and not errors and bool(hit)
    return [Row("a node of two is killed under 32 streams", "32 right, 0 errors", told, passed)]


def waited(asked: Asked, since: float) -> float:
    """The longest wait for a piece, in seconds, of those that ended after this moment.

    Not the wait at that moment: a node takes a while to be dead.
    """
    waits = pairwise([asked.began, *asked.came])
    return max((after - before for before, after in waits if after > since), default=0.0)


async def scale(town: Town) -> list[Row]:
    """From one replica to four and back, under load."""
    node = town.node(pair=4)
    await town.deploy({**SLOW, "replicas": "1-4", "upscale_s": "1", "downscale_s": "4"})
    errors: list[str] = []
    wanted, count = 24, 0
    ends = False

    async def user(number: int) -> None:
        nonlocal count
        while not ends:
            if number >= wanted:
                await asyncio.sleep(0.1)
                continue
            answer = await town.ask(said(f"User {number} asks {count}."), SHORT)
            count += 1
            if answer.error:
                errors.append(answer.error)

    users = [asyncio.ensure_future(user(n)) for n in range(wanted)]
    try:
        up_s = await town.until(lambda: town.replicas() == 4, 120.0)
        wanted = 2
        down_s = await town.until(lambda: town.replicas() == 1, 240.0)
    finally:
        ends = True
        await asyncio.gather(*users)
    town.cluster.remove_node(node, True)
    told = (
        f"4 after {up_s:.0f} s, 1 after another {down_s:.0f} s; {count} answers, "
        f"{len(errors)} errors{': ' + errors[0] if errors else ''}"
    )
    return [Row("1 → 4 → 1 replicas under load", "0 errors", told, not errors)]


async def draft(town: Town) -> list[Row]:
    """The node of the draft's bundle dies, and another one comes."""
    pair, lost = town.node(pair=1), town.node(draft=1)
    await town.deploy({**SLOW, "strategy": "SPREAD", "draft": ON_DRAFT})
    await town.until(lambda: asyncio.run(drafts(town.url)), 60.0)
    prompts = [said(f"Tell me of island number {n}.") for n in range(4)]
    calm = await asyncio.gather(*(town.ask(one, LONG) for one in prompts))
    asking = asyncio.gather(*(town.ask(one, LONG) for one in prompts))
    await asyncio.sleep(0.5)
    await asyncio.to_thread(town.kill, lost)
    answers = await asking
    again = town.node(draft=1)
    back_s = await town.until(lambda: asyncio.run(drafts(town.url)), 120.0)
    right = sum(a.text == b.text and not b.error for a, b in zip(calm, answers, strict=True))
    slower = statistics.median(
        (b.came[-1] - b.began) / (a.came[-1] - a.began) for a, b in zip(calm, answers, strict=True)
    )
    gap = max(one.longest_s for one in answers)
    for node in (pair, again):
        town.cluster.remove_node(node, True)
    told = (
        f"{right} right, {slower:.2f} times as long, longest gap {gap:.2f} s; a draft is there "
        f"again {back_s:.1f} s after another node is"
    )
    return [Row("the draft's node is killed under 4 streams", "4 right", told, right == 4)]


async def drafts(url: str) -> bool:
    """Whether the pipeline has a draft worker."""
    import httpx2 as httpx

    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        workers = (await client.get("/health")).json().get("workers", {})
    return any(one["role"] == "draft" for one in workers.values())


async def linear(town: Town) -> list[Row]:
    """Tokens a second of 1, 2 and 4 pairs of simulated devices, two streams each.

    Each count of pairs answers the same eight questions, as drafts do not fare alike in all texts.
    """
    node = town.node(pair=4)
    speeds: dict[int, float] = {}
    busy: dict[int, float] = {}  # percent of this machine's cores
    prompts = [said(f"Tell me of lighthouse number {n}.") for n in range(8)]
    for pairs in (1, 2, 4):
        calm = {"toy.step_ms": "250", "toy.draft_ms": "25"}
        await town.deploy({**calm, "replicas": str(pairs)})
        await asyncio.gather(*(town.ask(one, SHORT // 4) for one in prompts[: 2 * pairs]))
        psutil.cpu_percent()
        answers: list[Asked] = []
        for start in range(0, len(prompts), 2 * pairs):
            some = prompts[start : start + 2 * pairs]
            answers += await asyncio.gather(*(town.ask(one, LONG // 4) for one in some))
        busy[pairs] = psutil.cpu_percent()
        speeds[pairs] = 2 * pairs * statistics.fmean(one.speed for one in answers)
    town.cluster.remove_node(node, True)
    over = {pairs: speed / (pairs * speeds[1]) for pairs, speed in speeds.items()}
    told = ", ".join(
        f"{n}: {speeds[n]:.0f} tokens/s ({over[n]:.2f}; cores {busy[n]:.0f} % busy)" for n in speeds
    )
    return [Row("1, 2, 4 pairs, over linear", "≥ 0.95", told, min(over.values()) >= 0.95)]


async def prefix(town: Town) -> list[Row]:
    """Second turns of 20 conversations over 4 pairs: how many hit what their first turn left."""
    node = town.node(pair=4)
    shares = {}
    for routing in ("prefix", "default"):
        quick = {"toy.step_ms": "10", "toy.draft_ms": "1"}
        many = {"replicas": "4", "pipeline.parallel": "8"}
        await town.deploy({**quick, **many, "routing": routing})
        first = [said(f"Conversation {n} of {routing}: " + "word " * 60) for n in range(20)]
        answers = await asyncio.gather(*(town.ask(one, SHORT) for one in first))
        seconds = [
            [*one, {"role": "assistant", "content": answer.text}, *said("And then?")]
            for one, answer in zip(first, answers, strict=True)
        ]
        found = await asyncio.gather(*(town.ask(one, SHORT) for one in seconds))
        hits = [
            one.cached > 0.8 * before.prompt for one, before in zip(found, answers, strict=True)
        ]
        shares[routing] = sum(hits) / len(hits)
    town.cluster.remove_node(node, True)
    told = f"{shares['prefix']:.0%} by prefix, {shares['default']:.0%} as Serve routes by default"
    wanted = "≥ 90 %, the other beside it"
    return [Row("second turns that hit", wanted, told, shares["prefix"] >= 0.9)]


async def share(town: Town) -> list[Row]:
    """What Ray takes of each fragment: the way from a gateway's replica to the client."""
    ticking: Any = Ticking
    at = {"name": "clock", "route_prefix": "/clock", "blocking": False}
    await asyncio.to_thread(serve.run, ticking.bind(), **at)
    await town.until(lambda: town.is_up("clock"), 60.0)
    took = [1000 * late_s for late_s in await town.lateness("/clock")]
    await asyncio.to_thread(serve.delete, "clock")
    median = statistics.median(took)
    told = f"p50 {median:.2f} ms, p99 {quantile(took, 0.99):.2f} ms"
    return [Row("Ray's share of a fragment", "median ≤ 3 ms", told, median <= 3.0)]


async def plan(town: Town) -> list[Row]:
    """What `outrider plan` expects of two pairs, and what they do."""
    devices, users = Devices(0.1, (1.0, 1.02, 1.04, 1.06), 0.01, 0.8), (2, 8, 16)
    loads = await measured(Settings(), devices, max(users) // 2, LONG // 2)
    node = town.node(pair=2)
    toy = devices.simulated(Settings(), 1).toy
    costs = {"toy.step_ms": toy.step_ms, "toy.rows": toy.rows, "toy.draft_ms": toy.draft_ms}
    many = {"replicas": "2", "pipeline.parallel": "64", "toy.row_ms": "0"}
    await town.deploy({**many, **{key: str(value) for key, value in costs.items()}})
    ratios = {}
    for number in users:
        prompts = [said(f"User {n} of {number} asks.") for n in range(number)]
        answers = await asyncio.gather(*(town.ask(one, LONG // 2) for one in prompts))
        rates = [one.tokens / (one.came[-1] - one.came[0]) for one in answers]
        expected = next(one for one in plans(loads, number) if one.pairs == 2)
        ratios[number] = statistics.median(rates) / expected.tokens_per_s
    town.cluster.remove_node(node, True)
    told = ", ".join(f"{n} users: {ratio:.2f} of what is expected" for n, ratio in ratios.items())
    passed = all(0.85 <= ratio <= 1.15 for ratio in ratios.values())
    return [Row("plan against the cluster", "within 15 %", told, passed)]


def quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


async def pair(town: Town) -> list[Row]:
    """The default pair of models, through Ray and alone."""
    node = town.node(pair=1)
    await town.deploy({"pipeline.backend": "llama"}, within_s=300.0)
    prompt, count = "def merge(left, right):", 48
    through = await town.complete(prompt, count)
    command = [sys.executable, "-m", "outrider_services", "run", "--temp=0", "-n", str(count)]
    alone = await asyncio.create_subprocess_exec(
        *command, "--no-stats", prompt, stdout=asyncio.subprocess.PIPE
    )
    text = (await alone.communicate())[0].decode()
    town.cluster.remove_node(node, True)
    is_same = through.strip() == text.strip()
    told = f"{count} tokens, {'the same text' if is_same else f'{through!r} and {text!r}'}"
    return [Row("the default pair through Ray", "the same text as alone", told, is_same)]


PARTS: dict[str, Callable[[Town], Awaitable[list[Row]]]] = {
    "kill": kill,
    "scale": scale,
    "draft": draft,
    "linear": linear,
    "prefix": prefix,
    "share": share,
    "plan": plan,
    "pair": pair,
}


async def run(names: Sequence[str]) -> list[Row]:
    rows: list[Row] = []
    async with Town() as town:
        for name in names:
            rows += await PARTS[name](town)
            tell(f"{name}: {rows[-1].measured}")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="this part (repeatable)")
    rows = asyncio.run(run(parser.parse_args().only or [*PARTS]))
    for row in rows:
        show(f"{'yes' if row.passed else 'NO':4} {row.quantity}: {row.measured} ({row.wanted})")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
