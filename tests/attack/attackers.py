"""What attacks, each in a process of its own and of low priority: see `main`.

An attacker does `count` of something within `within` seconds, by raw sockets where outrider's own
client would not do it. It writes a line when it begins, and at the end what it did, as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import zmq
from tests.attack.clients import Crowd
from tests.attack.frames import malformed
from tests.attack.questions import answered, steady
from tests.attack.service import Pauses

from outrider.client import connect
from outrider.core.sampling import Sampling
from outrider.errors import OutriderError
from outrider.wire import messages as wire
from outrider.wire.codec import encode

NICE = 15
ASK_S = 0.25  # between two large questions of slow readers
LARGE = "river " * 50_000  # 300,000 letters
PART = bytes(1 << 20)
Told = dict[str, Any]


class Job:
    """What an attacker is to do."""

    def __init__(self, parsed: argparse.Namespace) -> None:
        self.addresses = (parsed.ipc, parsed.tcp)
        self.count, self.reads = parsed.count, parsed.reads
        self.rng = random.Random(parsed.seed)
        self.until: float = time.monotonic() + parsed.within
        self.context = zmq.Context()
        self.context.set(zmq.MAX_SOCKETS, 8000)

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.until

    def dealer(self, address: str, **options: int) -> zmq.Socket[bytes]:
        """A connected socket; its sends wait for at most a second."""
        made: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        given = {"LINGER": 0, "SNDTIMEO": 1000, "RCVTIMEO": 1000, "IMMEDIATE": 1, **options}
        for name, value in given.items():
            made.setsockopt(getattr(zmq, name), value)
        made.connect(address)
        return made

    def hold(self) -> None:
        """Stay as it is until the time is over."""
        time.sleep(max(0.0, self.until - time.monotonic()))


# ---- frames and connections ---------------------------------------------------------------------


def frames(job: Job) -> Told:
    """Malformed messages; some connections are given up after a few, two are kept.

    ZeroMQ connects again by itself where it is dropped.
    """
    told: Counter[str] = Counter()
    kept = [job.dealer(address, SNDTIMEO=100) for address in job.addresses]
    pool = [malformed(job.rng) for _ in range(400)]
    while told["frames"] < job.count and not job.is_over:
        quick = job.dealer(job.rng.choice(job.addresses), SNDTIMEO=100)
        pool[job.rng.randrange(len(pool))] = malformed(job.rng)
        for _ in range(12):
            for one in (quick, job.rng.choice(kept)):
                if job.is_over:
                    break
                try:
                    one.send_multipart(job.rng.choice(pool))
                    told["frames"] += 1
                except zmq.Again:
                    told["not taken"] += 1
        quick.close()
        told["connections"] += 1
    return dict(told)


def parts(job: Job) -> Told:
    """One message of `count` parts of 1 MiB."""
    dealer = job.dealer(job.addresses[1], SNDTIMEO=5000)
    sent = 0
    with suppress(zmq.Again):
        for left in range(job.count - 1, -1, -1):
            dealer.send(PART, zmq.SNDMORE if left else 0, copy=False)
            sent += 1
            if job.is_over:
                break
    job.hold()
    return {"parts": sent}


def churn(job: Job) -> Told:
    """Clients that stay and say nothing more, and behind them quick ones."""
    told: Counter[str] = Counter()
    ask = encode(wire.Health(1))
    idle = []
    for _ in range(job.count * 4 // 10):
        if job.is_over:
            break
        idle.append(job.dealer(job.rng.choice(job.addresses)))
        with suppress(zmq.Again):
            idle[-1].send(ask)
            told["idle"] += 1
    while told["quick"] + told["unanswered"] < job.count and not job.is_over:
        one = job.dealer(job.rng.choice(job.addresses))
        try:
            one.send(ask)
            one.recv()
            told["quick"] += 1
        except zmq.Again:
            told["unanswered"] += 1
        one.close()
    return dict(told)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(16) + bytes(32)
OPENINGS = (
    b"",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    GREETING[:11],
    GREETING,
    GREETING + b"\x04\x05READY",
    GREETING + b"\x06" + b"\xff" * 8,  # a command of 2⁶⁴ bytes
    b"\x16\x03\x01" + bytes(300),
)


def raw(job: Job) -> Told:
    """Sockets that say nothing, half a greeting, or something else; some stay, some go."""
    told: Counter[str] = Counter()
    kept: list[socket.socket] = []
    while told["sockets"] < job.count and not job.is_over:
        one = _raw_socket(job.rng.choice(job.addresses))
        if one is None:
            told["refused"] += 1
            time.sleep(0.01)
            continue
        told["sockets"] += 1
        opening = job.rng.choice((*OPENINGS, job.rng.randbytes(64)))
        with suppress(OSError):
            one.sendall(opening)
        if len(kept) < job.count // 4:
            kept.append(one)
        else:
            one.close()
    job.hold()
    for one in kept:
        one.close()
    return dict(told)


def _raw_socket(address: str) -> socket.socket | None:
    place = address.partition("://")[2]
    tcp = address.startswith("tcp")
    one = socket.socket(socket.AF_INET if tcp else socket.AF_UNIX)
    one.settimeout(1.0)
    try:
        if tcp:
            host, _, port = place.rpartition(":")
            one.connect((host, int(port)))
        else:
            one.connect(place)
    except OSError:
        one.close()
        return None
    return one


# ---- questions ----------------------------------------------------------------------------------


def questions(job: Job) -> Told:
    """`count` small questions at once, and in between large ones, from two clients."""
    return asyncio.run(_flood(job))


async def _flood(job: Job) -> Told:
    told: Counter[str] = Counter()

    async def counted(kind: str, question: Coroutine[Any, Any, object]) -> None:
        try:
            await question
            told[f"{kind} answered"] += 1
        except OutriderError as exc:
            told[f"{kind} {exc.code}"] += 1

    large = max(8, job.count // 50)
    async with connect(job.addresses[0]) as one, connect(job.addresses[1]) as other:
        asked = [counted("small", one.tokenize(f"word {n}")) for n in range(job.count)]
        asked += [counted("large", other.tokenize(LARGE)) for _ in range(large)]
        # a prompt that is too long for any context: told so, whatever else is asked
        asked += [counted("prompt", other.create_completion(LARGE)) for _ in range(large)]
        await asyncio.gather(*asked)
    return dict(told)


def slow(job: Job) -> Told:
    """Clients that ask much and read nothing, with `reads` the same ones that read all.

    Two have an answer streamed that takes longer than the attack; the others ask large questions.
    """
    small_buffers = {"RCVHWM": 1, "RCVBUF": 4096}
    streamers = [job.dealer(address, **small_buffers) for address in job.addresses]
    for streamer in streamers:
        streamer.send(encode(_long_request()))
    askers = [job.dealer(job.addresses[n % 2], SNDTIMEO=0, **small_buffers) for n in range(8)]
    ask = encode(wire.Tokenize(1, LARGE[:200_000], False))
    told: Counter[str] = Counter()
    while not job.is_over:
        if told["questions"] < job.count:
            with suppress(zmq.Again):
                askers[told["questions"] % len(askers)].send(ask)
                told["questions"] += 1
        for one in (*streamers, *askers) if job.reads else ():
            with suppress(zmq.Again):
                while True:
                    one.recv_multipart(zmq.NOBLOCK)
                    told["read"] += 1
        time.sleep(ASK_S)
    return dict(told)


def _long_request() -> wire.Submit:
    return wire.Submit(
        call=2,
        prompt="A long answer",
        messages=None,
        sampling=Sampling(temperature=0.0),
        n_predict=2000,
        stop=(),
        ignore_eos=True,
        logprobs=False,
        mode=None,
        n_draft=None,
        trace=False,
    )


def clients(job: Job) -> Told:
    """No attack: eight clients that ask until SIGTERM; they are to be stopped for a while."""
    return asyncio.run(_ask_on(job))


async def _ask_on(job: Job) -> Told:
    questions = [steady(100 + n, 40) for n in range(8)]
    over = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, over.set)
    choices = [partial(answered, question) for question in questions]
    async with Crowd(job.addresses, choices, Pauses()) as crowd:
        with suppress(TimeoutError):
            async with asyncio.timeout(job.until - time.monotonic()):
                await over.wait()
        await crowd.rest()
        return dict(Counter(f"{one.kind} {one.what}".strip() for one in crowd.outcomes))


# ---- the process --------------------------------------------------------------------------------


def main() -> None:
    from tests.attack.fakes import fake_draft, fake_target

    jobs: dict[str, Callable[[Job], Told]] = {
        "frames": frames,
        "parts": parts,
        "churn": churn,
        "raw": raw,
        "questions": questions,
        "slow": slow,
        "clients": clients,
        "fake_draft": fake_draft,
        "fake_target": fake_target,
    }
    parser = argparse.ArgumentParser(description="One attacker of `scripts/attack`.")
    parser.add_argument("job", choices=jobs)
    parser.add_argument("--ipc", required=True)
    parser.add_argument("--tcp", required=True)
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--within", type=float, required=True, metavar="SECONDS")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--reads", action="store_true", help="the polite form of the same")
    parsed = parser.parse_args()
    if parsed.job != "clients":
        os.nice(NICE)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    told = jobs[parsed.job](Job(parsed))
    sys.stdout.write(json.dumps(told) + "\n")
    sys.stdout.flush()
    os._exit(0)  # without waiting for what ZeroMQ still holds


if __name__ == "__main__":
    main()
