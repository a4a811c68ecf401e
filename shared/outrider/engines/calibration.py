"""What an engine's passes cost: measured once, when the model has been loaded."""

from __future__ import annotations

import statistics
import time

import numpy as np

from outrider.core.engine import Engine, Part
from outrider.core.values import TokenId

STEPS, STEPS_S = 15, 0.1  # most passes over one row to measure; only 3 if these take so long


def calibrate(engine: Engine, rows: tuple[int, ...]) -> tuple[float, ...]:
    """Seconds of a pass over 1, 2, 3 … rows, behind a short text.

    Only the numbers in `rows`, in ascending order, are measured, as far as the engine has room for
    them; those between are interpolated. Slot 0 is used, and freed.
    """
    info = engine.info
    start = min(8, info.chunk, info.context // 2)
    rows = tuple(n for n in rows if n <= min(info.chunk, info.context - start))
    text: list[TokenId] = [min(5, info.vocabulary.size - 1)] * max(start, rows[-1])
    engine.extend(0, text[:start], 0)
    measured = []
    for n in rows:
        seconds: list[float] = []
        # all else is compared with one row: if its passes are short, more of them are measured
        most = STEPS if n == 1 else 2
        while len(seconds) < most and (len(seconds) < 3 or sum(seconds) < STEPS_S):
            began = time.perf_counter()
            engine.extend(0, text[:n], n)
            seconds.append(time.perf_counter() - began)
            engine.rewind(0, start)
        measured.append(statistics.median(seconds) if n == 1 else min(seconds))
    engine.rewind(0, 0)
    return tuple(map(float, np.interp(range(1, rows[-1] + 1), rows, measured)))


def calibrate_crowd(engine: Engine) -> tuple[float, ...]:
    """Seconds of a pass over one row each of 1, 2, 3 … sequences, as many as there are slots.

    Powers of two are measured, and the last; those between are interpolated. All slots are used,
    and freed.
    """
    info = engine.info
    most = min(info.slots, info.chunk)
    sizes = sorted({2**n for n in range(most.bit_length())} | {most})
    token: TokenId = min(5, info.vocabulary.size - 1)
    for slot in range(most):
        engine.extend(slot, [token], 0)
    measured = []
    for size in sizes:
        seconds: list[float] = []
        while len(seconds) < 3 and sum(seconds) < STEPS_S:
            began = time.perf_counter()
            engine.extend_all([Part(slot, [token], 1) for slot in range(size)])
            seconds.append(time.perf_counter() - began)
            for slot in range(size):
                engine.rewind(slot, 1)
        measured.append(min(seconds))
    for slot in range(most):
        engine.rewind(slot, 0)
    return tuple(map(float, np.interp(range(1, most + 1), sizes, measured)))


def calibrate_reading(engine: Engine, count: int, rows: int) -> float:
    """Seconds that each of `count` tokens takes that are read at once, with logits for `rows`.

    Slot 0 is used, and freed.
    """
    info = engine.info
    count = min(count, info.chunk, info.context)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        engine.extend(0, [min(5, info.vocabulary.size - 1)] * count, min(rows, count))
        seconds.append(time.perf_counter() - began)
        engine.rewind(0, 0)
    return min(seconds) / count
