"""Several drafts and several targets, as real processes: who serves, and who takes over."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

import pytest
from tests.integration.test_faults import PROMPT, begin, complete, ids

from outrider.client import AsyncClient, Stream

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle, Pipeline

    Pipelines = Callable[..., AbstractAsyncContextManager[Pipeline]]

STEP_MS, COUNT = 40.0, 120
BOTH = {"toy__step_ms": STEP_MS, "draft__place": "both", "target__place": "both"}
SLACK_S = 0.3  # what a busy machine adds
pytestmark = pytest.mark.timeout(60)  # each starts up to six processes


async def join(
    cli: Cli, up: Pipeline, client: AsyncClient, name: str, *flags: str
) -> subprocess.Popen[str]:
    """Start a worker that joins the pipeline as `name`."""
    role, address = name.split("-")[0], f"ipc://{up.runtime}/outrider/{up.name}.sock"
    toy = (f"--toy-step-ms={STEP_MS}", "--toy-row-ms=0.05", *flags)
    worker = cli.start("worker", role, "--backend=toy", f"--connect={address}", *toy)
    await up.joined(client, name)
    return worker


async def drafted_by(client: AsyncClient) -> dict[str, float]:
    """By lane, how many passes each has made so far."""
    passes: dict[str, float] = (await client.metrics())["lane_passes_total"]
    return passes


async def serving(client: AsyncClient) -> list[tuple[str, str | None]]:
    """The target and the draft of each request that runs."""
    slots = (await client.health())["slots"].values()
    return [(slot["target"], slot["draft"]) for slot in slots]


async def rest_of(stream: Stream) -> list[float]:
    """Read it to its end: the times between its fragments."""
    gaps, last = [], time.monotonic()
    async for _ in stream:
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    return gaps


# ---- drafts -------------------------------------------------------------------------------------


async def test_the_slow_one_of_two_drafts_is_not_chosen(
    pipeline: Pipelines, oracle: Oracle, cli: Cli
) -> None:
    async with pipeline(**BOTH, toy__draft_ms=30.0) as up, up.connect() as client:
        await join(cli, up, client, "draft-2", "--toy-draft-ms=1")
        before = await drafted_by(client)
        for _ in range(3):
            done = await complete(client, 30)
            assert ids(done) == oracle(PROMPT, 30).token_ids
            assert done.stats.accepted_tokens > 10
        await asyncio.sleep(0.5)  # the beats that tell of it
        after = await drafted_by(client)
        assert after["draft"] == before["draft"]
        assert after["draft-2"] > before["draft-2"]
        workers = (await client.health())["workers"]
        assert workers["draft-2"]["worth"] > workers["draft"]["worth"]
        assert "draft-2" in cli("top", up.name, "--once").stdout
        assert "2 x " in cli("ps").stdout


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_draft_that_goes_in_mid_request_costs_one_pass_and_another_takes_over(
    pipeline: Pipelines, oracle: Oracle, cli: Cli, how: signal.Signals
) -> None:
    async with pipeline(**BOTH, toy__draft_ms=8.0) as up, up.connect() as client:
        worker = await join(cli, up, client, "draft-2", "--toy-draft-ms=2")
        stream = await begin(client, COUNT)
        assert await serving(client) == [("target", "draft-2")]
        seen = len(stream.fragments)
        os.kill(worker.pid, how)
        try:
            gaps = await rest_of(stream)
        finally:
            if how is signal.SIGSTOP:
                os.kill(worker.pid, signal.SIGCONT)
        assert ids(stream) == oracle(PROMPT, COUNT).token_ids
        # the pass that runs, and one at most in which nothing is committed
        assert max(gaps) < 2 * 1.5 * STEP_MS / 1000 + SLACK_S
        assert any(fragment.drafted for fragment in stream.fragments[seen:][-20:])  # by the other


async def test_of_several_requests_each_has_a_draft_with_a_place_for_it(
    pipeline: Pipelines, oracle: Oracle, cli: Cli
) -> None:
    # so slow that the other one, with a single place, is the better even on a busy machine
    options: dict[str, Any] = {**BOTH, "pipeline__parallel": 4, "toy__draft_ms": 16.0}
    async with pipeline(**options) as up, up.connect() as client:
        await join(cli, up, client, "draft-2", "--parallel=1", "--toy-draft-ms=0.1")
        streams = [await begin(client, 160) for _ in range(3)]
        assert sorted(draft or "" for _, draft in await serving(client)) == [
            *["draft", "draft", "draft-2"]
        ]
        for stream in streams:
            await stream.result()
            assert ids(stream) == oracle(PROMPT, 160).token_ids


# ---- targets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["target", "target-2"])
async def test_two_targets_share_the_load_and_one_goes_on_for_both(
    pipeline: Pipelines, oracle: Oracle, cli: Cli, which: str
) -> None:
    async with pipeline(**BOTH, toy__draft_ms=2.0) as up, up.connect() as client:
        worker = await join(cli, up, client, "target-2")
        streams = [await begin(client, 80, seed=number) for number in range(4)]
        shared = [target for target, _ in await serving(client)]
        assert sorted(shared) == [*["target"] * 2, *["target-2"] * 2]
        os.kill(up.pids()["target"] if which == "target" else worker.pid, signal.SIGKILL)
        gaps = await asyncio.gather(*(rest_of(stream) for stream in streams))
        for stream in streams:
            assert ids(stream) == oracle(PROMPT, 80).token_ids
        # the text is read anew, by those that were in one pass one after the other
        assert max(max(one) for one in gaps) < 20 * STEP_MS / 1000 + SLACK_S


async def test_a_target_of_another_context_is_told_why_it_cannot_join(
    pipeline: Pipelines, cli: Cli
) -> None:
    async with pipeline(**BOTH) as up:
        address = f"ipc://{up.runtime}/outrider/{up.name}.sock"
        toy = ("--backend=toy", f"--connect={address}", "--ctx=512")
        refused = cli("worker", "target", *toy)
        assert refused.returncode == 3, refused.stderr
        assert "its context is not that of the other target worker: 512 here" in refused.stderr
