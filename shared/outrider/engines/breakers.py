"""DRY's sequence breakers, which are texts, as tokens of a model's vocabulary.

llama.cpp's rule: a token whose text contains a breaker is one. So is a token whose text ends with
the beginning of a breaker, if the tokens of the rest follow it.
"""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

import numpy as np

from outrider.core.engine import Engine
from outrider.core.penalties import LONGEST_TAIL, NO_BREAKERS, Breakers, Tail
from outrider.core.sampling import Sampling
from outrider.core.values import TokenId

REMEMBERED = 4  # sets of breakers whose tokens are known
END = b"\xff"  # behind each text of the vocabulary; no text in UTF-8 has it


class KnownBreakers:
    """Finds the tokens of breakers; those of the last few sets are remembered."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._found = lru_cache(maxsize=REMEMBERED)(self._find)

    def of(self, sampling: Sampling) -> Breakers:
        """The breakers that these settings ask for. The first time takes a second."""
        if not (sampling.has_dry and sampling.dry_sequence_breakers):
            return NO_BREAKERS
        return self._found(sampling.dry_sequence_breakers)

    def _find(self, texts: tuple[str, ...]) -> Breakers:
        tails: dict[TokenId, tuple[Tail, ...]] = {}
        for text in dict.fromkeys(filter(None, texts)):
            data = text.encode(errors="replace")
            whole = self._vocabulary.containing(data)
            for token in whole:
                tails[token] = _with(tails.get(token, ()), ())
            for cut in range(1, len(data)):
                if (tail := self._tail(data[cut:])) is not None:
                    for token in self._vocabulary.ending(data[:cut]) - whole:
                        tails[token] = _with(tails.get(token, ()), tail)
        return Breakers(tails)

    def _tail(self, rest: bytes) -> Tail | None:
        """The tokens of the rest of a breaker; None if it begins in the middle of a character."""
        try:
            text = rest.decode()
        except UnicodeDecodeError:
            return None  # no tokenizer gives tokens for it that could follow
        tokens = self._engine.tokenize(text, special=False)
        vocabulary = self._engine.info.vocabulary
        if vocabulary.adds_bos and tokens[:1] == [vocabulary.bos]:
            tokens = tokens[1:]
        return tuple(tokens[:LONGEST_TAIL])

    @cached_property
    def _vocabulary(self) -> _Texts:
        return _Texts(self._engine)


def _with(tails: tuple[Tail, ...], tail: Tail) -> tuple[Tail, ...]:
    return tails if tail in tails else (*tails, tail)


class _Texts:
    """The texts of all tokens in one, so that looking through them takes a millisecond."""

    def __init__(self, engine: Engine) -> None:
        # a control token has no piece, but its marker can be read where special tokens are shown
        ids = range(engine.info.vocabulary.size)
        texts = [engine.piece(token) or engine.label(token).encode() for token in ids]
        self._joined = END.join([*texts, b""])
        self._ends = np.cumsum([len(text) + 1 for text in texts]) - 1  # where each text ends

    def containing(self, part: bytes) -> set[TokenId]:
        """The tokens whose texts contain `part`, which has no byte `END`."""
        found = [match.start() for match in re.finditer(re.escape(part), self._joined)]
        ids: list[TokenId] = np.searchsorted(self._ends, found).tolist()
        return set(ids)

    def ending(self, part: bytes) -> set[TokenId]:
        """The tokens whose texts end with `part`, which has no byte `END`."""
        found = [match.end() - 1 for match in re.finditer(re.escape(part + END), self._joined)]
        at = np.searchsorted(self._ends, found)
        ids: list[TokenId] = at[self._ends[at] == found].tolist()  # a text may have the byte `END`
        return set(ids)
