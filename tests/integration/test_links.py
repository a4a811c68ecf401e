"""Links with keys between real processes: who is served, who is refused, and what anybody sees.

All on loopback. `tcp://lo` and `tcp://127.1` are it, too, but nothing that reads an address takes
them for this machine alone: so they need keys, as a network would.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from tests.integration.conftest import Cli, Oracle, Serve, Served, processes_of, until

import outrider
from outrider.client import connect
from outrider.errors import ConfigError, ConnectionFailed, NotAllowed
from outrider.wire.keys import HOLDERS, Holder, Keyring
from outrider_services import sources

pytestmark = pytest.mark.timeout(90)  # most start several processes, one after the other
JOIN_S = 30.0  # most that a process may take to start and to join
QUICK = ("--backend=toy", "--toy-step-ms=4", "--toy-draft-ms=0.4", "--toy-row-ms=0.05")


class Home:
    """Where somebody has his keys."""

    def __init__(self, path: Path, *holders: Holder) -> None:
        self.path, self.ring = path, Keyring(path)
        for holder in holders:
            self.ring.make(holder)

    @property
    def flag(self) -> str:
        return f"--keys={self.path}"

    def trusts(self, other: Home) -> None:
        self.ring.trust(other.ring.own(holder) for holder in HOLDERS if other.ring.has(holder))

    @property
    def secrets(self) -> list[str]:
        return [path.read_text().split()[1] for path in self.path.glob("*.key")]


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Home]:
    """The coordinator's and somebody's with a key of each role, who know each other."""
    around = tmp_path_factory.mktemp("homes")
    here, there = Home(around / "here", "coordinator"), Home(around / "there", *HOLDERS[1:])
    here.trusts(there)
    there.trusts(here)
    return here, there


@pytest.fixture(scope="module")
def locked(module_cli: Cli, homes: tuple[Home, Home]) -> Iterator[Served]:
    """A pipeline that waits for its draft, at an address with keys; `tcp` is that."""
    flags = (*QUICK[1:], "--draft-place=remote", "--listen=tcp://lo:0", homes[0].flag)
    served = Served(module_cli, "locked", *flags, "--log-level=debug")
    served.tcp = served.tcp.replace("127.0.0.1", "127.1")
    yield served
    assert served.stop() == 143


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- who is served ------------------------------------------------------------------------------


def test_a_client_and_a_draft_with_keys_are_served(
    locked: Served, homes: tuple[Home, Home], oracle: Oracle
) -> None:
    cli, there = locked.cli, homes[1]
    worker = cli.start("worker", "draft", f"--connect={locked.tcp}", *QUICK, there.flag)
    client = outrider.Client(locked.tcp, keys=there.path)
    try:
        until_there(lambda: "draft" in client.health()["workers"])
        answer = client.create_completion("Hello", max_tokens=60, temperature=0.0, mode="pipelined")
        assert answer.choices[0].text == oracle("Hello", 60).text
        assert answer.stats.drafted_tokens  # however few of them a busy machine has time for
        worker.kill()
        until_there(lambda: "draft" not in client.health()["workers"])
        answer = client.create_completion("Hello", max_tokens=60, temperature=0.0)
        assert answer.choices[0].text == oracle("Hello", 60).text
    finally:
        client.close()
        worker.kill()
        worker.communicate(timeout=10)
    assert locked.pids().keys() == {"coordinator", "target"}


def until_there(check: Callable[[], object]) -> None:
    deadline = time.monotonic() + JOIN_S
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_line_is_served_by_flag_variable_and_usual_place(
    locked: Served, homes: tuple[Home, Home], tmp_path: Path
) -> None:
    cli, there = locked.cli, homes[1]
    ask = ("run", f"--connect={locked.tcp}", "-n", "3", "-o", "json", "Hello")
    usual = tmp_path / "config"
    (usual / "outrider").mkdir(parents=True, mode=0o700)
    (usual / "outrider" / "curve").symlink_to(there.path)
    asked = (
        cli(*ask, there.flag),
        cli(*ask, OUTRIDER_LINKS__KEYS=str(there.path)),
        cli(*ask, XDG_CONFIG_HOME=str(usual)),
    )
    for done in asked:
        assert done.returncode == 0, done.stderr
        assert len(json.loads(done.stdout)["token_ids"]) == 3


def test_top_needs_a_client_and_stop_an_admin(serve: Serve, cli: Cli, tmp_path: Path) -> None:
    here, client = Home(tmp_path / "here", "coordinator"), Home(tmp_path / "client", "client")
    admin = Home(tmp_path / "admin", "admin")
    for one in (client, admin):
        here.trusts(one)
        one.trusts(here)
    served = serve("ended", *QUICK[1:], "--listen=tcp://lo:0", here.flag)
    seen = cli("top", "--json", client.flag, served.tcp)
    assert json.loads(seen.stdout), seen.stderr
    told = sentence(cli("stop", client.flag, served.tcp), 3)
    assert "`outrider keys new admin`" in told
    done = cli("stop", admin.flag, served.tcp)
    assert done.returncode == 0, done.stderr
    served.process.communicate(timeout=10)
    assert served.process.returncode == 0


async def test_a_client_key_does_not_stop_the_pipeline(
    locked: Served, homes: tuple[Home, Home]
) -> None:
    async with connect(locked.tcp, keys=homes[1].path) as client:
        with pytest.raises(NotAllowed, match="a key of the role client may not send Stop"):
            await client.stop()
        assert (await client.health())["status"] == "ok"


# ---- who is refused -----------------------------------------------------------------------------


def sentence(done: object, status: int) -> str:
    """The one line of an error."""
    code, err = getattr(done, "returncode", None), str(getattr(done, "stderr", ""))
    assert code == status, err
    (line,) = err.splitlines()
    assert line.startswith("outrider: ")
    return line


async def test_an_unknown_key_is_refused_at_once(
    locked: Served, homes: tuple[Home, Home], tmp_path: Path
) -> None:
    stranger = Home(tmp_path / "stranger", "client")
    stranger.trusts(homes[0])
    began = time.monotonic()
    with pytest.raises(NotAllowed, match="`outrider keys trust` there"):
        async with connect(locked.tcp, keys=stranger.path, timeout_s=20.0):
            pass
    assert time.monotonic() - began < 5


async def test_without_keys_nothing_is_sent_beyond_this_machine(
    locked: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="`outrider keys new client` makes one"):
        async with connect(locked.tcp):
            pass
    with pytest.raises((NotAllowed, ConnectionFailed), match=r"asks? for keys"):
        async with connect(locked.tcp, insecure=True, timeout_s=2.0):
            pass


@pytest.mark.parametrize("role", ["draft", "target"])
def test_a_worker_with_another_roles_key_is_refused(
    locked: Served, homes: tuple[Home, Home], tmp_path: Path, role: str
) -> None:
    """A file that has another name has no other role: the coordinator's list says which it has."""
    impostor = Home(tmp_path / "impostor", "client")
    impostor.trusts(homes[0])
    homes[0].trusts(impostor)
    (impostor.path / "client.key").rename(impostor.path / f"{role}.key")
    worker = ("worker", role, f"--connect={locked.tcp}", *QUICK, impostor.flag)
    told = sentence(locked.cli(*worker), 7)
    assert f"a key of the role client may not send Hello as a {role} worker" in told


