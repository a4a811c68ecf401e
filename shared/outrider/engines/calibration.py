"""What an engine's passes cost: measured once, when the model has been loaded."""

from __future__ import annotations

import statistics
import time

import numpy as np

from outrider.core.engine import Engine
from outrider.core.values import TokenId

STEPS, STEPS_S = 15, 0.1  # most passes over one row to measure; how long for more than three


def calibrate(engine: Engine, rows: tuple[int, ...]) -> tuple[float, ...]:
    """Seconds of evaluating 1, 2, 3 … tokens with a row of logits each, after a short text.

    Measured for the numbers in `rows`, interpolated between them. Slot 0 is used, and freed.
    """
    info = engine.info
    start = min(8, info.chunk, info.context // 2)
    rows = tuple(n for n in rows if n <= min(info.chunk, info.context - start))
    text: list[TokenId] = [min(5, info.vocabulary.size - 1)] * max(start, rows[-1])
    engine.extend(0, text[:start], 0)
    measured = []
    for n in rows:
        seconds: list[float] = []
        # one row is what all else is compared with: of short passes there is time for more
        most = STEPS if n == 1 else 2
        while len(seconds) < most and (len(seconds) < 3 or sum(seconds) < STEPS_S):
            began = time.perf_counter()
            engine.extend(0, text[:n], n)
            seconds.append(time.perf_counter() - began)
            engine.rewind(0, start)
        measured.append(statistics.median(seconds) if n == 1 else min(seconds))
    engine.rewind(0, 0)
    return tuple(map(float, np.interp(range(1, rows[-1] + 1), rows, measured)))
