"""A draft that is always sure and always wrong, in virtual time: it costs next to nothing."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from tests.sim.replay import FLAT, PROCESSOR

from outrider.core.priced import PricedRule
from outrider_services.bench.replay import Replay, World

LENGTH, SURE = 300, 0.999
TRACE: dict[str, Any] = {
    "match": [0] * LENGTH,
    "margin": [20.0] * LENGTH,  # the target is sure, too: all speaks for drafting
    "confidence": [SURE] * LENGTH,
    "rank_at_miss": {},
    "off_path_confidence": {str(at): [SURE] for at in range(LENGTH)},
}
WORLDS = {
    "quick": World(FLAT, 0.005),
    "slow": World(FLAT, 0.020),
    "processor": World(PROCESSOR, 0.031),
    "branches": World(FLAT, 0.005, rows_s=(0.005,) * 17),
    "tree": World(FLAT, 0.005, rows_s=(0.005,) * 17, sides=16),
}


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
@pytest.mark.parametrize("name", WORLDS)
def test_the_first_answer_loses_little_and_later_ones_nothing(
    name: str, mode: Literal["sync", "pipelined"]
) -> None:
    world = WORLDS[name]
    experience = world.experience()
    first, *later = (
        Replay(TRACE, PricedRule(mode, 64, experience), world).speedup() for _ in range(3)
    )
    assert first >= 0.97
    assert min(later) >= 0.99
