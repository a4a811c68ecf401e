"""A model and a free drafter together: who goes first, and what is learnt of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from outrider.core.drafter import DrafterInfo, Opening
from outrider.core.sampling import Sampling
from outrider.core.stream import AT_ONCE
from outrider.core.values import Drafted, TokenId, ids_of
from outrider.engines.together import MEMORY, SETTLED, USUAL, BothDrafters

OPENING = Opening(Sampling(), vocabulary=500, begins=0)
SAYS = 99  # what the model always proposes
REPEATED = (*range(20), *range(9))  # the next one is 9


class Model:
    """Always of the same opinion, and asked as seldom as possible."""

    token_s = read_s = 0.01
    crowd_s = (0.01, 0.01)
    info = DrafterInfo("model", None, context=1000, slots=2, device="none")

    def __init__(self) -> None:
        self.asked: list[int] = []  # slots
        self.known: dict[int, int] = {}
        self.did: list[tuple[Any, ...]] = []

    def open(self, slot: int, opening: Opening) -> None:
        self.known[slot] = 0

    def cut(self, slot: int, length: int) -> None:
        self.known[slot] = min(self.known[slot], length)

    def read(self, slot: int) -> int:
        return self.known[slot]

    def propose_all(
        self, texts: Sequence[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        for slot, text in texts:
            self.asked.append(slot)
            self.known[slot] = len(text)
        return [(Drafted(SAYS, 0.9),) for _ in texts]

    def __getattr__(self, name: str) -> Any:
        return lambda *given: self.did.append((name, *given))


@pytest.fixture
def both() -> BothDrafters:
    made = BothDrafters(Model())  # type: ignore[arg-type]
    for slot in (0, 1):
        made.open(slot, OPENING)
    return made


def model_of(both: BothDrafters) -> Model:
    assert isinstance(both._model, Model)
    return both._model


def test_where_the_text_repeats_itself_the_model_is_spared(both: BothDrafters) -> None:
    assert ids_of(both.propose(0, REPEATED))[:3] == (9, 10, 11)
    assert model_of(both).asked == []


def test_elsewhere_the_model_drafts(both: BothDrafters) -> None:
    assert ids_of(both.propose(0, range(20))) == (SAYS,)


def test_each_text_of_a_step_has_its_own(both: BothDrafters) -> None:
    found = both.propose_all([(0, range(20)), (1, REPEATED)])
    assert [one[0].token for one in found] == [SAYS, 9]
    assert model_of(both).asked == [0]


def test_a_model_that_is_always_right_goes_first(both: BothDrafters) -> None:
    """What repeats is less sure than that."""
    text = list(range(20))
    for n in range(300):
        text += ids_of(both.propose(0, text)) if n % 2 else (100 + n,)
    assert both.propose(0, [*text, *range(4)])[0].token == SAYS


def test_what_the_model_would_have_said_is_scored_once_it_is_settled(both: BothDrafters) -> None:
    text = list(range(20))
    both.propose(0, text)
    both.propose(0, [*text, SAYS])  # it may still be cut
    assert both._accepted == USUAL
    both.cut(0, 20)
    both.propose(0, [*text, 7, *range(100, 100 + SETTLED)])
    assert both._accepted == pytest.approx(USUAL - USUAL / MEMORY)


def test_a_model_that_has_much_to_read_reads(both: BothDrafters) -> None:
    text = [*range(AT_ONCE), *range(9)]
    assert both.propose(0, text)[0].token == SAYS
    assert both.propose(0, text)[0].token == 9


def test_all_else_is_the_models(both: BothDrafters) -> None:
    both.prepare(None)  # type: ignore[arg-type]
    both.cancel()
    both.close()
    assert [name for name, *_ in model_of(both).did] == ["prepare", "cancel", "close"]
    assert both.read(0) == 0
