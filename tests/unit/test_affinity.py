"""Requests that begin alike go to the same replica, as far as it has room."""

from __future__ import annotations

from typing import Any

from outrider_services.cluster import affinity
from outrider_services.cluster.affinity import PATIENCE, PIECE, Affinity, beginnings
from outrider_services.gateway.asking import Ask, Gap

IDLE = {"a": 0, "b": 0, "c": 0}


def said(*texts: str) -> Ask:
    return Ask(messages=[{"role": "user", "content": text} for text in texts])


def test_a_conversation_that_goes_on_begins_as_it_did() -> None:
    first, second = beginnings(said("Hi"), ""), beginnings(said("Hi", "Hello", "And?"), "")
    assert second[: len(first)] == first
    assert len(second) == 3
    assert beginnings(said("Hi", "Hello", "But?"), "")[:2] == second[:2]
    assert beginnings(said("HiHello"), "")[0] not in second


def test_keys_share_no_beginning() -> None:
    assert not {*beginnings(said("Hi"), "one")} & {*beginnings(said("Hi"), "other")}


def test_prompts_are_cut_into_pieces() -> None:
    text = "x" * (2 * PIECE) + "y"
    assert len(beginnings(Ask(prompt=text), "")) == 3
    assert beginnings(Ask(prompt=text + "z"), "")[:2] == beginnings(Ask(prompt=text), "")[:2]
    assert len(beginnings(Ask(prompt=list(range(PIECE + 1))), "")) == 2
    assert beginnings(Ask(prompt=Gap(text, "", "", (), 9)), "") == beginnings(Ask(prompt=text), "")
    assert len(beginnings(Ask(prompt=text * 99), "")) == affinity.MOST_BEGINNINGS
    assert beginnings(Ask(prompt=""), "") == ()


def test_who_knows_most_of_a_text_is_preferred() -> None:
    known = Affinity(1)
    known.routed(["1"], "b")
    known.routed(["1", "2"], "c")
    assert known.ranked(["1", "2", "3"], IDLE) == [["c"], ["a", "b"]]
    assert known.ranked(["9"], IDLE) == [["a", "b", "c"]]
    assert known.ranked(["1"], {"a": 0, "b": 0}) == [["a", "b"]]  # the one that read it is gone


def test_others_are_ranked_by_how_busy_they_are() -> None:
    assert Affinity(1).ranked([], {"a": 2, "b": 0, "c": 2}) == [["b"], ["a", "c"]]
    assert Affinity(1).ranked(["1"], {}) == []


def test_nobody_waits_long_for_what_another_would_have_to_read() -> None:
    known = Affinity(1)
    known.routed(["1"], "a")
    assert known.ranked(["1"], {"a": PATIENCE - 1, "b": 0})[0] == ["a"]
    assert known.ranked(["1"], {"a": PATIENCE, "b": 0})[0] == ["b"]


def test_who_has_a_free_sequence_is_busy_for_nobody() -> None:
    known = Affinity(8)
    known.routed(["1"], "a")
    assert known.ranked(["1"], {"a": 7, "b": 0})[0] == ["a"]
    assert known.ranked(["1"], {"a": 8, "b": 0})[0] == ["b"]


def test_what_is_remembered_is_bounded(monkeypatch: Any) -> None:
    monkeypatch.setattr(affinity, "MOST_KNOWN", 2)
    known = Affinity(1)
    for number in range(3):
        known.routed([str(number)], "a")
    assert known.ranked(["0"], IDLE) == [["a", "b", "c"]]
    assert known.ranked(["2"], IDLE)[0] == ["a"]
