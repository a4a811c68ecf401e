"""`verify`: acceptance is equality, and no choice is read that could not count."""

from __future__ import annotations

import doctest
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core import decoding
from outrider.core.decoding import verify
from outrider.core.values import TokenId, Verdict

quiet = settings(derandomize=True, database=None, deadline=None)
tokens = st.lists(st.integers(0, 3), max_size=6)


@pytest.mark.parametrize(
    ("drafted", "choices", "expected"),
    [
        pytest.param([], [7], Verdict(0, (7,)), id="empty-draft-still-advances"),
        pytest.param([1], [2, 3], Verdict(0, (2,)), id="a-correction-replaces-the-first"),
        pytest.param([1, 2], [1, 3, 4], Verdict(1, (1, 3)), id="a-correction-after-one-accepted"),
        pytest.param([1, 2], [1, 2, 4], Verdict(2, (1, 2, 4)), id="a-bonus-after-a-whole-block"),
        pytest.param([1, 2], [3, 2, 4], Verdict(0, (3,)), id="later-agreement-does-not-count"),
        pytest.param([1, 0], [1, 0], Verdict(2, (1, 0)), id="an-accepted-end-has-no-bonus"),
        pytest.param([0, 1], [0], Verdict(1, (0,)), id="nothing-follows-an-accepted-end"),
        pytest.param([1, 2], [0], Verdict(0, (0,)), id="an-end-may-be-a-correction"),
        pytest.param([1], [1, 0], Verdict(1, (1, 0)), id="an-end-may-be-a-bonus"),
        pytest.param([0], [1], Verdict(0, (1,)), id="a-wrongly-drafted-end-does-not-end"),
    ],
)
def test_a_verdict(drafted: list[TokenId], choices: list[TokenId], expected: Verdict) -> None:
    assert verify(drafted, choices, ends={0}) == expected


def test_without_end_tokens_none_ends() -> None:
    assert verify([0], [0, 5]) == Verdict(1, (0, 5))


@pytest.mark.parametrize(
    ("drafted", "read"),
    [([1, 2, 3], 4), ([1, 9, 3], 2), ([9], 1), ([], 1), ([1, 2, 3, 0, 5], 4)],
    ids=["whole-block", "second-wrong", "first-wrong", "empty", "end-accepted"],
)
def test_choices_are_read_only_as_far_as_they_count(drafted: list[TokenId], read: int) -> None:
    seen: list[TokenId] = []

    def choices() -> Iterator[TokenId]:
        for choice in [1, 2, 3, 0, 5]:
            seen.append(choice)
            yield choice

    verify(drafted, choices(), ends={0})
    assert len(seen) == read


def test_a_missing_choice_is_an_error() -> None:
    with pytest.raises(ValueError, match="last row"):
        verify([1], [1])


@quiet
@given(tokens, st.lists(st.integers(0, 3), min_size=7, max_size=7))
def test_the_committed_tokens_are_always_a_prefix_of_the_targets_choices(
    drafted: list[TokenId], choices: list[TokenId]
) -> None:
    verdict = verify(drafted, choices, ends={0})
    assert list(verdict.tokens) == choices[: len(verdict.tokens)]
    assert list(verdict.tokens[: verdict.accepted]) == drafted[: verdict.accepted]
    assert 0 not in verdict.tokens[:-1]
    ended = verdict.accepted > 0 and drafted[verdict.accepted - 1] == 0
    assert len(verdict.tokens) == verdict.accepted + (not ended)


def test_the_examples_in_the_docstrings_hold() -> None:
    assert doctest.testmod(decoding) == doctest.TestResults(failed=0, attempted=5)


@pytest.mark.parametrize(
    ("accepted", "tokens", "forbidden", "wrong"),
    [
        (0, (9,), 2, None),
        (1, (1, 9), 2, None),
        (0, (9,), 3, None),
        (0, (9,), 4, "0 accepted of -1"),
        (2, (1, 2, 9), 2, "2 accepted of 1"),
        (1, (1, 2), 2, "a correction that was drafted"),
    ],
)
def test_what_a_constraint_forbids_cannot_be_accepted_nor_chosen(
    accepted: int, tokens: tuple[TokenId, ...], forbidden: int, wrong: str | None
) -> None:
    many = len(tokens)
    verdict = Verdict(
        accepted, tokens, pieces=(b"",) * many, margins=(1.0,) * many, forbidden=forbidden
    )
    told = decoding.contradiction(verdict, (1, 2, 3), frozenset({0}), 100)
    assert (told or "").startswith(wrong or "")
    assert (told is None) == (wrong is None)
