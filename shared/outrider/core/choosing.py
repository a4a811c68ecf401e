"""Which of several drafts serves a request: the one with which most tokens a second are expected.

What a draft is worth follows from the price of the rules (`price`): what the target's passes cost,
what a drafted token costs, how often it was accepted lately, and how long a message takes to the
draft and back. A draft that has served nobody yet counts as the prior of `estimates.Acceptance`
says. Now and then one that stands by is tried, if it may turn out to be better: its acceptance
could be higher than was seen, the more so the longer ago that was.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from outrider.core import price
from outrider.core.estimates import LONGEST, Costs

K = TypeVar("K", bound=Hashable)

TRIAL_EACH = 16  # requests; at most one of so many is a trial
DOUBT = 0.15  # acceptance that a draft may have beyond the known one, if it served nobody lately
FORGOTTEN = 256  # requests after which nothing is left of what a draft has shown
ALIKE = 0.95  # a draft that reaches this share of the best rate is as good, if it knows more


@dataclass(frozen=True, slots=True)
class Candidate:
    """A draft that could serve the request, and what is known of it."""

    costs: Costs  # with the requests that it has, and this one
    acceptance: float
    pipelined: bool = True  # else draft and target take turns
    link_s: float = 0.0  # for a message to the draft and back
    known: int = 0  # tokens of the request's text that it has read already
    rests: bool = False  # it has lost time lately

    def rate(self, doubt: float = 0.0) -> float:
        """Tokens per second if its acceptance is higher by `doubt`; at least the target alone's."""
        plain = 1 / float(self.costs.passes(0)[0])
        if self.rests and not doubt:
            return plain
        acceptance = price.rounded(self.acceptance + doubt)
        tokens = 1 / (1 - acceptance)
        if self.pipelined:
            # after each miss nothing comes until the draft has heard of it: plain steps meanwhile
            best = price.forecast(self.costs, acceptance, pipelined=True)
            return (tokens + self.link_s * plain) / (tokens / best + self.link_s)
        blocks = np.arange(LONGEST + 1.0)
        gain = (1 - acceptance ** (blocks + 1)) * tokens
        turn_s = np.where(blocks > 0, self.link_s, 0.0) + blocks * self.costs.draft_s
        return float((gain / (self.costs.rounds(acceptance**blocks) + turn_s)).max())


class Chooser(Generic[K]):
    """Chooses for one request after the other; drafts are known by a key of the caller's."""

    def __init__(self) -> None:
        self._requests = 0
        self._tried = 0  # the request that was the last trial
        self._served: dict[K, int] = {}  # by draft, the last request that it was chosen for

    def choose(
        self, drafts: Sequence[K], candidate: Callable[[K], Candidate], *, begins: bool
    ) -> K | None:
        """The best of them, or one that is tried where a request `begins`; None if there is none.

        One that takes over in the middle of a request is never tried.
        """
        self._requests += begins
        if not drafts:
            return None
        chosen = drafts[0]
        if len(drafts) > 1:
            chosen = self._best({one: candidate(one) for one in drafts}, begins)
        if begins:
            self._served[chosen] = self._requests
        return chosen

    def _best(self, candidates: Mapping[K, Candidate], begins: bool) -> K:
        rates = {key: one.rate() for key, one in candidates.items()}
        best = max(rates.values())
        alike = [key for key, rate in rates.items() if rate >= ALIKE * best]
        chosen = max(alike, key=lambda key: (candidates[key].known, rates[key]))
        if begins and self._requests - self._tried >= TRIAL_EACH:
            hoped = {key: one.rate(self._doubt(key)) for key, one in candidates.items()}
            hope = max(hoped, key=lambda key: hoped[key])
            if hope != chosen and hoped[hope] > best:
                self._tried = self._requests
                return hope
        return chosen

    def forget(self, key: K) -> None:
        """This draft has gone."""
        self._served.pop(key, None)

    def _doubt(self, key: K) -> float:
        """By how much its acceptance may be higher than is known."""
        since = self._requests - self._served.get(key, -FORGOTTEN)
        return DOUBT * min(1.0, since / FORGOTTEN)
