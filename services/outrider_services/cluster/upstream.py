"""The gateway's side of a cluster: each answer comes from a replica that it holds a lease on."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeAlias

from outrider.client import AsyncClient, Stream, connect
from outrider.client.moving import lost_s, move
from outrider.errors import ConnectionFailed, OutriderError, WorkerLost
from outrider_services.cluster.affinity import beginnings
from outrider_services.gateway.asking import Ask
from outrider_services.gateway.upstream import REACH_S, Upstream

log = logging.getLogger(__name__)

# a coordinator that has been gone for so long is taken for lost: one that is only started again
# is back sooner
LOST_S = 1.0
LOOK_S = 0.1
RESUME_S = 120.0  # in which another replica has to be found
RETRY_S = 0.5
MOST_AVOIDED = 16  # replicas that a request has seen lost, the latest


class Lease(Protocol):
    """A place on a replica, held until it is closed."""

    name: str  # of the replica
    address: str  # of its coordinator

    def close(self) -> None: ...


Find: TypeAlias = Callable[[Sequence[str], Sequence[str]], Awaitable[Lease]]
"""Wait for a place: given the request's beginnings, and names of replicas that are lost."""


class Held:
    """The lease that an answer has now, and the client that it comes over."""

    def __init__(self, lease: Lease, client: AsyncClient) -> None:
        self.lease, self.client = lease, client


class Replicas(Upstream):
    """Clients of the replicas, each connected when it is first needed."""

    def __init__(self, find: Find, **reach: Any) -> None:
        super().__init__("", **reach)
        self._find = find
        self._clients: dict[str, AsyncClient] = {}  # by address

    async def client(self) -> AsyncClient:
        """Any that is not lost, for questions to which each replica gives the same answer."""
        for client in self._clients.values():
            if not lost_s(client):
                return client
        held = await self._hold((), [])
        held.lease.close()
        return held.client

    async def close(self) -> None:
        clients, self._clients = self._clients, {}
        for client in clients.values():
            await client.close()

    @asynccontextmanager
    async def answering(self, ask: Ask, key: str) -> AsyncIterator[Stream]:
        begins = beginnings(ask, key)
        held = await self._hold(begins, [])
        try:
            async with await ask.begin(held.client, key) as stream:
                watching = asyncio.ensure_future(self._watch(stream, held, begins))
                try:
                    yield stream
                finally:
                    watching.cancel()
                    await asyncio.gather(watching, return_exceptions=True)
        finally:
            held.lease.close()

    async def _watch(self, stream: Stream, held: Held, begins: Sequence[str]) -> None:
        """Let the answer go on elsewhere whenever its replica is lost."""
        lost: list[str] = []
        while True:
            await asyncio.sleep(LOOK_S)
            if lost_s(held.client) <= LOST_S:
                continue
            lost.append(held.lease.name)
            log.warning("a replica is lost, and an answer goes on with another")
            try:
                found = await self._hold(begins, lost)
            except OutriderError as exc:
                log.warning("no other replica was found: %s", exc)
                return  # its client gives it up
            held.lease.close()
            held.lease, held.client = found.lease, found.client
            move(stream, held.client)

    async def _hold(self, begins: Sequence[str], lost: list[str]) -> Held:
        """A place on a replica that can be reached. Raises WorkerLost."""
        deadline = time.monotonic() + RESUME_S
        while True:
            try:
                async with asyncio.timeout(RESUME_S):
                    lease = await self._find(begins, lost[-MOST_AVOIDED:])
            except TimeoutError:
                raise WorkerLost("no replica had a place in time", "target") from None
            try:
                return Held(lease, await self._client_of(lease.address))
            except BaseException as exc:
                lease.close()
                if not isinstance(exc, ConnectionFailed):
                    raise
                lost.append(lease.name)
                if time.monotonic() > deadline:
                    raise WorkerLost("no replica can be reached", "target") from exc
            await asyncio.sleep(RETRY_S)

    async def _client_of(self, address: str) -> AsyncClient:
        """The client of this replica. Raises ConnectionFailed."""
        async with self._connecting:
            await self._forget_the_lost()
            client = self._clients.get(address)
            if client is None:
                client = connect(address, timeout_s=REACH_S, resume_s=RESUME_S, **self._reach)
                self._clients[address] = await client.__aenter__()
            if lost_s(client) > LOST_S:
                raise ConnectionFailed(f"the replica at {address} is gone")
            return client

    async def _forget_the_lost(self) -> None:
        """Those whose answers have all gone elsewhere, or come to nothing."""
        for address, client in list(self._clients.items()):
            if lost_s(client) > RESUME_S:
                del self._clients[address]
                await client.close()
