"""The *peers* of `outrider bench`: llama.cpp's own programs for speculative decoding.

They get the files, cores, threads and context of our workers, and otherwise their own defaults. In
neither can a request choose the length of its drafts: for another length it is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

import platformdirs

from outrider.errors import ConfigError, WorkerLost
from outrider_services.options import cores, offload
from outrider_services.table import DraftOptions, Settings, TargetOptions

ANSWER_S = 1800.0  # for one answer, however slow the model
STOP_S = 5.0
DECODED = re.compile(r"decoded +(\d+) tokens in +[\d.]+ seconds, speed: +([\d.]+) t/s")
ACCEPTED = re.compile(r"n_drafted += (\d+).*?n_accept += (\d+)", re.DOTALL)
PR_SET_PDEATHSIG = 1
DRAFT_FLAGS = ("-md", "--spec-type", "-td", "-tbd", "-ngld", "-devd")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a peer says of one answer of its own."""

    tokens: int
    tokens_per_s: float  # prefill and its first token left out
    acceptance_rate: float | None


@dataclass(frozen=True, slots=True)
class Setup:
    """What every peer is started with."""

    target: str
    draft: str
    flags: tuple[str, ...]
    cores: frozenset[int]
    ready_timeout_s: float

    @classmethod
    def of(cls, settings: Settings) -> Setup:
        """What our workers have, too. Raises ConfigError."""
        target, draft = settings.target, settings.draft
        if not (target.model and draft.model):
            raise ConfigError("peers need a target and a draft model: say -m FILE -md FILE")
        every = os.sched_getaffinity(0)
        used = (cores(target.cores) or every) | (cores(draft.cores) or every)
        # our workers start no more threads than they have cores; neither do the peers
        threads = min(target.threads, len(cores(target.cores) or every))
        threads_draft = min(draft.threads, len(cores(draft.cores) or every))
        flags = {
            "-m": target.model,
            "-md": draft.model,
            "--spec-type": "draft-simple",
            "-c": target.ctx,
            "-fa": "on",
            "-t": threads,
            "-tb": threads,
            "-td": threads_draft,
            "-tbd": threads_draft,
            "-ngl": _layers(target),
            "-ngld": _layers(draft),
            **({"-dev": target.device} if target.device else {}),
            **({"-devd": draft.device} if draft.device else {}),
        }
        listed = tuple(str(part) for flag in flags.items() for part in flag)
        timeout_s = settings.pipeline.ready_timeout_s
        return cls(target.model, draft.model, listed, frozenset(used), timeout_s)

    def for_slots(self, slots: int) -> Setup:
        """The same with a context of this size for each of so many requests."""
        size = self.flags.index("-c") + 1
        context = str(int(self.flags[size]) * slots)
        return replace(self, flags=(*self.flags[:size], context, *self.flags[size + 1 :]))

    def without_draft(self) -> Setup:
        """The same for a program that decodes with the target alone."""
        pairs = zip(self.flags[::2], self.flags[1::2], strict=True)
        kept = [pair for pair in pairs if pair[0] not in DRAFT_FLAGS]
        return replace(self, flags=tuple(part for pair in kept for part in pair))


def default_directory() -> Path:
    """Where scripts/build-peers puts the programs."""
    return platformdirs.user_cache_path("outrider") / "peers" / "latest"


def find(directory: Path, name: str) -> Path:
    """The program `name`. Raises ConfigError."""
    path = directory / name
    if not os.access(path, os.X_OK):
        raise ConfigError(
            f"there is no {name} in {directory}; scripts/build-peers makes it in five minutes"
        )
    return path


