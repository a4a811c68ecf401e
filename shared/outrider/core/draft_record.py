"""What a session knows of its draft worker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto
from typing import Self

from outrider.core.reading import Held
from outrider.core.values import Proposal

PATIENCE_S = (0.02, 0.5)  # least and most wait for one drafted token
FORESIGHT = 0.1  # what one miss counts for


class DraftState(Enum):
    """The states are explained in `outrider.core.session`."""

    ABSENT, IDLE, DRAFTING, PAUSED, LATE = auto(), auto(), auto(), auto(), auto()


@dataclass(slots=True)
class DraftRecord:
    """Positions count tokens of the text; times are seconds on the session's clock."""

    state: DraftState = DraftState.ABSENT
    told: int = 0  # it knows the committed text up to here
    told_at: float = 0.0  # when the target last fell idle and the draft was told
    read: int = 0  # it has certainly taken in the text up to here
    skip: int = 0  # … from here on
    until: int = 0  # its leave
    granted: int = 0  # the farthest that its leave ever was: such a token may be on its way
    floors: tuple[float, ...] = ()
    next_at: float = 0.0  # its next token is expected
    gap_s: float = PATIENCE_S[1] / 4  # its usual time for a token
    offences: int = 0
    lineage: int = 0  # of what it has sent last
    foresight: float = 0.0  # how often it lately had what follows where it was wrong

    @property
    def rides(self) -> bool:
        """Whether it drafts for this request, be it paused or late."""
        return self.state not in (DraftState.ABSENT, DraftState.IDLE)

    def opened(self, is_awaited: bool) -> None:
        """It is to read the text, and then to draft; the target waits for that, or it goes on."""
        self.state = DraftState.DRAFTING if is_awaited else DraftState.LATE

    def begins_anew(self, now: float) -> None:
        """It was wrong. Its next token comes at once if it has foreseen that."""
        self.next_at = now + self.gap_s * (1 - self.foresight)

    def heard(self, proposal: Proposal, now: float) -> float | None:
        """What each of its tokens took; None: it has none, or they were drafted before.

        The first of a lineage show whether it had foreseen that it was wrong.
        """
        if not proposal.drafted:
            return None
        if proposal.lineage != self.lineage:
            self.lineage = proposal.lineage
            self.foresight += FORESIGHT * (proposal.foreseen - self.foresight)
        each_s = proposal.elapsed_s / len(proposal.drafted)
        # one that is late has read the text first, or was in trouble
        is_usual = not proposal.foreseen and self.state is not DraftState.LATE
        self.gap_s += 0.2 * (each_s - self.gap_s) if is_usual else 0.0
        self.next_at = now + (each_s if is_usual else self.gap_s)
        return None if proposal.foreseen else each_s

    @classmethod
    def of(cls, held: Held) -> Self:
        """Before anything has happened: what the draft knows of the prompt."""
        return cls(told=held.end, read=held.end, skip=held.skip)

    @property
    def held(self) -> Held:
        """What it still knows of the committed text when it has left."""
        return Held(self.skip, min(self.read, self.told))

    def may_send(self, proposal: Proposal, vocabulary: int) -> bool:
        """Whether a draft worker that keeps the rules could have sent this."""
        return bool(
            # without tokens it must say that none come
            (proposal.drafted or proposal.paused or proposal.recalled)
            and len(proposal.drafted) <= self.granted - proposal.position
            and all(one.token < vocabulary for one in proposal.drafted)
            and all(math.isfinite(one.confidence) for one in proposal.drafted + proposal.recalled)
        )

    @property
    def patience_s(self) -> float:
        """How long to wait for its next token."""
        least, most = PATIENCE_S
        return min(max(4 * self.gap_s, least), most)
