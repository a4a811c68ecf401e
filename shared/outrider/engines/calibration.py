"""What an engine's passes cost: measured once, when the model has been loaded."""

from __future__ import annotations

import statistics
import time

import numpy as np

from outrider.core.engine import Engine
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