def test_a_worker_that_is_not_trusted_is_refused(
    locked: Served, homes: tuple[Home, Home], tmp_path: Path
) -> None:
    stranger = Home(tmp_path / "stranger", "draft")
    stranger.trusts(homes[0])
    worker = ("worker", "draft", f"--connect={locked.tcp}", *QUICK, stranger.flag)
    assert "`outrider keys trust` there" in sentence(locked.cli(*worker), 7)


def test_keys_that_others_can_read_are_refused_on_both_sides(cli: Cli, tmp_path: Path) -> None:
    here = Home(tmp_path / "here", "coordinator", "client")
    here.trusts(here)
    for name in ("coordinator.key", "client.key"):
        (here.path / name).chmod(0o640)
    listen = ("serve", *QUICK, "--listen=tcp://lo:0", here.flag)
    assert "chmod 600" in sentence(cli(*listen), 3)
    ask = ("run", "--connect=tcp://127.1:9", here.flag, "Hello")
    assert "chmod 600" in sentence(cli(*ask), 3)


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://lo:0"])
def test_without_keys_it_does_not_listen_and_says_what_makes_them(cli: Cli, address: str) -> None:
    told = sentence(cli("serve", *QUICK, "--listen", address), 3)
    assert address in told
    assert "`outrider keys new coordinator`" in told
    assert f"--insecure {address}" in told


