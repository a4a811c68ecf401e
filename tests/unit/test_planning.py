"""How many pairs so many users need, from what a pair was seen to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ConfigError
from outrider_services.bench.planning import Devices, Load, fewest, plans
from outrider_services.table import Settings

FIGURES = """
acceptance = 0.8
[target]
step_ms = 40
rows = [1, 1.05, 1.1]
[draft]
token_ms = 4
"""
LOADS = [Load(1, 60.0, 0.1), Load(2, 40.0, 0.2), Load(4, 25.0, 0.4), Load(8, 15.0, 0.8)]
DEVICES = Devices(0.04, (1.0, 1.05, 1.1), 0.004, 0.8)


def written(path: Path, text: str) -> Path:
    (path / "devices").write_text(text)
    return path / "devices"


def of_doctor(auto: str) -> dict[str, Any]:
    """As far as it is read."""
    return {
        "auto": auto,
        "costs": {
            "sync": {"curve_s": [0.05, 0.06], "draft_s": 0.02},
            "pipelined": {"curve_s": [0.04, 0.05], "draft_s": 0.01},
        },
        "acceptance": {"overall": 0.7},
    }


def test_figures_are_read(tmp_path: Path) -> None:
    assert Devices.read(written(tmp_path, FIGURES)) == DEVICES


@pytest.mark.parametrize(
    ("auto", "found"),
    [
        ("pipelined", Devices(0.04, (1.0, 1.25), 0.01, 0.7)),
        ("sync", Devices(0.05, (1.0, 0.06 / 0.05), 0.02, 0.7)),
    ],
)
def test_what_doctor_measured_is_read(tmp_path: Path, auto: str, found: Devices) -> None:
    assert Devices.read(written(tmp_path, json.dumps(of_doctor(auto)))) == found


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "{",
        "[target]",
        "acceptance = 1",
        FIGURES.replace("40", "0"),
        FIGURES.replace("0.8", "1"),
    ],
)
def test_a_file_that_does_not_tell_the_costs_is_one_sentence(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"devices(:| does not tell what devices cost)"):
        Devices.read(written(tmp_path, text))
    with pytest.raises(ConfigError, match="cannot read"):
        Devices.read(tmp_path / "absent")


def test_a_simulated_pair_costs_what_the_devices_do() -> None:
    toy = DEVICES.simulated(Settings(), sharing=2).toy
    assert (toy.step_ms, toy.rows, toy.draft_ms, toy.agreement) == (40, "2:1.05,3:1.1", 8, 0.8)


def test_users_are_shared_among_pairs() -> None:
    found = plans(LOADS, 8)
    assert [(one.pairs, one.users) for one in found] == [(1, 8), (2, 4), (3, 3), (4, 2), (8, 1)]
    assert [one.tokens_per_s for one in found] == [15.0, 25.0, 32.5, 40.0, 60.0]
    assert [one.all_tokens_per_s for one in found] == [120.0, 200.0, 260.0, 320.0, 480.0]
    assert found[2].first_s == pytest.approx(0.3)


def test_what_no_pair_was_seen_to_do_is_not_promised() -> None:
    assert [one.pairs for one in plans(LOADS, 20)][:2] == [3, 4]


def test_the_fewest_pairs_that_are_enough_are_named() -> None:
    best = fewest(plans(LOADS, 8), 30.0)
    assert best
    assert best.pairs == 3
    assert fewest(plans(LOADS, 8), 61.0) is None
