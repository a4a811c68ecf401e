"""The target worker without a coordinator: how a conversation becomes token ids."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

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
