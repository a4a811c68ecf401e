"""The draft worker around a drafter that has no model at all, without sockets and without time.

The drafter knows a text by heart and proposes the next few tokens of it at once; what a test wants
to happen while it thinks, it does itself.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outrider.core.constraints import Constraint
from outrider.core.drafter import Drafter, DrafterInfo, Opening
from outrider.core.engine import Cancelled, EngineFault
from outrider.core.events import Commit, OpenDraft
from outrider.core.sampling import BadScores, Sampling
from outrider.core.values import Drafted, Proposal, TokenId, ids_of
from outrider.errors import BadRequest
from outrider.wire import messages as wire
from outrider_services.pipeline import draft_worker, worker
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.worker import Measured

SONG = tuple(range(100, 200))
SAMPLING = Sampling(temperature=0.0)
END = 150  # of the song, where a test says so


class Clock:
    """In the place of `time` in the worker's modules."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    monotonic = perf_counter


class ByHeart(Drafter):
    """Knows the song: after any of its tokens, the next `many` of it; after others, nothing."""

    token_s = 0.25
    read_s = 0.05
    crowd_s: tuple[float, ...] = ()
    info = DrafterInfo("by-heart", None, 500, 2, "memory")

    def __init__(self, clock: Clock, many: int = 3) -> None:
        self.clock, self.many = clock, many
        self.confidence = 0.9
        self.meanwhile: Callable[[], None] = lambda: None
        self.error: Exception | None = None
        self.wrong: tuple[TokenId, ...] = ()  # the beginning of the texts that it fails on; (): all
        self.texts: dict[int, int] = {}  # by slot: how much it has read
        self.opened: list[tuple[int, int]] = []
        self.asked: list[tuple[int, tuple[TokenId, ...]]] = []
        self.cuts: list[tuple[int, int]] = []
        self.is_cut = False
        self.farthest, self.bite = 10**6, 10**6  # what it goes back to, and reads at once, at most
        self.prepared: list[Constraint] = []
        self.preparing = threading.Event()  # a constraint is not prepared before this is set
        self.unknown: BadRequest | None = None  # it says so of any constraint
        self.held_to: list[tuple[Constraint | None, int]] = []

    def prepare(self, constraint: Constraint) -> None:
        self.prepared.append(constraint)
        self.preparing.wait(5)
        if self.unknown:
            raise self.unknown

    def open(self, slot: int, opening: Opening) -> None:
        sampling, vocabulary, skip, known, source, constraint, begins, *_ = opening
        assert sampling is SAMPLING
        if constraint and self.unknown:
            raise self.unknown
        self.held_to.append((constraint, begins))
        self.texts[slot] = max(skip, min(known, self.texts.get(source, 0)))
        self.opened.append((slot, vocabulary))

    def cut(self, slot: int, length: int) -> None:
        self.cuts.append((slot, length))
        if length < self.texts[slot]:
            self.texts[slot] = min(length, self.farthest)

    def read(self, slot: int) -> int:
        return self.texts[slot]

    def propose(self, slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        self.asked.append((slot, tuple(text)))
        self.clock.now += 1.0
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        if self.error and self.wrong in ((), tuple(text[: len(self.wrong)])):
            raise self.error
        if self.is_cut:
            self.is_cut = False
            raise Cancelled
        self.texts[slot] = min(len(text), self.texts[slot] + self.bite)
        if self.texts[slot] < len(text) or text[-1] not in SONG:
            return ()
        at = SONG.index(text[-1]) + 1
        return tuple(Drafted(token, self.confidence) for token in SONG[at : at + self.many])

    def propose_all(
        self, texts: Sequence[tuple[int, Sequence[TokenId]]]
    ) -> list[tuple[Drafted, ...]]:
        return [self.propose(slot, text) for slot, text in texts]

    def cancel(self) -> None:
        self.is_cut = True

    def recall(self, slot: int, text: Sequence[TokenId], count: int) -> tuple[Drafted, ...]:
        self.clock.now += 0.5
        if self.is_cut:
            self.is_cut = False
            raise Cancelled
        self.texts[slot] = len(text) - 1
        return tuple(Drafted(token, 0.5) for token in text[-count:])

    def label(self, token: TokenId) -> str:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Desk:
    """A draft worker, its drafter, and what it has sent."""

    def __init__(self, owner: ThreadPoolExecutor, clock: Clock) -> None:
        self.clock = clock
        self.drafter = ByHeart(clock)
        self.worker = DraftWorker(self.drafter, owner, Measured((0.25,)))
        self.sent: list[wire.Message] = []
        self.worker.send = self.sent.append  # type: ignore

    def open(
        self,
        request: int = 1,
        text: tuple[TokenId, ...] = SONG[:4],
        until: int = 10,
        floors: tuple[float, ...] = (),
        base: int | None = None,
        **more: Any,
    ) -> None:
        base = len(text) if base is None else base
        order = OpenDraft(1, base, text, SAMPLING, 200, (END,), until, floors, **more)
        self.worker.handle(wire.Do(request, order))

    def commit(
        self,
        base: int,
        tokens: tuple[TokenId, ...],
        until: int,
        floors: tuple[float, ...] = (),
        request: int = 1,
    ) -> None:
        self.worker.handle(wire.Do(request, Commit(base, tokens, until, floors)))

    async def work(self) -> list[wire.Message]:
        """Compute until there is nothing to do; what was sent for it."""
        before = len(self.sent)
        while await self.worker.compute():
            pass
        await asyncio.sleep(0)  # what the thread has posted
        return self.sent[before:]

    async def proposals(self) -> list[Proposal]:
        sent = await self.work()
        done = [message.done for message in sent if isinstance(message, wire.Done)]
        assert len(done) == len(sent), sent
        return [one for one in done if isinstance(one, Proposal)]


@pytest.fixture
async def desk(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    clock = Clock()
    monkeypatch.setattr(worker, "time", clock)
    monkeypatch.setattr(draft_worker, "time", clock)
    with ThreadPoolExecutor(1) as owner:
        yield Desk(owner, clock)


def tokens(proposals: list[Proposal]) -> list[tuple[int, tuple[TokenId, ...]]]:
    return [(one.position, ids_of(one.drafted)) for one in proposals]


# ---- drafting -----------------------------------------------------------------------------------


async def test_it_drafts_as_far_as_it_may_in_pieces_of_its_drafters(desk: Desk) -> None:
    desk.open(until=11)
    assert tokens(await desk.proposals()) == [
        (4, SONG[4:7]),
        (7, SONG[7:10]),
        (10, SONG[10:11]),  # it may not go further
    ]
    assert desk.drafter.opened == [(0, 200)]


async def test_an_opening_that_comes_twice_or_late_has_no_effect(desk: Desk) -> None:
    desk.open(until=6)
    assert tokens(await desk.proposals()) == [(4, SONG[4:6])]
    desk.commit(4, SONG[4:5], until=8)
    desk.open(until=6)
    assert tokens(await desk.proposals()) == [(6, SONG[6:8])]
    again = OpenDraft(2, 4, SONG[:4], SAMPLING, 200, (END,), 5)  # one of a later lineage has
    desk.worker.handle(wire.Do(1, again))
    assert tokens(await desk.proposals()) == [(4, SONG[4:5])]


async def test_each_says_how_long_it_took_and_that_it_goes_on(desk: Desk) -> None:
    desk.open()
    first, second = await desk.proposals()
    assert (first.lineage, first.elapsed_s, first.waited_s, first.paused) == (1, 1.0, 0.0, False)
    assert (second.lineage, second.elapsed_s, second.waited_s) == (1, 1.0, 0.0)
    assert [one.confidence for one in first.drafted] == [0.9] * 3


async def test_without_leave_it_computes_nothing(desk: Desk) -> None:
    desk.open(until=4)
    assert not await desk.worker.compute()
    desk.commit(4, (), 7)
    assert tokens(await desk.proposals()) == [(4, SONG[4:7])]


async def test_it_goes_on_where_the_target_agreed(desk: Desk) -> None:
    desk.open(until=7)
    await desk.proposals()
    desk.commit(4, SONG[4:6], 10)
    (more,) = await desk.proposals()
    assert (more.lineage, more.position, ids_of(more.drafted)) == (1, 7, SONG[7:10])
    desk.commit(6, SONG[6:12], 15)  # further than it has come itself
    (more,) = await desk.proposals()
    assert (more.lineage, more.position, ids_of(more.drafted)) == (1, 12, SONG[12:15])


async def test_where_the_target_said_something_else_a_lineage_begins(desk: Desk) -> None:
    desk.open(until=10)
    await desk.proposals()
    desk.commit(4, (SONG[4], SONG[40]), 9)
    (more,) = await desk.proposals()
    assert (more.lineage, more.position, ids_of(more.drafted)) == (2, 6, SONG[41:44])
    assert desk.drafter.asked[-1] == (0, (*SONG[:5], SONG[40]))
    assert desk.drafter.cuts[-1] == (0, 5)


async def test_a_drafter_that_goes_back_farther_than_asked_reads_again_and_drafts_on(
    desk: Desk,
) -> None:
    desk.open(text=SONG[:40], until=50)
    await desk.proposals()
    desk.drafter.farthest, desk.drafter.bite = 5, 16
    desk.commit(40, (SONG[40], SONG[60]), until=45)
    (proposal,) = await desk.proposals()
    assert ids_of(proposal.drafted) == SONG[61:64]
    assert [length for _, length in desk.drafter.cuts[-3:]] == [41, 21, 37]


async def test_a_commit_that_does_not_follow_is_not_believed(desk: Desk) -> None:
    desk.open(until=7)
    await desk.proposals()
    desk.commit(5, SONG[5:6], 30)
    desk.commit(4, SONG[4:5], 30, request=2)
    assert await desk.work() == []


async def test_it_drafts_nothing_behind_an_end_token(desk: Desk) -> None:
    desk.open(text=SONG[45:49], until=20)  # 150 is two on
    assert tokens(await desk.proposals()) == [(4, (149, END))]
    assert not await desk.worker.compute()


async def test_it_goes_on_from_tokens_that_are_not_committed_yet(desk: Desk) -> None:
    desk.open(text=SONG[:6], base=4, until=9)
    assert tokens(await desk.proposals()) == [(6, SONG[6:9])]
    desk.commit(4, (SONG[4], SONG[60]), 9)
    (more,) = await desk.proposals()
    assert (more.lineage, more.position, ids_of(more.drafted)) == (2, 6, SONG[61:64])


# ---- what happens while it thinks ---------------------------------------------------------------


@pytest.mark.parametrize("in_time", [True, False], ids=["cut-short", "too-late-to-be"])
async def test_what_the_target_contradicts_meanwhile_is_cut_short_and_never_sent(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, in_time: bool
) -> None:
    cancels: list[bool] = []

    def cancel() -> None:
        cancels.append(True)
        desk.drafter.is_cut = in_time

    monkeypatch.setattr(desk.drafter, "cancel", cancel)
    desk.open(until=7)
    await desk.proposals()
    desk.commit(4, (), 12)
    desk.drafter.meanwhile = lambda: desk.commit(4, (SONG[50],), 8)
    (only,) = await desk.proposals()
    assert (only.lineage, only.position, ids_of(only.drafted)) == (2, 5, SONG[51:54])
    assert cancels == [True]


async def test_leave_that_is_taken_back_meanwhile_cuts_it_short(desk: Desk) -> None:
    desk.open(until=9)
    desk.drafter.meanwhile = lambda: desk.commit(4, (), 4)
    assert await desk.work() == []
    assert desk.drafter.read(0) == 0


async def test_what_the_target_said_itself_meanwhile_is_not_sent(desk: Desk) -> None:
    desk.open(until=9)
    desk.drafter.meanwhile = lambda: desk.commit(4, SONG[4:6], 9)
    (only,) = await desk.proposals()
    assert (only.lineage, only.position, ids_of(only.drafted)) == (1, 6, SONG[6:9])


async def test_a_request_that_is_closed_meanwhile_is_heard_of_no_more(desk: Desk) -> None:
    desk.open()
    desk.drafter.meanwhile = lambda: desk.worker.handle(wire.Close(1))
    assert await desk.work() == []
    desk.open(2, until=6)  # the slot is free for another
    assert tokens(await desk.proposals()) == [(4, SONG[4:6])]
    assert [vocabulary for _, vocabulary in desk.drafter.opened] == [200, 200]


# ---- floors -------------------------------------------------------------------------------------


async def test_in_turns_all_that_was_drafted_is_sent_together(desk: Desk) -> None:
    desk.drafter.many = 2
    desk.open(until=9, floors=(0.1, 0.1, 0.1))
    (only,) = await desk.proposals()
    assert (only.position, ids_of(only.drafted)) == (4, SONG[4:9])
    assert (only.elapsed_s, only.paused) == (3.0, False)


async def test_it_pauses_where_it_falls_below_its_floor(desk: Desk) -> None:
    desk.drafter.confidence = 0.5  # which usually means 0.61
    desk.open(until=30, floors=(0.5, 0.5, 0.5))
    (only,) = await desk.proposals()
    assert (ids_of(only.drafted), only.paused) == (SONG[4:6], True)
    assert not await desk.worker.compute()
    desk.commit(4, SONG[4:5], 30, (0.5,))  # one of the two is known to be right
    (more,) = await desk.proposals()
    assert more.position == 6
    assert not more.paused


async def test_without_floors_doubt_stops_nothing(desk: Desk) -> None:
    desk.drafter.confidence = 0.01
    desk.open(until=10)
    assert [one.paused for one in await desk.proposals()] == [False, False]


# ---- no idea ------------------------------------------------------------------------------------


async def test_that_it_has_no_idea_is_said_once_for_each_text(desk: Desk) -> None:
    desk.open(text=(1, 2, 3), until=9)
    (only,) = await desk.proposals()
    assert (only.lineage, only.position, only.drafted, only.paused) == (1, 3, (), True)
    assert await desk.work() == []
    desk.commit(3, (), 12)  # more leave, but the text is the same
    assert await desk.work() == []
    desk.commit(3, (4,), 12)
    (again,) = await desk.proposals()
    assert (again.lineage, again.position, again.drafted, again.paused) == (1, 4, (), True)
    desk.commit(4, (SONG[0],), 8)
    assert tokens(await desk.proposals()) == [(5, SONG[1:4])]
    assert len(desk.drafter.asked) == 3


async def test_it_runs_out_of_ideas_behind_what_it_has_drafted(desk: Desk) -> None:
    desk.open(text=SONG[96:98], until=20)
    first, last = await desk.proposals()
    assert (ids_of(first.drafted), first.paused) == (SONG[98:], False)
    assert (last.position, last.drafted, last.paused) == (4, (), True)


async def test_in_turns_having_no_idea_is_said_with_what_was_drafted(desk: Desk) -> None:
    desk.open(text=SONG[96:98], until=20, floors=(0.1,))
    (only,) = await desk.proposals()
    assert (ids_of(only.drafted), only.paused, only.elapsed_s) == (SONG[98:], True, 2.0)


async def test_no_idea_about_a_text_that_has_changed_is_not_said(desk: Desk) -> None:
    desk.open(text=(1, 2, 3), until=9)
    desk.drafter.meanwhile = lambda: desk.commit(3, (SONG[0],), 7)
    assert tokens(await desk.proposals()) == [(4, SONG[1:4])]


# ---- several requests ---------------------------------------------------------------------------


def told(sent: Sequence[wire.Message]) -> list[tuple[int, int, float, float, int]]:
    return [
        (one.request, one.done.position, one.done.elapsed_s, one.done.waited_s, one.done.requests)
        for one in sent
        if isinstance(one, wire.Done) and isinstance(one.done, Proposal)
    ]


async def test_requests_share_the_steps_of_the_draft(desk: Desk) -> None:
    desk.open(1, until=10)
    desk.open(2, text=SONG[20:24], until=10)
    assert told(await desk.work()) == [
        (1, 4, 2.0, 0.0, 2),
        (2, 4, 2.0, 0.0, 2),
        (1, 7, 2.0, 0.0, 2),
        (2, 7, 2.0, 0.0, 2),
    ]
    assert desk.drafter.opened == [(0, 200), (1, 200)]


async def test_who_has_a_text_to_read_has_a_step_alone_and_the_others_tell_that_they_waited(
    desk: Desk,
) -> None:
    desk.open(1, text=SONG[:20], until=23)
    desk.open(2, text=SONG[20:24], until=10)
    assert told(await desk.work()) == [
        (1, 20, 1.0, 0.0, 1),
        (2, 4, 1.0, 1.0, 1),  # while the other's were drafted
        (2, 7, 1.0, 0.0, 1),
    ]


async def test_one_that_left_meanwhile_takes_nobody_along(desk: Desk) -> None:
    desk.open(1, until=7)
    desk.open(2, text=SONG[20:24], until=10)
    desk.drafter.meanwhile = lambda: desk.worker.handle(wire.Close(1))
    assert [one[:2] for one in told(await desk.work())] == [(2, 4), (2, 7)]


async def test_time_in_which_nothing_was_to_be_drafted_is_no_waiting(desk: Desk) -> None:
    desk.open(1, until=4)
    desk.open(2, text=SONG[20:24], until=13)
    assert len(await desk.proposals()) == 3
    desk.clock.now += 100.0
    desk.commit(4, (), 7, request=1)
    (first,) = await desk.proposals()
    assert first.waited_s == 0.0


async def test_in_turns_each_is_sent_its_block_when_it_is_whole(desk: Desk) -> None:
    desk.open(1, until=10, floors=(0.1,))
    desk.open(2, text=SONG[20:24], until=7, floors=(0.1,))
    sent = [one for one in await desk.work() if isinstance(one, wire.Done)]
    assert [one.request for one in sent] == [2, 1]


async def test_more_requests_than_it_has_slots_are_refused(desk: Desk) -> None:
    for request in (1, 2, 3):
        desk.open(request, until=4)
    (failed,) = desk.sent
    assert isinstance(failed, wire.Failed)
    assert (failed.id, failed.code) == (3, "busy")
    desk.worker.handle(wire.Close(1))
    desk.open(4, until=4)
    assert desk.sent == [failed]


@pytest.mark.parametrize("text", [(), (1,) * 500], ids=["empty", "too-long"])
async def test_a_text_that_does_not_fit_is_refused(desk: Desk, text: tuple[TokenId, ...]) -> None:
    desk.open(7, text=text, until=600)
    assert [(one.id, one.code) for one in desk.sent if isinstance(one, wire.Failed)] == [
        (7, "invalid_request")
    ]
    assert not await desk.worker.compute()


async def test_without_a_vocabulary_of_its_own_it_takes_any_token(desk: Desk) -> None:
    desk.open(text=(10**6, SONG[0]), until=4)
    assert tokens(await desk.proposals()) == [(2, SONG[1:3])]


async def test_it_drafts_no_further_than_its_context(desk: Desk) -> None:
    desk.open(text=(1,) * 497 + SONG[:1], until=600)
    assert tokens(await desk.proposals()) == [(498, SONG[1:3])]


async def test_welcomed_anew_it_holds_nothing(desk: Desk) -> None:
    desk.open(1)
    desk.open(2)
    await desk.proposals()
    desk.worker._on_message(wire.Welcome())
    desk.commit(4, SONG[4:5], 30)
    assert await desk.work() == []


# ---- faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (EngineFault("broken"), "internal_error"),
        (ValueError("no such token"), "internal_error"),
        (BadScores(math.nan), "model_unusable"),
    ],
    ids=["engine", "text", "nan"],
)
async def test_a_fault_fails_the_request_and_no_other(
    desk: Desk, error: Exception, code: str
) -> None:
    desk.open(1, until=10)
    desk.open(2, text=SONG[20:24], until=7)
    desk.drafter.error, desk.drafter.wrong = error, SONG[:4]
    sent = await desk.work()
    (failed,) = [one for one in desk.sent if isinstance(one, wire.Failed)]
    assert (failed.id, failed.code, failed.message) == (1, code, str(error))
    assert [one.request for one in sent if isinstance(one, wire.Done)] == [2]
    desk.commit(4, SONG[4:5], 30)
    assert await desk.work() == []
    desk.drafter.error = None
    desk.open(3, until=7)  # the slot is as good as before
    assert tokens(await desk.proposals()) == [(4, SONG[4:7])]


