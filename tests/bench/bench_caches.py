"""Passes over several sequences: a stream of its own for each, or one unified cache.

Run at the top: `PYTHONPATH=. .venv/bin/python -m tests.bench.bench_caches MODEL.gguf [TOKENS]`,
TOKENS being how much each sequence holds (default 100). The two take turns.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path

from outrider.core.engine import Part
from outrider.engines.llama.engine import LlamaEngine, LlamaSettings

SHAPES = {
    "1 row each of 4": (1,) * 4,
    "1 row each of 8": (1,) * 8,
    "4 rows each of 4": (4,) * 4,
    "1, 3, 5 and 7 rows": (1, 3, 5, 7),
    "1 row each of 7, 8 of the last": (1,) * 7 + (8,),
}
REPETITIONS = 7


def main() -> int:
    path, held = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    engines = {
        name: LlamaEngine.load(
            path, LlamaSettings(context=1024, slots=8, threads=2, tiled=False, unified=unified)
        )
        for name, unified in (("streams", False), ("unified", True))
    }
    text = [5] * held
    for engine in engines.values():
        for slot in range(8):
            for start in range(0, held, 100):
                engine.extend(slot, text[start : start + 100], 0)
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(REPETITIONS):
        for shape, rows in SHAPES.items():
            for name, engine in engines.items():
                parts = [Part(slot, text[:count], count) for slot, count in enumerate(rows)]
                began = time.perf_counter()
                engine.extend_all(parts)
                took[shape, name].append(time.perf_counter() - began)
                for part in parts:
                    engine.rewind(part.slot, held)
    for shape in SHAPES:
        streams, unified = (took[shape, name] for name in engines)
        ratio = statistics.median(b / a for a, b in zip(streams, unified, strict=True))
        ms = [1000 * statistics.median(one) for one in (streams, unified)]
        print(f"{shape:31} streams {ms[0]:4.0f} ms, unified {ms[1]:4.0f} ms; {ratio:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
