"""The verbs that are a process of a pipeline: a worker, and, for ourselves alone, the others."""

from __future__ import annotations

import argparse
import socket
from typing import Any

from outrider.wire.addresses import address_of
from outrider_services.commands.prepared import with_file_of_worker
from outrider_services.gateway.sockets import listen, url_of
from outrider_services.options import Parser, reach
from outrider_services.pipeline import processes
from outrider_services.table import Settings
from outrider_services.terminal import tell
from outrider_services.tuning import probe


def worker_flags(parser: Parser) -> None:
    parser.add_argument(
        "--connect", required=True, metavar="ADDRESS", help="the coordinator's address"
    )
    parser.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)


def worker(settings: Settings, parsed: Any) -> int:
    """`outrider worker ROLE`: serve the coordinator at `--connect` until it or a signal ends it."""
    settings = with_file_of_worker(settings, parsed.role)
    processes.worker(parsed.role, settings, address_of(parsed.connect), parsed.parent_fd)
    return 0


def coordinator_flags(parser: Parser) -> None:
    parser.add_argument("--name", default="default")
    for flag in ("--own", "--open"):
        parser.add_argument(flag, action="append", default=[], choices=("target", "draft"))
    parser.add_argument("--parent-fd", type=int)


def coordinator(settings: Settings, parsed: Any) -> int:
    own = {role: role in parsed.open for role in parsed.own}
    processes.coordinator(settings, parsed.name, own, parsed.parent_fd)
    return 0


def gateway_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--connect", default="default", metavar="PIPELINE", help="its name or address")
    add("--fd", type=int, help=argparse.SUPPRESS)
    add("--parent-fd", type=int, help=argparse.SUPPRESS)


def gateway(settings: Settings, parsed: Any) -> int:
    """`outrider gateway`: HTTP for the pipeline at `--connect`, until a signal ends it."""
    from outrider_services.gateway.server import serve  # nobody else waits for its libraries

    address, links = address_of(parsed.connect), settings.links
    with listen(settings.server) if parsed.fd is None else socket.socket(fileno=parsed.fd) as http:
        if parsed.parent_fd is None:
            tell(f"Ready: {url_of(http)}")
        serving = serve(settings.server, address, http, **reach(links, address))
        processes.run(serving, parsed.parent_fd, lambda: None)
    return 0


def measure_flags(parser: Parser) -> None:
    parser.add_argument("job")
    parser.add_argument("--parent-fd", type=int)


def measure(settings: Settings, parsed: Any) -> int:
    return probe.answer(parsed.job, parsed.parent_fd)
