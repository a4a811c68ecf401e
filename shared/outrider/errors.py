"""The error tree: each class carries the data of its case, a code for programs and an exit status.

OutriderError
├── InternalError          a fault of outrider itself
├── BadRequest             the request cannot be served as asked
├── ConfigError            a flag, variable or configuration key is wrong
├── ModelNotFound          no such model file, or its download failed
├── ModelUnusable          the file is there but cannot be loaded
├── UnknownRequest         no such request
├── IncompatiblePair       draft and target do not share a vocabulary
├── WorkerLost             a worker died, hung or never came
├── RequestPoisoned        the request ran in a target worker that died, and again in the next one
├── ConnectionFailed       no coordinator at that address, or it went away, or the client is closed
├── NotAllowed             the key is not trusted, or its role may not ask this
├── ProtocolError          the peer sent something that is not our protocol
├── Overloaded             too much is asked at once, or the place is taken
└── RequestTimeout         a deadline passed
"""

from __future__ import annotations

from typing import ClassVar


class OutriderError(Exception):
    """Base of every error that outrider raises on purpose; `str()` is one clear sentence or two."""

    code: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1


class InternalError(OutriderError):
    pass


class BadRequest(OutriderError):
    code = "invalid_request"
    exit_code = 2

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ConfigError(OutriderError):
    code = "invalid_config"
    exit_code = 3


class ModelNotFound(OutriderError):
    code = "model_not_found"
    exit_code = 4


class ModelUnusable(ModelNotFound):
    code = "model_unusable"


class UnknownRequest(OutriderError):
    code = "unknown_request"
    exit_code = 4


class IncompatiblePair(OutriderError):
    code = "incompatible_pair"
    exit_code = 5

    def __init__(self, message: str, token_id: int | None = None) -> None:
        super().__init__(message)
        self.token_id = token_id


class WorkerLost(OutriderError):
    code = "worker_unavailable"
    exit_code = 6

    def __init__(self, message: str, role: str | None = None) -> None:
        super().__init__(message)
        self.role = role


class RequestPoisoned(OutriderError):
    code = "request_poisoned"
    exit_code = 6


class ConnectionFailed(OutriderError):
    code = "connection_failed"
    exit_code = 7


class NotAllowed(OutriderError):
    code = "not_allowed"
    exit_code = 7


class ProtocolError(OutriderError):
    code = "protocol_error"
    exit_code = 7


class Overloaded(OutriderError):
    code = "busy"
    exit_code = 8


class RequestTimeout(OutriderError):
    code = "timeout"
    exit_code = 8


BY_CODE: dict[str, type[OutriderError]] = {
    cls.code: cls
    for cls in (
        InternalError, BadRequest, ConfigError, ModelNotFound, ModelUnusable, UnknownRequest,
        IncompatiblePair, WorkerLost, RequestPoisoned, ConnectionFailed, NotAllowed, ProtocolError,
        Overloaded,
        RequestTimeout,
    )
}  # fmt: skip


def from_code(code: str, message: str, param: str = "") -> OutriderError:
    """The error that a peer reported, as our class with that code, else as InternalError."""
    error = BY_CODE.get(code, InternalError)(message)
    if isinstance(error, BadRequest):
        error.param = param or None
    return error
