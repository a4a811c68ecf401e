"""What rules decide by: what things cost, and how likely drafted tokens are accepted."""

from __future__ import annotations

import bisect
import functools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

ALIKE = 0.2  # doublings of the rows over which the cost of a pass is about the same

LONGEST = 31  # the longest block, in drafted tokens, that prices are worked out for


@dataclass(frozen=True, slots=True)
class Costs:
    """What each step takes, in seconds."""

    verify_s: tuple[float, ...]  # a pass over 1, 2, 3 … rows
    draft_s: float  # one drafted token
    link_s: float  # added to each pass by messages
    turn_s: float = 0.0  # added to the first drafted token where draft and target take turns
    rollback_s: float = 0.0  # added where a block is not accepted as a whole, to take back the rest

    def passes(self, longest: int) -> Values:
        """Seconds of a round with 0 … `longest` drafted tokens: [longest + 1]."""
        rows = np.arange(1, longest + 2)
        known = np.arange(1, len(self.verify_s) + 1)
        slope = max(0.0, *self._slopes) if len(self.verify_s) > 1 else 0.0
        beyond = np.maximum(rows - len(self.verify_s), 0) * slope
        seconds: Values = np.interp(rows, known, self.verify_s) + beyond + self.link_s
        return seconds

    @property
    def _slopes(self) -> tuple[float, float]:
        """Seconds by the row: of the last one, and of all behind the first."""
        one, *_, before, last = self.verify_s[:1] + self.verify_s
        return last - before, (last - one) / (len(self.verify_s) - 1)

    def rounds(self, accepted: Values) -> Values:
        """The same, taking back included, where all of a block of 0, 1, 2 … is accepted so often.

        `accepted` has these probabilities along its last axis.
        """
        return self.passes(accepted.shape[-1] - 1) + self.rollback_s * (1 - accepted)


