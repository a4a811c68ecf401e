"""Sequence breakers as tokens, against llama.cpp's way of finding them, token by token."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.core.penalties import LONGEST_TAIL, NO_BREAKERS, Tail
from outrider.core.sampling import Sampling
from outrider.core.values import TokenId
from outrider.engines.breakers import REMEMBERED, KnownBreakers
from outrider.engines.toy import ToyEngine
from outrider.engines.toy_text import CONTROLS

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=150)

WORDS = [
    b"a",
    b"b",
    b"ab",
    b"ba",
    b"aa",
    b"aab",
    b"abc",
    b"c",
    b"cab",
    b" a",
    b"\n",
    b".\n",
    b"a\n",
]
PIECES = [*WORDS, b"\xff", b"a\xff", b"\xff\xff", b"\xc3", b"\xa9", "é".encode(), b"x\xc3", b""]


class Worded(ToyEngine):
    """A vocabulary of words, of which some are half characters and one a control token."""

    asked = 0

    def __init__(self, begins: bool = False) -> None:
        super().__init__()
        changes = {"size": len(PIECES), "bos": 10, "adds_bos": begins}
        self.info = replace(self.info, vocabulary=self.info.vocabulary.changed(**changes))

    def piece(self, token: TokenId) -> bytes:
        Worded.asked += 1
        return PIECES[token]

    def label(self, token: TokenId) -> str:
        return "<|ab|>"

    def tokenize(self, text: str, *, special: bool) -> list[TokenId]:
        assert not special
        data, found = text.encode(), [10] if self.info.vocabulary.adds_bos else []
        while data:
            fits = [n for n, piece in enumerate(PIECES) if piece and data.startswith(piece)]
            longest = max(fits, key=lambda n: len(PIECES[n]), default=None)
            if longest is not None:
                found.append(longest)
            data = data[1 if longest is None else len(PIECES[longest]) :]
        return found


def told(engine: Worded, text: str) -> dict[TokenId, set[Tail]]:
    """`get_overlapping_token_sequences` of llama.cpp, told plainly."""
    data, found = text.encode(), dict[TokenId, set[Tail]]()
    for token, piece in enumerate(PIECES):
        word = piece or engine.label(token).encode()
        if data in word:
            found.setdefault(token, set()).add(())
            continue
        for at in range(len(word)):
            if data.startswith(word[at:]):
                rest = data[len(word) - at :].decode(errors="replace")
                if "\ufffd" not in rest:  # its tokens could not follow
                    tail = [one for one in engine.tokenize(rest, special=False) if one != 10]
                    found.setdefault(token, set()).add(tuple(tail[:LONGEST_TAIL]))
    return found


def breakers(engine: Worded, *texts: str) -> dict[TokenId, set[Tail]]:
    sampling = Sampling(dry_multiplier=1.0, dry_sequence_breakers=texts)
    tails = KnownBreakers(engine).of(sampling).tails
    assert all(len(set(some)) == len(some) for some in tails.values())
    return {token: set(some) for token, some in tails.items()}


@quiet
@given(st.text("abc xé|<.", min_size=1, max_size=6), st.booleans())
@example("aab", False)
@example("ab|>x", False)
@example("ca" * 20, True)
def test_the_tokens_of_a_breaker_are_those_of_llama_cpp(text: str, begins: bool) -> None:
    engine = Worded(begins)
    assert breakers(engine, text) == told(engine, text)


def test_several_breakers_are_joined_and_empty_ones_skipped() -> None:
    engine = Worded()
    found = breakers(engine, "\n", "", "ab", "\n")
    expected = told(engine, "\n")
    for token, tails in told(engine, "ab").items():
        expected[token] = expected.get(token, set()) | tails
    assert found == expected


def test_without_dry_or_breakers_no_text_is_looked_at() -> None:
    before = Worded.asked
    known = KnownBreakers(Worded())
    assert known.of(Sampling()) is NO_BREAKERS
    assert known.of(Sampling(dry_multiplier=1.0, dry_penalty_last_n=0)) is NO_BREAKERS
    assert known.of(Sampling(dry_multiplier=1.0, dry_sequence_breakers=())) is NO_BREAKERS
    assert Worded.asked == before


def test_the_last_few_are_remembered() -> None:
    known = KnownBreakers(Worded())
    wanted = [
        Sampling(dry_multiplier=1.0, dry_sequence_breakers=(f"b{n}",))
        for n in range(REMEMBERED + 1)
    ]
    first = known.of(wanted[0])
    before = Worded.asked
    assert known.of(wanted[0].changed(seed=9)) is first
    for one in wanted[1:]:
        known.of(one)
    again = known.of(wanted[0])
    assert again is not first
    assert again == first
    assert Worded.asked == before  # the vocabulary is read once


def test_the_toys_breakers_are_its_bytes_and_markers() -> None:
    sampling = Sampling(dry_multiplier=1.0, dry_sequence_breakers=("\n", ":", "né", "<|user|>"))
    tails = KnownBreakers(ToyEngine()).of(sampling).tails
    rest = tuple(b"|user|>")
    assert tails == {
        ord("\n"): ((),),
        ord(":"): ((),),
        ord("n"): (tuple("é".encode()),),
        ord("<"): (rest,),
        256 + CONTROLS.index("<|user|>"): ((),),
    }
    assert np.all([token < 260 for token in tails])
