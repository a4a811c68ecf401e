"""The one function that most programs begin with."""

from __future__ import annotations

from outrider.client.asynchronous import AsyncClient
from outrider.wire.keys import ClientRole, Keys


def connect(
    pipeline: str = "default",
    *,
    timeout_s: float = 3.0,
    resume_s: float = 15.0,
    keys: Keys = None,
    role: ClientRole = "client",
    insecure: bool = False,
) -> AsyncClient:
    """A client to enter: `async with outrider.connect() as client`; see `AsyncClient`."""
    return AsyncClient(
        pipeline,
        timeout_s=timeout_s,
        resume_s=resume_s,
        keys=keys,
        role=role,
        insecure=insecure,
    )
