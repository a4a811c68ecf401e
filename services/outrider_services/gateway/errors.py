"""Errors as HTTP tells them: OpenAI's object, one sentence, and the status that fits."""

from __future__ import annotations

import logging
from typing import Any

from outrider.errors import (
    BadRequest,
    ConnectionFailed,
    InternalError,
    NotAllowed,
    OutriderError,
    Overloaded,
    ProtocolError,
    RequestPoisoned,
    RequestTimeout,
    UnknownRequest,
    WorkerLost,
)

log = logging.getLogger(__name__)

STATUSES: dict[type[OutriderError], int] = {
    BadRequest: 400,
    UnknownRequest: 404,
    RequestPoisoned: 422,  # not a status at which clients try again by themselves
    Overloaded: 429,
    ProtocolError: 502,
    WorkerLost: 503,
    ConnectionFailed: 503,
    NotAllowed: 503,
    RequestTimeout: 504,
}
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
RETRY_S = {429: 1, 503: 2}  # when to come back: a place may be free, a worker may be up again


class Refused(OutriderError):
    """A request that HTTP itself gives a status for, with a code for programs."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.reason = status, code


def status_of(error: OutriderError) -> int:
    if isinstance(error, Refused):
        return error.status
    return next((status for kind, status in STATUSES.items() if isinstance(error, kind)), 500)


def content(error: OutriderError) -> dict[str, Any]:
    """The body that tells of `error`."""
    if isinstance(error, ConnectionFailed | NotAllowed):  # its own words say where our sockets lie
        error = WorkerLost("the pipeline is not there: it may be starting, or being restarted")
    status = status_of(error)
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    param = error.param if isinstance(error, BadRequest) else None
    code = error.reason if isinstance(error, Refused) else error.code
    return {"error": {"message": str(error), "type": kind, "param": param, "code": code}}


def headers(status: int) -> dict[str, str]:
    found = {"Retry-After": str(RETRY_S[status])} if status in RETRY_S else {}
    return {**found, "WWW-Authenticate": "Bearer"} if status == 401 else found


def unexpected(error: Exception) -> InternalError:
    """What is told of a fault of ours: the log has the rest."""
    log.error("a request failed", exc_info=error)
    return InternalError("the gateway failed at this request; its log says why")
