"""Ctrl-C and SIGTERM, for one answer and in a conversation."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from outrider_services.commands import interrupts
from outrider_services.commands.interrupts import Interrupts


class Stream:
    """An answer that counts how often it was cancelled, and never ends."""

    cancelled = 0

    async def cancel(self) -> None:
        self.cancelled += 1


@pytest.fixture
async def signals() -> AsyncIterator[None]:
    """The loop's handlers do not outlive the test."""
    yield
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().remove_signal_handler(number)


async def after(
    *numbers: int, converses: bool, answering: bool = True, waited_s: float = 0.0
) -> Any:
    """What these signals, sent in turn, have led to."""
    found = SimpleNamespace(quits=False, stream=Stream(), status=0)

    async def command() -> None:
        ours = Interrupts()
        if converses:
            ours.end()
        if answering:
            ours.begin(cast(Any, found.stream), cast(Any, SimpleNamespace(waited_s=waited_s)))
        try:
            for number in numbers:
                os.kill(os.getpid(), number)
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.2)
        except asyncio.CancelledError:
            found.quits = True
        found.status = ours.status
        ours.end()

    await asyncio.ensure_future(command())
    return found


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("converses", [False, True])
async def test_the_first_ctrl_c_ends_the_answer_and_sigterm_quits(converses: bool) -> None:
    found = await after(INT, converses=converses)
    assert (found.quits, found.stream.cancelled, found.status) == (False, 1, 130)
    found = await after(TERM, converses=converses)
    assert (found.quits, found.stream.cancelled, found.status) == (True, 0, 143)
    found = await after(INT, converses=converses, waited_s=interrupts.UNREAD_S + 1)
    assert found.quits  # nobody reads what there is to show


@pytest.mark.usefixtures("signals")
async def test_a_second_ctrl_c_quits_but_in_a_conversation_only_if_nothing_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (await after(INT, INT, converses=False)).quits
    found = await after(INT, INT, INT, converses=True)
    assert (found.quits, found.stream.cancelled, found.status) == (False, 1, 130)
    monkeypatch.setattr(interrupts, "TWICE_S", 0.0)
    assert (await after(INT, INT, converses=True)).quits


@pytest.mark.usefixtures("signals")
async def test_between_the_answers_of_a_conversation_ctrl_c_does_nothing() -> None:
    found = await after(INT, converses=True, answering=False)
    assert (found.quits, found.status) == (False, 0)
    assert (await after(INT, converses=False, answering=False)).quits  # it is still loading
