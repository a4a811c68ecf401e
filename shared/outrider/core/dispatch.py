"""What the target is asked for, and when: its next block, and those behind it.

The rule says how many drafted tokens a block has, or that waiting for more is better. Here it is
decided when to ask: if the target is idle at once, else in time for it never to be (`pace`). What
becomes of an order that was sent ahead is told in `orders`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from outrider.core.answer import Answer
from outrider.core.draft_record import DraftRecord, DraftState
from outrider.core.orders import Orders
from outrider.core.pace import LEAST_REACH, MOST_AHEAD, MOST_STEPS, TURN_STEPS, Pace, reach
from outrider.core.rules import Rule
from outrider.core.stock import Stock
from outrider.core.values import Beside, Block, Side, TokenId, Verdict, Verify, ids_of

BLOCK_PATIENCE_S = 2.0  # longest wait for a block that is sent as a whole


class Situation(Protocol):
    """What a session knows."""

    rule: Rule
    answer: Answer
    tokens: list[TokenId]
    stock: Stock
    draft: DraftRecord

    @property
    def has_ended(self) -> bool:
        """Whether the stock ends with an end token, behind which the draft does not go on."""

    @property
    def takes_turns(self) -> bool:
        """Whether its draft drafts while the target is idle."""


class Next(NamedTuple):
    """What to ask for now, and when to look again."""

    orders: list[Verify]
    deadline: float | None = None


class Dispatch:
    """The orders of one request; times are seconds on the session's clock."""

    def __init__(self, situation: Situation) -> None:
        self.orders, self.pace = Orders(), Pace()
        self.round = -1  # of the latest order
        self.together: Iterable[Situation] = ()  # all that the target works for
        self.is_reading = False  # the target reads the whole text, and has chosen nothing yet
        self.side: Side | None = None  # on which the last verdict ended
        self._wanted = 0  # position up to which the draft was wanted
        self._now = situation

    def begin(self) -> int:
        """The target is to read the text and to choose the token behind it: in which round."""
        self.round += 1
        self.is_reading, self._wanted = True, len(self._now.tokens)
        self.orders.add(Verify(self.round, len(self._now.tokens), ()))
        return self.round

    def lost(self) -> None:
        """The target is, or it has lost the thread, and with it all that it was to do."""
        self.orders = Orders()

    # ---- what is asked for ----------------------------------------------------------------------

    def next(self, now: float, is_idle: bool) -> Next:
        """What to ask the target for, which is idle or not."""
        found: list[Verify] = []
        deadline = None
        if is_idle:
            found, deadline = self._first(now)
        elif renewed := self._renewed():
            found.append(renewed)
        while deadline is None and (found or not is_idle):
            more, deadline = self._behind(now)
            if not more:
                break
            found += more
        return Next(found, deadline)

    def _first(self, now: float) -> Next:
        """A block for the target, which is idle, unless the rule waits for the draft."""
        draft, rule, drafted = self._now.draft, self._now.rule, self._now.stock.drafted
        confidences = [one.confidence for one in drafted]
        block = rule.decide(confidences, self._now.answer.room - 1, self._next_s(now))
        if block is None:
            block_s = rule.block_s(len(self._now.tokens) - draft.read)
            return Next([], now + min(draft.patience_s + block_s, BLOCK_PATIENCE_S))
        order = self._made(0, block, is_first=True)
        self.pace.asked(order.round, now, order.rows)
        return Next([order])

    def _behind(self, now: float) -> Next:
        """A block behind those that were ordered, if it is time for one and there is something.

        It begins with the token that the target is expected to choose itself before it.
        """
        rule, pace, waiting = self._now.rule, self.pace, self.orders.waiting
        if rule.mode != "pipelined" or not self._now.draft.rides or self.is_reading:
            return Next([])
        if len(waiting) >= MOST_AHEAD or (waiting and not pace.is_far):
            return Next([])
        drafted, begin = self._now.stock.drafted, self._end - len(self._now.tokens)
        behind, room = drafted[begin + 1 :], self._now.answer.room - begin - 2
        if not behind or room < 1 or reach(drafted[: begin + 1]) < LEAST_REACH:
            return Next([])
        if now < pace.due:
            return Next([], pace.due)
        block = rule.decide([one.confidence for one in behind], room, self._next_s(now))
        if not block:
            return Next([])  # the next token, or the verdict, comes before
        order = self._made(begin, block + 1)
        pace.asked_more(order.round, now, block + 1)
        return Next([order])

    @property
    def _end(self) -> int:
        """The position behind all that was ordered."""
        last = self.orders.waiting[-1] if self.orders.waiting else None
        return last.base + len(last.drafted) if last else len(self._now.tokens)

    def _next_s(self, now: float) -> float | None:
        """In how many seconds the next drafted token is expected; None: none can come."""
        draft, stock = self._now.draft, self._now.stock
        if draft.state is not DraftState.DRAFTING or self._now.has_ended:
            return None
        return max(0.0, draft.next_at - now) if len(stock) < self._now.answer.room - 1 else None

    def _made(self, begin: int, count: int, is_first: bool = False) -> Verify:
        """The order for `count` tokens of the stock, from the one at `begin` on.

        `is_first`: it is begun at once. Others have no sides, as their first token may be decided.
        """
        base = len(self._now.tokens) + begin
        drafted = ids_of(self._now.stock.drafted[begin : begin + count])
        self.round += 1
        is_last = begin + count >= len(self._now.stock)
        until = self._leave(base + count + 1, is_last)
        sides = self._beside(base, count) if is_first else ()
        order = Verify(self.round, base, drafted, bool(self.orders.waiting), until, sides)
        self.orders.add(order)
        return order

    def _beside(self, base: int, count: int) -> Beside:
        """What to verify beside the first `count` tokens of the stock; those are not ahead."""
        stock, end = self._now.stock, base + self._now.answer.room - 1
        sides = tuple(
            side.changed(drafted=side.drafted[: end - side.place])
            for side in stock.sides
            if base <= side.place < min(base + count, end)
        )
        confidences = [one.confidence for one in stock.drafted[:count]]
        return self._now.rule.beside(confidences, base, sides) if sides else ()

    def lead(self, busy: bool) -> int:
        """How far ahead of the text the draft may run: farther if blocks are long on their way."""
        lead = self._now.rule.lead(busy)
        if self._now.rule.mode != "pipelined" or not self.pace.is_far:
            return lead
        return lead + lead * self.pace.passes_away // 2

    # ---- the target's own steps -----------------------------------------------------------------

    def _leave(self, end: int, is_last: bool = True) -> int:
        """How far the target may go on by itself behind position `end`; 0: not at all.

        `is_last`: nothing is in stock to follow there.
        """
        steps = self._steps(is_last)
        return min(end + steps, len(self._now.tokens) + self._now.answer.room) if steps else 0

    def _renewed(self) -> Verify | None:
        """More leave for a target that takes plain steps, before it comes to the end of them.

        As an order this is done when it is read: the step that it asks for has begun.
        """
        text, orders = len(self._now.tokens), self.orders
        if orders.waiting or orders.until - text > self.pace.steps // 2:
            return None
        if self._may_turn and not self.pace.is_far:
            return None
        until = self._leave(text + 1)
        if until <= orders.until:
            return None
        self.round += 1
        orders.extend(until)
        return Verify(self.round, text, (), False, until)

    @property
    def _may_turn(self) -> bool:
        """Whether the draft may want the target's device, which it shares."""
        state = self._now.draft.state
        return self._now.rule.mode == "sync" and state is not DraftState.ABSENT

    def _steps(self, is_last: bool) -> int:
        """How many plain steps the target may take by itself where it has no order left."""
        draft, rule, pace = self._now.draft, self._now.rule, self.pace
        rests = not draft.rides or not rule.drafts
        self._wanted = self._wanted if rests else len(self._now.tokens)
        if any(one.takes_turns for one in self.together if one is not self._now):
            return 0  # the target must fall idle, so that their drafts have their turns
        if self._may_turn:  # the longer it rests, the less a message more or less matters to it
            rested = len(self._now.tokens) - self._wanted
            return min(TURN_STEPS + rested // 4, MOST_STEPS) if rests else 0
        if rests or draft.state is DraftState.LATE or rule.is_silent:
            return pace.steps if is_last else 0
        # after a miss: what the draft begins anew may be worth waiting for, messages included
        return pace.steps if pace.is_far and rule.goes_on(pace.trip_s or 0.0) else 0

    # ---- what comes of it -----------------------------------------------------------------------

    def answered(self, verdict: Verdict) -> Block | None:
        """What the verdict is on; None: it is late, or no target that keeps the rules made it.

        Of a block with sides, those tokens that lie where the target has gone: see `side`.
        """
        if verdict.base != len(self._now.tokens):
            return None
        drafted = self.orders.answered(verdict.round, self._now.tokens)
        side = self.side = self.orders.side(verdict.side)
        if drafted is None or not verdict.side:
            return drafted
        return (*drafted[: side.place - verdict.base], *ids_of(side.drafted)) if side else ()

    def committed(self, is_whole: bool, now: float) -> bool:
        """The verdict is part of the text now; return whether the target has gone on by itself.

        `is_whole`: the whole block was accepted.
        """
        self.is_reading = False
        text, orders = self._now.tokens, self.orders
        orders.judged(is_whole)
        if not orders.goes_on(text):
            return False
        self.pace.goes_on(now, orders.rows(text))
        return True
