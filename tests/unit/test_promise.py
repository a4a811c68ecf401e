"""How sure the target was of its own tokens foretells how often a draft would agree."""

from __future__ import annotations

import statistics

import pytest
from tests.sim.costs import DEVICES, ROWS, TRACES

from outrider.core import promise
from outrider.core.estimates import Costs, Spread, Trust
from outrider.core.promise import LATELY, LEAST, UNTOLD, Promise
from outrider_services.bench.replay import curve

SURE, UNSURE = [12.0] * 64, [0.4] * 64
EVEN = Spread().weights
PASSES, DRAFT_MS, *_ = DEVICES["clang 19, untiled"]
COSTS = Costs(curve(dict(zip(ROWS, PASSES, strict=True))), DRAFT_MS / 1000, 5e-4)


def promised(margins: list[float], trust: Trust | None = None) -> Promise:
    made = Promise(trust or Trust(), EVEN)
    made.observe(margins)
    return made


@pytest.mark.parametrize("prompt", TRACES)
def test_what_is_foretold_comes_true(prompt: str) -> None:
    margins, match = TRACES[prompt]["margin"], TRACES[prompt]["match"]
    foretold = statistics.fmean(map(promise.agreement, margins))
    assert foretold == pytest.approx(statistics.fmean(match), abs=0.1)


def test_a_sure_target_promises_a_gain_and_an_unsure_one_none() -> None:
    assert promised(SURE).saved(COSTS) > 0.2
    assert promised(UNSURE).saved(COSTS) == pytest.approx(0, abs=0.01)
    mixed = promised(UNSURE)
    mixed.observe([12.0] * LATELY)
    assert mixed.saved(COSTS) > 0.2, "only the latest tokens count"


def test_too_few_tokens_or_untold_margins_foretell_nothing() -> None:
    assert not promised(SURE[: LEAST - 1]).is_known
    assert promised(SURE[:LEAST]).is_known
    assert not promised([UNTOLD] * 100).is_known


def test_a_draft_that_breaks_promises_is_not_trusted_on_the_next_text() -> None:
    trust = Trust()
    made = promised(SURE, trust)
    before = made.saved(COSTS)
    for _ in range(16):
        made.judged(good=False, context=100)
    assert made.saved(COSTS) < 0.2 * before
    assert promised(SURE, trust).saved(COSTS) < 0.2 * before
    for _ in range(300):
        made.judged(good=True, context=100)
    assert promised(SURE, trust).saved(COSTS) > 0.2, "it can win trust back"


def test_less_is_asked_of_a_draft_that_has_read_little() -> None:
    near, far = Trust(), Trust()
    for trust, context in ((near, 8), (far, 400)):
        made = promised(SURE, trust)
        for at in range(60):
            made.judged(good=at % 3 > 0, context=context)
    assert near.share > 0.95 > 0.8 > far.share
