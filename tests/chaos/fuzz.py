"""Fuzzing of whatever reads what others have written: each input is taken or refused, as told.

What is refused has changed nothing, and no input takes long or much memory. A seed draws them all.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.chaos import golden, mutation
from tests.chaos.campaign import Plan, Result, parts, told_by

from outrider.errors import ConfigError, ModelNotFound, ModelUnusable, ProtocolError, WorkerLost
from outrider.wire.codec import decode, encode

SLOW_S = 1.0  # of one input
MEMORY = 256 << 20  # bytes by which a process may grow meanwhile
ROUND = 512  # inputs between two looks at the clock
WITHIN_S = 7200.0


class Judge:
    """Counts inputs, and keeps the first complaints."""

    def __init__(self, seed: str) -> None:
        self.rng = random.Random(seed)
        self.taken = self.refused = 0
        self.complaints: list[str] = []

    def complain(self, data: bytes, what: str) -> None:
        if len(self.complaints) < 20:
            self.complaints.append(f"{what}: {data[:200]!r} ({len(data)} bytes)")

    def check(self, data: bytes, read: Callable[[], object], *refusals: type[Exception]) -> bool:
        """Whether `read` takes it; that it raises anything but `refusals` is a complaint."""
        began = time.perf_counter()
        try:
            read()
        except refusals:
            self.refused += 1
            is_taken = False
        except BaseException as exc:
            self.complain(data, f"{type(exc).__name__} {exc!s:.100}")
            return False
        else:
            self.taken += 1
            is_taken = True
        if time.perf_counter() - began > SLOW_S:
            self.complain(data, "it took too long")
        return is_taken


# ---- the wire -----------------------------------------------------------------------------------


def codec(judge: Judge, count: int) -> None:
    """Frames; whatever is taken for a message survives the way."""
    make = mutation.Frames(golden.frames(), judge.rng)
    taken = refused = 0
    for _ in range(0, count, ROUND):
        began = time.perf_counter()
        for _ in range(ROUND):
            frame = make()
            try:
                message = decode(frame)
            except ProtocolError:
                refused += 1
                continue
            except BaseException as exc:
                judge.complain(frame, f"{type(exc).__name__} {exc!s:.100}")
                continue
            taken += 1
            again = encode(message)
            if taken % 8 == 0 and encode(decode(again)) != again:
                judge.complain(frame, "it is another message when it is sent on")
        if time.perf_counter() - began > SLOW_S * 10:
            judge.complain(frame, "these took too long")
    judge.taken, judge.refused = taken, refused


def messages(judge: Judge, count: int) -> None:
    """Typed messages, from whoever, to a coordinator in the middle of two requests."""
    from tests.chaos.standing import bombard

    asyncio.run(bombard(judge, count))


# ---- HTTP ---------------------------------------------------------------------------------------


def bodies(judge: Judge, count: int) -> None:
    """Bodies for each path: the application says what is wrong, or that there is no model."""
    from outrider_services.gateway.access import Rules
    from outrider_services.gateway.answering import Gateway
    from outrider_services.gateway.app import application
    from outrider_services.gateway.upstream import Upstream
    from outrider_services.table import ServerOptions

    class Nobody(Upstream):
        async def client(self) -> Any:
            raise WorkerLost("nobody is there", "target")

    server = ServerOptions()
    app = application(Gateway(Nobody("nobody"), server), Rules.of(server))
    known = golden.bodies()

    async def run() -> None:
        for _ in range(count):
            path, sound = judge.rng.choice(known)
            data = mutation.body(judge.rng, sound)
            began = time.perf_counter()
            status, answer = await posted(app, path, data)
            if status == 503:
                judge.taken += 1
            else:
                judge.refused += 1
            if not (400 <= status < 500 or status == 503) or not _is_sentence(answer):
                judge.complain(data, f"{path} answers {status} {answer[:100]!r}")
            if time.perf_counter() - began > SLOW_S:
                judge.complain(data, f"{path} took too long")

    asyncio.run(run())


def _is_sentence(answer: bytes) -> bool:
    """Whether it tells what is wrong in a form that clients know."""
    try:
        return bool(json.loads(answer)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return False


async def posted(app: Any, path: str, data: bytes) -> tuple[int, bytes]:
    """The status and the body of the answer to a POST."""
    headers = [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(data)).encode()))
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
    }
    scope |= {
        "raw_path": path.encode(),
        "headers": headers,
        "query_string": b"",
        "scheme": "http",
        "http_version": "1.1",
    }
    scope |= {"server": ("127.0.0.1", 5700), "client": ("127.0.0.1", 1), "root_path": ""}
    scope |= {"asgi": {"version": "3.0"}}
    said: list[Any] = []
    waiting = [{"type": "http.request", "body": data, "more_body": False}]

    async def receive() -> Any:
        if waiting:
            return waiting.pop()
        return await asyncio.get_running_loop().create_future()  # the client stays

    async def send(message: Any) -> None:
        said.append(message)

    await app(scope, receive, send)
    return said[0]["status"], b"".join(one.get("body", b"") for one in said[1:])


# ---- files --------------------------------------------------------------------------------------


def headers(judge: Judge, count: int) -> None:
    """Headers of GGUF files."""
    from outrider_services.models.gguf import check_gguf

    sound = golden.gguf()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.gguf"
        for _ in range(count):
            data = mutation.file(judge.rng, sound)
            path.write_bytes(data)
            judge.check(data, lambda: check_gguf(path), ModelNotFound, ModelUnusable)


def settings(judge: Judge, count: int) -> None:
    """Files of settings."""
    from outrider_services.options import checked
    from outrider_services.sources import from_file
    from outrider_services.table import Settings

    sound, defaults = golden.toml(), Settings()

    def read() -> None:
        sections: dict[str, dict[str, Any]] = {}
        for key, value in from_file(path).items():
            section, name = key.split(".")
            sections.setdefault(section, {})[name] = value
        more = {s: replace(getattr(defaults, s), **v) for s, v in sections.items()}
        checked(replace(defaults, **more))

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "outrider.toml"
        for _ in range(count):
            data = mutation.text(judge.rng, judge.rng.choice(sound))
            path.write_bytes(data)
            judge.check(data, read, ConfigError)


# ---- the processes ------------------------------------------------------------------------------

JOBS: dict[str, tuple[Callable[[Judge, int], None], int, str]] = {
    "codec": (codec, 10_000_000, "malformed frames of the wire"),
    "messages": (messages, 1_000_000, "malformed messages to a coordinator at work"),
    "bodies": (bodies, 50_000, "malformed HTTP bodies"),
    "headers": (headers, 50_000, "malformed GGUF headers"),
    "settings": (settings, 50_000, "malformed files of settings"),
}


def run(plan: Plan) -> Result:
    """All decoders, each by as many processes as the plan has."""
    result = Result()
    for name, (_, whole, quantity) in JOBS.items():
        count = plan.times(whole, 1000)
        calls = [
            ("--job", name, "--count", some, "--seed", f"{plan.seed}-{name}-{first}")
            for first, some in parts(count, plan.jobs)
        ]
        told = told_by("tests.chaos.fuzz", calls, plan.jobs, WITHIN_S)
        complaints = [f"{name}: {one}" for each in told for one in each["complaints"]]
        taken, seconds = sum(one["taken"] for one in told), max(one["seconds"] for one in told)
        done = sum(one["taken"] + one["refused"] for one in told)
        grown = max(one["grown"] for one in told)
        measured = (
            f"{done:,} at {done / seconds:,.0f}/s by {len(told)}, {taken / done:.0%} taken, "
            f"{len(complaints)} faults, +{grown >> 20} MiB"
        )
        is_light = grown <= MEMORY
        wanted = f"{count:,}: taken or refused, nothing changed, 0 faults"
        result.add(quantity, wanted, measured, done >= count and not complaints and is_light)
        result.complaints += complaints
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description="One fuzzer of `scripts/chaos`.")
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--seed", required=True)
    parsed = parser.parse_args()
    logging.disable(logging.CRITICAL)
    judge = Judge(parsed.seed)
    function = JOBS[parsed.job][0]
    function(judge, 1)  # what it imports and keeps anyway
    gc.collect()
    judge.taken = judge.refused = 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    began = time.perf_counter()
    function(judge, parsed.count)
    told = {
        "taken": judge.taken,
        "refused": judge.refused,
        "seconds": time.perf_counter() - began,
        "grown": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) - before,
        "complaints": judge.complaints,
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
