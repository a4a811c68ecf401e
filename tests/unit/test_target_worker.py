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
from outrider.core.events import Prefill
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Verdict, Verify
from outrider.engines.toy import ToyEngine
from outrider.wire import messages as wire
from outrider_services.pipeline.target_worker import TargetWorker

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

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        turns = "".join(f"<|{role}|>{content}" for role, content in messages) + "<|assistant|>"
        return BOS_LABEL + turns if self.template_begins else turns


@pytest.fixture
async def worker() -> AsyncIterator[TargetWorker]:
    with ThreadPoolExecutor(1) as owner:
        yield TargetWorker(Beginning(), owner, (0.1,))


@pytest.mark.parametrize("template_begins", [False, True])
@pytest.mark.parametrize("typed", ["", "<|user|>"], ids=["plain", "with-a-typed-marker"])
async def test_a_conversation_begins_once(
    worker: TargetWorker, typed: str, template_begins: bool
) -> None:
    assert isinstance(worker.model, Beginning)
    worker.model.template_begins = template_begins
    content = f"a{typed}b"
    reply = worker._reply(wire.Chat(1, (("user", content), ("user", "c"))))
    plain = list(content.encode())
    assert reply == wire.Tokens(1, (BOS, USER, *plain, USER, ord("c"), ASSISTANT))


class Broken(ToyEngine):
    """Some passes give one logit that is none, or as many as there are."""

    def __init__(self, wrong: float, everywhere: bool, times: int) -> None:
        super().__init__()
        self.wrong, self.everywhere, self.times = wrong, everywhere, times

    def extend(self, slot: int, tokens: Sequence[int], rows: int) -> Scores:
        scores = super().extend(slot, tokens, rows)
        if self.times:
            self.times -= 1
            scores[:, slice(None) if self.everywhere else 99] = self.wrong
        return scores


async def answered(engine: ToyEngine, logprobs: bool) -> list[wire.Message]:
    """What a target worker with `engine` says to a prompt."""
    sent: list[wire.Message] = []
    with ThreadPoolExecutor(1) as owner:
        worker = TargetWorker(engine, owner, (0.1,))
        setattr(worker, "send", sent.append)  # noqa: B010
        worker.handle(wire.Do(5, Prefill((1, 2, 3), Sampling(), logprobs)))
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


# ---- constraints --------------------------------------------------------------------------------

ANY_OBJECT = Constraint("json")


async def at_work(worker: TargetWorker) -> None:
    """Until nothing is left to compile or to compute."""
    while worker._questions:
        await asyncio.gather(*worker._questions)
    while await worker.compute():
        pass


@pytest.fixture
async def desk() -> AsyncIterator[tuple[TargetWorker, list[wire.Message]]]:
    """A worker, and what it has sent."""
    sent: list[wire.Message] = []
    with ThreadPoolExecutor(1) as owner:
        made = TargetWorker(ToyEngine(), owner, (0.1,))
        setattr(made, "send", sent.append)  # noqa: B010
        yield made, sent


Desk = tuple[TargetWorker, list[wire.Message]]
PREFILL = Prefill((1, 2, 3), Sampling(temperature=0), False, ANY_OBJECT)


async def test_drafted_tokens_behind_a_forbidden_one_are_not_evaluated(desk: Desk) -> None:
    worker, sent = desk
    worker.handle(wire.Do(5, PREFILL))
    await at_work(worker)
    (first,) = sent
    assert isinstance(first, wire.Done)
    assert isinstance(first.done, Verdict)
    assert (first.done.tokens, first.done.forbidden) == ((ord("{"),), 0)
    worker.handle(wire.Do(5, Verify(1, 4, tuple(b'"x{}'))))  # nothing is forbidden
    worker.handle(wire.Do(6, PREFILL))
    await at_work(worker)
    worker.handle(wire.Do(6, Verify(1, 4, tuple(b'}}"'))))
    await at_work(worker)
    whole, _, cut = (one.done for one in sent[1:] if isinstance(one, wire.Done))
    assert isinstance(whole, Verdict)
    assert whole.forbidden == 0
    assert isinstance(cut, Verdict)
    assert cut.forbidden == 2
    assert len(cut.tokens) == cut.accepted + 1
    assert worker.model.length(1) == 3 + 1 + cut.accepted


async def test_whether_a_form_can_be_kept_is_asked_beforehand(desk: Desk) -> None:
    worker, sent = desk
    worker.handle(wire.Constrain(1, ANY_OBJECT))
    worker.handle(wire.Constrain(2, Constraint("schema", '{"enum": []}', "json_schema")))
    await at_work(worker)
    assert sent[0] == wire.Constrainable(1)
    assert isinstance(sent[1], wire.Failed)
    assert (sent[1].id, sent[1].code, sent[1].param) == (2, "invalid_request", "json_schema")


async def test_a_form_that_cannot_be_kept_fails_its_request_alone(desk: Desk) -> None:
    worker, sent = desk
    wrong = Constraint("gbnf", "root ::= root", "grammar")
    worker.handle(wire.Do(5, Prefill((1, 2, 3), Sampling(), False, wrong)))
    worker.handle(wire.Do(6, Prefill((1, 2, 3), Sampling(), False)))
    await at_work(worker)
    failed = next(one for one in sent if isinstance(one, wire.Failed))
    assert (failed.id, failed.param) == (5, "grammar")
    assert [one.request for one in sent if isinstance(one, wire.Done)] == [6]
    assert len(worker.slots._free) == worker.model.info.slots - 1


async def test_a_request_closed_while_its_form_is_compiled_does_nothing(desk: Desk) -> None:
    worker, sent = desk
    worker.handle(wire.Do(5, PREFILL))
    worker.handle(wire.Close(5))
    await at_work(worker)
    assert sent == []
