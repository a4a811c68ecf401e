"""A share of each campaign of `scripts/chaos`: no token is wrong, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
from tests.attack.service import ROOT
from tests.chaos import between, bugs, fuzz, hosts, kills, report
from tests.chaos.campaign import Campaign, Plan, Result
from tests.chaos.proxy import CLIENT, DRAFT
from tests.chaos.tunnel import why_not

SHARE = Plan(share=0.01, seed=1, jobs=2)


def complaints(result: Result) -> str:
    """What is not as it should be."""
    bad = [str(row) for row in result.rows if row.passed is False]
    return "\n".join(result.complaints + bad)


@pytest.mark.timeout(300)
def test_what_is_killed_or_stopped_costs_nobody_an_answer() -> None:
    arms = [*kills.arms(SHARE, "kill"), *kills.arms(SHARE, "stop", ("draft", "target"))]
    asyncio.run(kills.struck(arms, 3))
    assert complaints(kills.table(SHARE, arms)) == ""


@pytest.mark.timeout(180)
def test_messages_that_come_late_twice_or_damaged_change_no_token() -> None:
    arm = between.Arm("draft and clients", draft=DRAFT, client=CLIENT)
    told = asyncio.run(between.carried(arm, 3000, seed=1))
    assert told.complaints == []
    assert all(told.seen[kind] for kind in ("late", "lost", "twice", "overtaken", "again"))


@pytest.mark.timeout(300)
def test_a_million_malformed_frames_and_other_input_are_taken_or_refused() -> None:
    assert complaints(fuzz.run(Plan(share=0.1, seed=1, jobs=2))) == ""


@pytest.mark.timeout(180)
def test_planted_bugs_are_caught() -> None:
    assert complaints(bugs.run(SHARE)) == ""


@pytest.mark.timeout(180)
@pytest.mark.skipif(bool(why_not()), reason=str(why_not()))
def test_a_worker_on_another_host_makes_nothing_slower_and_changes_no_token() -> None:
    result = hosts.run(Plan(share=0.1, seed=1, jobs=2))
    assert result.complaints == []  # how much faster it is, a busy machine cannot say
    assert len(result.rows) == 2


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture
def one_campaign(monkeypatch: pytest.MonkeyPatch) -> Result:
    """The command has nothing else to do."""
    result = Result()
    campaign = Campaign("none", "nothing is done", lambda plan: result)
    monkeypatch.setattr(report, "BY_NAME", {"none": campaign})
    return result


def test_the_table_says_what_was_wanted_and_measured(
    one_campaign: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    one_campaign.add("tokens that are wrong", "0", "0", True)
    one_campaign.add("only told", "-", "7", None)
    assert report.main(["--only", "none"]) == 0
    assert "tokens that are wrong" in capsys.readouterr().out
    one_campaign.add("leaks", "0", "3", False)
    assert report.main(["--only", "none"]) == 1
    assert "NO" in capsys.readouterr().out


def test_what_went_wrong_is_told_with_what_repeats_it(
    one_campaign: Result, capsys: pytest.CaptureFixture[str]
) -> None:
    one_campaign.complaints.append("world 7, seed 1: a wrong token")
    assert report.main(["--only", "none"]) == 1
    assert "world 7, seed 1" in capsys.readouterr().err


def test_the_script_lists_its_campaigns() -> None:
    command = [str(ROOT / "scripts/chaos"), "--list"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert all(campaign.name in told for campaign in report.CAMPAIGNS)
