"""Several requests at once: tokens per second of all together, drafted against plain batching.

The arms alternate within one run. Run at the top: `PYTHONPATH=. .venv/bin/python -m
tests.bench.bench_serving --at-once 1,2,4,8`. Settings come from the environment, such as
OUTRIDER_PIPELINE__BACKEND=toy for devices that are made up.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import replace

import uvloop

from outrider.client import AsyncClient, connect
from outrider.core.values import AskedMode
from outrider_services import sources
from outrider_services.bench import prompts
from outrider_services.commands.prepared import with_files
from outrider_services.options import Settings
from outrider_services.pipeline.launcher import Launcher
from outrider_services.terminal import News
from outrider_services.tuning import search

ARMS: tuple[AskedMode, ...] = ("plain", "auto")


async def measured(settings: Settings, own: argparse.Namespace) -> None:
    texts = [prompt for category in prompts.load(None, (), 3) for prompt in category.prompts]
    name = f"serving-{secrets.token_hex(4)}"
    rates: dict[tuple[int, str], list[float]] = defaultdict(list)
    with News() as news:
        async with Launcher(settings, name, news.report, news.log), connect(name) as client:
            await together(client, texts[:1], own.tokens, "auto")  # whatever comes once
            for repetition in range(own.repetitions):
                for count in map(int, own.at_once.split(",")):
                    for arm in ARMS[:: 1 if repetition % 2 else -1]:
                        rate = await together(client, list_of(texts, count), own.tokens, arm)
                        rates[count, arm].append(rate)
                        print(f"{count} at once, {arm}: {rate:.2f} tokens/s", flush=True)
    for count in map(int, own.at_once.split(",")):
        plain, auto = (statistics.median(rates[count, arm]) for arm in ARMS)
        ratios = [a / p for a, p in zip(rates[count, "auto"], rates[count, "plain"], strict=True)]
        ratio = statistics.median(ratios)
        print(f"{count:2} at once: plain {plain:.2f}, auto {auto:.2f} tokens/s; {ratio:.3f}")


def list_of(texts: list[str], count: int) -> list[str]:
    return [texts[n % len(texts)] for n in range(count)]


async def together(client: AsyncClient, texts: list[str], tokens: int, mode: AskedMode) -> float:
    """Tokens per second of all these requests at once, from the first question to the last end."""
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--at-once", default="1,2,4,8")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=3)
    own = parser.parse_args()
    settings = sources.settings({})
    most = max(map(int, own.at_once.split(",")))
    settings = replace(settings, pipeline=replace(settings.pipeline, parallel=most))
    uvloop.run(measured(search.prepared(with_files(settings, fetch=False), print), own))
    return 0


if __name__ == "__main__":
    sys.exit(main())
