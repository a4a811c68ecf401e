"""Which blocks go to the target together, and that none is held back for ever."""

from __future__ import annotations

from typing import Any

from outrider.core.dispatch import BLOCK_PATIENCE_S
from outrider.core.events import Start, Task
from outrider.core.gathering import Gathering, waits
from outrider.core.rules import FixedRule
from outrider.core.sampling import Sampling
from outrider.core.session import Session
from outrider.core.stats import Stats
from outrider.core.values import Drafted, Mode, Proposal, Verdict, Verify

BLOCK = Verify(1, 4, (5,))


def session(mode: Mode, now: float = 0.0) -> Session:
    """One that has had the verdict on its prompt, and waits for its draft if it takes turns."""
    task: dict[str, Any] = {"prompt": (1, 2, 3), "n_predict": 9, "stop": (), "ends": frozenset()}
    made = Session(
        Task(**task, context=100, vocabulary=50, sampling=Sampling(), logprobs=False),
        FixedRule(mode, n_max=2),
        Stats(),
    )
    made.handle(Start(draft=True), now)
    verdict = Verdict(
        accepted=0, tokens=(4,), round=0, base=3, pieces=(b"x",), margins=(1.0,), elapsed_s=0.1
    )
    made.handle(verdict, now)
    return made


def test_a_block_is_held_back_while_another_request_still_drafts_in_turns() -> None:
    gathering = Gathering[int]()
    gathering.add(1, BLOCK, 0.0)
    assert waits(session("sync"))
    assert gathering.release({2: session("sync")}, 0.1) == []
    assert gathering.release({2: session("pipelined")}, 0.2) == [(1, BLOCK)]
    assert gathering.release({}, 0.3) == []


def test_a_block_waits_for_the_pass_of_another_request_that_takes_turns() -> None:
    """Else they take turns with each other, too, at half the speed."""
    gathering, other = Gathering[int](), session("sync")
    drafted = Proposal(other.stock.lineage, 4, (Drafted(7, 0.9), Drafted(8, 0.9)), 0.01)
    (order,) = (one for one in other.handle(drafted, 0.1) if isinstance(one, Verify))
    gathering.add(1, BLOCK, 0.1)
    assert gathering.release({1: session("sync"), 2: other}, 0.1) == []
    gathering.add(2, order, 0.1)
    assert gathering.release({1: session("sync"), 2: other}, 0.1) == [(1, BLOCK), (2, order)]


def test_nobody_is_held_back_for_ever_by_requests_that_come_and_go() -> None:
    """Each is drafting when it is looked at, and cancelled before it has a block."""
    gathering = Gathering[int]()
    gathering.add(1, BLOCK, 10.0)
    gathering.add(2, BLOCK, 11.0)
    now = 10.0
    while not (orders := gathering.release({3: session("sync", now)}, now)):
        now += 0.05
        assert now < 10.0 + 2 * BLOCK_PATIENCE_S
    assert [key for key, _ in orders] == [1, 2]
    gathering.add(1, BLOCK, now)
    assert gathering.release({3: session("sync", now)}, now) == [], "it waits anew"


def test_the_block_of_a_request_that_has_left_goes_nowhere() -> None:
    gathering = Gathering[int]()
    gathering.add(1, BLOCK, 0.0)
    gathering.drop(1)
    gathering.drop(2)
    assert gathering.release({}, 0.0) == []
