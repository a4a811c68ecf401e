"""Whatever order requests come, go and fail in: caches hold what is believed of them, nobody waits.

A random life of each worker: texts that begin alike, names that must not be mixed, blocks, faults,
and requests that leave at any moment, also in the middle of a pass.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.core.engine import EngineFault, Part
from outrider.core.events import Commit, OpenDraft, Prefill
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Proposal, TokenId, Verdict, Verify
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.wire import messages as wire
from outrider_services.pipeline.draft_worker import DraftWorker
from outrider_services.pipeline.slots import shared_beginning
from outrider_services.pipeline.target_worker import TargetWorker
from outrider_services.pipeline.worker import Measured

Text = tuple[TokenId, ...]

GREEDY = Sampling(temperature=0)
SLOTS, CONTEXT, CHUNK = 3, 400, 32
PHRASES = (
    b"the old river runs over the quiet meadow ",
    b"lantern light finds the harbour wall again ",
    b"so ",
)
texts = st.lists(st.sampled_from(PHRASES), min_size=1, max_size=4).map(lambda s: tuple(b"".join(s)))
names = st.sampled_from(["a", "b", None])
which = st.integers(0, 5)


class Fickle(ToyEngine):
    """Fails when it is told to; during a pass anything may happen."""

    def __init__(self, role: Any) -> None:
        super().__init__(ToySettings(role=role, slots=SLOTS, context=CONTEXT, chunk=CHUNK))
        self.fails = 0
        self.meanwhile: Callable[[], None] | None = None

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        meanwhile, self.meanwhile = self.meanwhile, None
        if meanwhile:
            meanwhile()
        if self.fails:
            self.fails -= 1
            for part in parts:
                self.rewind(part.slot, 0)
            raise EngineFault("it was told to")
        return super().extend_all(parts)

    def holds(self, slot: int, text: Sequence[TokenId]) -> int:
        """How many tokens of the sequence in `slot` are those of `text`."""
        states, expected = self._states[slot], states_of(tuple(text))
        pairs = zip(states, expected, strict=False)
        alike = min(len(states), len(expected))
        return next((at for at, (a, b) in enumerate(pairs) if a != b), alike) - 1


@functools.lru_cache(maxsize=4096)
def states_of(text: Text) -> list[Any]:
    engine = ToyEngine(ToySettings(context=CONTEXT, chunk=CONTEXT))
    if text:
        engine.extend(0, text, 0)
    return engine._states[0]


@functools.lru_cache(maxsize=4096)
def follows(role: Any, text: Text) -> TokenId:
    """What an engine that has never seen anything else finds likeliest behind `text`."""
    engine = ToyEngine(ToySettings(role=role, context=CONTEXT, chunk=CONTEXT))
    return int(engine.extend(0, text, 1)[0].argmax())


class Life(RuleBasedStateMachine):
    """A worker, its engine, and a loop that runs when a rule says so."""

    engine: Fickle
    worker: Any

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.owner = ThreadPoolExecutor(1)
        self.sent: list[wire.Message] = []
        self.count = 0
        self.loop.run_until_complete(self.begin())

    async def begin(self) -> None:
        raise NotImplementedError

    def teardown(self) -> None:
        self.owner.shutdown()
        self.loop.close()

    def handle(self, message: wire.Message) -> None:
        async def told() -> None:
            self.worker.handle(message)

        self.loop.run_until_complete(told())

    def in_a_pass(self, message: wire.Message) -> None:
        """The message comes while the owner thread is in its next pass."""

        def meanwhile() -> None:
            async def told() -> None:
                self.worker.handle(message)

            asyncio.run_coroutine_threadsafe(told(), self.loop).result(5)

        self.engine.meanwhile = meanwhile

    def compute(self, most: int = 1000) -> None:
        async def work() -> None:
            async with asyncio.timeout(20):
                for _ in range(most):
                    if not await self.worker.compute():
                        return
            assert most < 1000, "it never comes to an end"

        self.loop.run_until_complete(work())
        self.take()

    def take(self) -> None:
        raise NotImplementedError

    def slots_are_believed_rightly(self, unbegun: set[int]) -> None:
        for holder in self.worker.slots._holders:
            if holder.slot in unbegun:
                continue
            held = self.engine.length(holder.slot)
            claimed = holder.tokens[holder.skip :]
            common = self.engine.holds(holder.slot, claimed)
            assert common >= min(held, len(claimed)), f"slot {holder.slot} holds another text"


class TargetLife(Life):
    async def begin(self) -> None:
        self.engine = Fickle("target")
        self.worker = TargetWorker(self.engine, self.owner, Measured((0.1,)))
        setattr(self.worker, "send", self.sent.append)  # noqa: B010
        self.open_: dict[int, list[TokenId]] = {}
        self.round: dict[int, int] = {}
        self.waits: set[int] = set()
        self.drafted: dict[int, Text] = {}
        self.names: dict[int, str | None] = {}
        self.seen: dict[str, list[Text]] = {}
        self.faults = 0

    @rule(text=texts, last=st.integers(65, 67), name=names)
    def open(self, text: Text, last: int, name: str | None) -> None:
        if len(self.open_) == SLOTS:
            return
        self.count += 1
        self.handle(wire.Do(self.count, Prefill((*text, last), GREEDY, False, cache=name)))
        self.open_[self.count], self.round[self.count] = [*text, last], 0
        self.drafted[self.count], self.names[self.count] = (), name
        self.waits.add(self.count)

    def chosen(self, at: int) -> int | None:
        return sorted(self.open_)[at % len(self.open_)] if self.open_ else None

    @rule(at=which, right=st.integers(0, 3), wrong=st.integers(0, 3))
    def verify(self, at: int, right: int, wrong: int) -> None:
        request = self.chosen(at)
        if request is None or request in self.waits:
            return
        text, drafted = self.open_[request], list[TokenId]()
        if len(text) > CONTEXT - 20:
            return
        for _ in range(right):
            drafted.append(follows("target", (*text, *drafted)))
        drafted += [120] * wrong
        self.round[request] += 1
        self.drafted[request] = tuple(drafted)
        order = Verify(self.round[request], len(text), tuple(drafted))
        self.handle(wire.Do(request, order))
        self.waits.add(request)

    def gone(self, request: int) -> None:
        text, name = self.open_.pop(request), self.names.pop(request)
        self.waits.discard(request)
        if name is not None:
            self.seen.setdefault(name, []).append(tuple(text))

    @rule(at=which)
    def close(self, at: int) -> None:
        if request := self.chosen(at):
            self.gone(request)
            self.handle(wire.Close(request))

    @rule(at=which)
    def close_in_a_pass(self, at: int) -> None:
        request = self.chosen(at)
        if request and self.waits:
            self.in_a_pass(wire.Close(request))
            self.compute(1)
            if self.engine.meanwhile:  # there was no pass
                self.engine.meanwhile = None
            elif request in self.open_:
                self.gone(request)

    @precondition(lambda self: not self.engine.fails)
    @rule()
    def fail(self) -> None:
        self.engine.fails = 1

    @rule(passes=st.integers(1, 3))
    def some(self, passes: int) -> None:
        self.compute(passes)

    @rule()
    def all(self) -> None:
        self.compute()
        assert not self.waits, "somebody waits, and nothing is computed"
        assert not self.worker._turns

    def take(self) -> None:
        for message in self.sent:
            match message:
                case wire.Done(request, Verdict() as done):
                    self.judge(request, done)
                case wire.Passed(several):
                    for request, done in several:
                        self.judge(request, done)
                case wire.Failed(request):
                    if request in self.open_:
                        self.gone(request)
        self.sent.clear()

    def judge(self, request: int, verdict: Verdict) -> None:
        if request not in self.open_:
            return
        text = self.open_[request]
        assert (verdict.round, verdict.base) == (self.round[request], len(text))
        for token in verdict.tokens:
            assert token == follows("target", tuple(text)), "it is not what a fresh engine says"
            text.append(token)
        assert verdict.tokens[:-1] == self.drafted[request][: verdict.accepted]
        if verdict.cached:
            others = [
                tuple(self.open_[n])
                for n, name in self.names.items()
                if n != request and name == self.names[request]
            ]
            known = self.seen.get(self.names[request] or "", [])
            assert self.names[request] is not None
            assert max(shared_beginning(one, text) for one in (*known, *others)) >= verdict.cached
        self.waits.discard(request)

    @invariant()
    def nothing_is_believed_wrongly(self) -> None:
        sequences = self.worker._sequences.values()
        self.slots_are_believed_rightly({one.slot for one in sequences if one.taken})
        in_use = {one.slot for one in self.worker.slots._holders if not one.is_free}
        assert in_use == {one.slot for one in sequences}
        assert set(self.worker._sequences) == set(self.open_)


class DraftLife(Life):
    """What the draft proposes is what a fresh one would: its caches hold the texts' own tokens."""

    async def begin(self) -> None:
        self.engine = Fickle("draft")
        self.worker = DraftWorker(ModelDrafter(self.engine), self.owner, Measured((0.1,)))
        setattr(self.worker, "send", self.sent.append)  # noqa: B010
        self.texts: dict[int, list[TokenId]] = {}
        self.recalls: dict[int, int] = {}

    @rule(
        text=texts,
        last=st.integers(65, 67),
        name=names,
        skip=st.integers(0, 60),
        stock=st.integers(0, 2),
        recall=st.sampled_from([0, 0, 5]),
    )
    def open(
        self, text: Text, last: int, name: str | None, skip: int, stock: int, recall: int
    ) -> None:
        if len(self.texts) == SLOTS:
            return
        self.count += 1
        known = [*text, last]
        order = OpenDraft(
            lineage=1,
            base=len(known),
            tokens=(*known, *[104] * stock),
            sampling=GREEDY,
            vocabulary=262,
            ends=(),
            until=len(known) + 4,
            floors=(),
            skip=min(skip, len(known) - 1),
            recall=0 if stock else recall,
            cache=name,
        )
        self.texts[self.count], self.recalls[self.count] = known, recall
        self.handle(wire.Do(self.count, order))

    def chosen(self, at: int) -> int | None:
        return sorted(self.texts)[at % len(self.texts)] if self.texts else None

    def order(self, request: int, right: int, wrong: int, lead: int) -> Commit:
        text = self.texts[request]
        base, ride = len(text), self.worker._rides.get(request)
        told = [*(ride.stream.tokens[base : base + right] if ride else ()), *[115] * wrong]
        text += told
        return Commit(base, tuple(told), len(text) + lead, ())

    @rule(at=which, right=st.integers(0, 3), wrong=st.integers(0, 7), lead=st.integers(0, 5))
    def commit(self, at: int, right: int, wrong: int, lead: int) -> None:
        request = self.chosen(at)
        if request and len(self.texts[request]) < CONTEXT - 20:
            self.handle(wire.Do(request, self.order(request, right, wrong, lead)))

    @rule(at=which, right=st.integers(0, 3), wrong=st.integers(0, 3), lead=st.integers(1, 5))
    def commit_in_a_pass(self, at: int, right: int, wrong: int, lead: int) -> None:
        request = self.chosen(at)
        if request and len(self.texts[request]) < CONTEXT - 20:
            self.in_a_pass(wire.Do(request, self.order(request, right, wrong, lead)))
            self.compute()
            if self.engine.meanwhile:  # there was none: it comes afterwards
                self.engine.meanwhile = None
                base = self.worker._rides[request].stream.committed
                more = tuple(self.texts[request][base:])
                until = len(self.texts[request]) + lead
                self.handle(wire.Do(request, Commit(base, more, until, ())))

    @rule(at=which)
    def close(self, at: int) -> None:
        if request := self.chosen(at):
            del self.texts[request]
            self.handle(wire.Close(request))

    @rule(at=which)
    def close_in_a_pass(self, at: int) -> None:
        if request := self.chosen(at):
            self.in_a_pass(wire.Close(request))
            self.compute()
            if not self.engine.meanwhile:
                del self.texts[request]
            self.engine.meanwhile = None

    @precondition(lambda self: not self.engine.fails)
    @rule()
    def fail(self) -> None:
        self.engine.fails = 1

    @rule()
    def all(self) -> None:
        self.compute()
        for ride in self.worker._rides.values():
            assert not ride.has_work
            stream = ride.stream
            end = len(stream.tokens)
            assert end >= stream.until or stream.read < end <= stream.committed + 128

    def take(self) -> None:
        for message in self.sent:
            match message:
                case wire.Done(request, Proposal() as done):
                    assert done.drafted or self.recalls[request], "it always has an idea"
                case wire.Failed(request):
                    self.texts.pop(request, None)
        self.sent.clear()

    @invariant()
    def nothing_is_believed_wrongly(self) -> None:
        rides = self.worker._rides.values()
        in_use = {one.slot for one in self.worker.slots._holders if not one.is_free}
        assert in_use == {one.slot for one in rides}
        assert set(self.worker._rides) == set(self.texts)
        self.slots_are_believed_rightly({one.slot for one in rides})
        skipped = self.worker.model._skipped
        for ride in rides:
            if ride.is_new:
                continue
            stream, skip = ride.stream, skipped[ride.slot]
            held = stream.tokens[skip : stream.read]
            assert self.engine.holds(ride.slot, held) == len(held), "it has read another text"
            for at in range(stream.committed, len(stream.tokens)):
                before = tuple(stream.tokens[skip:at])
                if stream.tokens[at] != 104 or stream.lineage > 1:
                    assert stream.tokens[at] == follows("draft", before)
            holder = self.worker.slots._holders[ride.slot]
            claimed = holder.tokens[skip:]
            common = self.engine.holds(ride.slot, claimed)
            assert common >= min(self.engine.length(ride.slot), len(claimed))


