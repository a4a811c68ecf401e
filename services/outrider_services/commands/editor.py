"""The line that a user edits in a conversation, and the history behind its arrow keys."""

from __future__ import annotations

import os
import secrets
import sys
import termios
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import has_focus
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.patch_stdout import patch_stdout
from prompt_toolkit.shortcuts import CompleteStyle

from outrider_services.terminal import tell

PROMPT = "> "
MOST_BYTES = 1 << 20  # of the history; beyond, its older half is dropped
LONGEST = 1 << 15  # characters of what is kept: the rest of a book is not for arrow keys
ENTRY = b"\n# "  # how one begins in prompt_toolkit's file: what was said has a + before each line

# gives what the user enters, beginning with a text to edit; raises EOFError to leave, `Interrupted`
Reader = Callable[[str], Awaitable[str]]


class Interrupted(Exception):
    """Ctrl-C on an empty line."""


class KeptHistory(FileHistory):
    """A history in a file that only its owner may read, and that stays small. Raises OSError."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.fchmod(fd, 0o600)
        finally:
            os.close(fd)
        super().__init__(path)
        self._path = path

    def store_string(self, string: str) -> None:
        if len(string) > LONGEST:
            return
        try:
            super().store_string(string)
            if self._path.stat().st_size > MOST_BYTES:
                self._shorten()
        except OSError as exc:  # the disk may be full: that ends no conversation
            tell(f"What was said is not kept for the arrow keys: {exc.strerror}")

    def _shorten(self) -> None:
        """Drop the older half; whoever reads it meanwhile finds the one or the other."""
        data = self._path.read_bytes()
        begin = data.find(ENTRY, len(data) // 2)
        new = self._path.with_name(f"{self._path.name}-{secrets.token_hex(4)}")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data[begin:] if begin >= 0 else b"")
        new.replace(self._path)


def history(*, keeps: bool) -> History:
    """That of earlier conversations, which this one goes on; or one that ends with it."""
    path = platformdirs.user_state_path("outrider") / "history"
    try:
        return KeptHistory(path) if keeps else InMemoryHistory()
    except OSError as exc:
        tell(f"What is said is not kept for the arrow keys: {path}: {exc.strerror}")
        return InMemoryHistory()


def reader(known: History, commands: Iterable[str]) -> Reader:
    """Reads from the terminal; Tab completes one of the `commands`."""
    session: PromptSession[str] = PromptSession(
        history=known,
        multiline=True,
        prompt_continuation="  ",
        key_bindings=_keys(),
        completer=WordCompleter(sorted(commands), sentence=True),
        complete_style=CompleteStyle.READLINE_LIKE,
    )

    async def read(begun: str) -> str:
        with patch_stdout(raw=True):  # what processes tell meanwhile comes above the line
            return await session.prompt_async(PROMPT, default=begun, handle_sigint=False)

    return read


def _keys() -> KeyBindings:
    keys, editing = KeyBindings(), has_focus(DEFAULT_BUFFER)

    @keys.add("enter", filter=editing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=editing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=editing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=Interrupted())

    return keys


@contextmanager
def unechoed() -> Iterator[None]:
    """What is typed inside is not shown; the next line begins with it."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(fd, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSANOW, before)
