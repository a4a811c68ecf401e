"""What a request counts and times; the words are defined once, here.

Once a request is over, created = verified + discarded + hits, and
generated = resumed + (accepted - truncated) + corrections + bonuses + plain.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from outrider.core.sampling import FAR, NEAR
from outrider.core.values import Token, Value

Interval = tuple[float, float]  # from, to; seconds


class Lane:
    """When one worker computed for the request; intervals come in order and never overlap."""

    def __init__(self) -> None:
        self.busy_s = 0.0
        self.recent: deque[Interval] = deque(maxlen=1024)

    def add(self, interval: Interval) -> None:
        self.busy_s += interval[1] - interval[0]
        self.recent.append(interval)

    def share(self, start: float, end: float, goes_on: bool) -> float:
        """The share of this time during which it computed.

        `goes_on`: it still does, and has not told it yet.
        """
        if end <= start:
            return 0.0
        last = self.recent[-1][1] if self.recent else start
        computed_s = max(0.0, end - max(start, last)) if goes_on else 0.0
        computed_s += sum(
            max(0.0, min(end, b) - max(start, a)) for a, b in _since(self.recent, start)
        )
        return min(1.0, computed_s / (end - start))


class Report(Value, frozen=True):
    """A request's figures as everybody sees them; a ratio is None where it is not defined yet."""

    generated_tokens: int
    drafted_tokens: int  # created: received from the draft worker
    verified_tokens: int
    accepted_tokens: int
    discarded_tokens: int
    truncated_tokens: int  # accepted, but behind the end of the answer
    corrections: int
    bonuses: int
    plain_tokens: int
    hits: int  # not verified, but equal to the target's own token there
    verify_rounds: int
    acceptance_rate: float | None  # accepted / verified
    mean_accepted_length: float | None  # 1 + accepted / verify rounds
    overlap: float | None  # share of the draft's computing during which the target computed too
    target_busy: float | None  # share of the generation time
    draft_busy: float | None
    time_to_first_token_s: float | None  # waiting for a sequence included
    prefill_s: float | None
    decode_s: float | None  # generation time: from the end of prefill to the last commit
    tokens_per_s: float | None
    speedup: float | None  # over the target alone
    speedup_kind: str | None  # "measured" or "estimate"
    mode: str
    seed: int
    near_ties: int  # tokens that won by less than `sampling.NEAR` logits
    smallest_margin: float | None  # logits by which the closest token won; None: none had a rival
    cached_tokens: int = 0  # of the prompt, that the target had read before
    repeated_tokens: int = 0  # accepted, and drafted without a model: they followed there before
    resumed_tokens: int = 0  # of the answer, that an earlier coordinator generated; not in rates
    foreseen_misses: int = 0  # times that the draft was wrong, and had drafted for that case
    beside_tokens: int = 0  # evaluated beside blocks, for the case that those are wrong: a tree …
    beside_misses: int = 0  # … and times that they were, and what was beside them was right


