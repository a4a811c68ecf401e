"""Lines of the log say what happened, and nobody's text can be read from them."""

from __future__ import annotations

from typing import Any

import pytest

from outrider.core.events import (
    Cancel,
    CloseDraft,
    Commit,
    Failure,
    Fault,
    Finish,
    OpenDraft,
    Prefill,
    Start,
)
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, Fragment, Proposal, Token, Verdict, Verify
from outrider.errors import WorkerLost
from outrider_services.pipeline import journal

SECRET = b"secret"
PROMPT = tuple(range(901, 909))  # short: less than what is shown of a block
SAMPLING = Sampling(temperature=0.5, seed=4242, logit_bias=((555, 1.0),))
TOKEN = Token(17, SECRET, 40, "bonus", 1.25, -0.5)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        pytest.param(Start(draft=True), "Start(draft=True)", id="start"),
        pytest.param(Cancel(), "Cancel()", id="cancel"),
        pytest.param(
            Verdict(1, (7, 8), 3, 40, (SECRET, SECRET), (1.0, 2.0), elapsed_s=0.0123456),
            "Verdict(accepted=1, tokens=[7, 8], round=3, base=40, elapsed_s=0.01235, waited_s=0, "
            "forbidden=0, rows=0, requests=1, cached=0, beside=0, side=0)",
            id="verdict",
        ),
        pytest.param(
            Proposal(2, 41, (Drafted(9, 0.87654321),), 0.001),
            "Proposal(lineage=2, position=41, drafted=[Drafted(token=9, confidence=0.8765, "
            "free=False)], elapsed_s=0.001, waited_s=0, paused=False, recalled=[], requests=1, "
            "foreseen=False)",
            id="proposal",
        ),
        pytest.param(
            Failure(WorkerLost("the target worker is gone")),
            "Failure(error=the target worker is gone)",
            id="failure",
        ),
    ],
)
def test_a_line_shows_an_event_with_its_ids(event: Any, line: str) -> None:
    told = journal.line(5, event, [], "WAITING, draft LATE")
    assert told == f"request 5: {line} -> nothing; WAITING, draft LATE"


def test_a_line_shows_what_an_event_led_to_in_order() -> None:
    commands = [Verify(4, 42, (9, 10), until=50), CloseDraft(), Finish("stop")]
    told = journal.line(1, Start(draft=False), commands, "OVER, draft IDLE")
    assert told == (
        "request 1: Start(draft=False) -> "
        "Verify(round=4, base=42, drafted=[9, 10], follows=False, until=50, sides=[]), "
        "CloseDraft(), Finish(reason=stop); "
        "OVER, draft IDLE"
    )


def test_of_a_long_block_only_the_number_is_shown() -> None:
    assert "tokens=(17)" in journal.brief(Commit(3, tuple(range(17)), 60))
    assert f"tokens={list(range(16))}" in journal.brief(Commit(3, tuple(range(16)), 60))


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(Prefill(PROMPT, SAMPLING, True), id="prefill"),
        pytest.param(OpenDraft(1, 8, PROMPT, SAMPLING, 1000, (2, 3), 20, (0.5,)), id="open-draft"),
    ],
)
def test_a_prompt_is_not_shown_however_short(command: Any) -> None:
    told = journal.brief(command)
    assert "tokens=(8)" in told
    assert not [token for token in PROMPT if str(token) in told]


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(Verdict(0, (7,), 3, 40, (SECRET,), (1.0,)), id="verdict"),
        pytest.param(Fragment(3, SECRET.decode(), (TOKEN,), (Drafted(9, 0.9),)), id="fragment"),
        pytest.param(TOKEN, id="token"),
    ],
)
def test_neither_text_nor_pieces_are_shown(value: Any) -> None:
    told = journal.brief(value)
    assert SECRET.decode() not in told
    assert "7" in told  # but the ids are


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(Prefill(PROMPT, SAMPLING, True), id="prefill"),
        pytest.param(OpenDraft(1, 8, PROMPT, SAMPLING, 1000, (2, 3), 20), id="open-draft"),
    ],
)
def test_sampling_settings_are_not_shown(command: Any) -> None:
    told = journal.brief(command)
    assert "4242" not in told
    assert "555" not in told


def test_a_fault_says_why() -> None:
    assert journal.brief(Fault(WorkerLost("it hung"))) == "Fault(error=it hung)"
