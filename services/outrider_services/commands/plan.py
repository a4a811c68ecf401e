"""`outrider plan`: how many pairs so many users need, and what each of them gets."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import uvloop
from rich.table import Table

from outrider.errors import ConfigError
from outrider_services.bench.planning import MOST_USERS, Devices, Load, fewest, measured, plans
from outrider_services.commands.signals import until_signalled
from outrider_services.options import Parser
from outrider_services.table import Settings
from outrider_services.terminal import show, tell

SHARED = 2  # targets that one draft worker may work for
MOST_TOKENS = 4096


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add("--users", type=int, required=True, metavar="N", help="who ask at the same time")
    add(
        "--devices",
        required=True,
        metavar="FILE",
        help="what a pair costs: what `outrider doctor -o json` printed, or TOML with [target] "
        "step_ms and rows (passes over 1, 2, 3 … rows, in steps), [draft] token_ms, and acceptance",
    )
    add(
        "--tokens-per-s",
        type=float,
        default=10.0,
        metavar="X",
        help="that each user is to get (default: 10)",
    )
    add(
        "-n",
        "--n-predict",
        type=int,
        default=64,
        metavar="N",
        help="tokens of each answer that is simulated (default: 64)",
    )
    add("-o", "--output", choices=["text", "json"], default="text")


def plan(settings: Settings, parsed: Any) -> int:
    """Measure simulated pairs, in real time, and tell what so many users need.

    Raises ConfigError for numbers out of range, and for a file that does not tell the costs.
    """
    ranges = ("--users", parsed.users, 1, 1 << 20), ("-n", parsed.n_predict, 2, MOST_TOKENS)
    for flag, value, least, most in ranges:
        if not least <= value <= most:
            raise ConfigError(f"{flag} must be from {least} to {most}, not {value}")
    if not parsed.tokens_per_s > 0:
        raise ConfigError("--tokens-per-s must be above 0")
    devices = Devices.read(Path(parsed.devices))
    found: dict[int, list[Load]] = {}

    async def measure() -> None:
        for sharing in (1, SHARED):
            tell(f"Simulating a pair whose draft works for {sharing} …")
            found[sharing] = await measured(
                settings, devices, parsed.users, parsed.n_predict, sharing
            )

    if stopped := uvloop.run(until_signalled(measure())):
        return stopped
    if parsed.output == "json":
        told = {
            "devices": asdict(devices),
            "plans": {
                str(n): [asdict(one) for one in plans(of, parsed.users)] for n, of in found.items()
            },
        }
        print(json.dumps(told, indent=2))
    else:
        write(found, parsed.users, parsed.tokens_per_s)
    return 0


def write(found: dict[int, list[Load]], users: int, tokens_per_s: float) -> None:
    """For people: the fewest pairs first, then all numbers of them."""
    of = {sharing: plans(loads, users) for sharing, loads in found.items()}
    if best := fewest(of[1], tokens_per_s):
        drafts = "each with a draft of its own"
        shared = fewest(of[SHARED], tokens_per_s)
        if shared and shared.pairs <= best.pairs:
            best, drafts = shared, f"with a draft for every {SHARED} targets"
        count = "1 pair" if best.pairs == 1 else f"{best.pairs} pairs"
        show(
            f"{count}, {drafts}, for {users} users: {best.tokens_per_s:.1f} tokens/s each, the "
            f"first after {best.first_s:.2f} s."
        )
    else:
        show(f"No number of pairs gives {users} users {tokens_per_s:g} tokens/s each.")
    table = Table(
        "pairs", "users each", "tokens/s each", "in all", "first token, s", "shared draft"
    )
    shared_by = {one.pairs: one.tokens_per_s for one in of[SHARED]}
    for one in of[1]:
        numbers = one.tokens_per_s, one.all_tokens_per_s
        cells = [f"{number:.1f}" for number in numbers]
        shared_cell = f"{shared_by[one.pairs]:.1f}" if one.pairs in shared_by else ""
        table.add_row(str(one.pairs), str(one.users), *cells, f"{one.first_s:.2f}", shared_cell)
    show(table)
    if users > MOST_USERS:
        show(f"A pair serves {MOST_USERS} at once, at most.")
