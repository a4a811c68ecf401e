"""Real processes over real sockets, with the toy engine: what these tests start and look after.

Each test has a runtime directory of its own, and by that it knows its processes again, whoever
their parent is by now. After each test nothing may be left: no process, no socket file, no thread
and no descriptor. The oracle says what the answer has to be: the reference in this process, with
the toy engine alone.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import io
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    asynccontextmanager,
    redirect_stderr,
    redirect_stdout,
    suppress,
)
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import psutil
import pytest
from tests.oracle import alone

from outrider.client import AsyncClient, connect
from outrider.core.sampling import Sampling
from outrider.engines.toy import ToyEngine
from outrider_services import sources
from outrider_services.commands.cli import main
from outrider_services.pipeline.launcher import Launcher

GONE_S = 3.0  # how soon the processes of a launcher that was killed have to be gone
ROLES = ("coordinator", "target", "draft", "gateway")

# what a shell starts in the background ignores it, and so would all that is started here
signal.signal(signal.SIGINT, signal.default_int_handler)


# ---- what the answer has to be ------------------------------------------------------------------


class Answer(NamedTuple):
    token_ids: list[int]
    text: str


@lru_cache(maxsize=256)
def _plain(prompt: str | tuple[int, ...], count: int, sampling: Sampling) -> Answer:
    engine = ToyEngine()
    start = engine.tokenize(prompt, special=True) if isinstance(prompt, str) else prompt
    answer = list(islice(alone(engine, start, sampling), count))
    return Answer(answer, b"".join(map(engine.piece, answer)).decode("utf-8", "replace"))


class Oracle:
    """`oracle(prompt, count, temperature=…, seed=…)`: the one right answer."""

    def __call__(
        self, prompt: str | Sequence[int], count: int, *, temperature: float = 0.0, **settings: Any
    ) -> Answer:
        key = prompt if isinstance(prompt, str) else tuple(prompt)
        return _plain(key, count, Sampling(temperature=temperature, **settings))


@pytest.fixture(scope="session")
def oracle() -> Oracle:
    return Oracle()


# ---- processes ----------------------------------------------------------------------------------


def processes_of(runtime: Path) -> dict[int, list[str]]:
    """Command lines of whatever was started with this runtime directory and still runs, by pid."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("XDG_RUNTIME_DIR") == str(runtime)
            if ours and process.pid != os.getpid() and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process.cmdline()
    return found


def sockets_in(runtime: Path) -> list[str]:
    return sorted(path.name for path in runtime.glob("outrider/*.sock"))


def pids_by_role(runtime: Path, name: str) -> dict[str, int]:
    """The children of the pipeline `name`."""
    found = {}
    for pid, arguments in processes_of(runtime).items():
        if any(a == f"--name={name}" or a.endswith(f"/{name}.sock") for a in arguments):
            found.update({role: pid for role in ROLES if role in arguments})
    return found


