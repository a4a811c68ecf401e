"""Which sequence a text gets: the one that holds the longest beginning of it, and nobody else's."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import Overloaded
from outrider_services.pipeline.slots import WORTH, Slots, Taken, shared_beginning

SYSTEM = tuple(range(1000, 1000 + 2 * WORTH))


def text(*more: int) -> tuple[int, ...]:
    return (*SYSTEM, *more)


@given(st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_the_shared_beginning_is_as_long_as_it_can_be(one: list[int], other: list[int]) -> None:
    pairs = enumerate(zip(one, other, strict=False))
    expected = next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
    assert shared_beginning(one, tuple(other)) == expected


def hand_back(slots: Slots, taken: Taken, tokens: tuple[int, ...]) -> None:
    """Its text has been read, and is over."""
    slots.begin(taken.slot)
    slots.give_back(taken.slot, tokens)


def test_the_next_turn_of_a_conversation_takes_over_what_the_last_one_has_read() -> None:
    slots = Slots(3)
    first = slots.take(text(1), "")
    assert first == Taken(first.slot)
    hand_back(slots, first, text(1, 2, 3))
    again = slots.take(text(1, 2, 3, 4, 5), "")
    assert (again.slot, again.kept, again.source) == (first.slot, len(SYSTEM) + 3, first.slot)
    assert slots.still_holds(again)


def test_the_last_token_is_always_left_to_read() -> None:
    slots = Slots(2)
    first = slots.take(text(1), "")
    hand_back(slots, first, text(1))
    assert slots.take(text(1), "").kept == len(SYSTEM)


def test_what_one_name_has_brought_is_never_used_for_another() -> None:
    slots = Slots(4)
    hand_back(slots, slots.take(text(1), "a"), text(1))
    hand_back(slots, slots.take(text(1), None), text(1))
    for name in ("b", "", None):
        assert slots.take(text(1, 2), name).kept == 0


def test_a_system_message_that_another_is_using_is_copied() -> None:
    slots = Slots(3)
    first = slots.take(text(1), "")
    second = slots.take(text(2), "")
    assert second.slot != first.slot
    assert (second.kept, second.source) == (len(SYSTEM), first.slot)


def test_a_long_conversation_is_not_given_up_for_its_beginning() -> None:
    slots = Slots(2)
    first = slots.take(text(1), "")
    hand_back(slots, first, text(*range(500)))
    other = slots.take(text(7), "")
    assert (other.slot != first.slot, other.source) == (True, first.slot)
    hand_back(slots, other, text(7))
    assert slots.take(text(*range(501)), "").slot == first.slot


def test_a_beginning_too_short_to_be_worth_a_copy_is_read() -> None:
    slots = Slots(2)
    slots.take((*range(WORTH - 1), 500), "")
    assert slots.take((*range(WORTH - 1), 600), "").source == -1


def test_the_least_recently_used_goes_first() -> None:
    slots = Slots(2)
    one, other = slots.take((1, 2), ""), slots.take((3, 4), "")
    hand_back(slots, other, (3, 4))
    hand_back(slots, one, (1, 2))
    assert slots.take((5, 6), "").slot == other.slot


def test_a_source_that_was_taken_meanwhile_is_no_source_any_more() -> None:
    slots = Slots(2)
    first = slots.take(text(1), "")
    copy = slots.take(text(2), "")
    assert slots.still_holds(copy)
    hand_back(slots, first, text(1))
    assert slots.still_holds(copy), "it may still be copied"
    slots.take((9, 9), "")
    assert not slots.still_holds(copy)


def test_a_text_of_which_the_beginning_was_skipped_serves_who_would_skip_as_much() -> None:
    slots = Slots(3)
    first = slots.take(text(1), "", skip=40)
    slots.begin(first.slot, 40)
    slots.give_back(first.slot, text(1, 2))
    assert slots.take(text(1, 2, 3), "", skip=0).kept == 0
    found = slots.take(text(1, 2, 3), "", skip=50)
    assert (found.kept, found.skip) == (len(SYSTEM) + 2, 40)


def test_when_all_are_in_use_there_is_none() -> None:
    slots = Slots(1)
    slots.take((1, 2), "")
    with pytest.raises(Overloaded):
        slots.take((1, 2), "")


def test_a_text_that_has_not_begun_leaves_nothing() -> None:
    """The model still holds there what was before."""
    slots = Slots(2)
    first, copy = slots.take(text(1), ""), slots.take(text(2), "")
    assert slots.held(copy) == 0, "it is not there yet"
    slots.give_back(first.slot, text(1))
    assert slots.held(copy) == 0
    assert slots.held(slots.take(text(1), "")) == 0


def test_no_more_is_held_than_was_given_back() -> None:
    slots = Slots(2)
    first, copy = slots.take(text(1), ""), slots.take(text(2), "")
    hand_back(slots, first, text(1)[:40])
    assert (copy.kept, slots.held(copy)) == (len(SYSTEM), 40)
