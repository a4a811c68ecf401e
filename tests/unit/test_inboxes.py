"""What a client asks again over a new connection, and what it does not."""

from __future__ import annotations

import itertools

from outrider.client.inboxes import MOST_VAIN, Inbox, Inboxes
from outrider.client.settings import submit
from outrider.core.stats import Stats
from outrider.core.values import Fragment, Received, Token
from outrider.errors import ConnectionFailed
from outrider.wire import messages as wire

ASKED = submit(1, "text", None, {"seed": 5, "stop": "x"}).changed(key="key")
STARTED = wire.Started(1, "toy", "plain", (7, 8))
REPORT = Stats(seed=5).report()


def progress(call: int, *tokens: int) -> wire.Progress:
    said = tuple(Token(token, b"%d" % token, 2, "plain", 1.0) for token in tokens)
    return wire.Progress(call, Fragment(0, "", said, ()), None)


def asked(inboxes: Inboxes, call: int, message: wire.Submit | wire.Tokenize) -> Inbox:
    inbox = inboxes.open(call)
    inbox.asked, inbox.is_on_its_way = message, True
    return inbox


def again(inboxes: Inboxes) -> list[object]:
    """What is asked over the next connection."""
    inboxes.lost("it broke")
    numbers = itertools.count(100)
    found: list[object] = []
    for inbox, question in inboxes.again(lambda: next(numbers), "it broke"):
        inbox.is_on_its_way = True
        found.append(question)
    return found


def test_an_answer_is_asked_for_behind_what_has_come() -> None:
    inboxes = Inboxes()
    inbox = asked(inboxes, 1, ASKED)
    for message in (STARTED, progress(1, 20), progress(1, 21, 22)):
        inboxes.take(message)
    inbox.get_nowait()  # it does not matter what has been read
    received = tuple(Received(token, b"%d" % token) for token in (20, 21, 22))
    assert again(inboxes) == [ASKED.changed(call=100, prompt=(7, 8), received=received)]
    inboxes.take(progress(1, 99))  # over the old connection: nobody's
    inboxes.take(progress(100, 23))
    assert inbox.qsize() == 3
    (question,) = again(inboxes)
    assert isinstance(question, wire.Submit)
    assert [one.id for one in question.received] == [20, 21, 22, 23]


def test_one_that_has_not_begun_is_asked_for_as_it_was() -> None:
    inboxes = Inboxes()
    asked(inboxes, 1, ASKED)
    assert again(inboxes) == [ASKED.changed(call=100)]
    asked(inboxes, 2, wire.Tokenize(2, "text", True))
    assert len(again(inboxes)) == 2


def test_what_has_ended_is_not_asked_for_again() -> None:
    inboxes = Inboxes()
    ends: list[wire.Message] = [wire.Finished(1, "stop", REPORT), wire.Failed(2, "busy", "")]
    for call, last in enumerate(ends, 1):
        asked(inboxes, call, ASKED.changed(call=call))
        inboxes.take(last)
    assert len(inboxes) == 0
    assert again(inboxes) == []


def test_what_was_asked_over_the_new_connection_is_not_asked_twice() -> None:
    inboxes = Inboxes()
    inboxes.lost("it broke")
    inbox = asked(inboxes, 1, ASKED)
    assert list(inboxes.again(lambda: 100, "it broke")) == []
    assert inbox in inboxes


def test_a_question_about_the_service_ends_with_the_connection() -> None:
    inboxes = Inboxes()
    inbox = inboxes.open(1)  # with nothing to ask again
    assert again(inboxes) == []
    assert isinstance(inbox.get_nowait(), ConnectionFailed)
    assert inbox not in inboxes


def test_connections_that_break_without_a_word_come_to_an_end() -> None:
    inboxes = Inboxes()
    inbox = asked(inboxes, 1, ASKED)
    for _ in range(MOST_VAIN):
        assert len(again(inboxes)) == 1
    inboxes.take(progress(inbox.call, 20))  # a word: it was not in vain
    inbox.get_nowait()
    for _ in range(MOST_VAIN):
        assert len(again(inboxes)) == 1
    assert again(inboxes) == []
    assert isinstance(inbox.get_nowait(), ConnectionFailed)
    assert len(inboxes) == 0


def test_one_that_is_cancelled_where_nobody_is_has_the_figures_that_were_told() -> None:
    inboxes = Inboxes()
    inbox = asked(inboxes, 1, ASKED)
    assert inbox.cancelled() == wire.Finished(1, "cancelled", REPORT)
    told = REPORT.changed(generated_tokens=3)
    inboxes.take(progress(1, 20).changed(stats=told))
    assert inbox.cancelled() == wire.Finished(1, "cancelled", told)
