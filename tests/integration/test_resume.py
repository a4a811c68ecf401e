"""Whoever dies, an answer goes on with the very next token: nothing is said twice or left out."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from tests.integration.conftest import pids_by_role
from tests.integration.test_faults import PROMPT, SLOW, begin, complete, ids, until_text, until_up

from outrider import Client
from outrider.client import Completion, Stream
from outrider.errors import ConnectionFailed, RequestPoisoned
from outrider_services.pipeline import launcher as launchers

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle, Pipeline, Serve

    Pipelines = Callable[..., AbstractAsyncContextManager[Pipeline]]

pytestmark = pytest.mark.timeout(90)  # processes start again and again

WARM = {"temperature": 0.8, "seed": 11, "top_k": 40}
LISTED = {"type": "array", "items": {"enum": ["abc", "xyz"]}, "minItems": 20, "maxItems": 25}
GREEDY = {"temperature": 0.0, "seed": 3}
ASKED: dict[str, dict[str, Any]] = {
    "sampled": {**WARM, "max_tokens": 160},
    "penalised": {**WARM, "repeat_penalty": 1.3, "frequency_penalty": 0.3, "max_tokens": 160},
    "dry and xtc": {**WARM, "dry_multiplier": 0.8, "xtc_probability": 0.5, "max_tokens": 140},
    "logprobs": {**GREEDY, "logprobs": True, "top_logprobs": 3, "max_tokens": 140},
    "a schema": {**WARM, "json_schema": LISTED},
    "in turns": {**WARM, "mode": "sync", "max_tokens": 160},
    "nothing kept": {**GREEDY, "cache_prompt": False, "max_tokens": 160},
}


def kill(up: Pipeline, role: str) -> int:
    pid = up.pids()[role]
    os.kill(pid, signal.SIGKILL)
    return pid


def has_another(up: Pipeline, role: str, dead: int) -> bool:
    return up.pids().get(role, dead) != dead


def all_said(streams: list[Stream], count: int) -> bool:
    return len(streams) == len(ASKED) and all(len(ids(one)) > count for one in streams)


def check_same(one: Completion, other: Completion) -> None:
    assert ids(one) == ids(other)
    assert [t.position for t in one.tokens] == [t.position for t in other.tokens]
    assert one.choices[0] == other.choices[0]  # its text, its end, and its probabilities
    assert one.usage == other.usage
    assert one.stats.generated_tokens == other.stats.generated_tokens
    assert one.stats.seed == other.stats.seed


@pytest.mark.parametrize("roles", [("target",), ("coordinator",), ("draft", "target", "target")])
async def test_every_setting_goes_on_as_it_was(pipeline: Pipelines, roles: tuple[str, ...]) -> None:
    async def ask(asked: dict[str, Any]) -> Completion:
        stream: Stream = await client.create_completion(PROMPT, stream=True, **asked)
        streams.append(stream)
        return await stream.result()

    async def ask_all() -> list[Completion]:
        streams.clear()
        return await asyncio.gather(*map(ask, ASKED.values()))

    streams: list[Stream] = []
    async with pipeline(**SLOW, pipeline__parallel=8) as up, up.connect() as client:
        undisturbed = await ask_all()
        asking = asyncio.ensure_future(ask_all())
        for n, role in enumerate(roles, 1):
            await up.until("all say more", partial(all_said, streams, 20 * n))
            dead = kill(up, role)
            await up.until("it is back", partial(has_another, up, role, dead))
        for one, other in zip(await asking, undisturbed, strict=True):
            check_same(one, other)
        assert min(len(one.tokens) for one in undisturbed) >= 140


async def test_a_stop_string_is_found_across_the_loss(pipeline: Pipelines, oracle: Oracle) -> None:
    """One of whose halves was said before, and the other behind it."""
    text = oracle(PROMPT, 60).text
    async with pipeline(**SLOW) as up, up.connect() as client:
        for role in ("target", "coordinator"):
            stream = await begin(client, 60)
            said = len("".join(fragment.text for fragment in stream.fragments))
            stop = next(
                text[at : at + 12]
                for at in range(said, len(text))
                if text.find(text[at : at + 12]) == at
            )
            await stream.cancel()
            again = await begin(client, 60, stop=stop)
            os.kill(up.pids()[role], signal.SIGKILL)
            answer = await again.result()
            assert (answer.text, answer.choices[0].finish_reason) == (
                text[: text.index(stop)],
                "stop",
            )
            await up.joined(client, "draft")


async def test_many_at_once_go_on_whoever_dies(pipeline: Pipelines, oracle: Oracle) -> None:
    """Those that run, that wait, and that come while nobody is there."""

    async def ask(n: int) -> None:
        prompt, settings = f"{PROMPT} {n}", {"temperature": 0.8 * (n % 2), "seed": n}
        answer = await complete(client, 150 + n, prompt, **settings)
        assert ids(answer) == oracle(prompt, 150 + n, **settings).token_ids

    async with pipeline(**SLOW) as up, up.connect() as client:
        asking = [asyncio.ensure_future(ask(n)) for n in range(6)]
        for round_, role in enumerate(("draft", "target", "coordinator", "target")):
            await asyncio.sleep(0.4)
            dead = kill(up, role)
            asking.append(asyncio.ensure_future(ask(10 + round_)))
            await up.until("it is back", partial(has_another, up, role, dead))
            await asyncio.sleep(0.6)
        await asyncio.gather(*asking)
        await up.idle(client)


def test_a_synchronous_client_in_two_threads_goes_on(serve: Serve, oracle: Oracle) -> None:
    served = serve("threads")
    texts: dict[int, str] = {}

    def ask(n: int) -> None:
        answer = client.create_completion(f"{PROMPT} {n}", max_tokens=150, temperature=0)
        texts[n] = answer.text

    with Client(served.ipc) as client:
        threads = [threading.Thread(target=ask, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(0.5)
        os.kill(served.pids()["coordinator"], signal.SIGKILL)
        for thread in threads:
            thread.join()
    assert texts == {n: oracle(f"{PROMPT} {n}", 150).text for n in range(2)}
    assert served.stop() == 143


def test_the_gateway_is_a_client_like_any_other(serve: Serve, oracle: Oracle) -> None:
    served = serve("web", "--no-gateway=false", "--port=0", "--toy-step-ms=8")
    asked = {"prompt": PROMPT, "n_predict": 200, "temperature": 0, "stream": True}
    with httpx2.Client(base_url=served.url, timeout=20) as http:
        for role in ("target", "coordinator"):
            with http.stream("POST", "/completion", json=asked) as answer:
                parts = [next(lines := answer.iter_lines())]
                os.kill(served.pids()[role], signal.SIGKILL)
                parts += lines
            said = [part.removeprefix("data: ") for part in parts if part.startswith("data: ")]
            told = [httpx2.Response(200, content=part).json() for part in said]
            assert "".join(one.get("content", "") for one in told) == oracle(PROMPT, 200).text
        del asked["stream"]
        os.kill(served.pids()["coordinator"], signal.SIGKILL)
        time.sleep(0.05)
        whole = http.post("/completion", json=asked)  # one that comes while nobody is there
        assert whole.json()["content"] == oracle(PROMPT, 200).text
    assert served.stop() == 143


async def test_cancelling_needs_no_coordinator(pipeline: Pipelines) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        stream, left = await begin(client, 1000), await begin(client, 1000)
        os.kill(up.pids()["coordinator"], signal.SIGKILL)
        await asyncio.sleep(0.1)
        await stream.cancel()
        del left
        answer = await stream.result()
        assert answer.choices[0].finish_reason == "cancelled"
        assert await client.tokenize("x") == (120,)  # it is back
        await up.joined(client, "draft")
        assert not any((await client.health())["requests"].values())
        assert not client._inboxes


async def test_questions_about_the_service_are_answered_or_fail_at_once(
    pipeline: Pipelines,
) -> None:
    async with pipeline(**SLOW) as up, up.connect() as client:
        os.kill(up.pids()["coordinator"], signal.SIGKILL)
        await asyncio.sleep(0.05)
        with pytest.raises(ConnectionFailed):
            await client.health()
        assert await client.tokenize("x") == (120,)  # this one waits


POISON = """
import os
from outrider.engines.toy import ToyEngine