class CostModel:
    """The costs of a pair of workers: measured when they are loaded, then kept up to date.

    A measurement moves the cost of its own number of rows, and a little those of all others: a
    machine that has become slower is slower for all. Only a few passes of the draft are measured at
    load, perhaps while the target is loading too, so its first tokens count for more. `costs` only
    change when one is off by more than 5 % and more than 0.5 % of a plain step: until then all
    that was solved for them is kept.

    Of `crowd` requests that share the passes of the workers, each sees other costs. A further row
    delays all of them, so it costs each that many times its seconds; the pass itself they pay
    together. With these costs the rule for one request finds what is best for all.
    """

    OWN, SHARED, OFF, NEGLIGIBLE = 0.2, 0.05, 0.05, 0.005

    def __init__(
        self,
        verify_s: Sequence[float],
        draft_s: float,
        link_s: float = 5e-4,
        read_s: float | None = None,
        crowd_s: Sequence[float] = (),
        together_s: Sequence[float] = (),
        in_turns: bool = False,
        rollback_s: float = 0.0,
    ) -> None:
        """`crowd_s`: passes over one row each of 1, 2, 3 … requests; `together_s`: the same of the
        draft. `in_turns`: while the draft reads for one request, all the others wait. `rollback_s`:
        see `Costs`; it counts where it is not negligible, and stays what it was at load."""
        self.crowd = 1
        self.riders = 0  # requests that share the draft's passes; 0: all of the crowd
        self._in_turns = in_turns
        self._together_s = tuple(together_s)
        is_dear = rollback_s > self.NEGLIGIBLE * verify_s[0]
        self._rollback_s = rollback_s if is_dear else 0.0
        self._read_s = draft_s / 3 if read_s is None else read_s
        longest = max(LONGEST, len(verify_s) - 1)  # those beyond are learnt as they are made
        rows_s = Costs(tuple(verify_s), 0.0, 0.0).passes(longest).tolist()
        self._verify = [math.log(max(seconds, 1e-6)) for seconds in rows_s]
        self._crowd = [math.log(max(seconds, 1e-6)) for seconds in crowd_s]
        self._draft = math.log(max(draft_s, 1e-6))
        self._link = math.log(link_s)
        self._turn = self._draft + math.log(0.3)
        self._tokens = 4.0  # steps of the draft so far; that at load counts as the first four
        self._changed = False
        self._hold(self._seconds())

    @classmethod
    def measured(
        cls,
        target_s: Sequence[float],
        draft_s: Sequence[float],
        crowd_s: Sequence[float] = (),
        together_s: Sequence[float] = (),
        in_turns: bool = False,
        rollback_s: float = 0.0,
    ) -> CostModel:
        """From what the workers have measured at load: see `wire.Hello`."""
        token_s, *read_s = draft_s
        return cls(
            verify_s=target_s,
            draft_s=token_s,
            read_s=read_s[0] if read_s else None,
            crowd_s=crowd_s,
            together_s=together_s,
            in_turns=in_turns,
            rollback_s=rollback_s,
        )

    def verified(self, rows: int, elapsed_s: float, round_trip_s: float, requests: int = 1) -> None:
        """A pass over `rows` rows of so many requests took `elapsed_s`; see `Rule.verified`.

        Each of them tells it, so what one tells is only a part of a measurement.
        """
        if not 1 <= requests <= rows or (requests == 1 and rows > len(self._verify)):
            return
        expected_s = self._pass_s(np.exp(self._verify), np.exp(self._crowd), requests, rows)
        error = _bounded(math.log(max(elapsed_s, 1e-6) / expected_s)) / requests
        at = (rows if requests == 1 else requests) - 1
        own, others = (self._verify, self._crowd) if requests == 1 else (self._crowd, self._verify)
        others[:] = [cost + self.SHARED * error for cost in others]
        for n, share in enumerate(_shares(at, len(own))):
            own[n] += (self.SHARED + (self.OWN - self.SHARED) * share) * error
        if requests == 1 or not self._in_turns:  # else some were held back for the others
            link_s = min(max(round_trip_s - elapsed_s, 1e-5), 1.0)
            self._link += self.OWN * _bounded(math.log(link_s) - self._link) / requests
        self._changed = True

    @staticmethod
    def _pass_s(verify_s: Values, crowd_s: Values, requests: int, rows: int) -> float:
        """Seconds of a pass over `rows` rows of so many requests, of which each has one or more.

        Measured on a busy machine, more rows may seem to take less time. For several requests
        what they add is never less than nothing, or a pass could come out as none.
        """
        if requests == 1:
            return float(verify_s[rows - 1])
        rising = Costs(tuple(np.maximum.accumulate(verify_s)), 0.0, 0.0).passes(rows)
        together_s = crowd_s if requests <= len(crowd_s) else rising
        return float(together_s[requests - 1] + rising[rows - 1] - rising[requests - 1])

    def drafted(
        self, each_s: float, count: int = 1, turn_s: float | None = None, requests: int = 1
    ) -> None:
        """`count` tokens took `each_s` each; beginning a turn, if they did, took `turn_s`.

        So many `requests` shared the draft's passes, and each of them tells it.
        """
        each_s /= self.together(requests)
        passes = count / requests
        self._tokens += passes
        weight = max(1 - (1 - self.SHARED) ** passes, passes / self._tokens)
        # disturbances only make it slower, so only that side is bounded
        self._draft += weight * min(math.log(max(each_s, 1e-6)) - self._draft, math.log(2))
        if turn_s is not None:
            error = _bounded(math.log(max(turn_s, 1e-5)) - self._turn)
            self._turn += self.SHARED * error / requests
        self._changed = True

    def read(self, each_s: float) -> None:
        """Tokens that the draft only read took `each_s` each."""
        self._read_s += 0.3 * (min(each_s, 2 * self._read_s) - self._read_s)

    @property
    def read_s(self) -> float:
        """What a token costs that the draft only reads."""
        return self._read_s * (self.crowd if self._in_turns else 1)

    def together(self, requests: int) -> float:
        """How many times as long as for one request the draft's pass for so many takes."""
        known = self._together_s
        if len(known) < 2:
            return float(requests)
        slope = max(0.0, known[-1] - known[-2])
        beyond = max(0, requests - len(known)) * slope
        together_s = known[min(requests, len(known)) - 1] + beyond
        return max(1.0, together_s / max(known[0], 1e-6))

    def growth(self, requests: int) -> float:
        """How many times as long as for one request a plain step of so many takes."""
        return self.shared_by(requests).verify_s[0] / self.shared_by(1).verify_s[0]

    @property
    def costs(self) -> Costs:
        if self._changed:
            self._changed = False
            seconds = self._seconds()
            allowed = np.maximum(self.OFF * self._held, self.NEGLIGIBLE * self._held[0])
            if (np.abs(seconds - self._held) > allowed).any():
                self._hold(seconds)
        return self.shared_by(self.crowd, self.riders)

    def shared_by(self, crowd: int, riders: int = 0) -> Costs:
        """What each of so many requests sees, of which `riders` share the draft; 0: all do."""
        of = crowd, riders or crowd
        if of not in self._costs:
            self._costs[of] = self._seen_by(*of)
        return self._costs[of]

    def _seconds(self) -> Values:
        found: Values = np.exp([*self._verify, *self._crowd, self._draft, self._link, self._turn])
        return found

    def _hold(self, seconds: Values) -> None:
        self._held = seconds
        self._costs: dict[tuple[int, int], Costs] = {}  # by the size of the crowd, and the riders

    def _seen_by(self, crowd: int, riders: int) -> Costs:
        verify, more = len(self._verify), len(self._crowd)
        verify_s = np.maximum.accumulate(self._held[:verify])
        crowd_s = np.maximum.accumulate(self._held[verify : verify + more])
        draft_s, link_s, turn_s = map(float, self._held[verify + more :])
        if crowd > 1:
            base_s = self._pass_s(verify_s, crowd_s, crowd, crowd)
            alone = Costs(tuple(verify_s), 0.0, 0.0).passes(crowd + LONGEST)[crowd - 1 :]
            verify_s = base_s + crowd * (alone - alone[0])
        if riders > 1:
            draft_s *= self.together(riders)
        rollback_s = self._rollback_s * crowd  # all of them wait
        return Costs(tuple(map(float, verify_s)), draft_s, link_s, turn_s, rollback_s)


