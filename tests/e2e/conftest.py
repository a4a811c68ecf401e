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
from outrider.errors import ModelNotFound
from outrider_services.models import catalogue
from outrider_services.terminal import progress_reporter

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "outrider_services"]


SOURCES = {
    "test_model": catalogue.TEST_MODEL,
    "default_target": catalogue.DEFAULT_TARGET,
    "default_draft": catalogue.DEFAULT_DRAFT,
}
HAS_LLAMA = importlib.util.find_spec("llama_cpp") is not None
unfetched: dict[str, str] = {}  # why a model is not there


def pytest_collection_finish(session: pytest.Session) -> None:
    """Fetch the models if a test that needs one is going to run, before any test's clock runs."""
    chosen = any(item.get_closest_marker("model") for item in session.items)
    if not chosen or not HAS_LLAMA or session.config.getoption("collectonly"):
        return
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled(), progress_reporter() as progress:
        for name, source in SOURCES.items():
            try:
                catalogue.fetch(source, progress)
            except ModelNotFound as exc:
                unfetched[name] = str(exc)


def model(name: str) -> Path:
    if not HAS_LLAMA:
        pytest.skip("llama-cpp-python is not installed")
    if name in unfetched:
        pytest.fail(unfetched[name])
    found = catalogue.find(SOURCES[name])
    assert found is not None
    return found


@pytest.fixture(scope="session")
def test_model() -> Path:
    return model("test_model")


@pytest.fixture(scope="session")
def default_target() -> Path:
    return model("default_target")


@pytest.fixture(scope="session")
def default_draft() -> Path:
    return model("default_draft")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny models, which `scripts/make-tiny-models` describes."""
    if not HAS_LLAMA:
        pytest.skip("llama-cpp-python is not installed")
    folder = tmp_path_factory.mktemp("tiny")
    make = [sys.executable, str(ROOT / "scripts" / "make-tiny-models"), str(folder)]
    subprocess.run(make, check=True, timeout=60)
    return folder


Serve = Callable[..., outrider.Client]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """`serve(*flags)` starts `outrider serve` and returns a client of it, within `seconds`."""
    started: list[tuple[subprocess.Popen[bytes], outrider.Client]] = []
    with tempfile.TemporaryDirectory(prefix="or-", dir="/tmp") as directory:
        outside = os.environ.get("XDG_RUNTIME_DIR")
        os.environ["XDG_RUNTIME_DIR"] = directory

        def start(*flags: str | Path, seconds: float = 60) -> outrider.Client:
            name = f"e2e-{len(started)}"
            arguments = [*COMMAND, "serve", "--no-gateway", f"--name={name}"]
            arguments += map(str, flags)
            process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
            client = outrider.Client(name, timeout_s=seconds)
            started.append((process, client))
            wait_for_workers(client, seconds)
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
