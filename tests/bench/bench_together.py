"""Requests at once on made-up devices, in virtual time: auto over plain batching and fixed lengths.

A pass costs the same whatever its rows, a drafted token a tenth of it. The fixed length is the best
of several, chosen with hindsight for each row of the table. About two minutes; run at the top:
`PYTHONPATH=. .venv/bin/python -m tests.bench.bench_together`.
"""

from __future__ import annotations

import sys

from tests.sim.simulator import Priced
from tests.sim.test_together import ended, plain_batching_s, simulated

from outrider.core.rules import FixedRule

AGREEMENTS = (0.6, 0.8, 0.9)
COUNTS = (1, 2, 4, 8, 16, 32, 64)
LENGTHS = (1, 2, 3, 4, 6, 8, 12)


def gain(rule: Priced | FixedRule, count: int, agreement: float) -> float:
    """How many times as fast as the same requests without a draft."""
    return plain_batching_s(count) / ended(simulated(rule, count, agreement=agreement))


def main() -> int:
    print("agreement  requests   auto  best fixed length  auto over it")
    for agreement in AGREEMENTS:
        for count in COUNTS:
            own = gain(Priced("pipelined"), count, agreement)
            fixed = {n: gain(FixedRule("pipelined", n), count, agreement) for n in LENGTHS}
            best = max(fixed, key=lambda n: fixed[n])
            print(
                f"{agreement:9.1f} {count:9} {own:6.2f} {fixed[best]:11.2f} ({best:2})"
                f"{own / fixed[best]:14.3f}",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
