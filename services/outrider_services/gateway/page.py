"""The page at /: a chat in which the pipeline can be watched.

Its files are open, for they tell nothing: the page itself asks for the key that its requests need.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # every command knows these paths, and FastAPI takes a third of a second
    from fastapi import APIRouter, Response

FILES = {  # by path: name and type
    "/": ("index.html", "text/html"),
    "/page/style.css": ("style.css", "text/css"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript")
        for name in ("api", "chat", "lanes", "page", "pipeline", "tokens")
    },
}
# what the browser keeps to, whatever a model says: nothing is loaded from elsewhere, nothing within
# the page is run, and text does not become HTML
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # another version may be served tomorrow
}


def router() -> APIRouter:
    """The paths of the page."""
    from fastapi import APIRouter

    routes = APIRouter(include_in_schema=False)
    for path, (name, kind) in FILES.items():
        routes.add_api_route(path, _sender(name, kind), methods=["GET"])
    return routes


def _sender(name: str, kind: str) -> Callable[[], Awaitable[Response]]:
    from fastapi import Response

    content = (resources.files(__package__) / "static" / name).read_bytes()

    async def send() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return send
