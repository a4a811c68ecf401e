"""Pipelined speculative decoding for GGUF models: the library for clients of a pipeline.

async with outrider.connect() as client:
    stream = await client.create_completion("The future of AI is", max_tokens=100, stream=True)
    async for fragment in stream:
        print(fragment.text, end="")
"""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING

from outrider.core.constraints import Constraint
from outrider.core.stats import Report
from outrider.core.values import Drafted, Fragment, Span, Token, ToolCallDelta, TopLogprob
from outrider.errors import (
    BadRequest,
    ConfigError,
    ConnectionFailed,
    IncompatiblePair,
    InternalError,
    ModelNotFound,
    ModelUnusable,
    NotAllowed,
    OutriderError,
    Overloaded,
    ProtocolError,
    RequestPoisoned,
    RequestTimeout,
    UnknownRequest,
    WorkerLost,
)

if TYPE_CHECKING:
    from outrider.client import (
        AsyncClient,
        ChatMessage,
        Client,
        Completion,
        CompletionChoice,
        CompletionSettings,
        FinishReason,
        Stream,
        SyncStream,
        TextPart,
        ToolCall,
        Usage,
        connect,
        tool_calls,
    )

__all__ = [
    "AsyncClient",
    "BadRequest",
    "ChatMessage",
    "Client",
    "Completion",
    "CompletionChoice",
    "CompletionSettings",
    "ConfigError",
    "ConnectionFailed",
    "Constraint",
    "Drafted",
    "FinishReason",
    "Fragment",
    "IncompatiblePair",
    "InternalError",
    "ModelNotFound",
    "ModelUnusable",
    "NotAllowed",
    "OutriderError",
    "Overloaded",
    "ProtocolError",
    "Report",
    "RequestPoisoned",
    "RequestTimeout",
    "Span",
    "Stream",
    "SyncStream",
    "TextPart",
    "Token",
    "ToolCall",
    "ToolCallDelta",
    "TopLogprob",
    "UnknownRequest",
    "Usage",
    "WorkerLost",
    "connect",
    "tool_calls",
]


if not TYPE_CHECKING:  # else type checkers would let every misspelt name pass

    def __getattr__(name: str) -> object:
        """The client's names, on first use: the core can be had without sockets (PEP 562)."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        client = import_module("outrider.client")
        globals().update({each: getattr(client, each) for each in client.__all__})
        return globals()[name]


def __dir__() -> list[str]:
    return __all__
