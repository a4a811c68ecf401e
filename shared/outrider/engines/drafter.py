"""A model as a drafter: it chooses the next token by its own logits and the shared noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.constraints import Constraint, Matcher, propose
from outrider.core.drafter import DrafterInfo
from outrider.core.engine import Engine
from outrider.core.sampling import Sampling, Scores
from outrider.core.stream import AT_ONCE
from outrider.core.values import Drafted, TokenId
from outrider.engines.calibration import calibrate, calibrate_reading
from outrider.engines.constraints import Constraints

READ = 24, 12  # tokens read and recalled to see what reading costs: about as in a first trial


@dataclass(frozen=True, slots=True)
class Asked:
    """What a text is drafted by."""

    sampling: Sampling
    vocabulary: int  # ids from here on are not drafted
    matcher: Matcher | None
    begins: int  # the answer, which the matcher knows about, begins here

    def propose(self, row: Scores, text: Sequence[TokenId]) -> Drafted:
        """The token behind `text`, chosen from its logits as the target would choose."""
        return propose(row, self.sampling, text, self.matcher, self.begins, self.vocabulary)


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
        self.read_s = min(calibrate_reading(engine, *READ), self.token_s)
        self._engine = engine
        self._chunk = min(AT_ONCE, info.chunk)  # a cancellation may have to wait for so many tokens
        self._constraints = Constraints(engine)
        self._asked: dict[int, Asked] = {}  # by slot
        self._skipped: dict[int, int] = {}  # by slot: the engine's position 0 is this one

    def prepare(self, constraint: Constraint) -> None:
        self._constraints.matcher(constraint)

    def open(
        self,
        slot: int,
        sampling: Sampling,
        vocabulary: int,
        skip: int = 0,
        constraint: Constraint | None = None,
        begins: int = 0,
    ) -> None:
        self._engine.rewind(slot, 0)
        self._skipped[slot] = skip
        vocabulary = min(vocabulary, self._engine.info.vocabulary.size)
        matcher = self._constraints.matcher(constraint) if constraint else None
        self._asked[slot] = Asked(sampling, vocabulary, matcher, begins)

    def cut(self, slot: int, length: int) -> None:
        kept = max(0, length - self._skipped[slot])
        if self._engine.length(slot) > kept:
            self._engine.rewind(slot, kept)

    def read(self, slot: int) -> int:
        return self._skipped[slot] + self._engine.length(slot)

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        self.cut(slot, len(text) - 1)  # its last token's logits are needed
        known = self.read(slot)
        ahead = text[known : known + self._chunk]
        is_last = known + len(ahead) == len(text)
        rows = self._engine.extend(slot, ahead, 1 if is_last else 0)
        if not is_last:
            return ()
        return (self._asked[slot].propose(rows[0], text),)

    def recall(self, slot: int, text: Sequence[TokenId], count: int) -> tuple[Drafted, ...]:
        known = self.read(slot)
        ahead = text[known : len(text) - 1]
        if not 0 < count <= len(ahead) <= self._chunk:
            return ()
        rows = self._engine.extend(slot, ahead, count)
        ends = range(len(text) - count, len(text))
        return tuple(
            self._asked[slot].propose(row, text[:end]) for end, row in zip(ends, rows, strict=True)
        )

    def forget(self, slot: int) -> None:
        self._engine.rewind(slot, 0)

    def cancel(self) -> None:
        self._engine.cancel()

    def label(self, token: TokenId) -> str:
        return self._engine.label(token)

    def close(self) -> None:
        self._engine.close()
