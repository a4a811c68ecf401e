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


def test_the_next_turn_of_a_conversation_takes_over_what_the_last_one_has_read() -> None:
    slots = Slots(3)
    first = slots.take(text(1), "")
    assert first == Taken(first.slot)
    slots.give_back(first.slot, text(1, 2, 3))
    again = slots.take(text(1, 2, 3, 4, 5), "")
    assert (again.slot, again.kept, again.source) == (first.slot, len(SYSTEM) + 3, first.slot)
    assert slots.still_holds(again)


def test_the_last_token_is_always_left_to_read() -> None:
    slots = Slots(2)
    first = slots.take(text(1), "")
    slots.give_back(first.slot, text(1))
    assert slots.take(text(1), "").kept == len(SYSTEM)


def test_what_one_name_has_brought_is_never_used_for_another() -> None:
    slots = Slots(4)
    slots.give_back(slots.take(text(1), "a").slot, text(1))
    slots.give_back(slots.take(text(1), None).slot, text(1))
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
    slots.give_back(first.slot, text(*range(500)))
    other = slots.take(text(7), "")
    assert (other.slot != first.slot, other.source) == (True, first.slot)
    slots.give_back(other.slot, text(7))
    assert slots.take(text(*range(501)), "").slot == first.slot


def test_a_beginning_too_short_to_be_worth_a_copy_is_read() -> None:
    slots = Slots(2)
    slots.take((*range(WORTH - 1), 500), "")
    assert slots.take((*range(WORTH - 1), 600), "").source == -1


def test_the_least_recently_used_goes_first() -> None:
    slots = Slots(2)
    one, other = slots.take((1, 2), ""), slots.take((3, 4), "")
    slots.give_back(other.slot, (3, 4))
    slots.give_back(one.slot, (1, 2))
    assert slots.take((5, 6), "").slot == other.slot


def test_a_source_that_was_taken_meanwhile_is_no_source_any_more() -> None:
    slots = Slots(2)
    first = slots.take(text(1), "")
    copy = slots.take(text(2), "")
    assert slots.still_holds(copy)
    slots.give_back(first.slot, text(1))
    assert slots.still_holds(copy), "it may still be copied"
    slots.take((9, 9), "")
    assert not slots.still_holds(copy)


def test_a_text_of_which_the_beginning_was_skipped_serves_who_would_skip_as_much() -> None:
    slots = Slots(3)
    first = slots.take(text(1), "", skip=40)
    slots.give_back(first.slot, text(1, 2))
    assert slots.take(text(1, 2, 3), "", skip=0).kept == 0
    found = slots.take(text(1, 2, 3), "", skip=50)
    assert (found.kept, found.skip) == (len(SYSTEM) + 2, 40)


def test_when_all_are_in_use_there_is_none() -> None:
    slots = Slots(1)
    slots.take((1, 2), "")
    with pytest.raises(Overloaded):
        slots.take((1, 2), "")
