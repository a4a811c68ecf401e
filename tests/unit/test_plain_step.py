"""What a plain step takes, alone and beside a draft that computes."""

from __future__ import annotations

import random

import pytest

from outrider.core.plain_step import RARELY, SELDOM, PlainStep


def seen(step: PlainStep, speed: float, drag: float, passes: int, seed: int = 0) -> None:
    """Plain steps of 0.1 s / `speed`, up to 8 % off each; of every 28 four without a draft."""
    rng = random.Random(seed)
    for number in range(passes):
        beside = float(number % 28 < 24)
        step.passed(beside)
        step.took(0.1 / speed * drag**beside * rng.uniform(0.92, 1.08), beside)


@pytest.mark.parametrize("drag", [1.0, 1.06, 1.2])
def test_what_a_draft_adds_is_told_from_what_a_step_takes(drag: float) -> None:
    step = PlainStep(0.1)
    seen(step, 1.0, drag, 280)
    assert step.drag == pytest.approx(drag, abs=0.03)
    assert step.alone_s == pytest.approx(0.1, rel=0.05)


def test_a_machine_that_becomes_slower_is_no_drag() -> None:
    step = PlainStep(0.1)
    seen(step, 1.0, 1.06, 280)
    seen(step, 0.7, 1.06, 280, seed=1)
    assert step.alone_s == pytest.approx(0.1 / 0.7, rel=0.05)
    assert step.drag == pytest.approx(1.06, abs=0.03)


def test_at_worst_a_draft_takes_nothing() -> None:
    step = PlainStep(0.1)
    seen(step, 1.0, 0.9, 280)
    assert step.drag == 1.0


def test_a_disturbed_step_counts_for_no_more_than_twice_the_usual() -> None:
    once, often = PlainStep(0.1), PlainStep(0.1)
    once.took(0.2, 0.0)
    often.took(50.0, 0.0)
    assert often.alone_s == pytest.approx(once.alone_s)


def test_the_less_is_known_of_the_drag_the_sooner_the_target_is_watched_alone() -> None:
    step = PlainStep(0.1)
    for _ in range(10 * RARELY):
        step.passed(0.0)
    assert not step.is_in_doubt, "there was no draft beside it"
    for _ in range(SELDOM):
        assert not step.is_in_doubt
        step.passed(1.0)
    assert step.is_in_doubt
    seen(step, 1.0, 1.06, 280)
    for _ in range(2 * SELDOM):
        step.passed(1.0)
    assert not step.is_in_doubt, "by now it is known"
    for _ in range(RARELY):
        step.passed(1.0)
    assert step.is_in_doubt, "it may have changed"
