"""The target worker without a coordinator: conversations, and a model that computes nonsense."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from outrider.core.events import Prefill
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Verdict
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

    def chat_template(self, name: str = "") -> str | None:
        return None

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
    reply = worker._reply(wire.Chat(1, (wire.Turn("user", content), wire.Turn("user", "c"))))
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
