"""`Stream`: what the draft worker keeps of a request, and when it stops by itself."""

from __future__ import annotations

from outrider.core.sampling import Choice, Sampling
from outrider.wire import messages as wire
from outrider_services.pipeline.draft_worker import CUT_SHORT, Stream, joined


def stream(drafted: list[float], floors: tuple[float, ...] = (), until: int = 99) -> Stream:
    """Three committed tokens, then one for each usual acceptance in `drafted`."""
    tokens = list(range(3 + len(drafted)))
    made = Stream(0, tokens, Sampling(), 1, until, 1000, 3, floors, list(drafted))
    made.evaluated = len(tokens) - 1
    return made


def test_it_pauses_where_all_of_its_tokens_together_are_too_doubtful() -> None:
    floors = (0.5, 0.6)
    assert not stream([], floors).paused
    assert not stream([0.7], floors).paused
    assert stream([0.4], floors).paused
    assert stream([0.7, 0.8], floors).paused  # 0.56
    assert not stream([0.7, 0.8, 0.1], floors).paused  # beyond the floors nothing stops it
    assert not stream([0.1]).paused


def test_a_commit_takes_what_it_covers_out_of_the_product() -> None:
    one = stream([0.4, 0.9, 0.9])
    assert not one.follow(3, (3, 4))
    assert one.likely == [0.9]
    assert one.follow(5, (77,))
    assert one.likely == []
    assert not one.follow(6, (78,))
    assert (one.tokens[-2:], one.likely) == ([77, 78], [])


def test_told_to_stop_it_gives_up_a_token_but_not_a_prompt() -> None:
    assert stream([0.9], until=4).told_to_stop
    assert not stream([0.9], until=5).told_to_stop
    prompt = stream([], until=3)
    prompt.evaluated = 3 - CUT_SHORT - 1
    assert not prompt.told_to_stop


def test_what_was_chosen_counts_only_for_the_text_that_it_was_chosen_for() -> None:
    one = stream([])
    begun = one.lineage, one.evaluated, len(one.tokens)
    choice = Choice(token=7, confidence=0.9)
    assert not one.took((one.lineage + 1, *begun[1:]), 3, choice)
    assert one.evaluated == 2
    assert not one.took(begun, 3, None)  # more of the prompt to come
    assert (one.evaluated, one.tokens) == (3, [0, 1, 2])
    assert one.took(begun, 3, choice)
    assert (one.tokens, len(one.likely)) == ([0, 1, 2, 7], 1)
    assert not one.took(begun, 3, choice)  # something else stands there now


def test_two_messages_make_one() -> None:
    one = wire.Drafted(1, 2, 10, (5,), (0.5,), 0.25)
    other = wire.Drafted(1, 2, 11, (6,), (0.6,), 0.5, paused=True)
    assert joined(None, one) is one
    assert joined(one, other) == wire.Drafted(1, 2, 10, (5, 6), (0.5, 0.6), 0.75, paused=True)
