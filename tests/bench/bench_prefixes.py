"""What a known beginning saves: time to first token of later requests over the first one's.

Two cases over HTTP: the second turn of a conversation of some 1,500 tokens, and an editor's 20
completions in one file, the cursor going down line by line with 1,000 tokens of other files before
it, as llama.vim asks. Run at the top: `.venv/bin/python -m tests.bench.bench_prefixes`. Settings
come from the environment.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import secrets
import statistics
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from outrider_services import sources
from outrider_services.commands.prepared import with_files
from outrider_services.gateway.sockets import listen
from outrider_services.pipeline.launcher import Launcher
from outrider_services.terminal import News
from outrider_services.tuning import search

CORE = Path(__file__).parents[2] / "shared" / "outrider" / "core"
COMPLETIONS = 20
AHEAD = 15  # lines behind the cursor that the editor sends
TALK = "The valley lay quiet under a grey sky, and the river went its slow way to the sea. "
ANSWER_S = 600.0


async def measured(port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    turns: list[dict[str, str]] = [{"role": "user", "content": TALK * 74 + "What goes to the sea?"}]
    said, first_s = await asyncio.to_thread(chat, url, turns)
    turns += [
        {"role": "assistant", "content": said},
        {"role": "user", "content": "And what is grey?"},
    ]
    _, second_s = await asyncio.to_thread(chat, url, turns)
    ratio = second_s / first_s
    print(f"conversation: first turn {first_s:.2f} s, second {second_s:.2f} s: {ratio:.3f}")
    times = [await asyncio.to_thread(complete, url, at) for at in range(COMPLETIONS)]
    rest = statistics.median(times[1:])
    worst = max(times[1:])
    print(f"editor: first completion {times[0]:.2f} s, median of the others {rest:.2f} s "
          f"(most {worst:.2f}): {rest / times[0]:.3f}")  # fmt: skip


def chat(url: str, turns: list[dict[str, str]]) -> tuple[str, float]:
    """The answer to a conversation, and the seconds until its first text."""
    asked = {"messages": turns, "max_tokens": 24, "temperature": 0, "stream": True}
    told, first_s = events(f"{url}/v1/chat/completions", asked)
    return "".join(map(text_of, told)), first_s


def complete(url: str, at: int) -> float:
    """Seconds until the first text of the completion number `at`."""
    lines = (CORE / "reading.py").read_text("utf-8").splitlines(keepends=True)
    cursor = 20 + at
    others = [(CORE / name).read_text("utf-8") for name in ("decoding.py", "engine.py")]
    extra = [{"filename": f"{n}.py", "text": text[:2000]} for n, text in enumerate(others)]
    asked = {
        "input_prefix": "".join(lines[:cursor]),
        "prompt": lines[cursor][: len(lines[cursor]) // 2].rstrip("\n"),
        "input_suffix": "".join(lines[cursor + 1 : cursor + 1 + AHEAD]),
        "input_extra": extra,
        "n_predict": 8,
        "temperature": 0,
        "cache_prompt": True,
        "stream": True,
    }
    return events(f"{url}/infill", asked)[1]


def events(url: str, asked: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
    """What a server tells in answer, and the seconds until the first of it that has text."""
    body = json.dumps(asked).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    told: list[dict[str, Any]] = []
    first_s: float | None = None
    began = time.perf_counter()
    with urllib.request.urlopen(request, timeout=ANSWER_S) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                told.append(json.loads(line[6:]))
                if first_s is None and text_of(told[-1]):
                    first_s = time.perf_counter() - began
    return told, first_s if first_s is not None else time.perf_counter() - began


def text_of(event: dict[str, Any]) -> str:
    """What an event adds to the answer, in OpenAI's form or in llama.cpp's."""
    choices = event.get("choices")
    return (choices[0]["delta"] if choices else event).get("content") or ""


async def served(own: argparse.Namespace) -> None:
    settings = sources.settings({})
    server = replace(settings.server, port=own.port)
    settings = search.prepared(with_files(replace(settings, server=server), fetch=False), print)
    name = f"prefixes-{secrets.token_hex(4)}"
    with News() as news, listen(settings.server) as http:
        async with Launcher(settings, name, news.report, news.log, http=http):
            await measured(own.port)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=5777, help="of the gateway")
    uvloop.run(served(parser.parse_args()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
