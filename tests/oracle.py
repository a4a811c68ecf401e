"""What an answer has to be: `outrider.core.reference` with a target alone, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from outrider.core.constraints import Constraint, Matcher, constrained
from outrider.core.drafter import Drafter, DrafterInfo, Opening
from outrider.core.engine import Engine
from outrider.core.reference import generate
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Drafted, TokenId


class NoDraft(Drafter):
    """A drafter that never has an idea."""

    info = DrafterInfo("none", None, 1 << 30, 1, "toy")
    token_s = 1.0
    read_s = 0.1
    crowd_s: tuple[float, ...] = ()

    def prepare(self, constraint: Constraint) -> None: ...

    def open(self, slot: int, opening: Opening) -> None: ...

    def cut(self, slot: int, length: int) -> None: ...

    def read(self, slot: int) -> int:
        return 0

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        return ()

    def cancel(self) -> None: ...

    def propose_all(
        self, texts: Sequence[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        return [self.propose(slot, text) for slot, text in texts]

    def recall(self, slot: int, text: Sequence[TokenId], count: int) -> tuple[Drafted, ...]:
        return ()

    def label(self, token: TokenId) -> str:
        raise NotImplementedError

    def close(self) -> None: ...


class Held:
    """An engine whose scores are minus infinity for what a constraint does not allow.

    So the reference need not know of constraints. One text, in slot 0, whose answer begins behind
    the first `begins` tokens.
    """

    def __init__(self, engine: Engine, matcher: Matcher, begins: int) -> None:
        self.info = engine.info
        self._engine, self._matcher, self._begins = engine, matcher, begins
        self._text: list[TokenId] = []

    def extend(self, slot: int, tokens: Sequence[TokenId], rows: int) -> Scores:
        scores = self._engine.extend(slot, tokens, rows)
        self._text += tokens
        answer, held = self._text[self._begins :], []
        ended = [n for n, token in enumerate(answer) if token in self.info.vocabulary.ends]
        legal = min([self._matcher.legal([], answer), *ended])
        for row, end in zip(scores, range(len(answer) - rows + 1, len(answer) + 1), strict=True):
            # behind an end, or what is forbidden, nothing is ever chosen
            held.append(constrained(row, self._matcher, answer[:end]) if end <= legal else row)
        return np.array(held, np.float32).reshape(scores.shape)

    def rewind(self, slot: int, length: int) -> None:
        self._engine.rewind(slot, length)
        del self._text[length:]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def alone(
    engine: Engine,
    prompt: Sequence[TokenId],
    sampling: Sampling,
    matcher: Matcher | None = None,
) -> Iterator[TokenId]:
    """What `engine` says after `prompt`, up to an end token or the end of its context."""
    room = engine.info.context - len(prompt)
    target: Any = Held(engine, matcher, len(prompt)) if matcher else engine
    for count, tokens in enumerate(generate(target, NoDraft(), prompt, sampling, 0), 1):
        yield from tokens
        if count == room:
            return
