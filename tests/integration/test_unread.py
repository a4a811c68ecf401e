"""Nobody reads what is written: a full pipe, a terminal that was stopped, a launcher that sleeps.

Whatever was to be said, requests go on, and a signal ends every command within seconds.
"""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import zmq

from outrider import Client
from outrider.wire import messages as wire
from outrider.wire.codec import decode, encode
from outrider_services import outlet
from outrider_services.pipeline.launcher import STOP_S

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle, Serve

PROMPT = "Slow snow falls"
QUICK = ("--backend=toy", "--toy-step-ms=1", "--toy-draft-ms=0.1", "--toy-row-ms=0.01")
ENDED_S = STOP_S + 5.0  # most that a signal may take: a launcher gives its children their time
BLOCKED_S = 0.5  # whoever has not ended by then waits for its reader


class Unread:
    """The end of a pipe or a terminal that takes no byte more."""

    def __init__(self, kind: str) -> None:
        self.reader, self.fd = os.pipe() if kind == "pipe" else pty.openpty()
        if kind == "pipe":
            fcntl.fcntl(self.fd, fcntl.F_SETPIPE_SZ, 4096)
        os.set_blocking(self.fd, False)
        try:
            while True:
                os.write(self.fd, b"." * 512)
        except BlockingIOError:
            os.set_blocking(self.fd, True)

    def close(self) -> None:
        for fd in (self.reader, self.fd):
            os.close(fd)


@pytest.fixture
def unread() -> Iterator[Callable[[str], int]]:
    made: list[Unread] = []

    def make(kind: str = "pipe") -> int:
        made.append(Unread(kind))
        return made[-1].fd

    yield make
    for one in made:
        one.close()


def start(cli: Cli, *arguments: str, out: int, err: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        cli._command(arguments),
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=err,
        cwd=cli.directory,
        env=cli._environment({}),
    )
    cli.started.append(process)  # type: ignore[arg-type] # only to be killed
    return process


