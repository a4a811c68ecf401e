"""A Serve application that streams what time it is: for what Ray takes of a fragment."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ray import serve

LINES, PAUSE_S = 100, 0.02


class Clock:
    """An application in ASGI."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(LINES):
            await asyncio.sleep(PAUSE_S)
            line = f"{time.monotonic()}\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@serve.deployment(name="clock", ray_actor_options={"num_cpus": 0, "resources": {"head": 0.1}})
@serve.ingress(Clock())
class Ticking:
    """The deployment's class."""
