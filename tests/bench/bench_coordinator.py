"""The coordinator's own share of a round: from a message's bytes to those of what it sends.

Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_coordinator --requests 8`.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pstats
import statistics
import time
from typing import Any

from outrider.core.engine import Vocabulary
from outrider.core.events import OpenDraft
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, Proposal, TokenId, Verdict, Verify
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services.pipeline.coordinator import Coordinator, Defaults

VOCABULARY = 152_000
FRAGMENTS, STOCK = 2000, 8
VERIFY_S = tuple(0.11 + 0.015 * n for n in range(16))
SAMPLING = Sampling(temperature=0.0)
PRINT = Vocabulary("bpe", VOCABULARY, None, 1, False, False, (1,), "digest")
PROMPT = tuple(range(2, 50))


def hello(role: Any, number: int, slots: int) -> wire.Hello:
    curve_s = VERIFY_S if role == "target" else (0.03,)
    crowd_s = tuple(curve_s[0] * (1 + 0.05 * n) for n in range(slots))
    return wire.Hello(
        protocol=wire.PROTOCOL,
        version="0",
        role=role,
        incarnation=number,
        model=role,
        vocabulary=PRINT,
        context=8192,
        slots=slots,
        device="cpu",
        cores=f"host:{number}",
        curve_s=curve_s,
        crowd_s=crowd_s,
    )


class Asked:
    """What the workers have been asked for, for one request."""

    def __init__(self) -> None:
        self.end = len(PROMPT)  # of the committed text
        self.drafted = len(PROMPT)  # and of the draft's
        self.lineage = 0
        self.verify: Verify | None = None

    def verdict(self, order: Verify | None) -> Verdict:
        tokens: tuple[TokenId, ...] = (*(order.drafted if order else ()), 7)
        base, self.end, self.verify = self.end, self.end + len(tokens), None
        self.drafted = max(self.drafted, self.end)
        return Verdict(
            accepted=len(tokens) - 1,
            tokens=tokens,
            round=order.round if order else 0,
            base=base,
            pieces=(b"x",) * len(tokens),
            margins=(1.0,) * len(tokens),
            elapsed_s=0.0,
        )


class Fakes:
    """Clients, a target and a draft that agree, each nothing but the messages it would send."""

    def __init__(self, requests: int) -> None:
        self.requests = requests
        self.core = Coordinator(self.send, Defaults("auto"))
        self.asked: dict[int, Asked] = {}
        self.fragments, self.spent_s = 0, 0.0
        self.rounds: list[float] = []  # seconds for each fragment, by round
        self.spent: dict[str, list[float]] = {}

    def send(self, peer: bytes, message: wire.Message) -> None:
        encode(message)
        match message:
            case wire.Do(number, OpenDraft() as order):
                self.asked[number].lineage = order.lineage
            case wire.Do(number, Verify() as order):
                self.asked[number].verify = order
            case wire.Pass(orders):
                for number, order in orders:
                    self.asked[number].verify = order
            case wire.Do(number) if peer == b"t":
                self.asked[number] = Asked()
            case wire.Progress():
                self.fragments += 1

    def tell(self, peer: bytes, message: wire.Message) -> None:
        frame = encode(message)
        began = time.perf_counter()
        self.core.on_message(peer, decode(frame))
        name = type(message.done if isinstance(message, wire.Done) else message).__name__
        self.spent.setdefault(name, []).append(time.perf_counter() - began)
        self.spent_s += self.spent[name][-1]

    async def begin(self) -> None:
        self.tell(b"t", hello("target", 1, self.requests))
        self.tell(b"d", hello("draft", 2, self.requests))
        await asyncio.sleep(0.05)
        for call in range(1, self.requests + 1):
            submit = wire.Submit(
                call, PROMPT, None, SAMPLING, 8000, (), False, False, "pipelined", None, False
            )
            self.tell(b"c", submit)
        await asyncio.sleep(0.05)
        self.draft()
        self.answer({number: None for number in self.asked})

    def answer(self, orders: dict[int, Verify | None]) -> None:
        verdicts = tuple(
            (number, self.asked[number].verdict(order)) for number, order in orders.items()
        )
        rows, several = sum(len(one.tokens) for _, one in verdicts), len(verdicts)
        elapsed_s = VERIFY_S[0] + 0.015 * (rows - 1)
        told = tuple(
            (n, one.changed(rows=rows, requests=several, elapsed_s=elapsed_s))
            for n, one in verdicts
        )
        self.tell(b"t", wire.Passed(told) if several > 1 else wire.Done(*told[0]))

    def draft(self) -> None:
        for number, one in self.asked.items():
            while one.drafted < one.end + STOCK:
                proposal = Proposal(one.lineage, one.drafted, (Drafted(7, 0.97),), 0.03)
                self.tell(b"d", wire.Done(number, proposal))
                one.drafted += 1

    def round(self) -> None:
        """The draft sends what it has for everybody, then the target answers."""
        fragments, spent_s = self.fragments, self.spent_s
        self.draft()
        asked = {number: one.verify for number, one in self.asked.items() if one.verify}
        assert asked, "the target has nothing to do"
        self.answer(dict(asked))
        self.rounds.append((self.spent_s - spent_s) / (self.fragments - fragments))


async def measure(requests: int, profiled: bool = False) -> Fakes:
    fakes = Fakes(requests)
    await fakes.begin()
    fakes.spent.clear()
    fakes.fragments = 0
    profile = cProfile.Profile()
    if profiled:
        profile.enable()
    while fakes.fragments < FRAGMENTS and all(one.end < 7000 for one in fakes.asked.values()):
        fakes.round()
        await asyncio.sleep(0)
    profile.disable()
    if profiled:
        pstats.Stats(profile).sort_stats("tottime").print_stats(30)
    return fakes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    for requests in options.requests:
        fakes = asyncio.run(measure(requests, options.profile))
        each_ms = 1000 * statistics.median(fakes.rounds)
        print(f"{requests} requests: {each_ms:.3f} ms a fragment, {1000 / each_ms:.0f} rounds/s")
        for name, times in sorted(fakes.spent.items()):
            median_ms, most_ms = 1000 * statistics.median(times), 1000 * max(times)
            print(
                f"  {name:8} median {median_ms:.3f} ms, at most {most_ms:.3f}, {len(times)} times"
            )


if __name__ == "__main__":
    main()