async def test_a_fault_after_the_request_was_closed_is_nobodys(desk: Desk) -> None:
    desk.open()
    desk.drafter.meanwhile = lambda: desk.worker.handle(wire.Close(1))
    desk.drafter.error = EngineFault("broken")
    assert await desk.work() == []


async def test_every_evaluation_is_a_step_that_can_be_seen(desk: Desk) -> None:
    desk.open(until=4)
    before = desk.worker.steps
    desk.commit(4, (), 13)
    await desk.proposals()
    assert desk.worker.steps >= before + 3


async def test_what_it_says_of_itself(desk: Desk) -> None:
    said = desk.worker._hello()
    assert (said.role, said.vocabulary, said.context, said.slots) == ("draft", None, 500, 2)
    assert DraftWorker.measure(desk.drafter).curve_s == (0.25, 0.05)
    assert said.curve_s == (0.25,)
    desk.worker._on_message(wire.Labels(3, 0, 10))
    assert desk.sent == [wire.LabelTexts(3, ())]


# ---- recalling ----------------------------------------------------------------------------------


async def test_what_it_would_have_drafted_is_told_before_it_drafts(desk: Desk) -> None:
    desk.open(text=SONG[:6], until=6, skip=2, recall=3)
    (recalled,) = await desk.proposals()
    assert ids_of(recalled.recalled) == SONG[3:6]
    assert (recalled.position, recalled.drafted, recalled.paused) == (6, (), False)
    assert recalled.elapsed_s == 0.5
    assert desk.drafter.asked == [], "it has no leave to draft"
    desk.commit(6, (), until=9)
    assert tokens(await desk.proposals()) == [(6, SONG[6:9])]


