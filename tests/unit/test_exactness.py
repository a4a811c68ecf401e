"""The text has the target's own law, whatever the draft: shown exactly, without statistics.

The noise of each position is replaced by a finite grid, and the law of the first two committed
tokens is summed over the whole grid in fractions, for target and draft laws that Hypothesis
chooses. Every guarantee has a control: a wrong rule that the same check must catch. Statistical
tests then cover the real noise.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import accumulate, product
from typing import TypeAlias

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from outrider.core.decoding import verify
from outrider.core.sampling import Noise, Sampling, choose, gumbel
from outrider.core.values import TokenId

# --- exactly: finite noise ------------------------------------------------------------------------

CELLS = 6  # laws are sixths over three tokens, so that a grid of six values of noise is exact
Law: TypeAlias = tuple[int, ...]
Model: TypeAlias = dict[tuple[TokenId, ...], Law]  # the law of the next token, by prefix
Rule: TypeAlias = Callable[[Model, Model, tuple[int, int], int], tuple[TokenId, ...]]

quickly = settings(
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=60,
    phases=[Phase.generate],  # controls fail on purpose: no need to shrink
)

PREFIXES: list[tuple[TokenId, ...]] = [(), (0,), (1,), (2,)]
laws = st.lists(st.integers(0, CELLS), min_size=2, max_size=2).map(
    lambda cuts: (min(cuts), max(cuts) - min(cuts), CELLS - max(cuts))
)
models = st.tuples(*[laws] * len(PREFIXES)).map(
    lambda chosen: dict(zip(PREFIXES, chosen, strict=True))
)


def pick(law: Law, noise: int) -> TokenId:
    """The coupled choice of the grid: inverse CDF, the same noise for draft and target."""
    return next(token for token, upto in enumerate(accumulate(law)) if noise < upto)


def plain(draft: Model, target: Model, noise: tuple[int, int], fresh: int) -> tuple[TokenId, ...]:
    first = pick(target[()], noise[0])
    return first, pick(target[(first,)], noise[1])


def coupled(draft: Model, target: Model, noise: tuple[int, int], fresh: int) -> tuple[TokenId, ...]:
    """A round with one drafted token, and if it takes another, one without."""
    drafted = pick(draft[()], noise[0])

    def choices() -> Iterator[TokenId]:
        yield pick(target[()], noise[0])
        yield pick(target[(drafted,)], noise[1])

    tokens = verify([drafted], choices()).tokens
    while len(tokens) < 2:
        tokens += verify([], [pick(target[tokens], noise[len(tokens)])]).tokens
    return tokens


def redraws_after_rejection(
    draft: Model, target: Model, noise: tuple[int, int], fresh: int
) -> tuple[TokenId, ...]:
    drafted = pick(draft[()], noise[0])
    first = drafted if drafted == pick(target[()], noise[0]) else pick(target[()], fresh)
    return first, pick(target[(first,)], noise[1])


def keys_noise_by_round(
    draft: Model, target: Model, noise: tuple[int, int], fresh: int
) -> tuple[TokenId, ...]:
    drafted = pick(draft[()], noise[0])
    first = pick(target[()], noise[0])
    by_round = noise[0] if drafted == first else noise[1]
    return first, pick(target[(first,)], by_round)


def keeps_likely_drafts(
    draft: Model, target: Model, noise: tuple[int, int], fresh: int
) -> tuple[TokenId, ...]:
    drafted = pick(draft[()], noise[0])
    likely = target[()][drafted] * 3 >= CELLS
    first = drafted if likely else pick(target[()], noise[0])
    return first, pick(target[(first,)], noise[1])


def reads_rows_of_another_prefix(
    draft: Model, target: Model, noise: tuple[int, int], fresh: int
) -> tuple[TokenId, ...]:
    drafted = pick(draft[()], noise[0])
    return pick(target[()], noise[0]), pick(target[(drafted,)], noise[1])


def law_of(rule: Rule, draft: Model, target: Model) -> dict[tuple[TokenId, ...], Fraction]:
    grid = range(CELLS)
    kept = Counter(
        rule(draft, target, (first, second), fresh)
        for first, second, fresh in product(grid, repeat=3)
    )
    return {tokens: Fraction(count, kept.total()) for tokens, count in kept.items()}


def own_law(target: Model) -> dict[tuple[TokenId, ...], Fraction]:
    joint = {
        (first, second): Fraction(target[()][first] * target[(first,)][second], CELLS**2)
        for first, second in product(range(3), repeat=2)
    }
    return {tokens: chance for tokens, chance in joint.items() if chance}


def check_law(rule: Rule) -> None:
    @quickly
    @given(models, models)
    def same_law(draft: Model, target: Model) -> None:
        assert law_of(rule, draft, target) == own_law(target)

    same_law()


def check_invariance(rule: Rule) -> None:
    @quickly
    @given(models, models)
    def same_text(draft: Model, target: Model) -> None:
        for first, second, fresh in product(range(CELLS), repeat=3):
            noise = first, second
            assert rule(draft, target, noise, fresh) == plain(draft, target, noise, fresh)

    same_text()


WRONG = [
    redraws_after_rejection,
    keys_noise_by_round,
    keeps_likely_drafts,
    reads_rows_of_another_prefix,
]


def test_committed_tokens_have_the_targets_law() -> None:
    check_law(coupled)


def test_the_draft_does_not_change_the_text() -> None:
    check_invariance(coupled)


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__name__.replace("_", "-"))
def test_control_a_wrong_rule_has_another_law(rule: Rule) -> None:
    with pytest.raises(AssertionError):
        check_law(rule)


@pytest.mark.parametrize("rule", WRONG, ids=lambda rule: rule.__name__.replace("_", "-"))
def test_control_a_wrong_rule_lets_the_draft_change_the_text(rule: Rule) -> None:
    with pytest.raises(AssertionError):
        check_invariance(rule)


# --- statistically: the real noise ----------------------------------------------------------------

TARGET = np.array([0.05, 0.4, 0.25, 0.2, 0.1])
DRAFT = np.array([0.2, 0.3, 0.1, 0.3, 0.1])
DRAWS = 20_000
CRITICAL = 23.5  # chi-square with 4 degrees of freedom exceeds it once in 10,000
SIGMAS = 4


def committed(draft_seed: int, noise: Callable[..., Noise] = gumbel) -> tuple[list[TokenId], float]:
    """The first committed token of one-token rounds at `DRAWS` positions, and the acceptance."""
    kept, accepted = [], 0
    ids = np.arange(TARGET.size, dtype=np.uint64)
    for position in range(DRAWS):
        if noise is gumbel:
            row = np.log(DRAFT).astype(np.float32)
            given_draft = Sampling(temperature=1, seed=draft_seed)
            drafted = choose(row, given_draft, (), position)
            row = np.log(TARGET).astype(np.float32)
            choice = choose(row, Sampling(temperature=1, seed=1), (), position)
        else:
            drafted = int(np.argmax(np.log(DRAFT) + noise(draft_seed, position, ids)))
            choice = int(np.argmax(np.log(TARGET) + noise(1, position, ids)))
        verdict = verify([drafted], [choice, 0])
        kept.append(verdict.tokens[0])
        accepted += verdict.accepted
    return kept, accepted / DRAWS


def chi_square(tokens: list[TokenId]) -> float:
    expected = TARGET * len(tokens)
    counts = np.bincount(tokens, minlength=TARGET.size)
    return float(((counts - expected) ** 2 / expected).sum())


def deviation(chance: float) -> float:
    return SIGMAS * math.sqrt(chance * (1 - chance) / DRAWS)


def test_real_noise_gives_the_targets_law_and_the_promised_acceptance() -> None:
    """Pr[equal] is at least (1 - TV) / (1 + TV): Daliri, Musco, Suresh, arXiv 2408.07978."""
    kept, acceptance = committed(draft_seed=1)
    assert chi_square(kept) < CRITICAL
    distance = float(np.abs(TARGET - DRAFT).sum() / 2)
    promised = (1 - distance) / (1 + distance)
    assert acceptance > promised - deviation(promised)
    assert acceptance < 1 - distance + deviation(distance)  # no coupling can do better


def test_control_noise_that_is_not_shared_keeps_the_law_but_not_the_acceptance() -> None:
    kept, acceptance = committed(draft_seed=2)
    assert chi_square(kept) < CRITICAL
    independent = float((TARGET * DRAFT).sum())
    assert abs(acceptance - independent) < deviation(independent)


def test_control_noise_of_another_shape_fails_the_chi_square() -> None:
    def logistic(seed: int, position: int, ids: np.ndarray) -> Noise:
        return gumbel(seed, position, ids) - gumbel(seed + 1, position, ids)

    kept, _ = committed(draft_seed=1, noise=logistic)
    assert chi_square(kept) > CRITICAL


def test_noise_of_neighbouring_positions_and_ids_is_independent() -> None:
    ids = np.arange(400, dtype=np.uint64)
    table = np.array([gumbel(3, position, ids) for position in range(400)])
    uniform = np.exp(-np.exp(-table))
    for ours, others in [(uniform[:-1], uniform[1:]), (uniform[:, :-1], uniform[:, 1:])]:
        correlation = np.corrcoef(ours.ravel(), others.ravel())[0, 1]
        assert abs(correlation) < SIGMAS / 400
