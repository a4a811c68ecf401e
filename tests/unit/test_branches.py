"""Corrections foreseen: which branches are worth a row, and where a commit leads."""

from __future__ import annotations

import pytest

from outrider.core.branches import (
    DEEPEST,
    LEAST,
    RANKS,
    WORTH,
    Branch,
    Branches,
    Found,
    Ranks,
    chosen,
)
from outrider.core.estimates import usual_acceptance
from outrider.core.events import Commit
from outrider.core.stream import Begun, Stream
from outrider.core.values import Drafted

SURE, UNSURE = 0.99, 0.4
CONTEXT = 100


def stream(until: int = 50) -> Stream:
    """Ten committed tokens, 100 … 109."""
    made = Stream(tokens=list(range(100, 110)), lineage=1, until=until, committed=10)
    made.branches = Branches(Ranks())
    return made


def drafts(made: Stream, token: int, confidence: float, *others: int) -> None:
    begun = Begun(made.lineage, made.read, tuple(made.tokens), made.may_draft)
    assert made.took(begun, len(made.tokens), [Drafted(token, confidence)], others)


def grow(made: Stream, place: int, correction: int, *behind: int) -> Branch:
    assert made.branches
    branches = {(one.place, one.correction): one for _, one in made.candidates(CONTEXT)}
    branch = branches[place, correction]
    for token in behind:
        made.branches.grow(branch, Found(Drafted(token, SURE), (token + 1,)))
    return branch


def test_a_branch_is_worth_what_the_first_miss_there_is_likely() -> None:
    made = stream()
    drafts(made, 1, UNSURE, 11, 12)
    drafts(made, 2, SURE, 21)
    worth = {(one.place, one.correction): value for value, one in made.candidates(CONTEXT)}
    first, second = usual_acceptance(UNSURE), usual_acceptance(SURE)
    assert worth[10, 11] == pytest.approx(WORTH * (1 - first) * RANKS[0])
    assert worth[10, 12] == pytest.approx(WORTH * (1 - first) * RANKS[1])
    assert (11, 21) not in worth  # too unlikely
    assert first * (1 - second) * RANKS[0] < LEAST
    branch = grow(made, 10, 11, 5)
    again = {(one.place, one.correction): value for value, one in made.candidates(CONTEXT)}
    assert again[10, 11] == pytest.approx(worth[10, 11] * usual_acceptance(SURE))
    assert branch.tokens == (11, 5)


def test_a_correction_that_was_foreseen_is_a_lineage_with_tokens_already() -> None:
    made = stream()
    drafts(made, 1, UNSURE, 11)
    drafts(made, 2, SURE)
    branch = grow(made, 10, 11, 5, 6, 7)
    branch.found[0] = Found(Drafted(5, UNSURE), (6,))
    assert made.commit(Commit(10, (11,), 50), CONTEXT)
    assert (made.lineage, made.tokens[10:]) == (2, [11, 5, 6, 7])
    assert [one.token for one in made.foreseen] == [5, 6, 7]
    assert made.adopted is branch
    assert made.likely == list(map(usual_acceptance, (UNSURE, SURE, SURE)))
    made.adopted = None
    # where they are wrong in their turn, that may be foreseen again
    assert (11, 6) in {(one.place, one.correction) for _, one in made.candidates(CONTEXT)}


def test_no_more_of_a_branch_is_taken_than_agrees_and_may_be_drafted() -> None:
    for truth, until, expected in (
        ((11, 5), 50, [6, 7]),  # the target has gone on by itself
        ((11, 5, 6, 7), 50, []),
        ((11, 6), 50, []),
        ((12,), 50, []),
        ((11,), 12, [5]),
        ((11,), 11, []),
    ):
        made = stream()
        drafts(made, 1, UNSURE, 11)
        grow(made, 10, 11, 5, 6, 7)
        assert made.commit(Commit(10, truth, until), CONTEXT)
        assert made.lineage == 2, truth
        assert [one.token for one in made.foreseen] == expected, truth
        assert made.tokens[10:] == [*truth, *expected]


