"""`TextStream`: whole characters, nothing of a stop string, as soon as that is sure."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core.text import TextStream

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=300)


def play(pieces: Sequence[bytes], stops: Sequence[str] = ()) -> tuple[list[str], bool]:
    """What each piece releases, then what the end does unless a stop string came before it."""
    stream = TextStream(stops)
    released: list[str] = []
    for piece in pieces:
        text, stopped = stream.feed(piece)
        released.append(text)
        if stopped:
            return released, True
    return [*released, stream.end()], False


def shown(pieces: Sequence[bytes], stops: Sequence[str]) -> str:
    """The oracle: what may be shown after `pieces`, told from the whole of them."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(b"".join(pieces))
    for length in range(len(text), 0, -1):
        ending = text[-length:]
        if any(stop.startswith(ending) and stop != ending for stop in stops):
            return text[:-length]
    return text


def stopped_at(text: str, stops: Sequence[str]) -> int | None:
    return min((text.find(stop) for stop in stops if stop in text), default=None)


def cut(data: bytes, places: Sequence[int]) -> list[bytes]:
    bounds = sorted({0, len(data), *(place % (len(data) + 1) for place in places)})
    return [data[a:b] for a, b in pairwise(bounds)]


@pytest.mark.parametrize(
    ("pieces", "stops", "released"),
    [
        pytest.param([b"ab", b"c"], [], ["ab", "c", ""], id="without-stops-text-comes-at-once"),
        pytest.param([b"a\n", b"b"], ["\n\n"], ["a", "\nb", ""], id="a-beginning-is-held-back"),
        pytest.param([b"a\n", b"\nb"], ["\n\n"], ["a", ""], id="a-stop-string-over-two-pieces"),
        pytest.param([b"xSTO", b"P"], ["STOP"], ["x", ""], id="nothing-of-it-is-shown"),
        pytest.param([b"aab"], ["ab"], ["a"], id="a-repeated-beginning"),
        pytest.param([b"aa", b"ab"], ["aab"], ["", "a"], id="the-longest-beginning-is-held"),
        pytest.param([b"xSTOPy"], ["STOP"], ["x"], id="what-follows-is-dropped"),
        pytest.param([b"one two"], ["two", "one"], [""], id="the-first-of-two-counts"),
        pytest.param([b"STO"], ["STOP"], ["", "STO"], id="the-end-releases-a-beginning"),
        pytest.param([b"a"], [""], ["a", ""], id="an-empty-stop-string-is-none"),
        pytest.param([b"", b"a", b""], ["b"], ["", "a", "", ""], id="empty-pieces"),
        pytest.param([b"\xe4\xb8", b"\xad"], [], ["", "中", ""], id="half-a-character"),
        pytest.param([b"\xe4\xb8", b"\xad"], ["中"], ["", ""], id="a-stop-string-inside-pieces"),
        pytest.param([b"a\xff", b"b"], [], ["a�", "b", ""], id="an-impossible-byte"),
        pytest.param([b"a\xf0\x9f"], [], ["a", "�"], id="a-character-that-never-ends"),
    ],
)
def test_what_is_released(pieces: list[bytes], stops: list[str], released: list[str]) -> None:
    assert play(pieces, stops)[0] == released


def test_a_stop_string_that_only_the_end_completes() -> None:
    stream = TextStream(["a�"])
    assert stream.feed(b"xa\xf0") == ("x", False)
    assert stream.end() == ""


def test_nothing_comes_after_a_stop_string_not_even_half_a_character() -> None:
    stream = TextStream(["."])
    assert stream.feed(b"end.\xe4\xb8") == ("end", True)
    assert stream.end() == ""


@pytest.mark.parametrize("text", ["🚀🌊", "東京は中文", "👩‍👩‍👧", "naïve Zürich", "a\u0301\u0302"])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_characters_are_never_torn(text: str, size: int) -> None:
    data = text.encode()
    released, _ = play([data[at : at + size] for at in range(0, len(data), size)])
    assert "".join(released) == text
    assert "�" not in "".join(released)


@quiet
@given(st.binary(max_size=12) | st.text(max_size=8).map(str.encode), st.lists(st.integers(0)))
def test_the_joined_text_is_the_whole_text(data: bytes, places: list[int]) -> None:
    released, _ = play(cut(data, places))
    assert "".join(released) == data.decode("utf-8", "replace")


few = st.text("ab中🚀", min_size=0, max_size=8)


@quiet
@given(
    few.map(str.encode) | st.lists(st.sampled_from([b"a", b"b", b"\xe4", b"\xb8"])).map(b"".join),
    st.lists(st.integers(0, 30), max_size=8),
    st.lists(st.text("ab中🚀�", min_size=1, max_size=4), max_size=3),
)
def test_it_does_what_a_naive_reader_of_the_whole_text_would(
    data: bytes, places: list[int], stops: list[str]
) -> None:
    pieces = cut(data, places)
    stream = TextStream(stops)
    text = ""
    for count, piece in enumerate(pieces, 1):
        released, stopped = stream.feed(piece)
        text += released
        whole = codecs.getincrementaldecoder("utf-8")("replace").decode(b"".join(pieces[:count]))
        found = stopped_at(whole, stops)
        assert stopped == (found is not None)
        if found is not None:
            assert text == whole[:found]
            assert stream.end() == ""
            return
        assert text == shown(pieces[:count], stops)
    whole = data.decode("utf-8", "replace")
    assert text + stream.end() == whole[: stopped_at(whole, stops)]
