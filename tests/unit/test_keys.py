"""Keys in files: they are the owner's alone, and whatever is wrong with them is one sentence."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outrider.errors import ConfigError, ConnectionFailed
from outrider.wire import keys as key_files
from outrider.wire.keys import (
    HOLDERS,
    KeyPair,
    Keyring,
    Trusted,
    credentials,
    needs_keys,
    trusted_in,
)

BEYOND = "tcp://192.0.2.1:5701"


@pytest.fixture(autouse=True)
def nothing_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUTRIDER_LINKS__KEYS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


@pytest.fixture
def ring(tmp_path: Path) -> Keyring:
    before = os.umask(0)
    ring = Keyring(tmp_path / "a" / "keys")
    ring.make("coordinator")
    ring.make("draft")
    ring.trust([Trusted("client", KeyPair.random().public, ("laptop",))])
    os.umask(before)
    return ring


def test_a_pair_is_the_same_from_its_secret() -> None:
    pair = KeyPair.random()
    assert KeyPair.of(pair.secret) == pair
    assert len(pair.public) == len(pair.secret) == 32
    assert pair.secret.hex() not in repr(pair)
    assert repr(pair.secret) not in repr(pair)


def test_files_are_their_owners_alone_whatever_the_umask(ring: Keyring) -> None:
    assert stat.S_IMODE(ring.directory.stat().st_mode) == 0o700
    files = sorted(ring.directory.iterdir())
    assert [path.name for path in files] == ["coordinator.key", "draft.key", "lock", "trusted"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}


def test_a_key_is_read_again_and_never_overwritten(ring: Keyring) -> None:
    pair = ring.pair("draft")
    with pytest.raises(ConfigError, match="File exists"):
        ring.make("draft")
    assert Keyring(ring.directory).pair("draft") == pair
    assert pair != ring.pair("coordinator")


def test_what_is_not_there_names_the_command_that_makes_it(ring: Keyring) -> None:
    with pytest.raises(ConfigError, match="`outrider keys new target` makes one"):
        ring.pair("target")
    with pytest.raises(ConfigError, match="outrider keys new coordinator"):
        Keyring(ring.directory / "nowhere").check_listening()


def test_a_coordinator_that_knows_nobody_does_not_listen(tmp_path: Path) -> None:
    ring = Keyring(tmp_path / "keys")
    ring.make("coordinator")
    with pytest.raises(ConfigError, match="outrider keys trust"):
        ring.check_listening()
    ring.trust([Trusted("coordinator", KeyPair.random().public)])  # nobody who connects
    with pytest.raises(ConfigError, match="outrider keys trust"):
        ring.check_listening()


def instead(path: Path, make: Callable[[int], object], mode: int) -> None:
    path.unlink()
    make(mode)


SPOILT: dict[str, Callable[[Keyring, Path], object]] = {
    "readable-by-the-group": lambda ring, path: path.chmod(0o640),
    "readable-by-all": lambda ring, path: path.chmod(0o604),
    "writable-by-the-group": lambda ring, path: path.chmod(0o620),
    "in-a-directory-that-others-enter": lambda ring, path: ring.directory.chmod(0o711),
    "in-a-directory-that-others-read": lambda ring, path: ring.directory.chmod(0o750),
    "a-directory": lambda ring, path: instead(path, path.mkdir, 0o700),
    "a-pipe": lambda ring, path: instead(path, partial(os.mkfifo, path), 0o600),
    "empty": lambda ring, path: path.write_text(""),
    "not-text": lambda ring, path: path.write_bytes(b"\xff\xfe\x00"),
    "cut": lambda ring, path: path.write_text(path.read_text()[:-9]),
    "something-else": lambda ring, path: path.write_text("-----BEGIN KEY-----"),
}


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_secret_key_that_is_not_as_it_should_be_is_refused(
    ring: Keyring, spoil: Callable[[Keyring, Path], object]
) -> None:
    path = ring.directory / "coordinator.key"
    secret = path.read_text().split()[1]
    spoil(ring, path)
    with pytest.raises(ConfigError) as caught:
        ring.check_listening()
    assert str(ring.directory) in str(caught.value)
    assert secret[:20] not in str(caught.value)


@pytest.mark.parametrize("spoil", SPOILT.values(), ids=SPOILT.keys())
def test_a_list_of_keys_that_is_not_as_it_should_be_lets_nobody_in(
    ring: Keyring, spoil: Callable[[Keyring, Path], object]
) -> None:
    (client,) = ring.trusted()
    assert ring.role_of(client.public) == "client"
    spoil(ring, ring.directory / "trusted")
    for _ in range(2):  # also when it is looked at again
        role: str | None = "none, and why"
        with suppress(ConfigError):
            role = ring.role_of(client.public)
        assert role in (None, "none, and why")


def test_a_list_that_is_gone_lets_nobody_in(ring: Keyring) -> None:
    (client,) = ring.trusted()
    (ring.directory / "trusted").unlink()
    assert ring.role_of(client.public) is None


def test_whoever_is_trusted_later_is_known_at_once(ring: Keyring) -> None:
    late = Trusted("draft", KeyPair.random().public)
    assert ring.role_of(late.public) is None
    Keyring(ring.directory).trust([late])
    assert ring.role_of(late.public) == "draft"
    assert len(ring.trusted()) == 2


def test_the_coordinators_of_others_are_nobody_who_connects(ring: Keyring) -> None:
    known = Trusted("coordinator", KeyPair.random().public)
    ring.trust([known])
    assert ring.role_of(known.public) is None


def test_a_key_has_one_role(ring: Keyring) -> None:
    (client,) = ring.trusted()
    with pytest.raises(ConfigError, match="trusted as client already"):
        ring.trust([Trusted("admin", client.public)])
    assert ring.trusted() == (client,)


def test_of_two_who_trust_at_once_neither_is_forgotten(ring: Keyring) -> None:
    new = [Trusted("draft", KeyPair.random().public) for _ in range(12)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda one: Keyring(ring.directory).trust([one]), new))
    assert {one.public for one in new} <= {one.public for one in ring.trusted()}


def test_a_list_that_somebody_else_holds_is_not_waited_for_without_end(
    ring: Keyring, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_files, "LOCK_S", 0.05)
    with open(ring.directory / "lock") as lock:
        fcntl.flock(lock.fileno(), fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="somebody else changes"):
            ring.trust([Trusted("draft", KeyPair.random().public)])


@pytest.mark.skipif(os.getuid() != 0, reason="only the superuser gives files away")
@pytest.mark.parametrize("name", ["coordinator.key", "trusted", "."])
def test_keys_that_belong_to_somebody_else_are_refused(ring: Keyring, name: str) -> None:
    os.chown(ring.directory / name, 65534, 65534)
    with pytest.raises(ConfigError, match="only its owner may read"):
        ring.check_listening()


# ---- lines --------------------------------------------------------------------------------------


def test_what_is_shown_can_be_trusted(ring: Keyring) -> None:
    shown = "\n".join(ring.own(one).line for one in HOLDERS if ring.has(one))
    read = trusted_in(f"# made today\n\n{shown}\n")
    assert [one.holder for one in read] == ["coordinator", "draft"]
    assert [one.public for one in read] == [ring.pair(one.holder).public for one in read]


@pytest.mark.parametrize("word", ["secret", "root", "Draft", ""])
def test_a_line_that_is_no_public_key_is_refused_and_not_repeated(word: str) -> None:
    key = KeyPair.random().secret.hex()
    with pytest.raises(ConfigError, match="line 2 is not a public key") as caught:
        trusted_in(f"client {key}\n{word} {key}\n")
    assert key not in str(caught.value)


def test_remarks_in_any_script_do_not_keep_a_key_from_being_trusted(ring: Keyring) -> None:
    key = KeyPair.random().public
    ring.trust(trusted_in(f"draft {key.hex()} käse \u202e laptop2\n"))
    assert Trusted("draft", key, ("laptop2",)) in ring.trusted()


@pytest.mark.parametrize("key", ["", "12", "x" * 64, "a" * 63, "a" * 66])
def test_a_key_of_another_length_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        trusted_in(f"client {key}")


@given(st.text(max_size=200) | st.from_regex(r"(client|draft) [0-9a-f]{60,66} \\S*"))
def test_any_text_is_public_keys_or_one_error(text: str) -> None:
    try:
        found = trusted_in(text)
    except ConfigError:
        return
    again = trusted_in("\n".join(one.line for one in found))
    assert again == found


# ---- which coordinator --------------------------------------------------------------------------


def test_a_coordinator_is_known_by_its_address_or_is_the_only_one(ring: Keyring) -> None:
    one, two, three = (KeyPair.random().public for _ in range(3))
    with pytest.raises(ConfigError, match="outrider keys show coordinator"):
        ring.coordinator(BEYOND)
    ring.trust([Trusted("coordinator", one, ("big",))])
    assert ring.coordinator(BEYOND) == one
    ring.trust([Trusted("coordinator", two, ("other", BEYOND))])
    assert ring.coordinator(BEYOND) == two
    assert ring.coordinator("tcp://192.0.2.2:5701") == one
    ring.trust([Trusted("coordinator", three, ("third",))])
    with pytest.raises(ConfigError, match=r"keys trust --at tcp://192\.0\.2\.2:5701"):
        ring.coordinator("tcp://192.0.2.2:5701")


def test_a_coordinator_with_new_keys_takes_the_place_of_its_former_ones(ring: Keyring) -> None:
    for _ in range(2):
        new = KeyPair.random().public
        ring.trust([Trusted("coordinator", new, ("big",))])
        assert ring.coordinator(BEYOND) == new


# ---- where they are needed ----------------------------------------------------------------------

ADDRESSES = {
    "ipc:///run/x.sock": (False, False),
    "tcp://127.0.0.1:5701": (False, True),
    "tcp://127.8.9.1:5701": (False, True),
    "tcp://localhost:5701": (False, True),
    "tcp://[::1]:5701": (False, True),
    "tcp://0.0.0.0:5701": (True, True),
    "tcp://*:5701": (True, True),
    "tcp://[::]:5701": (True, True),
    BEYOND: (True, True),
    "tcp://big:5701": (True, True),
    "tcp://lo:5701": (True, True),  # an interface: what it reaches is its own affair
    "tcp://127.0.0.1:0;192.0.2.1:5701": (True, True),  # from here, to there
    "tcp://localhost.example:1": (True, True),
}


@pytest.mark.parametrize(("address", "needed"), ADDRESSES.items(), ids=ADDRESSES.keys())
def test_beyond_this_machine_every_link_has_keys(
    address: str, needed: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    by_default, where_named = needed
    assert needs_keys(address) == by_default
    assert needs_keys(address, "somewhere") == where_named
    assert not needs_keys(address, insecure=True)
    monkeypatch.setenv("OUTRIDER_LINKS__KEYS", "somewhere")
    assert needs_keys(address) == where_named


@pytest.mark.parametrize("address", ["udp://127.0.0.1:1", "127.0.0.1:5701", "inproc://x", ""])
def test_what_is_no_address_needs_none_but_an_error(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address"):
        needs_keys(address)
    with pytest.raises(ConnectionFailed, match="is not an address"):  # none in the clear
        credentials(address, "client", insecure=True)


def test_a_link_has_the_keys_of_its_role(ring: Keyring) -> None:
    known = KeyPair.random().public
    ring.trust([Trusted("coordinator", known)])
    found = credentials(BEYOND, "draft", ring.directory)
    assert found is not None
    assert (found.own, found.coordinator) == (ring.pair("draft"), known)
    assert credentials("ipc:///x", "draft", ring.directory) is None
    with pytest.raises(ConfigError, match="outrider keys new admin"):
        credentials(BEYOND, "admin", ring.directory)


def test_without_a_name_the_usual_directory_counts(tmp_path: Path) -> None:
    assert Keyring().directory == tmp_path / "config" / "outrider" / "curve"
    with pytest.raises(ConfigError, match="config/outrider/curve"):
        credentials(BEYOND, "client")