def test_what_the_text_has_passed_is_forgotten_and_the_rest_stays() -> None:
    made = stream()
    drafts(made, 1, UNSURE, 11)
    drafts(made, 2, UNSURE, 21)
    old, kept = grow(made, 10, 11, 5), grow(made, 11, 21, 6)
    assert not made.commit(Commit(10, (1,), 50), CONTEXT)
    assert made.branches is not None
    assert made.branches.begun == [kept]
    made.branches.grow(old, Found(Drafted(6, SURE)))  # its step was under way
    assert made.branches.begun == [kept]
    assert made.commit(Commit(11, (21,), 50), CONTEXT)
    assert [one.token for one in made.foreseen] == [6]


def test_what_still_comes_for_a_lineage_that_is_over_has_no_effect() -> None:
    """Though the next one may foresee the same correction at the same place, behind other text."""
    made = stream()
    drafts(made, 1, UNSURE, 11)
    drafts(made, 2, UNSURE, 21)
    before, late = made.branches, grow(made, 11, 21)
    assert before is not None
    assert made.commit(Commit(10, (12,), 50), CONTEXT)
    drafts(made, 3, UNSURE, 21)
    before.grow(late, Found(Drafted(6, SURE)))
    assert made.branches is not None
    assert made.branches.begun == []


def test_branches_end_with_the_text_the_context_and_their_depth() -> None:
    made = stream()
    made.ends = frozenset({9, 11})
    drafts(made, 1, UNSURE, 11, 12, 13, 14)
    grow(made, 10, 12, 9)
    grow(made, 10, 13, *range(20, 20 + DEEPEST))
    assert [one.correction for _, one in made.candidates(CONTEXT)] == [14]
    assert made.candidates(11) == []


def test_in_turns_there_are_none() -> None:
    made = stream()
    drafts(made, 1, UNSURE, 11)
    made.floors = (0.1,)
    assert made.candidates(CONTEXT) == []


def test_how_often_each_rank_is_right_is_learnt() -> None:
    ranks = Ranks()
    assert [ranks.share(n) for n in range(len(RANKS))] == pytest.approx(RANKS)
    for _ in range(2000):
        ranks.observe(2)
    assert ranks.share(2) > 0.9
    assert sum(ranks.share(n) for n in range(len(RANKS))) < 1
    for _ in range(2000):
        ranks.observe(None)
    assert ranks.share(2) < 0.1


FREE, DEAR = (1.0, 1.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0)


def candidates(*values: float) -> list[tuple[float, Branch, str]]:
    return [(value, Branch(10, n), f"{n}") for n, value in enumerate(values)]


@pytest.mark.parametrize(
    ("main", "values", "room", "passes_s", "lines", "whose"),
    [
        ([1.0], [0.1, 0.3], 8, FREE, 1, ["1", "0"]),
        ([1.0], [0.1, 0.3], 1, FREE, 1, ["1"]),
        ([1.0], [0.1, 0.3], 0, FREE, 1, []),
        ([1.0], [0.1, 0.3], 8, DEAR, 1, []),
        ([0.2], [0.1, 0.3], 8, DEAR, 0, ["1"]),
        ([0.2, 0.3], [0.1], 8, DEAR, 2, []),  # of several texts none waits
        ([0.2, 0.3], [0.4], 8, FREE, 2, ["0"]),
        ([], [0.1, 0.3], 8, DEAR, 0, ["1"]),
        ([], [], 8, FREE, 0, []),
        ([0.5] * 6, [0.4], 8, FREE, 6, []),  # more than were measured
        ([1.0], [0.3, 0.3, 0.3], 8, (1.0, 1.2, 1.4, 3.0), 1, ["0", "1"]),
    ],
)
def test_rows_go_to_what_is_likeliest_to_be_of_use_for_its_time(
    main: list[float],
    values: list[float],
    room: int,
    passes_s: tuple[float, ...],
    lines: int,
    whose: list[str],
) -> None:
    found = chosen(main, candidates(*values), room, passes_s)
    assert (found[0], [name for _, name in found[1]]) == (lines, whose)
