"""A model as a drafter: it chooses the next token by its own logits and the shared noise."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.core.drafter import DrafterInfo
from outrider.core.engine import Engine
from outrider.core.sampling import Sampling, propose
from outrider.core.stream import AT_ONCE
from outrider.core.values import Drafted, TokenId
from outrider.engines.calibration import calibrate


class ModelDrafter:
    """A `Drafter` over an engine, which it owns; it drafts one token at a time."""

    def __init__(self, engine: Engine) -> None:
        info = engine.info
        self.info = DrafterInfo(
            name=info.name,
            vocabulary=info.vocabulary,
            context=info.context,
            slots=info.slots,
            device=info.device,
        )
        self.token_s = calibrate(engine, (1,))[0]
        self._engine = engine
        self._chunk = min(AT_ONCE, info.chunk)  # a cancellation may have to wait for so many tokens
        self._asked: dict[int, tuple[Sampling, int]] = {}  # by slot: settings, number of ids

    def open(self, slot: int, sampling: Sampling, vocabulary: int) -> None:
        self._engine.rewind(slot, 0)
        self._asked[slot] = sampling, min(vocabulary, self._engine.info.vocabulary.size)

    def cut(self, slot: int, length: int) -> None:
        if self._engine.length(slot) > length:
            self._engine.rewind(slot, length)

    def read(self, slot: int) -> int:
        return self._engine.length(slot)

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        sampling, vocabulary = self._asked[slot]
        self.cut(slot, len(text) - 1)  # its last token's logits are needed
        known = self._engine.length(slot)
        ahead = text[known : known + self._chunk]
        is_last = known + len(ahead) == len(text)
        rows = self._engine.extend(slot, ahead, 1 if is_last else 0)
        if not is_last:
            return ()
        return (propose(rows[0], sampling, text, len(text), n_vocab=vocabulary),)

    def forget(self, slot: int) -> None:
        self._engine.rewind(slot, 0)

    def cancel(self) -> None:
        self._engine.cancel()

    def label(self, token: TokenId) -> str:
        return self._engine.label(token)

    def close(self) -> None:
        self._engine.close()
