"""What the tests fetch: all models if one of the chosen tests needs one, else nothing."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.errors import ModelNotFound
from outrider_services.models import catalogue
from outrider_services.models.fetching import ModelSource

CONFTEST = Path(__file__).parents[1] / "e2e" / "conftest.py"


@pytest.fixture
def conftest(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("conftest_of_models", CONFTEST)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "HAS_LLAMA", True)
    return module


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    files: list[str] = []
    monkeypatch.setattr(catalogue, "fetch", lambda source, progress: files.append(source.file))
    return files


Chosen = Callable[..., Any]


@pytest.fixture
def chosen(request: pytest.FixtureRequest) -> Chosen:
    """`chosen(mark, …)`: a session that is about to run a test for each mark."""

    def session(*marks: str, **options: bool) -> Any:
        items = [SimpleNamespace(get_closest_marker={mark: mark}.get) for mark in marks]
        config = SimpleNamespace(getoption=options.get, pluginmanager=request.config.pluginmanager)
        return SimpleNamespace(items=items, config=config)

    return session


def test_one_test_of_a_model_fetches_the_models(
    conftest: Any, fetched: list[str], chosen: Chosen
) -> None:
    conftest.pytest_collection_finish(chosen("asyncio", "model"))
    sources = catalogue.DEFAULT_TARGET, catalogue.DEFAULT_DRAFT, catalogue.TEST_MODEL
    assert sorted(fetched) == sorted(source.file for source in sources)


def test_nothing_is_fetched_for_other_tests_or_for_a_list_of_tests(
    conftest: Any, fetched: list[str], chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    conftest.pytest_collection_finish(chosen())
    conftest.pytest_collection_finish(chosen("asyncio"))
    conftest.pytest_collection_finish(chosen("model", collectonly=True))
    monkeypatch.setattr(conftest, "HAS_LLAMA", False)
    conftest.pytest_collection_finish(chosen("model"))
    assert fetched == []


def test_a_model_that_cannot_be_fetched_fails_its_tests_with_the_reason(
    conftest: Any, chosen: Chosen, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(source: ModelSource, progress: object) -> None:
        if source is catalogue.DEFAULT_DRAFT:
            raise ModelNotFound("no way to the hub")

    monkeypatch.setattr(catalogue, "fetch", fetch)
    monkeypatch.setattr(catalogue, "find", lambda source: Path(source.file))
    conftest.pytest_collection_finish(chosen("model"))
    with pytest.raises(pytest.fail.Exception, match="no way to the hub"):
        conftest.model("default_draft")
    assert conftest.model("test_model") == Path(catalogue.TEST_MODEL.file)
