"""Many requests at once: right texts, fair turns, texts read once, and nothing left behind."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING, Any

import psutil
import pytest
from tests.integration.conftest import pids_by_role

from outrider.client import AsyncClient, connect

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Serve

FAST = ("--toy-step-ms=2", "--toy-row-ms=0.02", "--toy-draft-ms=0.2")
SYSTEM = "the old river runs over the quiet meadow and under the silver moon "


def prompt(n: int) -> str:
    return f"{SYSTEM if n % 2 else ''}request {n} "


@pytest.mark.timeout(120)
async def test_a_thousand_requests_some_cancelled_leave_nothing(
    serve: Serve, oracle: Oracle
) -> None:
    """Whoever is not cancelled gets the text that it would get alone, of every mode."""
    served = serve("many", "--parallel=16", *FAST)
    pids = pids_by_role(served.runtime, "many")
    rng = random.Random(16)
    cancelled = 0

    async def one(client: AsyncClient, n: int) -> None:
        nonlocal cancelled
        leaves, length = rng.random() < 0.3, rng.randint(2, 20)
        settings: dict[str, Any] = {
            "max_tokens": length,
            "temperature": rng.choice([0.0, 0.8]),
            "seed": n,
            "mode": rng.choice(["plain", "sync", "pipelined"]),
        }
        stream = await client.create_completion(prompt(n), stream=True, **settings)
        if leaves:
            await asyncio.sleep(rng.random() * 0.05)
            await stream.cancel()
            cancelled += 1
            return
        async for _ in stream:
            pass
        if n % 20 < 2:  # the oracle takes longer than the pipeline
            right = oracle(
                prompt(n), length, temperature=settings["temperature"], seed=settings["seed"]
            )
            assert (await stream.result()).text == right.text

    async with connect("many") as client:
        await asyncio.gather(*(one(client, n) for n in range(16)))
        before = {role: psutil.Process(pid).num_fds() for role, pid in pids.items()}
        turn = asyncio.Semaphore(48)

        async def in_turn(n: int) -> None:
            async with turn:
                await one(client, n)

        await asyncio.gather(*(in_turn(n) for n in range(16, 1000)))
        assert cancelled > 200
        for _ in range(100):
            health = await client.health()
            if health["requests"] == {"running": 0, "waiting": 0}:
                break
            await asyncio.sleep(0.05)
        assert health["requests"] == {"running": 0, "waiting": 0}
        # all sixteen sequences can be had again
        whole = [client.create_completion(prompt(n), max_tokens=4) for n in range(16)]
        assert all(len(answer.tokens) == 4 for answer in await asyncio.gather(*whole))
        after = {role: psutil.Process(pid).num_fds() for role, pid in pids.items()}
        assert pids_by_role(served.runtime, "many") == pids
        assert {role for role in after if after[role] > before[role] + 2} == set()


async def test_equal_requests_end_at_about_the_same_time(serve: Serve) -> None:
    serve("fair", "--parallel=8", *FAST)
    async with connect("fair") as client:
        await client.create_completion("warm ", max_tokens=8)

        async def took(n: int) -> float:
            began = time.perf_counter()
            await client.create_completion(
                f"{n} the lantern ", max_tokens=150, temperature=0, ignore_eos=True
            )
            return time.perf_counter() - began

        for _ in range(3):  # a busy machine may take one of them aside
            times = await asyncio.gather(*map(took, range(8)))
            if max(times) <= 1.5 * min(times):
                return
    raise AssertionError(f"they took {times} s")


async def test_eight_at_once_are_far_faster_than_one_after_the_other(serve: Serve) -> None:
    """On a device whose passes cost the same whatever their rows."""
    serve("batch", "--parallel=8", "--toy-step-ms=10", "--toy-row-ms=0", "--toy-draft-ms=1")

    async def tokens_per_s(client: AsyncClient, count: int) -> float:
        began = time.perf_counter()
        await asyncio.gather(
            *(
                client.create_completion(
                    f"{n} the lantern ",
                    max_tokens=60,
                    temperature=0,
                    ignore_eos=True,
                    mode="plain",
                )
                for n in range(count)
            )
        )
        return count * 60 / (time.perf_counter() - began)

    async with connect("batch") as client:
        await tokens_per_s(client, 1)
        alone, together = [await tokens_per_s(client, n) for n in (1, 8)]
    assert together > 3 * alone
