"""Addresses with keys: who is let in, what each may say, and that they are never open by mistake.

Everything on loopback: what decides is whether an address is bound with keys, not where it lies.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import pytest
import zmq
from tests.unit.test_rights import hello

from outrider.errors import ConfigError, NotAllowed
from outrider.wire import messages as wire
from outrider.wire import router as routers
from outrider.wire import transport, trial
from outrider.wire.codec import encode
from outrider.wire.doorman import Doorman
from outrider.wire.keys import Credentials, KeyPair, Keyring, Trusted
from outrider.wire.messages import FRAME_LIMIT
from outrider.wire.rights import KEY_ROLES, KeyRole
from outrider.wire.router import Router
from outrider.wire.transport import Link, PeerGone
from outrider.wire.trial import check_closed
from outrider_services.pipeline.processes import listen
from outrider_services.table import CoordinatorOptions, LinkOptions, Settings


async def until(check: Callable[[], object], within_s: float = 5.0) -> None:
    async with asyncio.timeout(within_s):
        while not check():  # noqa: ASYNC110 - what it looks at is no event
            await asyncio.sleep(0.005)


class House:
    """A router behind a door to which one key of each role is known, and what came through."""

    def __init__(self, directory: Path) -> None:
        self.heard: list[wire.Message] = []
        self.peers: list[bytes] = []
        self.gone: list[bytes] = []
        self.ring = Keyring(directory)
        self.ring.make("coordinator")
        self.pairs = {role: KeyPair.random() for role in KEY_ROLES}
        self.ring.trust(Trusted(role, pair.public) for role, pair in self.pairs.items())
        self.router = Router(self.on_message, self.gone.append)
        self.local = self.router.bind("tcp://127.0.0.1:0")
        self.address = self.router.bind("tcp://127.0.0.1:0", self.ring)

    def on_message(self, peer: bytes, message: wire.Message) -> None:
        self.heard.append(message)
        self.peers.append(peer)

    def credentials(self, pair: KeyPair) -> Credentials:
        return Credentials(pair, self.ring.pair("coordinator").public)


class Guest:
    """A link, and what happened at it."""

    def __init__(self, address: str, credentials: Credentials | None) -> None:
        self.heard: list[wire.Message] = []
        self.lost: list[str] = []
        self.link = Link(address, self.heard.append, self.lost.append, credentials=credentials)

    async def say(self, message: wire.Message) -> None:
        await until(lambda: self.link.is_up)
        self.link.send(message)


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path / "keys")
    yield house
    house.router.close()


Enter = Callable[..., Guest]


@pytest.fixture
async def enter(house: House) -> AsyncIterator[Enter]:
    """`enter("draft")`: somebody with the key of this role."""
    guests: list[Guest] = []

    def come(role: KeyRole) -> Guest:
        guests.append(Guest(house.address, house.credentials(house.pairs[role])))
        return guests[-1]

    yield come
    for guest in guests:
        guest.link.close()


# ---- who is let in ------------------------------------------------------------------------------


async def test_whoever_has_a_key_that_is_trusted_is_heard_and_answered(
    house: House, enter: Enter
) -> None:
    guest = enter("client")
    await guest.say(wire.Health(7))
    await until(lambda: house.heard)
    assert house.heard == [wire.Health(7)]
    house.router.send(house.peers[0], wire.HealthReport(7, {}))
    await until(lambda: guest.heard)
    assert (guest.heard, guest.link.refusal) == ([wire.HealthReport(7, {})], "")


async def test_doors_that_were_closed_for_a_moment_ask_for_the_keys_that_they_asked_for(
    house: House, enter: Enter
) -> None:
    house.router._close_doors()
    await until(lambda: not house.router._are_closed)
    await refused(house.address, None)
    server = house.ring.pair("coordinator").public
    await refused(house.address, Credentials(KeyPair.random(), server))
    await enter("client").say(wire.Health(1))
    local = Guest(house.local, None)
    await local.say(wire.Health(2))
    await until(lambda: len(house.heard) == 2)
    local.link.close()


async def refused(address: str, credentials: Credentials | None) -> str:
    guest = Guest(address, credentials)
    try:
        await until(lambda: trial.is_refused(guest.link) or guest.link.is_up)
        assert not guest.link.is_up
        with pytest.raises(PeerGone):
            guest.link.send(wire.Health(1))
        return guest.link.refusal or guest.link.hindrance
    finally:
        guest.link.close()


async def test_an_unknown_key_is_refused_and_told_what_to_do(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = KeyPair.random()
    with caplog.at_level(logging.DEBUG):
        told = await refused(house.address, house.credentials(stranger))
    assert "outrider keys trust" in told
    assert "a key that is not trusted, from 127.0.0.1" in caplog.text
    assert stranger.public.hex() not in caplog.text + told
    assert house.heard == []


async def test_whoever_has_no_key_at_all_is_refused(house: House) -> None:
    assert re.search("asks? for keys", await refused(house.address, None))


async def test_keys_where_none_are_taken_are_no_connection_in_the_clear(house: House) -> None:
    told = await refused(house.local, house.credentials(house.pairs["client"]))
    assert re.search("takes no keys|or take none", told)


async def test_a_coordinator_with_another_key_gets_to_hear_nothing(house: House) -> None:
    wrong = Credentials(house.pairs["client"], KeyPair.random().public)
    guest = Guest(house.address, wrong)
    try:
        await until(lambda: guest.link.hindrance)
        assert "another key" in guest.link.hindrance
        assert not guest.link.is_up
        assert house.heard == []
    finally:
        guest.link.close()


async def test_a_key_that_was_taken_from_the_list_comes_in_no_more(house: House) -> None:
    kept = [one for one in house.ring.trusted() if one.holder != "client"]
    (house.ring.directory / "trusted").write_text("".join(f"{one.line}\n" for one in kept))
    await refused(house.address, house.credentials(house.pairs["client"]))


async def test_while_the_list_can_be_read_by_others_nobody_comes_in(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    (house.ring.directory / "trusted").chmod(0o644)
    await refused(house.address, house.credentials(house.pairs["client"]))
    assert "nobody is let in" in caplog.text


async def test_a_local_address_beside_it_has_every_right(house: House) -> None:
    guest = Guest(house.local, None)
    try:
        await guest.say(wire.Stop(1))
        await guest.say(hello("draft"))
        await until(lambda: len(house.heard) == 2)
    finally:
        guest.link.close()


async def test_what_a_peer_says_of_itself_gives_it_no_other_role(house: House) -> None:
    """It may send what properties it likes; only the doorman's counts."""
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    pair = house.pairs["client"]
    dealer.curve_publickey, dealer.curve_secretkey = pair.public, pair.secret
    dealer.curve_serverkey = house.ring.pair("coordinator").public
    dealer.setsockopt(zmq.METADATA, b"X-User-Id:admin")
    dealer.connect(house.address)
    try:
        dealer.send(encode(wire.Stop(1)))
        await asyncio.sleep(0.3)
        assert house.heard == []
    finally:
        dealer.close(linger=0)
        context.term()