@dataclass(slots=True)
class Stats:
    """What a session counts; seconds are on the coordinator's clock.

    Workers report only how long they computed. The interval is taken to end when the report comes,
    so a worker on another machine seems late by the latency of its link.
    """

    mode: str = "plain"
    seed: int = 0
    submitted: float = 0.0
    started: float = 0.0
    step_s: float = 0.0  # a plain step of the target, on average; the one at load counts as one
    steps: int = 0  # that were seen since
    created: int = 0
    verified: int = 0
    accepted: int = 0
    repeated: int = 0  # of them, that no model has drafted
    truncated: int = 0
    own: Counter[str] = field(default_factory=Counter)  # the target's: corrected, bonus, plain
    hits: int = 0
    rounds: int = 0  # verify rounds: target passes over at least one drafted token
    lengths: Counter[int] = field(default_factory=Counter)  # of these, by how many were accepted
    discarded: Counter[str] = field(default_factory=Counter)  # by reason
    prefilled: float | None = None
    last_commit: float | None = None
    both_s: float = 0.0
    target: Lane = field(default_factory=Lane)
    draft: Lane = field(default_factory=Lane)
    near_ties: int = 0
    smallest_margin: float = FAR
    cached: int = 0  # tokens of the prompt that the target had read before
    resumed: int = 0  # tokens of the answer that were there when it began
    foreseen: int = 0  # misses of the draft behind which it had drafted already
    beside: int = 0  # tokens of sides that were evaluated: verified are those of sides that …
    sides: int = 0  # … so often were right

    @property
    def generated(self) -> int:
        """Tokens of the answer but for the resumed ones."""
        return self.accepted - self.truncated + self.own.total()

    def stepped(self, elapsed_s: float) -> None:
        """A plain step took so long."""
        self.steps += 1
        self.step_s += (elapsed_s - self.step_s) / (1 + self.steps)

    def count(self, block: int, accepted: int, now: float, forbidden: int = 0) -> None:
        """A target pass has verified `block` drafted tokens and accepted `accepted` of them.

        So many behind them were `forbidden` by the request's constraint, and not verified.
        """
        self.prefilled = now if self.prefilled is None else self.prefilled
        self.last_commit = now
        if block:
            self.rounds += 1
            self.lengths[accepted] += 1
        self.verified += block
        self.accepted += accepted
        self.discarded["grammar"] += forbidden

    def committed(self, tokens: Iterable[Token], truncated: int) -> None:
        """`tokens` are part of the answer; `truncated` accepted ones lie behind its end."""
        self.truncated += truncated
        for token in tokens:
            if token.kind != "drafted":
                self.own[token.kind] += 1
            self.near_ties += token.margin < NEAR
            self.smallest_margin = min(self.smallest_margin, token.margin)

    def computed(self, lane: Lane, ended: float, elapsed_s: float) -> None:
        """The worker of `lane` computed for `elapsed_s` until `ended`; prefill is left out."""
        if self.prefilled is None or ended <= self.prefilled:
            return
        start = max(ended - elapsed_s, self.prefilled)
        if lane.recent:
            start = max(start, lane.recent[-1][1])  # the report before was delayed on its way
        if start >= ended:
            return
        lane.add((start, ended))
        other = self.draft if lane is self.target else self.target
        # of two reports, the later one counts what their intervals share
        self.both_s += sum(
            max(0.0, min(ended, b) - max(start, a)) for a, b in _since(other.recent, start)
        )

    def report(self) -> Report:
        """The figures so far."""
        decode_s = _difference(self.last_commit, self.prefilled)
        # alone, the target would have taken a step for each token but the first, which is prefill's
        speedup = _ratio((self.generated - 1) * self.step_s, decode_s)
        return Report(
            generated_tokens=self.resumed + self.generated,
            drafted_tokens=self.created,
            verified_tokens=self.verified,
            accepted_tokens=self.accepted,
            discarded_tokens=self.discarded.total(),
            truncated_tokens=self.truncated,
            corrections=self.own["corrected"],
            bonuses=self.own["bonus"],
            plain_tokens=self.own["plain"],
            hits=self.hits,
            verify_rounds=self.rounds,
            acceptance_rate=_ratio(self.accepted, self.verified),
            mean_accepted_length=1 + self.accepted / self.rounds if self.rounds else None,
            overlap=_ratio(self.both_s, self.draft.busy_s),
            target_busy=_ratio(self.target.busy_s, decode_s),
            draft_busy=_ratio(self.draft.busy_s, decode_s),
            time_to_first_token_s=_difference(self.prefilled, self.submitted),
            prefill_s=_difference(self.prefilled, self.started),
            decode_s=decode_s,
            tokens_per_s=_ratio(self.generated, decode_s),
            speedup=speedup or None,
            speedup_kind="estimate" if speedup else None,
            mode=self.mode,
            seed=self.seed,
            near_ties=self.near_ties,
            smallest_margin=self.smallest_margin if self.smallest_margin < FAR else None,
            cached_tokens=self.cached,
            repeated_tokens=self.repeated,
            resumed_tokens=self.resumed,
            foreseen_misses=self.foreseen,
            beside_tokens=self.beside,
            beside_misses=self.sides,
        )


def _since(intervals: deque[Interval], start: float) -> list[Interval]:
    found: list[Interval] = []
    for interval in reversed(intervals):
        if interval[1] <= start:
            break
        found.append(interval)
    return found


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def _difference(end: float | None, start: float | None) -> float | None:
    return None if end is None or start is None else end - start