def test_what_is_insecure_is_so_on_both_sides_and_warned_of(serve: Serve, cli: Cli) -> None:
    address = "tcp://lo:0"
    served = serve("open", *QUICK[1:], f"--listen={address}", f"--insecure={address}")
    there = served.tcp.replace("127.0.0.1", "127.1")
    ask = ("run", f"--connect={there}", "-n", "3", "-o", "json", "Hello")
    assert "outrider keys new client" in sentence(cli(*ask), 3)
    assert len(json.loads(cli(*ask, f"--insecure={there}").stdout)["token_ids"]) == 3
    assert any("is open to everybody who can reach it" in line for line in served.lines)
    assert served.stop() == 143


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00CURVE" + bytes(47)


def knocks(seed: int) -> bytes:
    """What a stranger without a key might say: the beginning of a handshake, spoilt somewhere."""
    chance = random.Random(seed)
    hello = b"\x05HELLO\x01\x00" + chance.randbytes(192)
    initiate = b"\x08INITIATE" + chance.randbytes(chance.choice([0, 1, 248, 400, 5000]))
    said = bytearray(GREETING)
    for body in chance.sample([hello, initiate, hello[: chance.randrange(200)], b""], 3):
        size = chance.choice([len(body), 0, 255, 1 << 20, (1 << 63) - 1])
        said += b"\x06" + size.to_bytes(8, "big") + body
    for _ in range(chance.randrange(4)):
        said[chance.randrange(len(said))] = chance.randrange(256)
    return bytes(said[: chance.randrange(10, len(said) + 1)])


def test_whatever_strangers_say_at_the_door_those_inside_are_served(
    locked: Served, homes: tuple[Home, Home]
) -> None:
    host, port = "127.0.0.1", int(locked.tcp.rpartition(":")[2])
    before = locked.pids()
    held = []
    for seed in range(300):
        one = socket.create_connection((host, port), timeout=5)
        with suppress(OSError):
            one.sendall(knocks(seed))
        held.append(one)
        if len(held) > 20:
            held.pop(0).close()
    with outrider.Client(locked.tcp, keys=homes[1].path) as client:
        answer = client.create_completion("Hello", max_tokens=20)
        assert answer.choices[0].text
    for one in held:
        one.close()
    assert locked.pids() == before


# ---- what anybody sees --------------------------------------------------------------------------


def test_no_key_stands_in_a_command_line_a_variable_or_a_log(
    locked: Served, homes: tuple[Home, Home], tmp_path: Path
) -> None:
    cli, (here, there) = locked.cli, homes
    stranger = Home(tmp_path / "stranger", "client")
    stranger.trusts(here)
    worker = cli.start("worker", "draft", f"--connect={locked.tcp}", *QUICK, there.flag)
    until_there(lambda: "draft" in cli("ps", "--json").stdout)
    said = [
        cli("run", f"--connect={locked.tcp}", flag, "-n", "3", "Hello").stderr
        for flag in (there.flag, stranger.flag)
    ]
    seen = [*said, *locked.lines]
    for pid in (*processes_of(cli.runtime), locked.process.pid):
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            seen += [*process.cmdline(), *process.environ().values()]
    worker.terminate()
    seen += worker.communicate(timeout=10)
    assert len(seen) > 50
    secrets = [*here.secrets, *there.secrets, *stranger.secrets]
    assert len(secrets) == 6
    assert [one for one in seen if any(secret in one for secret in secrets)] == []


def listening(runtime: Path) -> set[tuple[str, int]]:
    """Where the processes of a pipeline take connections from anything but a local socket."""
    found = set()
    for pid in processes_of(runtime):
        with suppress(psutil.Error):
            for one in psutil.Process(pid).net_connections("inet"):
                is_open = one.status == psutil.CONN_LISTEN or one.type == socket.SOCK_DGRAM
                if is_open and one.laddr:
                    found.add((one.laddr.ip, one.laddr.port))
    return found