# ---- what each may say --------------------------------------------------------------------------

SAID: dict[str, wire.Message] = {
    "hello-draft": hello("draft"),
    "hello-target": hello("target"),
    "beat": wire.Beat(1, False),
    "health": wire.Health(3),
    "cancel": wire.Cancel(3),
    "tokenize": wire.Tokenize(3, "x", True),
    "stop": wire.Stop(3),
    "welcome": wire.Welcome(),
    "close": wire.Close(3),
}
ALLOWED = {
    "client": {"health", "cancel", "tokenize"},
    "admin": {"health", "cancel", "tokenize", "stop"},
    "draft": {"hello-draft", "beat"},
    "target": {"hello-target", "beat"},
}


@pytest.mark.parametrize("role", KEY_ROLES)
async def test_the_role_of_a_key_decides_what_its_holder_may_say(
    house: House, enter: Enter, role: KeyRole
) -> None:
    guest = enter(role)
    for message in SAID.values():
        await guest.say(message)
    last = next(message for name, message in reversed(SAID.items()) if name in ALLOWED[role])
    await guest.say(last)
    allowed = [message for name, message in SAID.items() if name in ALLOWED[role]]
    await until(lambda: len(house.heard) > len(allowed))
    assert house.heard == [*allowed, last]


async def test_who_asks_what_his_key_does_not_allow_is_told_so(house: House, enter: Enter) -> None:
    guest = enter("draft")
    await guest.say(wire.Stop(3))
    await until(lambda: guest.heard)
    reason = "a key of the role draft may not send Stop"
    assert guest.heard == [wire.Failed(3, NotAllowed.code, reason)]
    other = enter("client")
    await other.say(hello("target"))
    await until(lambda: other.heard)
    reason = "a key of the role client may not send Hello as a target worker"
    assert other.heard == [wire.Refused(NotAllowed.code, reason)]
    assert house.heard == []


async def test_who_keeps_asking_loses_the_connection_and_nobody_else_does(
    house: House, enter: Enter
) -> None:
    good, bad = enter("client"), enter("draft")
    await good.say(wire.Health(1))
    for _ in range(20):
        await bad.say(wire.Stop(1))
    await until(lambda: bad.lost)
    await good.say(wire.Health(2))
    await until(lambda: len(house.heard) == 2)
    assert good.lost == []


