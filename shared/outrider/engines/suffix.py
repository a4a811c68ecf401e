"""A drafter without a model: what followed last time where the text repeats itself.

The longest run of tokens at the end of the text that has been there before is looked up, and what
came behind it then is proposed, changed as the text has changed it before (`alignment`). How far to
trust that is learnt by the length of the run, from every token of every answer, whoever drafted it.
It costs microseconds, and has no idea where nothing repeats. With a memory it also looks in texts
of the same cache name that came before.

Sources: prompt lookup (github.com/apoorvumang/prompt-lookup-decoding) and SuffixDecoding (arXiv
2411.04975). A table of short runs takes the place of their suffix tree: it can be undone by tokens.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from outrider.core.constraints import Constraint
from outrider.core.drafter import Drafter, DrafterInfo, Opening
from outrider.core.estimates import usual_confidence
from outrider.core.values import Drafted, TokenId
from outrider.engines.alignment import Next, State, Way

NAME = "suffix"  # in place of a model's file
LEAST_RUN = 3  # tokens; what is shorter repeats by chance
MOST_RUN = 64  # a longer one is as good
LATEST = 16  # places that are looked at, the latest first
MOST_DRAFTED = 16  # at once
DRAFTED = 256  # no draft is so far ahead of what is committed
LENGTHS = (-1, 0, 3, 4, 5, 7, 10, 16, 32)  # runs between two of these are trusted alike
# replacements, and runs of each length, before any is known …
TRUST = (0.5, 0.85, 0.5, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9, 0.95)
KNOWN = 8.0  # … which counts as so many tokens
REMEMBERED = 400.0  # tokens of each length; older ones count less and less
LEAST_TRUST = 0.3  # what is less likely is no idea


class Trust:
    """How often what followed a run has followed again, by the length of the run.

    Replacements have classes of their own, in place of lengths: `ONCE`, `OFTEN`.
    """

    ONCE, OFTEN = -2, -1

    def __init__(self) -> None:
        self._told = [KNOWN] * len(TRUST)
        self._agreed = [KNOWN * share for share in TRUST]

    def of(self, length: int) -> float:
        at = bisect_right(LENGTHS, length)
        return self._agreed[at] / self._told[at]

    def learn(self, length: int, agreed: bool, count: int = 1) -> None:
        """It has followed again, or not; a `count` of -1 takes back that it was so."""
        at = bisect_right(LENGTHS, length)
        self._told[at] = max(self._told[at] + count, 1.0)
        self._agreed[at] = min(max(self._agreed[at] + count * agreed, 0.0), self._told[at])
        if self._told[at] > REMEMBERED:
            self._told[at] /= 2
            self._agreed[at] /= 2


class Text:
    """One text, where each run of `LEAST_RUN` tokens is in it, and what was learnt from it."""

    def __init__(self, trust: Trust, begins: int, earlier: Sequence[Text] = ()) -> None:
        self.tokens: list[TokenId] = []
        self._earlier = earlier
        self._trust, self._begins = trust, begins
        self._places: dict[tuple[TokenId, ...], list[int]] = {}  # behind each run
        self._learnt: list[tuple[int, bool] | None] = []  # by position
        self._states = [State()]  # before each position, and at the end

    def follow(self, text: Sequence[TokenId]) -> None:
        """Become `text`: it may differ from what is known in the last `DRAFTED` tokens."""
        known = min(len(self.tokens), len(text))
        begin = max(0, known - DRAFTED)
        if self.tokens[begin:known] != list(text[begin:known]):
            pairs = zip(self.tokens[begin:known], text[begin:known], strict=True)
            known = begin + next(n for n, (mine, its) in enumerate(pairs) if mine != its)
        self.cut(known)
        for token in text[len(self.tokens) :]:
            self._learn(token)
            self.tokens.append(token)
            if len(self.tokens) >= LEAST_RUN:
                run = tuple(self.tokens[-LEAST_RUN:])
                self._places.setdefault(run, []).append(len(self.tokens))

    def cut(self, length: int) -> None:
        """Forget what is behind `length`, and what it has taught."""
        while len(self.tokens) > length:
            if len(self.tokens) >= LEAST_RUN:
                run = tuple(self.tokens[-LEAST_RUN:])
                self._places[run].pop()
                if not self._places[run]:
                    del self._places[run]
            self.tokens.pop()
            self._states.pop()
            if learnt := self._learnt.pop():
                self._trust.learn(*learnt, count=-1)

    def _learn(self, token: TokenId) -> None:
        """What would have been proposed in place of `token`, if it is one of the answer."""
        state = self._states[-1]
        if len(self.tokens) < self._begins:
            self._learnt.append(None)
            self._states.append(state)
            return
        way = self.way()
        found = state.next(way) if way else None
        learnt = (kind(found), found.token == token) if found else None
        self._learnt.append(learnt)
        self._states.append(state.behind(self.tokens, token, way))
        if learnt:
            self._trust.learn(*learnt)

    def way(self) -> Way | None:
        """What this text follows: what it has followed longest, or the longest run."""
        followed, run = self._states[-1].way, self.match()
        if followed and (run is None or followed.rest or followed.length >= run.length):
            return followed
        return run

    def match(self) -> Way | None:
        """The longest run at the end that was there before; of several the latest."""
        run = tuple(self.tokens[-LEAST_RUN:])
        # the last place in this text is the end itself
        best = self._longest(self.tokens, self._places.get(run, ())[-2 : -LATEST - 2 : -1])
        for text in self._earlier:
            places = [at for at in text._places.get(run, ()) if at < len(text.tokens)]
            found = self._longest(text.tokens, places[: -LATEST - 1 : -1])
            if found and (best is None or found.length > best.length):
                best = found
        return best

    def _longest(self, tokens: Sequence[TokenId], places: Iterable[int]) -> Way | None:
        """The longest run before one of the `places` in `tokens` with which this text ends."""
        mine, end = self.tokens, len(self.tokens)
        best: Way | None = None
        for place in places:
            length, most = LEAST_RUN, min(place, end, MOST_RUN)
            while length < most and tokens[place - 1 - length] == mine[end - 1 - length]:
                length += 1
            if best is None or length > best.length:
                best = Way(tokens, place, length)
            if length == MOST_RUN:
                break
        return best

    def propose(self) -> tuple[Drafted, ...]:
        """What may follow. Where it would run into the end, it goes round: text that cycles."""
        way, state = self.way(), self._states[-1]
        drafted, ids = list[Drafted](), list[TokenId]()
        while way and len(drafted) < MOST_DRAFTED:
            found = state.next(way, ids if way.tokens is self.tokens else ())
            if found is None or (trust := self._trust.of(kind(found))) < LEAST_TRUST:
                break
            drafted.append(Drafted(found.token, usual_confidence(trust), free=True))
            ids.append(found.token)
            way = found.way
        return tuple(drafted)


def kind(found: Next) -> int:
    """What tells how far to trust it; see `Trust`."""
    if found.times:
        return Trust.ONCE if found.times == 1 else Trust.OFTEN
    return found.way.length - 1


class Memory:
    """The latest texts by cache name; together they have no more than so many tokens."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._texts: list[tuple[str, Text]] = []  # the oldest first

    def keep(self, name: str | None, text: Text) -> None:
        """Another may look in `text` from now on; not if it has no name."""
        if name is None or not 0 < len(text.tokens) <= self._most:
            return
        text._earlier = ()
        text._states.clear()  # they hold on to the texts that it has followed
        self._texts.append((name, text))
        while sum(len(one.tokens) for _, one in self._texts) > self._most:
            del self._texts[0]

    def of(self, name: str | None) -> tuple[Text, ...]:
        """The latest first."""
        return tuple(text for whose, text in reversed(self._texts) if whose == name)


