"""Requests that run at the same time share the passes of both workers, and gain together.

The yardstick is plain batching: the same requests, in the same shared passes, without a draft. What
the rules learn of costs has to be what the same requests, one after the other, teach them: see
`waited_s`, `rows` and `requests` of `Proposal` and `Verdict`.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from tests.sim.simulator import Asked, Priced, Simulation, World

from outrider.core.estimates import Costs
from outrider.core.events import Command
from outrider.core.events import Event as SessionEvent
from outrider.core.rules import FixedRule
from outrider.core.session import Session
from outrider.core.stragglers import Stragglers
from outrider.core.values import Proposal, Verdict

InTurns = Literal["sync", "pipelined"]

PASS_S, TOKEN_S, LINK_S = 0.010, 0.001, 0.00015  # messages take 3 % of a pass, as on one machine
APART_S = 10.0  # no request takes so long
OFF, LINK_OFF_S = 0.05, 1e-4
LENGTH = 120

TAKES_TURNS: Any = SimpleNamespace(takes_turns=True)  # with its draft: the target must fall idle

modes = pytest.mark.parametrize("mode", ["sync", "pipelined"])
counts = pytest.mark.parametrize("count", [2, 4], ids=["two", "four"])


class AsksEachTime(Session):
    """Its target does nothing without being asked."""

    def handle(self, event: SessionEvent, now: float) -> list[Command]:
        self.dispatch.together = (TAKES_TURNS,)
        return super().handle(event, now)


class WaitsAtItsOwnCost(Session):
    """Wrong on purpose: it takes waiting for other requests for a part of its own round."""

    def handle(self, event: SessionEvent, now: float) -> list[Command]:
        if isinstance(event, Proposal | Verdict):
            event = event.changed(waited_s=0.0)
        return super().handle(event, now)


def simulated(
    rule: Priced | FixedRule,
    count: int,
    apart_s: float = 0.0,
    session: type[Session] = Session,
    token_s: float = TOKEN_S,
    agreement: float = 0.9,
    link_s: float = LINK_S,
) -> Simulation:
    """`count` requests in different languages, each beginning `apart_s` after the one before."""
    first, *others = (Asked(n_predict=LENGTH, language=language) for language in range(count))
    link = (link_s,)
    world = World(
        first,
        rule,
        others=tuple(others),
        others_at=tuple(apart_s * (n + 1) for n in range(count - 1)) or (0.0,),
        agreement=agreement,
        pass_s=(PASS_S,),
        token_s=(token_s,),
        to_target_s=link,
        from_target_s=link,
        to_draft_s=link,
        from_draft_s=link,
    )
    return Simulation(world, session).run()


def ended(sim: Simulation) -> float:
    return max(run.passes[-1].ended for run in sim.runs)


@cache
def plain_batching_s(count: int) -> float:
    return ended(simulated(FixedRule("plain"), count))


# ---- faster than plain batching ------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_plain_requests_share_every_pass(count: int) -> None:
    assert plain_batching_s(count) == pytest.approx(LENGTH * PASS_S + 2 * LINK_S, rel=0.015)


@pytest.mark.parametrize("agreement", [0.5, 0.9])
@pytest.mark.parametrize("token_s", [TOKEN_S, 5 * TOKEN_S])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@modes
def test_drafts_never_lose_against_plain_batching(
    mode: InTurns, count: int, token_s: float, agreement: float
) -> None:
    sim = simulated(Priced(mode), count, token_s=token_s, agreement=agreement)
    # these targets are as sure where the draft is wrong: until that is known, they promise too much
    assert ended(sim) <= 1.03 * plain_batching_s(count)


@pytest.mark.parametrize("count", [2, 8, 32])
def test_pipelined_drafts_gain_however_many_share_them(count: int) -> None:
    """At a usual acceptance, and passes that cost the same whatever their rows."""
    sim = simulated(Priced("pipelined"), count, agreement=0.8)
    assert plain_batching_s(count) / ended(sim) >= 1.55


# ---- two groups become one -----------------------------------------------------------------------


def test_requests_that_begin_at_odd_times_share_their_passes_all_the_same() -> None:
    apart_s = 0.0043
    for session in (Session, AsksEachTime):
        sim = simulated(FixedRule("plain"), 4, apart_s, session)
        slower = 1.0 if session is Session else 1 + 2 * LINK_S / PASS_S
        assert ended(sim) <= slower * plain_batching_s(4) + 3 * apart_s + 8 * PASS_S


def test_control_without_waiting_for_stragglers_they_take_turns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Stragglers, "expected", lambda self, now: 0.0)
    sim = simulated(FixedRule("plain"), 4, 0.0043, AsksEachTime)
    assert ended(sim) > 1.5 * plain_batching_s(4)


# ---- what is learnt ------------------------------------------------------------------------------


@cache
def one_by_one(mode: InTurns, count: int) -> Simulation:
    return simulated(Priced(mode), count, APART_S)


def costs_of(sim: Simulation) -> Costs:
    return sim.experience.costs.costs


def check_costs(mode: InTurns, count: int, together: Simulation) -> None:
    """What was learnt together is what is learnt one by one."""
    learnt, right = costs_of(together), costs_of(one_by_one(mode, count))
    assert learnt.verify_s == pytest.approx(right.verify_s, rel=OFF)
    assert learnt.draft_s == pytest.approx(right.draft_s, rel=OFF)
    if mode == "pipelined":  # in turns, passes that are shared do not tell it
        assert learnt.link_s <= right.link_s + LINK_OFF_S  # less where blocks are ordered ahead
    assert together.experience.step_s == pytest.approx(PASS_S + 2 * LINK_S, rel=2 * OFF)


@modes
@counts
def test_several_at_once_teach_the_rules_no_wrong_costs(mode: InTurns, count: int) -> None:
    together = simulated(Priced(mode), count)
    assert together.seen["shared a pass"] > 10
    check_costs(mode, count, together)


@modes
@counts
def test_the_costs_of_requests_one_by_one_are_those_of_the_world(mode: InTurns, count: int) -> None:
    """Else being like them would say little."""
    alone = one_by_one(mode, count)
    costs = costs_of(alone)
    assert not alone.seen["waited for a pass"]
    assert costs.verify_s == pytest.approx((PASS_S,) * len(costs.verify_s), rel=0.01)
    assert costs.draft_s == pytest.approx(TOKEN_S, rel=0.01)
    assert 0 <= costs.link_s <= 2.2 * LINK_S  # none where a pass began without asking


@counts
def test_a_good_draft_does_not_rest_because_several_share_it(count: int) -> None:
    together, alone = simulated(Priced("pipelined"), count), one_by_one("pipelined", count)
    assert together.seen["rested"] == 0
    for shared, own in zip(together.runs, alone.runs, strict=True):
        # one by one, all but the first know from the one before that the draft is good
        assert shared.session.stats.accepted > 0.6 * own.session.stats.accepted > 30


@pytest.mark.parametrize("session", [Session, WaitsAtItsOwnCost])
def test_waiting_for_a_pass_is_nobodys_cost(
    session: type[Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody is waited for, requests wait for each other's passes; the control counts it.

    So a draft seems to lose that brings little, and rests.
    """
    monkeypatch.setattr(Stragglers, "expected", lambda self, now: 0.0)
    together = simulated(Priced("pipelined"), 4, 0.0043, session, agreement=0.5, link_s=0.0)
    assert together.seen["waited for a pass"] > 10
    assert (together.seen["rested"] == 0) == (session is Session)