async def test_recalling_that_is_cut_short_is_said_to_have_come_to_nothing(desk: Desk) -> None:
    desk.drafter.is_cut = True
    desk.open(text=SONG[:6], until=6, recall=3)
    (said,) = await desk.proposals()
    assert (said.recalled, said.drafted, said.paused) == ((), (), True)


async def test_reading_in_several_pieces_counts_as_a_whole(desk: Desk) -> None:
    read = iter([1, 2])
    propose = desk.drafter.propose

    def in_pieces(slot: int, text: Sequence[TokenId]) -> tuple[Drafted, ...]:
        drafted = propose(slot, text)
        desk.drafter.texts[slot] = next(read, len(text))
        return drafted if desk.drafter.texts[slot] == len(text) else ()

    desk.drafter.propose = in_pieces  # type: ignore
    desk.open(until=5)
    (proposal,) = await desk.proposals()
    assert proposal.elapsed_s == 3.0


async def test_nothing_is_recalled_for_a_request_that_has_just_been_closed(desk: Desk) -> None:
    desk.open(text=SONG[:6], until=6, recall=3)
    (ride,) = desk.worker._turns
    desk.worker.handle(wire.Close(1))
    assert not ride.has_work
    assert (await desk.work(), desk.drafter.opened) == ([], [])


