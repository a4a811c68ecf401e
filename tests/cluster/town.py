"""A Ray cluster of several nodes on this machine, with our application on it, and who asks it."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2 as httpx
import psutil
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve.schema import ApplicationStatus
from tests.attack.service import with_paths

from outrider.wire.keys import Holder, Keyring
from outrider_services.cluster.application import app

READY_S, ANSWER_S = 120.0, 120.0
HOLDERS: tuple[Holder, ...] = ("coordinator", "draft", "client")
# a bundle that is on the nodes of pairs alone; gateways are on the first node, which stays
ON_PAIR, ON_DRAFT = '{"CPU": 0.1, "pair": 1}', '{"CPU": 0.1, "draft": 1}'
ON_HEAD = '{"CPU": 0.1, "head": 0.1}'
TOY: Mapping[str, str] = {
    "pipeline.backend": "toy",
    "coordinator.drain_s": "2",
    "target": ON_PAIR,
    "draft": '{"CPU": 0.1}',
    "gateway": ON_HEAD,
}


@dataclass(slots=True)
class Asked:
    """What came of a request: its text, and when each piece of it came."""

    text: str = ""
    error: str = ""
    began: float = field(default_factory=time.monotonic)
    came: list[float] = field(default_factory=list)
    tokens: int = 0
    cached: int = 0
    prompt: int = 0

    @property
    def longest_s(self) -> float:
        """The longest wait for a piece."""
        return max((b - a for a, b in pairwise([self.began, *self.came])), default=0.0)

    @property
    def speed(self) -> float:
        """Tokens a second, from the question to the last piece."""
        return self.tokens / (self.came[-1] - self.began) if self.came else 0.0


class Town:
    """The cluster; `async with`."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory()
        self._keys = Path(self._scratch.name) / "keys"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{free.getsockname()[1]}"
        self._http = httpx.AsyncClient(
            base_url=self.url, timeout=ANSWER_S, limits=httpx.Limits(max_connections=None)
        )

    async def __aenter__(self) -> Town:
        new = Keyring(self._keys)
        for holder in HOLDERS:
            new.make(holder)
        new.trust(new.own(holder) for holder in HOLDERS)
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        head = {"num_cpus": 2, "include_dashboard": False, "resources": {"head": 1}}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        paths = {"PYTHONPATH": with_paths(os.environ)["PYTHONPATH"]}
        ray.init(address=self.cluster.address, log_to_driver=False, runtime_env={"env_vars": paths})
        port = int(self.url.rpartition(":")[2])
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()
        serve.shutdown()
        ray.shutdown()
        self.cluster.shutdown()
        self._scratch.cleanup()

    def node(self, **resources: float) -> Any:
        """One more node."""
        return self.cluster.add_node(num_cpus=4, resources=resources)

    def kill(self, node: Any) -> None:
        """Its machine goes: the raylet, its actors and whatever those have started, all at once."""
        (raylet,) = node.all_processes["raylet"]
        process = psutil.Process(raylet.process.pid)
        for one in (process, *process.children(recursive=True)):
            with suppress(psutil.Error):
                one.kill()
        self.cluster.remove_node(node, False)

    async def deploy(self, arguments: Mapping[str, str], within_s: float = READY_S) -> None:
        """Our application with these arguments, in the place of whatever runs."""
        made = app({**TOY, "links.keys": str(self._keys), **arguments})
        await asyncio.to_thread(serve.run, made, route_prefix="/", blocking=False)
        least = int(arguments.get("replicas", "1").partition("-")[0])
        await self.until(lambda: self.replicas() >= least, within_s)

    def is_up(self, name: str) -> bool:
        return bool(serve.status().applications[name].status == ApplicationStatus.RUNNING)

    def replicas(self) -> int:
        """Pipelines that run."""
        found = serve.status().applications["default"]
        if found.status not in (ApplicationStatus.RUNNING, ApplicationStatus.DEPLOYING):
            return 0
        return int(found.deployments["pipeline"].replica_states.get("RUNNING", 0))

    async def until(self, holds: Callable[[], bool], within_s: float) -> float:
        """Seconds until it holds. Raises TimeoutError."""
        began = time.monotonic()
        while not await asyncio.to_thread(holds):
            if time.monotonic() - began > within_s:
                raise TimeoutError(f"it does not hold after {within_s:.0f} s")
            await asyncio.sleep(0.1)
        return time.monotonic() - began

    async def health(self) -> dict[str, Any]:
        found: dict[str, Any] = (await self._http.get("/health")).json()
        return found

    async def ask(self, messages: list[dict[str, str]], tokens: int, **more: Any) -> Asked:
        """A conversation's next turn, streamed."""
        body = {"messages": messages, "max_tokens": tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, "ignore_eos": True, **more}  # fmt: skip
        asked = Asked()
        try:
            async with self._http.stream("POST", "/v1/chat/completions", json=body) as answer:
                if answer.status_code != 200:
                    asked.error = (await answer.aread()).decode()[:300]
                    return asked
                async for line in answer.aiter_lines():
                    if line.startswith("data: {"):
                        self._take(asked, json.loads(line.removeprefix("data: ")))
        except httpx.HTTPError as exc:
            asked.error = f"{type(exc).__name__}: {exc}"
        if not asked.error and asked.tokens != tokens:
            asked.error = f"{asked.tokens} of {tokens} tokens"
        return asked

    async def complete(self, prompt: str, tokens: int) -> str:
        """The whole text behind a prompt."""
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
        answer = await self._http.post("/v1/completions", json=body)
        return str(answer.json()["choices"][0]["text"])

    async def lateness(self, path: str) -> list[float]:
        """Seconds by which each line comes after the time that it tells."""
        late = []
        async with self._http.stream("GET", path) as answer:
            async for line in answer.aiter_lines():
                late.append(time.monotonic() - float(line))
        return late

    def _take(self, asked: Asked, event: dict[str, Any]) -> None:
        if "error" in event:
            asked.error = str(event["error"])[:300]
        for choice in event.get("choices", ()):
            if piece := choice.get("delta", {}).get("content"):
                asked.text += piece
                asked.came.append(time.monotonic())
        if usage := event.get("usage"):
            asked.tokens, asked.prompt = usage["completion_tokens"], usage["prompt_tokens"]
            asked.cached = usage["prompt_tokens_details"]["cached_tokens"]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]
