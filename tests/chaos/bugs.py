"""Plants one bug after the other, and looks whether its test catches it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from tests.attack.service import ROOT, with_paths
from tests.chaos.campaign import Plan, Result
from tests.chaos.planted import BUGS, FEW, Bug

CAUGHT, PASSED = 1, 0  # pytest's exit status
WITHIN_S = 180.0
PYTEST = ("-q", "-x", "--no-header", "-p", "no:cacheprovider", "-p", "no:randomly", "--timeout=120")


def run(plan: Plan) -> Result:
    """All bugs; of a small share a few."""
    return asyncio.run(caught(BUGS if plan.share >= 1 else FEW, plan.jobs))


async def caught(bugs: Sequence[Bug], jobs: int) -> Result:
    """Each bug is to be caught by its test, which is to pass without it."""
    result, free = Result(), asyncio.Semaphore(jobs)

    async def status(bug: Bug | None, tests: Sequence[str]) -> int:
        async with free:
            return await _status(bug, tests)

    tests = sorted({bug.test for bug in bugs})
    sound, *found = await asyncio.gather(
        status(None, tests), *(status(bug, [bug.test]) for bug in bugs)
    )
    if sound != PASSED:
        result.complaints.append(f"without any bug the tests end with status {sound}")
    for bug, end in zip(bugs, found, strict=True):
        if end == PASSED:
            result.complaints.append(f"not caught: {bug.name}")
        elif end != CAUGHT:
            result.complaints.append(f"{bug.name}: pytest ends with status {end}")
    count = found.count(CAUGHT)
    result.add("planted bugs caught", f"{len(bugs)} of {len(bugs)}", f"{count}", count == len(bugs))
    return result


async def _status(bug: Bug | None, tests: Sequence[str]) -> int:
    """How pytest ends with this bug; as a child, it is killed if it takes too long."""
    plugin = ("-p", "tests.chaos.planting") if bug else ()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "pytest", *plugin, *PYTEST, *tests),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=ROOT,
        env=with_paths({**os.environ, "PLANTED": bug.name if bug else ""}),
    )
    try:
        async with asyncio.timeout(WITHIN_S):
            return await process.wait()
    except TimeoutError:
        return -1
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
