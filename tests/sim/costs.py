"""Measured costs of pairs on two shared cores, and what `auto` makes of them in virtual time.

The default pair, its draft as Q4_0; milliseconds. All but the last were measured on a Zen 3 class
processor with AVX2, the last on Zen 4 with AVX-512.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outrider.core.priced import PricedRule
from outrider_services.bench.replay import Replay, World, curve

TRACES: dict[str, Any] = json.loads(Path(__file__).with_name("prompt-traces.json").read_text())
LENGTHS, PADDINGS = (16, 64, 256), (30, 300, 1000)
ROWS = (1, 2, 3, 4, 6, 8, 12, 16)  # of the passes that were measured
# their costs; a drafted token; a token that the target or the draft only reads
DEVICES: dict[str, tuple[tuple[int, ...], float, float, float]] = {
    "gcc 12": ((62, 99, 139, 133, 246, 427, 619, 620), 16, 20, 10),
    "gcc 12, untiled": ((61, 105, 132, 161, 269, 283, 532, 487), 16, 20, 10),
    "clang 19": ((51, 82, 113, 109, 180, 283, 361, 399), 16, 15, 6),
    "clang 19, untiled": ((53, 70, 94, 96, 159, 195, 272, 317), 16, 15, 6),
    "ziglang, untiled": ((49, 79, 104, 110, 156, 179, 281, 335), 16, 15, 6),
    "ziglang, Zen 4": ((33, 57, 77, 92, 130, 155, 220, 262), 11.6, 10, 3.1),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """An answer: on these devices, to this prompt, as the first or the tenth of a service."""

    device: str
    length: int
    padding: int
    which: str
    prompt: str
    ratio: float  # how many times as fast as the target alone


def ratios(device: str, length: int, padding: int, prompts: Sequence[str]) -> list[float]:
    """How many times as fast as the target alone each answer is; a service gives one by one."""
    passes, draft, reads, draft_reads = DEVICES[device]
    world = World(
        curve(dict(zip(ROWS, passes, strict=True))),
        draft / 1000,
        prompt=padding,
        prefill_s=reads / 1000,
        read_s=draft_reads / 1000,
    )
    experience, found = world.experience(), []
    for prompt in prompts:
        trace = {**TRACES[prompt]}
        for name in ("match", "confidence"):
            trace[name] = trace[name][:length]
        found.append(Replay(trace, PricedRule("sync", 64, experience), world).speedup())
    return found


def cells(device: str, lengths: Sequence[int], paddings: Sequence[int]) -> Iterator[Cell]:
    """The first answers of fresh services; the tenth to one prompt; the tenth after nine others."""
    for length in lengths:
        for padding in paddings:
            for prompt in TRACES:
                others = [one for one in TRACES if one != prompt][:9]
                for which, asked in {
                    "first": [prompt],
                    "tenth alike": [prompt] * 10,
                    "tenth": [*others, prompt],
                }.items():
                    ratio = ratios(device, length, padding, asked)[-1]
                    yield Cell(device, length, padding, which, prompt, ratio)
