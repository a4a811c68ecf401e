"""Sides: what a target verifies beside a block, for the case that the block is wrong."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
from tests.oracle import alone

from outrider.core import beside, decoding
from outrider.core.branches import Branches, Found, Ranks
from outrider.core.engine import Fork, Part
from outrider.core.estimates import Costs, usual_acceptance, usual_confidence
from outrider.core.events import Commit, OpenDraft, Prefill
from outrider.core.orders import Orders
from outrider.core.sampling import Sampling
from outrider.core.stock import Stock
from outrider.core.stream import Begun, Stream
from outrider.core.values import Drafted, Proposal, Side, Sides, TokenId, Verdict, Verify
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.wire import messages as wire
from outrider_services.pipeline.target_worker import TargetWorker
from outrider_services.pipeline.worker import Measured

FLAT = Costs((0.1,) * 16, 0.01, 0.0)
DEAR = Costs(tuple(0.1 * rows for rows in range(1, 17)), 0.01, 0.0)
RATE = 20.0  # tokens a second


def side(place: int, *tokens: TokenId, share: float = 0.5) -> Side:
    return Side(place, (Drafted(tokens[0], share), *(Drafted(one, 0.9) for one in tokens[1:])))


# ---- which are worth their rows -----------------------------------------------------------------


def test_where_rows_are_free_as_many_are_taken_as_were_measured() -> None:
    sides = tuple(side(10 + at, *range(9)) for at in range(4))
    taken = beside.chosen(FLAT, RATE, [0.8] * 4, 10, sides)
    assert sum(len(one.drafted) for one in taken) == 16 - 1 - 4
    assert {one.place for one in taken} <= {10, 11, 12, 13}


def test_the_likeliest_of_use_come_first() -> None:
    few = Costs((0.1,) * 4, 0.01, 0.0)  # room for one row beside a block of two
    sides = side(10, 5, share=0.2), side(11, 6, share=0.6)
    assert beside.chosen(few, RATE, [0.8, 0.5], 10, sides) == (sides[1],)


def test_where_rows_are_dear_none_is_taken() -> None:
    assert beside.chosen(DEAR, RATE, [0.8] * 4, 10, (side(10, 5, 6),)) == ()


def test_a_side_is_cut_where_its_tokens_are_not_worth_their_rows() -> None:
    """Each row costs 0.05 tokens: the third token of the side is of use less often."""
    rising = Costs(tuple(0.1 + 0.0025 * rows for rows in range(16)), 0.01, 0.0)
    unsure = Side(10, (Drafted(5, 0.5), *(Drafted(6, usual_confidence(0.4)) for _ in range(3))))
    (taken,) = beside.chosen(rising, RATE, [0.5], 10, (unsure,))
    value = 0.5 * 0.5
    assert value * usual_acceptance(usual_confidence(0.4)) > 0.05
    assert taken.drafted == unsure.drafted[:2]


@pytest.mark.parametrize("place", [9, 12])
def test_one_at_no_place_of_the_block_is_not(place: int) -> None:
    assert beside.chosen(FLAT, RATE, [0.8] * 2, 10, (side(place, 5),)) == ()


# ---- where a verdict leads ----------------------------------------------------------------------


def test_a_correction_leads_onto_its_side_and_no_other() -> None:
    sides = side(11, 7, 8), side(11, 5, 6), side(10, 5)
    verdict = decoding.verify((1, 2, 3), (1, 5))
    assert decoding.leads_to(verdict, 10, (1, 2, 3), sides) == 2
    both = decoding.joined(verdict, decoding.verify((6,), (6, 9)), 2)
    assert (both.accepted, both.tokens, both.side) == (3, (1, 5, 6, 9), 2)
    whole = both.changed(base=10, pieces=(b"",) * 4, margins=(0.0,) * 4)
    assert decoding.contradiction(whole, (1, 5, 6), frozenset(), 100, sides[1]) is None


@pytest.mark.parametrize(
    ("verdict", "taken"),
    [
        (Verdict(0, (9,), side=3), None),
        (Verdict(1, (1, 9), base=10, side=1), side(11, 5, 6)),
        (Verdict(2, (1, 5, 9), base=10, side=1, forbidden=1), side(11, 5, 6)),
    ],
)
def test_a_side_where_the_target_cannot_have_gone_breaks_the_rules(
    verdict: Verdict, taken: Side | None
) -> None:
    told = verdict.changed(
        pieces=(b"",) * len(verdict.tokens), margins=(0.0,) * len(verdict.tokens)
    )
    drafted = (1, 5, 6) if taken else ()
    assert "a side" in (decoding.contradiction(told, drafted, frozenset(), 100, taken) or "")


def test_a_bonus_leads_nowhere() -> None:
    verdict = decoding.verify((1, 2), (1, 2, 5))
    assert decoding.leads_to(verdict, 10, (1, 2), (side(12, 5, 6),)) == 0


def test_what_is_left_of_an_order_has_the_sides_that_are_left() -> None:
    orders = Orders()
    orders.add(Verify(0, 10, (1, 2, 3), sides=(side(10, 7), side(12, 8, 9))))
    text = list(range(100, 110))
    assert orders.take([*text, 1]) == (2, 3)
    assert orders.sides == (side(12, 8, 9),)
    assert orders.side(1) == side(12, 8, 9)
    assert orders.side(0) is orders.side(2) is None
    assert orders.take([*text, 1]) is None
    assert not orders.sides


# ---- the session's and the draft's halves -------------------------------------------------------


def test_a_side_that_was_right_ends_the_lineage_where_it_begins() -> None:
    stock, text = Stock(), [*range(100, 110)]
    stock.open(text)
    stock.take(Proposal(1, 10, tuple(Drafted(one, 0.9) for one in (1, 2, 3, 4)), 0.0), text)
    taken = side(11, 5, 6)
    stock.take_sides(Sides(1, (taken,)))
    assert stock.way(3, 10, taken) == (Drafted(1, 0.9), *taken.drafted)
    text += [1, 5, 6, 7]
    judged = stock.commit(3, Verdict(3, (1, 5, 6, 7), side=1), text, taken)
    assert [one.token for one in judged.agreed] == [1]
    assert judged.differed == Drafted(2, 0.9)
    assert (judged.discarded, stock.drafted, stock.sides, stock.lineage) == (1, [], (), 2)


def test_sides_of_a_lineage_that_is_over_are_of_no_use() -> None:
    stock = Stock()
    stock.open((1, 2))
    stock.take_sides(Sides(1, (side(2, 5),)))
    stock.take_sides(Sides(0, (side(2, 6),)))
    assert stock.sides == (side(2, 5),)
    assert stock.may_tell(Sides(1, (side(2, 5),)), 6)
    assert not stock.may_tell(Sides(1, (side(2, 6),)), 6)
    assert not stock.may_tell(Sides(2, ()), 6)


def test_the_draft_follows_onto_the_branch_behind_what_the_side_has_brought() -> None:
    order = OpenDraft(1, 3, (1, 2, 3), Sampling(), 100, (), 20, foresees=True, sides=5)
    made = Stream.opened(order, 100)
    made.branches = Branches(Ranks())
    begun = Begun(made.lineage, made.read, tuple(made.tokens), True)
    assert made.took(begun, 3, [Drafted(10, 0.4)], (11, 12))
    branch = next(one for _, one in made.candidates(100) if one.correction == 11)
    for token in (20, 21, 22):
        made.branches.grow(branch, Found(Drafted(token, 0.9)))
    told = made.news()
    assert told
    assert [one.token for one in told.sides[0].drafted] == [11, 20, 21, 22]
    assert [one.drafted[0].token for one in told.sides] == [11, 12]
    assert made.news() is None  # nothing has changed
    assert made.commit(Commit(3, (11, 20), 20), 100)
    assert made.tokens == [1, 2, 3, 11, 20, 21, 22]
    assert [one.token for one in made.foreseen] == [21, 22]


# ---- a made-up model ----------------------------------------------------------------------------

TEXT = tuple(b"the old river runs ")


def test_a_fork_is_scored_as_its_text_is() -> None:
    engine = ToyEngine(ToySettings(spare=2))
    engine.extend(0, TEXT, 0)
    forks = Fork(4, len(TEXT), tuple(b"xy")), Fork(5, len(TEXT) + 2, tuple(b"z"))
    (rows,) = engine.extend_all([Part(0, tuple(b"abc"), 3, forks)])
    found = rows.copy()
    for text, row in ((b"a", 0), (b"abc", 2), (b"x", 3), (b"xy", 4), (b"abz", 5)):
        engine.rewind(1, 0)
        (alone_row,) = engine.extend(1, (*TEXT, *text), 1)
        assert (alone_row == found[row]).all()
    assert engine.length(0) == len(TEXT) + 3
    assert (engine.length(4), engine.length(5)) == (len(TEXT) + 2, len(TEXT) + 3)
    for bad in (Fork(3, len(TEXT), (1,)), Fork(4, 2, (1,)), Fork(4, len(TEXT) + 9, (1,))):
        with pytest.raises(ValueError, match=r"fork|spare"):
            engine.extend_all([Part(0, tuple(b"abc"), 3, (bad,))])


class Target:
    """A target worker with one request, asked block by block."""

    def __init__(self, owner: ThreadPoolExecutor, sampling: Sampling, spare: int = 4) -> None:
        self.engine = ToyEngine(ToySettings(spare=spare))
        self.worker = TargetWorker(self.engine, owner, Measured((0.1,)))
        self.sent: list[wire.Message] = []
        self.round, self.text = 0, list(TEXT)
        setattr(self.worker, "send", self.sent.append)  # noqa: B010
        self.worker.handle(wire.Do(1, Prefill(TEXT, sampling, logprobs=True)))

    async def verdict(self) -> Verdict:
        self.sent.clear()
        while await self.worker.compute():
            pass
        (said,) = self.sent
        assert isinstance(said, wire.Done), said
        assert isinstance(said.done, Verdict)
        self.text += said.done.tokens
        return said.done

    async def verify(self, drafted: Sequence[TokenId], *sides: Side) -> Verdict:
        self.round += 1
        order = Verify(self.round, len(self.text), tuple(drafted), sides=sides)
        self.worker.handle(wire.Do(1, order))
        return await self.verdict()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.0, seed=3)])
async def test_with_sides_of_every_kind_the_text_is_the_targets_own(sampling: Sampling) -> None:
    """Right and wrong blocks, with sides at each place that are right for a while, or wrong."""
    chance, took = random.Random(1), 0
    ours = alone(ToyEngine(), list(TEXT), sampling)
    truth = [next(ours) for _ in range(400)]
    with ThreadPoolExecutor(1) as owner:
        target = Target(owner, sampling)
        await target.verdict()
        while (done := len(target.text) - len(TEXT)) < 360:
            block, right = chance.randint(1, 6), chance.randint(0, 6)
            drafted = [t if n < right else t ^ 1 for n, t in enumerate(truth[done : done + block])]
            sides = []
            for at in range(block):
                deep, good = chance.randint(1, 5), chance.randint(0, 5)
                tokens = truth[done + at : done + at + deep]
                tokens = [t if n < good else t ^ 3 for n, t in enumerate(tokens)]
                sides.append(side(len(target.text) + at, *tokens))
            chance.shuffle(sides)
            verdict = await target.verify(drafted, *sides)
            took += verdict.side > 0
            assert len(verdict.pieces) == len(verdict.margins) == len(verdict.tokens)
            assert verdict.logprobs is not None
            assert len(verdict.logprobs) == len(verdict.tokens)
            assert verdict.beside <= sum(len(one.drafted) for one in sides)
            end = len(target.text)
            assert target.text[len(TEXT) :] == truth[: end - len(TEXT)]
            assert end - 8 <= target.engine.length(0) < end
            assert not any(target.engine.length(slot) for slot in range(4, 8))
    assert took > 20


async def test_an_order_that_follows_a_block_is_void_where_a_side_was_right() -> None:
    """Also if the side has brought just as many tokens as the block has, and the next one agrees:
    the session has dropped it, and would take its verdict for one that breaks the rules."""
    ours = alone(ToyEngine(), list(TEXT), Sampling(temperature=0))
    truth = [next(ours) for _ in range(10)]
    with ThreadPoolExecutor(1) as owner:
        target = Target(owner, Sampling(temperature=0))
        await target.verdict()
        base = len(target.text)
        first = Verify(1, base, (truth[1] ^ 1, 1, 2), sides=(side(base, *truth[1:4]),))
        behind = Verify(2, base + 3, tuple(truth[4:8]), follows=True)
        for order in (first, behind):
            target.worker.handle(wire.Do(1, order))
        verdict = await target.verdict()
        assert (verdict.side, verdict.accepted) == (1, 3)
        assert target.text[len(TEXT) :] == truth[:5]
        assert not await target.worker.compute()


async def test_sides_without_a_spare_slot_are_left_out() -> None:
    with ThreadPoolExecutor(1) as owner:
        target = Target(owner, Sampling(temperature=0), spare=0)
        await target.verdict()
        verdict = await target.verify([1], side(len(target.text), 2))
    assert (verdict.beside, verdict.side) == (0, 0)


@pytest.mark.parametrize("place", [-1, 1, 5000])
async def test_a_side_outside_of_its_block_breaks_the_rules(place: int) -> None:
    with ThreadPoolExecutor(1) as owner:
        target = Target(owner, Sampling(temperature=0))
        await target.verdict()
        order = Verify(1, len(target.text), (1,), sides=(side(len(target.text) + place, 2),))
        target.worker.handle(wire.Do(1, order))
    (said,) = target.sent[1:]
    assert isinstance(said, wire.Failed)
