"""From a request to its answer: asks the pipeline, and tells the answer while the client stays."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from fastapi import Request
from starlette.responses import Response

from outrider.core.values import Fragment
from outrider_services.gateway.asking import Answer, Ask
from outrider_services.gateway.fields import Sampled
from outrider_services.gateway.sse import PING, Events, dump, while_connected
from outrider_services.gateway.upstream import Upstream
from outrider_services.table import ServerOptions

MOST_IGNORED = 32  # names of ignored fields that are listed
STRANGE = re.compile(r"[^A-Za-z0-9_.-]")


class Form(Protocol):
    """How an answer is told: see `openai_answers` and `llama_answers`."""

    def start(self) -> bytes: ...
    def part(self, fragment: Fragment) -> bytes: ...
    def end(self) -> bytes: ...
    def whole(self) -> dict[str, Any]: ...


Make: TypeAlias = Callable[[Answer, str], Form]  # from an answer and the model's name


@dataclass(frozen=True, slots=True)
class Gateway:
    """What every request needs."""

    upstream: Upstream
    server: ServerOptions

    async def model(self) -> str:
        """The model's name. Raises WorkerLost while there is none."""
        return self.server.alias or str((await self.upstream.target())["model"])

    async def answer(self, request: Request, body: Sampled, ask: Ask, make: Make) -> Response:
        """The response to `body`, which asks for `ask`; `make` makes the form of its answer."""
        headers = {"X-Request-Id": request.scope["state"]["id"], **listed(body.ignored())}
        if body.stream:
            return Events(self._events(request, ask, make), headers)
        whole = await while_connected(request.receive, self._whole(request, ask, make))
        return Response(dump(whole), media_type="application/json", headers=headers)

    async def _whole(self, request: Request, ask: Ask, make: Make) -> dict[str, Any]:
        async with self._answering(request, ask) as answer:
            async for _ in answer.fragments(0.0, self.server.timeout_s):
                pass
            return self._form(make, answer).whole()

    async def _events(self, request: Request, ask: Ask, make: Make) -> AsyncGenerator[bytes]:
        server = self.server
        async with (
            self._answering(request, ask) as answer,
            aclosing(answer.fragments(server.sse_ping_s, server.timeout_s)) as fragments,
        ):
            form: Form | None = None
            async for fragment in fragments:
                part = b""
                if fragment is None:
                    part = PING
                elif form is None:  # only now the model is known
                    form = self._form(make, answer)
                    part = form.start() + form.part(fragment)
                else:
                    part = form.part(fragment)
                if part:
                    yield part
            if form is None:  # it was cancelled before
                form = self._form(make, answer)
                yield form.start()
            yield form.end()

    def _form(self, make: Make, answer: Answer) -> Form:
        return make(answer, self.server.alias or answer.stream.model)

    @asynccontextmanager
    async def _answering(self, request: Request, ask: Ask) -> AsyncIterator[Answer]:
        """Ask the pipeline; whatever happens, nothing is generated for it afterwards."""
        name, key = request.scope["state"]["id"], request.scope["state"]["key"]
        async with self.upstream.answering(ask, key) as stream:
            with self.upstream.running(name, key, stream):
                yield Answer(name, ask, stream)


def listed(ignored: Sequence[str]) -> dict[str, str]:
    """The header that names the fields which changed nothing."""
    names = [STRANGE.sub("?", name[:64]) for name in sorted(ignored)[:MOST_IGNORED]]
    return {"X-Outrider-Ignored": ", ".join(names)} if names else {}
