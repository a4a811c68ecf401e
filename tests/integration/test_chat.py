"""A conversation in a real terminal: what is typed, what is shown, and what is left behind."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from outrider.engines.toy import ToyEngine

if TYPE_CHECKING:
    from tests.integration.conftest import Answer, Cli, Oracle, Served

QUICK = ("--backend=toy", "--toy-step-ms=2", "--toy-draft-ms=0.2", "--toy-row-ms=0.02")
GREEDY = ("--temperature", "0")
CODES = re.compile(r"\x1b\[[\d;?]*[A-Za-z]|\x1b[=>]|\r|\x08")
SPACE = "\x08\x1b[2C"  # as prompt_toolkit moves over one at the end of a line
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
ASKS = r"> $"  # it waits for a line

pytestmark = pytest.mark.timeout(90)  # some have three pipelines, one after another


class Screen:
    """An `outrider` command on a pseudo-terminal of its own, 80 columns wide."""

    def __init__(self, cli: Cli, *arguments: str, **environment: str) -> None:
        self._ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        self.process = subprocess.Popen(
            ["setsid", "--ctty", *cli._command(arguments)],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=cli.directory,
            env=cli._environment(
                {"TERM": "xterm-256color", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
            ),
        )
        os.close(theirs)
        self.raw = ""
        self._seen = 0

    @property
    def text(self) -> str:
        """All that was shown, without codes and colours."""
        return CODES.sub("", self.raw.replace(SPACE, " "))

    def type(self, text: str) -> None:
        os.write(self._ours, text.encode())

    def until(self, pattern: str, within_s: float = 15.0) -> str:
        """Wait until this is shown behind what was seen before; all up to its end."""
        deadline = time.monotonic() + within_s
        while not (found := re.compile(pattern).search(self.text, self._seen)):
            assert time.monotonic() < deadline, (pattern, self.text)
            assert self._read(0.1), (pattern, self.text)
        text = self.text[self._seen : found.end()]
        self._seen = found.end()
        return text

    def shows(self, text: str) -> bool:
        """Whether this is shown, or is in a moment."""
        self._read(0.5)
        return text in self.text[self._seen :]

    def _read(self, within_s: float) -> bool:
        """Take what comes; False at the end."""
        if select.select([self._ours], [], [], within_s)[0]:
            try:
                data = os.read(self._ours, 1 << 16)
            except OSError:
                return False
            self.raw += data.decode("utf-8", "replace")
        return True

    def ends(self, within_s: float = 10.0) -> int:
        """Its exit status."""
        deadline = time.monotonic() + within_s
        while self._read(0.1):
            assert time.monotonic() < deadline, self.text
        return self.process.wait(timeout=5)

    def says(self, line: str) -> str:
        """Type a line; the answer."""
        self.type(f"{line}\r")
        shown = self.until(r"\n\[\d+ tokens?[^]]*\]\n")
        self.until(ASKS)
        return shown.rsplit("\n[", 1)[0].rsplit("\n", 1)[-1]

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._ours)


@pytest.fixture
def screen() -> Iterator[Callable[..., Screen]]:
    open_ones: list[Screen] = []

    def start(*arguments: object, **environment: str) -> Screen:
        one = Screen(*arguments, **environment)  # type: ignore[arg-type]
        open_ones.append(one)
        return one

    yield start
    for one in open_ones:
        one.close()


def expected(oracle: Oracle, count: int, *messages: str) -> Answer:
    """What the target answers to these messages, of the user and the model in turn."""
    turns = [(("user", "assistant")[n % 2], text) for n, text in enumerate(messages)]
    engine = ToyEngine()
    prompt = engine.tokenize(engine.render(turns), special=True)
    return oracle(tuple(prompt), count)


def test_a_second_turn_contains_the_first(
    cli: Cli, oracle: Oracle, screen: Callable[..., Screen]
) -> None:
    shown = screen(cli, "run", *QUICK, *GREEDY, "-n", "40")
    assert "toy-target with toy-draft\n/help tells" in shown.until(ASKS)
    first = shown.says("hello there")
    assert first == expected(oracle, 40, "hello there").text
    second = shown.says("and then?")
    assert second == expected(oracle, 40, "hello there", first, "and then?").text
    shown.type("/clear\r")
    shown.until("Forgotten.")
    assert shown.says("and then?") == expected(oracle, 40, "and then?").text != second
    assert re.search(r"\[40 tokens, [\d.]+/s, .*accepted; cut by -n\]", shown.text)
    shown.type(CTRL_D)
    assert shown.ends() == 0


def test_ctrl_c_stops_the_answer_alone_and_what_was_said_stays(
    cli: Cli, oracle: Oracle, screen: Callable[..., Screen]
) -> None:
    slow = ("--backend=toy", "--toy-step-ms=60", "--toy-draft-ms=6")
    shown = screen(cli, "run", *slow, *GREEDY)
    shown.until(ASKS)
    shown.type("hello\r")
    shown.until(r"\n[^>\n]{12}")
    shown.type(CTRL_C + CTRL_C)  # as an impatient hand does it
    said = shown.until(r"; stopped\]\n")
    shown.until(ASKS)
    whole = expected(oracle, 400, "hello").text
    part = shown.text[: shown.text.rindex("\n[")].rsplit("\n", 1)[-1]
    assert 5 < len(part) < 400, said
    assert whole.startswith(part)
    shown.process.send_signal(signal.SIGINT)  # too late for the answer: it costs nothing
    shown.type("more\r")
    follows = expected(oracle, 400, "hello", part, "more").text
    shown.until(re.escape(follows[:20]))
    shown.type(CTRL_C)
    shown.until(r"; stopped\]\n")
    shown.until(ASKS)
    shown.type("begun" + CTRL_C)
    time.sleep(0.2)
    shown.type(CTRL_C)
    shown.until("Ctrl-C again, or Ctrl-D, leaves.")
    shown.until(ASKS)
    shown.type(CTRL_C)
    assert shown.ends() == 130


def test_help_and_system_on_a_pipeline_that_is_up(
    served: Served, oracle: Oracle, screen: Callable[..., Screen]
) -> None:
    shown = screen(served.cli, "run", "--connect=shared", *GREEDY, "-n", "20", "--no-stats")
    shown.until(ASKS)
    shown.type("/help\r")
    told = shown.until(ASKS)
    for name in ("/clear", "/system TEXT", "/regenerate", "/stats", "/bye"):
        assert f"  {name} " in told
    assert max(map(len, told.splitlines())) <= 90
    shown.type("/system be brief\r")
    shown.until("told so")
    shown.until(ASKS)
    engine = ToyEngine()
    turns = [("system", "be brief"), ("user", "hello")]
    answer = oracle(tuple(engine.tokenize(engine.render(turns), special=True)), 20)
    shown.type("hello\r")
    shown.until(re.escape(answer.text) + "\n")
    shown.until(ASKS)
    assert "[20 tokens" not in shown.text
    shown.type("/stats\r")
    shown.until(r"Total tokens generated: 20 ")
    shown.until(ASKS)
    shown.type("/bye\r")
    assert shown.ends() == 0


def test_what_was_said_is_kept_for_its_owner_unless_that_is_switched_off(
    cli: Cli, oracle: Oracle, screen: Callable[..., Screen]
) -> None:
    path = cli.directory / "state" / "outrider" / "history"
    shown = screen(cli, "run", *QUICK, *GREEDY, "-n", "20", OUTRIDER_TERMINAL__HISTORY="false")
    shown.until(ASKS)
    shown.says("nobody's business")
    shown.type(CTRL_D)
    assert shown.ends() == 0
    assert not path.exists()
    for key in ("hello", UP):
        shown = screen(cli, "run", *QUICK, *GREEDY, "-n", "20")
        shown.until(ASKS)
        shown.type(key)
        while not shown.shows("hello"):
            shown.type(UP)  # what was said is loaded while the line waits for its first key
        assert shown.says("") == expected(oracle, 20, "hello").text
        shown.type(CTRL_D)
        assert shown.ends() == 0
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.read_text().count("+hello") == 1
    assert "nobody" not in path.read_text()


def test_a_conversation_longer_than_the_context_is_one_sentence_and_goes_on(
    cli: Cli, oracle: Oracle, screen: Callable[..., Screen]
) -> None:
    shown = screen(cli, "run", *QUICK, *GREEDY, "--ctx", "256")
    shown.until(ASKS)
    shown.type("a" * 300 + "\r")
    shown.until(
        r"\noutrider: the prompt has \d+ tokens, and a context of 256 leaves no room [^\n]*\n"
    )
    shown.until("a" * 60)  # what was not answered can be mended
    shown.type(CTRL_C)
    time.sleep(0.2)
    shown.type("hello\r")
    shown.until(r"the context is full: /clear begins anew, and --ctx makes room for more")
    shown.until(ASKS)
    shown.type("more\r")
    shown.until(r"\(/clear begins anew\)\n> more$")
    shown.type(CTRL_C + "/clear\r")
    shown.until("Forgotten.")
    shown.until(ASKS)
    shown.type(CTRL_D)
    assert shown.ends() == 0


def test_tokens_are_coloured_on_a_terminal_and_nowhere_else(
    slow: Served, oracle: Oracle, screen: Callable[..., Screen]
) -> None:
    flags = ("run", "--connect=slow", *GREEDY, "-n", "40", "--color-tokens", "The river")
    shown = screen(slow.cli, *flags)
    assert shown.ends() == 0
    answer = oracle("The river", 40).text
    assert f"\n{answer}\n" in shown.text
    assert shown.text.startswith("drafted (accepted)  corrected  bonus")
    assert "\x1b[4;32m" in shown.raw.partition("\n")[2]
    plain = screen(slow.cli, *flags, NO_COLOR="1")
    assert plain.ends() == 0
    assert f"\n{answer}\n" in plain.text
    assert not re.search(r"\x1b\[[\d;]*3\dm", plain.raw)
    assert "\x1b[4m" in plain.raw.partition("\n")[2]
    piped = slow.cli(*flags, "--no-stats")
    assert (piped.stdout, piped.stderr) == (answer + "\n", "")


@pytest.mark.parametrize("flags", [("-o", "json"), ("--baseline",), ("hello",), ("-p", "hello")])
def test_whoever_asks_for_one_answer_gets_one(
    served: Served, screen: Callable[..., Screen], flags: tuple[str, ...]
) -> None:
    shown = screen(served.cli, "run", "--connect=shared", "-n", "5", *flags)
    assert shown.ends() == 0
    assert "/help" not in shown.text


def test_sigterm_ends_a_conversation_and_leaves_the_terminal_as_it_was(
    cli: Cli, screen: Callable[..., Screen]
) -> None:
    shown = screen(cli, "run", *QUICK)
    before = termios.tcgetattr(shown._ours)
    shown.until(ASKS)
    assert termios.tcgetattr(shown._ours)[3] != before[3]
    shown.process.send_signal(signal.SIGTERM)
    assert shown.ends() == 143
    assert termios.tcgetattr(shown._ours)[3] == before[3]
