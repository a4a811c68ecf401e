"""The files of the page: what they are served with, and what they may not contain."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

from outrider_services.gateway import page
from outrider_services.gateway.access import Rules
from outrider_services.table import ServerOptions

STATIC = Path(page.__file__).parent / "static"
NAMES = sorted(path.name for path in STATIC.iterdir())
SVG = 'xmlns="http://www.w3.org/2000/svg"'  # a name, which nobody fetches
MOST_LINES = 400


class Tags(HTMLParser):
    """Each tag with its attributes, and the texts within scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def tags() -> list[tuple[str, dict[str, str | None]]]:
    parser = Tags()
    parser.feed((STATIC / "index.html").read_text())
    return parser.found


async def served(path: str) -> Any:
    routes = {one.path: one for one in page.router().routes if isinstance(one, APIRoute)}
    return await routes[path].endpoint()


async def test_every_file_is_served_with_its_type_and_the_policy() -> None:
    assert sorted(name for name, _ in page.FILES.values()) == NAMES
    for path, (name, kind) in page.FILES.items():
        answer = await served(path)
        assert answer.body == (STATIC / name).read_bytes()
        assert answer.headers["content-type"].split(";")[0] == kind
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-security-policy"] == page.POLICY


def test_the_policy_lets_nothing_in_from_elsewhere_and_runs_nothing_within_the_page() -> None:
    rules = dict(rule.strip().split(" ", 1) for rule in page.POLICY.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["require-trusted-types-for"] == "'script'"
    for name, sources in rules.items():
        if name.endswith("-src") or name in ("base-uri", "form-action", "frame-ancestors"):
            assert sources in ("'self'", "'none'"), name


@pytest.mark.parametrize("name", NAMES)
def test_no_file_names_another_site_or_is_too_long_to_be_read(name: str) -> None:
    text = (STATIC / name).read_text().replace(SVG, "")
    assert not re.search(r"https?:|wss?:|url\(|@import|[\"'(=]\s*//\w", text)
    assert text.count("\n") <= MOST_LINES


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_text_is_only_ever_inserted_as_text(name: str) -> None:
    words = r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|Function\(|createContextual"
    assert not re.search(words, (STATIC / name).read_text())


def test_what_the_page_needs_is_served_beside_it() -> None:
    """By relative names: a proxy may have put a prefix in front."""
    needed = [attrs[key] for _, attrs in tags() for key in ("src", "href") if key in attrs]
    for name in NAMES:
        if name.endswith(".js"):
            found = re.findall(r'from "\./(\w+\.js)"', (STATIC / name).read_text())
            needed += [f"page/{one}" for one in found]
    paths = {str(one) for one in needed if one and not one.startswith("#")}
    assert {f"/{path}" for path in paths} == set(page.FILES) - {"/"}


def test_nothing_within_the_page_is_run() -> None:
    for tag, attrs in tags():
        assert tag != "style"
        assert tag != "script" or attrs.get("src")
        assert not [key for key in attrs if key.startswith("on") or key == "style"]


def test_each_label_and_each_script_names_an_element_that_there_is() -> None:
    ids = [attrs["id"] for _, attrs in tags() if "id" in attrs]
    assert len(ids) == len(set(ids))
    used = {attrs[key] for _, attrs in tags() for key in ("for", "aria-labelledby") if key in attrs}
    for name in NAMES:
        used |= set(re.findall(r'\$\("([\w-]+)"\)', (STATIC / name).read_text()))
    assert used <= set(ids)


def test_the_page_needs_no_key_and_is_no_part_of_the_interface() -> None:
    keyed = Rules.of(ServerOptions(api_key=("alpha",)))
    for path in page.FILES:
        assert keyed.check(path, [(b"host", b"localhost")]) == ""
    app = FastAPI()
    app.include_router(page.router())
    assert app.openapi()["paths"] == {}
