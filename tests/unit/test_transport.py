"""Links and the router: what is sent arrives in order, or both sides learn that it will not."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import zmq

from outrider.errors import ConfigError, ConnectionFailed, ProtocolError
from outrider.wire import connections, transport
from outrider.wire import messages as wire
from outrider.wire.codec import encode
from outrider.wire.router import CLOSED_S, Router
from outrider.wire.transport import Link, PeerGone

BULK = "x" * 500_000  # of a message that cannot be held in great number
HELLO = wire.Hello(wire.PROTOCOL, "0", "draft", 1, "m", None, 512, 1, "cpu", "here:0", (0.01,))


class House:
    """A router, and what happened at it."""

    def __init__(self, address: str) -> None:
        self.heard: list[tuple[bytes, wire.Message]] = []
        self.gone: list[bytes] = []
        self.router = Router(self.on_message, self.gone.append, most=3)
        self.address = self.router.bind(address)

    def on_message(self, peer: bytes, message: wire.Message) -> None:
        if isinstance(message, wire.Welcome):
            raise ProtocolError("unexpected Welcome")
        self.heard.append((peer, message))

    @property
    def peer(self) -> bytes:
        return self.heard[-1][0]


class Guest:
    """A link, and what happened at it."""

    def __init__(self, address: str) -> None:
        self.heard: list[wire.Message] = []
        self.lost: list[str] = []
        self.link = Link(address, self.heard.append, self.lost.append)

    async def say(self, message: wire.Message) -> None:
        """Send it as soon as there is a connection."""
        async with asyncio.timeout(5):
            while True:
                try:
                    self.link.send(message)
                    return
                except PeerGone:
                    await asyncio.sleep(0.01)


async def until(check: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not check():  # noqa: ASYNC110 - what it looks at is no event
            await asyncio.sleep(0.005)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House("tcp://127.0.0.1:0")
    yield house
    house.router.close()


@pytest.fixture
async def guest(house: House) -> AsyncIterator[Guest]:
    guest = Guest(house.address)
    await guest.say(wire.Health(0))
    await until(lambda: house.heard)
    yield guest
    guest.link.close()


async def test_a_burst_beyond_every_queue_arrives_whole_and_in_order(
    house: House, guest: Guest
) -> None:
    for call in range(1, 5000):  # nobody reads before the last is sent
        guest.link.send(wire.Health(call))
    await until(lambda: len(house.heard) == 5000)
    assert [message for _, message in house.heard] == [wire.Health(n) for n in range(5000)]
    for call in range(5000):
        house.router.send(house.peer, wire.Cancel(call))
    await until(lambda: len(guest.heard) == 5000)
    assert guest.heard == [wire.Cancel(n) for n in range(5000)]
    assert (guest.lost, house.gone) == ([], [])


async def test_a_peer_that_does_not_read_is_held_up_to_and_then_let_go(house: House) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.setsockopt(zmq.RCVHWM, 1)
    dealer.connect(house.address)
    try:
        dealer.send(encode(wire.Health(1)))
        await until(lambda: house.heard)
        for _ in range(transport.QUEUE):  # as many as ZeroMQ takes, and some more
            house.router.send(house.peer, wire.Rendered(1, BULK))
        with pytest.raises(PeerGone):  # noqa: PT012 - one of these
            for _ in range(100):
                house.router.send(house.peer, wire.Rendered(1, BULK))
        await until(lambda: house.gone)
        assert house.gone == [house.peer]
        with pytest.raises(PeerGone):
            await until(lambda: house.router.send(house.peer, wire.Ping()))
    finally:
        dealer.close(linger=0)
        context.term()


async def test_a_worker_may_have_more_waiting(house: House, guest: Guest) -> None:
    house.router.send(house.peer, wire.Welcome())
    for _ in range(100):
        house.router.send(house.peer, wire.Rendered(1, BULK))
    await until(lambda: len(guest.heard) == 101)


async def test_whoever_was_never_there_is_gone(house: House) -> None:
    with pytest.raises(PeerGone):
        house.router.send(b"nobody", wire.Ping())


async def test_when_a_connection_ends_both_are_told_and_it_comes_back(
    house: House, guest: Guest
) -> None:
    first = house.peer
    house.router.end(first)
    await until(lambda: house.gone and guest.lost)
    await guest.say(wire.Health(2))
    await until(lambda: house.heard[-1][1] == wire.Health(2))
    assert (house.gone, guest.lost) == ([first], [transport.LOST])
    assert house.peer != first
    guest.link.end()
    await until(lambda: len(house.gone) == 2 and len(guest.lost) == 2)


async def test_what_was_sent_before_the_end_is_read_before_anybody_is_told(
    house: House, guest: Guest
) -> None:
    for call in range(20):
        house.router.send(house.peer, wire.Cancel(call))
    await asyncio.sleep(0.05)  # it is there, and not read yet but for this loop's turns
    house.router.close()
    await until(lambda: guest.lost)
    assert len(guest.heard) == 20


def flood(address: str, count: int) -> None:
    """Send so many small messages, and leave when all are on their way."""
    frame = encode(wire.Health(2))
    with zmq.Context() as context, context.socket(zmq.DEALER) as one:
        one.setsockopt(zmq.SNDHWM, 0)
        one.setsockopt(zmq.LINGER, 10_000)
        one.connect(address)
        for _ in range(count):
            one.send(frame)


async def test_what_a_flood_has_left_behind_is_dropped_and_nobody_else_is_blamed(
    house: House, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await guest.say(wire.Health(1))
    await until(lambda: house.heard)
    monkeypatch.setattr(connections, "HEAVY", -(1 << 40))  # the process is heavy by now
    count = 100_000
    # the loop, which waits for that, reads it when the connection is over
    flood(house.address, count)
    await guest.say(wire.Health(3))
    await until(lambda: wire.Health(3) in [message for _, message in house.heard[-200:]])
    await until(lambda: len(house.gone) == 1)
    await guest.say(wire.Health(4))
    await until(lambda: wire.Health(4) in [message for _, message in house.heard[-200:]])
    assert guest.lost == []
    assert len(house.heard) < count // 2


async def test_others_have_their_turn_while_a_flood_is_dropped(
    house: House, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    await guest.say(wire.Health(1))
    await until(lambda: house.heard)
    peer = house.peer
    monkeypatch.setattr(connections, "HEAVY", -(1 << 40))
    flood(house.address, 300_000)
    turns = []
    for call in range(100):
        began = time.monotonic()
        house.router.send(peer, wire.Health(call))
        await asyncio.sleep(0.001)
        turns.append(time.monotonic() - began)
    await until(lambda: len(guest.heard) == 100)
    assert max(turns) < 0.25, turns


async def test_an_address_on_which_somebody_listens_is_not_taken_from_them(
    tmp_path: Path,
) -> None:
    address = f"ipc://{tmp_path}/s"
    first = House(address)
    second = Router(lambda *_: None, lambda _: None)
    guest = Guest(address)
    try:
        with pytest.raises(ConfigError, match="somebody does already"):
            second.bind(address)
        await guest.say(wire.Health(1))
        await until(lambda: first.heard)
    finally:
        guest.link.close()
        second.close()
        first.router.close()
    third = House(address)  # what is left of the socket is nobody's
    third.router.close()


@pytest.mark.parametrize("address", ["ipc:///tmp/\udcff", "nowhere", "tcp://:x", "udp://1.2.3.4:5"])
async def test_what_is_no_address_is_an_error_and_leaves_nothing_open(address: str) -> None:
    with pytest.raises(ConnectionFailed, match="is not an address"):
        Link(address, print)
    router = Router(lambda *_: None, lambda _: None)
    try:
        with pytest.raises(ConfigError, match="cannot listen on"):
            router.bind(address)
    finally:
        router.close()
    gc.collect()  # an open socket would keep this from ending


async def test_a_link_over_which_something_unreadable_comes_ends(
    house: House, guest: Guest
) -> None:
    """Whatever it was may be waited for: dropped in silence it would be a hang."""
    house.router._post(house.peer, b"nonsense")
    await until(lambda: guest.lost)
    assert guest.lost == ["the coordinator said what this version of outrider cannot read"]
    await until(lambda: house.gone)


async def test_a_worker_that_says_something_unreadable_loses_its_connection(
    house: House, guest: Guest
) -> None:
    """Its verdict may have been in it; of others it is only counted."""
    guest.link._post(b"", b"nonsense")
    await guest.say(wire.Health(1))
    await until(lambda: house.heard[-1][1] == wire.Health(1))
    assert not guest.lost
    house.router.send(house.peer, wire.Welcome())
    await until(lambda: guest.heard)
    guest.link._post(b"", b"nonsense")
    await until(lambda: guest.lost and house.gone)
    await guest.say(wire.Health(2))  # it may come back
    await until(lambda: house.heard[-1][1] == wire.Health(2))


async def test_a_link_without_a_connection_says_so(house: House) -> None:
    guest = Guest("ipc:///nowhere.sock")
    try:
        with pytest.raises(PeerGone):
            guest.link.send(wire.Health(1))
    finally:
        guest.link.close()


async def test_an_origin_of_bad_frames_loses_its_connection_again_and_again(
    house: House, guest: Guest
) -> None:
    for _ in range(20):
        guest.link.send(wire.Welcome())
    await until(lambda: guest.lost)
    assert len(house.gone) == 1
    await guest.say(wire.Health(2))  # it may come back
    await until(lambda: house.heard[-1][1] == wire.Health(2))
    for _ in range(3):
        guest.link.send(wire.Welcome())
    await until(lambda: len(guest.lost) == 2)


async def test_one_too_many_is_told_so_unless_it_is_a_worker(house: House, guest: Guest) -> None:
    guests: list[Guest] = []
    try:
        for n in range(3):
            guests.append(Guest(house.address))
            await guests[n].say(wire.Health(n + 10))
            await asyncio.sleep(0.05)
        await until(lambda: guests[2].heard)
        reason = "there are 3 connections already"
        assert guests[2].heard[0] == wire.Failed(12, "busy", reason)
        heard = [message for _, message in house.heard]
        assert heard == [wire.Health(0), wire.Health(10), wire.Health(11)]
        await until(lambda: guests[2].lost)
    finally:
        for one in guests:
            one.link.close()


@pytest.mark.parametrize("kind", ["tcp", "ipc"])
async def test_where_too_many_come_nobody_is_let_in_for_a_moment_and_who_is_here_stays(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "SPARE", 16)
    house = House("tcp://127.0.0.1:0" if kind == "tcp" else f"ipc://{tmp_path}/door")
    accepted: list[int] = []
    known = house.router._connections
    accept = known.accept

    def count(fd: int) -> connections.Connection:
        accepted.append(fd)
        return accept(fd)

    monkeypatch.setattr(known, "accept", count)
    context = zmq.Context()
    crowd: list[zmq.Socket[bytes]] = []
    early = Guest(house.address)
    try:
        await early.say(wire.Health(0))
        await until(lambda: house.heard)
        for _ in range(50):
            crowd.append(context.socket(zmq.DEALER))
            crowd[-1].connect(house.address)
        await until(lambda: house.router._are_closed)
        await early.say(wire.Health(1))  # while nobody is let in
        await until(lambda: wire.Health(1) in [message for _, message in house.heard])
        late = Guest(house.address)
        try:
            await late.say(HELLO)  # a worker may always join
            await until(lambda: HELLO in [message for _, message in house.heard])
            (worker,) = [peer for peer, message in house.heard if message == HELLO]
            house.router.send(worker, wire.Welcome())
            await asyncio.sleep(3 * CLOSED_S)
            assert early.lost == late.lost == []
        finally:
            late.link.close()
        before, began = len(accepted), time.monotonic()
        await asyncio.sleep(1.0)
        per_s = (len(accepted) - before) / (time.monotonic() - began)
        assert per_s < 120  # 24 to 52; at doors that stay open 220 to 230
        context.destroy(linger=0)
        await until(lambda: len(known) == 1 and not house.router._are_closed)
        again = Guest(house.address)
        await again.say(wire.Health(2))
        await until(lambda: wire.Health(2) in [message for _, message in house.heard])
        again.link.close()
    finally:
        early.link.close()
        house.router.close()
        context.destroy(linger=0)


async def test_without_a_file_to_ask_with_nobody_is_blamed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def memory_info(self) -> None:
            raise OSError(24, "Too many open files")

    monkeypatch.setattr(house.router._scales, "_process", Full())
    house.router.relieve()


FEW_FILES = """
import asyncio, os, resource
from outrider import Client
from outrider.wire.transport import Link
from outrider.errors import ConnectionFailed

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

