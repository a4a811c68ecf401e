"""The coordinator's own share of a round: from a message's bytes to those of what it sends.

Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_coordinator`.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from outrider.core.engine import Vocabulary
from outrider.core.events import OpenDraft, Prefill
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, Proposal, Verdict, Verify
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services.pipeline.coordinator import Coordinator, Defaults

VOCABULARY = 152_000
ROUNDS, STOCK = 300, 8
VERIFY_S = tuple(0.11 + 0.015 * n for n in range(16))
SAMPLING = Sampling(temperature=0.0)
PRINT = Vocabulary("bpe", VOCABULARY, None, 1, False, False, (1,), "digest")


def hello(role: Any, number: int) -> wire.Hello:
    curve_s = VERIFY_S if role == "target" else (0.03,)
    return wire.Hello(
        wire.PROTOCOL, "0", role, number, role, PRINT, 8192, 4, "cpu", f"host:{number}", curve_s
    )


class Fakes:
    """A client, a target and a draft that agree, each nothing but the messages it would send."""

    def __init__(self) -> None:
        self.sent: list[tuple[bytes, wire.Message]] = []
        self.core = Coordinator(self.send, Defaults("auto"))
        self.spent: dict[str, list[float]] = {}

    def send(self, peer: bytes, message: wire.Message) -> None:
        encode(message)
        self.sent.append((peer, message))

    def tell(self, peer: bytes, message: wire.Message) -> None:
        frame = encode(message)
        began = time.perf_counter()
        self.core.on_message(peer, decode(frame))
        name = type(message.done if isinstance(message, wire.Done) else message).__name__
        self.spent.setdefault(name, []).append(time.perf_counter() - began)

    def got(self, kind: type) -> tuple[int, Any]:
        """The last order of this kind, and the request that it is for."""
        orders = (message for _, message in reversed(self.sent) if isinstance(message, wire.Do))
        return next((do.request, do.order) for do in orders if isinstance(do.order, kind))


async def measure() -> dict[str, list[float]]:
    fakes = Fakes()
    fakes.tell(b"t", hello("target", 1))
    fakes.tell(b"d", hello("draft", 2))
    await asyncio.sleep(0.05)
    prompt = tuple(range(2, 50))
    fakes.tell(
        b"c",
        wire.Submit(1, prompt, None, SAMPLING, 8000, (), False, False, "pipelined", None, False),
    )
    await asyncio.sleep(0.05)
    request, _ = fakes.got(Prefill)
    position, drafted, lineage = len(prompt), len(prompt), fakes.got(OpenDraft)[1].lineage

    def verdict(number: int, tokens: tuple[int, ...]) -> wire.Done:
        verdict = Verdict(
            accepted=max(0, len(tokens) - 1),
            tokens=tokens,
            round=number,
            base=position,
            pieces=(b"x",) * len(tokens),
            margins=(1.0,) * len(tokens),
            elapsed_s=0.1,
        )
        return wire.Done(request, verdict)

    fakes.tell(b"t", verdict(0, (7,)))
    position += 1
    for _ in range(ROUNDS):
        while drafted < position + STOCK:
            proposal = Proposal(lineage, drafted, (Drafted(7, 0.97),), 0.03)
            fakes.tell(b"d", wire.Done(request, proposal))
            drafted += 1
        _, asked = fakes.got(Verify)
        tokens = (*asked.drafted, 7)
        fakes.tell(b"t", verdict(asked.round, tokens))
        position += len(tokens)
    return fakes.spent


def main() -> None:
    spent = asyncio.run(measure())
    for name in ("Proposal", "Verdict"):
        times = sorted(spent[name])
        print(
            f"{name:8} median {1000 * statistics.median(times):.3f} ms, 95 % below "
            f"{1000 * times[len(times) * 95 // 100]:.3f} ms, {len(times)} messages"
        )


if __name__ == "__main__":
    main()
