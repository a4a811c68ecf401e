"""The drafter without a model: what it proposes, how far it trusts that, and what it takes back."""

from __future__ import annotations

import random

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
    assert text._states == fresh._states
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


# ---- edits --------------------------------------------------------------------------------------


def edited(source: list[TokenId], *answer: TokenId) -> tuple[TokenId, ...]:
    """What is proposed behind the beginning of an answer that gives the source again, changed."""
    text = opened([*source, 99], begins=len(source) + 1)
    text.follow([*source, 99, *answer])
    return ids_of(text.propose())


SOURCE = [1, 2, 3, 4, 50, 5, 6, 7, 50, 8, 9, 10, 50, 11, 12]


def test_behind_a_changed_token_the_source_goes_on() -> None:
    assert edited(SOURCE, 1, 2, 3, 4, 60)[:3] == (5, 6, 7)


def test_what_was_replaced_is_replaced_again() -> None:
    assert edited(SOURCE, 1, 2, 3, 4, 60, 5, 6)[:9] == (7, 60, 8, 9, 10, 60, 11, 12, 99)


@pytest.mark.parametrize("new", [(60, 61), (60, 61, 62)])
def test_one_token_may_be_replaced_by_several(new: tuple[TokenId, ...]) -> None:
    found = edited(SOURCE, 1, 2, 3, 4, *new, 5, 6)
    assert found[: 5 + len(new)] == (7, *new, 8, 9, 10, new[0])
    # and in the middle of it
    assert edited(SOURCE, 1, 2, 3, 4, *new, 5, 6, 7, new[0])[: len(new)] == (*new[1:], 8)


def test_a_replacement_is_trusted_once_it_has_come_again_and_when_it_has_begun() -> None:
    once = opened([*SOURCE, 99, 1, 2, 3, 4, 60, 61, 5, 6, 7], begins=len(SOURCE) + 1)
    first, rest, *_ = once.propose()
    assert (first.token, rest.token) == (60, 61)
    assert first.confidence < rest.confidence
    once.follow([*once.tokens, 60, 61, 8, 9, 10])
    again, *_ = once.propose()
    assert again.token == 60
    assert usual_acceptance(again.confidence) > 0.8, "not a replacement of one time"


def test_several_tokens_may_be_replaced_by_one() -> None:
    source = [1, 2, 3, 50, 51, 5, 6, 7, 50, 51, 8, 9, 50, 4]
    assert edited(source, 1, 2, 3, 60, 5, 6)[:7] == (7, 60, 8, 9, 50, 4, 99)


def test_what_is_kept_once_is_not_replaced_again() -> None:
    assert edited(SOURCE, 1, 2, 3, 4, 60, 5, 6, 7, 50)[:5] == (8, 9, 10, 50, 11)


def test_tokens_that_are_left_out_or_put_in_are_passed_over() -> None:
    assert edited(SOURCE, 1, 2, 3, 5, 6)[:2] == (7, 50)
    assert edited(SOURCE, 1, 2, 3, 70, 4, 50)[:3] == (5, 6, 7)


def test_a_text_that_goes_elsewhere_is_followed_no_more() -> None:
    assert edited(SOURCE, 1, 2, 3, *range(70, 90)) == ()


@given(st.lists(st.integers(0, 4), min_size=5, max_size=40), st.integers(0, 2**30))
def test_however_a_text_is_edited_its_proposals_end(source: list[TokenId], seed: int) -> None:
    rng = random.Random(seed)
    answer = [token if rng.random() < 0.7 else rng.randrange(5) for token in source]
    text = opened([*source, 9], begins=len(source) + 1)
    for end in range(len(answer)):
        text.follow([*source, 9, *answer[:end]])
        assert len(text.propose()) <= MOST_DRAFTED


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
    assert not any(one._states or one._earlier for one in kept), "nor what these have followed"
