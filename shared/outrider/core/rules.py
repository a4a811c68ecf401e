"""When to verify and how far to draft: the modes are settings of one mechanism, not separate loops.

A session asks its rule two questions: how many drafted tokens to verify now, or whether to wait for
more; and how far ahead of the committed text the draft may run. `FixedRule` answers with fixed
numbers. `priced.PricedRule` answers from measured costs and from the acceptance that the draft's
confidences foretell.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outrider.core.reading import UNKNOWN, Held, Reading
from outrider.core.values import Beside, Mode

MOST_DRAFTED = 64  # most tokens in a block, whatever is asked for


class Rule(Protocol):
    """What a session asks its rule and what it tells it; a rule may ignore what it is told.

    Times are seconds on the session's clock, less the time that workers spent on other requests.
    """

    mode: Mode

    @property
    def drafts(self) -> bool:
        """Whether drafts are wanted at all; if not, the draft need not even read the prompt."""

    def reads(
        self, text: int, written: int, room: int, busy: bool, held: Held = UNKNOWN
    ) -> Reading:
        """What the draft is to read now of the `text` tokens so far, if anything.

        `written` of them are the answer's, and there is `room` for so many more. What is `held`
        need not be read.
        """
        return Reading(text)

    def recalled(self, choices: Sequence[tuple[bool, float]], elapsed_s: float) -> None:
        """While it read, for `elapsed_s`, the draft chose as the target had or not, so surely.

        Without choices it could not recall anything.
        """
        return None

    @property
    def awaits_reading(self) -> bool:
        """Whether the target waits for a draft that has yet to read the text."""
        return True

    @property
    def dismisses(self) -> bool:
        """Whether the draft is to forget the text; it has to read it anew if it is wanted again."""
        return False

    def ended(self, written: int) -> None:
        """The answer came to its end with `written` tokens."""
        return None

    def lead(self, busy: bool) -> int:
        """How many tokens the draft may run ahead of the text, by whether the target is `busy`."""

    @property
    def floors(self) -> tuple[float, ...]:
        """The joint acceptances below which the draft stops by itself; see `events.Commit`."""

    def block_s(self, behind: int) -> float:
        """The extra seconds to wait for a draft that sends whole blocks, not single tokens.

        The draft still has `behind` tokens of the text to read.
        """

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        """How many of the drafted tokens to verify now; None: wait for the next one.

        `confidences` are those of the drafted tokens in stock; the answer has room for `limit` of
        them. The next token is expected in `next_s` seconds; None: none can come.
        """

    def beside(self, confidences: Sequence[float], base: int, sides: Beside) -> Beside:
        """Which of the `sides` to verify in the pass over a block with these `confidences`.

        The first drafted token of the block is at position `base`.
        """
        return ()

    def offered(self, is_some: bool) -> None:
        """The draft has proposed something where nothing was in stock, or it had no idea."""
        return None

    @property
    def is_silent(self) -> bool:
        """Whether the draft hardly ever has an idea, so that nobody waits for one."""
        return False

    def goes_on(self, away_s: float) -> bool:
        """Whether the target, after a miss, takes a plain step by itself rather than wait.

        What the draft begins anew comes `away_s` later than it would without messages.
        """
        return True

    def settle(self) -> None:
        """Use what was observed from now on.

        Call it while the target is busy: solving anew may take milliseconds.
        """
        return None

    def observe(self, good: bool, confidence: float) -> None:
        """The target chose a drafted token of this confidence itself (`good`), or another."""
        return None

    def verified(
        self,
        rows: int,
        elapsed_s: float,
        round_trip_s: float,
        requests: int = 1,
        beside: float = 0.0,
    ) -> None:
        """A pass over `rows` rows took `elapsed_s`, and `round_trip_s` with its messages.

        So many `requests` had at least one of them each. For the share `beside` of that time the
        draft computed too.
        """
        return None

    @property
    def drag(self) -> float:
        """How many times as long a plain step takes beside a draft that computes."""
        return 1.0

    def said(self, margins: Sequence[float]) -> None:
        """The target has said tokens that won by these margins, in logits."""
        return None

    def committed(self, tokens: int, spent_s: float | None) -> None:
        """`tokens` more tokens were committed, `spent_s` after the commit before.

        None: of a draft that hangs nothing was to be expected.
        """
        return None

    def drafted(
        self,
        each_s: float | None,
        confidences: Sequence[float],
        turn_s: float | None,
        requests: int = 1,
    ) -> None:
        """Each token took `each_s`, if that tells what they take; beginning a turn, `turn_s`.

        So many `requests` shared the draft's passes.
        """
        return None


class FixedRule(Rule):
    """Blocks of at most `n_max` drafted tokens, and at least `n_min` if the draft can deliver.

    A block ends before a token whose confidence is below `p_min`. Nothing is learnt.
    """

    def __init__(self, mode: Mode, n_max: int = 5, n_min: int = 0, p_min: float = 0.0) -> None:
        self.mode, self.n_max, self.n_min, self.p_min = mode, n_max, n_min, p_min

    @property
    def drafts(self) -> bool:
        return self.mode != "plain" and self.n_max > 0

    def lead(self, busy: bool) -> int:
        """In sync mode one block, and only while the target is idle.

        Pipelined: the block that is being verified, the next one, and a bonus after each.
        """
        if self.mode == "sync":
            return 0 if busy else self.n_max
        return 2 * self.n_max + 2

    @property
    def floors(self) -> tuple[float, ...]:
        return ()

    def block_s(self, behind: int) -> float:
        return 0.0

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        limit = min(limit, self.n_max) if self.drafts else 0
        ready = 0
        for confidence in confidences[:limit]:
            if confidence < self.p_min:
                return ready
            ready += 1
        wanted = min(limit, self.n_max if self.mode == "sync" else self.n_min)
        return None if next_s is not None and ready < wanted else ready

    def goes_on(self, away_s: float) -> bool:
        return self.n_min == 0
