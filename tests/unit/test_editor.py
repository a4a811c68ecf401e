"""The line of a conversation: what its keys do, and what its history keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input import PipeInput, create_pipe_input
from prompt_toolkit.output import DummyOutput

from outrider_services.commands import editor
from outrider_services.commands.editor import Interrupted, KeptHistory, reader

ENTER, ALT_ENTER, CTRL_C, CTRL_D, UP = "\r", "\x1b\r", "\x03", "\x04", "\x1b[A"


@pytest.fixture
def keys() -> Iterator[PipeInput]:
    with create_pipe_input() as pipe, create_app_session(input=pipe, output=DummyOutput()):
        yield pipe


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("hello" + ENTER, "hello"),
        ("one" + ALT_ENTER + "two" + ENTER, "one\ntwo"),
        ("one\\" + ENTER + "two" + ENTER, "one\ntwo"),
        ("\x1b[200~one\rtwo\x1b[201~" + ENTER, "one\ntwo"),
        ("wrong" + CTRL_C + "right" + ENTER, "right"),
        ("/sy\t" + ENTER, "/system"),
        (UP + "!" + ENTER, "earlier!"),
    ],
    ids=["enter", "alt-enter", "backslash", "paste", "ctrl-c", "tab", "up"],
)
async def test_what_keys_do(keys: PipeInput, typed: str, line: str) -> None:
    read = reader(InMemoryHistory(["earlier"]), ["/system", "/help"])
    keys.send_text(typed)
    assert await read("") == line


async def test_an_empty_line_can_be_left_and_a_begun_one_goes_on(keys: PipeInput) -> None:
    read = reader(InMemoryHistory(), [])
    keys.send_text(CTRL_C)
    with pytest.raises(Interrupted):
        await read("")
    keys.send_text(CTRL_D)
    with pytest.raises(EOFError):
        await read("")
    keys.send_text(", too" + ENTER)
    assert await read("this") == "this, too"


# ---- the history --------------------------------------------------------------------------------


def entries(path: Path) -> list[str]:
    return list(KeptHistory(path).load_history_strings())


def test_what_was_said_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "state" / "history"
    KeptHistory(path).store_string("one\ntwo é")
    assert entries(path) == ["one\ntwo é"]
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    path.chmod(0o644)  # somebody has copied it here
    assert entries(path) == ["one\ntwo é"]
    assert path.stat().st_mode & 0o777 == 0o600


def test_the_file_stays_small_and_the_latest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(editor, "MOST_BYTES", 2000)
    path = tmp_path / "history"
    kept = KeptHistory(path)
    for n in range(500):
        kept.store_string(f"# {n}\n\n# said")
        assert path.stat().st_size <= 2000
    found = entries(path)
    first = int(found[-1].split()[1])
    assert found == [f"# {n}\n\n# said" for n in range(499, first - 1, -1)]
    assert len(found) > 10
    assert path.stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [path]
    kept.store_string("x" * (editor.LONGEST + 1))
    assert entries(path) == found


def test_without_a_place_for_it_a_conversation_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "outrider").write_text("in the way")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert isinstance(editor.history(keeps=True), InMemoryHistory)
    assert "not kept for the arrow keys" in capsys.readouterr().err
    assert isinstance(editor.history(keeps=False), InMemoryHistory)
    assert capsys.readouterr().err == ""


def test_a_full_disk_ends_no_conversation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = KeptHistory(tmp_path / "history")
    (tmp_path / "history").unlink()
    (tmp_path / "history").mkdir()
    kept.store_string("one")
    assert "Is a directory" in capsys.readouterr().err
