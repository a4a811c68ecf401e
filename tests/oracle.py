"""What an answer has to be: `outrider.core.reference` with a target alone, one token at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from outrider.core.drafter import DrafterInfo
from outrider.core.engine import Engine
from outrider.core.reference import generate
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, TokenId


class NoDraft:
    """A drafter that never has an idea."""

    info = DrafterInfo("none", None, 1 << 30, 1, "toy")
    token_s = 1.0
    read_s = 0.1
    crowd_s: tuple[float, ...] = ()

    def open(
        self,
        slot: int,
        sampling: Sampling,
        vocabulary: int,
        skip: int = 0,
        known: int = 0,
        source: int = -1,
    ) -> None: ...

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


def alone(engine: Engine, prompt: Sequence[TokenId], sampling: Sampling) -> Iterator[TokenId]:
    """What `engine` says after `prompt`, up to an end token or the end of its context."""
    room = engine.info.context - len(prompt)
    for count, tokens in enumerate(generate(engine, NoDraft(), prompt, sampling, 0), 1):
        yield from tokens
        if count == room:
            return
