"""`outrider ps` and `outrider stop`: pipelines that are up on this machine."""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from typing import Any

import uvloop
from rich.table import Table

from outrider.client import connect
from outrider.errors import ConfigError, ConnectionFailed, RequestTimeout
from outrider.wire.addresses import address_of, runtime_dir
from outrider_services.options import Parser, reach
from outrider_services.table import LinkOptions, Settings
from outrider_services.terminal import show

ANSWER_S = 1.0  # most that a coordinator on this machine may take to answer
STOP_S = 60.0  # how long requests may still take
LOOK_S = 0.1  # between two looks at whether it is gone


def ps_flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as a JSON array")


def ps(settings: Settings, parsed: Any) -> int:
    found = uvloop.run(_pipelines())
    if parsed.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table("name", "status", "mode", "target", "draft", "running", "waiting", box=None)
    for one in found:
        workers, requests = one["workers"], one["requests"]
        names = [models(workers, role) for role in ("target", "draft")]
        counts = [str(requests["running"]), str(requests["waiting"])]
        table.add_row(one["name"], one["status"], one["mode"], *names, *counts)
    show(table)
    return 0


def models(workers: dict[str, Any], role: str) -> str:
    """The models of this role; one that several workers have with their number."""
    found = Counter(worker["model"] for worker in workers.values() if worker["role"] == role)
    return (
        ", ".join(f"{count} x {one}" if count > 1 else one for one, count in found.items()) or "-"
    )


async def _pipelines() -> list[dict[str, Any]]:
    """The health of each pipeline that answers, by name."""

    async def ask(name: str) -> dict[str, Any] | None:
        try:
            async with connect(name, timeout_s=ANSWER_S) as client:
                return {"name": name, **await client.health(timeout_s=ANSWER_S)}
        except (ConnectionFailed, RequestTimeout):
            return None  # left over from a pipeline that was killed, or frozen

    names = sorted(path.stem for path in runtime_dir().glob("*.sock"))
    return [one for one in await asyncio.gather(*map(ask, names)) if one]


def stop_flags(parser: Parser) -> None:
    parser.add_argument("name", nargs="?", default="default", help="name or address")


def stop(settings: Settings, parsed: Any) -> int:
    """Ask it to end, and wait until it is gone. Raises ConfigError after `STOP_S`."""
    uvloop.run(_stop(parsed.name, settings.links))
    return 0


async def _stop(name: str, links: LinkOptions) -> None:
    async with connect(name, role="admin", **reach(links, name)) as client:
        await client.stop()
    path = address_of(name).removeprefix("ipc://")
    for _ in range(round(STOP_S / LOOK_S)):
        if not await asyncio.to_thread(os.path.exists, path):
            return
        await asyncio.sleep(LOOK_S)
    raise ConfigError(f"{name} is still finishing its requests")
