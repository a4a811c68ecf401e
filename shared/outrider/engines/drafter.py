"""A model as a drafter: it chooses the next token by its own logits and the shared noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from outrider.core.branches import RANKS
from outrider.core.constraints import Constraint, Matcher, constrained, propose
from outrider.core.drafter import DrafterInfo, Opening
from outrider.core.engine import Engine, Part
from outrider.core.penalties import Breakers
from outrider.core.sampling import Sampling, Scores, runners_up
from outrider.core.stream import AT_ONCE
from outrider.core.values import Drafted, TokenId
from outrider.engines.breakers import KnownBreakers
from outrider.engines.calibration import calibrate, calibrate_crowd, calibrate_reading
from outrider.engines.constraints import Constraints

READ = 24, 12  # tokens read and recalled to see what reading costs: about as in a first trial


@dataclass(frozen=True, slots=True)
class Asked:
    """What a text is drafted by."""

    sampling: Sampling
    vocabulary: int  # ids from here on are not drafted
    breakers: Breakers
    matcher: Matcher | None
    begins: int  # the answer, which the matcher knows about, begins here
    tells: bool  # what else it might choose is asked for

    def propose(self, row: Scores, text: Sequence[TokenId]) -> Drafted:
        """The token behind `text`, chosen from its logits as the target would choose."""
        held = self.matcher, self.begins
        return propose(row, self.sampling, text, *held, self.vocabulary, self.breakers)

    def others(self, row: Scores, text: Sequence[TokenId], token: TokenId) -> tuple[TokenId, ...]:
        """What it might choose behind `text` instead of `token`, the likeliest first."""
        row = row[: self.vocabulary]
        if self.matcher and len(text) >= self.begins:
            if self.matcher.is_slow:
                return ()
            row = constrained(row, self.matcher, text[self.begins :])
        return runners_up(row, self.sampling, text, token, len(RANKS), self.breakers)


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
            units=info.units,
            spare=info.spare,
        )
        self.token_s = calibrate(engine, (1,))[0]
        self.read_s = min(calibrate_reading(engine, *READ), self.token_s)
        self.crowd_s = calibrate_crowd(engine, engine.info.spare)
        self._engine = engine
        self._chunk = min(AT_ONCE, info.chunk)  # a cancellation may have to wait for so many tokens
        self._breakers = KnownBreakers(engine)
        self._constraints = Constraints(engine)
        self._asked: dict[int, Asked] = {}  # by slot
        self._skipped: dict[int, int] = {}  # by slot: the engine's position 0 is this one
        self._others: dict[int, tuple[TokenId, ...]] = {}  # by slot; see `others`

    def prepare(self, constraint: Constraint) -> None:
        self._constraints.matcher(constraint)

    def open(self, slot: int, opening: Opening) -> None:
        engine, (_, _, skip, known, source, *_) = self._engine, opening
        held = min(known - skip, engine.length(source)) if known > skip else 0
        if source == slot:
            engine.rewind(slot, held)
        else:
            engine.rewind(slot, 0)
            if held:
                engine.copy(source, slot, held)
        self._skipped[slot] = skip
        constraint = opening.constraint
        self._asked[slot] = Asked(
            sampling=opening.sampling,
            vocabulary=min(opening.vocabulary, engine.info.vocabulary.size),
            breakers=self._breakers.of(opening.sampling),
            matcher=self._constraints.matcher(constraint) if constraint else None,
            begins=opening.begins,
            tells=opening.tells or self.info.spare > 0,
        )

    def cut(self, slot: int, length: int) -> None:
        kept = max(0, length - self._skipped[slot])
        if self._engine.length(slot) > kept:
            self._engine.rewind(slot, kept)

    def read(self, slot: int) -> int:
        return self._skipped[slot] + self._engine.length(slot)

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        return self.propose_all([(slot, text)])[0]

    def propose_all(
        self, texts: Sequence[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        drafted: dict[int, tuple[Drafted, ...]] = {}
        rest = list(texts)
        while rest:  # those that find no room in one pass have the next
            parts: list[Part] = []
            room = self._chunk
            for slot, text in rest:
                self.cut(slot, len(text) - 1)  # its last token's logits are needed
                known = self.read(slot)
                ahead = text[known : known + room]
                room -= len(ahead)
                if ahead:
                    parts.append(Part(slot, ahead, 1 if known + len(ahead) == len(text) else 0))
            for (slot, text), scores in zip(rest, self._engine.extend_all(parts), strict=False):
                drafted[slot] = self._proposed(slot, scores, text)
            rest = rest[len(parts) :]
        return [drafted[slot] for slot, _ in texts]

    def _proposed(self, slot: int, scores: Scores, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        self._others[slot] = ()
        if not len(scores):
            return ()
        asked = self._asked[slot]
        drafted = asked.propose(scores[0], text)
        if asked.tells:
            self._others[slot] = asked.others(scores[0], text, drafted.token)
        return (drafted,)

    def others(self, slot: int) -> tuple[TokenId, ...]:
        return self._others.get(slot, ())

    def fork(self, source: int, slot: int, length: int) -> None:
        self._asked[slot], self._skipped[slot] = self._asked[source], self._skipped[source]
        self._engine.copy(source, slot, length - self._skipped[slot])

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

    def cancel(self) -> None:
        self._engine.cancel()

    def label(self, token: TokenId) -> str:
        return self._engine.label(token)

    def close(self) -> None:
        self._engine.close()
