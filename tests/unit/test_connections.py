"""Whose connection is whose, how long an origin is borne with, and which connection weighs most."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from outrider.wire import connections
from outrider.wire.connections import BAD_FRAMES, SUSPECT, UNSURE_S, Connections, Patience, Scales
from outrider.wire.doors import close_door, open_door

Pair = tuple[socket.socket, socket.socket]


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = socket.socketpair()
    yield ours, theirs
    ours.close()
    theirs.close()


def is_shut(theirs: socket.socket) -> bool:
    theirs.setblocking(False)
    try:
        return theirs.recv(1) == b""
    except BlockingIOError:
        return False


# ---- whose is whose -----------------------------------------------------------------------------


def test_the_end_of_a_connection_names_the_peer_that_spoke_on_it(clock: Clock) -> None:
    known = Connections(8, clock)
    known.accept(5)
    assert known.meet(b"a", 5, "pid 1")
    found = known.of(b"a")
    assert found is not None
    assert (found.fd, found.origin) == (5, "pid 1")
    assert known.lose(5) == b"a"
    assert known.of(b"a") is None
    assert known.lose(5) is None
    assert known.end(b"a"), "what it has left is dropped without another look"


def test_a_message_may_come_after_the_end_of_its_connection(clock: Clock) -> None:
    known = Connections(8, clock)
    known.accept(5)
    assert known.lose(5) is None
    assert not known.meet(b"a", 5, "")


def test_a_late_first_message_is_not_taken_for_one_of_the_next_connection(
    clock: Clock, pair: Pair
) -> None:
    """Else ending its sender's connection would end somebody else's."""
    ours, theirs = pair
    known = Connections(8, clock)
    known.accept(ours.fileno())
    known.lose(ours.fileno())  # it had sent something that is still on its way
    known.accept(ours.fileno())  # somebody else, who got the same descriptor
    assert known.meet(b"late", ours.fileno(), "")
    assert known.of(b"late") is None
    assert not known.end(b"late")
    assert not is_shut(theirs)
    clock.now += UNSURE_S + 0.01
    assert known.meet(b"other", ours.fileno(), "")
    assert known.end(b"other")
    assert is_shut(theirs)


def test_whoever_is_known_to_have_spoken_leaves_no_doubt_about_the_next(clock: Clock) -> None:
    known = Connections(8, clock)
    known.accept(5)
    known.meet(b"a", 5, "")
    known.lose(5)
    known.accept(5)
    known.meet(b"b", 5, "")
    assert known.lose(5) == b"b"


def test_those_beyond_the_most_are_refused_until_there_is_room(pair: Pair) -> None:
    known = Connections(2)
    for fd in (1001, 1002, 1003):
        known.accept(fd)
        known.meet(b"%d" % fd, fd, "")
    assert [known.admit(b"%d" % fd) for fd in (1001, 1002, 1003)] == [True, True, False]
    known.lose(1001)
    assert known.admit(b"1003")
    known.accept(1004)
    assert known.admit(b"1003")  # it stays, though there are too many again


def test_far_beyond_the_most_a_connection_just_ends(pair: Pair) -> None:
    ours, theirs = pair
    known = Connections(2)
    known.accept(1001)
    known.accept(1002)
    known.accept(ours.fileno())  # the first of the surplus ones
    for fd in range(1004, 1003 + connections.SPARE):
        known.accept(fd)
    assert not known.is_crowded
    assert not is_shut(theirs)
    known.accept(2000)
    assert known.is_crowded
    assert is_shut(theirs)


@pytest.mark.parametrize("which", ["surplus", "worker", "admitted", "early"])
def test_room_is_made_at_the_cost_of_those_that_are_too_many(pair: Pair, which: str) -> None:
    ours, theirs = pair
    known = Connections(2)
    for fd in (1001,) if which == "early" else (1001, 1002):
        known.accept(fd)
    known.accept(ours.fileno())
    known.meet(b"a", ours.fileno(), "")
    if which == "worker":
        known.trust(b"a")
    if which == "admitted":
        known.lose(1001)
        assert known.admit(b"a")
    known.make_room()
    assert is_shut(theirs) == (which == "surplus")


def test_one_that_says_nothing_can_be_told_from_one_that_has_spoken(pair: Pair) -> None:
    ours, theirs = pair
    known = Connections(2)
    first = known.accept(ours.fileno())
    known.meet(b"a", ours.fileno(), "")
    known.shut_if_mute(first)
    assert not is_shut(theirs)
    known.lose(ours.fileno())
    second = known.accept(ours.fileno())
    known.shut_if_mute(first)  # its time has come, and another one has its descriptor
    assert not is_shut(theirs)
    known.shut_if_mute(second)
    assert is_shut(theirs)


def test_a_worker_has_room_also_if_its_connection_is_not_sure_at_first(clock: Clock) -> None:
    known = Connections(1, clock)
    known.accept(1001)
    known.accept(1002)
    known.lose(1002)
    known.accept(1002)  # beyond the most, and with a descriptor that another one has just left
    known.meet(b"w", 1002, "")
    assert known.of(b"w") is None
    known.trust(b"w")
    assert known.admit(b"w")
    for fd in range(1003, 1200):  # none of these takes its place
        known.accept(fd)
    clock.now += 1.0
    known.meet(b"w", 1002, "")
    found = known.of(b"w")
    assert found is not None
    assert found.is_worker
    assert known.admit(b"w")
    known.lose(1002)
    known.forget(b"w")
    assert not known.is_worker(b"w")


# ---- bad frames ---------------------------------------------------------------------------------


def test_bad_frames_are_counted_by_origin_and_forgiven_with_time(clock: Clock) -> None:
    patience = Patience(clock)
    assert all(patience.spend("a") for _ in range(BAD_FRAMES))
    assert not patience.spend("a")
    assert patience.spend("b")
    clock.now += 1.0
    assert patience.spend("a")
    assert not patience.spend("a")
    clock.now += 1000.0
    assert sum(patience.spend("a") for _ in range(100)) == BAD_FRAMES


def test_origins_without_number_are_not_all_remembered(clock: Clock) -> None:
    patience = Patience(clock)
    for n in range(3 * connections.ORIGINS):
        patience.spend(f"{n}")
    assert len(patience._left) <= connections.ORIGINS


# ---- weight -------------------------------------------------------------------------------------


def test_of_two_that_make_the_process_heavy_the_heavier_is_blamed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pair
    known = Connections(8)
    known.accept(ours.fileno())
    known.meet(b"a", ours.fileno(), "")
    theirs.setblocking(False)
    scales, nobody = Scales(), lambda peer: 0
    assert scales.blame(known, nobody) is None
    monkeypatch.setattr(connections, "HEAVY", -(1 << 40))
    while connections.unread(ours.fileno()) < SUSPECT:
        theirs.send(bytes(4096))
    blamed = scales.blame(known, nobody)
    assert blamed is not None
    assert blamed.peer == b"a"
    known.accept(1001)
    known.meet(b"b", 1001, "")
    blamed = scales.blame(known, {b"a": 0, b"b": 1 << 24}.__getitem__)
    assert blamed is not None
    assert blamed.peer == b"b"
    known.of(b"b").traffic = 1 << 24  # type: ignore[union-attr]
    blamed = scales.blame(known, nobody)
    assert blamed is not None
    assert blamed.peer == b"b"
    blamed = scales.blame(known, nobody)  # what was read before the last look is forgotten
    assert blamed is not None
    assert blamed.peer == b"a"


def test_what_is_nobodys_fault_is_borne_once(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    scales, nobody = Scales(), lambda peer: 0
    memory = SimpleNamespace(rss=scales._light)
    monkeypatch.setattr(scales, "_process", SimpleNamespace(memory_info=lambda: memory))
    known = Connections(8, clock)
    for fd, peer in ((1001, b"worker"), (1002, b"silent"), (1003, b"a")):
        known.accept(fd)
        known.meet(peer, fd, "")
    connections_of = {peer: known.of(peer) for peer in (b"worker", b"silent", b"a")}
    connections_of[b"worker"].is_worker = True  # type: ignore[union-attr]
    clock.now += 5.0
    known.heard(connections_of[b"a"], 10)  # type: ignore[arg-type]
    memory.rss += connections.HEAVY + 1
    assert scales.blame(known, nobody) is None
    assert scales.blame(known, nobody) is None
    memory.rss += connections.HEAVY
    assert scales.blame(known, nobody) is connections_of[b"silent"]
    known.accept(1004)
    assert scales.blame(known, nobody) is [*known][-1]  # it has not said anything ever


def test_what_came_over_tcp_and_is_part_of_no_message_is_known(clock: Clock) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        theirs = socket.create_connection(server.getsockname())
        ours, _ = server.accept()
        with theirs, ours:
            known = Connections(8, clock)
            known.accept(ours.fileno())
            known.meet(b"a", ours.fileno(), "")
            connection = known.of(b"a")
            assert connection is not None
            assert connections.untold(connection) == 0
            theirs.sendall(bytes(100_000))
            while len(ours.recv(1 << 20, socket.MSG_PEEK)) < 100_000:
                pass
            ours.recv(1 << 20)  # as ZeroMQ does, in the middle of a message
            assert connections.untold(connection) == 100_000
            known.heard(connection, 99_000)
            assert 0 < connections.untold(connection) < 1000


def test_a_late_message_of_one_that_was_known_is_none_of_the_next_connection(clock: Clock) -> None:
    known = Connections(8, clock)
    known.accept(5)
    known.meet(b"a", 5, "")
    known.lose(5)
    known.accept(5)
    assert not known.meet(b"a", 5, "")
    assert known.meet(b"b", 5, "")
    assert known.lose(5) == b"b"


def test_what_is_no_socket_is_left_alone(tmp_path: object) -> None:
    with open("/dev/null") as file:
        connections.shut(file.fileno())
        assert file.read() == ""
    connections.shut(9999)


@pytest.mark.parametrize("kind", ["tcp", "file", "abstract"])
def test_at_a_closed_door_nobody_comes_in_and_who_is_in_stays(kind: str, tmp_path: Path) -> None:
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    names: dict[str, Any] = {
        "tcp": ("127.0.0.1", 0),
        "file": f"{tmp_path}/door",
        "abstract": f"\0{tmp_path}",
    }

    def comes_in() -> bool:
        with socket.socket(family) as guest:
            guest.settimeout(0.2)
            return guest.connect_ex(where) == 0

    with socket.socket(family) as door, socket.socket(family) as early:
        door.bind(names[kind])
        door.listen()
        where = door.getsockname()
        early.connect(where)
        inside, _ = door.accept()
        close_door(door.fileno())
        assert comes_in() is (kind == "abstract")  # which has no file to put aside
        early.sendall(b"x")
        assert inside.recv(1) == b"x"
        inside.close()
        open_door(door.fileno())
        assert comes_in()
