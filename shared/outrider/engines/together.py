"""A model and a drafter that costs nothing, together: at each place the one that is worth more.

The text does not depend on the draft, so what each would have proposed is scored on every token of
the answer, whoever proposed it: that is its acceptance (design: `outrider.core.drafter`). The free
one goes first where its next token is at least as likely as the model's usually are; the model
reads later what it has left out, many tokens in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from outrider.core.constraints import Constraint
from outrider.core.drafter import Drafter, Opening
from outrider.core.estimates import usual_acceptance
from outrider.core.stream import AT_ONCE
from outrider.core.values import Drafted, TokenId
from outrider.engines.suffix import SuffixDrafter

SETTLED = 64  # tokens behind a place: no draft is so far ahead, so it is committed
MEMORY = 40.0  # tokens that the model's acceptance is learnt from
USUAL = 0.8  # the model's, before any is known


class Guess(NamedTuple):
    """What the model has proposed for a place."""

    place: int
    token: TokenId


class BothDrafters:
    """A `Drafter` made of two; see the module."""

    def __init__(self, model: Drafter, memory: int = 0) -> None:
        self._model, self.info = model, model.info
        self._free = SuffixDrafter(model.info.context, model.info.slots, memory)
        self.token_s, self.read_s, self.crowd_s = model.token_s, model.read_s, model.crowd_s
        self._guesses: dict[int, list[Guess]] = {}  # by slot, in order
        self._accepted = USUAL
        self._are_free: set[int] = set()  # slots for which the model has not proposed last

    def prepare(self, constraint: Constraint) -> None:
        self._model.prepare(constraint)

    def open(self, slot: int, opening: Opening) -> None:
        self._model.open(slot, opening)
        self._free.open(slot, opening)
        self._guesses[slot] = []

    def cut(self, slot: int, length: int) -> None:
        """The free one sees for itself: a model that has tokens to read is cut without a change."""
        self._model.cut(slot, length)
        if slot >= self.info.slots:
            return
        guesses = self._guesses[slot]
        while guesses and guesses[-1].place > length:
            guesses.pop()

    def read(self, slot: int) -> int:
        return self._model.read(slot)

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        return self.propose_all([(slot, text)])[0]

    def propose_all(
        self, texts: Sequence[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        drafted: dict[int, tuple[Drafted, ...]] = {}
        rest = []
        for slot, text in texts:
            if slot >= self.info.slots:  # a branch
                rest.append((slot, text))
                continue
            self._are_free.discard(slot)
            free = self._free.propose(slot, text)
            self._score(slot, text)
            if free and self._is_worth(slot, text, free[0]):
                drafted[slot] = free
                self._are_free.add(slot)
            else:
                rest.append((slot, text))
        if rest:
            for (slot, text), found in zip(rest, self._model.propose_all(rest), strict=True):
                drafted[slot] = found
                if slot < self.info.slots:
                    places = range(len(text), len(text) + len(found))
                    self._guesses[slot] += map(Guess, places, (one.token for one in found))
        return [drafted[slot] for slot, _ in texts]

    def _is_worth(self, slot: int, text: Sequence[TokenId], free: Drafted) -> bool:
        """Whether the free one goes first, if the model has not too much to read by now."""
        unread = len(text) - self._model.read(slot)
        return unread < AT_ONCE and usual_acceptance(free.confidence) >= self._accepted

    def _score(self, slot: int, text: Sequence[TokenId]) -> None:
        guesses = self._guesses[slot]
        while guesses and guesses[0].place + SETTLED < len(text):
            place, token = guesses.pop(0)
            self._accepted += ((text[place] == token) - self._accepted) / MEMORY

    def others(self, slot: int) -> tuple[TokenId, ...]:
        return () if slot in self._are_free else self._model.others(slot)

    def fork(self, source: int, slot: int, length: int) -> None:
        self._model.fork(source, slot, length)

    def recall(self, slot: int, text: Sequence[TokenId], count: int) -> tuple[Drafted, ...]:
        return self._model.recall(slot, text, count)

    def cancel(self) -> None:
        self._model.cancel()

    def label(self, token: TokenId) -> str:
        return self._model.label(token)

    def close(self) -> None:
        self._free.close()
        self._model.close()
