"""What is shown on a terminal, and what in a file that stderr goes to."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.table import Table

from outrider_services.terminal import News, progress_reporter, show


def console(*, terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=100), out


def test_elsewhere_than_on_a_terminal_a_download_is_a_line_at_every_tenth() -> None:
    shown, out = console(terminal=False)
    with progress_reporter(shown) as progress:
        for done in range(0, 5_000_001, 100_000):
            progress(done, 5_000_000, "a.gguf")
            progress(done // 10, 5_000_000, "b.gguf")
    lines = out.getvalue().splitlines()
    assert [line for line in lines if line.startswith("a")] == [
        f"a.gguf: {tenth} % of 5 MB" for tenth in range(0, 101, 10)
    ]
    assert [line for line in lines if line.startswith("b")] == [
        "b.gguf: 0 % of 5 MB",
        "b.gguf: 10 % of 5 MB",
    ]


def test_on_a_terminal_each_download_has_a_bar() -> None:
    shown, out = console(terminal=True)
    with progress_reporter(shown) as progress:
        progress(2_000_000, 4_000_000, "a.gguf")
        progress(1_000_000, 4_000_000, "b.gguf")
    text = out.getvalue()
    assert "a.gguf" in text
    assert "2.0/4.0 MB" in text
    assert "1.0/4.0 MB" in text


def test_on_a_terminal_one_line_says_how_far_all_processes_are() -> None:
    shown, out = console(terminal=True)
    with News(shown) as news:
        news.report("target", "loading", 0.25)
        news.report("draft", "starting", 0.0)
        assert news._status is not None
        assert news._status.status == "target loading 25%, draft starting"
        news.report("target", "ready", 1.0)
        assert news._status.status == "target ready, draft starting"
    assert out.getvalue()


def test_elsewhere_only_what_the_processes_say_is_shown(
    capsys: pytest.CaptureFixture[str],
) -> None:
    shown, out = console(terminal=False)
    with News(shown) as news:
        news.report("target", "loading", 0.25)
        news.log("target", "out of memory")
    assert out.getvalue() == ""
    assert capsys.readouterr().err == "[target] out of memory\n"


def test_a_program_that_reads_a_table_gets_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "file", box=None)
    table.add_row("m", "/a" * 500)
    show(table)
    assert capsys.readouterr().out.splitlines()[1].split() == ["m", "/a" * 500]