class SuffixDrafter(Drafter):
    """A `Drafter` for any target: it takes the ids as they are, and computes on no device.

    It remembers texts of up to `memory` tokens, beside those in its slots.
    """

    def __init__(self, context: int, slots: int, memory: int = 0) -> None:
        self.info = DrafterInfo(
            name=NAME, vocabulary=None, context=context, slots=slots, device="none"
        )
        self._trust = Trust()
        self._texts: dict[int, Text] = {}  # by slot
        self._names: dict[int, str | None] = {}  # of their caches
        self._memory = Memory(memory)
        self.token_s = self.read_s = _measured_s()
        self.crowd_s = tuple(self.token_s * count for count in range(1, slots + 1))

    def prepare(self, constraint: Constraint) -> None:
        pass  # it knows none

    def open(self, slot: int, opening: Opening) -> None:
        if slot in self._texts:
            self._memory.keep(self._names[slot], self._texts[slot])
        earlier = self._memory.of(opening.cache)
        self._texts[slot] = Text(self._trust, opening.begins, earlier)
        self._names[slot] = opening.cache

    def cut(self, slot: int, length: int) -> None:
        self._texts[slot].cut(length)

    def read(self, slot: int) -> int:
        return len(self._texts[slot].tokens)

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        known = self._texts[slot]
        known.follow(text)
        return known.propose()

    def propose_all(
        self, texts: Iterable[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        return [self.propose(slot, text) for slot, text in texts]

    def recall(self, slot: int, text: Sequence[TokenId], count: int) -> tuple[Drafted, ...]:
        return ()  # reading costs nothing: there is no need to try it first

    def cancel(self) -> None:
        pass  # nothing takes long

    def label(self, token: TokenId) -> str:
        return ""  # of a vocabulary that it does not have

    def close(self) -> None:
        self._texts.clear()


def _measured_s() -> float:
    """What following and proposing takes, by the token: of a text that repeats itself."""
    text = Text(Trust(), 0)
    tokens = [token % 97 for token in range(512)]
    began = time.perf_counter()
    for end in range(1, len(tokens) + 1):
        text.follow(tokens[:end])
        text.propose()
    return (time.perf_counter() - began) / len(tokens)