@pytest.mark.parametrize(("name", "is_known"), [("a", True), (None, False)])
def test_a_draft_reads_only_what_it_does_not_know(name: str | None, is_known: bool) -> None:
    """And drafts what it would draft had it read all: acceptance is that of a fresh request."""
    life, text = DraftLife(), PHRASES[0] * 4

    def ride(more: bytes) -> tuple[int, tuple[TokenId, ...]]:
        """How many tokens the draft evaluates for text and more; what it drafts behind them."""
        evaluated = 0
        extend_all = ToyEngine.extend_all

        def counting(engine: ToyEngine, parts: Sequence[Part]) -> list[Scores]:
            nonlocal evaluated
            evaluated += sum(len(part.tokens) for part in parts)
            return extend_all(engine, parts)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ToyEngine, "extend_all", counting)
            life.open(tuple(text + more), 65, name, skip=0, stock=0, recall=0)
            life.compute()
        stream = life.worker._rides[life.count].stream
        return evaluated, tuple(stream.tokens[stream.committed :])

    try:
        ride(b"")
        life.close(0)
        evaluated, drafted = ride(b"so ")
        fresh = tuple(text) + tuple(b"so ") + (65,)
        assert drafted[:1] == (follows("draft", fresh),)
        assert (evaluated <= len(b"so ") + 1 + len(drafted)) == is_known
        assert is_known or evaluated >= len(fresh)
    finally:
        life.teardown()


OFTEN = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
TestTargetLife = TargetLife.TestCase
TestTargetLife.settings = OFTEN
TestDraftLife = DraftLife.TestCase
TestDraftLife.settings = OFTEN
pytestmark = pytest.mark.timeout(120)
