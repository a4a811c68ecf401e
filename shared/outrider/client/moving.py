"""An answer that goes on over another client: for whoever serves by several pipelines.

All of them must have the same target. What has come of the answer counts, and the next token is the
one that would have come.
"""

from __future__ import annotations

import math
import time

from outrider.client.connection import Connection
from outrider.client.stream import Stream


def lost_s(client: Connection) -> float:
    """For how many seconds its coordinator has been gone; 0 while there is one.

    Endless once it has been given up: see `resume_s` of `connect`.
    """
    if client._gone is not None:
        return time.monotonic() - client._gone
    return 0.0 if client._may_return else math.inf


def move(stream: Stream, client: Connection) -> None:
    """Let `stream` go on over `client`; nothing happens if it has ended.

    Raises ConnectionFailed if that client is closed.
    """
    if stream.finish_reason is None and stream._error is None:
        stream._client._release(stream._inbox)
        stream._client = client
        client._adopt(stream._inbox)
