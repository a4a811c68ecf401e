"""What a session is told (events), and what it wants done (commands).

Those that a worker sends or receives are values: see `outrider.core.values`, and the orders here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, TypeAlias

from outrider.core.constraints import Constraint
from outrider.core.reading import UNKNOWN, Held
from outrider.core.sampling import Sampling
from outrider.core.values import (
    Count,
    Floors,
    Fragment,
    Meta,
    Order,
    Proposal,
    Reason,
    Received,
    Sides,
    TokenId,
    TokenIds,
    TopCount,
    Verdict,
    Verify,
    Word,
)
from outrider.errors import OutriderError

DEFAULT_SAMPLING = Sampling()


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be generated."""

    prompt: tuple[TokenId, ...]
    n_predict: int | None  # most tokens to generate; None: until the context is full
    stop: tuple[str, ...]
    ends: frozenset[TokenId]
    context: int  # most tokens of prompt and answer together
    vocabulary: int  # ids that the target knows
    sampling: Sampling = DEFAULT_SAMPLING
    logprobs: bool = False
    trace: bool = False
    cache: str | None = None  # see `Prefill`
    held: Held = UNKNOWN  # what the draft knows of the prompt from an earlier request
    top_logprobs: int = 0  # as `Prefill`
    constraint: Constraint | None = None
    sides: int = 0  # tokens that the target may verify beside a block
    received: tuple[Received, ...] = ()  # the beginning of the answer, which was generated before

    def reading(self, text: tuple[TokenId, ...], round: int) -> Prefill:
        """The order that begins it, or goes on behind what was committed: `text` has both."""
        return Prefill(
            tokens=text,
            sampling=self.sampling,
            logprobs=self.logprobs,
            constraint=self.constraint,
            top_logprobs=self.top_logprobs,
            cache=self.cache,
            begins=len(self.prompt),
            round=round,
        )

    def opening(self, lineage: int, base: int, stream: tuple[TokenId, ...]) -> OpenDraft:
        """The order to draft behind `stream`, of which `base` tokens are committed."""
        return OpenDraft(
            lineage=lineage,
            base=base,
            tokens=stream,
            sampling=self.sampling,
            vocabulary=self.vocabulary,
            ends=tuple(sorted(self.ends)),
            until=base,
            cache=self.cache,
            constraint=self.constraint,
            begins=len(self.prompt),
        )


# ---- events -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Start:
    """The request begins; `draft` says whether a draft worker is there."""

    draft: bool


@dataclass(frozen=True, slots=True)
class DraftReady:
    """A draft worker is there, perhaps again."""


@dataclass(frozen=True, slots=True)
class DraftLost:
    """The draft worker died, hung or refused; what it drafted may still be verified."""


@dataclass(frozen=True, slots=True)
class TargetLost:
    """The target worker died or hung, and with it what it was to verify."""


@dataclass(frozen=True, slots=True)
class TargetReady:
    """A target worker with the same model is there: it may read the text and go on."""


@dataclass(frozen=True, slots=True)
class Timer:
    """The session's deadline may have passed."""


@dataclass(frozen=True, slots=True)
class Cancel:
    """The client does not want the rest."""


@dataclass(frozen=True, slots=True)
class Failure:
    """The request cannot go on."""

    error: OutriderError


Event: TypeAlias = (
    Start | DraftReady | DraftLost | TargetLost | TargetReady
    | Proposal | Sides | Verdict | Timer | Cancel | Failure
)  # fmt: skip


# ---- commands -----------------------------------------------------------------------------------


class Prefill(Order, frozen=True):
    """Evaluate the text and choose the token behind it; the answer is the verdict of `round`."""

    tokens: TokenIds
    sampling: Sampling
    logprobs: bool
    constraint: Constraint | None = None  # of the answer
    top_logprobs: TopCount = 0  # how many of the likeliest tokens to tell at each position
    cache: Word | None = None  # texts of the same name may use what was read of it; None: no other
    begins: Count = 0  # the answer begins here; 0: behind `tokens`
    round: Count = 0  # a later one: the text was committed with another worker


class OpenDraft(Order, frozen=True):
    """The draft is to go on behind `tokens`, up to but not including position `until`.

    Tokens from position `base` on are not committed yet: the next `Commit` begins there.
    """

    lineage: Count
    base: Count
    tokens: TokenIds
    sampling: Sampling
    vocabulary: Count  # ids from here on do not exist in the target
    ends: Annotated[tuple[TokenId, ...], Meta(max_length=1024)]  # nothing is drafted behind these
    until: Count
    floors: Floors = ()
    skip: Count = 0  # tokens at the beginning that the draft is not to read
    recall: Count = 0  # it tells first what it would have drafted for so many tokens at the end
    cache: Word | None = None  # see `Prefill`
    constraint: Constraint | None = None
    begins: Count = 0  # the answer, to which the constraint applies, begins here
    foresees: bool = False  # it may also draft what follows where it is wrong …
    sides: Count = 0  # … and tells so many tokens of those, for the target to verify


class Commit(Order, frozen=True):
    """The text from `base` on; where it differs from what was drafted, a new lineage starts.

    The draft, n drafted tokens ahead of it, goes on only if the product of their usual acceptances
    (`outrider.core.estimates`) is at least the n-th of `floors`, or if there is no n-th.
    """

    base: Count
    tokens: TokenIds
    until: Count
    floors: Floors = ()


@dataclass(frozen=True, slots=True)
class CloseDraft:
    """The draft worker may forget the request."""


@dataclass(frozen=True, slots=True)
class Finish:
    """The answer is whole, or was cancelled."""

    reason: Reason


@dataclass(frozen=True, slots=True)
class Fault:
    """The request came to nothing."""

    error: OutriderError


@dataclass(frozen=True, slots=True)
class Settle:
    """Call `Rule.settle` now: the target is busy, and nobody waits."""


Command: TypeAlias = (
    Prefill | Verify | OpenDraft | Commit | CloseDraft | Fragment | Finish | Fault | Settle
)
