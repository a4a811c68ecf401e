"""Where a text follows another one though it changes some of it: an edit.

A *way* is a place in an earlier text that this text has followed so far. Where the two differ, the
way goes on where the token that came is soon to come there too, or else behind one token: it is
guessed to stand in the place of that. Once both agree again it is known what was replaced by what;
where the same comes again in the earlier text, it is replaced again. So of a file that is asked
back with a name changed throughout, only the first change is a surprise.

Nothing here is changed in place: what was the state before any token can be taken up again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from outrider.core.values import TokenId

MOST_REPLACED = 8  # tokens, of what is replaced and of what stands for it
AGREED = 2  # tokens in a row after which two texts agree again
BEGUN = 2  # times that what is in the middle of a replacement counts for: its beginning was right
SURE = 3  # tokens in a row after which a difference is one of a text that is followed


class Way(NamedTuple):
    """A place in an earlier text, or in this one, that is followed."""

    tokens: Sequence[TokenId]
    place: int  # what comes next there
    length: int  # tokens that have agreed, the last ones
    rest: tuple[TokenId, ...] = ()  # what comes before that: the rest of a replacement


class Replacement(NamedTuple):
    """Tokens of the earlier text, and what stood for them in this one."""

    old: tuple[TokenId, ...]
    new: tuple[TokenId, ...]
    times: int


class Next(NamedTuple):
    """What comes next on a way."""

    token: TokenId
    times: int  # how often this was a replacement before; 0: it is none
    way: Way  # behind it


class Missed(NamedTuple):
    """Where the two began to differ."""

    place: int  # in the earlier text
    at: int  # in this one


class State(NamedTuple):
    """What is known behind some token of a text."""

    way: Way | None = None
    missed: Missed | None = None  # from that way
    replaced: Mapping[TokenId, Replacement] = MappingProxyType({})  # by their first old token

    def next(self, way: Way, behind: Sequence[TokenId] = ()) -> Next | None:
        """`behind`: what is to come at the end of the text that is followed, if it is this one."""
        if way.rest:
            token, *rest = way.rest
            on = Way(way.tokens, way.place, way.length + 1, tuple(rest))
            return Next(token, BEGUN, on)
        end = len(way.tokens)
        if way.place >= end + len(behind):
            return None
        token = way.tokens[way.place] if way.place < end else behind[way.place - end]
        known = self.replaced.get(token)
        if known and tuple(way.tokens[way.place : way.place + len(known.old)]) == known.old:
            place = way.place + len(known.old)
            on = Way(way.tokens, place, way.length + 1, known.new[1:])
            return Next(known.new[0], known.times, on)
        return Next(token, 0, Way(way.tokens, way.place + 1, way.length + 1))

    def behind(self, text: Sequence[TokenId], token: TokenId, way: Way | None) -> State:
        """What is known once `token` has come behind the `text`, of which `way` was the best."""
        found = self.next(way) if way else None
        if way is None or found is None:
            return State(None, None, self.replaced)
        missed = self.missed if self.way and way.tokens is self.way.tokens else None
        replaced = self.replaced
        is_replacement = found.times and not way.rest
        old = way.tokens[way.place] if is_replacement else token
        if found.token == token:
            if is_replacement:
                again = replaced[old]._replace(times=found.times + 1)
                replaced = {**replaced, old: again}
            state = State(found.way, missed, replaced)
            return state._agreed(text, token) if missed else state
        if is_replacement and old == token:  # this time it is kept
            replaced = {first: one for first, one in replaced.items() if first != old}
            return State(Way(way.tokens, way.place + 1, way.length + 1), missed, replaced)
        if missed is None and way.length >= SURE:
            missed = Missed(way.place, len(text))
        if missed is None or len(text) - missed.at >= MOST_REPLACED:
            return State(None, None, replaced)
        return State(_resumed(way, missed, token), missed, replaced)

    def _agreed(self, text: Sequence[TokenId], token: TokenId) -> State:
        """The same; if the two agree again, with what was replaced."""
        assert self.way
        assert self.missed
        way, missed, length = self.way, self.missed, self.way.length
        if length < AGREED or way.rest:
            return self
        old = tuple(way.tokens[missed.place : way.place - length])
        new = (*text[missed.at :], token)[:-length]
        if not (0 < len(old) <= MOST_REPLACED and 0 < len(new) <= MOST_REPLACED):
            return State(way, None, self.replaced)
        return State(way, None, {**self.replaced, old[0]: Replacement(old, new, 1)})


def _resumed(way: Way, missed: Missed, token: TokenId) -> Way:
    """Where the way may go on, behind a `token` that was not the next one there."""
    begin = missed.place + 1
    near = list(way.tokens[begin : begin + MOST_REPLACED])
    if token in near:
        return Way(way.tokens, begin + near.index(token) + 1, 1)
    return Way(way.tokens, way.place + 1, 0)