async def connect():
    held = len(os.listdir("/proc/self/fd")) - 1
    for spare in range(40):
        resource.setrlimit(resource.RLIMIT_NOFILE, (held + spare, hard))
        try:
            Link("ipc:///nowhere.sock", print).close()
            print("opened")
        except ConnectionFailed as exc:
            print(exc)

asyncio.run(connect())
try:
    while True:
        os.dup(0)
except OSError:
    pass
try:
    Client("ipc:///nowhere.sock")
except ConnectionFailed as exc:
    print(exc)
"""


def test_where_no_socket_can_be_opened_that_is_one_sentence() -> None:
    """In a process of its own, for libzmq ends one that has too few descriptors."""
    done = subprocess.run(
        [sys.executable, "-c", FEW_FILES],
        # coverage, too, could open nothing at its end
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "COVERAGE_PROCESS_CONFIG": ""},
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    *links, client = done.stdout.splitlines()
    assert len(links) == 40
    assert links[0] == client
    assert client.startswith("cannot open a socket: Too many open files")
    assert links[-1] == "opened"
    assert sorted(set(links)) == sorted({client, "opened"})


RUNNING = """
import asyncio, sys, time
from outrider.wire.router import Router

async def main():
    router = Router(lambda *_: None, lambda _: None)
    print(router.bind(f"ipc://{sys.argv[1]}"), flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    time.sleep(1.5)  # nobody reads meanwhile, and the connection breaks
    await asyncio.sleep(0.2)
    router.close()

asyncio.run(main())
"""
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)


def command(name: bytes, body: bytes) -> bytes:
    return bytes([4, 1 + len(name) + len(body), len(name)]) + name + body


@pytest.mark.parametrize("last", [b"", command(b"PING", b"\x00\x64")], ids=["silent", "ping"])
def test_a_peer_that_dies_behind_a_flood_ends_nobody_else(tmp_path: Path, last: bytes) -> None:
    """Where a queue can be full, libzmq 4.3.5 ends the process: at the ping, or at its own."""
    assert zmq.HEARTBEAT_IVL not in transport.OPTIONS
    path = str(tmp_path / "s")
    flooded = subprocess.Popen(
        [sys.executable, "-c", RUNNING, path],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert flooded.stdin
    assert flooded.stdout
    flooded.stdout.readline()
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(path)
        peer.sendall(GREETING)
        peer.sendall(command(b"READY", b"\x0bSocket-Type\x00\x00\x00\x06DEALER"))
        time.sleep(0.2)
        flooded.stdin.write("\n")
        flooded.stdin.flush()
        time.sleep(0.1)
        peer.sendall(b"\x00\x01x" * 60 + last + b"\x00\x01x" * 10)
        time.sleep(0.3)
    _, err = flooded.communicate(timeout=20)
    assert flooded.returncode == 0, err
