"""An answer is held to its constraint whatever becomes of the draft, which need not know of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.sim.simulator import GREEDY, Asked, Simulation, Target, World, plain
from tests.sim.test_pipeline import WARM, deaths, hangs, quiet, worlds

from outrider.core.constraints import Constraint
from outrider.core.rules import FixedRule
from outrider.core.sampling import Sampling
from outrider.core.values import Mode, TokenId

ANY_OBJECT = Constraint("json")
SONG = Constraint("schema", json.dumps({"type": "array", "items": {"type": "string"}}))
LINES = Constraint("gbnf", 'root ::= ("- " [a-z ]+ "\\n")+')
CONSTRAINTS = [ANY_OBJECT, SONG, LINES]


@settings(quiet, max_examples=150)
@given(worlds(deaths, hangs), st.sampled_from(CONSTRAINTS), st.booleans())
def test_the_text_is_the_targets_own_whatever_the_draft_knows(
    world: World, constraint: Constraint, knows: bool
) -> None:
    asked = replace(world.asked, constraint=constraint)
    Simulation(replace(world, asked=asked, knows=knows)).run()


class VerifiesAll(Target):
    """Wrong on purpose: it evaluates what the constraint forbids."""

    def legal(self, drafted: tuple[TokenId, ...]) -> tuple[TokenId, ...]:
        return drafted


def ran(mode: Mode, knows: bool, target: type[Target] = Target, n: int = 60) -> Simulation:
    asked = Asked(n_predict=n, sampling=WARM, constraint=LINES)
    world = World(asked, FixedRule(mode, 4), agreement=1.0, knows=knows)
    return Simulation(world, make_target=target).run()


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
def test_a_draft_that_knows_the_constraint_agrees_where_one_that_does_not_cannot(
    mode: Mode,
) -> None:
    stats = {knows: ran(mode, knows).session.stats for knows in (True, False)}
    assert stats[True].discarded["grammar"] == 0
    assert stats[True].accepted == stats[True].verified > 40  # the same model: it never errs
    assert stats[False].discarded["grammar"] > 0
    assert stats[False].rounds > 0
    assert ran(mode, False).answer == ran(mode, True).answer


def test_what_is_forbidden_is_not_verified() -> None:
    """The control evaluates the same tokens, all in vain."""
    cut, whole = (ran("sync", False, target).session.stats for target in (Target, VerifiesAll))
    assert whole.discarded["grammar"] == 0
    assert cut.verified < whole.verified
    assert cut.accepted == cut.verified


@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "warm"])
def test_the_answer_fits(sampling: Sampling) -> None:
    asked = Asked(n_predict=120, context=150, sampling=sampling, constraint=LINES)
    text = plain(asked).text
    assert len(text) == 120
    assert re.fullmatch(r"(- [a-z ]+\n)*(-|- [a-z ]*)", text)