def test_a_service_that_is_told_nothing_is_open_on_its_one_port_and_on_loopback(cli: Cli) -> None:
    """As it is started by `outrider serve`, but for the port, which may be taken here."""
    port = free_port()
    flags = (*QUICK, f"--port={port}")
    process = cli.start("serve", *flags, OUTRIDER_SERVER__NO_GATEWAY="false")
    assert process.stderr
    assert any(line.startswith("Ready: ") for line in process.stderr)
    found = listening(cli.runtime)
    answered = [address for address in addresses() if is_open(address, port)]
    process.terminate()
    process.communicate(timeout=10)
    assert found == {("127.0.0.1", port)}
    assert answered == []
    assert list(cli.runtime.glob("outrider/*.sock")) == []


def test_control_an_address_that_was_added_is_seen(serve: Serve, cli: Cli) -> None:
    served = serve("seen", *QUICK[1:])
    host, port = served.tcp.removeprefix("tcp://").split(":")
    assert listening(cli.runtime) == {(host, int(port))}
    assert served.stop() == 143


def addresses() -> list[str]:
    """Those of this machine that others can reach."""
    return [
        one.address
        for found in psutil.net_if_addrs().values()
        for one in found
        if one.family == socket.AF_INET and not one.address.startswith("127.")
    ]


def is_open(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((host, port)) == 0


# ---- the commands -------------------------------------------------------------------------------


def test_keys_that_are_made_are_shown_and_kept(cli: Cli, tmp_path: Path) -> None:
    keys = f"--keys={tmp_path / 'k'}"
    made = cli.here("keys", "new", "draft", "client", keys)
    assert (made.returncode, made.stdout.count("\n")) == (0, 2)
    again = cli.here("keys", "new", "client", "draft", keys)
    assert sorted(again.stdout.splitlines()) == sorted(made.stdout.splitlines())
    assert "it stays" in again.stderr
    shown = cli.here("keys", "show", keys)
    assert sorted(shown.stdout.splitlines()) == sorted(made.stdout.splitlines())
    assert re.fullmatch(r"draft [0-9a-f]{64} \S+\n", cli.here("keys", "show", "draft", keys).stdout)
    secrets = Home(tmp_path / "k").secrets
    assert not any(secret in made.stdout + made.stderr + shown.stdout for secret in secrets)
    assert "`outrider keys new admin` makes one" in sentence(
        cli.here("keys", "show", "admin", keys), 3
    )
    assert cli.here("keys", "show", f"--keys={tmp_path / 'none'}").stdout == ""


def test_trust_goes_both_ways_in_one_line(cli: Cli, tmp_path: Path) -> None:
    small, big = f"--keys={tmp_path / 'small'}", f"--keys={tmp_path / 'big'}"
    line = cli("keys", "new", "draft", small).stdout
    answer = cli("keys", "trust", big, stdin=line)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.startswith("coordinator ")
    last = cli("keys", "trust", small, stdin=answer.stdout)
    assert (last.returncode, last.stdout) == (0, "")
    assert cli.here("keys", "show", "--trusted", big).stdout == line
    assert cli.here("keys", "show", "--trusted", small).stdout == answer.stdout
    (tmp_path / "big" / "coordinator.key").unlink()
    renewed = cli("keys", "trust", big, stdin=line).stdout
    told = cli("keys", "trust", small, stdin=renewed)
    assert f"In place of another key: {answer.stdout}" in told.stderr
    assert cli.here("keys", "show", "--trusted", small).stdout == renewed


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "no public key came on standard input"),
        ("hello world", "line 1 is not a public key"),
        ("draft 1234", "64 hexadecimal digits"),
    ],
    ids=["nothing", "something-else", "short"],
)
def test_what_is_no_public_key_is_one_sentence(
    cli: Cli, tmp_path: Path, given: str, words: str
) -> None:
    done = cli("keys", "trust", f"--keys={tmp_path / 'k'}", stdin=given)
    assert words in sentence(done, 3)
    assert not (tmp_path / "k").exists()


