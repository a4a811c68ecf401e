"""The HTTP application: which path does what."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

import outrider
from outrider.errors import ConnectionFailed, RequestTimeout
from outrider_services.gateway import errors, handlers, llama_answers, page
from outrider_services.gateway.access import Rules
from outrider_services.gateway.answering import Gateway, listed
from outrider_services.gateway.errors import Refused
from outrider_services.gateway.limits import Gate
from outrider_services.gateway.llama_answers import NativeForm
from outrider_services.gateway.llama_requests import (
    DetokenizeRequest,
    InfillRequest,
    NativeRequest,
    TemplateRequest,
    TokenizeRequest,
)
from outrider_services.gateway.openai_answers import ChatForm, CompletionForm
from outrider_services.gateway.openai_requests import ChatRequest, CompletionRequest
from outrider_services.gateway.upstream import targets
from outrider_services.pipeline.exposition import CONTENT_TYPE, exposition

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text}
    for status, text in {
        400: "the request is wrong",
        401: "no key, or a wrong one",
        403: "a host or an origin that is not allowed",
        404: "there is no such thing",
        408: "the body did not come in time",
        413: "the body is too large",
        429: "too much is asked at once",
        503: "there is no target worker",
        504: "no answer in time",
    }.items()
}


def application(gateway: Gateway, rules: Rules) -> FastAPI:
    """The application in front of the pipeline of `gateway`."""
    app = FastAPI(
        title="outrider",
        version=outrider.__version__,
        docs_url=None,  # their pages would load scripts from elsewhere
        redoc_url=None,
        responses=ERRORS,
    )
    handlers.install(app)
    for make in (openai, models, native, questions, service):
        app.include_router(make(gateway))
    app.include_router(page.router())
    app.add_middleware(Gate, rules=rules)
    if rules.origins:  # outermost, so that refusals can be read, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(rules.origins),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id", "X-Outrider-Ignored"],
        )
    return app


def openai(gateway: Gateway) -> APIRouter:
    """OpenAI's paths that generate, and ours that ends it."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])

    @routes.post("/chat/completions")
    async def chat(request: Request, body: ChatRequest) -> Response:
        return await gateway.answer(
            request,
            body,
            body.ask(),
            lambda answer, model: ChatForm(
                answer, model, usage=body.wants_usage, provenance=bool(body.return_provenance)
            ),
        )

    @routes.post("/completions")
    async def complete(request: Request, body: CompletionRequest) -> Response:
        return await gateway.answer(
            request,
            body,
            body.ask(),
            lambda answer, model: CompletionForm(
                answer, model, usage=body.wants_usage, provenance=bool(body.return_provenance)
            ),
        )

    @routes.delete("/requests/{name}")
    async def cancel(request: Request, name: str) -> Response:
        await gateway.upstream.cancel(name, request.scope["state"]["key"])
        return JSONResponse({"id": name, "cancelled": True})

    return routes


def models(gateway: Gateway) -> APIRouter:
    """OpenAI's paths about the model."""
    routes = APIRouter(prefix="/v1", tags=["OpenAI"])
    began = int(time.time())

    def described(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": began, "owned_by": "outrider"}

    @routes.get("/models")
    async def listing() -> Response:
        return JSONResponse({"object": "list", "data": [described(await gateway.model())]})

    @routes.get("/models/{name:path}")
    async def model(name: str) -> Response:
        if name != await gateway.model():
            raise Refused(404, "model_not_found", f"there is no model {name!r:.100} here")
        return JSONResponse(described(name))

    return routes


def native(gateway: Gateway) -> APIRouter:
    """llama.cpp's own paths that generate."""
    routes = APIRouter(tags=["llama.cpp"])

    async def answered(request: Request, body: NativeRequest | InfillRequest) -> Response:
        return await gateway.answer(
            request,
            body,
            body.ask(),
            lambda answer, model: NativeForm(
                answer, model, body.response_fields, provenance=bool(body.return_provenance)
            ),
        )

    @routes.post("/completion")
    @routes.post("/completions")
    async def complete(request: Request, body: NativeRequest) -> Response:
        return await answered(request, body)

    @routes.post("/infill")
    async def infill(request: Request, body: InfillRequest) -> Response:
        return await answered(request, body)

    return routes


def questions(gateway: Gateway) -> APIRouter:
    """llama.cpp's own paths that are about text."""
    routes = APIRouter(tags=["llama.cpp"])

    @routes.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        ignored = body.ignored()
        body.check()
        client = await gateway.upstream.client()
        tokens = await client.tokenize(body.content, special=body.parse_special)
        if not body.add_special:
            around = await client.tokenize("", special=False)  # what the model puts in front
            tokens = tokens[len(around) :] if tokens[: len(around)] == around else tokens
        return JSONResponse({"tokens": list(tokens)}, headers=listed(ignored))

    @routes.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        ignored = body.ignored()
        text = await (await gateway.upstream.client()).detokenize(body.tokens)
        return JSONResponse({"content": text}, headers=listed(ignored))

    @routes.post("/apply-template")
    async def apply_template(body: TemplateRequest) -> Response:
        ignored = body.ignored()
        text = await (await gateway.upstream.client()).apply_template(
            body.said(), tools=body.offered(), tool_choice=body.choice()
        )
        return JSONResponse({"prompt": text}, headers=listed(ignored))

    return routes


def service(gateway: Gateway) -> APIRouter:
    """What is told of the server."""
    routes = APIRouter(tags=["llama.cpp"])

    @routes.get("/health")
    @routes.get("/v1/health")
    async def health() -> Response:
        try:
            report = await gateway.upstream.health()
        except (ConnectionFailed, RequestTimeout):
            report = {"status": "loading", "workers": {}}
        if report["status"] == "ok":
            return JSONResponse(report)
        words = "Stopping" if report["status"] == "stopping" else "Loading model"
        error = {"code": 503, "message": words, "type": "unavailable_error"}
        told = {"error": error, "workers": report["workers"]}
        return JSONResponse(told, 503, errors.headers(503))

    @routes.get("/props")
    async def props() -> Response:
        target = await gateway.upstream.target()
        model = gateway.server.alias or str(target["model"])
        return JSONResponse(llama_answers.props(target, model))

    @routes.get("/slots")
    async def slots(fail_on_no_slot: bool = False) -> Response:
        report = await gateway.upstream.ready()
        slots = sum(one["slots"] for one in targets(report["workers"]).values())
        if fail_on_no_slot and report["requests"]["running"] >= slots:
            raise Refused(503, "no_slot", "every sequence is at work")
        return JSONResponse(llama_answers.slots(report["workers"], report["slots"]))

    @routes.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        compat = gateway.server.metrics_compat
        told = exposition(await gateway.upstream.metrics(), compat)
        return Response(told, media_type=CONTENT_TYPE)

    return routes
