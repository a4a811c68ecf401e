"""DRY against a plain re-telling: what is repeated, and where a repetition ends."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.core import penalties
from outrider.core.noise import Scores
from outrider.core.penalties import NO_BREAKERS, Breakers, Tail, penalise_repetition, repetitions
from outrider.core.sampling import Sampling, choose, decide
from outrider.core.values import TokenId

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=300)
tokens = st.integers(0, 4)
texts = st.lists(tokens, max_size=40)
tails = st.dictionaries(tokens, st.lists(st.lists(tokens, max_size=3).map(tuple), max_size=3))


def breakers_of(found: dict[TokenId, list[Tail]]) -> Breakers:
    return Breakers({token: tuple(some) for token, some in found.items()})


def repeated(text: Sequence[TokenId], most: int) -> dict[TokenId, int]:
    """By token, how much of the end of `text` stands before it somewhere, one token at a time."""
    found: dict[TokenId, int] = {}
    for at in range(1, len(text)):
        length = 0
        while length < min(at, most) and text[at - 1 - length] == text[-1 - length]:
            length += 1
        found[text[at]] = max(found.get(text[at], 0), length)
    return found


def behind_the_last_breaker(text: Sequence[TokenId], breakers: Breakers) -> int:
    """llama.cpp's first step: back to the first breaker, of which the longest counts."""
    for back in range(len(text)):
        at = len(text) - 1 - back
        fits = [
            len(tail)
            for tail in breakers.tails.get(text[at], ())
            if len(tail) <= back and tuple(text[at + 1 : at + 1 + len(tail)]) == tail
        ]
        if fits:
            return back - max(fits)
    return len(text)


@quiet
@given(texts, st.integers(0, 5), st.integers(0, 50))
@example([1] * 40, 0, 12)
@example([1, 2] * 20, 3, 40)
def test_repetitions_are_found_as_by_comparing_one_by_one(
    text: list[TokenId], least: int, most: int
) -> None:
    expected = {token: n for token, n in repeated(text, most).items() if n >= least}
    if text:
        assert repetitions(np.array(text), least, most) == expected


@quiet
@given(texts, tails)
@example([3, 1, 2], {3: [(1,), (1, 2)], 2: []})
def test_a_breaker_is_the_last_in_the_text_and_the_longest_there(
    text: list[TokenId], found: dict[TokenId, list[Tail]]
) -> None:
    breakers = breakers_of(found)
    expected = behind_the_last_breaker(text, breakers)
    assert breakers.since(text, len(text)) == expected
    for most in (0, 1, 5):
        assert min(breakers.since(text, most), most) == min(expected, most)


@quiet
@given(texts, tails, st.integers(0, 4), st.sampled_from([1.0, 1.5, 3.0]))
def test_the_penalty_grows_with_the_repetition_and_stops_at_breakers(
    text: list[TokenId], found: dict[TokenId, list[Tail]], allowed: int, base: float
) -> None:
    breakers = breakers_of(found)
    row = np.zeros(4, np.float32)  # no token 4: it is skipped
    penalise_repetition(row, text, 0.5, base, allowed, breakers)
    expected: Scores = np.zeros(4, np.float32)
    most = behind_the_last_breaker(text, breakers)
    if len(text) > allowed and most >= allowed:
        for token, length in repeated(text, most).items():
            if length >= allowed and token < 4 and () not in found.get(token, []):
                expected[token] = -0.5 * base ** (length - allowed)
    assert row.tolist() == pytest.approx(expected.tolist())


def test_control_a_repetition_over_a_breaker_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Breakers, "since", lambda self, text, most: len(text))
    with pytest.raises(AssertionError):
        test_the_penalty_grows_with_the_repetition_and_stops_at_breakers()


def test_the_penalty_of_a_long_repetition_stays_finite_and_cheap() -> None:
    """In a text of one token alone everything is repeated."""
    row = np.zeros(3, np.float32)
    with np.errstate(all="raise"):
        penalise_repetition(row, [1] * 5000, 1.0, 1.75, 2, NO_BREAKERS)
    assert row.tolist() == [0.0, pytest.approx(-(1.75**158)), 0.0]
    row = np.zeros(3, np.float32)
    penalise_repetition(row, [1] * 5000, 1.0, 1.001, 2, NO_BREAKERS)
    assert row[1] == pytest.approx(-(1.001**penalties.LONGEST), rel=1e-3)


def test_dry_takes_the_text_out_of_a_loop_unless_it_may_loop() -> None:
    def goes_on(sampling: Sampling, breakers: Breakers = NO_BREAKERS) -> list[TokenId]:
        text = [0, 1, 2]
        for _ in range(9):
            row = np.zeros(5, np.float32)
            row[(text[-1] + 1) % 3] = 3.0
            text.append(choose(row, sampling, text, len(text), breakers=breakers))
        return text

    dry = Sampling(temperature=0, dry_multiplier=4.0)
    loop = [0, 1, 2] * 4
    assert goes_on(Sampling(temperature=0)) == loop
    assert goes_on(dry) != loop
    assert goes_on(dry.changed(dry_penalty_last_n=2)) == loop
    assert goes_on(dry.changed(dry_allowed_length=20)) == loop
    assert goes_on(dry, Breakers({1: ((),)})) == loop  # no repetition is longer than two


def test_a_text_that_is_no_list_is_fine() -> None:
    row = np.array([0, 3, 1], np.float32)
    given = Sampling(temperature=0, dry_multiplier=9.0, dry_penalty_last_n=-1)
    text = (0, 1, 0, 1, 0)
    assert decide(row, given, text, 5) == decide(row, given, list(text), 5)
    assert decide(row, given, text, 5)[0] == 2
    assert row.tolist() == [0, 3, 1]
