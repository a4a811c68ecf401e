"""`Stream`: what the draft worker keeps of a request, and when it stops by itself."""

from __future__ import annotations

from outrider.sampling import Sampling
from outrider_services.draft_worker import CUT_SHORT, Stream


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
