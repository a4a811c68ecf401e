"""`outrider bench --simulate`: what overlap gains on devices of any cost, in the real processes.

The workers answer from a made-up model and take the time that they are told to. So any machine can
show what other hardware would do: passes that cost the same whatever their rows, a fast draft, a
slow link. Beside the measured speed-up stand that of the same policy in virtual time, where only
devices and link take time; that of draft and target in turns; and the limits of the theory.
"""

from __future__ import annotations

import json
import secrets
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from outrider.client import AsyncClient, connect
from outrider.core.values import AskedMode
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.errors import ConfigError
from outrider_services.bench.replay import Replay, World
from outrider_services.bench.traces import record
from outrider_services.outlet import put
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News, tell

PROMPT = "The lantern "
LENGTHS = (1, 2, 4, 8, 16)  # of the blocks that are tried in turns
ROWS = 65  # of the longest pass whose cost the virtual devices know


@dataclass(frozen=True, slots=True)
class Cell:
    """One draft on one device; the figures behind its cost tell how many times as fast as the
    target alone."""

    acceptance: float  # of each drafted token
    cost: float  # of a drafted token, in plain steps of the target
    pipelined: float
    ideal: float  # the same policy and tokens, where only devices and link take time
    sync: float  # in turns, by the same price of time
    sync_fixed: float  # in turns, at the best of `LENGTHS`
    tokens_limit: float  # 1 / (1 - acceptance): however fast the draft
    draft_limit: float  # 1 / cost + 1: however good the draft


def read_numbers(flag: str, text: str, most: float) -> tuple[float, ...]:
    """The numbers of a list such as `0.1,0.2`, each between 0 and `most`. Raises ConfigError."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < most for number in numbers):
        raise ConfigError(f"{flag} is a list such as 0.1,0.2, above 0 and below {most:g}: {text!r}")
    return numbers


async def simulate(settings: Settings, parsed: Any) -> None:
    """Measure every cell, and write a table or JSON."""
    acceptances = read_numbers("--acceptance", parsed.acceptance, 1)
    costs = read_numbers("--cost", parsed.cost, 10)
    cells: list[Cell] = []
    for acceptance in acceptances:
        for cost in costs:
            cell = await measured(settings, acceptance, cost, parsed.n_predict, parsed.repetitions)
            tell(f"[{len(cells) + 1}/{len(acceptances) * len(costs)}] {cell}")
            cells.append(cell)
    if parsed.output == "json":
        await put(json.dumps([asdict(cell) for cell in cells], indent=2) + "\n")
    else:
        await put(table_of(cells))


async def measured(
    settings: Settings, acceptance: float, cost: float, count: int, repetitions: int
) -> Cell:
    """Both models made up as told; of each arm the fastest of `repetitions` answers counts."""
    draft_ms = cost * settings.toy.step_ms
    toy = replace(settings.toy, agreement=acceptance, draft_ms=draft_ms, row_ms=0.0, rows="")
    pipeline = replace(settings.pipeline, backend="toy", mode="auto")
    settings = replace(settings, toy=toy, pipeline=pipeline)
    name = f"simulate-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        with News() as news:
            launcher = Launcher(settings, name, news.report, news.log)
            await stack.enter_async_context(launcher)
        client = await stack.enter_async_context(connect(name))
        await speed(client, count, "auto")  # the first answer bears what is slow only once
        arms: list[tuple[AskedMode, int | None]] = [
            ("plain", None),
            ("pipelined", None),
            ("sync", None),
        ]
        arms += [("sync", length) for length in LENGTHS]
        best = dict.fromkeys(arms, 0.0)
        for _ in range(repetitions):
            for arm in arms:
                best[arm] = max(best[arm], await speed(client, count, *arm))
    alone = best["plain", None]
    return Cell(
        acceptance,
        cost,
        best["pipelined", None] / alone,
        ideal(settings, count),
        best["sync", None] / alone,
        max(best["sync", length] for length in LENGTHS) / alone,
        1 / (1 - acceptance),
        1 / cost + 1,
    )


async def speed(
    client: AsyncClient, count: int, mode: AskedMode, length: int | None = None
) -> float:
    """Tokens per second of one answer; its first token, which comes from prefill, is left out."""
    answer = await client.create_completion(
        PROMPT,
        max_tokens=count,
        temperature=0,
        seed=0,
        ignore_eos=True,
        mode=mode,
        n_draft=length,
        n_min=length,
        cache_prompt=False,
    )
    stats = answer.stats
    assert stats.decode_s
    return float(stats.generated_tokens - 1) / float(stats.decode_s)


def ideal(settings: Settings, count: int) -> float:
    """The speed-up of the same policy on the same tokens, where only devices and link take time."""
    toy = settings.toy
    target = ToyEngine(ToySettings(role="target", agreement=toy.agreement))
    draft = ToyEngine(ToySettings(role="draft", agreement=toy.agreement))
    trace = record(target, draft, target.tokenize(PROMPT, special=True), count)
    world = World(
        (toy.step_ms / 1000,) * ROWS, toy.draft_ms / 1000, link_s=max(1e-6, toy.link_ms / 1000)
    )
    return Replay(trace, world.rule("pipelined"), world).speedup()


def table_of(cells: list[Cell]) -> str:
    """The cells as a table."""
    titles = ("acceptance", "draft cost", "pipelined", "ideal", "of ideal", "sync", "sync, fixed")
    table = Table(*titles, "1/(1-a)", "1/c + 1", box=None)
    for cell in cells:
        share = f"{cell.pipelined / cell.ideal:.0%}"
        figures = (cell.pipelined, cell.ideal, cell.sync, cell.sync_fixed)
        first, second, *others = (f"{figure:.2f}" for figure in figures)
        limits = (f"{cell.tokens_limit:.1f}", f"{cell.draft_limit:.1f}")
        row = (f"{cell.acceptance:g}", f"{cell.cost:g}", first, second, share, *others, *limits)
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 200)
    with console.capture() as captured:
        console.print(table)
    return captured.get()
