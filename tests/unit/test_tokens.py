"""Tokens in colour: the text is never changed, and each token shows its kind."""

from __future__ import annotations

import io
import re
from typing import get_args

from hypothesis import given
from hypothesis import strategies as st
from rich.color import ColorSystem
from rich.console import Console

from outrider.core.text import TextStream
from outrider.core.values import Fragment, Kind, Token
from outrider_services.commands.tokens import MEANINGS, STYLES, Colours, legend

SGR = re.compile(r"\x1b\[[\d;]*m")
KINDS: tuple[Kind, ...] = get_args(Kind)


def terminal(*, no_color: bool = False, force: bool = True) -> Console:
    return Console(
        file=io.StringIO(),
        force_terminal=force,
        no_color=no_color,
        color_system="standard" if force else None,
        _environ={},
    )


def fragments(pieces: list[tuple[bytes, Kind]], stops: tuple[str, ...] = ()) -> list[Fragment]:
    """What a session makes of these pieces, one in each round."""
    stream, found = TextStream(stops), []
    for n, (piece, kind) in enumerate(pieces):
        text, stopped = stream.feed(piece)
        found.append(Fragment(n, text, (Token(0, piece, n, kind, 1.0),), ()))
        if stopped:
            return found
    return [*found, Fragment(len(pieces), stream.end(), (), ())]


def show(pieces: list[tuple[bytes, Kind]], console: Console, stops: tuple[str, ...] = ()) -> str:
    colours = Colours(console)
    return "".join(map(colours, fragments(pieces, stops)))


def test_each_kind_has_a_form_of_its_own_with_and_without_colour() -> None:
    pieces = [(kind.encode(), kind) for kind in KINDS]
    for no_color in (False, True):
        shown = show(pieces, terminal(no_color=no_color))
        codes = [re.search(rf"(\x1b\[[\d;]*m)?{kind}", shown) for kind in KINDS]
        assert len({code and code[1] for code in codes}) == len(KINDS)
    assert not re.search(r"\x1b\[[\d;]*3\d", shown)  # none of these is a colour


def test_where_nobody_sees_it_the_text_stays_as_it_is() -> None:
    assert show([(b"a", "drafted"), (b"b", "bonus")], terminal(force=False)) == "ab"


def test_a_character_in_two_tokens_has_the_kind_of_the_one_that_completes_it() -> None:
    first, second = "é".encode()[:1], "é".encode()[1:]
    shown = show([(b"a", "plain"), (first, "corrected"), (second, "bonus")], terminal())
    assert shown == "a" + STYLES["bonus"].render("é", color_system=ColorSystem.STANDARD)


def test_no_line_end_is_inside_of_a_form() -> None:
    shown = show([(b"a\nb", "corrected")], terminal())
    assert SGR.split(shown) == ["", "a", "\n", "b", ""]


@given(
    st.lists(st.tuples(st.binary(max_size=4), st.sampled_from(KINDS)), max_size=12),
    st.sampled_from([(), ("aa",), ("ab", "\n")]),
)
def test_the_text_is_never_changed(
    pieces: list[tuple[bytes, Kind]], stops: tuple[str, ...]
) -> None:
    pieces = [(piece.replace(b"\x1b", b"a"), kind) for piece, kind in pieces]
    text = "".join(fragment.text for fragment in fragments(pieces, stops))
    assert SGR.sub("", show(pieces, terminal(), stops)) == text


def test_the_legend_is_a_line_that_shows_every_kind() -> None:
    assert legend().plain == "  ".join(MEANINGS[kind] for kind in STYLES)
    assert set(STYLES) == set(MEANINGS) == set(KINDS)
    assert len(legend().plain) < 80
