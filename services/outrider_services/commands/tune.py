"""`outrider tune`: find the fastest draft, and show what was measured of each."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.table import Table

from outrider_services.commands.prepared import with_files
from outrider_services.options import Parser
from outrider_services.table import Settings
from outrider_services.terminal import show
from outrider_services.tuning import advice, search
from outrider_services.tuning.decisions import Decision, Trial

ROWS = (1, 2, 4, 8, 16)  # of the passes whose cost is shown


def flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as a JSON object")
    parser.add_argument(
        "--pull", action="store_true", help="fetch the default pair if it is missing"
    )


def tune(settings: Settings, parsed: Any) -> int:
    decision = search.tune(with_files(settings, fetch=parsed.pull))
    if parsed.json:
        print(json.dumps(asdict(decision), indent=2))
        return 0
    show(advice.build())
    for trial in decision.trials:
        show(advice.headline(trial))
        show(kernels(trial))
        show(advice.turns(trial))
        show(measured(decision, trial))
    show("* chosen, and kept for run and serve; tokens/s are forecasts")
    show(advice.described(decision))
    return 0


def kernels(trial: Trial) -> Table:
    """What a pass of the target costs alone, with each choice of kernels; a star at the chosen."""
    rows = [n for n in ROWS if n <= len(trial.curve_s)]
    titles = (
        "",
        "target",
        "threads",
        "ms/token read",
        *(f"{n} rows" if n > 1 else "1 row" for n in rows),
    )
    table = Table(*titles, box=None)
    for one in trial.kernels:
        table.add_row(
            "*" if one == trial.kernels[-1] else "",
            f"without {one.without}" if one.without else "as built",
            str(one.threads),
            f"{1000 * one.read_s:.1f}",
            *(f"{1000 * one.curve_s[n - 1]:.0f}" for n in rows),
        )
    return table


def measured(decision: Decision, trial: Trial) -> Table:
    """Every draft that was tried on these cores, a star at the one that was chosen."""
    table = Table("", "draft", "MB", "ms/token", "acceptance", "tokens/s", "speed-up", box=None)
    for one in trial.variants:
        table.add_row(
            "*" if (trial, one) == decision.chosen() else "",
            advice.named(one),
            f"{one.bytes / 1e6:,.0f}",
            f"{1000 * one.draft_s:.1f}",
            f"{one.acceptance:.0%}",
            f"{one.rate:.1f}",
            f"{one.rate / trial.plain_rate:.2f}x",
        )
    return table