@functools.lru_cache(maxsize=256)
def _shares(at: int, count: int) -> tuple[float, ...]:
    """How far each of `count` costs is like that at `at`: few rows tell of themselves alone."""
    apart = np.log2((1 + np.arange(count)) / (1 + at)) / ALIKE
    return tuple(np.exp(-(apart**2)).tolist())


def _bounded(error: float) -> float:
    """At most a doubling or halving: one disturbed measurement must not count for more."""
    return min(max(error, -math.log(2)), math.log(2))


# How often tokens of each `sureness` were accepted. Fitted to the default pair: draft as q4_0,
# greedy, 1,644 tokens of six kinds of text, recorded by `outrider bench --record` (the file is in
# tests/sim). Other pairs are close; `Acceptance.trust` follows the rest. To refit: scripts/refit.
SURENESS = (0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 6.0)
CAME_TRUE = (0.22, 0.5, 0.70, 0.86, 0.925, 0.965, 0.995)


def sureness(confidence: float) -> float:
    """How sure a draft is: how often its probability of being wrong was halved, at most 13.3."""
    return -math.log2(max(1 - confidence, 1e-4))


@functools.lru_cache(maxsize=1024)  # each is asked for several times, and soon not any more
def usual_acceptance(confidence: float) -> float:
    """How often drafted tokens of this confidence are accepted, by the table above."""
    at = sureness(confidence)
    above = bisect.bisect(SURENESS, at, 1, len(SURENESS) - 1)
    low, high = SURENESS[above - 1], SURENESS[above]
    part = min(max((at - low) / (high - low), 0.0), 1.0)
    return CAME_TRUE[above - 1] + part * (CAME_TRUE[above] - CAME_TRUE[above - 1])


