"""The client library: `connect()` gives an asynchronous client, `Client` is its sync twin."""

from outrider.client.asynchronous import AsyncClient
from outrider.client.chat import ChatMessage, TextPart
from outrider.client.connecting import connect
from outrider.client.formats import tool_calls
from outrider.client.hermes import ToolCall
from outrider.client.results import Completion, CompletionChoice, FinishReason, Usage
from outrider.client.settings import CompletionSettings
from outrider.client.stream import Stream
from outrider.client.synchronous import Client, SyncStream

__all__ = [
    "AsyncClient",
    "ChatMessage",
    "Client",
    "Completion",
    "CompletionChoice",
    "CompletionSettings",
    "FinishReason",
    "Stream",
    "SyncStream",
    "TextPart",
    "ToolCall",
    "Usage",
    "connect",
    "tool_calls",
]
