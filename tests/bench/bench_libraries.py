"""What builds of llama.cpp cost, pass by pass in turns, and both workers at once.

    python -m tests.bench.bench_libraries here=- other=/path/to/lib untiled=-,GGML_CPU_TILED_MM=0

A name, then the folder of a build's libraries ("-": the installed one), then variables for it. Run
from the project's root with the Python of `.venv`; the default pair must be in the cache.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
from collections.abc import Iterator
from unittest.mock import patch

from outrider_services import sources
from outrider_services.commands.prepared import with_files
from outrider_services.table import Settings
from outrider_services.tuning import decisions
from outrider_services.tuning.probe import Job, Partner

ROWS, ROUNDS = (1, 2, 4, 6, 8, 16, 64), 9
AT_ONCE = 60  # passes of the target, and three times as many of the draft


@contextlib.contextmanager
def pair(arm: str, settings: Settings) -> Iterator[tuple[Partner, Partner]]:
    """The target and the draft, as q4_0, of this build."""
    folder, *variables = arm.split(",")
    changed = dict(one.split("=", 1) for one in variables)
    if folder != "-":
        changed["LLAMA_CPP_LIB_PATH"] = folder
    target, draft = settings.target, settings.draft
    drafted = str(decisions.variant_path(str(draft.model), "q4_0"))
    jobs = (
        Job(str(target.model), target.threads, turns=True),
        Job(drafted, draft.threads, drafts=True, turns=True),
    )
    with contextlib.ExitStack() as stack:
        with patch.dict(os.environ, changed):
            both = [stack.enter_context(Partner(job)) for job in jobs]
        for one in both:
            one.read()
        yield both[0], both[1]


def at_once(target: Partner, draft: Partner) -> tuple[float, float]:
    """Passes of one row a second, of each while the other computes, too."""
    for one, passes in ((target, AT_ONCE), (draft, 3 * AT_ONCE)):
        one.ask(1, passes)
    return 1 / target.read(), 1 / draft.read()


def main(arms: dict[str, str]) -> None:
    settings = with_files(sources.settings({}), fetch=False)
    with contextlib.ExitStack() as stack:
        pairs = {name: stack.enter_context(pair(arm, settings)) for name, arm in arms.items()}
        first = next(iter(pairs))
        for rows in ROWS:
            seconds: dict[str, list[float]] = {name: [] for name in pairs}
            for _ in range(ROUNDS):
                for name, (target, _) in pairs.items():
                    target.took(rows, 1)  # wakes its threads
                    seconds[name].append(target.took(rows, 1))
            for name, some in seconds.items():
                ratio = statistics.median(
                    one / other for one, other in zip(some, seconds[first], strict=True)
                )
                cost_ms = 1000 * statistics.median(some)
                print(f"{rows:4} rows  {name:16} {cost_ms:7.1f} ms  {ratio:.2f}")
        for name, (target, draft) in pairs.items():
            alone = 1 / target.took(1, AT_ONCE), 1 / draft.took(1, 3 * AT_ONCE)
            both = at_once(target, draft)
            print(
                f"{name:16} alone {alone[0]:.1f} and {alone[1]:.1f} passes a second, "
                f"at once {both[0]:.1f} and {both[1]:.1f}"
            )


if __name__ == "__main__":
    main(dict(arm.split("=", 1) for arm in sys.argv[1:] or ["here=-"]))
