"""One file for several machines: each finds its own share, and only that."""

from __future__ import annotations

import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider_services import sources
from outrider_services.commands.hosts import names_of_this_machine, share_of
from outrider_services.table import Settings

FILE = Path(__file__).parents[2] / "deploy" / "two-machines.toml"


def settings(**changes: Any) -> Settings:
    """The example's, with changes: `hosts__draft="x"`."""
    given = sources.from_file(FILE)
    given.update({key.replace("__", "."): value for key, value in changes.items()})
    found: dict[str, Any] = {}
    for key, value in given.items():
        section, name = key.split(".")
        found.setdefault(section, {})[name] = value
    plain = Settings()
    changed = {name: replace(getattr(plain, name), **values) for name, values in found.items()}
    return replace(plain, **changed)


def test_without_hosts_everything_is_here() -> None:
    plain = Settings()
    assert share_of(plain).settings is plain
    assert share_of(plain).worker is None


def test_the_example_divides_two_machines() -> None:
    big, small = share_of(settings(), "big"), share_of(settings(), "small")
    assert big.worker is None
    assert (big.settings.target.place, big.settings.draft.place) == ("spawn", "remote")
    assert (small.worker, small.address) == ("draft", "tcp://big:5701")
    assert small.settings.target.model == settings().draft.model


def test_a_target_may_be_elsewhere_and_the_draft_with_the_coordinator() -> None:
    given = settings(hosts__coordinator="small")
    small, big = share_of(given, "small"), share_of(given, "big")
    assert (small.settings.target.place, small.settings.draft.place) == ("remote", "spawn")
    assert (big.worker, big.address) == ("target", "tcp://small:5701")
    assert big.settings.target.model == given.target.model


def test_three_machines_have_a_share_each() -> None:
    given = settings(hosts__coordinator="hub")
    hub = share_of(given, "hub")
    assert (hub.settings.target.place, hub.settings.draft.place) == ("remote", "remote")
    assert [share_of(given, name).worker for name in ("big", "small")] == ["target", "draft"]


def test_a_name_of_the_hub_goes_with_a_draft_of_its_machine() -> None:
    given = settings(draft__model=None, draft__hf="ORG/REPO")
    assert share_of(given, "small").settings.target.hf == "ORG/REPO"


def test_the_machine_knows_itself_by_name_and_by_address() -> None:
    for name in (socket.gethostname(), socket.gethostname().upper(), "localhost", "127.0.0.1"):
        assert share_of(settings(hosts__draft=name)).worker == "draft", name
    assert "127.0.0.1" in names_of_this_machine()


@pytest.mark.parametrize(
    ("changes", "here", "words"),
    [
        ({}, "third", r"nothing is to run here: the hosts are big, small; --here"),
        ({"hosts__target": ""}, "small", r"\[hosts\] target, or coordinator"),
        ({"coordinator__listen": ()}, "small", r"listen = \["),
        ({"coordinator__listen": ()}, "big", r"listen = \["),
        ({"coordinator__listen": ("tcp://127.0.0.1:5701",)}, "big", r"listens on its own alone"),
        ({"coordinator__listen": ("tcp://*:0",)}, "small", r"names no port"),
        ({"hosts__coordinator": "hub", "hosts__draft": "big"}, "big", r"both workers are here"),
    ],
    ids=["nobody", "no-centre", "no-listen", "no-listen-there", "loopback", "any-port", "both"],
)
def test_a_file_that_does_not_work_out_is_one_sentence(
    changes: dict[str, Any], here: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        share_of(settings(**changes), here)


def test_an_address_of_ipv6_is_spelt_as_one() -> None:
    assert share_of(settings(hosts__target="fd00::1"), "small").address == "tcp://[fd00::1]:5701"


def test_what_is_said_to_be_insecure_is_so_on_both_machines() -> None:
    given = settings(links__insecure=("tcp://0.0.0.0:5701",))
    small = share_of(given, "small")
    assert small.address in small.settings.links.insecure
