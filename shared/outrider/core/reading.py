"""What a draft is to read where reading takes the target's time.

On shared cores the target stands still while the draft reads. So before a draft reads, the price is
held against what the draft can still save: the tokens that are probably still to come, times what
each would take less. It need not read the whole text: what comes next depends most on the end.

What would be saved depends on how often the draft agrees on this very text. How sure the target was
of what it has written foretells that (`promise`). Whether this draft keeps it shows while it reads:
it sees where it would have drafted the same as the target. This *recall* costs a fraction of
drafting and verifying. Drafting begins only if both promise a gain.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

SHARE = 0.13  # most of what a draft is expected to save that it may spend on reading
TRIAL_SHARE = 0.01  # of what was written without a draft: spent to find out whether one pays now
MOST_TRIAL = 0.015  # … and at most this share of what is still to come in this answer
RAREST = 9  # after this many vain attempts they do not become rarer
UNPROMISING = 0.1  # of that where the text foretells no gain
UNTRIED = 400.0  # so much counts as written without a draft where nothing was tried or one paid
CONTEXT = 8  # tokens that are read before the first that is recalled
LEAST = 20  # tokens; behind fewer a draft guesses badly
RECALLED = (12, 16)  # least and most tokens to recall: more would tell little more
LONGEST_S = 0.8  # the target does not stand still for longer: see `dispatch.BLOCK_PATIENCE_S`
USUAL = 192.0  # tokens that an answer is expected to have as long as none is known
WEIGHT = 2.0  # how many known answers that expectation counts for


class Held(NamedTuple):
    """What the draft still knows of a text from before: its tokens from `skip` to `end`."""

    skip: int
    end: int


UNKNOWN = Held(0, 0)


class Reading(NamedTuple):
    """So many tokens at the end of the text, and for how many of them the draft is to recall.

    So many of them are `known` to the draft already.
    """

    tokens: int
    recall: int = 0
    known: int = 0

    @property
    def unread(self) -> int:
        return self.tokens - self.known


NOTHING = Reading(0)


class Lengths:
    """How long this service's answers were, and so how much of one is probably still to come."""

    def __init__(self, kept: int = 64) -> None:
        self._ended: deque[int] = deque(maxlen=kept)

    def ended(self, tokens: int) -> None:
        """An answer of so many tokens came to its end."""
        self._ended.append(tokens)

    def left(self, written: int, room: int) -> float:
        """The expected tokens behind `written` ones, at most `room`.

        Known answers that were longer tell; beside them, an answer is expected to go on for as long
        as it has lasted already.
        """
        more = [length - written for length in self._ended if length > written]
        unknown = max(USUAL, float(written))
        return min(float(room), (sum(more) + WEIGHT * unknown) / (len(more) + WEIGHT))


def budget(
    left: float, saved: float, untried: float, failures: int, promised: float | None = None
) -> float:
    """What reading may cost, in plain steps, where `left` tokens are expected to come.

    Each would be `saved` steps cheaper with a draft; `untried` were written since one was tried,
    which has been in vain `failures` times one after the other. What this text itself has
    `promised` to save counts instead, unless it is None: too little was said.
    """
    trial = TRIAL_SHARE * (untried + left) / (1 + min(failures, RAREST))
    if promised is not None:
        trial, saved = UNPROMISING * trial, promised
    return max(SHARE * saved * left, min(trial, MOST_TRIAL * left))


def chosen(
    text: int,
    written: int,
    budget_s: float,
    read_s: float,
    knows: bool,
    held: Held = UNKNOWN,
    promises: bool = False,
) -> Reading:
    """What to read of `text` tokens, `written` of them the answer's, where each takes `read_s`.

    `knows`: a gain is expected without any recall. Else some of the answer must be there to recall,
    behind as much as can be paid for if the text `promises` a gain: the draft is to go on from it.
    What is `held` is gone on with if that can be paid for.
    """
    count = min(text, int(budget_s / max(read_s, 1e-9)))
    least, most = RECALLED
    unread = text - held.end
    if held.end > held.skip and unread <= count:
        recall = 0 if knows else min(written, unread, most)
        if knows or recall >= least:
            return Reading(text - held.skip, recall, held.end - held.skip)
    if count < min(LEAST, text):
        return NOTHING
    if knows:
        return Reading(count)
    recall = min(written, count - CONTEXT, most)
    return Reading(count if promises else recall + CONTEXT, recall) if recall >= least else NOTHING
