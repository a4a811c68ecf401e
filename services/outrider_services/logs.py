"""Log records as lines: for people, or as JSON for programs that collect them.

What a launcher starts writes JSON on stderr, and the launcher shows it as it was asked to. Each
object has `time`, `level`, `role` and `message`; one about a request has `request_id`, `round` and
`lineage`, too. Nobody's text is in them.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any, TextIO, cast

FAILURE = "outrider: "  # begins the sentence with which a command fails
MARKS = ("request_id", "round", "lineage")  # of a record about a request: see `Request.marks`


def as_json(level: str, role: str, message: str, at: float | None = None, **fields: Any) -> str:
    """One record as a line; `at` is its time in seconds since 1970, by default now."""
    when = datetime.fromtimestamp(time.time() if at is None else at, UTC)
    record = {
        "time": when.isoformat(timespec="milliseconds"),
        "level": level,
        "role": role,
        "message": message,
        **fields,
    }
    return json.dumps(record, ensure_ascii=False)


def read(line: str) -> dict[str, Any] | None:
    """The record in a line; None if it is something else, such as native output."""
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and {"level", "message"} <= record.keys() else None


def for_people(role: str, line: str) -> str:
    """What the process of this role wrote as a line, to be read by people."""
    record = read(line)
    if record is not None:
        line = f"{str(record['level']).upper()} {record['message']}"
        if "exception" in record:
            line += f"\n{record['exception']}"
    return "\n".join(f"[{role}] {one}" for one in line.split("\n"))


def for_programs(role: str, line: str) -> str:
    """The same for programs: a record as it is, and anything else as the message of one."""
    return line if read(line) is not None else as_json("info", role, line)


class JsonFormatter(logging.Formatter):
    """A record of `logging` as JSON; whoever logs about a request hands its marks as `extra`."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        fields = {name: getattr(record, name) for name in MARKS if hasattr(record, name)}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        level, message = record.levelname.lower(), record.getMessage()
        return as_json(level, self._role, message, record.created, **fields)


class Recorder:
    """A text stream of which each line is a record, whoever writes to it."""

    def __init__(self, stream: TextIO, role: str) -> None:
        self._stream, self._role, self._begun = stream, role, ""
        self.encoding, self.closed = stream.encoding, False

    def fileno(self) -> int:
        return self._stream.fileno()

    def isatty(self) -> bool:
        return False

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in filter(None, lines):
            if line.startswith(FAILURE):
                line = as_json("error", self._role, line.removeprefix(FAILURE))
            self._stream.write(for_programs(self._role, line) + "\n")
        return len(text)

    def flush(self) -> None:
        if self._begun:
            self.write("\n")
        self._stream.flush()

    def settle(self) -> None:
        """As `outlet.settle` asks for it."""
        if settle := getattr(self._stream, "settle", None):
            settle()


def record_stderr(role: str) -> None:
    """Let every line on stderr be a record for the rest of this process."""
    sys.stderr = cast(TextIO, Recorder(sys.stderr, role))
