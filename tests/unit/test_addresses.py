"""Where sockets lie: a directory that only its user can enter, or one sentence why not."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from outrider.errors import ConfigError
from outrider.wire.addresses import remove_socket, runtime_dir, socket_path
from outrider.wire.doors import close_door, open_door


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_it_is_made_for_its_user_alone_and_so_are_its_parents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_umask: None
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "a" / "b"))
    path = runtime_dir()
    assert path == tmp_path / "a" / "b" / "outrider"
    for one in (path, path.parent, path.parent.parent):
        assert stat.S_IMODE(one.stat().st_mode) == 0o700
    assert runtime_dir() == path
    assert socket_path("mine") == path / "mine.sock"


def test_a_file_in_its_place_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"there can be no directory .*file/outrider"):
        runtime_dir()


@pytest.mark.skipif(os.getuid() == 0, reason="the superuser writes everywhere")
def test_a_directory_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o500)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="Permission denied"):
        runtime_dir()


def test_a_directory_that_others_can_enter_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outrider").mkdir(mode=0o755)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(ConfigError, match="chmod 700"):
        runtime_dir()


def test_nothing_is_left_of_a_socket_whose_name_was_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "there.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        close_door(listening.fileno())
        assert not path.exists()
        remove_socket(path)
        assert list(tmp_path.iterdir()) == []
        open_door(listening.fileno())  # in vain, and no error
