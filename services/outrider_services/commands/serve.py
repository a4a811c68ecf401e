"""`outrider serve`: a pipeline that stays up for clients."""

from __future__ import annotations

import asyncio
import socket
from contextlib import nullcontext
from typing import Any

import uvloop

from outrider.core.values import Role
from outrider.engines import suffix
from outrider_services.commands.hosts import share_of
from outrider_services.commands.prepared import (
    has_draft,
    with_file_of_worker,
    with_files,
    with_free_draft,
)
from outrider_services.commands.signals import signalled, until_signalled
from outrider_services.commands.supervisor import notify
from outrider_services.gateway.sockets import listen, url_of
from outrider_services.options import Parser
from outrider_services.pipeline.launcher import Launcher, first_of
from outrider_services.pipeline.lone import LoneWorker
from outrider_services.table import Settings
from outrider_services.terminal import News, tell
from outrider_services.tuning import search


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--name", default="default", help="what clients call it (default: default)")
    add("--pull", action="store_true", help="fetch the default pair if it is missing")
    add("--here", default="", metavar="HOST", help="which of the hosts in the file this machine is")


def serve(settings: Settings, parsed: Any) -> int:
    """Start the pipeline, and keep it up until a signal or `outrider stop`.

    After the first signal it finishes its requests; the second ends it at once. Of a file for
    several hosts, start what belongs on this one.
    """
    share = share_of(settings, parsed.here)
    settings = share.settings
    if share.worker:
        return _work(share.worker, settings, share.address)
    with nullcontext() if settings.server.no_gateway else listen(settings.server) as http:
        settings = with_free_draft(with_files(settings, fetch=parsed.pull))
        settings = search.prepared(settings, tell)
        return uvloop.run(_serve(settings, parsed.name, http))


def _work(role: Role, settings: Settings, address: str) -> int:
    """Keep up a worker of the pipeline whose coordinator is on another host."""
    settings = with_file_of_worker(settings, role)
    news = News(as_json=settings.log.format == "json")
    worker = LoneWorker(role, settings, address, news.report, news.log)

    def on_ready() -> None:
        tell(f"Ready: the {role} worker of {address}")
        notify("READY=1")

    with news:
        return uvloop.run(until_signalled(worker.run(on_ready)))


async def _serve(settings: Settings, name: str, http: socket.socket | None) -> int:
    stop = signalled()
    draft = has_draft(settings)
    news = News(as_json=settings.log.format == "json")
    launcher = Launcher(settings, name, news.report, news.log, draft=draft, http=http)
    with news:
        entered = asyncio.ensure_future(launcher.__aenter__())
        await first_of(entered, stop)
        if not entered.done():
            entered.cancel()
            await asyncio.wait([entered])
            return stop.result()
        entered.result()
    try:
        if draft and settings.draft.model == suffix.NAME:
            tell("No draft model: where a text repeats itself, what followed then is drafted.")
        address = f"{url_of(http)} | " if http else ""
        addresses = [name, *launcher.addresses]
        tell(f"Ready: {address}outrider run --connect {' | '.join(addresses)}")
        notify("READY=1")
        await first_of(launcher.failed, stop)
        notify("STOPPING=1")
        if stop.done():
            await _drain(launcher, settings.coordinator.drain_s)
            return stop.result()
        launcher.failed.result()
        return 0
    finally:
        await launcher.stop()


async def _drain(launcher: Launcher, limit_s: float) -> None:
    """Finish what was asked for, unless that takes too long or another signal comes."""

    def say(count: int) -> None:
        if count:
            ones = "1 request" if count == 1 else f"{count} requests"
            tell(f"Finishing {ones}, for {limit_s:g} s at most; another signal ends at once.")

    if limit_s:
        again = signalled()
        draining = asyncio.ensure_future(launcher.drain(say))
        ends: list[asyncio.Future[Any]] = [draining, again]
        await asyncio.wait(ends, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        await asyncio.gather(draining, return_exceptions=True)
