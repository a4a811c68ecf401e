"""Who may ask over HTTP."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider_services.gateway.access import Rules, check_exposure, read_keys
from outrider_services.gateway.errors import Refused
from outrider_services.options import OPTIONS, to_flags
from outrider_services.table import ServerOptions, Settings

OWN = (b"host", b"localhost:5700")
KEYED = ServerOptions(api_key=("alpha", "beta"))


def status(server: ServerOptions, *headers: tuple[bytes, bytes], path: str = "/props") -> int:
    try:
        Rules.of(server).check(path, headers)
    except Refused as exc:
        return exc.status
    return 200


@pytest.mark.parametrize(
    ("header", "wanted"),
    [
        ((b"authorization", b"Bearer alpha"), 200),
        ((b"authorization", b"bearer beta"), 200),
        ((b"x-api-key", b"beta"), 200),
        ((b"authorization", b"Bearer gamma"), 401),
        ((b"authorization", b"Basic alpha"), 401),
        ((b"authorization", b"alpha"), 401),
        ((b"authorization", b"Bearer "), 401),
        ((b"authorization", b"Bearer \xff\xfe"), 401),
        ((b"accept", b"*/*"), 401),
    ],
)
def test_a_key_is_asked_for_where_there_are_some(header: tuple[bytes, bytes], wanted: int) -> None:
    assert status(KEYED, OWN, header) == wanted
    assert status(ServerOptions(), OWN, header) == 200
    for path in ("/health", "/v1/health"):
        assert status(KEYED, OWN, header, path=path) == 200


def test_which_key_it_was_is_told_without_the_key() -> None:
    rules = Rules.of(KEYED)
    told = [
        rules.check("/props", [OWN, (b"authorization", b"Bearer " + key)])
        for key in (b"alpha", b"beta", b"alpha")
    ]
    assert told[0] == told[2] != told[1]
    assert "alpha" not in repr(rules) + repr(KEYED) + "".join(told)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [
        (b"localhost", 200),
        (b"LOCALHOST:5700", 200),
        (b"127.0.0.1:5700", 200),
        (b"[::1]:5700", 200),
        (b"192.0.2.7", 200),
        (b"box.example:5700", 200),
        (b"evil.example", 403),
        (b"127.0.0.1.evil.example", 403),
        (b"", 403),
        (b"[", 403),
    ],
)
def test_the_machine_answers_to_its_own_names_alone(host: bytes, wanted: int) -> None:
    server = ServerOptions(allow_host=("Box.example",))
    assert status(server, (b"host", host)) == wanted
    assert status(server, (b"host", host), path="/health") == wanted


@pytest.mark.parametrize(
    ("origin", "wanted"),
    [
        (b"http://localhost:5700", 200),
        (b"https://chat.example", 200),
        (b"http://localhost:8080", 403),
        (b"https://evil.example", 403),
        (b"null", 403),
        (b"http://[", 403),
    ],
)
def test_pages_of_other_sites_may_not_ask(origin: bytes, wanted: int) -> None:
    server = ServerOptions(allow_origin=("https://chat.example",))
    assert status(server, OWN, (b"origin", origin)) == wanted


# ---- keys ---------------------------------------------------------------------------------------


def keys_in(path: Path, text: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    path.chmod(mode)
    return str(path)


def test_keys_come_from_a_file_that_only_its_owner_can_read(tmp_path: Path) -> None:
    name = keys_in(tmp_path / "keys", "# ours\n alpha \n\nbeta\n")
    assert read_keys(name) == ["alpha", "beta"]
    rules = Rules.of(ServerOptions(api_key=("gamma",), api_key_file=name))
    assert len(rules.keys) == 3


@pytest.mark.parametrize(
    ("text", "mode", "words"),
    [
        ("alpha", 0o640, "only its owner"),
        ("alpha", 0o604, "only its owner"),
        ("\n# none\n", 0o600, "no API key"),
        (b"\xff\xfe", 0o600, "not text"),
        ("al\tpha", 0o600, "printable"),
        ("é", 0o600, "printable"),
        ("k" * 1025, 0o600, "1024"),
    ],
)
def test_keys_that_cannot_be_used_are_one_sentence(
    tmp_path: Path, text: str | bytes, mode: int, words: str
) -> None:
    name = keys_in(tmp_path / "keys", text, mode)
    with pytest.raises(ConfigError, match=words) as caught:
        Rules.of(ServerOptions(api_key_file=name))
    assert "alpha" not in str(caught.value)


def test_a_file_of_keys_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(ConfigError, match="API keys in"):
            read_keys(str(path))


def test_keys_stand_in_no_command_line() -> None:
    settings = Settings(server=replace(KEYED, port=1234))
    assert to_flags(settings, ("server",)) == ["--port=1234"]
    assert "alpha" not in repr(settings)
    assert OPTIONS["server.api_key"].flags == ()


@pytest.mark.parametrize(
    ("host", "keys", "is_let"),
    [
        ("127.0.0.1", (), True),
        ("::1", (), True),
        ("localhost", (), True),
        ("0.0.0.0", (), False),
        ("::", (), False),
        ("box.example", (), False),
        ("0.0.0.0", ("alpha",), True),
    ],
)
def test_others_reach_it_only_where_a_key_is_asked_for(host: str, keys: Any, is_let: bool) -> None:
    server = ServerOptions(host=host, api_key=keys)
    if is_let:
        check_exposure(server, Rules.of(server))
        return
    with pytest.raises(ConfigError, match="--api-key-file"):
        check_exposure(server, Rules.of(server))


def test_this_user_owns_what_it_writes(tmp_path: Path) -> None:
    """Else the tests of files above would pass for another reason."""
    assert Path(keys_in(tmp_path / "keys", "a")).stat().st_uid == os.getuid()
