"""Several requests at once: tokens per second of all together, first question to last end,
drafted against plain batching and, with --peers, against llama-server with and without a draft.

The arms alternate within one run; llama-server's draft length is the best of --n-max in a first
repetition of its own. Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_serving`.
Settings come from the environment, such as OUTRIDER_PIPELINE__BACKEND=toy for devices that are made
up.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import uvloop

from outrider.client import AsyncClient, connect
from outrider.core.values import AskedMode
from outrider_services import sources
from outrider_services.bench import peers, prompts
from outrider_services.commands.prepared import with_files
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News
from outrider_services.tuning import search

OURS: tuple[AskedMode, ...] = ("plain", "auto")
Together = Callable[[list[str], int], Awaitable[float]]  # prompts, tokens each -> tokens per second


async def measured(settings: Settings, own: argparse.Namespace) -> None:
    texts = [prompt for category in prompts.load(None, (), 3) for prompt in category.prompts]
    name = f"serving-{secrets.token_hex(4)}"
    with News() as news:
        async with Launcher(settings, name, news.report, news.log), connect(name) as client:
            await ours(client, "auto", texts[:1], own.tokens)  # whatever comes once
            for count in own.at_once:
                asked = [texts[n % len(texts)] for n in range(count)]
                await compared(arms_of(client, settings, own), asked, own)


Arms = dict[str, Together]


def arms_of(client: AsyncClient, settings: Settings, own: argparse.Namespace) -> Arms:
    arms: Arms = {mode: partial(ours, client, mode) for mode in OURS}
    if own.peers:
        for n_max in (0, *own.n_max):
            arms[f"{peers.Server.name}:{n_max}"] = partial(theirs, settings, n_max)
    return arms


async def compared(arms: Arms, texts: list[str], own: argparse.Namespace) -> None:
    rates: dict[str, list[float]] = defaultdict(list)

    async def measure(names: list[str]) -> None:
        for name in names:
            rates[name].append(await arms[name](texts, own.tokens))
            print(f"{len(texts)} at once, {name}: {rates[name][-1]:.2f} tokens/s", flush=True)

    drafting = [name for name in arms if ":" in name and not name.endswith(":0")]
    await measure(drafting)
    best = [max(drafting, key=lambda name: rates[name][0])] if drafting else []
    kept = [name for name in arms if name not in drafting or name in best]
    for name in drafting:
        rates[name].clear()
    for repetition in range(own.repetitions):
        await measure(kept[:: -1 if repetition % 2 else 1])
    medians = {name: statistics.median(rates[name]) for name in kept}
    others = {name: rate for name, rate in medians.items() if name != "auto"}
    for name in others:
        paired = [a / b for a, b in zip(rates["auto"], rates[name], strict=True)]
        ratio = statistics.median(paired)
        print(f"{len(texts):2} at once: auto {medians['auto']:.2f}, {name} {others[name]:.2f}; "
              f"{ratio:.3f} ({' '.join(f'{r:.3f}' for r in paired)})", flush=True)  # fmt: skip


async def ours(client: AsyncClient, mode: AskedMode, texts: list[str], tokens: int) -> float:
    began = time.perf_counter()
    answers = await asyncio.gather(
        *(
            client.create_completion(
                text,
                max_tokens=tokens,
                temperature=0,
                seed=0,
                ignore_eos=True,
                mode=mode,
                cache_prompt=False,
            )
            for text in texts
        )
    )
    seconds = time.perf_counter() - began
    return sum(answer.usage.completion_tokens for answer in answers) / seconds


async def theirs(settings: Settings, n_max: int, texts: list[str], tokens: int) -> float:
    setup = peers.Setup.of(settings)
    program = peers.find(peers.default_directory(), peers.Server.name)
    chosen = setup if n_max else setup.without_draft()
    async with peers.Server(program, chosen, slots=len(texts)) as server:
        await server.generate(texts[0], 4, n_max)  # it loads its models
        began = time.perf_counter()
        answers = await asyncio.gather(*(server.generate(text, tokens, n_max) for text in texts))
        seconds = time.perf_counter() - began
    return sum(answer.tokens for answer in answers) / seconds


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", type=numbers, default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="compare with scripts/build-peers'")
    parser.add_argument("--n-max", type=numbers, default="1,2,4", help="llama-server's lengths")
    own = parser.parse_args()
    settings = sources.settings({})
    pipeline = replace(settings.pipeline, parallel=max(own.at_once))
    settings = replace(settings, pipeline=pipeline)
    uvloop.run(measured(search.prepared(with_files(settings, fetch=False), print), own))
    return 0


if __name__ == "__main__":
    sys.exit(main())
