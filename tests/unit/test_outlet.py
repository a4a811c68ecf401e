"""What nobody reads: it is dropped and counted, or waited for where a process can still end."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Iterator

import pytest

from outrider_services import outlet
from outrider_services.outlet import LINES, MOST, WITHIN_S, Few, Outlet, in_thread


class Reader:
    """A pipe that is read when a test says so."""

    def __init__(self) -> None:
        self.end, self.fd = os.pipe()

    def lines(self, until: str) -> list[str]:
        """All up to the line `until`, which has to come."""
        got = b""
        while f"{until}\n".encode() not in got:
            part = os.read(self.end, 1 << 16)
            assert part, got[-200:]
            got += part
        return got.decode().splitlines()

    def close(self) -> None:
        for fd in (self.end, self.fd):
            os.close(fd)


@pytest.fixture
def reader() -> Iterator[Reader]:
    one = Reader()
    yield one
    one.close()


def test_lines_come_in_order(reader: Reader) -> None:
    out = Outlet(reader.fd)
    for n in range(500):
        out.write(f"{n}\n")
    out.settle()
    assert reader.lines("499") == [f"{n}" for n in range(500)]


def test_what_nobody_reads_is_dropped_and_counted(reader: Reader) -> None:
    out, text = Outlet(reader.fd), "x" * 1000
    began = time.monotonic()
    for n in range(3 * MOST):
        out.write(f"{n} {text}\n")
    for _ in range(100):
        out.settle()
    assert time.monotonic() - began < 1  # it waited once, and for a moment
    assert MOST // 2 <= len(out._texts) <= MOST
    told = reader.lines(f"outrider: {out._dropped} lines were dropped, as nobody read")
    shown = [int(line.split()[0]) for line in told[:-1]]
    assert shown == list(range(len(shown)))
    assert len(shown) + int(told[-1].split()[1]) == 3 * MOST
    out.write("after\n")
    out.settle()
    assert reader.lines("after") == ["after"]


def test_the_number_stands_where_the_gap_is(reader: Reader) -> None:
    out, text = Outlet(reader.fd), "x" * 1000
    for n in range(2 * MOST):
        out.write(f"{n} {text}\n")
    dropped = out._dropped
    first = reader.lines(f"{MOST // 2 + 200} {text}")  # then there is room for many
    out.write("after\n")
    told = [*first, *reader.lines("after")]
    assert told[-2:] == [f"outrider: {dropped} lines were dropped, as nobody read", "after"]


def test_a_reader_who_is_gone_keeps_nobody_waiting() -> None:
    end, fd = os.pipe()
    os.close(end)
    out = Outlet(fd)
    for _ in range(10):
        out.write("nobody\n")
    out.settle(1)
    assert not out._texts
    os.close(fd)


def test_a_pipe_that_another_made_non_blocking_loses_nothing(reader: Reader) -> None:
    os.set_blocking(reader.fd, False)
    out = Outlet(reader.fd)
    for n in range(200):
        out.write(f"{n} " + "x" * 1000 + "\n")
    out.write("last\n")
    assert len(reader.lines("last")) == 201


def test_what_cannot_be_encoded_is_written_with_substitutes(reader: Reader) -> None:
    out = Outlet(reader.fd, "ascii")
    out.write("\u4e2d\ud800\n")
    out.settle()
    assert reader.lines("??") == ["??"]


async def test_waiting_for_a_thread_can_be_cancelled(reader: Reader) -> None:
    waiting = asyncio.ensure_future(in_thread(lambda: os.read(reader.end, 1)))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    os.write(reader.fd, b"xy")  # so that the thread ends
    assert await in_thread(lambda: os.read(reader.end, 1)) in (b"x", b"y")
    with pytest.raises(BrokenPipeError):
        await in_thread(lambda: raise_(BrokenPipeError()))


def raise_(error: Exception) -> None:
    raise error


# ---- log lines of one kind ----------------------------------------------------------------------


class Log:
    """A log in made-up time, and what it shows."""

    def __init__(self) -> None:
        self.now, self.shown = 0.0, list[str]()
        self._few = Few(lambda: self.now)

    def __call__(self, level: int, template: str, *args: object) -> None:
        record = logging.LogRecord("outrider", level, __file__, 1, template, args, None)
        if self._few.filter(record):
            self.shown.append(record.getMessage())


def test_few_lines_of_a_kind_are_shown_at_a_time() -> None:
    log = Log()
    for n in range(100):
        log(logging.WARNING, "dropped: %s", n)
        log(logging.WARNING, "other %d %%: %s", n % 5, n) if n < 5 else None
    assert len(log.shown) == LINES + 5
    assert log.shown[-1].startswith(f"dropped: {LINES - 1} (more like this")
    log.now = WITHIN_S
    log(logging.ERROR, "dropped: %s", "again, 5 %")
    assert log.shown[-1] == f"dropped: again, 5 % ({100 - LINES} more like this were not shown)"
    log(logging.WARNING, "dropped: %s", "once more")
    assert log.shown[-1] == "dropped: once more"


def test_lines_for_debugging_are_all_shown() -> None:
    log = Log()
    for n in range(100):
        log(logging.DEBUG, "%s", n)
    assert log.shown == [f"{n}" for n in range(100)]


def test_kinds_without_end_are_not_kept() -> None:
    log = Log()
    for n in range(3 * outlet.KINDS):
        log(logging.WARNING, f"one of a kind: {n}")
    assert len(log.shown) == 3 * outlet.KINDS
    assert len(log._few._kinds) == outlet.KINDS
