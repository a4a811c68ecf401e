"""What a draft worker drives: whatever proposes tokens. A model over an engine is one of them.

Nothing outside a drafter knows how it comes to its tokens: it need not have logits, a vocabulary
or a file. The text of an answer never depends on it, so it may guess as it likes; what it says of
its confidence is learnt against what the target then chose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from outrider.core.engine import Vocabulary
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, TokenId


@dataclass(frozen=True, slots=True)
class DrafterInfo:
    name: str
    vocabulary: Vocabulary | None  # None: it takes the target's ids as they are
    context: int  # tokens that one text can have
    slots: int  # texts followed at once, in slots 0 … slots - 1
    device: str  # as `ModelInfo.device`


class Drafter(Protocol):
    """Follows a text in each of its slots and proposes what may come next.

    `open`, `cut`, `propose`, `forget` and `close` belong to one owner thread; everything else may
    be called from any thread.
    """

    info: DrafterInfo
    token_s: float  # what one drafted token takes, measured when it was made

    def open(self, slot: int, sampling: Sampling, vocabulary: int) -> None:
        """A text begins in `slot`; ids from `vocabulary` on do not exist in the target."""

    def cut(self, slot: int, length: int) -> None:
        """From position `length` on, the text has become another (a rollback)."""

    def read(self, slot: int) -> int:
        """How many tokens of the text it has taken in."""

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        """One or more tokens to follow `text`, one behind the other.

        Nothing, if it has no idea, or if it could not take in all of a long text at once: then
        `read` is below len(text), and it is to be asked again. Raises `Cancelled` where `cancel`
        cut it short, `EngineFault` where it failed, ValueError for a text that it cannot follow.
        """

    def forget(self, slot: int) -> None:
        """The text in `slot` is over; the slot is free."""

    def cancel(self) -> None:
        """Cut short the `propose` that is running, if one is."""

    def label(self, token: TokenId) -> str:
        """The vocabulary's own text of `token`, to compare with the target's."""

    def close(self) -> None:
        """Free what it holds."""
