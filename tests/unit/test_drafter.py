"""A model as a drafter: it reads in chunks, rolls back, and proposes what its engine says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from outrider.core.drafter import Opening
from outrider.core.engine import Cancelled, Part
from outrider.core.sampling import Sampling, choose, propose
from outrider.core.stream import AT_ONCE
from outrider.core.values import TokenId
from outrider.engines.breakers import KnownBreakers
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.engines.toy_text import SMALLEST

GREEDY = Sampling(temperature=0)
WARM = Sampling(temperature=0.8, top_k=40, seed=7)
TEXT = tuple(b"the old river runs over the quiet meadow ")
LONG = TEXT * 8
DRY = Sampling(temperature=0, dry_multiplier=3.0, dry_sequence_breakers=("ver", "t "))
ALL = DRY.changed(
    temperature=0.9, typical_p=0.9, top_n_sigma=0.5, dynatemp_range=0.5, xtc_probability=0.5, seed=9
)


class Counting(ToyEngine):
    """Remembers how many tokens each evaluation had, and for how many rows."""

    def __init__(self, settings: ToySettings) -> None:
        super().__init__(settings)
        self.evaluated: list[tuple[int, int]] = []

    def extend_all(self, parts: Sequence[Part]) -> Any:
        self.evaluated += [(len(part.tokens), part.rows) for part in parts]
        return super().extend_all(parts)


def drafter(**settings: Any) -> tuple[ModelDrafter, Counting]:
    engine = Counting(ToySettings("draft", agreement=1.0, **settings))
    made = ModelDrafter(engine)
    engine.evaluated.clear()
    return made, engine


def said_by_the_engine(
    text: Sequence[TokenId], sampling: Sampling = GREEDY, **settings: Any
) -> Any:
    """What the engine says after `text` in one evaluation."""
    engine = ToyEngine(ToySettings("draft", agreement=1.0, chunk=512, **settings))
    return propose(engine.extend(0, text, 1)[0], sampling, text, len(text), n_vocab=SMALLEST)


def test_it_is_what_its_engine_is() -> None:
    made, engine = drafter(context=300, slots=3)
    info = made.info
    assert (info.name, info.context, info.slots, info.device) == ("toy-draft", 300, 3, "toy")
    assert info.vocabulary == engine.info.vocabulary
    assert made.token_s > 0
    assert made.label(65) == "A"
    assert [engine.length(slot) for slot in range(3)] == [0, 0, 0]  # measuring left nothing


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_it_proposes_one_token_after_the_other(sampling: Sampling) -> None:
    made, engine = drafter()
    made.open(0, Opening(sampling, SMALLEST))
    text = list(TEXT)
    for _ in range(20):
        assert made.read(0) == max(0, len(text) - 1) * (len(text) > len(TEXT))
        (one,) = made.propose(0, text)
        assert one == said_by_the_engine(text, sampling)
        text.append(one.token)
    assert engine.evaluated == [(len(TEXT), 1), *[(1, 1)] * 19]  # nothing is read twice


@pytest.mark.parametrize(
    ("chunk", "parts"),
    [
        pytest.param(50, [50] * 6 + [28], id="the-engines-chunk"),
        pytest.param(512, [AT_ONCE] * 2 + [len(LONG) - 2 * AT_ONCE], id="at-most-so-many-at-once"),
        pytest.param(len(LONG) // 2, [AT_ONCE] * 2 + [72], id="neither"),
    ],
)
def test_a_long_text_is_read_in_parts_and_then_gone_on_from(chunk: int, parts: list[int]) -> None:
    made, engine = drafter(chunk=chunk)
    made.open(0, Opening(GREEDY, SMALLEST))
    for end in range(1, len(parts)):
        assert made.propose(0, LONG) == ()
        assert made.read(0) == sum(parts[:end])
    assert made.propose(0, LONG) == (said_by_the_engine(LONG),)
    assert made.read(0) == len(LONG)
    # a row of logits is asked for at the end alone
    assert engine.evaluated == [*((n, 0) for n in parts[:-1]), (parts[-1], 1)]


def test_cut_back_it_goes_on_from_the_other_text() -> None:
    made, engine = drafter()
    made.open(0, Opening(GREEDY, SMALLEST))
    made.propose(0, TEXT)
    other = (*TEXT[:20], *b"stone story")
    made.cut(0, 20)
    assert made.read(0) == 20
    assert made.propose(0, other) == (said_by_the_engine(other),)
    assert engine.evaluated == [(len(TEXT), 1), (len(other) - 20, 1)]


def test_a_cut_behind_what_it_has_read_changes_nothing() -> None:
    made, _ = drafter()
    made.open(0, Opening(GREEDY, SMALLEST))
    made.propose(0, TEXT)
    made.cut(0, len(TEXT) + 5)
    assert made.read(0) == len(TEXT)


def test_asked_again_about_the_same_text_it_says_the_same() -> None:
    made, engine = drafter()
    made.open(0, Opening(WARM, SMALLEST))
    assert made.propose(0, TEXT) == made.propose(0, TEXT)
    assert engine.evaluated == [(len(TEXT), 1), (1, 1)]


def test_slots_are_texts_of_their_own() -> None:
    made, _ = drafter(slots=2)
    made.open(0, Opening(GREEDY, SMALLEST))
    made.open(1, Opening(WARM, SMALLEST))
    made.propose(0, TEXT)
    assert (made.read(0), made.read(1)) == (len(TEXT), 0)
    other = TEXT[:9]
    assert made.propose(1, other) == (said_by_the_engine(other, WARM),)
    longer = (*TEXT, *b"so ")
    assert made.propose(0, longer) == (said_by_the_engine(longer),)


def test_opened_again_a_slot_is_empty() -> None:
    made, _ = drafter()
    made.open(0, Opening(GREEDY, SMALLEST))
    made.propose(0, TEXT)
    made.open(0, Opening(WARM, SMALLEST))
    assert made.read(0) == 0
    assert made.propose(0, TEXT) == (said_by_the_engine(TEXT, WARM),)


@pytest.mark.parametrize(
    ("size", "limit"),
    [
        pytest.param(SMALLEST + 40, SMALLEST, id="a-target-with-fewer-ids"),
        pytest.param(SMALLEST, SMALLEST + 40, id="a-target-with-more"),
        pytest.param(SMALLEST + 40, SMALLEST + 40, id="equal"),
    ],
)
def test_it_proposes_only_what_both_vocabularies_have(size: int, limit: int) -> None:
    made, _ = drafter(vocabulary_size=size)
    # the last id of either would always win, where there is one
    last = SMALLEST + 39
    made.open(0, Opening(GREEDY.changed(logit_bias=((last, 1e5),)), limit))
    (one,) = made.propose(0, TEXT)
    assert (one.token == last) == (size == limit)
    assert one.token < min(size, limit)


def test_what_its_engine_does_not_hold_is_refused() -> None:
    made, _ = drafter(context=50)
    made.open(0, Opening(GREEDY, SMALLEST))
    with pytest.raises(ValueError, match="overflow the context"):
        made.propose(0, LONG[:51])
    with pytest.raises(ValueError, match="no token"):
        made.propose(0, (1, SMALLEST))


def test_cut_short_it_has_read_no_more_than_before(monkeypatch: pytest.MonkeyPatch) -> None:
    made, engine = drafter()
    made.open(0, Opening(GREEDY, SMALLEST))
    made.propose(0, TEXT)
    monkeypatch.setattr(engine, "_wait", lambda until: made.cancel())  # while it computes
    with pytest.raises(Cancelled):
        made.propose(0, (*TEXT, 65, 66))
    assert made.read(0) == len(TEXT)


def test_it_closes_its_engine() -> None:
    made, engine = drafter()
    made.close()
    with pytest.raises(ValueError, match="closed"):
        engine.length(0)


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_it_tells_what_it_would_have_proposed_for_the_last_tokens(sampling: Sampling) -> None:
    made, engine = drafter()
    made.open(0, Opening(sampling, SMALLEST))
    recalled = made.recall(0, TEXT, 5)
    assert engine.evaluated == [(len(TEXT) - 1, 5)], "in one evaluation"
    ends = range(len(TEXT) - 5, len(TEXT))
    assert [one.token for one in recalled] == [
        said_by_the_engine(TEXT[:end], sampling).token for end in ends
    ]
    assert made.read(0) == len(TEXT) - 1
    (drafted,) = made.propose(0, TEXT)
    assert drafted.token == said_by_the_engine(TEXT, sampling).token
    assert engine.evaluated[1:] == [(1, 1)]


@pytest.mark.parametrize("sampling", [GREEDY, WARM, DRY, ALL], ids=["greedy", "warm", "dry", "all"])
def test_where_target_and_draft_are_alike_the_target_accepts_all(sampling: Sampling) -> None:
    target, made = ToyEngine(), drafter()[0]
    breakers = KnownBreakers(target).of(sampling)
    made.open(0, Opening(sampling, SMALLEST))
    text = list(TEXT)
    for _ in range(60):
        (row,) = target.extend(0, text[target.length(0) :], 1)
        chosen = choose(row, sampling, text, len(text), breakers=breakers)
        (drafted,) = made.propose(0, text)
        assert drafted.token == chosen
        text.append(chosen)


@pytest.mark.parametrize("count", [0, len(TEXT)])
def test_it_recalls_nothing_that_it_has_not_read_before(count: int) -> None:
    made, engine = drafter()
    made.open(0, Opening(GREEDY, SMALLEST))
    assert made.recall(0, TEXT, count) == ()
    assert engine.evaluated == []


def test_the_beginning_of_a_text_can_be_skipped() -> None:
    made, engine = drafter()
    made.open(0, Opening(GREEDY, SMALLEST, 10))
    assert made.read(0) == 10
    (drafted,) = made.propose(0, TEXT)
    assert engine.evaluated == [(len(TEXT) - 10, 1)]
    assert drafted.token == said_by_the_engine(TEXT[10:]).token
    assert made.read(0) == len(TEXT)
    made.cut(0, 20)
    assert made.read(0) == 20
    made.cut(0, 4)
    assert made.read(0) == 10, "what was skipped cannot be rolled back"


def test_texts_that_find_no_room_in_one_pass_have_the_next() -> None:
    drafter = ModelDrafter(ToyEngine(ToySettings(role="draft", slots=4, chunk=5)))
    alone = ModelDrafter(ToyEngine(ToySettings(role="draft", slots=4, chunk=5)))
    texts = [(slot, [97 + slot, 98, 99]) for slot in range(4)]
    for slot, _ in texts:
        for one in (drafter, alone):
            one.open(slot, Opening(Sampling(temperature=0), 256))
    found = drafter.propose_all(texts)
    for (slot, text), drafted in zip(texts, found, strict=True):
        if drafted:
            assert drafted == alone.propose(slot, text)
        else:
            assert 0 < drafter.read(slot) < len(text), "it has come nearer"
