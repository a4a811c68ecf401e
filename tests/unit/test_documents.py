"""What the documents point at is there, and the first page stays short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import outrider

ROOT = Path(__file__).resolve().parents[2]
PAGES = ["README.md", ".github/CONTRIBUTING.md", ".github/SECURITY.md", "deploy/CHANGELOG.md",
         "deploy/VERSIONS.md",
         "deploy/performance/README.md"]  # fmt: skip
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")
PATH = re.compile(r"(?<![\w/.])((?:shared|services|tests|deploy|scripts|\.github)/[\w./-]*\w)")


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(), flags=re.DOTALL)
    named = {ROOT / page / ".." / link for link in LINK.findall(text)}
    named |= {ROOT / path for path in PATH.findall(text)}
    assert named
    assert [str(path) for path in sorted(named) if not path.resolve().exists()] == []


def test_the_changelog_names_this_version() -> None:
    changes = (ROOT / "deploy" / "CHANGELOG.md").read_text()
    assert f"\n## {outrider.__version__}\n" in changes


def test_the_readme_is_read_in_one_sitting() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
