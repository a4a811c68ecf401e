"""The connection to the coordinator, and the requests that run over it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

from outrider.client import AsyncClient, Stream, connect
from outrider.errors import BadRequest, UnknownRequest, WorkerLost
from outrider_services.gateway.asking import Ask

REACH_S = 1.0  # most that connecting to the coordinator may take
HEALTH_S = 2.0  # most that its answer may take


def targets(workers: Mapping[str, Any]) -> dict[str, Any]:
    """The target workers among them, by name."""
    return {name: worker for name, worker in workers.items() if worker["role"] == "target"}


class Upstream:
    """A client that is connected when it is first needed, and again after the coordinator was gone.

    `running` requests can be cancelled by their names, by whoever has the same key.
    """

    def __init__(self, pipeline: str, **reach: Any) -> None:
        self.pipeline, self._reach = pipeline, reach  # as `connect` wants them
        self._client: AsyncClient | None = None
        self._connecting = asyncio.Lock()
        self._running: dict[str, tuple[str, Stream]] = {}  # by name: key, answer

    async def client(self) -> AsyncClient:
        """The client. Raises ConnectionFailed if no coordinator answers."""
        async with self._connecting:
            if self._client is None:
                client = connect(self.pipeline, timeout_s=REACH_S, **self._reach)
                self._client = await client.__aenter__()
            return self._client

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()

    async def health(self) -> dict[str, Any]:
        """The coordinator's report. Raises ConnectionFailed, RequestTimeout."""
        return await (await self.client()).health(timeout_s=HEALTH_S)

    async def metrics(self) -> dict[str, Any]:
        """What the coordinator has counted. Raises ConnectionFailed, RequestTimeout."""
        return await (await self.client()).metrics(timeout_s=HEALTH_S)

    async def ready(self) -> dict[str, Any]:
        """The same while there is a target worker. Raises WorkerLost, and as `health`."""
        report = await self.health()
        if not targets(report["workers"]):
            raise WorkerLost("the model is being loaded", "target")
        return report

    async def target(self) -> dict[str, Any]:
        """What is known of the target worker. Raises WorkerLost while there is none.

        Of several, which all have the same model, it is the first, with the slots of all.
        """
        found = targets((await self.ready())["workers"])
        slots = sum(one["slots"] for one in found.values())
        return {**next(iter(found.values())), "slots": slots}

    @asynccontextmanager
    async def answering(self, ask: Ask, key: str) -> AsyncIterator[Stream]:
        """Ask for an answer; whatever happens, nothing is generated for it afterwards."""
        async with await ask.begin(await self.client(), key) as stream:
            yield stream

    @contextmanager
    def running(self, name: str, key: str, stream: Stream) -> Iterator[None]:
        """Meanwhile `stream` can be cancelled as `name`. Raises BadRequest for one in use."""
        if name in self._running:
            raise BadRequest(f"a request named {name!r} is running: choose another X-Request-Id")
        self._running[name] = key, stream
        try:
            yield
        finally:
            del self._running[name]

    async def cancel(self, name: str, key: str) -> None:
        """Stop the request `name`, if it is of this `key`. Raises UnknownRequest."""
        plain = name.removeprefix("chatcmpl-").removeprefix("cmpl-")  # OpenAI's ids have a prefix
        owner, stream = self._running.get(name) or self._running.get(plain) or (None, None)
        if stream is None or owner != key:
            raise UnknownRequest(f"no request {name!r:.80} is running")
        await stream.cancel()
