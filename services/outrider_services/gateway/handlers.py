"""The answer to a request that failed, whoever noticed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from outrider.errors import BadRequest, OutriderError
from outrider_services.gateway.errors import Refused, content, headers, status_of, unexpected
from outrider_services.gateway.sse import ClientLeft

WORDS = re.compile(r"[a-z][a-z0-9_.]*")  # names of fields, not those of pydantic's types


def response(error: OutriderError) -> JSONResponse:
    status = status_of(error)
    return JSONResponse(content(error), status, headers(status))


# ---- what FastAPI and Starlette raise -----------------------------------------------------------


def from_validation(errors: Sequence[Mapping[str, Any]]) -> BadRequest:
    """One sentence about the mistake that lies deepest: others are of alternatives not meant."""
    worst = max(errors, key=lambda one: len(_names(one["loc"])))
    names = _names(worst["loc"])
    if worst["type"] == "json_invalid":
        return BadRequest("the body is not JSON")
    if not names:
        return BadRequest("the body must be a JSON object")
    first, *inner = names
    place = str(first) + "".join(f"[{n}]" if isinstance(n, int) else f".{n}" for n in inner)
    said = str(worst["msg"])  # "Input should be …", "Field required"
    rest = said.removeprefix("Input") if said.startswith("Input ") else f": {said.lower()}"
    return BadRequest(f"{place:.100}{rest}", str(first))


def _names(location: Sequence[str | int]) -> list[str | int]:
    """Without the part of the request, and without the types that pydantic tried."""
    inner = location[1:]
    return [
        one
        for one in inner
        if isinstance(one, int) or (WORDS.fullmatch(one) and one not in ("str", "float", "int"))
    ]


def install(app: FastAPI) -> None:
    """Let `app` tell every error in this form."""

    async def on_known(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, OutriderError)
        return response(exc)

    async def on_validation(_: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, RequestValidationError)
        return response(from_validation(exc.errors()))

    async def on_http(request: Request, exc: Exception) -> JSONResponse:
        assert isinstance(exc, HTTPException)
        match exc.status_code:
            case 404:
                told = Refused(404, "not_found", f"there is nothing at {request.url.path:.200}")
            case 405:
                told = Refused(405, "method_not_allowed", f"{request.method} does not work here")
            case status:
                told = Refused(status, "invalid_request", "the body is not JSON")
        answer = response(told)
        answer.headers.update(exc.headers or {})
        return answer

    async def on_left(_: Request, exc: Exception) -> JSONResponse:
        # nobody reads it, unless it is the gateway that leaves
        return response(Refused(503, "stopping", "the gateway is being stopped"))

    async def on_fault(_: Request, exc: Exception) -> JSONResponse:
        return response(unexpected(exc))

    app.add_exception_handler(OutriderError, on_known)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(ClientLeft, on_left)
    app.add_exception_handler(Exception, on_fault)
