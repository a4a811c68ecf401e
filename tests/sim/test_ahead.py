"""The target never waits for a message, in virtual time: same text, however long the links are.

The pair: a pass takes 10 ms, whatever its rows, a drafted token 1 ms.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Sequence

import pytest
from tests.sim.simulator import (
    Asked,
    Cancelled,
    Died,
    Hung,
    Priced,
    Simulation,
    Target,
    World,
)

from outrider.core.orders import Orders
from outrider.core.rules import FixedRule
from outrider.core.sampling import Sampling
from outrider.core.session import Session
from outrider.core.values import Block, TokenId, Verify

PASS_S, TOKEN_S = 0.010, 0.001
TRIPS = (0.2, 1.0, 2.0, 5.0)  # passes that a round trip takes
PLAIN = FixedRule("plain")


def world(
    rule: FixedRule | Priced, trip: float, *remote: str, seed: int = 0, count: int = 120
) -> World:
    """One answer; the links to those who are `remote` take so many passes there and back."""
    target, draft = ((trip * PASS_S / 2 if one in remote else 0.0,) for one in ("target", "draft"))
    return World(
        Asked(n_predict=count, sampling=Sampling(temperature=0.8, seed=seed), language=seed % 3),
        rule,
        agreement=0.9,
        pass_s=(PASS_S,),
        token_s=(TOKEN_S,),
        to_target_s=target,
        from_target_s=target,
        to_draft_s=draft,
        from_draft_s=draft,
    )


def took_s(one: World) -> float:
    stats = Simulation(one).run().session.stats
    assert stats.last_commit is not None
    assert stats.prefilled is not None
    return stats.last_commit - stats.prefilled


def idle_s(sim: Simulation) -> float:
    passes = [one for one in sim.passes if one.round]
    return sum(b.began - a.ended for a, b in itertools.pairwise(passes))


@pytest.mark.parametrize("trip", TRIPS)
def test_plain_the_target_is_idle_before_its_first_step_and_never_again(trip: float) -> None:
    sim = Simulation(world(PLAIN, trip, "target")).run()
    assert len(sim.passes) >= 120
    assert idle_s(sim) <= 0.01 * PASS_S * len(sim.passes)
    assert sim.seen["own step"] > 100


@pytest.mark.parametrize("remote", ["target", "draft"])
@pytest.mark.parametrize("rule", [FixedRule("pipelined", 5), Priced("pipelined")])
def test_a_round_trip_of_a_fifth_of_a_pass_costs_little(
    rule: FixedRule | Priced, remote: str
) -> None:
    near = sum(took_s(world(rule, 0.0, seed=seed)) for seed in range(4))
    far = sum(took_s(world(rule, 0.2, remote, seed=seed)) for seed in range(4))
    assert near / far >= 0.90


@pytest.mark.parametrize("trip", TRIPS)
@pytest.mark.parametrize("remote", [("target",), ("draft",), ("target", "draft")])
def test_no_link_makes_drafting_slower_than_the_target_alone(
    trip: float, remote: Sequence[str]
) -> None:
    for rule in (FixedRule("pipelined", 5), Priced("pipelined")):
        assert took_s(world(PLAIN, trip, *remote)) / took_s(world(rule, trip, *remote)) > 0.98


def test_over_no_link_nothing_is_ordered_ahead() -> None:
    """It could gain nothing, and would cost messages."""
    sim = Simulation(world(FixedRule("pipelined", 5), 0.0)).run()
    assert not sim.seen["order dropped"]
    assert idle_s(sim) < 1e-9


def trouble(seed: int) -> World:
    """Long links that waver, several requests, any mode; somebody dies, hangs or leaves."""
    rng = random.Random(f"ahead {seed}")
    trip_s = rng.choice([0.0, *TRIPS]) * PASS_S

    def link() -> tuple[float, ...]:
        return tuple(trip_s / 2 * rng.uniform(0.8, 1.2) for _ in range(5))

    def asked() -> Asked:
        return Asked(
            n_predict=rng.choice([17, 60, None]),
            stop=rng.choice([(), ("the o", "r r"), ("ow", "ve")]),
            sampling=Sampling(temperature=rng.choice([0.0, 0.8]), seed=rng.randrange(9)),
            language=rng.randrange(3),
            end_probability=rng.choice([0.0, 0.03]),
        )

    at = rng.random() * 0.3
    event = rng.choice([None, Cancelled(at), Died(at, 0.02), Died(at, None), Hung(at, 0.05)])
    name = rng.choice(["plain", "sync", "pipelined", "pipelined", "pipelined"])
    rule = FixedRule(name, rng.randint(1, 6), rng.choice([0, 0, 1]))  # type: ignore[arg-type]
    return World(
        asked=asked(),
        rule=Priced("pipelined") if rng.random() < 0.3 else rule,
        others=tuple(asked() for _ in range(rng.choice([0, 0, 1, 2]))),
        agreement=rng.choice([0.5, 0.8, 0.9, 1.0]),
        pass_s=(PASS_S,),
        token_s=(rng.choice([0.0005, 0.001, 0.004, 0.02]),),
        to_target_s=link(),
        from_target_s=link(),
        to_draft_s=link(),
        from_draft_s=link(),
        events=(event,) if event else (),
    )


@pytest.mark.parametrize("first", range(0, 160, 40))
def test_orders_ahead_change_no_text_and_little_is_done_in_vain(first: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + 40):
        try:
            sim = Simulation(trouble(seed)).run()
        except Exception as exc:
            exc.add_note(f"in trouble({seed})")
            raise
        seen += sim.seen
        seen["pass"] += sum(len(run.passes) for run in sim.runs)
    wanted = {"own step", "begun at once", "order dropped", "unwanted pass", "shared a pass"}
    assert not {case for case in wanted if not seen[case]}
    assert seen["unwanted pass"] < 0.1 * seen["pass"]


# --- controls: what is wrong on purpose must be caught --------------------------------------------


class Unfounded(Orders):
    """What was assumed is not compared with what the target chose."""

    def _compared(self, order: Verify, text: Sequence[TokenId]) -> Block | None:
        return order.drafted[max(0, len(text) - order.base) :]


class Forgetful(Orders):
    """That the block before was not accepted whole is forgotten."""

    def judged(self, is_whole: bool) -> None:
        pass


class Tireless(Orders):
    """It goes on one step too far."""

    def take(self, text: Sequence[TokenId]) -> Block | None:
        block = super().take(text)
        return () if block is None and self.until and len(text) <= self.until else block


class KeepsFalseBlocks(Target):
    orders_type = Unfounded


class ForgetsMisses(Target):
    orders_type = Forgetful


class StepsTooFar(Target):
    orders_type = Tireless


def fails(target: type[Target] = Target, session: type[Session] = Session) -> bool:
    for seed in range(160):
        try:
            Simulation(trouble(seed), session, target).run()
        except (AssertionError, ValueError):
            return True
    return False


@pytest.mark.parametrize("target", [KeepsFalseBlocks, ForgetsMisses, StepsTooFar])
def test_control_a_target_that_goes_on_from_what_is_not_so_is_caught(target: type[Target]) -> None:
    assert fails(target)


class CountsOnBlocks(Session):
    """It takes every block for accepted whole."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)  # type: ignore[arg-type]
        self.dispatch.orders = Forgetful()


def test_control_a_session_that_believes_in_dropped_orders_is_caught() -> None:
    assert fails(session=CountsOnBlocks)