# ---- constraints --------------------------------------------------------------------------------

HELD = Constraint("json")


async def test_a_constraint_is_prepared_while_others_ride(desk: Desk) -> None:
    desk.open(1, until=10, constraint=HELD, begins=3)
    desk.open(2, text=SONG[20:24], until=6)
    assert tokens(await desk.proposals()) == [(4, SONG[24:26])]  # the first is not ready yet
    assert desk.drafter.held_to == [(None, 0)]
    desk.drafter.preparing.set()
    await asyncio.gather(*desk.worker._preparing)
    assert desk.drafter.prepared == [HELD]
    assert tokens(await desk.proposals())[0] == (4, SONG[4:7])
    assert desk.drafter.held_to[-1] == (HELD, 3)


async def test_a_constraint_that_the_drafter_cannot_follow_is_told_once(desk: Desk) -> None:
    desk.drafter.unknown = BadRequest("no such form", "json_schema")
    desk.drafter.preparing.set()
    desk.open(constraint=HELD, begins=3)
    await asyncio.gather(*desk.worker._preparing)
    assert await desk.work() == [wire.Failed(1, "invalid_request", "no such form", "json_schema")]
    assert desk.drafter.texts == {}


async def test_a_constraint_that_cannot_be_followed_leaves_the_others_their_steps(
    desk: Desk,
) -> None:
    desk.open(2, text=SONG[20:24], until=9)
    assert await desk.proposals()
    desk.drafter.unknown = BadRequest("no such form", "json_schema")
    desk.drafter.preparing.set()
    desk.open(1, constraint=HELD, begins=3)
    await asyncio.gather(*desk.worker._preparing)
    opened = list(desk.drafter.opened)
    desk.commit(4, SONG[24:27], until=14, request=2)
    sent = await desk.work()
    assert {one.request for one in sent if isinstance(one, wire.Done)} == {2}
    assert [one.id for one in sent if isinstance(one, wire.Failed)] == [1]
    assert desk.drafter.opened == opened, "none has to read its text anew"


async def test_a_ride_that_is_closed_before_its_constraint_is_prepared_does_nothing(
    desk: Desk,
) -> None:
    desk.open(constraint=HELD, begins=3)
    desk.worker.handle(wire.Close(1))
    desk.drafter.preparing.set()
    await asyncio.gather(*desk.worker._preparing)
    assert await desk.work() == []
    assert desk.drafter.held_to == []
