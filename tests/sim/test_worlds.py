"""A share of the worlds of `scripts/chaos`: whole pipelines, and what befalls them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from tests.chaos.house import House, run
from tests.chaos.network import Faults
from tests.chaos.worlds import GREEDY, Asked, Killed, Paused, World, drawn, unseen

from outrider.core.values import TokenId
from outrider_services.pipeline.slots import Slots
from outrider_services.pipeline.target_worker import TargetWorker
from outrider_services.pipeline.verifying import Verifying

COUNT, SEED = 150, 1
# number and seed of worlds that have shown a fault
FAULTY = ((576, 1), (9404, 1), (1031, 3), (1115, 5))
ASKED = Asked(0.0, "The river", 24, GREEDY, "pipelined", "")


def lived(number: int) -> House:
    return run(drawn(number, SEED), f"{SEED} {number}")


def test_whatever_happens_every_answer_is_the_targets_own() -> None:
    """The first few: quick enough to be run against every bug that is planted."""
    for number in range(25):
        assert lived(number).complaints == [], f"world {number}"


@pytest.mark.parametrize(("number", "seed"), FAULTY)
def test_what_was_wrong_once_is_right(number: int, seed: int) -> None:
    assert run(drawn(number, seed), f"{seed} {number}").complaints == []


@pytest.mark.timeout(120)
def test_and_all_of_it_has_happened() -> None:
    seen: Counter[str] = Counter()
    for number in range(25, COUNT):
        house = lived(number)
        assert house.complaints == [], f"world {number}"
        seen.update(house.seen)
    assert unseen(seen) == []


def test_the_same_world_is_the_same_again() -> None:
    for number in range(5):
        assert lived(number).seen == lived(number).seen


def test_no_time_passes_that_nobody_waits_for() -> None:
    """An answer takes what its passes and messages take."""
    slow = World((ASKED,), pass_s=1.0, has_draft=False, faults={"target": Faults((0.5, 0.5))})
    house = run(slow)
    assert house.complaints == []
    assert house.loop.now > 1000 + 24 * 1.0 + 2 * 0.5


# ---- controls: what they look for would be found ------------------------------------------------


def test_control_a_wrong_token_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Verifying._choices

    def wrong(*arguments: Any) -> Iterator[TokenId]:
        for token in right(*arguments):
            yield 32 + (token & 1) if token > 97 else token

    monkeypatch.setattr(Verifying, "_choices", staticmethod(wrong))
    assert "request 0: a wrong token" in run(World((ASKED,))).complaints


def test_control_a_leak_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Slots, "give_back", lambda *_: None)
    assert "the target worker holds a sequence" in run(World((ASKED,))).complaints


def test_control_who_waits_for_ever_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TargetWorker, "_verify", lambda *_: None)
    assert "1 requests wait for ever" in run(World((ASKED,))).complaints


def test_control_an_error_is_found() -> None:
    """Nobody has allowed it."""
    world = World((ASKED.__class__(0.0, "", 4, GREEDY, "plain", ""),))
    assert any("invalid_request" in one for one in run(world).complaints)


def test_a_pause_changes_nothing() -> None:
    events = (Paused("draft", 0.05, 2.5), Paused("target", 0.06, 0.9), Killed("draft", 0.1, 0.5))
    assert run(World((ASKED, ASKED), events)).complaints == []
