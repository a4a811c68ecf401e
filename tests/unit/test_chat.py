"""A conversation: what is kept of it, what each command does, and what a failure costs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any, cast

import pytest

from outrider.client import AsyncClient, Completion, CompletionChoice, Usage
from outrider.client.results import FinishReason
from outrider.core.stats import Stats
from outrider.core.values import Fragment
from outrider.errors import BadRequest, ConnectionFailed, OutriderError, WorkerLost
from outrider_services.commands import chat
from outrider_services.commands.chat import Chat
from outrider_services.commands.editor import Interrupted

STOP: FinishReason = "stop"
Outcome = str | tuple[str, FinishReason] | OutriderError


class Answer:
    """A stream that says what the test wants, then ends or fails."""

    def __init__(self, outcome: Outcome) -> None:
        self.fragments: list[Fragment] = []
        self._outcome = outcome

    async def __aiter__(self) -> AsyncIterator[Fragment]:
        if isinstance(self._outcome, OutriderError):
            raise self._outcome
        text = self._outcome if isinstance(self._outcome, str) else self._outcome[0]
        self.fragments.append(Fragment(0, text, (), ()))
        yield self.fragments[0]

    async def result(self) -> Completion:
        outcome = self._outcome
        assert not isinstance(outcome, OutriderError)
        text, reason = outcome if isinstance(outcome, tuple) else (outcome, STOP)
        choice = CompletionChoice(text, 0, reason, None, None)
        usage = Usage(1, len(text), 1 + len(text))
        stats = Stats(seed=7).report()
        return Completion("", "text_completion", 0, "", (choice,), usage, (), (), stats, None)


class Client:
    """Gives these answers in turn, and remembers what it was asked."""

    def __init__(self, outcomes: Iterable[Outcome]) -> None:
        self._outcomes = iter(outcomes)
        self.asked: list[list[tuple[str, str]]] = []
        self.requests: list[dict[str, Any]] = []

    async def health(self) -> dict[str, Any]:
        models = {"draft": "small", "target": "large", "draft-2": "small"}
        roles = {name: name.removesuffix("-2") for name in models}
        return {"workers": {n: {"role": roles[n], "model": one} for n, one in models.items()}}

    async def create_chat_completion(
        self, messages: Any, *, stream: bool, **request: Any
    ) -> Answer:
        assert stream
        self.asked.append([(one["role"], one["content"]) for one in messages])
        self.requests.append(request)
        return Answer(next(self._outcomes))


class Printer:
    async def fragment(self, fragment: Fragment) -> None:
        pass

    def legend(self) -> None:
        pass


class Interrupts:
    status = 0

    def begin(self, *_: object) -> None:
        pass

    def end(self) -> None:
        pass


async def converse(*lines: object, answers: Iterable[Outcome] = ()) -> SimpleNamespace:
    """Say these lines, of which an exception is raised; what was asked, and what was offered."""
    client, interrupts, said = Client(answers), Interrupts(), iter(lines)
    begun: list[str] = []

    async def read(text: str) -> str:
        begun.append(text)
        line = next(said, EOFError())
        if isinstance(line, Exception):
            raise line
        return str(line)

    talk = Chat(
        cast(AsyncClient, client),
        {"max_tokens": 9, "seed": None},
        cast(Any, Printer),
        cast(Any, interrupts),
        stats=True,
    )
    await talk.run(read)
    return SimpleNamespace(talk=talk, begun=begun, status=interrupts.status, **vars(client))


@pytest.fixture(autouse=True)
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "unechoed", nullcontext)


async def test_each_answer_is_asked_for_with_all_that_was_said() -> None:
    found = await converse("one", "  two\nlines ", answers=("first", " second"))
    assert found.asked == [
        [("user", "one")],
        [("user", "one"), ("assistant", "first"), ("user", "two\nlines")],
    ]
    assert found.talk.transcript.exchanges == [("one", "first"), ("two\nlines", " second")]


async def test_what_is_said_to_the_model_beforehand_can_be_changed_and_taken_back() -> None:
    lines = ("/system be brief", "one", "/system", "two")
    found = await converse(*lines, answers=("first", "second"))
    assert found.asked[0] == [("system", "be brief"), ("user", "one")]
    assert [role for role, _ in found.asked[1]] == ["user", "assistant", "user"]


async def test_clear_forgets_what_was_said_but_not_how_to_answer() -> None:
    found = await converse("/system s", "one", "/clear", "two", answers=("first", "second"))
    assert found.asked[1] == [("system", "s"), ("user", "two")]


async def test_regenerate_answers_the_last_message_anew_with_another_seed() -> None:
    found = await converse("one", "/regenerate", answers=("first", "other"))
    assert found.asked == [[("user", "one")]] * 2
    assert found.requests[0]["seed"] is None
    assert found.requests[1]["seed"] >= 0
    assert found.talk.transcript.exchanges == [("one", "other")]


async def test_an_answer_that_cannot_be_made_anew_stays() -> None:
    answers = ("first", WorkerLost("gone"))
    found = await converse("one", "/regenerate", answers=answers)
    assert found.talk.transcript.exchanges == [("one", "first")]
    assert found.begun[-1] == ""


async def test_nothing_is_lost_by_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    answers: tuple[Outcome, ...] = (
        BadRequest("it is too long", "prompt"),
        "first",
        WorkerLost("no"),
        BadRequest("now it is", "prompt"),
    )
    found = await converse("one", "one!", "two", "two!", answers=answers)
    assert found.begun == ["", "one", "", "two", "two!"]
    assert found.talk.transcript.exchanges == [("one!", "first")]
    told = capsys.readouterr().err.splitlines()
    assert "outrider: it is too long" in told
    assert "outrider: no" in told
    assert "outrider: now it is (/clear begins anew)" in told


async def test_without_its_pipeline_a_conversation_ends() -> None:
    with pytest.raises(ConnectionFailed):
        await converse("one", answers=(ConnectionFailed("gone"),))


async def test_a_stopped_answer_stays_as_far_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    answers: tuple[Outcome, ...] = (("fir", "cancelled"), ("", "cancelled"), ("third", "stop"))
    found = await converse("one", "two", "three", answers=answers)
    assert found.talk.transcript.exchanges == [("one", "fir"), ("three", "third")]
    assert found.begun[2] == "two"  # it was stopped before the first word
    assert capsys.readouterr().err.count("; stopped]") == 2


@pytest.mark.parametrize(
    ("answer", "remark"),
    [("x" * 9, "cut by -n"), ("x" * 8, "the context is full: /clear begins anew")],
)
async def test_why_an_answer_breaks_off_is_told(
    answer: str, remark: str, capsys: pytest.CaptureFixture[str]
) -> None:
    await converse("one", answers=((answer, "length"),))
    assert remark in capsys.readouterr().err


async def test_an_unknown_command_is_told_and_can_be_mended(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = await converse("/claer", "/", answers=())
    assert found.begun == ["", "/claer", "/"]
    assert "there is no /claer; did you mean /clear?" in capsys.readouterr().err
    assert found.asked == []


async def test_a_path_and_a_slash_behind_a_space_are_no_commands() -> None:
    found = await converse("/etc/passwd, what is it?", " /help me", answers=("a", "b"))
    assert found.asked[1][-1] == ("user", "/help me")
    assert len(found.asked) == 2


async def test_commands_without_an_answer_to_be_about_say_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = await converse("/stats", "/regenerate", "", " \n", "/help")
    told = capsys.readouterr().err
    assert told.count("There is no answer yet.") == 2
    for name in found.talk.commands:
        assert name == "/help" or f"  {name}" in told
    await converse("one", "/stats", answers=("first",))
    assert "Seed: 7" in capsys.readouterr().err


async def test_it_is_left_by_bye_by_the_end_and_by_ctrl_c_twice_in_a_row(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert (await converse("/bye", "never said")).asked == []
    assert (await converse(EOFError(), "never said")).asked == []
    found = await converse(Interrupted(), "one", Interrupted(), Interrupted(), answers=("first",))
    assert len(found.asked) == 1
    assert found.status == 130
    assert capsys.readouterr().err.count("Ctrl-C again, or Ctrl-D, leaves.") == 2
