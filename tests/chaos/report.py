"""The table of what was wanted and what was measured, and the command that prints it."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from rich.table import Table
from tests.attack.service import end_on_sigterm
from tests.chaos import between, bugs, fuzz, hosts, house, kills, others
from tests.chaos.campaign import Campaign, Plan, Result

from outrider_services.terminal import show, tell

DESCRIPTION = """Make trouble for pipelines on the toy engine, campaign by campaign, and show what
was wanted of each and what was measured.

Every answer is compared with the reference. A campaign has not passed if in it a token was wrong, a
client was left waiting, an answer failed that must not, or something was left behind. All that is
random comes from the seed; what went wrong is told with what repeats it. Everything is on loopback,
or in network namespaces of its own, and is ended. The exit status is 1 if a campaign has not
passed. On a busy machine, times say little."""

CAMPAIGNS = (
    Campaign(
        "worlds",
        "10,000 pipelines in virtual time: late, lost, repeated, overtaken and damaged messages; "
        "whoever dies, hangs, lies, is slow, leaves or comes back",
        house.campaign,
    ),
    Campaign(
        "kill",
        "200 kill -9 of each process at random moments, under eight streams",
        kills.kill,
    ),
    Campaign("stop", "200 SIGSTOP of each, of 0.1 to 2 s", kills.stop),
    Campaign(
        "proxy",
        "200,000 messages of real processes through proxies that delay, drop, repeat, reorder, "
        "damage and say them again",
        between.run,
    ),
    Campaign(
        "fuzz",
        "10 million malformed frames; messages, HTTP bodies, model files, settings",
        fuzz.run,
    ),
    Campaign("planted", "bugs planted in our own code, each to be caught by its test", bugs.run),
    Campaign(
        "hosts",
        "draft or target on another host (two network namespaces), at round trips of 0 to 80 ms "
        "with jitter and stalls",
        hosts.run,
    ),
    Campaign("attack", "all arms of scripts/attack", others.attack),
    Campaign("soak", "an hour of scripts/soak", others.soak),
)
BY_NAME = {one.name: one for one in CAMPAIGNS}
VERDICTS = {True: "yes", False: "NO", None: "-"}


def table_of(results: dict[str, Result]) -> Table:
    table = Table("campaign", "quantity", "wanted", "measured", "passed", box=None, pad_edge=False)
    for name, result in results.items():
        for row in result.rows:
            table.add_row(name, row.quantity, row.wanted, row.measured, VERDICTS[row.passed])
    return table


def done(campaigns: Sequence[Campaign], plan: Plan) -> dict[str, Result]:
    """Run these; a line to stderr as each begins and ends."""
    results: dict[str, Result] = {}
    for campaign in campaigns:
        began = time.monotonic()
        tell(f"{campaign.name}: {campaign.help}")
        try:
            result = campaign.run(plan)
        except RuntimeError as exc:
            result = Result(complaints=[str(exc)])
        results[campaign.name] = result
        verdict = "as it should be" if result.passed else "NOT as it should be"
        tell(f"{campaign.name}: {verdict} after {time.monotonic() - began:.0f} s")
        for complaint in result.complaints:
            tell(f"  {complaint}")
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--share", type=float, default=1.0, metavar="X", help="this part of everything, as 0.1")
    add("--seed", type=int, default=1, metavar="N", help="of all that is random (default: 1)")
    add("--jobs", type=int, default=min(4, os.cpu_count() or 1), metavar="N", help="at once")
    add("--only", action="append", choices=BY_NAME, metavar="NAME", help="this one (repeatable)")
    add("--pair", action="store_true", help="on the default pair of models: kill, stop and hosts")
    add("--list", action="store_true", help="show the campaigns and do nothing")
    parsed = parser.parse_args(arguments)
    if not 0 < parsed.share <= 100 or parsed.jobs < 1:
        parser.error("--share must be above 0 and at most 100, --jobs at least 1")
    chosen = [BY_NAME[name] for name in parsed.only] if parsed.only else list(CAMPAIGNS)
    if parsed.list:
        table = Table("campaign", "what is done", box=None)
        for campaign in chosen:
            table.add_row(campaign.name, campaign.help)
        show(table)
        return 0
    end_on_sigterm()
    results = done(chosen, Plan(parsed.share, parsed.seed, parsed.jobs, parsed.pair))
    show(table_of(results))
    failed = [name for name, result in results.items() if not result.passed]
    show(f"{len(results) - len(failed)} of {len(results)} campaigns passed "
         f"(share {parsed.share:g}, seed {parsed.seed})")  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
