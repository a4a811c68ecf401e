"""`Stream`: the draft's half of the commit rule, and when it stops by itself."""

from __future__ import annotations

from dataclasses import replace

from outrider.core.stream import CUT_SHORT, Stream
from outrider.core.values import Drafted, Proposal


def stream(drafted: list[float], floors: tuple[float, ...] = (), until: int = 99) -> Stream:
    """Three committed tokens, then one for each usual acceptance in `drafted`."""
    tokens = list(range(3 + len(drafted)))
    made = Stream(tokens, 1, until, 3, frozenset({50}), floors, list(drafted))
    made.read = len(tokens) - 1
    return made


def test_it_pauses_where_all_of_its_tokens_together_are_too_doubtful() -> None:
    floors = (0.5, 0.6)
    assert not stream([], floors).is_paused
    assert not stream([0.7], floors).is_paused
    assert stream([0.4], floors).is_paused
    assert stream([0.7, 0.8], floors).is_paused  # 0.56
    assert not stream([0.7, 0.8, 0.1], floors).is_paused  # beyond the floors nothing stops it
    assert not stream([0.1]).is_paused


def test_a_commit_takes_what_it_covers_out_of_the_product() -> None:
    one = stream([0.4, 0.9, 0.9])
    assert not one.follow(3, (3, 4))
    assert one.likely == [0.9]
    assert one.follow(5, (77,))
    assert one.likely == []
    assert not one.follow(6, (78,))
    assert (one.tokens[-2:], one.likely) == ([77, 78], [])


def test_told_to_stop_it_gives_up_a_token_but_not_a_prompt() -> None:
    assert stream([0.9], until=4).is_to_stop
    assert not stream([0.9], until=5).is_to_stop
    prompt = stream([], until=3)
    prompt.read = 3 - CUT_SHORT - 1
    assert not prompt.is_to_stop


def test_what_was_drafted_counts_only_for_the_text_that_it_was_drafted_for() -> None:
    one = stream([])
    one.read = 1
    begun, drafted = one.begin(), (Drafted(token=7, confidence=0.9),)
    assert one.took(replace(begun, lineage=begun.lineage + 1), 3, drafted) == ()
    assert one.read == 1
    assert one.took(begun, 2, ()) == ()  # more of the text to come
    assert (one.read, one.tokens, one.is_silent) == (2, [0, 1, 2], False)
    assert one.took(begun, 3, drafted) == drafted
    assert (one.tokens, len(one.likely)) == ([0, 1, 2, 7], 1)
    assert one.took(begun, 3, drafted) == ()  # something else stands there now


def test_a_drafter_that_does_not_get_on_with_the_text_is_not_asked_again() -> None:
    one = stream([])
    one.read = 1
    assert one.took(one.begin(), 1, ()) == ()
    assert (one.is_silent, one.has_work) == (True, False)


def several(*confidences: float) -> tuple[Drafted, ...]:
    return tuple(Drafted(10 + n, confidence) for n, confidence in enumerate(confidences))


def test_of_several_tokens_as_many_count_as_there_is_leave_for() -> None:
    one = stream([], until=5)
    assert one.took(one.begin(), 3, several(0.9, 0.9, 0.9)) == several(0.9, 0.9)
    assert (one.tokens[3:], one.has_work) == ([10, 11], False)


def test_leave_that_was_taken_back_meanwhile_still_holds_for_the_first_token() -> None:
    one = stream([])
    begun = one.begin()
    one.until = 3
    assert one.took(begun, 3, several(0.9, 0.9)) == several(0.9)


def test_without_leave_a_long_text_is_read_and_nothing_drafted() -> None:
    one = Stream(list(range(300)), 1, until=300, committed=300)
    assert one.has_work
    assert one.took(one.begin(), 300, several(0.9)) == ()
    assert (one.read, len(one.tokens), one.has_work) == (300, 300, False)


def test_of_several_tokens_none_counts_behind_doubt_or_an_end() -> None:
    doubtful = stream([], floors=(0.5, 0.5))
    assert len(doubtful.took(doubtful.begin(), 3, several(0.1, 0.9))) == 1
    ended = stream([])
    tokens = (Drafted(50, 0.9), Drafted(51, 0.9))
    assert ended.took(ended.begin(), 3, tokens) == tokens[:1]
    assert not ended.has_work


def test_without_an_idea_it_rests_until_the_text_goes_on() -> None:
    one = stream([])
    assert one.took(one.begin(), 3, ()) == ()
    assert (one.is_silent, one.has_work) == (True, False)
    one.follow(3, ())
    assert not one.has_work
    one.follow(3, (9,))
    assert (one.is_silent, one.has_work) == (False, True)


def test_two_proposals_make_one() -> None:
    one = Proposal(2, 10, (Drafted(5, 0.5),), 0.25, waited_s=1.0)
    other = Proposal(2, 11, (Drafted(6, 0.6),), 0.5, paused=True)
    both = (Drafted(5, 0.5), Drafted(6, 0.6))
    assert one.joined(other) == Proposal(2, 10, both, 0.75, 1.0, paused=True)