def test_a_secret_key_that_is_given_for_a_public_one_is_refused(cli: Cli, tmp_path: Path) -> None:
    cli.here("keys", "new", "draft", f"--keys={tmp_path / 'k'}")
    secret = (tmp_path / "k" / "draft.key").read_text()
    done = cli("keys", "trust", f"--keys={tmp_path / 'other'}", stdin=secret)
    assert "is not a public key" in sentence(done, 3)
    assert secret.split()[1] not in done.stdout + done.stderr


# ---- one file for two machines ------------------------------------------------------------------

TWO = """
[hosts]
coordinator = "127.1"
target = "big"
draft = "small"
[coordinator]
listen = ["tcp://lo:{port}"]
[pipeline]
backend = "toy"
[toy]
step_ms = 4
draft_ms = 0.4
"""


async def test_each_machine_starts_its_share_of_one_file(
    cli: Cli, homes: tuple[Home, Home], oracle: Oracle
) -> None:
    """Three of them: the coordinator is on 127.1, which starts no worker of its own."""
    path = cli.directory / "two.toml"
    path.write_text(TWO.format(port=free_port()))
    here, there = homes
    machines = {
        name: cli.start("serve", "-f", str(path), f"--here={name}", home.flag)
        for name, home in (("127.1", here), ("big", there), ("small", there))
    }
    async with connect("default", timeout_s=JOIN_S) as client:

        async def both() -> bool:
            return set((await client.health())["workers"]) == {"target", "draft"}

        await until("both workers", both, JOIN_S)
        answer = await client.create_completion("Hello", max_tokens=40, temperature=0.0)
        assert answer.choices[0].text == oracle("Hello", 40).text
        (child,) = psutil.Process(machines["small"].pid).children()
        child.kill()  # it is started again, as a launcher would
        why = told(machines["small"], "[draft] WARNING the draft process")
        assert "ended by itself with status -9; starting it again" in why

        async def anew() -> bool:
            again = psutil.Process(machines["small"].pid).children()
            return bool(again) and again[0].pid != child.pid and await both()

        await until("another draft", anew, JOIN_S)
    for name in ("small", "big", "127.1"):
        machines[name].terminate()
    for process in machines.values():
        process.communicate(timeout=10)
        assert process.returncode == 143


def told(process: subprocess.Popen[str], beginning: str) -> str:
    """The first line of its stderr that begins so."""
    assert process.stderr
    for line in process.stderr:
        if line.startswith(beginning):
            return line
    raise AssertionError(f"no line {beginning!r}")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_of_another_machine_ends_with_what_started_it(
    locked: Served, homes: tuple[Home, Home], number: signal.Signals
) -> None:
    path = locked.cli.directory / "lone.toml"
    port = int(locked.tcp.rpartition(":")[2])
    path.write_text(TWO.format(port=port))
    process = locked.cli.start("serve", "-f", str(path), "--here=small", homes[1].flag)
    told(process, "Ready: the draft worker of tcp://127.1")
    (child,) = psutil.Process(process.pid).children()
    process.send_signal(number)
    process.communicate(timeout=10)
    until_there(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)


def test_a_worker_that_another_start_does_not_cure_is_one_sentence(
    locked: Served, homes: tuple[Home, Home], tmp_path: Path
) -> None:
    stranger = Home(tmp_path / "stranger", "draft")
    stranger.trusts(homes[0])
    path = locked.cli.directory / "lone.toml"
    path.write_text(TWO.format(port=int(locked.tcp.rpartition(":")[2])))
    done = locked.cli("serve", "-f", str(path), "--here=small", stranger.flag)
    assert "`outrider keys trust` there" in sentence(done, 7)


def test_a_machine_that_the_file_does_not_name_is_one_sentence(cli: Cli) -> None:
    path = cli.directory / "two.toml"
    path.write_text(TWO.format(port=5701))
    told = sentence(cli("serve", "-f", str(path), "--here=third"), 3)
    assert "nothing is to run here: the hosts are 127.1, big, small" in told


def test_the_example_for_two_machines_is_a_file_of_settings() -> None:
    path = Path(__file__).parents[2] / "deploy" / "two-machines.toml"
    assert sources.from_file(path)["hosts.draft"] == "small"
    assert os.access(path, os.R_OK)