def usual_confidence(acceptance: float) -> float:
    """The confidence of a drafter that knows how often its tokens are accepted: the inverse."""
    return float(1 - 2 ** -np.interp(acceptance, CAME_TRUE, SURENESS))


class Trust:
    """How much of what was foretold came true lately."""

    def __init__(self, memory: float = 300.0, weight: float = 10.0) -> None:
        self._memory, self._weight = memory, weight
        self._came, self._foretold = weight, weight

    def observe(self, good: bool, foretold: float) -> None:
        """Something came true (`good`) or not, which had the chance `foretold` to."""
        fade = 1 - 1 / self._memory
        self._came = self._came * fade + good
        self._foretold = self._foretold * fade + foretold

    @property
    def share(self) -> float:
        """It is at most 1."""
        weight = self._weight
        return min(1.0, (self._came + weight) / (self._foretold + weight))


class Acceptance:
    """How likely a drafted token is accepted: on average lately, and by the draft's confidence."""

    def __init__(self, memory: float = 60.0, prior: float = 0.8, weight: float = 10.0) -> None:
        self._memory = memory
        self._good, self._seen = prior * weight, weight
        self._trust = Trust(memory, weight)

    def observe(self, good: bool, confidence: float) -> None:
        """A drafted token of this confidence was accepted (`good`) or not."""
        fade = 1 - 1 / self._memory
        self._good, self._seen = self._good * fade + good, self._seen * fade + 1
        self._trust.observe(good, usual_acceptance(confidence))

    @property
    def average(self) -> float:
        return self._good / self._seen

    @property
    def trust(self) -> float:
        """Tokens accepted lately, as a share of those that the confidences foretold; at most 1."""
        return self._trust.share

    def of(self, confidences: Sequence[float]) -> Values:
        """The acceptances that these confidences foretell, in the same order: [tokens]."""
        trust = self.trust
        return np.array([trust * usual_acceptance(confidence) for confidence in confidences])


LEVELS = np.array([0.3, 0.5, 0.65, 0.78, 0.87, 0.93, 0.97, 0.995])  # acceptances told apart
BETWEEN = tuple(map(float, (LEVELS[1:] + LEVELS[:-1]) / 2))


class Spread:
    """How the acceptances of recent drafted tokens are spread: a weight for each of `LEVELS`."""

    OFF = 0.1
    LARGEST = 1e9

    def __init__(
        self,
        memory: float = 60.0,
        prior: Sequence[float] = (1 / len(LEVELS),) * len(LEVELS),
        weight: float = 16.0,
    ) -> None:
        self._growth = 1 / (1 - 1 / memory)
        self._one = 1.0  # the weight of the latest token: it grows where the others would fade
        self._seen = [weight * share for share in prior]
        self._held = self.weights

    def observe(self, likely: Iterable[float]) -> None:
        """Tokens with these acceptances were drafted."""
        for acceptance in likely:
            self._one *= self._growth
            self._seen[bisect.bisect_left(BETWEEN, acceptance)] += self._one
        if self._one > self.LARGEST:
            self._seen = [seen / self._one for seen in self._seen]
            self._one = 1.0

    @property
    def weights(self) -> tuple[float, ...]:
        total = sum(self._seen)
        return tuple(seen / total for seen in self._seen)

    @property
    def steady(self) -> tuple[float, ...]:
        """The weights, unchanged as long as they are off by little: see `CostModel`."""
        weights = self.weights
        pairs = zip(weights, self._held, strict=True)
        if sum(abs(weight - held) for weight, held in pairs) > self.OFF:
            self._held = weights
        return self._held
