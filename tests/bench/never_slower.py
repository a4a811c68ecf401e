"""`auto` against `plain`, whole answers: prompts, lengths, long prompts, first and later requests.

On this machine a cell has three turns of `auto` and `plain`: two if both are so good that the third
cannot spoil the median, and nine if the median of three is too low, since the machine may have been
at fault. In each turn for a first request `auto` is what a new service is asked first, and `plain`
next. Some cells share a service that has answered nine requests before. All cells take hours: with
`--record` they can be measured in several sittings. With `--control` `plain` is compared with
itself, which shows how much the machine varies. On simulated devices every cell is played in
virtual time.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import secrets
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

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
REPETITIONS, MOST = 3, 9  # turns of a cell: as a rule, and where that many were below `LEAST`
TOGETHER = 12  # cells of a service that has answered others before
FILLER = "The valley lay quiet under a grey sky, and the river went its slow way to the sea. "


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/never-slower", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--simulated", action="store_true", help="on simulated devices, all cells")
    parser.add_argument("--minutes", type=float, default=600.0, help="stop after (default: 600)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the cells")
    parser.add_argument("--record", type=Path, metavar="FILE", help="go on from it, and add to it")
    parser.add_argument("--control", action="store_true", help="measure plain over plain instead")
    args = parser.parse_args()
    if args.simulated:
        return simulated()
    mode: AskedMode = "plain" if args.control else "auto"
    return asyncio.run(measured(mode, 60 * args.minutes, args.seed, args.record))


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
    ratios: list[float] = field(default_factory=list)  # plain's time over that of the mode

    def __str__(self) -> str:
        which = "first" if self.first else "tenth"
        return f"{self.name}, {self.length} tokens behind {self.padding}, {which}"

    @property
    def ratio(self) -> float:
        """The median, or what it is at least."""
        return statistics.median_low(self.ratios)

    @property
    def is_settled(self) -> bool:
        """Whether it has had all its turns."""
        if len(self.ratios) < REPETITIONS:
            return sum(ratio >= WANTED for ratio in self.ratios) > REPETITIONS // 2
        if len(self.ratios) == REPETITIONS:
            return self.ratio >= LEAST
        return len(self.ratios) >= MOST


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


async def measured(mode: AskedMode, seconds: float, seed: int, record: Path | None) -> int:
    settings = search.prepared(with_files(sources.settings({}), fetch=False), print)
    deadline, every = time.monotonic() + seconds, cells(seed)
    recalled(every, mode, record)
    for some in together(cell for cell in every if not cell.is_settled):
        if time.monotonic() > deadline:
            break
        measure = measure_firsts if some[0].first else measure_tenths
        async with aclosing(measure(settings, some, mode)) as found:
            async for cell in found:
                note(cell, mode, record)
                if time.monotonic() > deadline:
                    break
    done = [cell for cell in every if cell.is_settled]
    report(done, len(every), mode)
    return int(min((cell.ratio for cell in done), default=1.0) < LEAST)


def note(cell: Cell, mode: AskedMode, record: Path | None) -> None:
    print(f"{cell}: {', '.join(f'{ratio:.3f}' for ratio in cell.ratios)}", flush=True)
    if record:
        with record.open("a") as file:
            print(json.dumps([mode, str(cell), cell.ratios]), file=file)


def recalled(every: Iterable[Cell], mode: AskedMode, record: Path | None) -> None:
    """Give the cells what was measured of this mode before."""
    if record is None or not record.exists():
        return
    lines = map(json.loads, record.read_text().splitlines())
    told = {name: ratios for asked, name, ratios in lines if asked == mode}
    for cell in every:
        cell.ratios = told.get(str(cell), [])


def report(done: Sequence[Cell], of: int, mode: AskedMode) -> None:
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
    print(f"{len(done)} of {of} cells, {mode} over plain")
    for kind, some in by_kind.items():
        print(f"{kind:14} {line([cell.ratio for cell in some])}")


@asynccontextmanager
async def service(settings: Settings) -> AsyncIterator[AsyncClient]:
    name = f"never-slower-{secrets.token_hex(4)}"
    with News() as news:
        async with Launcher(settings, name, news.report, news.log), connect(name) as client:
            yield client


def together(some: Iterable[Cell]) -> Iterator[list[Cell]]:
    """The same, in turns a few first requests and a few later ones."""
    kinds: dict[bool, list[Cell]] = {True: [], False: []}
    for cell in some:
        kinds[cell.first].append(cell)
        if len(kinds[cell.first]) == TOGETHER:
            yield kinds[cell.first]
            kinds[cell.first] = []
    yield from filter(None, kinds.values())


async def measure_firsts(
    settings: Settings, some: Iterable[Cell], mode: AskedMode
) -> AsyncGenerator[Cell, None]:
    for cell in some:
        while not cell.is_settled:
            async with service(settings) as client:
                mode_s = await took(client, cell, mode)
                cell.ratios.append(await took(client, cell, "plain") / mode_s)
        yield cell


async def measure_tenths(
    settings: Settings, some: Iterable[Cell], mode: AskedMode
) -> AsyncGenerator[Cell, None]:
    async with service(settings) as client:
        for other in [one for one in cells(0) if one.padding == 30 and one.length == 64][:9]:
            await took(client, other, mode)
        for cell in some:
            while not cell.is_settled:
                await turn(client, cell, mode)
            yield cell


async def turn(client: AsyncClient, cell: Cell, mode: AskedMode) -> None:
    """Both once; which is first changes from turn to turn."""
    if len(cell.ratios) % 2:
        plain_s = await took(client, cell, "plain")
        cell.ratios.append(plain_s / await took(client, cell, mode))
    else:
        mode_s = await took(client, cell, mode)
        cell.ratios.append(await took(client, cell, "plain") / mode_s)


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
