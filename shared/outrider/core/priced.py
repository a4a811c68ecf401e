"""The rule that answers from measured costs, and from the acceptance that confidences foretell.

See `price` and `stopping` for what it decides, `reading` and `promise` for what a draft may read
where that takes the target's time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from outrider.core import beside, price, reading, stopping
from outrider.core.estimates import LONGEST, Acceptance, Spread
from outrider.core.experience import Experience
from outrider.core.plain_step import by_itself
from outrider.core.promise import LATELY, Promise
from outrider.core.reading import UNKNOWN, Held, Reading
from outrider.core.rules import Rule
from outrider.core.values import Beside

PRIOR = 6.0  # drafted tokens that the spread on other texts counts for
IDLE = 6  # plain steps after which a draft on shared cores is dismissed
JUDGED = 40  # tokens of other texts, without which nothing is known of the draft
KNOWN = 0.08  # of a plain step: a smaller gain that is expected is none
PLENTY = 0.2  # … and with one on other texts nobody waits until this one itself tells
SILENCED = 0.2  # what one more place counts for where a draft was asked for an idea


class PricedRule(Rule):
    """Answers from the price of time: no block length is tuned, `n_max` only bounds it.

    Observations also go to the `experience` that all requests share; they count after `settle`.
    """

    def __init__(
        self,
        mode: Literal["sync", "pipelined"],
        n_max: int,
        experience: Experience,
        shares: bool = True,
    ) -> None:
        """`shares`: where draft and target take turns they do so on one device."""
        self._pays = shares and mode == "sync"  # for what the draft reads, with the target's time
        self.mode, self._n_max, self._experience = mode, n_max, experience
        self._costs, self._guard = experience.costs, experience.guard
        self._acceptance = Acceptance(prior=experience.acceptance.average)
        self._spread = Spread(prior=experience.spread.weights, weight=PRIOR)
        self._promise = Promise(experience.promised, experience.spread.weights)
        self._context = 0  # tokens that the draft is to read before those that it recalls
        self._unseen = 0  # tokens that the draft has been told to read, as long as it has not
        self._tried = False  # whether it was
        self._spent = 0.0  # plain steps that reading took
        self._awaits = False  # it is still to recall, which decides whether it drafts
        self._idle = 0  # plain steps since the draft was of use
        self._silence = 0.0  # how often it had no idea lately
        self._settled, self._average = experience.costs.costs, -1.0  # of no solution yet
        experience.begin()
        self.settle()

    @property
    def drafts(self) -> bool:
        return not self._guard.resting

    def reads(
        self, text: int, written: int, room: int, busy: bool, held: Held = UNKNOWN
    ) -> Reading:
        """Everything where that costs the target nothing, else what can be paid for: `reading`."""
        found = Reading(text)
        if self._pays:
            found = reading.NOTHING if busy else self._affordable(text, written, room, held)
            if not found.tokens:
                return found
            self._guard.expect(self._experience.lengths.left(written, room))
            self._rely()
        self._context = found.tokens - found.recall
        self._unseen, self._tried = found.unread, True
        self._awaits, self._idle = found.recall > 0, 0
        return found

    def _affordable(self, text: int, written: int, room: int, held: Held) -> Reading:
        """What the draft can read of the text for what it is expected to save."""
        experience, promised = self._experience, self._promised
        left, step_s = experience.lengths.left(written, room), experience.step_s
        # once tried on this text, it must show there that it agrees
        known = experience.judged >= JUDGED and not self._tried
        saved = self._saved if promised is None else promised
        if promised is None and self._promise.said:  # it soon will be known
            knows = known and saved > PLENTY
            waits = not knows
        else:
            knows = known and saved > KNOWN
            waits = promised is not None and promised <= KNOWN and written < LATELY
        tries = experience.untried, experience.failures, promised
        budget = reading.budget(left, saved if knows else 0.0, *tries)
        budget_s = min((budget - self._spent) * step_s, reading.LONGEST_S)
        if waits or budget_s <= 0 or experience.is_hopeless:
            return reading.NOTHING
        promises = (promised or 0.0) > KNOWN
        each_s = self._costs.read_s
        return reading.chosen(text, written, budget_s, each_s, knows, held, promises)

    def recalled(self, choices: Sequence[tuple[bool, float]], elapsed_s: float) -> None:
        if not self._awaits:
            return
        for good, confidence in choices:
            self.observe(good, confidence)
        self._rely()
        likely = self._experience.acceptance.of([confidence for _, confidence in choices])
        for spread in (self._spread, self._experience.spread):
            spread.observe(likely)
        self._has_read(elapsed_s)
        self._awaits = False
        self.settle()
        promised = self._promised
        pays = (self._saved if promised is None else promised) > KNOWN
        self._experience.tried(bool(choices) and pays)

    def _rely(self) -> None:
        """Expect of the draft what this text foretells, if it does, not what others were like."""
        if self._promise.is_known:
            self._spread = Spread(prior=self._promise.weights)

    @property
    def _promised(self) -> float | None:
        """What this text foretells that a draft saves, as `_saved`; None: not enough was said."""
        return self._promise.saved(self._settled) if self._promise.is_known else None

    @property
    def _saved(self) -> float:
        """What the draft is expected to save of each token's time, as a share of a plain step."""
        return 1 - 1 / (self._turn.rate * float(self._settled.passes(0)[0]))

    def _has_read(self, elapsed_s: float) -> None:
        """Reading the text took `elapsed_s`, and was paid for beforehand if that was waited for."""
        self._costs.read(elapsed_s / max(1, self._unseen))
        self._experience.prompt_steps = elapsed_s / self._costs.costs.verify_s[0]
        if self.mode == "sync":
            self._guard.excuse(self._experience.prompt_steps)
        self._spent += self._experience.prompt_steps
        self._unseen = 0

    @property
    def awaits_reading(self) -> bool:
        """Pipelined: if that is sooner than a plain step, for a long text takes seconds to read."""
        costs = self._costs.costs
        reading_s = self._unseen * self._costs.read_s
        return self.mode == "sync" or reading_s + costs.draft_s < costs.verify_s[0]

    @property
    def dismisses(self) -> bool:
        """What it would read meanwhile is lost if it does not draft again."""
        return self._pays and (self._guard.resting or self._idle >= IDLE)

    def ended(self, written: int) -> None:
        self._experience.lengths.ended(written)

    def lead(self, busy: bool) -> int:
        """In sync mode one block, and only while the target is idle.

        Pipelined: as far as makes a difference, counted from the end of the block being verified.
        """
        if self._guard.resting or self._awaits or (self.mode == "sync" and busy):
            return 0
        if self.mode == "sync":
            return min(LONGEST, self._n_max)
        block = LONGEST + 1 if busy else 0
        return min(block + price.DEEPEST, 2 * self._n_max + 2)

    @property
    def floors(self) -> tuple[float, ...]:
        """In sync mode the draft stops by itself: asking first would cost it a pair of messages."""
        if self.mode != "sync":
            return ()
        floors = self._turn.floors
        trust = max(self._experience.acceptance.trust, 0.1)
        return tuple(floor / trust ** (n + 1) for n, floor in enumerate(floors))

    def block_s(self, behind: int) -> float:
        if self.mode != "sync":
            return 0.0
        return LONGEST * self._costs.costs.draft_s + 2 * behind * self._costs.read_s

    def decide(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        block = self._block(confidences, limit, next_s)
        if block is not None:
            self._idle = 0 if block or self._unseen else self._idle + 1
        return block

    def _block(self, confidences: Sequence[float], limit: int, next_s: float | None) -> int | None:
        if self._guard.resting:
            return 0
        if self._awaits and next_s is not None:
            return None
        if self.is_silent and not len(confidences):
            next_s = None  # nobody waits for an idea that hardly ever comes
        limit = max(0, min(limit, self._n_max))
        likely, costs = self._experience.acceptance.of(confidences), self._settled
        if self.mode == "pipelined":
            if next_s is not None and self._costs.crowd > 1:
                # the others' pass begins without it: who waits for a token waits for the next pass
                next_s = max(next_s, costs.verify_s[0])
            return price.plan(costs, self._average, likely, limit, next_s)
        block = stopping.plan(costs, self._turn, likely, limit)
        could = next_s is not None and limit and not len(confidences)
        if could and self._experience.probes(block):
            block = None
        return min(len(likely), limit) if block is None and next_s is None else block

    def beside(self, confidences: Sequence[float], base: int, sides: Beside) -> Beside:
        if self.mode != "pipelined" or self._costs.crowd > 1:
            return ()  # of several requests each would choose as if all rows were its own
        costs, acceptance = self._settled, price.rounded(self._average)
        likely = self._experience.acceptance.of(confidences).tolist()
        return beside.chosen(costs, price.solve(costs, acceptance)[0], likely, base, sides)

    def offered(self, is_some: bool) -> None:
        self._silence += SILENCED * ((not is_some) - self._silence)

    @property
    def is_silent(self) -> bool:
        """What it drafts while the target goes on comes behind."""
        return self.mode == "pipelined" and self._silence > 0.5

    def goes_on(self, away_s: float) -> bool:
        costs = self._settled
        if self._guard.resting or self.mode != "pipelined" or self.is_silent:
            return True
        if self._costs.crowd > 1:
            away_s = max(away_s, costs.verify_s[0])  # the others' pass begins without it
        return not price.waits(costs, self._average, self._n_max, away_s)

    def settle(self) -> None:
        before, self._settled = self._settled, self._costs.costs
        costs = self._settled
        if self.mode == "pipelined":
            average, self._average = self._average, price.rounded(self._acceptance.average)
            if costs is not before or average != self._average:
                # with any stock: this only fills the caches of the solution and the tables
                price.appraise(costs, self._average, np.ones(1), LONGEST)
        else:
            self._turn = stopping.solve(costs, self._spread.steady)

    def observe(self, good: bool, confidence: float) -> None:
        self._acceptance.observe(good, confidence)
        self._experience.acceptance.observe(good, confidence)
        self._experience.judged += 1
        self._promise.judged(good, self._context)
        self._context += 1

    def verified(
        self,
        rows: int,
        elapsed_s: float,
        round_trip_s: float,
        requests: int = 1,
        beside: float = 0.0,
    ) -> None:
        experience, plain = self._experience, self._experience.plain
        quiet = self.drag**-beside  # what a draft adds is in the drag alone
        self._costs.verified(rows, quiet * elapsed_s, quiet * round_trip_s, requests)
        plain.passed(beside)
        experience.waited(round_trip_s - elapsed_s)
        if rows == requests:
            experience.stepped(by_itself(elapsed_s, round_trip_s), requests, beside)
        if requests > 1 or self.mode != "pipelined" or self._guard.resting:
            return
        rate, _ = price.solve(self._settled, self._average)
        # over a target alone that is as far away
        experience.foretold(rate * float(self._settled.passes(0)[0]) / plain.drag)

    @property
    def drag(self) -> float:
        return self._experience.plain.drag

    def said(self, margins: Sequence[float]) -> None:
        if self._pays:  # else a draft reads whatever is promised
            self._promise.observe(margins)

    def committed(self, tokens: int, spent_s: float | None) -> None:
        experience = self._experience
        spent_s = tokens * experience.step_s if spent_s is None else spent_s
        self._guard.committed(tokens, spent_s, experience.step_s, experience.away_s)
        self._experience.untried += tokens if self.dismisses or not self._tried else 0

    def drafted(
        self,
        each_s: float | None,
        confidences: Sequence[float],
        turn_s: float | None,
        requests: int = 1,
    ) -> None:
        if each_s is None:
            pass
        elif not self._unseen:
            in_turns = self.mode == "sync"
            turn_s = turn_s if in_turns else None
            self._costs.drafted(each_s, len(confidences), turn_s, requests)
        else:  # the first proposal includes reading the text
            draft_s = self._costs.costs.draft_s
            self._has_read(max(0.0, each_s - draft_s) * len(confidences))
        likely = self._experience.acceptance.of(confidences)
        for spread in (self._spread, self._experience.spread):
            spread.observe(likely)
