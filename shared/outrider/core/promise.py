"""How often a draft would agree, foretold by how sure the target was of what it has said.

By how much each of its tokens won, in logits, the target tells with every verdict. Where it is
sure, a smaller model of its kind mostly chooses the same. So an answer shows what drafting would
bring before a draft has read any of it, and at no cost. How often this draft agrees less than is
foretold is learnt from each of its tokens that is compared with the target's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from outrider.core import stopping
from outrider.core.estimates import Costs, Spread, Trust

# How often the draft of the default pair agreed where a token won by such a margin, in logits:
# greedy, 3,856 tokens, the 18 prompts of `outrider bench`. Over single answers, what is foretold
# was at most 0.09 off what came true (tests/sim/prompt-traces.json holds both).
MARGINS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 4.5, 5.5, 7.0, 9.0)
AGREED = (0.355, 0.45, 0.565, 0.69, 0.84, 0.925, 0.975, 0.99, 0.99, 0.995)
UNTOLD = -1.0  # the margin of a token of which none is known
LEAST = 32  # tokens that must have been said: fewer foretell little
LATELY = 64  # tokens that count
EVERY, STEP = 8, 0.05  # tokens, and trust: for less, nothing is worked out anew: it takes 5 ms
PRIOR = 6.0  # tokens that what is known of other texts counts for
# a draft that has read so many tokens before one agrees with it so much less often than one that
# has read all: default pair, 1,152 tokens, 16 at a time
CONTEXT, SIGHT = (8, 24, 48, 200), (0.67, 0.8, 0.88, 1.0)


def agreement(margin: float) -> float:
    """How often a draft agrees with a token that won by `margin` logits, by the table above."""
    return float(np.interp(margin, MARGINS, AGREED))


def sight(context: int) -> float:
    """How often a draft that knows `context` tokens agrees, as a share of one that knows all."""
    return float(np.interp(context, CONTEXT, SIGHT))


class Promise:
    """That of one answer. `trust` is what all answers of a service have learnt of the draft."""

    def __init__(self, trust: Trust, prior: Sequence[float]) -> None:
        """`prior`: how acceptances were spread on other texts."""
        self._trust, self._prior = trust, prior
        self._foretold: deque[float] = deque(maxlen=LATELY)
        self._held = (0.0,) * len(prior)  # the weights, kept while they are off by little …
        self._held_at = -1, 0.0  # … when so much was said, with so much trust
        self.said = 0

    def observe(self, margins: Sequence[float]) -> None:
        """The target has said tokens that won by these margins."""
        told = [margin for margin in margins if margin >= 0]
        self.said += len(told)
        self._foretold.extend(map(agreement, told))

    def judged(self, good: bool, context: int) -> None:
        """A token of the draft, which knew `context` before it, was the target's or not."""
        if self.is_known:
            average = sum(self._foretold) / len(self._foretold)
            self._trust.observe(good, average * sight(context))

    @property
    def is_known(self) -> bool:
        """Whether enough was said, by a target that tells by how much its tokens won."""
        return self.said >= LEAST

    @property
    def weights(self) -> tuple[float, ...]:
        """How the acceptances of a draft on this text are expected to be spread."""
        share = round(self._trust.share / STEP) * STEP
        at = self.said // EVERY, share
        if self._held_at != at:
            spread = Spread(prior=self._prior, weight=PRIOR)
            spread.observe(share * likely for likely in self._foretold)
            pairs = zip(spread.weights, self._held, strict=True)
            if sum(abs(weight - held) for weight, held in pairs) > Spread.OFF:
                self._held = spread.weights
            self._held_at = at
        return self._held

    def saved(self, costs: Costs) -> float:
        """What a draft is expected to save of each token's time, as a share of a plain step."""
        rate = stopping.solve(costs, self.weights).rate
        return 1 - 1 / (rate * float(costs.passes(0)[0]))
