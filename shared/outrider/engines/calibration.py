"""What an engine's passes cost: measured once, when the model has been loaded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np

from outrider.core.engine import Engine, Part
from outrider.core.values import TokenId

CHEAP = 1.45  # three further rows at 0.15 of a step each: about where drafts for several pay
STEPS, STEPS_S = 15, 0.1  # most passes over one row to measure; only 3 if these take so long


def back_to(engine: Engine, slot: int, text: Sequence[TokenId]) -> None:
    """The sequence in `slot`, which begins with `text`, holds that alone again."""
    engine.rewind(slot, len(text))
    if missing := text[engine.length(slot) :]:
        engine.extend(slot, missing, 0)


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
            back_to(engine, 0, text[:start])
        measured.append(statistics.median(seconds) if n == 1 else min(seconds))
    engine.rewind(0, 0)
    return tuple(map(float, np.interp(range(1, rows[-1] + 1), rows, measured)))


def calibrate_crowd(engine: Engine, spare: int = 0) -> tuple[float, ...]:
    """Seconds of a pass over one row each of 1, 2, 3 … sequences, as many as there are slots.

    So many `spare` ones count, too. Powers of two are measured, and the last; those between are
    interpolated. All these slots are used, and freed.
    """
    info = engine.info
    most = min(info.slots + spare, info.chunk)
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
                back_to(engine, slot, [token])
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


def calibrate_rollback(engine: Engine) -> float:
    """Seconds that taking back the last few tokens of a block takes.

    Where a memory goes back farther than asked, this includes what the next pass takes longer, as
    it reads again what is missing. Slot 0 is used, and freed.
    """
    info = engine.info
    size = max(2, min(16, info.chunk, info.context) // 2)
    text: list[TokenId] = [min(5, info.vocabulary.size - 1)] * (2 * size)
    kept = size + size // 2  # of text and block; then one token more
    seconds, again_s, alone_s = [], [0.0], [0.0]
    for _ in range(3):
        engine.extend(0, text[:size], 0)
        engine.extend(0, text[size:], size)
        began = time.perf_counter()
        engine.rewind(0, kept)
        seconds.append(time.perf_counter() - began)
        if engine.length(0) < kept:
            again_s.append(_pass_s(engine, text[engine.length(0) : kept + 1]))
            alone_s.append(_pass_s(engine, text[:1]))
        engine.rewind(0, 0)
    return min(seconds) + max(0.0, min(again_s[1:] or again_s) - min(alone_s[1:] or alone_s))


def _pass_s(engine: Engine, tokens: Sequence[TokenId]) -> float:
    began = time.perf_counter()
    engine.extend(0, tokens, 1)
    return time.perf_counter() - began
