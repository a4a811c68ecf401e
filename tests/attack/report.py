"""The table of outcomes, and the command that prints it."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from tests.attack.arms import ARMS, BY_NAME, Arm
from tests.attack.campaign import SLOWER, Campaign, Result
from tests.attack.service import end_on_sigterm

from outrider_services.terminal import show, tell

DESCRIPTION = """Attack a pipeline on the toy engine, and tell what broke.

Each arm starts `outrider serve` in a runtime directory of its own, on loopback alone, lets clients
ask that have nothing to do with the attack, and attacks. Every answer is compared with the
reference. The attackers are processes of their own with a low priority, so that what shows is
outrider's own weakness, not that the machine has few cores. Whatever was started is ended.

The usual time of an answer is the median of calm phases, before each arm. It is about a second of
mostly waiting for a made-up device. Beside the attacked pipeline runs a twin that nobody attacks:
if its answers are slower at the same moment, then so is the machine, and the limit rises with it.

The exit status is 1 if in any arm a token was wrong, a client waited 5 s without token, end or
error (time in which we had stopped a process not counted), an answer failed otherwise than it may
in this arm, an undisturbed answer took more than 1.5 times its usual time, or a process holds more
than 1.3 times its private memory (plus 2 MiB), or more descriptors, 10 s after it was over."""


def table_of(results: Sequence[Result]) -> Table:
    columns = (
        "arm", "attack", "answers", "right", "wrong", "failed", "hung", "untyped", "usual s",
        "slowest × usual (twin)", "private MiB", "peak MiB", "descriptors", "CPU s", "verdict",
    )  # fmt: skip
    table = Table(*columns, box=None, pad_edge=False)
    for result in results:
        table.add_row(*_row(result))
    return table


def _row(result: Result) -> list[str]:
    counts = [str(result.count(kind)) for kind in ("right", "wrong")]
    failed = ", ".join(f"{n} {code}" for code, n in result.codes.items()) or "0"
    after = [str(result.count(kind)) for kind in ("hung", "untyped")]
    slowest = "-" if result.slowest is None else f"{result.slowest:.2f} ({result.noise:.2f})"
    roles = [role for role in result.before if role in result.after]
    memory = [
        f"{role} {result.before[role].memory / 2**20:.0f}→{result.after[role].memory / 2**20:.0f} "
        f"({result.after[role].memory / result.before[role].memory:.2f})"
        for role in roles
    ]
    files = [f"{result.before[r].descriptors}→{result.after[r].descriptors}" for r in roles]
    return [
        result.arm.name,
        result.told,
        str(len(result.outcomes)),
        *counts,
        failed,
        *after,
        f"{result.usual_s:.2f}" if result.arm.timed else "-",
        slowest,
        ", ".join(memory),
        ", ".join(f"{result.after[r].peak / 2**20:.0f}" for r in roles),
        ", ".join(files),
        f"{result.cpu_s:.2f}",
        "; ".join(result.complaints) or "as it should be",
    ]


async def attacked(
    arms: Sequence[Arm], share: float, seed: int, logs: Path | None = None
) -> list[Result]:
    """Run these arms, those whose times do not count together; a line to stderr as each ends."""
    campaign = Campaign(share, seed, logs)

    async def run(arm: Arm) -> Result:
        result = await campaign.run(arm)
        tell(f"{arm.name}: {'; '.join(result.complaints) or 'as it should be'}")
        return result

    async with campaign.twin():
        results = [await run(arm) for arm in arms if arm.timed]
        return results + await asyncio.gather(*(run(arm) for arm in arms if not arm.timed))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/attack",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--share", type=float, default=1.0, metavar="X", help="this part of everything, as 0.1")
    add("--seed", type=int, default=1, metavar="N", help="of all that is random (default: 1)")
    add("--only", action="append", choices=BY_NAME, metavar="ARM", help="this arm (repeatable)")
    add("--list", action="store_true", help="show the arms and do nothing")
    add("--logs", type=Path, metavar="DIR", help="where to leave each pipeline's log")
    parsed = parser.parse_args(arguments)
    if not 0 < parsed.share <= 10:
        parser.error("--share must be above 0 and at most 10")
    arms = [BY_NAME[name] for name in parsed.only] if parsed.only else list(ARMS)
    if parsed.list:
        table = Table("arm", "what is done", "share 1", box=None)
        for arm in arms:
            table.add_row(arm.name, arm.help, str(arm.times(1.0)))
        show(table)
        return 0
    end_on_sigterm()
    results = asyncio.run(attacked(arms, parsed.share, parsed.seed, parsed.logs))
    show(table_of(results))
    failed = [result.arm.name for result in results if result.complaints]
    show(f"{len(results) - len(failed)} of {len(results)} arms are as they should be "
         f"(answers at most {SLOWER} × usual; seed {parsed.seed})")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
