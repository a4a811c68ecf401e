"""How many pairs so many users need: measured on simulated devices, by outrider's own processes.

One pair is started whose made-up devices cost what the real ones were found to cost. It is asked by
1, 2, 4 … users at once; what lies between those loads is interpolated, and pairs add up, since each
has devices of its own.
"""

from __future__ import annotations

import asyncio
import json
import math
import secrets
import statistics
import time
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from outrider.client import AsyncClient, connect
from outrider.errors import ConfigError
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News

MOST_USERS = 64  # of one pair, as `--parallel` allows
PROMPT = "User {} asks: "


@dataclass(frozen=True, slots=True)
class Devices:
    """What a pair's devices cost."""

    step_s: float  # a pass of the target over one row
    rows: tuple[float, ...]  # passes over 1, 2, 3 … rows, in steps
    draft_s: float  # a drafted token
    acceptance: float  # how often the target agrees with one

    @classmethod
    def read(cls, path: Path) -> Devices:
        """From the JSON of `outrider doctor`, or a file in TOML. Raises ConfigError."""
        try:
            text = path.read_text()
            found = cls._of_doctor(json.loads(text)) if text.lstrip().startswith("{") else None
            found = found or cls._of_figures(tomllib.loads(text))
        except OSError as exc:
            raise ConfigError(f"cannot read {path}: {exc.strerror}") from None
        except (ValueError, TypeError, LookupError) as exc:
            raise ConfigError(f"{path} does not tell what devices cost: {exc!r:.200}") from None
        numbers = (found.step_s, *found.rows, found.draft_s)
        if not all(0 < one < math.inf for one in numbers) or not 0 <= found.acceptance < 1:
            raise ConfigError(f"{path}: times must be above 0, the acceptance from 0 to below 1")
        return found

    @classmethod
    def _of_doctor(cls, told: Mapping[str, Any]) -> Devices:
        costs = told["costs"][{"sync": "sync"}.get(told["auto"], "pipelined")]
        curve, accepted = costs["curve_s"], told["acceptance"]["overall"]
        rows = tuple(float(one) / float(curve[0]) for one in curve)
        return cls(float(curve[0]), rows, float(costs["draft_s"]), float(accepted))

    @classmethod
    def _of_figures(cls, told: Mapping[str, Any]) -> Devices:
        target, draft = told["target"], told["draft"]
        rows = tuple(float(one) for one in target.get("rows", [1.0]))
        step_s, draft_s = float(target["step_ms"]) / 1000, float(draft["token_ms"]) / 1000
        return cls(step_s, rows, draft_s, float(told["acceptance"]))

    def simulated(self, settings: Settings, sharing: int) -> Settings:
        """The settings of a pair of such devices, whose draft works for so many targets in turn."""
        rows = ",".join(f"{n}:{max(x, 0.01):.4g}" for n, x in enumerate(self.rows[1:], 2))
        toy = replace(
            settings.toy,
            step_ms=1000 * self.step_s,
            rows=rows,
            row_ms=0.0,
            draft_ms=1000 * self.draft_s * sharing,
            agreement=self.acceptance,
        )
        pipeline = replace(settings.pipeline, backend="toy", parallel=MOST_USERS)
        return replace(settings, toy=toy, pipeline=pipeline)


@dataclass(frozen=True, slots=True)
class Load:
    """What a pair does for so many users at once."""

    users: int
    tokens_per_s: float  # of each
    first_s: float  # until its first token


@dataclass(frozen=True, slots=True)
class Plan:
    """So many pairs for all users."""

    pairs: int
    users: int  # of each pair, at most
    tokens_per_s: float  # of each user
    all_tokens_per_s: float
    first_s: float


async def measured(
    settings: Settings, devices: Devices, users: int, count: int, sharing: int = 1
) -> list[Load]:
    """Loads of one pair, by 1, 2, 4 … users up to `users`, of whom each is told `count` tokens."""
    name, loads = f"plan-{secrets.token_hex(4)}", []
    most = min(users, MOST_USERS)
    async with AsyncExitStack() as stack:
        with News() as news:
            simulated = devices.simulated(settings, sharing)
            launcher = Launcher(simulated, name, news.report, news.log)
            await stack.enter_async_context(launcher)
        client = await stack.enter_async_context(connect(name))
        await _asked(client, 1, count)  # the first answer bears what is slow only once
        for number in sorted({min(2**n, most) for n in range(most.bit_length() + 1)}):
            loads.append(await _asked(client, number, count))
    return loads


async def _asked(client: AsyncClient, users: int, count: int) -> Load:
    """So many at once."""
    found = await asyncio.gather(*(_answer(client, n, count) for n in range(users)))
    rates, firsts = zip(*found, strict=True)
    return Load(users, statistics.median(rates), statistics.median(firsts))


async def _answer(client: AsyncClient, number: int, count: int) -> tuple[float, float]:
    began = time.monotonic()
    stream = await client.create_completion(
        PROMPT.format(number), max_tokens=count, temperature=0, ignore_eos=True, stream=True
    )
    first, tokens = 0.0, 0
    async for fragment in stream:
        first = first or time.monotonic()
        tokens += len(fragment.tokens)
    return (tokens - 1) / max(1e-9, time.monotonic() - first), first - began


def plans(loads: Sequence[Load], users: int) -> list[Plan]:
    """For each number of pairs up to one a user, while more of them change anything."""
    known = [load.users for load in loads]
    found: list[Plan] = []
    for pairs in range(1, users + 1):
        each = math.ceil(users / pairs)
        if each > known[-1] or (found and each == found[-1].users):
            continue
        speed = float(np.interp(each, known, [load.tokens_per_s for load in loads]))
        first_s = float(np.interp(each, known, [load.first_s for load in loads]))
        found.append(Plan(pairs, each, speed, users * speed, first_s))
    return found


def fewest(found: Sequence[Plan], tokens_per_s: float) -> Plan | None:
    """The first that gives each user so much."""
    return next((plan for plan in found if plan.tokens_per_s >= tokens_per_s), None)
