"""Log records as lines: what programs get, what people get, and nothing in between."""

from __future__ import annotations

import io
import json
import logging
import sys
from typing import Any

import pytest

from outrider_services import logs
from outrider_services.terminal import News


def record(message: str, *args: object, **extra: Any) -> logging.LogRecord:
    made = logging.LogRecord("outrider", logging.WARNING, __file__, 1, message, args, None)
    vars(made).update(extra)
    return made


def test_a_record_is_one_object_with_its_marks_and_no_others() -> None:
    made = record("request %d: %s", 3, 'a "word"\nof é', request_id=3, round=5, lineage=2, secret=1)
    line = logs.JsonFormatter("coordinator").format(made)
    found = json.loads(line)
    assert "\n" not in line
    assert found.pop("time").endswith("+00:00")
    assert found == {
        "level": "warning",
        "role": "coordinator",
        "message": 'request 3: a "word"\nof é',
        "request_id": 3,
        "round": 5,
        "lineage": 2,
    }
    assert set(json.loads(logs.JsonFormatter("draft").format(record("hm")))) == {
        *("time", "level", "role", "message")
    }


def test_a_traceback_stays_in_its_record() -> None:
    made = record("failed")
    try:
        raise KeyError("k")
    except KeyError:
        made.exc_info = sys.exc_info()
    line = logs.JsonFormatter("target").format(made)
    assert json.loads(line)["exception"].endswith("KeyError: 'k'")
    shown = logs.for_people("target", line).splitlines()
    assert shown[:2] == ["[target] WARNING failed", "[target] Traceback (most recent call last):"]
    assert shown[-1] == "[target] KeyError: 'k'"


@pytest.mark.parametrize("line", ["out of memory", "{", "{}", "[1]", '{"level": "info"}', ""])
def test_what_is_no_record_is_tagged_for_people_and_wrapped_for_programs(line: str) -> None:
    assert logs.for_people("draft", line) == f"[draft] {line}"
    found = json.loads(logs.for_programs("draft", line))
    assert (found["role"], found["level"], found["message"]) == ("draft", "info", line)


def test_news_are_shown_as_asked(capsys: pytest.CaptureFixture[str]) -> None:
    line = logs.JsonFormatter("coordinator").format(record("it is %s", "so", request_id=1))
    for as_json in (False, True):
        News(as_json=as_json).log("coordinator", line)
        News(as_json=as_json).log("target", "native")
    text, tagged, same, wrapped = capsys.readouterr().err.splitlines()
    assert (text, tagged) == ("[coordinator] WARNING it is so", "[target] native")
    assert same == line
    assert json.loads(wrapped)["message"] == "native"


def test_whatever_is_written_to_a_recorder_comes_as_records() -> None:
    out = io.StringIO()
    recorder = logs.Recorder(out, "launcher")
    whole = logs.as_json("error", "draft", "gone")
    for part in ("Rea", "dy: now\n\nsecond\n", whole[:9], whole[9:] + "\n", "outrider: no\nlast"):
        recorder.write(part)
    recorder.flush()
    lines = out.getvalue().splitlines()
    assert json.loads(lines[3])["level"] == "error"
    assert [json.loads(line)["message"] for line in lines] == [
        "Ready: now",
        "second",
        "gone",
        "no",
        "last",
    ]
    assert lines[2] == whole
    assert not recorder.isatty()
