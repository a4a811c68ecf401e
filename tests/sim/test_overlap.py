"""Overlap, in virtual time: the draft rides while the target verifies, except where it must not.

The pair: a drafted token costs a tenth of a verify pass, which takes as long for six rows as for
one, and the draft agrees with the target nine times in ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import pytest
from tests.sim.simulator import GREEDY, Asked, Simulation, World

from outrider.core.rules import FixedRule
from outrider.core.sampling import Sampling
from outrider.core.values import Mode

PASS_S, TOKEN_S = 0.010, 0.001
Interval = tuple[float, float]
WARM = Sampling(temperature=0.8, seed=3)
both = pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])


@cache
def ridden(rule: FixedRule, sampling: Sampling = GREEDY, link_s: float = 0.0) -> Simulation:
    asked = Asked(n_predict=140, sampling=sampling)
    link = (link_s,)
    world = World(
        asked,
        rule,
        agreement=0.9,
        pass_s=(PASS_S,),
        token_s=(TOKEN_S,),
        to_target_s=link,
        from_target_s=link,
        to_draft_s=link,
        from_draft_s=link,
    )
    return Simulation(world).run()


def mode(name: Mode) -> FixedRule:
    return FixedRule(name, 5)


def verifying(sim: Simulation) -> list[Interval]:
    return [(one.began, one.ended) for one in sim.passes if one.round]


def shared(ones: Sequence[Interval], others: Sequence[Interval]) -> float:
    """Seconds that lie in one of each."""
    return sum(max(0.0, min(b, d) - max(a, c)) for a, b in ones for c, d in others)


def traced(sim: Simulation, lane: str) -> list[Interval]:
    """One lane as the request's own trace shows it, prefill left out."""
    prefilled = sim.session.stats.prefilled
    assert prefilled is not None
    sim.spans += sim.session.lessons.trace.take()
    trace = [(span.start, span.end) for span in sim.spans if span.lane == lane]
    return [one for one in trace if one[1] > prefilled + 1e-9]


@both
def test_pipelined_the_target_is_never_idle_and_the_draft_hides_behind_it(
    sampling: Sampling,
) -> None:
    sim = ridden(mode("pipelined"), sampling)
    report = sim.session.stats.report()
    assert report.hits > 10
    assert report.target_busy is not None
    assert 0.9 < report.target_busy <= 1 + 1e-9
    assert report.overlap is not None
    assert report.overlap > 0.9


@both
def test_pipelined_the_trace_shows_drafting_during_verification(sampling: Sampling) -> None:
    sim = ridden(mode("pipelined"), sampling)
    passes, drafted = traced(sim, "target"), traced(sim, "draft")
    for seen, real in zip(passes, verifying(sim), strict=True):
        assert seen == pytest.approx(real)
    during = [one for one in drafted if shared([one], passes) > TOKEN_S / 2]
    assert len(during) > 100
    # what it counts as overlap is what the workers really did
    assert sim.session.stats.both_s == pytest.approx(shared(passes, drafted))
    assert shared(passes, drafted) <= shared(verifying(sim), sim.drafting) + 1e-9


@both
def test_synchronously_the_two_never_compute_at_once(sampling: Sampling) -> None:
    sim = ridden(mode("sync"), sampling)
    assert len(verifying(sim)) > 10
    assert len(sim.drafting) > 50
    assert shared(verifying(sim), sim.drafting) < 1e-9
    assert shared([(one.began, one.ended) for one in sim.passes], sim.drafting) < 1e-9
    assert sim.session.stats.both_s < 1e-9


@both
@pytest.mark.parametrize("link_s", [0.0005, 0.003])
def test_a_link_between_the_workers_does_not_change_that(sampling: Sampling, link_s: float) -> None:
    sync = ridden(mode("sync"), sampling, link_s)
    assert shared(verifying(sync), sync.drafting) < 1e-9
    pipelined = ridden(mode("pipelined"), sampling, link_s)
    assert pipelined.session.stats.hits > 10
    assert shared(verifying(pipelined), pipelined.drafting) > 0.1
    assert pipelined.clock.now < sync.clock.now


@both
def test_each_mode_is_faster_than_the_last(sampling: Sampling) -> None:
    plain, sync, pipelined = (
        ridden(mode(name), sampling).clock.now for name in ("plain", "sync", "pipelined")
    )
    # synchronous: five drafted tokens cost half a pass, and bring three or four
    assert 2 < plain / sync < 4
    assert sync / pipelined > 1.15


class RunsOn(FixedRule):
    """Called synchronous, but the draft may run on while the target verifies."""

    def lead(self, busy: bool) -> int:
        return 2 * self.n_max + 2


def test_control_a_synchronous_draft_is_not_taken_for_overlap() -> None:
    report = ridden(mode("sync")).session.stats.report()
    assert report.hits == 0
    assert report.target_busy is not None
    assert report.target_busy < 0.75


def test_control_a_synchronous_draft_that_runs_on_is_seen() -> None:
    sim = ridden(RunsOn("sync", 5))
    assert shared(verifying(sim), sim.drafting) > 0.1
    assert sim.session.stats.both_s > 0.1
