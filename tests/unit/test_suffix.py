"""The drafter without a model: what it proposes, how far it trusts that, and what it takes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.core.drafter import Opening
from outrider.core.estimates import usual_acceptance
from outrider.core.sampling import Sampling
from outrider.core.values import TokenId, ids_of
from outrider.engines.suffix import (
    LEAST_RUN,
    LEAST_TRUST,
    MOST_DRAFTED,
    SuffixDrafter,
    Text,
    Trust,
)

ALPHABET = range(3)  # few letters: everything comes again and again


def opened(text: list[TokenId], begins: int = 0, trust: Trust | None = None) -> Text:
    one = Text(trust or Trust(), begins)
    one.follow(text)
    return one


def proposed(*text: TokenId) -> tuple[TokenId, ...]:
    return ids_of(opened(list(text), begins=99).propose())


def test_what_followed_the_last_time_is_proposed() -> None:
    assert proposed(1, 2, 3, 4, 5, 6, 9, 1, 2, 3)[:4] == (4, 5, 6, 9)


def test_of_several_places_the_longest_run_counts_and_of_equal_ones_the_latest() -> None:
    assert proposed(7, 1, 2, 3, 4, 8, 1, 2, 3, 5, 7, 1, 2, 3)[0] == 4
    assert proposed(8, 1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 1, 2, 3)[0] == 5


def test_a_text_that_goes_round_goes_on_so() -> None:
    assert proposed(1, 2, 3, 1, 2, 3) == tuple((1, 2, 3)[n % 3] for n in range(MOST_DRAFTED))


@pytest.mark.parametrize("text", [(), (1,), (1, 2, 1, 2), (1, 2, 3, 4, 2, 3, 5)])
def test_where_no_run_comes_again_it_has_no_idea(text: tuple[TokenId, ...]) -> None:
    assert proposed(*text) == ()


def test_longer_runs_are_trusted_more_and_none_without_end() -> None:
    drafted = opened([*range(9), *range(5)], begins=99).propose()
    trusted = [one.confidence for one in drafted]
    assert trusted == sorted(trusted)
    assert len(drafted) == MOST_DRAFTED


def test_what_never_follows_again_is_no_idea_any_more() -> None:
    """Runs of three, each followed by something else than the last time."""
    text = opened([1, 2, 3])
    for token in range(10, 60):
        text.follow([*text.tokens, token, 1, 2, 3])
    assert text.propose() == ()
    assert text.match() is not None


def test_only_the_answer_teaches_how_far_to_trust() -> None:
    trust = Trust()
    before = trust.of(LEAST_RUN)
    opened([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 6], begins=99, trust=trust)
    assert trust.of(LEAST_RUN) == before
    opened([1, 2, 3, 4, 1, 2, 3, 5, 1, 2, 3, 6], begins=4, trust=trust)
    assert trust.of(LEAST_RUN) < before


@given(st.lists(st.tuples(st.integers(0, 6), st.lists(st.sampled_from(ALPHABET), max_size=9))))
def test_taking_back_leaves_nothing(steps: list[tuple[int, list[TokenId]]]) -> None:
    """Whatever was drafted and cut: as if the text had always been this one."""
    text = Text(Trust(), 2)
    for back, more in steps:
        kept = text.tokens[: max(0, len(text.tokens) - back)]
        if len(more) % 2:  # it is told, or sees for itself
            text.cut(len(kept))
        text.follow([*kept, *more])
    fresh = opened(list(text.tokens), begins=2)
    assert (text._places, text._learnt) == (fresh._places, fresh._learnt)
    assert text.match() == fresh.match()
    for length in (3, 4, 6, 9, 12):
        assert text._trust.of(length) == pytest.approx(fresh._trust.of(length))


@given(st.lists(st.sampled_from(ALPHABET), max_size=60))
def test_a_match_is_one(tokens: list[TokenId]) -> None:
    match = opened(tokens, begins=99).match()
    runs = [tuple(tokens[at : at + LEAST_RUN]) for at in range(len(tokens) - LEAST_RUN + 1)]
    if match is None:
        assert runs[-1:] == [] or runs.count(runs[-1]) == 1
    else:
        assert tokens[match.place - match.length : match.place] == tokens[-match.length :]


def test_it_drafts_for_several_texts_and_begins_anew_where_it_is_told() -> None:
    drafter = SuffixDrafter(context=100, slots=2)
    asking = Opening(Sampling(), vocabulary=50, begins=9)
    drafter.open(0, asking)
    drafter.open(1, asking)
    both = drafter.propose_all([(0, (1, 2, 3, 4, 1, 2, 3)), (1, (1, 2, 3, 5, 1, 2, 3))])
    assert [one[0].token for one in both] == [4, 5]
    assert all(
        usual_acceptance(drafted.confidence) >= LEAST_TRUST for one in both for drafted in one
    )
    assert (drafter.read(0), drafter.read(1)) == (7, 7)
    drafter.cut(0, 4)
    assert drafter.read(0) == 4
    drafter.open(0, asking)
    assert drafter.read(0) == 0
    assert drafter.propose(0, (4, 1, 2, 3)) == ()


def test_it_costs_next_to_nothing() -> None:
    assert SuffixDrafter(context=100, slots=1).token_s < 0.001


# ---- earlier texts ------------------------------------------------------------------------------


def answers(memory: int, *texts: tuple[list[TokenId], str | None]) -> SuffixDrafter:
    """One slot has had these texts, with the names of their caches."""
    drafter = SuffixDrafter(context=100, slots=1, memory=memory)
    for text, name in texts:
        drafter.open(0, Opening(Sampling(), 100, begins=99, cache=name))
        drafter.propose(0, text)
    return drafter


EARLIER = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("memory", "kept", "asked", "expected"),
    [
        (50, "mine", "mine", (4, 5, 6)),
        (50, "mine", "other", ()),
        (50, None, None, ()),
        (0, "mine", "mine", ()),
        (5, "mine", "mine", ()),  # it has six tokens
    ],
)
def test_what_followed_in_an_earlier_text_of_the_same_name_is_proposed(
    memory: int, kept: str | None, asked: str | None, expected: tuple[TokenId, ...]
) -> None:
    drafter = answers(memory, (EARLIER, kept), ([9], asked))
    assert ids_of(drafter.propose(0, [9, 1, 2, 3])) == expected


def test_the_text_itself_comes_first_and_a_longer_run_before_it() -> None:
    drafter = answers(50, (EARLIER, ""), ([9], ""))
    assert ids_of(drafter.propose(0, [1, 2, 3, 7, 1, 2, 3]))[0] == 7
    assert ids_of(drafter.propose(0, [2, 3, 4, 7, 1, 2, 3, 4]))[0] == 5
    assert drafter.propose(0, [9, 4, 5, 6]) == ()  # nothing is known to follow


def test_the_oldest_texts_are_forgotten_first() -> None:
    texts = [([n, n + 1, n + 2, n + 3], "") for n in range(0, 40, 4)]
    drafter = answers(12, *texts, ([90], ""))
    assert drafter.propose(0, [90, 0, 1, 2]) == ()
    assert ids_of(drafter.propose(0, [90, 36, 37, 38])) == (39,)
    kept = drafter._memory.of("")
    assert sum(len(one.tokens) for one in kept) <= 12
