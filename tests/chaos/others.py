"""What `scripts/attack` and `scripts/soak` do, as rows of the table."""

from __future__ import annotations

import asyncio
import os
import subprocess

from tests.attack.arms import ARMS
from tests.attack.report import attacked
from tests.attack.service import ROOT, with_paths
from tests.chaos.campaign import Plan, Result

SOAK_S, LEAST_S = 3600.0, 20.0


def attack(plan: Plan) -> Result:
    result = Result()
    for one in asyncio.run(attacked(ARMS, plan.share, plan.seed)):
        right, all_ = one.count("right"), len(one.outcomes)
        measured = f"{one.told}: {right} of {all_} answers right"
        result.add(one.arm.name, "nobody else is harmed", measured, not one.complaints)
        result.complaints += [f"attack, {one.arm.name}: {what}" for what in one.complaints]
    return result


def soak(plan: Plan) -> Result:
    seconds = max(LEAST_S, SOAK_S * plan.share)
    every = 20.0 if seconds > 300 else 4.0
    command = [str(ROOT / "scripts/soak"), f"--seconds={seconds}"]
    command += [f"--every={every}", f"--seed={plan.seed}"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=with_paths(os.environ), check=False
    )
    result = Result()
    last = next((line for line in reversed(done.stdout.splitlines()) if " min: " in line), "")
    result.add("soak", f"{seconds:.0f} s: nothing wrong, nothing grows", last, done.returncode == 0)
    if done.returncode:
        result.complaints += [f"soak: {line}" for line in done.stdout.splitlines()[-8:]]
    return result