class Cli:
    """The `outrider` command in processes of their own."""

    def __init__(self, runtime: Path, directory: Path) -> None:
        self.runtime, self.directory = runtime, directory
        self.started: list[subprocess.Popen[str]] = []
        self.prefix: tuple[str, ...] = ()  # a command that starts it

    def __call__(
        self, *arguments: str, stdin: str | bytes = "", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        done = subprocess.run(
            self._command(arguments),
            input=stdin.encode() if isinstance(stdin, str) else stdin,
            capture_output=True,
            timeout=25,
            cwd=self.directory,
            env=self._environment(environment),
            check=False,
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        return subprocess.CompletedProcess(done.args, done.returncode, out, err)

    def here(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it in this process: for what starts no other, and takes milliseconds then."""
        out, err, status = io.StringIO(), io.StringIO(), None
        with (
            mock.patch.dict(os.environ, self._environment({}), clear=True),
            mock.patch.object(sys, "stdin", io.StringIO()),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            try:
                main(arguments)
            except SystemExit as exc:
                status = exc.code
        assert isinstance(status, int)
        return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start it; what still runs at the end of the test is killed."""
        process = subprocess.Popen(
            self._command(arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.directory,
            env=self._environment(environment),
        )
        self.started.append(process)
        return process

    def _command(self, arguments: Sequence[str]) -> list[str]:
        return [*self.prefix, sys.executable, "-m", "outrider_services", *arguments]

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
        directories = {
            "OUTRIDER_SERVER__NO_GATEWAY": "true",  # its port is free once; see test_gateway.py
            "XDG_RUNTIME_DIR": str(self.runtime),
            "XDG_CONFIG_HOME": str(self.directory / "config"),
            "XDG_CACHE_HOME": str(self.directory / "cache"),
            "XDG_STATE_HOME": str(self.directory / "state"),
            "OUTRIDER_LOG__FORMAT": "text",  # else it were JSON, for nobody sits at these pipes
        }
        for name in ("LLAMA_CACHE", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
            kept.pop(name, None)
        return {**kept, **directories, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", **more}

    def close(self) -> None:
        for process in self.started:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


class Served:
    """A pipeline that `outrider serve` keeps up."""

    def __init__(self, cli: Cli, name: str, *arguments: str) -> None:
        self.cli, self.name, self.runtime = cli, name, cli.runtime
        flags = ("--backend=toy", "--listen=tcp://127.0.0.1:0", *arguments)
        self.process = cli.start("serve", f"--name={name}", *flags)
        self.lines: list[str] = []
        self._unread = b""  # several lines may come at once
        ready = self.line("Ready:")
        self.tcp = ready.split(" | ")[-1].strip()
        self.url = ready.split()[1]  # if it has a gateway
        self.ipc = f"ipc://{cli.runtime}/outrider/{name}.sock"

    def line(self, start: str, within_s: float = 15.0) -> str:
        """Wait for a line of its stderr that begins so."""
        assert self.process.stderr is not None
        deadline, stderr = time.monotonic() + within_s, self.process.stderr.fileno()
        while time.monotonic() < deadline:
            line, end, rest = self._unread.partition(b"\n")
            if end:
                self._unread = rest
                self.lines.append(line.decode() + "\n")
                if self.lines[-1].startswith(start):
                    return self.lines[-1]
            elif select.select([stderr], [], [], 0.1)[0]:
                more = os.read(stderr, 1 << 16)
                assert more, "".join(self.lines)
                self._unread += more
        raise AssertionError(f"no line {start!r} in {self.lines}")

    def pids(self) -> dict[str, int]:
        return pids_by_role(self.runtime, self.name)

    def connect(self) -> AsyncClient:
        return connect(self.ipc)

    def stop(self) -> int:
        self.process.terminate()
        self.process.communicate(timeout=10)
        return self.process.returncode


class Pipeline:
    """One that a launcher in this process keeps up."""

    def __init__(self, launcher: Launcher, runtime: Path) -> None:
        self.launcher, self.name, self.runtime = launcher, launcher.name, runtime
        self.lines: list[str] = []
        self.states: list[tuple[str, str]] = []

    def pids(self) -> dict[str, int]:
        return pids_by_role(self.runtime, self.name)

    def connect(self) -> AsyncClient:
        return connect(self.name)

    async def until(self, what: str, check: Callable[[], Any], within_s: float = 10.0) -> float:
        """Wait until `check` says so; how long that took."""
        return await until(what, check, within_s)

    async def joined(self, client: AsyncClient, role: str, within_s: float = 10.0) -> float:
        """Wait until a worker of this role is there."""

        async def check() -> bool:
            return role in (await client.health())["workers"]

        return await until(f"a {role} worker", check, within_s)

    async def idle(self, client: AsyncClient, within_s: float = 2.0) -> float:
        """Wait until no request runs or waits."""

        async def check() -> bool:
            return not any((await client.health())["requests"].values())

        return await until("no request", check, within_s)


async def until(what: str, check: Callable[[], Any], within_s: float) -> float:
    began = time.monotonic()
    while True:
        result = check()
        if await result if inspect.isawaitable(result) else result:
            return time.monotonic() - began
        if time.monotonic() - began > within_s:
            raise AssertionError(f"{what}: not within {within_s} s")
        await asyncio.sleep(0.02)


# ---- fixtures -----------------------------------------------------------------------------------


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime directory; short, for a socket's path must not exceed 107 bytes."""
    for name in [name for name in os.environ if name.startswith("OUTRIDER_")]:
        monkeypatch.delenv(name)
    path = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def cli(runtime: Path, tmp_path: Path) -> Iterator[Cli]:
    command = Cli(runtime, tmp_path)
    yield command
    command.close()


Serve = Callable[..., Served]


@pytest.fixture
def serve(cli: Cli) -> Serve:
    """`serve(name, *flags)`: a pipeline of the test's own."""
    return lambda name, *flags: Served(cli, name, *flags)


@pytest.fixture(scope="module")
def module_cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    """For what the tests of a module share."""
    runtime = Path(tempfile.mkdtemp(prefix="or-", dir="/tmp"))
    command = Cli(runtime, tmp_path_factory.mktemp("shared"))
    yield command
    command.close()
    shutil.rmtree(runtime)


@pytest.fixture(scope="module")
def served(module_cli: Cli) -> Iterator[Served]:
    """A pipeline for all tests of a module that leave it as it is."""
    flags = ("--toy-step-ms=4", "--toy-draft-ms=0.4", "--toy-row-ms=0.05")
    pipeline = Served(module_cli, "shared", *flags)
    yield pipeline
    pids = set(pipeline.pids().values())
    assert pipeline.stop() == 143
    assert not pids & set(processes_of(module_cli.runtime))


HTTP = ("--no-gateway=false", "--port=0")  # a gateway, on a port that is free


@pytest.fixture(scope="module")
def web(module_cli: Cli) -> Iterator[Served]:
    """The same with a gateway."""
    quick = ("--toy-step-ms=4", "--toy-draft-ms=0.4", "--toy-row-ms=0.05")
    pipeline = Served(module_cli, "web", *quick, *HTTP)
    yield pipeline
    assert pipeline.stop() == 143


@pytest.fixture(scope="module")
def slow(module_cli: Cli) -> Iterator[Served]:
    """The same, slow enough to be watched."""
    pipeline = Served(module_cli, "slow", "--toy-step-ms=30", "--toy-draft-ms=4", *HTTP)
    yield pipeline
    assert pipeline.stop() == 143


@pytest.fixture
def pipeline(
    runtime: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., AbstractAsyncContextManager[Pipeline]]:
    """`async with pipeline(toy__step_ms=10.0) as up`: options by their keys."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    @asynccontextmanager
    async def start(
        *, name: str = "test", edit: Callable[[Launcher], None] | None = None, **values: Any
    ) -> AsyncIterator[Pipeline]:
        quick = {"toy.step_ms": 4.0, "toy.draft_ms": 0.4, "toy.row_ms": 0.05}
        given = {key.replace("__", "."): value for key, value in values.items()}
        settings = sources.settings({"pipeline.backend": "toy", **quick, **given})
        launcher = Launcher(
            settings,
            name,
            lambda role, state, _: up.states.append((role, state)),
            lambda role, line: up.lines.append(f"[{role}] {line}"),
        )
        if edit:
            edit(launcher)
        up = Pipeline(launcher, runtime)
        async with launcher:
            yield up

    return start


class Census(NamedTuple):
    """What this process holds."""

    children: frozenset[int]
    threads: int
    descriptors: int


def census() -> Census:
    gc.collect()
    children = frozenset(child.pid for child in psutil.Process().children())
    return Census(children, threading.active_count(), len(os.listdir("/proc/self/fd")))


def leaks(before: Census, runtime: Path, within_s: float = GONE_S) -> list[str]:
    """What there is now and was not before, once it had time to end."""
    deadline = time.monotonic() + within_s
    while True:
        now = census()
        found = [
            *(f"process {pid}: {line}" for pid, line in processes_of(runtime).items()),
            *(f"child {pid}" for pid in now.children - before.children),
            *(f"socket {name}" for name in sockets_in(runtime)),
            *([f"{now.threads} threads, not {before.threads}"] * (now.threads > before.threads)),
            *(
                [f"{now.descriptors} descriptors, not {before.descriptors}"]
                * (now.descriptors > before.descriptors)
            ),
        ]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def ctrl_c_stays_as_it_was() -> Iterator[None]:
    """A command that ran in this process has left its loop's handler behind."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def nothing_left(runtime: Path) -> Iterator[Census]:
    """Every test leaves this process and the machine as they were."""
    before = census()
    yield before
    assert leaks(before, runtime) == []


@pytest.fixture
def look_for_leaks(nothing_left: Census, runtime: Path) -> Callable[..., list[str]]:
    return lambda within_s=GONE_S: leaks(nothing_left, runtime, within_s)
