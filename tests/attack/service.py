"""A pipeline of its own to be attacked: `outrider serve` on the toy engine, and what it uses."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from math import inf
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).parents[2]
ROLES = ("launcher", "coordinator", "target", "draft")
GATEWAY = "gateway"  # only where a service has one
READY_S, END_S, GONE_S = 90.0, 10.0, 3.0
Descriptors = tuple[int, int]  # soft and hard limit


class Usage(NamedTuple):
    """What one process holds and has used."""

    memory: int  # bytes that it shares with nobody
    descriptors: int
    threads: int
    cpu_s: float
    peak: int = 0  # bytes of memory that it has had at most, shared ones included


class Pauses:
    """When processes were stopped by us: those seconds are nobody's wait."""

    def __init__(self) -> None:
        self._spans: list[tuple[float, float]] = []

    def add(self, start: float, end: float) -> None:
        self._spans.append((start, end))

    @contextmanager
    def meanwhile(self) -> Iterator[None]:
        """Inside, it is such a time."""
        now = time.monotonic()
        self._spans.append((now, inf))
        try:
            yield
        finally:
            self._spans.remove((now, inf))
            self.add(now, time.monotonic())

    def within(self, start: float, end: float) -> float:
        """How many of the seconds between `start` and `end` were such."""
        return sum(max(0.0, min(end, b) - max(start, a)) for a, b in self._spans)


class Service:
    """`with Service(flags)`: inside, the pipeline is up. Outside, nothing of it is left running.

    With `unread`, its stderr is a pipe that nobody reads once it is ready. `descriptors` are limits
    of open files for the launcher and its children. `inside` is what its command begins with, and
    `program` what Python runs. Raises RuntimeError if it does not come up.
    """

    def __init__(
        self,
        flags: Sequence[str],
        *,
        unread: bool = False,
        descriptors: Descriptors | None = None,
        inside: Sequence[str] = (),
        program: str = "outrider_services",
    ) -> None:
        self.runtime = Path(tempfile.mkdtemp(prefix="or-attack-", dir="/tmp"))
        self.ipc = f"ipc://{self.runtime}/outrider/attacked.sock"
        self.tcp = self.url = ""
        self.left: list[str] = []  # after the end: what should not be there
        self.pauses = Pauses()
        self._log_path = self.runtime / "log"
        arguments = ("serve", "--name=attacked", "--backend=toy", "--listen=tcp://127.0.0.1:0")
        # what attackers leave behind need not be finished
        flags = ("--log-format=text", "--drain=2", "--no-gateway", *flags)
        command = [*inside, sys.executable, "-m", program, *arguments, *flags]
        with self._log_path.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE if unread else log,
                env=environment(self.runtime),
                cwd=self.runtime,
            )
        self._launcher = psutil.Process(self.process.pid)
        if descriptors:  # before it has had time to start a child
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, descriptors)

    def __enter__(self) -> Service:
        try:
            self._wait_until_ready()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + READY_S
        pipe, seen = self.process.stderr, b""
        if pipe is not None:
            os.set_blocking(pipe.fileno(), False)
        while time.monotonic() < deadline and self.process.poll() is None:
            seen = seen + (pipe.read() or b"") if pipe is not None else self._log_path.read_bytes()
            for line in seen.decode("utf-8", "replace").splitlines(keepends=True):
                if line.startswith("Ready:") and line.endswith("\n"):
                    self.tcp, self.url = line.split(" | ")[-1].strip(), line.split()[1]
                    return
            time.sleep(0.02)
        raise RuntimeError(f"the pipeline did not come up: {self.log()[-2000:]}")

    # ---- its processes --------------------------------------------------------------------------

    def processes(self) -> dict[str, psutil.Process]:
        """Those that live, by role."""
        found: dict[str, psutil.Process] = {}
        if self.process.poll() is None:
            found["launcher"] = self._launcher
        with suppress(psutil.Error):
            for child in self._launcher.children():
                with suppress(psutil.Error):
                    if child.status() != psutil.STATUS_ZOMBIE:
                        words = child.cmdline()
                        role = next((r for r in (*ROLES, GATEWAY) if r in words), None)
                        if role:
                            found[role] = child
        return found

    def usage(self) -> dict[str, Usage]:
        """What each process that lives uses."""
        found = {}
        for role, process in self.processes().items():
            with suppress(psutil.Error):
                times = process.cpu_times()
                found[role] = Usage(
                    process.memory_full_info().uss,
                    process.num_fds(),
                    process.num_threads(),
                    times.user + times.system,
                    _peak(process.pid),
                )
        return found

    def log(self) -> str:
        """What it has told on stderr."""
        with suppress(OSError):
            return self._log_path.read_text("utf-8", "replace")
        return ""

    # ---- its end --------------------------------------------------------------------------------

    def close(self) -> None:
        """End it by SIGTERM, else by SIGKILL; note in `left` what outlives it."""
        try:
            for process in self.processes().values():
                with suppress(psutil.Error):
                    process.send_signal(signal.SIGCONT)
            self._terminate()
            self.left += self._survivors()
        finally:
            for process in _processes_of(self.runtime):
                with suppress(psutil.Error):
                    process.kill()
            if self.process.poll() is None:
                self.process.kill()
            self.process.wait()
            if self.process.stderr is not None:
                self.process.stderr.close()
            shutil.rmtree(self.runtime, ignore_errors=True)

    def _terminate(self) -> None:
        if self.process.poll() is not None:
            self.left.append(f"its launcher had ended with status {self.process.returncode}")
            return
        self.process.terminate()
        try:
            status = self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.left.append(f"SIGTERM has not ended it within {END_S:.0f} s")
        else:
            if status != 128 + signal.SIGTERM:
                self.left.append(f"SIGTERM ended it with status {status}")

    def _survivors(self) -> list[str]:
        """Its processes and sockets that are still there; they have a few seconds to go."""
        deadline = time.monotonic() + GONE_S
        while True:
            processes = [f"process {p.pid} is left" for p in _processes_of(self.runtime)]
            files = [f"{p.name} is left" for p in self.runtime.glob("outrider/*")]
            if not (processes or files) or time.monotonic() > deadline:
                return processes + files
            time.sleep(0.05)


def end_on_sigterm() -> None:
    """Let SIGTERM unwind this process, so that all that it has started is ended."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)


def _peak(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def environment(runtime: Path) -> Mapping[str, str]:
    """For our own processes: this checkout's code, directories of their own, no settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("OUTRIDER_")}
    directories = {"XDG_RUNTIME_DIR": str(runtime), "XDG_CONFIG_HOME": str(runtime / "config")}
    return with_paths({**kept, **directories})


def with_paths(environment: Mapping[str, str]) -> dict[str, str]:
    """For a Python that is to run this checkout's code, as fast as in life: no line is traced."""
    kept = {k: v for k, v in environment.items() if not k.startswith("COVERAGE_PROCESS_")}
    paths = [str(ROOT), str(ROOT / "shared"), str(ROOT / "services")]
    return {**kept, "PYTHONPATH": os.pathsep.join(paths)}


def _processes_of(runtime: Path) -> list[psutil.Process]:
    """Whatever was started with this runtime directory and still runs, whoever its parent is."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            ours = process.environ().get("XDG_RUNTIME_DIR") == str(runtime)
            if ours and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
    return found
