"""Pipelined speculative decoding for GGUF models: the library for clients of a pipeline.

async with outrider.connect() as client:
    stream = await client.create_completion("The future of AI is", max_tokens=100, stream=True)
    async for fragment in stream:
        print(fragment.text, end="")
"""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from outrider.core.stats import Report
from outrider.core.values import Drafted, Fragment, Span, Token
from outrider.errors import (
    BadRequest,
    ConfigError,
    ConnectionFailed,
    IncompatiblePair,
    InternalError,
    ModelNotFound,
    ModelUnusable,
    OutriderError,
    Overloaded,
    ProtocolError,
    RequestTimeout,
    UnknownRequest,
    WorkerLost,
)

if TYPE_CHECKING:
    from outrider.client import AsyncClient, Client, Completion, Stream, connect

__all__ = [
    "AsyncClient",
    "BadRequest",
    "Client",
    "Completion",
    "ConfigError",
    "ConnectionFailed",
    "Drafted",
    "Fragment",
    "IncompatiblePair",
    "InternalError",
    "ModelNotFound",
    "ModelUnusable",
    "OutriderError",
    "Overloaded",
    "ProtocolError",
    "Report",
    "RequestTimeout",
    "Span",
    "Stream",
    "Token",
    "UnknownRequest",
    "WorkerLost",
    "connect",
]


def __getattr__(name: str) -> object:
    """The client's names, on first use: the core can be had without sockets (PEP 562)."""
    from outrider import client

    if name in __all__:
        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
