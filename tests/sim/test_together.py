"""Requests that run at the same time wait for each other, and that is nobody's cost.

One target and one draft serve two or four requests. What the rules learn of costs has to be what
the same requests, one after the other, teach them, and a good draft may not rest: see `waited_s`
of `Proposal` and `Verdict`.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import pytest
from tests.sim.simulator import Asked, Priced, Simulation, World

from outrider.core.estimates import Costs
from outrider.core.events import Command
from outrider.core.events import Event as SessionEvent
from outrider.core.session import Session
from outrider.core.values import Proposal, Verdict

InTurns = Literal["sync", "pipelined"]

PASS_S, TOKEN_S, LINK_S = 0.010, 0.001, 0.0005
APART_S = 10.0  # no request takes so long
OFF, LINK_OFF_S = 0.05, 1e-4  # a message both ways takes 1 ms

modes = pytest.mark.parametrize("mode", ["sync", "pipelined"])
counts = pytest.mark.parametrize("count", [2, 4], ids=["two", "four"])


class WaitsAtItsOwnCost(Session):
    """Wrong on purpose: it takes waiting for other requests for a part of its own round."""

    def handle(self, event: SessionEvent, now: float) -> list[Command]:
        if isinstance(event, Proposal | Verdict):
            event = event.changed(waited_s=0.0)
        return super().handle(event, now)


def simulated(
    mode: InTurns,
    count: int,
    apart_s: float,
    session: type[Session] = Session,
    token_s: float = TOKEN_S,
) -> Simulation:
    """`count` requests in different languages, each beginning `apart_s` after the one before."""
    first, *others = (Asked(n_predict=120, language=language) for language in range(count))
    link = (LINK_S,)
    world = World(
        first,
        Priced(mode),
        others=tuple(others),
        others_at=tuple(apart_s * (n + 1) for n in range(count - 1)),
        agreement=0.9,
        pass_s=(PASS_S,),
        token_s=(token_s,),
        to_target_s=link,
        from_target_s=link,
        to_draft_s=link,
        from_draft_s=link,
    )
    return Simulation(world, session).run()


@cache
def one_by_one(mode: InTurns, count: int) -> Simulation:
    return simulated(mode, count, APART_S)


def costs_of(sim: Simulation) -> Costs:
    return sim.experience.costs.costs


def check_costs(mode: InTurns, count: int, together: Simulation) -> None:
    """What was learnt together is what is learnt one by one."""
    learnt, right = costs_of(together), costs_of(one_by_one(mode, count))
    assert learnt.verify_s == pytest.approx(right.verify_s, rel=OFF)
    assert learnt.draft_s == pytest.approx(right.draft_s, rel=OFF)
    assert learnt.turn_s == pytest.approx(right.turn_s, rel=2 * OFF)  # fewer turns are seen
    assert learnt.link_s == pytest.approx(right.link_s, abs=LINK_OFF_S)
    assert together.experience.step_s == pytest.approx(PASS_S + 2 * LINK_S, rel=2 * OFF)


@modes
@counts
def test_several_at_once_teach_the_rules_no_wrong_costs(mode: InTurns, count: int) -> None:
    together = simulated(mode, count, 0.0)
    assert together.seen["waited for a pass"] > 10  # else there would be nothing to get wrong
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
    assert costs.link_s == pytest.approx(2 * LINK_S, rel=0.1)


@modes
@counts
def test_a_good_draft_does_not_rest_because_several_share_it(mode: InTurns, count: int) -> None:
    together, alone = simulated(mode, count, 0.0), one_by_one(mode, count)
    assert together.seen["rested"] == 0
    for shared, own in zip(together.runs, alone.runs, strict=True):
        # one by one, all but the first know from the one before that the draft is good
        assert shared.session.stats.accepted > 0.6 * own.session.stats.accepted > 30


@modes
@counts
def test_control_waiting_at_ones_own_cost_is_caught(mode: InTurns, count: int) -> None:
    with pytest.raises(AssertionError):
        check_costs(mode, count, simulated(mode, count, 0.0, WaitsAtItsOwnCost))


def test_control_a_draft_would_rest_for_the_time_that_others_took() -> None:
    """Where it is slower and four share it: to one that counts the others' time it does not pay."""
    rested = [
        simulated("pipelined", 4, 0.0, session, 2 * TOKEN_S).seen["rested"]
        for session in (Session, WaitsAtItsOwnCost)
    ]
    assert rested[0] == 0 < rested[1]
