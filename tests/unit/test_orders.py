"""What is left of an order that was sent ahead, and that session and target agree on it."""

from __future__ import annotations

import pytest

from outrider.core.orders import Orders
from outrider.core.values import Block, Verify

TEXT = [7, 8, 9]


def orders(*several: Verify) -> Orders:
    made = Orders()
    for order in several:
        made.add(order)
    return made


def taken(made: Orders, text: list[int]) -> tuple[int, Block | None]:
    block = made.take(text)
    return made.round, block


def test_a_block_that_follows_is_begun_at_once_where_the_target_chose_what_was_expected() -> None:
    made = orders(Verify(1, 3, (1, 2)), Verify(2, 5, (3, 4, 5), follows=True))
    assert taken(made, TEXT) == (1, (1, 2))
    made.judged(is_whole=True)
    assert taken(made, [*TEXT, 1, 2, 3]) == (2, (4, 5))


@pytest.mark.parametrize(
    ("whole", "chosen"),
    [
        pytest.param(True, (1, 2, 6), id="another-token-behind-it"),
        pytest.param(False, (1, 3), id="a-correction"),
        pytest.param(False, (1, 2, 3, 4), id="even-if-the-text-should-come-to-it-later"),
    ],
)
def test_else_it_is_dropped_with_all_that_follow(whole: bool, chosen: tuple[int, ...]) -> None:
    made = orders(
        Verify(1, 3, (1, 2)), Verify(2, 5, (3, 4), follows=True), Verify(3, 7, (5,), follows=True)
    )
    made.take(TEXT)
    made.judged(is_whole=whole)
    assert taken(made, [*TEXT, *chosen]) == (3, None)
    made.add(Verify(4, 9, (6,), follows=True))  # it was on its way
    assert taken(made, [*TEXT, 1, 2, 3, 4, 5, 6]) == (4, None)
    made.add(Verify(5, 9, (6, 7)))
    assert taken(made, [*TEXT, 1, 2, 3, 4, 5, 6]) == (5, (6, 7))


def test_what_the_target_has_chosen_by_itself_is_done() -> None:
    made = orders(Verify(4, 3, (1, 2, 3)))
    assert taken(made, [*TEXT, 1, 2]) == (4, (3,))
    made = orders(Verify(4, 3, (1, 2, 3)))
    assert taken(made, [*TEXT, 1, 2, 3]) == (4, ())
    made = orders(Verify(4, 3, (1, 2, 3)))
    assert taken(made, [*TEXT, 1, 2, 3, 4]) == (4, None)
    made = orders(Verify(4, 3, (1, 2, 3)))
    assert taken(made, [*TEXT, 1, 9]) == (4, None)


def test_the_target_takes_steps_of_its_own_up_to_where_the_last_order_says() -> None:
    made = orders(Verify(1, 3, (), until=6))
    assert [made.take([0] * length) for length in (3, 4, 5, 6)] == [(), (), (), None]
    made.add(Verify(2, 6, (), until=6))
    assert [made.take([0] * length) for length in (6, 7)] == [(), None]


def test_the_session_knows_which_block_a_verdict_is_on() -> None:
    made = orders(Verify(1, 3, (1, 2), until=9), Verify(2, 5, (3, 4), follows=True, until=9))
    assert made.answered(2, TEXT) is None, "the first was not answered yet"
    assert made.answered(1, TEXT) == (1, 2)
    made.judged(is_whole=True)
    text = [*TEXT, 1, 2, 3]
    assert made.goes_on(text)
    assert made.answered(1, text) == (), "the second had not come, and the target went on"
    assert made.answered(2, [*text, 4]) == ()
    assert made.answered(3, [0] * 9) is None, "that is farther than it may go by itself"


def test_in_the_midst_of_a_pass_only_what_is_certainly_done_makes_room() -> None:
    made = orders(Verify(1, 3, (1, 2)))
    made.take(TEXT)
    made.add(Verify(2, 5, (3, 4), follows=True))
    made.make_room(TEXT)
    assert [one.round for one in made.waiting] == [2], "the pass decides on that"
    made = orders(Verify(1, 2, ()), Verify(2, 2, (9,)), Verify(3, 1, (9,)))
    made.make_room(TEXT)
    assert [one.round for one in made.waiting] == [2, 3]
