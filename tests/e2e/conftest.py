"""Real models for the tests marked `model`, and pipelines over them in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import outrider
from outrider_services.models import catalogue
from outrider_services.models.fetching import ModelSource

COMMAND = [sys.executable, "-m", "outrider_services"]


def model(source: ModelSource) -> Path:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    found = catalogue.find(source)
    if found is None:
        pytest.skip(f"{source.file} has not been fetched")
    return found


@pytest.fixture(scope="session")
def test_model() -> Path:
    return model(catalogue.TEST_MODEL)


@pytest.fixture(scope="session")
def default_target() -> Path:
    return model(catalogue.DEFAULT_TARGET)


@pytest.fixture(scope="session")
def default_draft() -> Path:
    return model(catalogue.DEFAULT_DRAFT)


Serve = Callable[..., outrider.Client]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """`serve(*flags)` starts `outrider serve` and returns a client of it."""
    started: list[tuple[subprocess.Popen[bytes], outrider.Client]] = []
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as directory:
        outside = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = directory

        def start(*flags: str | Path) -> outrider.Client:
            name = f"e2e-{len(started)}"
            arguments = [*COMMAND, "serve", f"--name={name}", *map(str, flags)]
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
            client = outrider.Client(name, timeout_s=60)
            started.append((process, client))
            wait_for_workers(client)
            return client

        try:
            yield start
        finally:
            for process, client in started:
                client.close()
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 128 + signal.SIGTERM
            left = list(Path(directory).rglob("*.sock"))
            if outside is None:
                del os.environ["XDG_RUNTIME_DIR"]
            else:
                os.environ["XDG_RUNTIME_DIR"] = outside
            assert left == []


def wait_for_workers(client: outrider.Client, seconds: float = 60) -> None:
    import time

    deadline = time.monotonic() + seconds
    while set(client.health()["workers"]) != {"target", "draft"}:
        assert time.monotonic() < deadline, client.health()
        time.sleep(0.1)
