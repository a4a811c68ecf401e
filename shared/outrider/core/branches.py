"""Corrections foreseen: what follows where the target chooses otherwise than the draft did.

While the target verifies d1 d2 …, the first miss may be at any of them, and there the target's
token is often one that the draft found nearly as likely. So for the likeliest such corrections the
draft prepares a branch: the correction, and a few tokens behind it. If the target makes it, they
are drafted already (the idea of Saguaro, arXiv 2603.03251, whose fan-outs follow a rule; here every
row of a pass goes to the token that is likeliest to be of use, on the main line or on a branch).

A branch that no text leads to any more is dropped, and nobody but the draft worker knew of it. The
draft ranks tokens by logit plus the noise of their position, which is the target's own, so a
correction is as likely foreseen at temperature 1 as at 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from outrider.core.beside import likeliest
from outrider.core.estimates import usual_acceptance
from outrider.core.values import Beside, Drafted, Side, TokenId

# how often the right token, where the draft was wrong, was its second choice, its third …: of 477
# misses of the default pair
RANKS = (0.50, 0.21, 0.06, 0.05)
WEIGHT, MEMORY = 50.0, 500.0  # misses that these count for; misses that are remembered
LEAST, LEAST_BEGUN = 0.01, 0.002  # a token less likely of use is not drafted: the first, later ones
DEEPEST = 16  # drafted tokens of a branch
# what a token there counts for against one of the main line, whose use ends with no miss before it:
# with 1, simulated drafts whose rows each cost a token lost 1 %
WORTH = 0.5

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """A drafted token, and those that the draft found likeliest in its place, the first first."""

    drafted: Drafted
    others: tuple[TokenId, ...] = ()


@dataclass(slots=True, eq=False)
class Branch:
    """What follows if the target's token at `place` is `correction`."""

    place: int
    correction: TokenId
    found: list[Found] = field(default_factory=list)  # drafted behind it
    reach: float = 1.0  # how likely all of them are right, if the correction is
    slot: int = -1  # where the drafter holds it; -1: nowhere yet

    @property
    def tokens(self) -> tuple[TokenId, ...]:
        """From `place` on."""
        return (self.correction, *(one.drafted.token for one in self.found))

    def add(self, found: Found) -> None:
        self.found.append(found)
        self.reach *= usual_acceptance(found.drafted.confidence)


class Ranks:
    """How often a correction was the draft's second choice, its third …; for all of its texts."""

    def __init__(self) -> None:
        self._seen = WEIGHT
        self._counts = [share * WEIGHT for share in RANKS]

    def observe(self, rank: int | None) -> None:
        """The draft was wrong: the right token was this one of its others; None: of no others."""
        if self._seen >= MEMORY:
            self._counts = [count * (1 - 1 / MEMORY) for count in self._counts]
            self._seen -= 1
        self._seen += 1
        if rank is not None:
            self._counts[rank] += 1

    def share(self, rank: int) -> float:
        return self._counts[rank] / self._seen


class Branches:
    """Those of one lineage. `likely` are the usual acceptances of its drafted tokens, in order.

    Positions count from the beginning of the text; the first drafted token is at `committed`.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._others: dict[int, tuple[TokenId, ...]] = {}  # by position of a drafted token
        self.begun: list[Branch] = []

    def anew(self) -> Branches:
        """For the next lineage: what still comes for one of these has no effect there."""
        return Branches(self._ranks)

    def offer(self, place: int, others: Sequence[TokenId]) -> None:
        """A token was drafted at `place`, and these are what the draft found next likely."""
        self._others[place] = tuple(others[: len(RANKS)])

    def candidates(self, committed: int, likely: Sequence[float]) -> Iterator[tuple[float, Branch]]:
        """What the next token of each branch is worth; those not begun are among them."""
        begun = {(one.place, one.correction): one for one in self.begun}
        before = 1.0
        for place, acceptance in enumerate(likely, committed):
            missed = before * (1 - acceptance)
            for rank, token in enumerate(self._others.get(place, ())):
                branch = begun.get((place, token)) or Branch(place, token)
                value = missed * self._ranks.share(rank) * branch.reach
                least = LEAST_BEGUN if branch.found else LEAST
                if value >= least and len(branch.found) < DEEPEST:
                    yield WORTH * value, branch
            before *= acceptance

    def sides(self, committed: int, likely: Sequence[float], most: int) -> Beside:
        """Of all branches, and those not begun, the `most` tokens that are likeliest of use."""
        begun = {(one.place, one.correction): one.found for one in self.begun}
        found: list[Side] = []
        for place in range(committed, committed + len(likely)):
            for rank, token in enumerate(self._others.get(place, ())):
                behind = (one.drafted for one in begun.get((place, token), ()))
                found.append(Side(place, (Drafted(token, self._ranks.share(rank)), *behind)))
        return likeliest(likely, committed, tuple(found), most)

    def grow(self, branch: Branch, found: Found) -> None:
        """A token was drafted on it; nothing happens where no text leads there any more."""
        if branch not in self.begun:
            if branch.found or branch.correction not in self._others.get(branch.place, ()):
                return
            self.begun.append(branch)
        branch.add(found)

    def committed(self, end: int) -> None:
        """The text is committed up to `end`, and agrees with what was drafted."""
        self._others = {place: one for place, one in self._others.items() if place >= end}
        self.begun = [one for one in self.begun if one.place >= end]

    def corrected(self, place: int, truth: Sequence[TokenId]) -> Branch | None:
        """What was drafted at `place` is wrong: there `truth` begins, and the lineage ends.

        Returns the branch that goes on behind the truth, if there is one.
        """
        others = self._others.get(place)
        if others is not None:
            self._ranks.observe(others.index(truth[0]) if truth[0] in others else None)
        known = len(truth)
        for branch in self.begun:
            tokens = branch.tokens
            if branch.place == place and len(tokens) > known and tokens[:known] == tuple(truth):
                return branch
        return None


def chosen(
    main: Sequence[float],
    candidates: Iterable[tuple[float, Branch, T]],
    room: int,
    passes_s: Sequence[float],
) -> tuple[int, list[tuple[Branch, T]]]:
    """What to draft in one pass: how many of the main lines, and which branches.

    `main` and `candidates` have the values of next tokens, these with whom they are for; there is
    `room` to begin so many. A pass over 1, 2 … rows takes `passes_s`. The rows are those that bring
    most in the time that they take; of several main lines none is left out.
    """
    least = len(main) if len(main) > 1 else 0
    rows: list[tuple[float, tuple[Branch, T] | None]] = [(value, None) for value in main]
    begun: list[tuple[float, tuple[Branch, T]]] = []
    for value, branch, whose in sorted(candidates, key=lambda one: -one[0]):
        room -= not branch.found
        if branch.found or room >= 0:
            begun.append((value, (branch, whose)))
    rows[least:] = sorted([*rows[least:], *begun], key=lambda row: -row[0])
    best, best_rate, total = least, 0.0, 0.0
    for count, (value, _) in enumerate(rows[: len(passes_s)], 1):
        total += value
        if count >= least and total / passes_s[count - 1] > best_rate:
            best, best_rate = count, total / passes_s[count - 1]
    branches = [branch for _, branch in rows[:best] if branch is not None]
    return best - len(branches), branches
