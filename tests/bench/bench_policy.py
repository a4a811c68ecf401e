"""What each policy gains over the target alone on the recorded traces.

Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_policy`, with the name of a file
that `outrider bench --record` has written for other traces than those of the default pair.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tests.sim.replay import PROCESSOR, TRACES, speedups

from outrider.core.rules import FixedRule
from outrider_services.bench.replay import World
from outrider_services.bench.results import geometric_mean

WORLD = World(PROCESSOR, 0.031)


def main() -> None:
    if len(sys.argv) > 1:
        TRACES.clear()
        TRACES.update(json.loads(Path(sys.argv[1]).read_text()))
    rules: dict[str, Any] = {f"sync, {n}": lambda n=n: FixedRule("sync", n) for n in (3, 4, 5)}
    rules["sync, price of time"] = lambda: WORLD.rule("sync")
    rules |= {f"pipelined, {n}": lambda n=n: FixedRule("pipelined", n) for n in (3, 5, 8, 12)}
    rules["pipelined, price of time"] = lambda: WORLD.rule("pipelined")
    print(f"{'':26}", *(f"{name[:11]:>11}" for name in TRACES), "geometric mean")
    for name, rule in rules.items():
        figures = speedups(rule, WORLD)
        print(
            f"{name:26}",
            *(f"{x:11.2f}" for x in figures.values()),
            f"{geometric_mean(figures.values()):14.2f}",
        )


if __name__ == "__main__":
    main()
