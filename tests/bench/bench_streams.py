"""Many streams for a minute on made-up devices: what is lost, how long one stands still.

Each of --streams clients asks the same again and again, so its texts must be equal. Run at the top:
`PYTHONPATH=. .venv/bin/python -m tests.bench.bench_streams`. The exit status is 1 if they are not,
or if something is left running.
"""

from __future__ import annotations

import argparse
import asyncio
import secrets
import sys
import time
from dataclasses import dataclass, field

import uvloop

from outrider.client import AsyncClient, connect
from outrider_services import sources
from outrider_services.pipeline.launcher import Launcher
from outrider_services.terminal import News


@dataclass
class Heard:
    answers: int = 0
    tokens: int = 0
    longest_s: float = 0.0  # between two fragments of one stream, or before its first
    texts: dict[int, set[str]] = field(default_factory=dict)  # by client


async def ask(client: AsyncClient, number: int, until: float, heard: Heard) -> None:
    while time.monotonic() < until:
        stream = await client.create_completion(
            f"stream {number} ", max_tokens=120, temperature=0, ignore_eos=True, stream=True
        )
        last = time.monotonic()
        async for fragment in stream:
            now = time.monotonic()
            heard.longest_s, last = max(heard.longest_s, now - last), now
            heard.tokens += len(fragment.tokens)
        heard.answers += 1
        heard.texts.setdefault(number, set()).add((await stream.result()).text)


async def measured(streams: int, seconds: float) -> int:
    costs = {"toy.step_ms": 20.0, "toy.draft_ms": 2.0, "toy.row_ms": 0.02}
    settings = sources.settings({"pipeline.backend": "toy", "pipeline.parallel": streams, **costs})
    name, heard = f"streams-{secrets.token_hex(4)}", Heard()
    with News() as news:
        async with Launcher(settings, name, news.report, news.log), connect(name) as client:
            began = time.monotonic()
            until = began + seconds
            await asyncio.gather(*(ask(client, n, until, heard) for n in range(streams)))
            took_s = time.monotonic() - began
            left = (await client.health())["requests"]
    differing = sum(len(texts) > 1 for texts in heard.texts.values())
    print(f"{heard.answers} answers of {streams} streams, {heard.tokens / took_s:.0f} tokens/s; "
          f"longest wait {heard.longest_s:.2f} s; clients with differing texts: {differing}; "
          f"left: {left}")  # fmt: skip
    return int(differing > 0 or any(left.values()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    own = parser.parse_args()
    return uvloop.run(measured(own.streams, own.seconds))


if __name__ == "__main__":
    sys.exit(main())
