"""Real models for the tests marked `model`; skipped where the model has not been fetched."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


def model(variable: str, name: str) -> Path:
    """The file that the environment names, or else the one in the model cache."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    if path := os.environ.get(variable):
        return Path(path)
    from outrider_services import models

    found = models.find(getattr(models, name))
    if found is None:
        pytest.skip(f"{name} has not been fetched")
    return Path(found)


@pytest.fixture(scope="session")
def test_model() -> Path:
    return model("OUTRIDER_TEST_MODEL", "TEST_MODEL")


@pytest.fixture(scope="session")
def default_target() -> Path:
    return model("OUTRIDER_TEST_TARGET", "DEFAULT_TARGET")


@pytest.fixture(scope="session")
def default_draft() -> Path:
    return model("OUTRIDER_TEST_DRAFT", "DEFAULT_DRAFT")
