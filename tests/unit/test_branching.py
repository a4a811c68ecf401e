"""Where a draft worker holds branches: what is empty, taken, or lost when something goes wrong."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from outrider.core.drafter import Opening
from outrider.core.engine import EngineFault
from outrider.core.events import Commit, OpenDraft
from outrider.core.sampling import Sampling
from outrider.core.values import Proposal
from outrider.engines.drafter import ModelDrafter
from outrider.engines.together import BothDrafters
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.wire import messages as wire
from outrider_services.pipeline.draft_worker import DraftWorker

GREEDY = Sampling(temperature=0.0)
TEXTS = ("The river runs and ", "A meadow so quiet ", "The wind and under ")


class House:
    """A draft worker whose steps are taken in this thread, one call after the other."""

    def __init__(self, slots: int, spare: int) -> None:
        settings = ToySettings("draft", agreement=0.5, slots=slots, spare=spare, context=512)
        self.engine = ToyEngine(settings)
        self.model = ModelDrafter(self.engine)
        self.model.crowd_s = (1e-3,) * (slots + spare)  # free rows
        self.worker = DraftWorker(
            self.model, ThreadPoolExecutor(1), DraftWorker.measure(self.model)
        )
        self.sent: list[wire.Message] = []
        self.worker.send = self.sent.append  # type: ignore[assignment,method-assign]
        self.texts = [tuple(self.engine.tokenize(text, special=True)) for text in TEXTS]

    def open(self, number: int, lead: int) -> None:
        text = self.texts[number]
        end = len(text)
        order = OpenDraft(1, end, text, GREEDY, 300, (), end + lead, foresees=True)
        self.worker.handle(wire.Do(number, order))

    def ride(self, number: int) -> Any:
        return self.worker._rides[number]

    def more(self, number: int, lead: int) -> None:
        """It may draft so much farther; nothing is committed."""
        stream = self.ride(number).stream
        self.worker.handle(wire.Do(number, Commit(stream.committed, (), len(stream.tokens) + lead)))

    def step(self) -> None:
        self.worker._draft(lambda function, *arguments: function(*arguments))

    def correct(self, number: int, lead: int = 8) -> Any:
        """Commit what leads onto the longest branch; return that."""
        stream = self.ride(number).stream
        branch = max(stream.branches.begun, key=lambda one: len(one.found))
        truth = (*stream.tokens[stream.committed : branch.place], branch.correction)
        until = branch.place + len(branch.tokens) + lead
        self.worker.handle(wire.Do(number, Commit(stream.committed, truth, until)))
        return branch

    @property
    def spare_lengths(self) -> list[int]:
        info = self.engine.info
        return [self.engine.length(slot) for slot in range(info.slots, info.slots + info.spare)]

    @property
    def failures(self) -> list[wire.Message]:
        return [one for one in self.sent if isinstance(one, wire.Failed)]


@pytest.fixture
async def house() -> House:
    made = House(slots=3, spare=4)
    made.open(0, 4)
    made.step()
    assert made.ride(0).stream.branches.begun
    return made


async def test_the_sequence_of_a_branch_that_is_over_is_empty_before_others_read(
    house: House,
) -> None:
    """In one cache for all they would keep cells that the next text needs."""
    assert any(house.spare_lengths)
    house.worker.handle(wire.Close(0))
    house.open(1, 0)
    house.more(1, 1)
    lengths: list[list[int]] = []
    extend = house.engine.extend_all

    def watched(parts: Any) -> Any:
        lengths.append(house.spare_lengths)
        return extend(parts)

    house.engine.extend_all = watched  # type: ignore[method-assign]
    house.step()
    assert lengths[0] == [0] * 4


async def test_a_commit_onto_a_branch_is_followed_without_reading_it_again(house: House) -> None:
    branch = house.correct(0)
    stream = house.ride(0).stream
    assert stream.tokens[branch.place :] == list(branch.tokens)
    read: list[int] = []
    extend = house.engine.extend_all

    def watched(parts: Any) -> Any:
        read.extend(len(part.tokens) for part in parts if part.slot == house.ride(0).slot)
        return extend(parts)

    house.engine.extend_all = watched  # type: ignore[method-assign]
    house.step()
    assert set(read) == {1}
    await asyncio.sleep(0)
    told = [one.done for one in house.sent if isinstance(one, wire.Done)]
    foreseen = [one for one in told if isinstance(one, Proposal) and one.foreseen]
    assert [one.drafted for one in foreseen] == [tuple(found.drafted for found in branch.found)]


async def test_a_branch_whose_text_was_read_meanwhile_is_not_held_in_its_place(
    house: House,
) -> None:
    """A commit may come when a step has looked for adoptions, and has not begun."""
    house.correct(0)
    ride = house.ride(0)
    adopted, ride.stream.adopted = ride.stream.adopted, None
    house.step()  # it reads all of it itself
    read = house.engine.length(ride.slot)
    assert ride.stream.read == read
    ride.stream.adopted = adopted
    house.worker._branching.adopt(ride)
    assert house.engine.length(ride.slot) == read
    house.more(0, 2)
    house.step()
    assert (house.failures, ride.failures) == ([], 0)


async def test_whoever_begins_anew_has_no_branches_and_their_sequences_are_free() -> None:
    house = House(slots=3, spare=2)
    house.open(0, 3)
    house.step()
    assert all(house.spare_lengths)
    house.open(2, 1)
    house.open(1, 1)
    house.step()
    turns = house.worker._turns
    turns.rotate(-turns.index(house.ride(2)))
    house.more(0, 1)
    house.more(1, 1)
    extend = house.engine.extend_all
    failed: list[Any] = []

    def once(parts: Any) -> Any:
        if failed:
            return extend(parts)
        failed.append(parts)
        for part in parts:
            house.engine.rewind(part.slot, 0)
        house.more(2, 2)  # a commit for another comes meanwhile
        raise EngineFault("once")

    house.engine.extend_all = once  # type: ignore[method-assign]
    house.step()
    assert failed
    assert house.failures == []
    assert house.ride(0).stream.branches is None
    assert [house.ride(n).stream.may_draft for n in range(3)] == [False] * 3
    assert house.failures == []


async def test_an_adoption_that_fails_makes_its_request_begin_anew(house: House) -> None:
    house.correct(0)

    def broken(source: int, slot: int, length: int) -> None:
        raise EngineFault("it cannot be copied")

    house.engine.copy = broken  # type: ignore[method-assign]
    house.step()
    ride = house.ride(0)
    assert ride.stream.branches is None
    assert not ride.is_new
    assert not ride.stream.may_draft
    assert house.failures == []


def test_for_a_token_that_no_model_has_drafted_there_are_no_others() -> None:
    engine = ToyEngine(ToySettings("draft", agreement=0.8, slots=1, spare=2, context=512))
    both = BothDrafters(ModelDrafter(engine))
    both.open(0, Opening(GREEDY, 300))
    text = tuple(engine.tokenize("so ", special=True))
    assert not both.propose(0, text)[0].free
    assert both.others(0)
    again = tuple(engine.tokenize("the river runs and then " * 3 + "the river", special=True))
    assert both.propose(0, again)[0].free
    assert both.others(0) == ()
    both.fork(0, 1, 2)
    both.cut(1, 0)  # the free one knows nothing of branches