class Peer:
    """A program that generates. `async with` ends it and deletes its files."""

    name: ClassVar[str]

    def __init__(self, program: Path, setup: Setup) -> None:
        self._program, self._setup = program, setup
        self._process: asyncio.subprocess.Process | None = None
        self._directory = tempfile.TemporaryDirectory(prefix="outrider-peer-")
        self._log = Path(self._directory.name) / "log"

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.stop()
        self._directory.cleanup()

    async def generate(self, prompt: str, count: int, n_max: int) -> Answer:
        """`count` tokens after `prompt`, greedily, at most `n_max` drafted at once.

        Raises WorkerLost.
        """
        raise NotImplementedError

    async def _start(self, *flags: str) -> asyncio.subprocess.Process:
        with self._log.open("wb") as log:
            self._process = await asyncio.create_subprocess_exec(
                str(self._program),
                *self._setup.flags,
                *flags,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us
                preexec_fn=partial(_tie, self._setup.cores, _prctl()),
            )
        return self._process

    async def stop(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(STOP_S):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    def _output(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def _failed(self, what: str) -> WorkerLost:
        last = next((line for line in reversed(self._output().splitlines()) if line.strip()), "")
        return WorkerLost(f"{self.name} {what}" + (f": {last.strip():.200}" if last else ""))


class SpeculativeSimple(Peer):
    """One process for each answer."""

    name = "llama-speculative-simple"

    async def generate(self, prompt: str, count: int, n_max: int) -> Answer:
        path = Path(self._directory.name) / "prompt"
        path.write_text(prompt + "\n", "utf-8")  # it takes one line feed off the end
        length = ("-n", str(count), "--spec-draft-n-max", str(n_max))
        process = await self._start(*length, "-f", str(path), "--temp", "0", "--no-escape")
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await process.wait()
        except TimeoutError:
            raise self._failed(f"did not end within {ANSWER_S:.0f} s") from None
        finally:
            await self.stop()
        if status:
            raise self._failed(f"ended with status {status}")
        answer = parse(self._output())
        if answer is None:
            raise self._failed("did not say how fast it was")
        return answer


def parse(output: str) -> Answer | None:
    """What llama-speculative-simple says of its answer; None if it does not say how fast it was."""
    decoded = DECODED.search(output)
    if decoded is None:
        return None
    drafted = ACCEPTED.search(output)
    rate = int(drafted[2]) / int(drafted[1]) if drafted and int(drafted[1]) else None
    return Answer(int(decoded[1]), float(decoded[2]), rate)


class Server(Peer):
    """One process for as long as `n_max` stays the same.

    With `slots` it answers so many requests at once, each with a context of its own and to the last
    token asked for, whatever ends the text.
    """

    name = "llama-server"

    def __init__(self, program: Path, setup: Setup, slots: int | None = None) -> None:
        super().__init__(program, setup if slots is None else setup.for_slots(slots))
        self._n_max, self._url, self._slots = 0, "", slots

    async def generate(self, prompt: str, count: int, n_max: int) -> Answer:
        if self._process is None or self._n_max != n_max:
            await self.stop()
            await self._serve(n_max)
        question: dict[str, Any] = {"prompt": prompt, "n_predict": count}
        question |= {"temperature": 0, "cache_prompt": False}
        if self._slots is not None:
            question["ignore_eos"] = True
        ask = partial(_ask, f"{self._url}/completion", json.dumps(question).encode(), ANSWER_S)
        answer = await self._while_alive(ask)
        try:
            timings = answer["timings"]
            tokens, speed = int(timings["predicted_n"]), float(timings["predicted_per_second"])
            drafted, accepted = timings.get("draft_n"), timings.get("draft_n_accepted")
            return Answer(tokens, speed, accepted / drafted if drafted else None)
        except (KeyError, TypeError, ValueError):
            raise self._failed("answered without its timings") from None

    async def _serve(self, n_max: int) -> None:
        port = _free_port()
        self._n_max, self._url = n_max, f"http://127.0.0.1:{port}"
        address = ("--host", "127.0.0.1", "--port", str(port), "-np", str(self._slots or 1))
        await self._start(*address, *(("--spec-draft-n-max", str(n_max)) if n_max else ()))
        try:
            async with asyncio.timeout(self._setup.ready_timeout_s):
                while not await self._is_ready():  # noqa: ASYNC110  (another program has no event)
                    await asyncio.sleep(0.1)
        except TimeoutError:
            limit = self._setup.ready_timeout_s
            raise self._failed(
                f"was not ready within {limit:.0f} s (see --ready-timeout)"
            ) from None

    async def _is_ready(self) -> bool:
        try:
            await self._while_alive(partial(_ask, f"{self._url}/health", None, 2.0))
        except ConnectionError:
            return False
        return True

    async def _while_alive(self, ask: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `ask` returns. Raises ConnectionError; WorkerLost as soon as the program is dead."""
        process = self._process
        assert process is not None
        if process.returncode is not None:
            raise self._failed(f"ended with status {process.returncode}")
        try:
            return await asyncio.to_thread(ask)
        except ValueError:
            raise self._failed("answered what is not JSON") from None
        except ConnectionError:
            with contextlib.suppress(TimeoutError):  # if it has just ended, we may not know yet
                async with asyncio.timeout(0.2):
                    await process.wait()
                raise self._failed(f"ended with status {process.returncode}") from None
            raise


PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Server, SpeculativeSimple)}


def _ask(url: str, body: bytes | None, timeout_s: float) -> dict[str, Any]:
    """The JSON object that `url` answers. Raises ConnectionError, ValueError."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    # the program runs here: a proxy that the environment names is not asked
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout_s) as answer:
            found: dict[str, Any] = json.load(answer)
    except ValueError:
        raise
    except OSError as exc:  # URLError, HTTPError (503 while it loads) and sockets' own
        raise ConnectionError(str(exc)) from None
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _layers(worker: TargetOptions | DraftOptions) -> str:
    count = offload(worker).layers
    return "all" if count < 0 else str(count)


def _prctl() -> Callable[..., int]:
    prctl: Callable[..., int] = ctypes.CDLL(None).prctl
    return prctl


def _tie(to: frozenset[int], prctl: Callable[..., int]) -> None:
    """Called in the new process: keep the program to these cores, and let it die with us."""
    os.sched_setaffinity(0, to)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
