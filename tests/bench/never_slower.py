"""`auto` against `plain`, whole answers: prompts, lengths, long prompts, first and later requests.

On this machine each cell is measured three times: `auto`, then `plain`, then `plain` again, whose
ratio to the first shows how much the machine itself varies. A first request gets a service of its
own for each of the three. On simulated devices every cell is played in virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import secrets
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from tests.sim import costs

from outrider.client import AsyncClient, connect
from outrider.core.values import AskedMode
from outrider_services import sources
from outrider_services.bench import prompts
from outrider_services.bench.prompts import Category
from outrider_services.commands.prepared import with_files
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News
from outrider_services.tuning import search

WANTED, LEAST = 0.98, 0.95
ARMS: tuple[AskedMode, ...] = ("auto", "plain", "plain")
REPETITIONS = 3
FILLER = "The valley lay quiet under a grey sky, and the river went its slow way to the sea. "


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--simulated", action="store_true", help="on simulated devices, all cells")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the cells")
    args = parser.parse_args()
    if args.simulated:
        return simulated()
    return asyncio.run(measured(args.minutes, args.seed))


# ---- simulated devices --------------------------------------------------------------------------


def simulated() -> int:
    worst = 1.0
    for device in costs.DEVICES:
        found: dict[tuple[int, int, str], list[costs.Cell]] = defaultdict(list)
        for cell in costs.cells(device, costs.LENGTHS, costs.PADDINGS):
            found[cell.length, cell.padding, cell.which].append(cell)
        for (length, padding, which), some in found.items():
            ratios = [cell.ratio for cell in some]
            worst = min(worst, *ratios)
            print(f"{device:18} {length:4} tokens behind {padding:5}, {which:12} {line(ratios)}")
    print(f"the least of all cells: {worst:.3f}")
    return int(worst < LEAST)


def line(ratios: Sequence[float]) -> str:
    below = sum(ratio < WANTED for ratio in ratios)
    return (
        f"least {min(ratios):.3f}, mean {statistics.fmean(ratios):.3f}, most {max(ratios):.2f}; "
        f"below {WANTED:g}: {below} of {len(ratios)}"
    )


# ---- this machine -------------------------------------------------------------------------------


@dataclass(slots=True)
class Cell:
    category: Category
    prompt: str
    name: str
    length: int
    padding: int
    first: bool
    auto: list[float] = field(default_factory=list)  # over plain, by repetition
    plain: list[float] = field(default_factory=list)  # the second over the first

    def __str__(self) -> str:
        which = "first" if self.first else "tenth"
        return f"{self.name}, {self.length} tokens behind {self.padding}, {which}"


def cells(seed: int) -> list[Cell]:
    """Every cell, shuffled so that any beginning of the list has some of all kinds."""
    found = [
        Cell(category, prompt, f"{category.name} {number}", length, padding, first)
        for category in prompts.load(None, (), 3)
        for number, prompt in enumerate(category.prompts, 1)
        for length, padding, first in itertools.product(
            costs.LENGTHS, costs.PADDINGS, (True, False)
        )
    ]
    random.Random(seed).shuffle(found)
    return found


async def measured(minutes: float, seed: int) -> int:
    settings = search.prepared(with_files(sources.settings({}), fetch=False), print)
    deadline, done = time.monotonic() + 60 * minutes, list[Cell]()
    for cell in cells(seed):
        if time.monotonic() > deadline:
            break
        await (measure_first(settings, cell) if cell.first else measure_tenth(settings, cell))
        done.append(cell)
        print(
            f"{cell}: auto {statistics.median(cell.auto):.3f}, "
            f"plain again {statistics.median(cell.plain):.3f}",
            flush=True,
        )
    report(done)
    return int(min(statistics.median(cell.auto) for cell in done) < LEAST)


def report(done: Iterable[Cell]) -> None:
    by_kind: dict[str, list[Cell]] = defaultdict(list)
    for cell in done:
        for kind in (
            "all",
            cell.name[:-2],
            f"{cell.length} tokens",
            f"behind {cell.padding}",
            "first" if cell.first else "tenth",
        ):
            by_kind[kind].append(cell)
    for kind, some in by_kind.items():
        print(f"{kind:14} auto over plain: {line([statistics.median(c.auto) for c in some])}")
        print(f"{'':14} plain over plain: {line([statistics.median(c.plain) for c in some])}")


@asynccontextmanager
async def service(settings: Settings) -> AsyncIterator[AsyncClient]:
    name = f"never-slower-{secrets.token_hex(4)}"
    with News() as news:
        async with Launcher(settings, name, news.report, news.log), connect(name) as client:
            yield client


async def measure_first(settings: Settings, cell: Cell) -> None:
    for repetition in range(REPETITIONS):
        times = dict[int, float]()
        for arm in rotated(repetition):
            async with service(settings) as client:
                times[arm] = await took(client, cell, ARMS[arm])
        note(cell, times)


async def measure_tenth(settings: Settings, cell: Cell) -> None:
    async with service(settings) as client:
        others = [one for one in cells(0) if one.padding == 30 and one.length == 64][:9]
        for other in others:
            await took(client, other, "auto")
        for repetition in range(REPETITIONS):
            note(cell, {arm: await took(client, cell, ARMS[arm]) for arm in rotated(repetition)})


def rotated(repetition: int) -> list[int]:
    return [(arm + repetition) % len(ARMS) for arm in range(len(ARMS))]


def note(cell: Cell, times: dict[int, float]) -> None:
    plain_s = statistics.fmean((times[1], times[2]))
    cell.auto.append(plain_s / times[0])
    cell.plain.append(times[1] / times[2])


async def took(client: AsyncClient, cell: Cell, mode: AskedMode) -> float:
    """Seconds from the question to the end of the answer."""
    text = await padded(client, cell)
    began = time.perf_counter()
    await client.create_completion(
        text,
        max_tokens=cell.length,
        temperature=0,
        seed=0,
        ignore_eos=True,
        mode=mode,
        cache_prompt=False,
    )
    return time.perf_counter() - began


async def padded(client: AsyncClient, cell: Cell) -> str:
    """The prompt as the model reads it, with so much before it that it has enough tokens."""

    async def rendered(before: str) -> str:
        if not cell.category.chat:
            return before + cell.prompt
        return await client.apply_template(cell.category.messages(before + cell.prompt))

    text = await rendered("")
    missing = cell.padding - len(await client.tokenize(text))
    each = len(await client.tokenize(FILLER))
    return await rendered(FILLER * round(missing / each)) if missing > 0 else text


if __name__ == "__main__":
    sys.exit(main())
