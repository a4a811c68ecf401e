"""The gateway's process: one socket, one connection to the coordinator, until it is told to end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn

from outrider_services.gateway.access import Rules
from outrider_services.gateway.answering import Gateway
from outrider_services.gateway.app import application
from outrider_services.gateway.connections import HEAD_LIMIT, IDLE_S, Connection
from outrider_services.gateway.upstream import Upstream
from outrider_services.pipeline.processes import say
from outrider_services.table import ServerOptions

LAST_S = 1.0  # most that answers get to end by themselves, once the gateway is to end


class Server(uvicorn.Server):
    """uvicorn's, but signals are for the process around it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        say("ready", 1.0)

    def cut(self) -> None:
        """End the connections that nobody reads."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection) and connection.flow.write_paused:
                connection.transport.abort()


async def serve(
    server: ServerOptions, pipeline: str, listener: socket.socket, **reach: Any
) -> None:
    """Serve the pipeline on `listener` until cancelled. Raises ConfigError for unusable keys.

    `reach` is for `connect`.
    """
    upstream = Upstream(pipeline, **reach)
    app = application(Gateway(upstream, server), Rules.of(server))
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=HEAD_LIMIT,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=2,  # behind `LAST_S`; in all less than a launcher waits
    )
    http = Server(config)
    serving = asyncio.ensure_future(http.serve(sockets=[listener]))
    try:
        await asyncio.shield(serving)
    except asyncio.CancelledError:
        http.should_exit = True
        await asyncio.wait([serving], timeout=LAST_S)
        await upstream.close()  # whoever still waits is told
        http.cut()
        await serving
        raise
    finally:
        await upstream.close()
