"""Which draft serves: the one with most tokens a second; now and then one that may be better."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

from outrider.core.choosing import DOUBT, FORGOTTEN, TRIAL_EACH, Candidate, Chooser
from outrider.core.estimates import Costs

COSTS = Costs(tuple(0.020 + 0.001 * row for row in range(16)), draft_s=0.002, link_s=0.0005)
PLAIN = 1 / 0.0205


def candidate(draft_s: float = 0.002, acceptance: float = 0.8, **more: Any) -> Candidate:
    return Candidate(replace(COSTS, draft_s=draft_s), acceptance, **more)


# ---- what a draft is worth ----------------------------------------------------------------------


@pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "sync"])
def test_a_better_draft_is_worth_more_and_none_less_than_the_target_alone(pipelined: bool) -> None:
    def rate(*given: float, **more: Any) -> float:
        return candidate(*given, pipelined=pipelined, **more).rate()

    assert rate(0.002, 0.9) > rate(0.002, 0.7) > rate(0.002, 0.5) > PLAIN
    assert rate(0.001) > rate(0.005) > rate(0.015) >= PLAIN
    assert rate() > rate(link_s=0.01) > rate(link_s=0.08) >= PLAIN
    assert rate(10.0, 0.0, link_s=5.0) == pytest.approx(PLAIN, rel=0.01)


def test_one_that_has_lost_time_lately_is_worth_what_the_target_makes_alone() -> None:
    resting = candidate(rests=True)
    assert resting.rate() == pytest.approx(PLAIN)
    assert resting.rate(0.1) > 2 * PLAIN  # what it may be worth yet


def test_from_afar_a_draft_pays_as_long_as_its_hits_outlast_its_link() -> None:
    near, far = candidate(acceptance=0.5), candidate(acceptance=0.9, link_s=0.05)
    assert far.rate() > near.rate()
    assert candidate(acceptance=0.9, link_s=2.0).rate() < near.rate()


# ---- the choice ---------------------------------------------------------------------------------


def chosen(drafts: dict[str, Candidate], requests: int) -> list[str]:
    chooser = Chooser[str]()
    names = list(drafts)
    found = [chooser.choose(names, drafts.__getitem__, begins=True) for _ in range(requests)]
    assert None not in found
    return [one for one in found if one]


def test_one_alone_is_chosen_and_nothing_is_worked_out() -> None:
    def never(_: str) -> Candidate:
        raise AssertionError("not asked for")

    chooser = Chooser[str]()
    assert chooser.choose(["one"], never, begins=True) == "one"
    assert chooser.choose([], never, begins=True) is None


def test_the_slow_one_of_two_is_never_chosen() -> None:
    drafts = {"slow": candidate(0.018), "fast": candidate(0.001)}
    assert chosen(drafts, 500) == ["fast"] * 500


def test_one_that_could_be_better_is_tried_a_bounded_number_of_times() -> None:
    drafts = {"first": candidate(acceptance=0.82), "other": candidate(acceptance=0.74)}
    found = chosen(drafts, 2000)
    tried = [at for at, name in enumerate(found) if name == "other"]
    assert tried[0] == TRIAL_EACH - 1
    assert all(later - one >= TRIAL_EACH for one, later in pairwise(tried))
    assert 2 <= len(tried) <= 2000 * 2 * DOUBT / FORGOTTEN / 0.08


def test_one_that_turns_out_better_is_kept() -> None:
    drafts = {"first": candidate(acceptance=0.7), "other": candidate(acceptance=0.66)}
    chooser = Chooser[str]()
    found = []
    for _ in range(100):
        name = chooser.choose(list(drafts), drafts.__getitem__, begins=True)
        if name == "other":
            drafts["other"] = candidate(acceptance=0.9)
        found.append(name)
    assert found.index("other") < 2 * TRIAL_EACH
    assert set(found[found.index("other") :]) == {"other"}


def test_nobody_is_tried_in_the_middle_of_a_request() -> None:
    drafts = {"first": candidate(acceptance=0.82), "other": candidate(acceptance=0.74)}
    chooser = Chooser[str]()
    for _ in range(TRIAL_EACH - 1):
        chooser.choose(list(drafts), drafts.__getitem__, begins=True)
    assert chooser.choose(list(drafts), drafts.__getitem__, begins=False) == "first"


def test_of_two_that_are_alike_the_one_that_knows_the_text_serves() -> None:
    drafts = {"first": candidate(0.002), "other": candidate(0.0021, known=500)}
    assert chosen(drafts, 3) == ["other"] * 3
    drafts["other"] = candidate(0.015, known=500)
    assert chosen(drafts, 3) == ["first"] * 3
