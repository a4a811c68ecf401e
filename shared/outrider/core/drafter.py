"""What a draft worker drives: anything that proposes tokens, such as a model over an engine.

Nothing outside a drafter knows how it finds its tokens: it need not have logits, a vocabulary or a
file. The text of an answer never depends on it, so it may guess as it likes. How far to trust its
confidences is learnt from what the target then chooses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from outrider.core.constraints import Constraint
from outrider.core.engine import Vocabulary
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, TokenId


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    """What a drafter is, and how much it can follow."""

    name: str
    vocabulary: Vocabulary | None  # None: it takes the target's ids as they are
    context: int  # tokens that one text can have
    slots: int  # texts followed at once, in slots 0 … slots - 1
    device: str  # as `ModelInfo.device`
    units: tuple[str, ...] = ()  # as `ModelInfo.units`
    spare: int = 0  # branches held at once, in slots behind those


class Opening(NamedTuple):
    """How a text begins that is to be followed."""

    sampling: Sampling
    vocabulary: int  # ids from here on do not exist in the target
    skip: int = 0  # tokens at the beginning that are not to be read
    # the text in slot `source`, perhaps the former one of the same slot, began with so many of the
    # same tokens, as far as they were read
    known: int = 0
    source: int = -1
    constraint: Constraint | None = None  # to which the target holds what is behind …
    begins: int = 0  # … so many tokens
    cache: str | None = None  # as `events.Prefill`
    tells: bool = False  # `Drafter.others` will be asked for, also if there are no spare slots


class Drafter(Protocol):
    """Follows a text in each of its slots and proposes what may come next.

    `open`, `cut`, `propose`, `forget` and `close` belong to one owner thread; everything else may
    be called from any thread.
    """

    info: DrafterInfo
    token_s: float  # what one drafted token takes, measured when the drafter was made
    read_s: float  # and what each token of a long text takes that is only read
    # what one token each for 1, 2 … texts takes, branches included; (): it does not share
    crowd_s: tuple[float, ...]

    def prepare(self, constraint: Constraint) -> None:
        """Do beforehand what `open` with this `constraint` would take long for; it may fail."""

    def open(self, slot: int, opening: Opening) -> None:
        """A text begins in `slot`.

        A drafter that does not know a constraint drafts what will not be verified.
        """

    def cut(self, slot: int, length: int) -> None:
        """The text has changed from position `length` on (a rollback)."""

    def read(self, slot: int) -> int:
        """How many tokens of the text in `slot` it has taken in or skipped."""

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        """One or more tokens to follow `text`, in order; none if it has no idea.

        There is none, either, if it could not take in all of a long text at once: `read` is then
        below len(text), and it must be asked again. Raises `Cancelled` where `cancel` cut it short,
        `EngineFault` where it failed, ValueError for a text that it cannot follow.
        """

    def propose_all(
        self, texts: Sequence[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        """`propose` for several slots and their texts, in one pass if it can; in the same order."""
        return [self.propose(slot, text) for slot, text in texts]

    def others(self, slot: int) -> tuple[TokenId, ...]:
        """What could be in the place of the first token that it last proposed in `slot`.

        The likeliest come first. There are none where it does not know.
        """
        return ()

    def fork(self, source: int, slot: int, length: int) -> None:
        """Go on in `slot` with the first `length` tokens of the text in `source`: a branch of it.

        `propose_all` takes it like a text, until another is begun in `slot`.
        """
        assert not self.info.spare, "who has spare slots does it"

    def recall(self, slot: int, text: Sequence[TokenId], count: int) -> tuple[Drafted, ...]:
        """What it would have proposed for each of the last `count` tokens of `text`, in order.

        It takes in all of the text but the last token, at once; none if that cannot be. Reading
        costs a fraction of drafting, so this is the cheapest way to see whether a draft agrees.
        """

    def cancel(self) -> None:
        """Cut short the `propose` that is running, if one is."""

    def label(self, token: TokenId) -> str:
        """The vocabulary's own text of `token`, to compare with the target's."""

    def close(self) -> None:
        """Free what it holds."""