real = ToyEngine.extend_all

def dies_of_a_token(self, parts):
    if self.settings.role == "target" and any(7 in part.tokens for part in parts):
        os.abort()
    return real(self, parts)

ToyEngine.extend_all = dies_of_a_token
"""


async def test_a_request_that_kills_is_set_aside_and_others_go_on(
    pipeline: Pipelines, oracle: Oracle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(POISON)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    async with pipeline(**SLOW) as up, up.connect() as client:
        others = [await begin(client, 300, seed=n) for n in range(3)]
        with pytest.raises(RequestPoisoned, match="died again and again"):
            await client.create_completion([1, 2, 7, 3], max_tokens=5)
        for stream in others:
            await stream.result()
            assert ids(stream) == oracle(PROMPT, 300).token_ids
        deaths = sum("ended by itself with status -6" in line for line in up.lines)
        assert deaths == 2
        await up.idle(client)


async def test_a_coordinator_that_dies_again_and_again_stays_down(
    pipeline: Pipelines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "RESTARTS", (2, 60.0))
    async with pipeline(**SLOW) as up:
        for _ in range(2):
            dead = kill(up, "coordinator")
            await up.until("another", partial(has_another, up, "coordinator", dead))
        os.kill(up.pids()["coordinator"], signal.SIGKILL)
        await up.until("it fails", up.launcher.failed.done)
        assert any("stays down" in line for line in up.lines)


def test_run_survives_its_coordinator(cli: Cli, oracle: Oracle) -> None:
    served = cli.start("serve", "--backend=toy", "--name=own", "--toy-step-ms=8")
    until_up(served)
    running = cli.start("run", "--connect=own", "--temperature=0", "-n", "200", PROMPT)
    begun = until_text(running)
    os.kill(pids_by_role(cli.runtime, "own")["coordinator"], signal.SIGKILL)
    rest, err = running.communicate(timeout=20)
    assert running.returncode == 0, err
    assert begun + rest == oracle(PROMPT, 200).text + "\n"
    served.terminate()
    served.communicate(timeout=10)