@pytest.mark.parametrize("size", [10, FRAME_LIMIT - 100, FRAME_LIMIT - 9])
async def test_a_message_of_any_size_passes_as_it_does_in_the_clear(
    house: House, enter: Enter, size: int
) -> None:
    guest = enter("client")
    question = wire.Tokenize(1, "x" * (size - 20), True)
    await guest.say(question)
    await until(lambda: house.heard)
    assert house.heard == [question]


async def test_what_is_said_cannot_be_read_on_the_way(house: House, enter: Enter) -> None:
    """Control: without keys the very words are there."""
    host, port = house.address.removeprefix("tcp://").split(":")
    clear, sealed = await overheard(house, None), await overheard(house, enter)
    assert b"a secret question" in clear
    assert b"a secret question" not in sealed
    assert len(sealed) > 500, (host, port)


async def overheard(house: House, enter: Enter | None) -> bytes:
    """All bytes of a connection on which a question was asked."""
    goal = house.address if enter else house.local
    host, port = goal.removeprefix("tcp://").split(":")
    taken, tasks = bytearray(), []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            taken.extend(data)
            writer.write(data)
        writer.close()

    async def on_connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, thither = await asyncio.open_connection(host, int(port))
        tasks.append(asyncio.ensure_future(pump(there, writer)))
        await pump(reader, thither)

    server = await asyncio.start_server(on_connected, "127.0.0.1", 0)
    address = "tcp://{}:{}".format(*server.sockets[0].getsockname())
    keys = house.credentials(house.pairs["client"]) if enter else None
    guest, before = Guest(address, keys), len(house.heard)
    try:
        await guest.say(wire.Tokenize(1, "a secret question", True))
        await until(lambda: len(house.heard) > before)
    finally:
        guest.link.close()
        server.close()
        await until(lambda: all(task.done() for task in tasks))
    return bytes(taken)


# ---- never open by mistake ----------------------------------------------------------------------


async def test_an_address_with_keys_is_found_closed(house: House) -> None:
    assert house.router.doorman
    await check_closed(house.address, house.ring.pair("coordinator").public)


class NoDoorman:
    """Nobody answers ZeroMQ's questions."""

    def __init__(self, *_: object) -> None:
        pass

    def close(self) -> None:
        pass


class Elsewhere(Doorman):
    """One who answers the questions of another context, where nobody asks any."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], role_of: Callable[[bytes], str | None]
    ) -> None:
        self.other: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        super().__init__(self.other, role_of)

    def close(self) -> None:
        super().close()
        self.other.term()


MISTAKES: dict[str, tuple[str, object, set[int]]] = {
    "nobody-judges-and-nothing-is-enforced": ("Doorman", NoDoorman, {zmq.ZAP_ENFORCE_DOMAIN}),
    "nobody-judges-and-there-is-no-domain": ("Doorman", NoDoorman, {zmq.ZAP_DOMAIN}),
    "the-judge-sits-elsewhere": ("Doorman", Elsewhere, {zmq.ZAP_ENFORCE_DOMAIN}),
    "the-judge-lets-all-in": ("Doorman", None, set()),
    "no-encryption-at-all": ("Doorman", NoDoorman, {
        zmq.CURVE_SERVER, zmq.CURVE_PUBLICKEY, zmq.CURVE_SECRETKEY, zmq.ZAP_DOMAIN,
        zmq.ZAP_ENFORCE_DOMAIN,
    }),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_an_address_that_a_mistake_leaves_open_is_found_out(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these makes ZeroMQ itself let strangers in: the control is that they get in."""
    name, doorman, left_out = MISTAKES[mistake]
    plain = zmq.Socket.setsockopt

    def forgetful(self: zmq.Socket[bytes], option: int, value: object) -> None:
        if option not in left_out:
            plain(self, option, value)  # type: ignore[arg-type]

    if doorman:
        monkeypatch.setattr(routers, name, doorman)
    else:
        monkeypatch.setattr(Keyring, "role_of", lambda *_: "client")
    with monkeypatch.context() as forgetting:
        forgetting.setattr(zmq.Socket, "setsockopt", forgetful)
        house = House(tmp_path / "keys")
    try:
        with pytest.raises(ConfigError, match="anybody could connect"):
            await check_closed(house.address, house.ring.pair("coordinator").public)
    finally:
        house.router.close()


async def test_where_nobody_judges_but_that_is_enforced_all_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(routers, "Doorman", NoDoorman)
    monkeypatch.setattr(trial, "TRIAL_S", 0.5)
    house = House(tmp_path / "keys")
    stranger = Guest(house.address, house.credentials(house.pairs["client"]))
    try:
        await asyncio.sleep(0.3)
        assert not stranger.link.is_up
    finally:
        stranger.link.close()
        house.router.close()


async def test_an_address_that_cannot_be_tried_is_not_listened_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "TRIAL_S", 0.2)
    with pytest.raises(ConfigError, match="it may be open"):
        await check_closed("tcp://127.0.0.1:9", KeyPair.random().public)