def until(check: Callable[[], object], within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def ends(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    process.send_signal(number)
    assert process.wait(ENDED_S) in (128 + number, -number)


# ---- stderr -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_log_that_nobody_reads_stops_nothing(
    serve: Serve, oracle: Oracle, number: signal.Signals
) -> None:
    served = serve("unread", "--log-level=debug", *QUICK)
    with Client(served.ipc) as client:
        done = client.create_completion(PROMPT, max_tokens=600, temperature=0, mode="pipelined")
        assert done.text == oracle(PROMPT, 600).text
        assert client.health()["status"] == "ok"
    began = time.monotonic()
    served.process.send_signal(number)
    assert served.process.wait(ENDED_S) == 128 + number
    assert time.monotonic() - began < ENDED_S
    assert served.process.stderr
    assert "lines were dropped, as nobody read" not in served.process.stderr.read()  # no room


def test_what_was_dropped_is_told_to_who_reads_again(serve: Serve) -> None:
    served = serve("unread", "--log-level=debug", *QUICK)
    with Client(served.ipc) as client:
        for _ in range(2):
            client.create_completion(PROMPT, max_tokens=1500, mode="pipelined")
    assert served.process.stderr
    for line in served.process.stderr:
        if "lines were dropped, as nobody read" in line:
            break
    assert served.stop() == 143


def test_workers_and_coordinator_go_on_while_their_launcher_is_stopped(serve: Serve) -> None:
    served = serve("stopped", "--log-level=debug", *QUICK)
    served.process.send_signal(signal.SIGSTOP)
    try:
        with Client(served.ipc) as client:
            done = client.create_completion(PROMPT, max_tokens=600, mode="pipelined")
            assert done.usage.completion_tokens == 600
    finally:
        served.process.send_signal(signal.SIGCONT)
    assert served.stop() == 143


def test_of_a_flood_of_one_kind_a_few_lines_are_shown(serve: Serve) -> None:
    served = serve("flooded", *QUICK)
    with zmq.Context() as context:
        for _ in range(30):
            with context.socket(zmq.DEALER) as one:
                one.connect(served.ipc)
                for _ in range(5):
                    one.send(b"nonsense")
    with Client(served.ipc) as client:
        assert client.health()["status"] == "ok"
    served.process.terminate()
    _, err = served.process.communicate(timeout=10)
    shown = [line for line in err.splitlines() if "WARNING dropped" in line]
    assert len(shown) == outlet.LINES
    assert "more like this" in shown[-1]


@pytest.mark.parametrize("kind", ["pipe", "terminal"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_nobody_hears_ends_with_a_signal(
    cli: Cli, unread: Callable[[str], int], kind: str, number: signal.Signals
) -> None:
    full = unread(kind)
    commands = [
        ("serve", "--name=deaf", *QUICK),
        ("serve", "--name=deaf-draft", "--draft-place=remote", "--target-place=remote", *QUICK),
        ("run", "--verbose", "-n", "1900", *QUICK, PROMPT),
        ("run", "-o", "json", "--verbose", "-n", "400", *QUICK, PROMPT),
    ]
    running = [start(cli, *one, out=full, err=full) for one in commands]
    time.sleep(2.5)  # they are up, or where they wait
    for process in running:
        ends(process, number)


def test_an_answer_is_whole_although_nobody_hears_of_it(
    cli: Cli, unread: Callable[[str], int], oracle: Oracle
) -> None:
    command = ("run", "--verbose", "--temp=0", "-n", "200", *QUICK, PROMPT)
    running = start(cli, *command, out=subprocess.PIPE, err=unread("pipe"))
    out, _ = running.communicate(timeout=10)
    assert running.returncode == 0
    assert out.decode() == oracle(PROMPT, 200).text + "\n"


# ---- stdout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    "command",
    [
        ("run", "-n", "20", *QUICK, PROMPT),
        ("run", "-o", "json", "-n", "20", *QUICK, PROMPT),
        ("bench", "-n", "8", "-r", "1", "--category=code", "--arms=plain,sync", *QUICK),
        ("bench", "--simulate", "-n", "8", "-r", "1", "--acceptance=0.8", "--cost=0.1"),
        ("ps",),
        ("ps", "--json"),
        ("ls",),
        ("--help",),
    ],
    ids=" ".join,
)
def test_an_answer_that_nobody_reads_ends_with_a_signal(
    cli: Cli, unread: Callable[[str], int], command: tuple[str, ...], number: signal.Signals
) -> None:
    running = start(cli, *command, out=unread("pipe"), err=subprocess.PIPE)
    until(lambda: writes(running.pid), 20)
    ends(running, number)
    assert b"Traceback" not in running.communicate()[1]


def writes(pid: int) -> bool:
    """Whether a thread of it sits in a system call on stdout."""
    calls = []
    for path in Path(f"/proc/{pid}/task").glob("*/syscall"):
        with suppress(OSError):  # it has ended
            calls.append(path.read_text().split())
    return any(call[1:2] == ["0x1"] for call in calls)


# ---- a coordinator that does not answer ---------------------------------------------------------


def test_a_coordinator_that_is_frozen_is_one_sentence_within_seconds(
    cli: Cli, serve: Serve
) -> None:
    served = serve("frozen", *QUICK)
    coordinator = served.pids()["coordinator"]
    os.kill(coordinator, signal.SIGSTOP)
    try:
        for command in (("stop", "frozen"), ("run", "--connect=frozen", PROMPT)):
            began = time.monotonic()
            done = cli(*command)
            assert time.monotonic() - began < 2 * ENDED_S
            assert done.returncode == 7
            assert done.stderr.startswith("outrider: no coordinator answers")
            assert done.stderr.count("\n") == 1
        assert cli("ps", "--json").stdout == "[]\n"
    finally:
        os.kill(coordinator, signal.SIGCONT)
    assert served.stop() == 143


def test_a_coordinator_that_freezes_while_it_is_asked_is_left_out_of_the_list(cli: Cli) -> None:
    (cli.runtime / "outrider").mkdir(mode=0o700)
    path = cli.runtime / "outrider" / "half.sock"
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.bind(f"ipc://{path}")
        listing = cli.start("ps", "--json")
        assert router.poll(10_000)
        peer, frame = router.recv_multipart()
        asked = decode(frame)
        assert isinstance(asked, wire.Health)
        router.send_multipart([peer, encode(wire.HealthReport(asked.call, {}))])
        out, err = listing.communicate(timeout=ENDED_S)
    path.unlink(missing_ok=True)
    assert (listing.returncode, out, err) == (0, "[]\n", "")
