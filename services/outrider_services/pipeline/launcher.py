"""Starts, watches, restarts and stops the processes of one pipeline on this machine.

However the launcher ends, its children end too: each watches a pipe whose writing end only the
launcher has. A child tells its state in lines of JSON on stdout, such as `["ready", 1.0]`. What it
writes to stderr is handed on line by line: log records as JSON, and whatever a library says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from outrider.client import connect
from outrider.errors import (
    ConfigError,
    ConnectionFailed,
    OutriderError,
    Overloaded,
    WorkerLost,
    from_code,
)
from outrider.wire.addresses import remove_socket, socket_path
from outrider_services import logs
from outrider_services.options import OPTIONS, to_flags
from outrider_services.pipeline.arguments import gateway_arguments, worker_arguments
from outrider_services.pipeline.claim import KILLED, MEASURED, TOKEN, Claim
from outrider_services.pipeline.places import share_cores
from outrider_services.table import Settings

STOP_S = 5.0  # between SIGTERM and SIGKILL
CLAIM_S = 3.0  # most that a dead pipeline of our name, or one that ends, may take to be gone
BACKOFF_S = (0.1, 5.0)  # the wait before a restart: at first, at most
RESTARTS = (5, 60.0)  # after so many restarts within so many seconds a worker stays down

Report = Callable[[str, str, float], None]  # role, state, share of the model that is loaded
Log = Callable[[str, str], None]  # role, line


@dataclass(slots=True)
class Child:
    """One process and how to start it again."""

    role: str
    arguments: list[str]
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    error: OutriderError | None = None
    was_killed: bool = False
    measured: str = ""  # what it told of its costs: one that is started again need not measure
    starts: deque[float] = field(default_factory=deque)


class Launcher:
    """`async with Launcher(...)`: inside, the pipeline `name` is up.

    Entering raises an OutriderError if it does not come up in time: WorkerLost, or a child's own.
    `failed` is done once the pipeline has ended by itself: with None if a client stopped it, else
    with the error. With a socket, a gateway takes HTTP on it; whoever opened it closes it.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        report: Report,
        log: Log,
        *,
        draft: bool = True,
        http: socket.socket | None = None,
    ) -> None:
        self.settings, self.name = settings, name
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.addresses: list[str] = []  # as they are bound; those of `--listen`, in their order
        self._report, self._log = report, log
        self._socket: Path = socket_path(name)
        self._claim = Claim(self._socket)
        self._http = http
        self._token = secrets.token_hex(16)
        self._up = self._stopping = False
        self._tasks: list[asyncio.Task[None]] = []
        self._pipe: tuple[int, int] | None = None
        self._children = self._plan(draft)

    def _plan(self, draft: bool) -> list[Child]:
        address = f"ipc://{self._socket}"
        settings = replace(self.settings, log=replace(self.settings.log, format="json"))
        sections = ("draft", "pipeline", "coordinator", "links", "server", "log")
        places = {"target": settings.target.place}
        if draft:
            places["draft"] = settings.draft.place
        own = [role for role, place in places.items() if place != "remote"]
        both = [f"--open={role}" for role in own if places[role] == "both"]
        flags = [f"--name={self.name}", *(f"--own={role}" for role in own), *both]
        children = [
            Child("coordinator", ["coordinator", *flags, *to_flags(settings, sections)]),
            *(Child(role, worker_arguments(role, settings, address)) for role in own),
        ]
        if self._http is not None:
            children.append(Child("gateway", gateway_arguments(settings, address, self._http)))
        return children

    async def __aenter__(self) -> Launcher:
        await self._claim_name()
        self._pipe = os.pipe()
        try:
            async with asyncio.timeout(self.settings.pipeline.ready_timeout_s):
                workers = [one for one in self._children if one.role in ("target", "draft")]
                first = [one for one in self._children if one not in workers]
                for child in first:
                    await self._start(child)
                for child in first:  # also the gateway: what workers measure is to be theirs alone
                    await self._until_ready(child)
                for worker in workers:
                    await self._start(worker)
                    if share_cores(self.settings):  # each measures its costs alone
                        await self._until_ready(worker)
                for worker in workers:
                    await self._until_ready(worker)
                await self._until_joined({worker.role for worker in workers})
        except TimeoutError:
            await self.stop()
            limit = self.settings.pipeline.ready_timeout_s
            raise WorkerLost(f"not ready within {limit:.0f} s (see --ready-timeout)") from None
        except BaseException:
            await self.stop()
            raise
        self._up = True
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def drain(self, tell: Callable[[int], None]) -> None:
        """Let no more requests begin, and wait until those that are there are over.

        Their number is told. `stop` is still to be called, also if this is cancelled.
        """
        with contextlib.suppress(OutriderError):  # nobody answers: there is nothing to wait for
            async with connect(f"ipc://{self._socket}", timeout_s=1.0) as client:
                requests = (await client.health())["requests"]
                tell(requests["running"] + requests["waiting"])
                await client.stop()
                await asyncio.wait([self.failed])

    async def stop(self) -> None:
        """End every child, politely first, and remove the socket."""
        self._stopping = True
        running = [c.process for c in self._children if c.process and c.process.returncode is None]
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        if running:
            _, late = await asyncio.wait(
                [asyncio.ensure_future(process.wait()) for process in running], timeout=STOP_S
            )
            for process in running if late else []:
                if process.returncode is None:
                    process.kill()
            await asyncio.gather(*late)
        if self._pipe:
            for end in self._pipe:
                os.close(end)
            self._pipe = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        remove_socket(self._socket)
        self._claim.release()
        if not self.failed.done():
            self.failed.cancel()
        elif not self.failed.cancelled():
            self.failed.exception()  # mark it as seen, or asyncio complains

    # ---- one child ------------------------------------------------------------------------------

    async def _claim_name(self) -> None:
        """Make the name ours, and remove a dead pipeline's socket. Raises ConfigError."""
        try:
            await self._claimed()
        except OSError as exc:
            self._claim.release()
            raise ConfigError(f"cannot use the socket {self._socket}: {exc.strerror}") from None

    async def _claimed(self) -> None:
        deadline = time.monotonic() + CLAIM_S
        while not self._claim.take():
            if time.monotonic() > deadline or await self._is_answered():
                raise ConfigError(
                    f"a pipeline named {self.name!r} is running; choose another --name, or "
                    f"`outrider stop {self.name}`"
                )
            await asyncio.sleep(0.05)
        remove_socket(self._socket)

    async def _is_answered(self) -> bool:
        """Whether a coordinator answers on the socket of our name."""
        if not self._socket.exists():
            return False
        with contextlib.suppress(ConnectionFailed):
            async with connect(f"ipc://{self._socket}", timeout_s=0.5):
                return True
        return False

    def _inherited(self, child: Child) -> tuple[int, ...]:
        """The descriptors that a child is to hold."""
        assert self._pipe is not None
        if child.role == "coordinator" and self._claim.fd is not None:
            return self._pipe[0], self._claim.fd
        if child.role == "gateway" and self._http is not None:
            return self._pipe[0], self._http.fileno()
        return (self._pipe[0],)

    def _secrets(self, child: Child) -> dict[str, str]:
        """Variables for what no command line may tell."""
        keys = self.settings.server.api_key if child.role == "gateway" else ()
        found = {OPTIONS["server.api_key"].variable: json.dumps(keys)} if keys else {}
        past = {KILLED: str(int(child.was_killed)), MEASURED: child.measured}
        return {**found, TOKEN: self._token, **past}

    async def _start(self, child: Child) -> None:
        child.ready.clear()
        child.error = None
        child.starts.append(time.monotonic())
        self._stay(child.arguments)
        inherited, told = self._inherited(child), self._secrets(child)
        child.process = await begun(child.arguments, inherited, told)
        self._report(child.role, "starting", 0.0)
        self._tasks = [task for task in self._tasks if not task.done()]
        self._tasks.append(asyncio.ensure_future(self._watch(child, child.process)))

    def _stay(self, arguments: list[str]) -> None:
        """A coordinator that starts again is to have the ports that it had."""
        for asked, had in zip(self.settings.coordinator.listen, self.addresses, strict=False):
            for flag in ("--listen", "--insecure"):
                if f"{flag}={asked}" in arguments:
                    arguments[arguments.index(f"{flag}={asked}")] = f"{flag}={had}"

    async def _until_ready(self, child: Child) -> None:
        ready = asyncio.ensure_future(child.ready.wait())
        await first_of(ready, self.failed)
        ready.cancel()
        if self.failed.done():
            self.failed.result()

    async def _until_joined(self, roles: set[str]) -> None:
        """Wait until the coordinator has all `roles`: only then is a draft known to fit."""
        async with connect(f"ipc://{self._socket}") as client:
            while not roles <= {one["role"] for one in (await client.health())["workers"].values()}:
                await first_of(asyncio.ensure_future(asyncio.sleep(0.02)), self.failed)
                if self.failed.done():
                    self.failed.result()

    async def _watch(self, child: Child, process: asyncio.subprocess.Process) -> None:
        assert process.stdout
        assert process.stderr
        await asyncio.gather(
            self._read_states(child, process.stdout), self._forward(child, process.stderr)
        )
        status = await process.wait()
        if self._stopping:
            return
        self._report(child.role, "ended", 0.0)
        child.was_killed = status == -signal.SIGKILL and child.error is None
        hint = ", killed: perhaps memory ran out" if status == -signal.SIGKILL else ""
        error = child.error or WorkerLost(
            f"the {child.role} process ended by itself with status {status}{hint}", child.role
        )
        if child.role == "coordinator" and status == 0:
            self._fail(None)  # it was told to stop
        elif not self._up:
            self._fail(error)
        else:
            await self._restart(child, error)

    async def _restart(self, child: Child, error: OutriderError) -> None:
        most, within_s = RESTARTS
        is_early = isinstance(error, Overloaded)  # its place is not free yet: that is no crash
        if is_early:
            child.starts.pop()
        while child.starts and time.monotonic() - child.starts[0] > within_s:
            child.starts.popleft()
        if len(child.starts) > most:
            self._warn(child.role, f"restarted {most} times in {within_s:.0f} s; it stays down")
            if child.role in ("target", "coordinator"):
                self._fail(error)
            return
        first_s, most_s = BACKOFF_S
        delay = most_s if is_early else min(first_s * 4 ** (len(child.starts) - 1), most_s)
        self._warn(child.role, f"{error}; starting it again in {delay:.1f} s")
        await asyncio.sleep(delay)
        if not self._stopping:
            await self._start(child)

    def _warn(self, role: str, message: str) -> None:
        self._log(role, logs.as_json("warning", role, message))

    def _fail(self, error: OutriderError | None) -> None:
        if not self.failed.done():
            if error is None:
                self.failed.set_result(None)
            else:
                self.failed.set_exception(error)

    async def _read_states(self, child: Child, stream: asyncio.StreamReader) -> None:
        async for line in lines(stream):
            try:
                self._on_state(child, *json.loads(line))
            except (ValueError, TypeError, LookupError):  # it is something else
                self._log(child.role, line)

    def _on_state(self, child: Child, state: str, detail: Any, *rest: str) -> None:
        if state == "error":
            child.error = from_code(detail, rest[0])
        elif state == "listening":
            if detail not in self.addresses:  # else it has started again
                self.addresses.append(detail)
        elif state == "measured":
            child.measured = str(detail)
        elif state == "hung":
            self._kill(detail)
        else:
            self._report(child.role, state, float(detail))
            if state == "ready":
                child.ready.set()

    def _kill(self, role: str) -> None:
        """End a worker that does not answer, if it is ours; then it is started again."""
        for child in (one for one in self._children if one.role == role):
            if child.process and child.process.returncode is None:
                child.error = WorkerLost(f"the {role} process did not answer and was ended", role)
                child.process.kill()

    async def _forward(self, child: Child, stream: asyncio.StreamReader) -> None:
        async for line in lines(stream):
            if self._stopping and child.role == "coordinator":
                continue  # it complains of the workers that we have just ended
            self._log(child.role, line)


async def begun(
    arguments: list[str], descriptors: tuple[int, ...], environment: dict[str, str]
) -> asyncio.subprocess.Process:
    """`outrider` in a process of its own, which ends when nobody can write to the first descriptor.

    It inherits the `descriptors`. A Ctrl-C is for us alone.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "outrider_services",
        *arguments,
        f"--parent-fd={descriptors[0]}",
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        pass_fds=descriptors,
        env={**os.environ, **environment},
        start_new_session=True,
    )


async def lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    """The lines of `stream`, whatever they are; one too long to be kept comes in its last part."""
    while True:
        try:
            line = await stream.readline()
        except ValueError:
            continue
        if not line:
            return
        yield line.decode("utf-8", "replace").rstrip()


async def first_of(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done, with a result or an error."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
