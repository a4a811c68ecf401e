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

from outrider.core.rules import PricedRule
from outrider_services.bench.replay import Replay, World, curve

TRACES: dict[str, Any] = json.loads(Path(__file__).with_name("prompt-traces.json").read_text())
LENGTHS, PADDINGS = (16, 64, 256), (30, 300, 1000)
# passes by their rows; a drafted token; a token that the target or the draft only reads
DEVICES: dict[str, tuple[dict[int, float], float, float, float]] = {
    "gcc 12": (
        {1: 62, 2: 99, 3: 139, 4: 133, 6: 246, 8: 427, 12: 619, 16: 620},
        *(16, 20, 10),
    ),
    "gcc 12, untiled": (
        {1: 61, 2: 105, 3: 132, 4: 161, 6: 269, 8: 283, 12: 532, 16: 487},
        *(16, 20, 10),
    ),
    "clang 19": (
        {1: 51, 2: 82, 3: 113, 4: 109, 6: 180, 8: 283, 12: 361, 16: 399},
        *(16, 15, 6),
    ),
    "clang 19, untiled": (
        {1: 53, 2: 70, 3: 94, 4: 96, 6: 159, 8: 195, 12: 272, 16: 317},
        *(16, 15, 6),
    ),
    "ziglang, untiled": (
        {1: 49, 2: 79, 3: 104, 4: 110, 6: 156, 8: 179, 12: 281, 16: 335},
        *(16, 15, 6),
    ),
    "ziglang, Zen 4": (
        {1: 33, 2: 57, 3: 77, 4: 92, 6: 130, 8: 155, 12: 220, 16: 262},
        *(11.6, 10, 3.1),
    ),
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
        curve(passes),
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
