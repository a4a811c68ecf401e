"""`outrider doctor` on the toy engine: what it measures is what the devices were told to be."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Serve

DEVICES = ("--backend=toy", "--toy-step-ms=20", "--toy-draft-ms=2", "--toy-row-ms=0")
SHORT = ("-n", "32", "--category", "code")
pytestmark = pytest.mark.timeout(120)


def examined(cli: Cli, *arguments: str) -> dict[str, Any]:
    done = cli("doctor", *SHORT, "-o", "json", *arguments)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_it_measures_the_pair_that_it_starts_and_predicts_each_mode(cli: Cli) -> None:
    found = examined(cli, *DEVICES, "--toy-rows=2:1.2,4:1.4")
    costs = found["costs"]
    assert 0.020 < costs["pass_s"] < 0.025  # the machine may be busy
    assert costs["pipelined"]["curve_s"][3] == pytest.approx(0.028, rel=0.1)
    assert costs["pipelined"]["draft_s"] == pytest.approx(0.0025, abs=0.001)
    assert found["text"]["identical"]
    assert found["text"]["tokens"] == 32
    assert 0.6 < found["acceptance"]["overall"] < 0.95
    assert [one["category"] for one in found["acceptance"]["texts"]] == ["code"]
    placed = found["forecasts"]["as placed"]
    assert placed["plain"] == pytest.approx(1.0)
    assert placed["auto"] == placed["pipelined"]
    assert min(placed["pipelined"], placed["sync"]) > 1.2
    assert found["target"]["memory"] > 10**7
    assert found["target"]["rollback_s"] > 0
    assert len(found["target"]["crowd_s"]) == 4


def test_it_examines_one_that_is_up_and_sees_how_far_its_workers_are(
    cli: Cli, serve: Serve
) -> None:
    serve("far", "--toy-link-ms=20", *DEVICES[1:])
    found = examined(cli, "--connect=far")
    for role in ("target", "draft"):
        assert 0.019 < found[role]["link_s"] < 0.030
    told = {one["what"]: one for one in found["advice"]}
    assert "co-locate the draft with the coordinator" in told  # the target waits for nobody
    near = found["forecasts"]["all on one machine"]
    assert near["auto"] > 1.15 * found["forecasts"]["as placed"]["auto"]


def test_people_read_the_gain_first_then_what_to_do(cli: Cli) -> None:
    done = cli("doctor", *SHORT, *DEVICES, "--toy-rows=2:2,16:16", "--toy-draft-ms=12")
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.startswith("As placed, expect ")
    assert first.endswith("x the target alone (auto: pipelined).")
    whole = "\n".join(rest)
    assert "- this draft cannot pay here: a pass over 4 rows costs " in whole
    for word in ("as placed", "in turns", "toy-target on toy", "round trip", "drafted right"):
        assert word in whole
    assert "every mode said the same" in whole
    assert "Measuring, for at most about 60 s" in done.stderr


def test_the_time_is_kept_to_and_what_was_left_out_is_told(cli: Cli) -> None:
    done = cli("doctor", *DEVICES, "--toy-step-ms=60", "--limit=1", "-n", "64")
    assert done.returncode == 0, done.stderr
    assert "The time is over: " in done.stderr


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("-n", "4"), "--n-predict must be at least 24, not 4"),
        (("--limit", "0"), "--limit must be from 1 to 3600 seconds, not 0"),
        (("--n-draft=0",), "it takes a draft"),
        (("--connect=nobody",), "no coordinator answers"),
        (("--category", "cod"), "did you mean code"),
        (("--toy-rows=2:x",), "--toy-rows is a list such as 2:1.6,5:2.4, not '2:x'"),
    ],
)
def test_what_cannot_be_examined_is_one_sentence(
    cli: Cli, arguments: tuple[str, ...], what: str
) -> None:
    done = cli("doctor", "--backend=toy", *arguments)
    assert done.returncode != 0
    assert what in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_service_without_a_draft_has_no_pair_to_examine(cli: Cli, serve: Serve) -> None:
    serve("alone", "--n-draft=0", *DEVICES[1:])
    done = cli("doctor", "--connect=alone")
    assert "there is no draft worker to examine" in done.stderr
    assert done.returncode != 0


# ---- outrider plan ------------------------------------------------------------------------------

FIGURES = """
acceptance = 0.8
[target]
step_ms = 20
[draft]
token_ms = 2
"""


def test_a_plan_says_how_many_pairs_give_users_what_they_want(cli: Cli) -> None:
    (cli.directory / "devices.toml").write_text(FIGURES)
    devices = ("--users=2", "--devices=devices.toml", "-n", "24")
    done = cli("plan", *devices, "--tokens-per-s=1")
    assert done.returncode == 0, done.stderr
    assert re.match(r"1 pair, .*, for 2 users: \d+\.\d tokens/s each, the first", done.stdout)
    told = json.loads(cli("plan", *devices, "-o=json").stdout)
    alone, shared = told["plans"]["1"], told["plans"]["2"]
    assert [one["pairs"] for one in alone] == [one["pairs"] for one in shared] == [1, 2]
    assert alone[1]["tokens_per_s"] > alone[0]["tokens_per_s"] / 2
    impossible = cli("plan", *devices, "--tokens-per-s=100000")
    assert impossible.stdout.startswith("No number of pairs gives 2 users 100000 tokens/s each.")


def test_a_plan_from_nothing_is_refused(cli: Cli) -> None:
    (cli.directory / "devices.toml").write_text("")
    done = cli("plan", "--users=2", "--devices=devices.toml")
    assert done.returncode != 0
    assert "devices.toml does not tell what devices cost" in done.stderr
    assert "--users must be from 1" in cli("plan", "--users=0", "--devices=devices.toml").stderr
