"""What a campaign is: trouble of one kind, how much of it, and rows of a table that tell of it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from tests.attack.service import ROOT, with_paths


@dataclass(frozen=True, slots=True)
class Plan:
    """How much of everything is done, and by how many processes at once."""

    share: float = 1.0
    seed: int = 1
    jobs: int = 2
    pair: bool = False  # on the default pair of models, where a campaign can

    def times(self, whole: int, least: int = 1) -> int:
        """This share of `whole`."""
        return max(least, round(whole * self.share))


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    quantity: str
    wanted: str
    measured: str
    passed: bool | None  # None: it is only told


@dataclass(slots=True)
class Result:
    """What a campaign has found. A complaint tells a seed and a symptom."""

    rows: list[Row] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def add(self, quantity: str, wanted: str, measured: str, passed: bool | None) -> None:
        self.rows.append(Row(quantity, wanted, measured, passed))

    @property
    def passed(self) -> bool:
        return not self.complaints and all(row.passed is not False for row in self.rows)


@dataclass(frozen=True, slots=True)
class Campaign:
    name: str
    help: str
    run: Callable[[Plan], Result]


def parts(total: int, jobs: int) -> list[tuple[int, int]]:
    """`total` things for `jobs` processes: the first of each, and how many it has."""
    each, more = divmod(total, jobs)
    counts = [each + (n < more) for n in range(jobs)]
    firsts = [sum(counts[:n]) for n in range(jobs)]
    return [pair for pair in zip(firsts, counts, strict=True) if pair[1]]


def told_by(
    module: str, calls: Sequence[Sequence[object]], jobs: int, within_s: float
) -> list[dict[str, Any]]:
    """Run `python -m module` with each of `calls`, `jobs` at once; what each prints, as JSON.

    Raises RuntimeError for one that fails or takes longer than `within_s`.
    """

    async def run() -> list[dict[str, Any]]:
        free = asyncio.Semaphore(jobs)

        async def one(call: Sequence[object]) -> dict[str, Any]:
            async with free:
                return await _told(module, [str(argument) for argument in call], within_s)

        return await asyncio.gather(*map(one, calls))

    return asyncio.run(run())


async def _told(module: str, arguments: Sequence[str], within_s: float) -> dict[str, Any]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", module, *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        cwd=ROOT,
        env=with_paths(os.environ),
    )
    shown = " ".join((module, *arguments))
    try:
        async with asyncio.timeout(within_s):
            out, err = await process.communicate()
    except TimeoutError:
        raise RuntimeError(f"{shown} takes longer than {within_s:.0f} s") from None
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
    if process.returncode:
        raise RuntimeError(f"{shown} failed: {err.decode(errors='replace')[-2000:]}")
    found: dict[str, Any] = json.loads(out)
    return found
