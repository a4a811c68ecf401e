"""Recorded traces and the costs of their machine; see `outrider_services.bench.replay`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from outrider_services.bench.replay import Replay, World, curve

TRACES: dict[str, Any] = json.loads(Path(__file__).with_name("acceptance-traces.json").read_text())

# a 1.5B target and a 0.5B draft in Q4_0, each on one core with AMX, 256 tokens of context
PROCESSOR = curve({1: 112, 2: 194, 3: 206, 4: 210, 5: 224, 6: 245, 8: 271, 12: 291, 16: 328})
FLAT = curve({1: 100, 2: 100})


def speedups(rule: Any, world: World) -> dict[str, float]:
    """By kind of text; `rule()` makes a new one for each."""
    return {name: Replay(trace, rule(), world).speedup() for name, trace in TRACES.items()}
