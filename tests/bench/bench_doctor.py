"""How near the predictions of `outrider doctor` come to what `outrider bench` then measures.

Run at the top: `.venv/bin/python -m tests.bench.bench_doctor`, with the names of cases for only
those. `shared` and `split` are the default pair, which must be in the cache; all others are the toy
engine. Speeds are those over plain; what `bench` finds is the median of three repetitions, within
each category. Ends with status 1 where a prediction is off by more than a tenth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

OFF = 0.10
MODES = ("sync", "pipelined", "auto")
REPETITIONS = 3
LINKS_MS = (0.0, 2.5, 10.0, 40.0)  # each way
# what passes over more rows cost, in passes over one: 2 rows as four devices were reported
JAGGED = {
    "1.1": "2:1.1,3:1.34,8:2",
    "1.6": "2:1.6,5:2.44",
    "2.2": "2:2.2,8:3",
    "3.05": "2:3.05,4:3.9,8:5.1",
}
CASES: dict[str, tuple[str, ...]] = {
    "shared": ("--placement=shared",),
    "split": ("--placement=split",),
    **{f"round trip {2 * ms:g} ms": ("--backend=toy", f"--toy-link-ms={ms:g}") for ms in LINKS_MS},
    **{f"2 rows at {n}": ("--backend=toy", f"--toy-rows={rows}") for n, rows in JAGGED.items()},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("-n", type=int, default=96, help="tokens of each answer (default: 96)")
    parser.add_argument("--category", help="kinds of prompts (default: all)")
    args = parser.parse_args()
    if unknown := set(args.cases) - set(CASES):
        parser.error(f"no case {min(unknown)!r}; there are {', '.join(CASES)}")
    asked = ["-n", str(args.n), *(["--category", args.category] if args.category else [])]
    print(f"{'case':20} {'mode':10} {'predicted':>9} {'measured':>9} {'off':>7}")
    worst = 0.0
    for name in args.cases or CASES:
        told = outrider("doctor", *CASES[name], *asked, "--limit=600", "-o=json")
        bench = ("bench", *CASES[name], *asked, "-r", str(REPETITIONS), "-o=json")
        measured = outrider(*bench)["geometric_means"]
        for mode in MODES:
            predicted = told["forecasts"]["as placed"][mode]
            off = predicted / measured[mode] - 1
            worst = max(worst, abs(off))
            print(
                f"{name:20} {mode:10} {predicted:9.2f} {measured[mode]:9.2f} {off:+7.1%}",
                flush=True,
            )
    print(f"the farthest off: {worst:.1%}")
    return int(worst > OFF)


def outrider(*arguments: str) -> dict[str, Any]:
    """What the command says in JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "outrider_services", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"outrider {' '.join(arguments)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
