"""`calibrate`: what a worker says of its engine's speed when it has been loaded."""

from __future__ import annotations

import time
from collections.abc import Sequence

from outrider.core.sampling import Scores
from outrider.core.values import TokenId
from outrider.engines.calibration import calibrate, calibrate_rollback
from outrider.engines.toy import ToyEngine


class Disturbed(ToyEngine):
    """Its first passes over one row are slow, as while the other worker is loading."""

    slow = 5

    def extend(self, slot: int, tokens: Sequence[TokenId], rows: int) -> Scores:
        if rows == 1 and self.slow:
            self.slow -= 1
            time.sleep(0.015)
        return super().extend(slot, tokens, rows)


def test_a_few_passes_that_were_disturbed_do_not_count() -> None:
    engine = Disturbed()
    assert calibrate(engine, (1,))[0] < 0.01
    assert not engine.slow
    assert engine.length(0) == 0


class SlowToTakeBack(ToyEngine):
    def rewind(self, slot: int, length: int) -> None:
        time.sleep(0.01)
        super().rewind(slot, length)


def test_taking_back_is_timed_and_nothing_is_left() -> None:
    engine = SlowToTakeBack()
    assert 0.01 <= calibrate_rollback(engine) < 0.1
    assert engine.length(0) == 0
    assert calibrate_rollback(ToyEngine()) < 0.005
