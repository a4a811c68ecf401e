"""Log-probabilities: those of the plain row, the likeliest tokens first."""

from __future__ import annotations

import math

import numpy as np
import pytest

from outrider.core.logprobs import likelihoods, logprob, top_logprobs
from outrider.core.noise import Scores
from outrider.core.sampling import BadScores
from outrider.core.values import TopLogprob


def bell(size: int, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    return (random.standard_normal(size) * 3).astype(np.float32)


def exact(row: Scores) -> list[float]:
    wide = row.astype(np.float64)
    found: list[float] = (wide - np.log(np.exp(wide).sum())).tolist()
    return found


@pytest.mark.parametrize("size", [1, 5, 260, 151_936])
@pytest.mark.parametrize("most", [1, 3, 20])
def test_the_likeliest_come_first_with_their_plain_log_softmax(size: int, most: int) -> None:
    row = bell(size)
    law = exact(row)
    found = top_logprobs(row, most)
    assert [token for token, _ in found] == sorted(range(size), key=lambda n: -row[n])[:most]
    for token, value in found:
        assert value == pytest.approx(law[token], rel=1e-5, abs=1e-6)
        assert value == logprob(row, token)


def test_of_equal_ones_the_lower_id_comes_first() -> None:
    row = np.array([1, 2, 2, 0, 2], np.float32)
    assert [token for token, _ in top_logprobs(row, 2)] == [1, 2]
    assert [token for token, _ in top_logprobs(row, 20)] == [1, 2, 4, 0, 3]


def test_what_is_impossible_has_no_finite_logarithm() -> None:
    row = np.array([0, -math.inf, 1], np.float32)
    assert logprob(row, 1) == -math.inf
    assert top_logprobs(row, 3)[-1] == (1, -math.inf)


def test_each_position_has_its_own_likeliest_and_what_was_not_asked_for_is_not_made() -> None:
    rows = np.array([[0, 3, 1], [2, 0, 1], [9, 9, 9]], np.float32)
    logprobs, tops = likelihoods(rows, (1, 2), 2, lambda token: b"abc"[token : token + 1])
    assert logprobs == (logprob(rows[0], 1), logprob(rows[1], 2))
    assert tops == (
        (TopLogprob(1, b"b", logprob(rows[0], 1)), TopLogprob(2, b"c", logprob(rows[0], 2))),
        (TopLogprob(0, b"a", logprob(rows[1], 0)), TopLogprob(2, b"c", logprob(rows[1], 2))),
    )
    assert tops[0][0].text == "b"

    def never(token: int) -> bytes:
        raise AssertionError

    assert likelihoods(rows, (1, 2), 0, never) == (logprobs, None)


def test_a_row_that_is_no_numbers_is_refused() -> None:
    for bad in (math.nan, math.inf):
        with pytest.raises(BadScores):
            top_logprobs(np.array([0, bad], np.float32), 1)
