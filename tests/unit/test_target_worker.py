"""The target worker without a coordinator: conversations, and a model that computes nonsense."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from outrider.core.constraints import Constraint
from outrider.core.engine import EngineFault, Part
from outrider.core.events import Prefill
from outrider.core.logprobs import top_logprobs
from outrider.core.orders import MOST_WAITING
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import TopLogprob, Verdict, Verify
from outrider.engines.toy import ToyEngine
from outrider.wire import messages as wire
from outrider_services.pipeline.passes import Sequence as Verified
from outrider_services.pipeline.target_worker import TargetWorker
from outrider_services.pipeline.worker import Measured

USUAL = Sampling()
BOS, USER, ASSISTANT = 256, 258, 259
BOS_LABEL = "<|end|>"  # of the toy's control tokens, the one taken for a begin-of-text token


class Beginning(ToyEngine):
    """Adds a begin-of-text token, as many models do; its template may have one as well."""

    template_begins = False

    def __init__(self) -> None:
        super().__init__()
        vocabulary = self.info.vocabulary.changed(bos=BOS, adds_bos=True)
        self.info = replace(self.info, vocabulary=vocabulary)

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        return [BOS, *super().tokenize(text, special=special)]

    def chat_template(self, name: str = "") -> str | None:
        return None

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        turns = "".join(f"<|{role}|>{content}" for role, content in messages) + "<|assistant|>"
        return BOS_LABEL + turns if self.template_begins else turns


@pytest.fixture
async def worker() -> AsyncIterator[TargetWorker]:
    with ThreadPoolExecutor(1) as owner:
        yield TargetWorker(Beginning(), owner, Measured((0.1,)))


@pytest.mark.parametrize("template_begins", [False, True])
@pytest.mark.parametrize("typed", ["", "<|user|>"], ids=["plain", "with-a-typed-marker"])
async def test_a_conversation_begins_once(
    worker: TargetWorker, typed: str, template_begins: bool
) -> None:
    assert isinstance(worker.model, Beginning)
    worker.model.template_begins = template_begins
    content = f"a{typed}b"
    reply = worker._answers.reply(
        wire.Chat(1, (wire.Turn("user", content), wire.Turn("user", "c")))
    )
    plain = list(content.encode())
    assert reply == wire.Tokens(1, (BOS, USER, *plain, USER, ord("c"), ASSISTANT))


class Broken(ToyEngine):
    """Some passes give one logit that is none, or as many as there are."""

    def __init__(self, wrong: float, everywhere: bool, times: int) -> None:
        super().__init__()
        self.wrong, self.everywhere, self.times = wrong, everywhere, times

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        found = super().extend_all(parts)
        if self.times:
            self.times -= 1
            for scores in found:
                scores[:, slice(None) if self.everywhere else 99] = self.wrong
        return found


async def answered(
    engine: ToyEngine, logprobs: bool, sampling: Sampling = USUAL, top_logprobs: int = 0
) -> list[wire.Message]:
    """What a target worker with `engine` says to a prompt."""
    sent: list[wire.Message] = []
    with ThreadPoolExecutor(1) as owner:
        worker = TargetWorker(engine, owner, Measured((0.1,)))
        setattr(worker, "send", sent.append)  # noqa: B010
        order = Prefill((1, 2, 3), sampling, logprobs, top_logprobs=top_logprobs)
        worker.handle(wire.Do(5, order))
        while await worker.compute():
            pass
        assert engine.length(0) in (0, 3)
    return sent


@pytest.mark.parametrize("logprobs", [False, True])
@pytest.mark.parametrize(
    ("wrong", "everywhere", "word"),
    [
        (math.nan, False, "NaN"),
        (math.nan, True, "NaN"),
        (math.inf, False, "an infinite score"),
        (-math.inf, True, "no finite score"),
    ],
)
async def test_scores_that_are_no_numbers_are_told(
    wrong: float, everywhere: bool, word: str, logprobs: bool
) -> None:
    (failed,) = await answered(Broken(wrong, everywhere, times=-1), logprobs)
    assert isinstance(failed, wire.Failed)
    assert (failed.id, failed.code) == (5, "model_unusable")
    assert f"computed {word} where it was to choose" in failed.message


async def test_after_a_pass_that_went_wrong_once_the_text_is_evaluated_again() -> None:
    usual, again = await answered(ToyEngine(), True), await answered(Broken(np.nan, True, 1), True)
    for (said,) in (usual, again):
        assert isinstance(said, wire.Done)
        assert isinstance(said.done, Verdict)
    tokens = [said.done.tokens for (said,) in (usual, again)]  # type: ignore[union-attr]
    assert tokens[0] == tokens[1]


# ---- several requests, and what earlier ones have left ------------------------------------------

TEXT = tuple(b"the old river runs over the quiet meadow and under the silver moon ")
GREEDY = Sampling(temperature=0)


class Noted(ToyEngine):
    """Remembers the parts of each pass: slots, tokens, rows."""

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[list[tuple[int, int, int]]] = []

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        self.passes.append([(slot, len(tokens), rows) for slot, tokens, rows, _ in parts])
        return super().extend_all(parts)


class Desk:
    """A target worker, its engine, and what it has sent."""

    def __init__(self, owner: ThreadPoolExecutor, engine: ToyEngine | None = None) -> None:
        self.engine = engine or Noted()
        self.worker = TargetWorker(self.engine, owner, Measured((0.1,)))
        self.sent: list[wire.Message] = []
        setattr(self.worker, "send", self.sent.append)  # noqa: B010

    async def work(self) -> list[wire.Message]:
        self.sent.clear()
        while await self.worker.compute():
            pass
        return list(self.sent)

    async def settle(self) -> None:
        """Until nothing is left to compile or to compute; what was sent stays."""
        while self.worker._answers.tasks:
            await asyncio.gather(*self.worker._answers.tasks)
        while await self.worker.compute():
            pass

    def open(self, request: int, text: tuple[int, ...] = TEXT, cache: str | None = "") -> None:
        self.worker.handle(wire.Do(request, Prefill(text, GREEDY, False, cache=cache)))


@pytest.fixture
async def desk() -> AsyncIterator[Desk]:
    with ThreadPoolExecutor(1) as owner:
        yield Desk(owner)


def passes(desk: Desk) -> list[list[tuple[int, int, int]]]:
    assert isinstance(desk.engine, Noted)
    found, desk.engine.passes = desk.engine.passes, []
    return found


def verdicts(sent: Sequence[wire.Message]) -> dict[int, Verdict]:
    found: dict[int, Verdict] = {}
    for message in sent:
        match message:
            case wire.Done(request, Verdict() as done):
                found[request] = done
            case wire.Passed(several):
                found.update(several)
    return found


async def test_blocks_of_several_requests_are_one_pass_and_one_message(desk: Desk) -> None:
    desk.open(1)
    desk.open(2, TEXT[::-1])
    first = verdicts(await desk.work())
    passes(desk)
    base = len(TEXT) + 1
    orders = (1, Verify(1, base, (65, 66))), (2, Verify(1, base, ()))
    desk.worker.handle(wire.Pass(orders))
    (passed,) = await desk.work()
    assert isinstance(passed, wire.Passed)
    assert passes(desk) == [[(0, 3, 3), (1, 1, 1)]]
    said = verdicts([passed])
    assert {(one.rows, one.requests) for one in said.values()} == {(4, 2)}
    alone = ToyEngine()
    alone.extend(0, TEXT[::-1], 0)
    rows = alone.extend(0, first[2].tokens, 1)
    assert said[2].tokens == (int(rows[0].argmax()),)


async def test_what_comes_twice_or_late_has_no_effect(desk: Desk) -> None:
    desk.open(7)
    first = verdicts(await desk.work())[7]
    again = Prefill(TEXT, GREEDY, False, cache="")
    order = Verify(1, len(TEXT) + 1, ())
    for message in (again, order, again, order):
        desk.worker.handle(wire.Do(7, message))
    second = verdicts(await desk.work())[7]
    assert (second.round, second.base) == (1, len(TEXT) + 1)
    for message in (order, again):
        desk.worker.handle(wire.Do(7, message))
    assert await desk.work() == []
    desk.worker.handle(wire.Do(7, Verify(2, len(TEXT) + 2, ())))
    assert verdicts(await desk.work())[7].round == 2
    # a later one is no repetition: the text was committed with another worker
    text = (*TEXT, *first.tokens)
    later = again.changed(tokens=text, begins=len(TEXT), round=3)
    desk.worker.handle(wire.Do(7, later))
    resumed = verdicts(await desk.work())[7]
    assert (resumed.round, resumed.tokens) == (3, second.tokens)


async def test_a_conversation_is_read_on_from_where_it_was(desk: Desk) -> None:
    desk.open(1)
    (one,) = verdicts(await desk.work()).values()
    desk.worker.handle(wire.Close(1))
    passes(desk)
    longer = (*TEXT, *one.tokens, *b"and then ")
    desk.open(2, longer)
    (again,) = verdicts(await desk.work()).values()
    assert passes(desk) == [[(0, len(longer) - len(TEXT), 1)]]
    assert again.cached == len(TEXT)
    fresh = Desk(desk.worker._owner, ToyEngine())
    fresh.open(3, longer, None)
    assert verdicts(await fresh.work())[3].tokens == again.tokens


async def test_what_another_name_has_read_is_not_used(desk: Desk) -> None:
    desk.open(1, cache="a")
    await desk.work()
    desk.worker.handle(wire.Close(1))
    desk.open(2, cache="b")
    (other,) = verdicts(await desk.work()).values()
    assert other.cached == 0
    assert passes(desk)[-1][0][1] == len(TEXT)


async def test_what_two_requests_begin_with_is_read_once(desk: Desk) -> None:
    """Also where the second comes while the first is still reading."""
    system = TEXT * 4
    desk.open(1, (*system, 65))
    desk.open(2, (*system, 66, 67))
    said = verdicts(await desk.work())
    read = sum(tokens for one in passes(desk) for _, tokens, _ in one)
    assert read == len(system) + 1 + 2
    assert said[2].cached == len(system)
    alone = ToyEngine()
    for start in range(0, len(system), 128):
        alone.extend(0, system[start : start + 128], 0)
    assert said[2].tokens == (int(alone.extend(0, (66, 67), 1)[0].argmax()),)


async def test_a_long_prompt_leaves_the_others_their_turns(desk: Desk) -> None:
    desk.open(1, TEXT[:20])
    await desk.work()
    desk.open(2, TEXT[1:] * 10)
    desk.worker.handle(wire.Do(1, Verify(1, 21, ())))
    passes(desk)
    await desk.worker.compute()
    (together,) = passes(desk)
    assert (0, 1, 1) in together
    assert sum(tokens for _, tokens, _ in together) <= 128
    assert set(verdicts(desk.sent)) == {1}
    assert verdicts(desk.sent)[1].rows == 0, "what such a pass takes says nothing of its rows"


async def test_after_a_pass_that_failed_each_has_one_of_its_own(desk: Desk) -> None:
    """So that one bad request takes no other with it."""

    class Bad(Noted):
        def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
            scores = super().extend_all(parts)
            if any(200 in part.tokens for part in parts):
                for part in parts:
                    self.rewind(part.slot, 0)
                raise EngineFault("it cannot")
            return scores

    bad = Desk(desk.worker._owner, Bad())
    bad.open(1, TEXT[:9])
    bad.open(2, (200, *TEXT[:9]))
    sent = await bad.work()
    assert set(verdicts(sent)) == {1}
    assert [one.id for one in sent if isinstance(one, wire.Failed)] == [2]


async def test_a_short_prompt_in_a_pass_makes_its_time_no_measure(desk: Desk) -> None:
    desk.open(1, TEXT[:20])
    await desk.work()
    desk.open(2, TEXT[20:60])
    desk.worker.handle(wire.Do(1, Verify(1, 21, ())))
    said = verdicts(await desk.work())
    assert passes(desk)[-1] == [(1, 40, 1), (0, 1, 1)]
    assert (said[1].rows, said[1].requests) == (0, 2)


async def test_after_a_failure_that_passed_by_they_share_passes_again(desk: Desk) -> None:
    class Once(Noted):
        fails = True

        def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
            scores = super().extend_all(parts)
            if self.fails:
                self.fails = False
                for part in parts:
                    self.rewind(part.slot, 0)
                raise EngineFault("only now")
            return scores

    once = Desk(desk.worker._owner, Once())
    once.open(1, TEXT[:20])
    once.open(2, TEXT[20:40])
    assert set(verdicts(await once.work())) == {1, 2}
    assert [len(one) for one in passes(once)] == [2, 1, 1]
    base = 21
    once.worker.handle(wire.Pass(((1, Verify(1, base, ())), (2, Verify(1, base, ())))))
    await once.work()
    assert [len(one) for one in passes(once)] == [2]


async def test_a_copy_that_fails_costs_a_reading_and_no_more(desk: Desk) -> None:
    class Uncopied(Noted):
        def copy(self, source: int, slot: int, length: int) -> None:
            raise EngineFault("it cannot copy")

    one = Desk(desk.worker._owner, Uncopied())
    one.open(1)
    one.open(2)
    said = verdicts(await one.work())
    assert (said[1].tokens, said[2].cached) == (said[2].tokens, 0)


async def test_nothing_is_copied_from_who_still_waits_for_its_constraint(desk: Desk) -> None:
    """Its sequence still holds what was there before."""
    for request in range(4):  # each sequence holds another text
        desk.open(request, bytes((65 + request,)) * 40 + bytes(TEXT), cache="others")  # type: ignore
    await desk.work()
    for request in range(4):
        desk.worker.handle(wire.Close(request))
    desk.worker.handle(wire.Do(5, Prefill(TEXT, GREEDY, False, ANY_OBJECT, cache="")))
    desk.open(6)
    while await desk.worker.compute():
        pass
    said = verdicts(desk.sent)
    assert (said[6].tokens, said[6].cached) == ((int(choice_behind(TEXT)),), 0)
    await desk.settle()


def choice_behind(text: tuple[int, ...]) -> int:
    return int(ToyEngine().extend(0, text, 1)[0].argmax())


async def verdict(logprobs: bool, top_logprobs: int) -> Verdict:
    (said,) = await answered(ToyEngine(), logprobs, top_logprobs=top_logprobs)
    assert isinstance(said, wire.Done)
    assert isinstance(said.done, Verdict)
    return said.done


async def test_the_likeliest_tokens_are_told_if_asked_for() -> None:
    plain, told, nothing = await verdict(True, 0), await verdict(True, 4), await verdict(False, 4)
    engine = ToyEngine()
    (row,) = engine.extend(0, (1, 2, 3), 1)
    likeliest = top_logprobs(row, 4)
    assert told.top_logprobs == (
        tuple(TopLogprob(token, engine.piece(token), p) for token, p in likeliest),
    )
    assert told.logprobs == plain.logprobs
    assert plain.top_logprobs is None
    assert (nothing.logprobs, nothing.top_logprobs) == (None, None)


async def test_sequence_breakers_are_those_of_its_own_vocabulary() -> None:
    """The prompt repeats itself; a breaker in it lets the answer do so, too."""
    engine = ToyEngine()
    (row,) = engine.extend(0, (1, 2, 3), 1)
    likeliest = int(row.argmax())
    dry = Sampling(temperature=0, dry_multiplier=100.0, dry_allowed_length=1)
    chosen: list[int] = []
    for breakers in ((), ("\x03",)):
        given = dry.changed(dry_sequence_breakers=breakers)
        with ThreadPoolExecutor(1) as owner:
            worker = TargetWorker(ToyEngine(), owner, Measured((0.1,)))
            sequence = Verified(1, 0, [3, likeliest, 1, 2, 3], given, False, 0.0)
            rows = np.array([row])
            known = worker._verifying._breakers.of(given)
            chosen += worker._verifying._choices(sequence, (), (), rows, [], known)
    assert chosen[0] != chosen[1] == likeliest


# ---- constraints --------------------------------------------------------------------------------

ANY_OBJECT = Constraint("json")


PREFILL = Prefill((1, 2, 3), Sampling(temperature=0), False, ANY_OBJECT)


async def test_drafted_tokens_behind_a_forbidden_one_are_not_evaluated(desk: Desk) -> None:
    worker, sent = desk.worker, desk.sent
    worker.handle(wire.Do(5, PREFILL))
    await desk.settle()
    (first,) = sent
    assert isinstance(first, wire.Done)
    assert isinstance(first.done, Verdict)
    assert (first.done.tokens, first.done.forbidden) == ((ord("{"),), 0)
    worker.handle(wire.Do(5, Verify(1, 4, tuple(b'"x{}'))))  # nothing is forbidden
    await desk.settle()
    worker.handle(wire.Do(6, PREFILL))
    await desk.settle()
    worker.handle(wire.Do(6, Verify(1, 4, tuple(b'}}"'))))
    await desk.settle()
    whole, _, cut = (one.done for one in sent[1:] if isinstance(one, wire.Done))
    assert isinstance(whole, Verdict)
    assert whole.forbidden == 0
    assert isinstance(cut, Verdict)
    assert cut.forbidden == 2
    assert len(cut.tokens) == cut.accepted + 1
    assert worker.model.length(1) == 3 + 1 + cut.accepted


async def test_whether_a_form_can_be_kept_is_asked_beforehand(desk: Desk) -> None:
    worker, sent = desk.worker, desk.sent
    worker.handle(wire.Constrain(1, ANY_OBJECT))
    worker.handle(wire.Constrain(2, Constraint("schema", '{"enum": []}', "json_schema")))
    await desk.settle()
    assert sent[0] == wire.Constrainable(1)
    assert isinstance(sent[1], wire.Failed)
    assert (sent[1].id, sent[1].code, sent[1].param) == (2, "invalid_request", "json_schema")


async def test_a_form_that_cannot_be_kept_fails_its_request_alone(desk: Desk) -> None:
    worker, sent = desk.worker, desk.sent
    wrong = Constraint("gbnf", "root ::= root", "grammar")
    worker.handle(wire.Do(5, Prefill((1, 2, 3), Sampling(), False, wrong)))
    worker.handle(wire.Do(6, Prefill((1, 2, 3), Sampling(), False)))
    await desk.settle()
    failed = next(one for one in sent if isinstance(one, wire.Failed))
    assert (failed.id, failed.param) == (5, "grammar")
    assert [one.request for one in sent if isinstance(one, wire.Done)] == [6]
    assert sum(one.is_free for one in worker.slots._holders) == worker.model.info.slots - 1


async def test_a_request_closed_while_its_form_is_compiled_does_nothing(desk: Desk) -> None:
    worker, sent = desk.worker, desk.sent
    worker.handle(wire.Do(5, PREFILL))
    worker.handle(wire.Close(5))
    await desk.settle()
    assert sent == []


# ---- without waiting for a message --------------------------------------------------------------


def alone(count: int) -> list[int]:
    """What the target says behind TEXT."""
    engine, said = ToyEngine(), list[int]()
    rows = engine.extend(0, TEXT, 1)
    for _ in range(count):
        said.append(int(rows[0].argmax()))
        rows = engine.extend(0, said[-1:], 1)
    return said


def all_verdicts(sent: Sequence[wire.Message]) -> list[Verdict]:
    return [
        one.done for one in sent if isinstance(one, wire.Done) and isinstance(one.done, Verdict)
    ]


async def test_it_takes_plain_steps_by_itself_as_far_as_it_may(desk: Desk) -> None:
    desk.open(1)
    base = len(TEXT)
    said = all_verdicts(await desk.work())
    desk.worker.handle(wire.Do(1, Verify(1, base + 1, (), until=base + 4)))
    said += all_verdicts(await desk.work())
    assert [(one.round, one.base) for one in said] == [
        (0, base),
        *((1, base + n) for n in (1, 2, 3)),
    ]
    assert [token for one in said for token in one.tokens] == alone(4)
    desk.worker.handle(wire.Do(1, Verify(2, base + 4, (), until=base + 9)))
    await desk.worker.compute()
    desk.worker.handle(wire.Close(1))
    await desk.work()
    assert all(holder.is_free for holder in desk.worker.slots._holders)
    assert len(passes(desk)) <= 6, "nobody waits for the rest"


async def test_a_block_that_was_sent_ahead_is_begun_at_once_or_dropped(desk: Desk) -> None:
    right, base = tuple(alone(9)), len(TEXT)
    wrong = (right[5] + 1) % 256
    desk.open(1)
    said = all_verdicts(await desk.work())
    orders = (
        Verify(1, base + 1, right[1:3]),
        Verify(2, base + 3, right[3:5], follows=True),
        Verify(3, base + 5, (wrong, *right[6:8]), follows=True),
        Verify(4, base + 8, right[8:], follows=True),
    )
    desk.worker.handle(wire.Pass(tuple((1, order) for order in orders)))
    said += all_verdicts(await desk.work())
    assert [(one.round, one.accepted, len(one.tokens)) for one in said] == [
        *((0, 0, 1), (1, 2, 3), (2, 1, 2))
    ]
    assert [token for one in said for token in one.tokens] == [*right[:6]]
    desk.worker.handle(wire.Do(1, Verify(5, base + 6, right[6:8])))
    (last,) = all_verdicts(await desk.work())
    assert (last.round, last.tokens) == (5, right[6:9])


async def test_more_orders_than_it_keeps_cost_the_request_alone(desk: Desk) -> None:
    desk.open(1)
    desk.open(2, TEXT[::-1])
    base = len(TEXT) + 1
    for number in range(1, MOST_WAITING + 2):
        desk.worker.handle(wire.Do(1, Verify(number, base + number, (65,), follows=True)))
    assert [one.id for one in desk.sent if isinstance(one, wire.Failed)] == [1]
    assert 2 in verdicts(await desk.work())


async def test_a_worker_that_waits_for_stragglers_can_be_ended(
    worker: TargetWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if somebody wakes it at the same moment."""
    monkeypatch.setattr(worker._stragglers, "expected", lambda now: 60.0)
    worker._turns.append(Verified(1, 0, [1], USUAL, False, 0.0))
    gathering = asyncio.ensure_future(worker._gather())
    await asyncio.sleep(0)
    worker.wake()
    gathering.cancel()
    await asyncio.wait([gathering], timeout=1)
    assert gathering.cancelled()
