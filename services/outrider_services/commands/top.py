"""`outrider top`: what a pipeline is doing, once or as a screen that changes every second."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TextIO, cast

import uvloop
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from outrider.client import AsyncClient, connect
from outrider_services.commands.signals import until_signalled
from outrider_services.options import Parser, reach
from outrider_services.outlet import Outlet
from outrider_services.table import LinkOptions, Settings
from outrider_services.terminal import show

EACH_S = 1.0  # between two looks
SHOWN = ("role", "model", "device", "busy", "passes_per_s")  # of a worker
MORE = ("requests", "worth", "link_s")  # what it has to do, what a draft is worth, how far it is
BAR = 20  # characters of a whole second of computing
EIGHTHS = "▏▎▍▌▋▊▉"


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("name", nargs="?", default="default", help="name or address (default: default)")
    add("--once", action="store_true", help="show it once, after a second; so does a pipe")
    add("--json", action="store_true", help="show it once, as a JSON object")


def top(settings: Settings, parsed: Any) -> int:
    """Show the pipeline until q or Ctrl-C; without a terminal, once."""
    if parsed.json or parsed.once or not sys.stdout.isatty():
        return uvloop.run(until_signalled(_once(parsed.name, settings.links, parsed.json)))
    return uvloop.run(until_signalled(_live(parsed.name, settings.links)))


async def _once(name: str, links: LinkOptions, as_json: bool) -> None:
    async with connect(name, **reach(links, name)) as client:
        before = await look(client)
        await asyncio.sleep(EACH_S)
        picture = compare(name, before, await look(client))
    if as_json:
        print(json.dumps(picture, indent=2))
    else:
        show(screen(picture))


async def _live(name: str, links: LinkOptions) -> None:
    out = Outlet(sys.stdout.fileno(), sys.stdout.encoding)  # a terminal may be stopped by Ctrl-S
    console = Console(file=cast(TextIO, out))
    over = asyncio.Event()
    try:
        async with connect(name, **reach(links, name)) as client:
            now = await look(client)
            with (
                keys(lambda key: over.set() if key in "qQ" else None),
                Live(console=console, screen=True, auto_refresh=False) as live,
            ):
                live.update(screen(compare(name, now, now)), refresh=True)
                while not await passes(EACH_S, over.wait()):
                    before, now = now, await look(client)
                    live.update(screen(compare(name, before, now)), refresh=True)
    finally:
        out.last()


async def passes(within_s: float, event: Coroutine[Any, Any, Any]) -> bool:
    """Whether the event comes within this time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event
            return True
    return False


@contextmanager
def keys(pressed: Callable[[str], None]) -> Iterator[None]:
    """Have `pressed` called with each key, where stdin is a terminal; it echoes none meanwhile."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd, loop = sys.stdin.fileno(), asyncio.get_running_loop()

    def read() -> None:
        data = b""
        with suppress(OSError):  # the terminal is gone
            data = os.read(fd, 64)
        for key in data.decode("utf-8", "replace"):
            pressed(key)
        if not data:
            loop.remove_reader(fd)

    before = termios.tcgetattr(fd)
    tty.setcbreak(fd, termios.TCSANOW)  # at once: a stopped terminal takes in nothing more
    loop.add_reader(fd, read)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        termios.tcsetattr(fd, termios.TCSANOW, before)


# ---- what there is to see -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Look:
    """What a pipeline has told."""

    at: float
    health: dict[str, Any]
    metrics: dict[str, Any]


async def look(client: AsyncClient) -> Look:
    health, metrics = await client.health(), await client.metrics()
    return Look(time.monotonic(), health, metrics)


def compare(name: str, before: Look, now: Look) -> dict[str, Any]:
    """The pipeline as it is now; rates of all requests together are those since `before`."""
    health, counts = now.health, now.metrics
    elapsed_s = max(now.at - before.at, 1e-3)
    generated = counts["generation_tokens_total"] - before.metrics["generation_tokens_total"]
    verified = counts["spec_decode_num_draft_tokens_total"]
    accepted = counts["spec_decode_num_accepted_tokens_total"]
    workers = health["workers"]
    return {
        "name": name,
        **{key: health[key] for key in ("status", "mode", "uptime_s")},
        "lanes": [
            {
                "lane": lane,
                **{key: worker[key] for key in SHOWN},
                **{key: worker.get(key) for key in MORE},
            }
            for lane, worker in sorted(workers.items(), key=is_no_target)
        ],
        "requests": [{"id": int(number), **slot} for number, slot in health["slots"].items()],
        **health["requests"],
        "tokens_per_s": generated / elapsed_s,
        "acceptance_rate": accepted / verified if verified else None,
        "generated_tokens": counts["generation_tokens_total"],
        "prompt_tokens": counts["prompt_tokens_total"],
    }  # fmt: skip


def is_no_target(named: tuple[str, dict[str, Any]]) -> bool:
    """For sorting: targets come first, and else those that joined first."""
    return bool(named[1]["role"] != "target")


def screen(picture: dict[str, Any]) -> RenderableType:
    """The picture as people read it."""
    total = (
        f"{picture['running']} running, {picture['waiting']} waiting; "
        f"{picture['tokens_per_s']:.1f} tokens/s, "
        f"{percent(picture['acceptance_rate'])} of the drafted tokens accepted; "
        f"{picture['generated_tokens']} tokens in {duration(picture['uptime_s'])}"
    )
    title = f"{picture['name']}: {picture['status']}, {picture['mode']}"
    return Group(
        Text(printable(title), style="bold"), Text(total), Text(), _lanes(picture["lanes"]),
        Text(), _requests(picture["requests"]),
    )  # fmt: skip


def _lanes(lanes: list[dict[str, Any]]) -> Table:
    numbers = ("passes/s>", "requests>", "worth>", "link>")
    table = _table("lane", "busy>", "", *numbers, "model", "device")
    for one in lanes:
        told = [Text(printable(one[key])) for key in ("model", "device")]
        style = "green" if one["role"] == "target" else "cyan"
        requests, worth, link_s = (one[key] for key in MORE)
        table.add_row(
            one["lane"],
            percent(one["busy"]),
            Text(bar(one["busy"]), style=style),
            f"{one['passes_per_s']:.1f}",
            "-" if requests is None else str(requests),
            "-" if worth is None else f"{worth:.1f} tokens/s",
            "-" if link_s is None else f"{link_s * 1000:.1f} ms",
            *told,
        )
    return table


def _requests(requests: list[dict[str, Any]]) -> Table:
    numbers = ("prompt>", "generated>", "tokens/s>", "accepted>")
    table = _table("request", "phase", "mode", *numbers)
    for one in requests:
        rate = one.get("tokens_per_s")
        table.add_row(
            str(one["id"]),
            one["phase"],
            one.get("mode", ""),
            str(one["prompt_tokens"]),
            str(one.get("generated_tokens", 0)),
            "-" if rate is None else f"{rate:.1f}",
            percent(one.get("acceptance_rate")),
        )
    return table


def _table(*names: str) -> Table:
    """A table whose columns with a `>` are numbers."""
    columns = [
        Column(name.rstrip(">"), justify="right" if name.endswith(">") else "left")
        for name in names
    ]
    return Table(*columns, box=None, pad_edge=False)


def bar(share: float) -> str:
    """A bar as long as the share of `BAR`, to an eighth of a character."""
    whole, part = divmod(round(share * BAR * 8), 8)
    return ("█" * whole + (EIGHTHS[part - 1] if part else "")).ljust(BAR)


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"


def duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def printable(text: str) -> str:
    """The text without what would move a terminal's cursor: a remote worker may have written it."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)