async def test_addresses_without_keys_come_first(house: House) -> None:
    with pytest.raises(ConfigError, match="others before it had some"):
        house.router.bind("tcp://127.0.0.1:0")


def test_a_library_with_known_holes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    transport.check_library()
    monkeypatch.setattr(zmq, "zmq_version_info", lambda: (4, 3, 4))
    with pytest.raises(ConfigError, match=r"4\.3\.5 has closed"):
        transport.check_library()


# ---- what a coordinator does at its start -------------------------------------------------------

BINDS = {
    "loopback": ("tcp://127.0.0.1:0", False),
    "everywhere": ("tcp://*:0", True),
    "an-interface": ("tcp://lo:0", True),
    "somewhere": ("tcp://192.0.2.1:0", True),
}
KEYS: dict[str, Callable[[Keyring], object]] = {
    "no-directory": lambda ring: None,
    "no-coordinator": lambda ring: ring.trust([Trusted("client", KeyPair.random().public)]),
    "nobody-trusted": lambda ring: ring.make("coordinator"),
    "readable-secret": lambda ring: good(ring, "coordinator.key", 0o644),
    "readable-list": lambda ring: good(ring, "trusted", 0o644),
    "open-directory": lambda ring: good(ring, ".", 0o755),
    "as-they-should-be": lambda ring: good(ring, ".", 0o700),
}
DOMAINS: dict[str, set[int]] = {
    "enforced": set(),
    "no-domain": {zmq.ZAP_DOMAIN},
    "not-enforced": {zmq.ZAP_ENFORCE_DOMAIN},
    "neither": {zmq.ZAP_DOMAIN, zmq.ZAP_ENFORCE_DOMAIN},
}


def good(ring: Keyring, name: str, mode: int) -> None:
    """All that there should be, but this file may have another mode."""
    ring.make("coordinator")
    ring.trust([Trusted("client", KeyPair.random().public)])
    (ring.directory / name).chmod(mode)


@pytest.mark.parametrize("domain", DOMAINS)
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("bind", BINDS)
async def test_a_start_is_refused_rather_than_open(
    bind: str, keys: str, domain: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every bind, key, domain and permission: it is closed to strangers, or it does not start."""
    address, is_beyond = BINDS[bind]
    ring = Keyring(tmp_path / "keys")
    KEYS[keys](ring)
    plain = zmq.Socket.setsockopt

    def forgetful(self: zmq.Socket[bytes], option: int, value: object) -> None:
        if option not in DOMAINS[domain]:
            plain(self, option, value)  # type: ignore[arg-type]

    monkeypatch.setattr(zmq.Socket, "setsockopt", forgetful)
    links = LinkOptions(keys=str(ring.directory))
    settings = Settings(coordinator=CoordinatorOptions(listen=(address,)), links=links)
    router = Router(lambda *_: None, lambda _: None)
    try:
        started = False
        with suppress(ConfigError):
            await listen(router, settings)
            started = True
        assert started <= (keys == "as-they-should-be")
        if keys == "as-they-should-be" and domain == "enforced":
            assert started == (bind != "somewhere")  # which is no address of this machine
        if started:
            (bound,) = router.addresses
            await refused(trial.from_here(bound), None)
            server = ring.pair("coordinator").public
            await refused(trial.from_here(bound), Credentials(KeyPair.random(), server))
    finally:
        router.close()
    assert is_beyond or bind == "loopback"


@pytest.mark.parametrize("keys", [name for name in KEYS if name != "as-they-should-be"])
async def test_what_a_refusal_says_names_a_remedy(keys: str, tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "keys")
    KEYS[keys](ring)
    links = LinkOptions(keys=str(ring.directory))
    coordinator = CoordinatorOptions(listen=("tcp://*:0",))
    router = Router(lambda *_: None, lambda _: None)
    try:
        with pytest.raises(ConfigError, match=r"outrider keys (new|trust)|chmod [67]00") as caught:
            await listen(router, Settings(coordinator=coordinator, links=links))
        assert "--insecure tcp://*:0" in str(caught.value)
    finally:
        router.close()


async def test_what_is_said_to_be_insecure_is_open_and_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = "tcp://lo:0"
    coordinator = CoordinatorOptions(listen=(address,))
    settings = Settings(coordinator=coordinator, links=LinkOptions(insecure=(address,)))
    heard: list[wire.Message] = []
    router = Router(lambda _, message: heard.append(message), lambda _: None)
    try:
        await listen(router, settings)
        guest = Guest(router.addresses[0], None)
        try:
            await guest.say(wire.Health(1))
            await until(lambda: heard)
        finally:
            guest.link.close()
    finally:
        router.close()
    assert "is open to everybody who can reach it" in caplog.text
