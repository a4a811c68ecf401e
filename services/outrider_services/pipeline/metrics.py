"""What the coordinator counts over all requests; `exposition` writes it as Prometheus reads it.

What a request counts itself (`outrider.core.stats`) is added up only when somebody asks, so that a
fragment pays for the histograms that it belongs to and for nothing else.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeAlias

import outrider
from outrider.core.stats import Interval
from outrider.core.values import Fragment, Proposal, Role, Verdict
from outrider.errors import (
    BadRequest,
    InternalError,
    Overloaded,
    ProtocolError,
    RequestPoisoned,
    RequestTimeout,
    WorkerLost,
)
from outrider.wire import messages as wire
from outrider_services.pipeline.member import Member
from outrider_services.pipeline.requests import Request, Requests
from outrider_services.pipeline.roster import Roster

ROLES: tuple[Role, ...] = ("target", "draft")
RECENT_S = 1.0  # how far back a worker's busy share looks
BRIEF = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)

Numbers: TypeAlias = dict[str, float]  # by the value of a label


COUNTS = {  # by metric, what a request counts
    "spec_decode_num_drafts_total": "rounds",
    "spec_decode_num_draft_tokens_total": "verified",
    "spec_decode_num_accepted_tokens_total": "accepted",
    "spec_decode_num_created_draft_tokens_total": "created",
    "spec_decode_num_hits_total": "hits",
    "truncated_tokens_total": "truncated",
    "generation_tokens_total": "generated",
    "prompt_tokens_cached_total": "cached",
}
# of the labels whose values are known, each is told from the beginning, so that rates are defined
DISCARDED = ("correction", "miss", "stop", "cancelled", "stale", "dismissed", "failed")
OWN = ("corrected", "bonus", "plain")
RESUMED = ("target", "connection")
SUCCESS = ("stop", "length", "cancelled")
# what a worker has said of a request and does not count: see `coordinator`
STALE = ("over", "other_worker", "round", "lineage", "malformed")
FAILURE = (
    Overloaded, BadRequest, WorkerLost, RequestPoisoned, RequestTimeout, ProtocolError,
    InternalError,
)  # fmt: skip


class Histogram:
    """How many values were at most each of `bounds`, and their sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...] = BRIEF) -> None:
        self._bounds, self._counts, self._sum = bounds, [0] * (len(bounds) + 1), 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def table(self) -> Numbers:
        """By upper bound as Prometheus spells it, each with those below; and the "sum"."""
        names = [*map(str, self._bounds), "+Inf"]
        table: Numbers = dict(zip(names, accumulate(self._counts), strict=True))
        return {**table, "sum": self._sum}


class Totals:
    """What several requests have counted together."""

    def __init__(self) -> None:
        self._counts = Counter(dict.fromkeys(COUNTS, 0))
        self._discarded = Counter(dict.fromkeys(DISCARDED, 0))
        self._own = Counter(dict.fromkeys(OWN, 0))
        self._lengths: Counter[int] = Counter()  # rounds by how many tokens were accepted
        self._prompt = 0

    def add(self, request: Request, *, is_over: bool) -> None:
        """Add what `request` has counted; what was drafted for it is void once it is over."""
        session = request.session
        if session is None:
            return
        stats = session.stats
        for name, count in COUNTS.items():
            self._counts[name] += getattr(stats, count)
        self._discarded.update(stats.discarded)
        self._own.update(stats.own)
        self._lengths.update(stats.lengths)
        self._prompt += len(request.tokens) if stats.prefilled is not None else 0
        if is_over:  # after a failure the session does not say what became of the rest
            told = stats.verified + stats.hits + stats.discarded.total()
            self._discarded["failed"] += stats.created - told

    def plus(self, running: list[Request]) -> Totals:
        """Those of `running` too, in a copy."""
        both = Totals()
        for mine, theirs in (
            (both._counts, self._counts),
            (both._discarded, self._discarded),
            (both._own, self._own),
        ):
            mine.update(theirs)
        both._lengths.update(self._lengths)
        both._prompt = self._prompt
        for request in running:
            both.add(request, is_over=False)
        return both

    def table(self) -> dict[str, Any]:
        """By metric."""
        longest = max(self._lengths, default=0)
        rounds = [self._lengths[length] for length in range(longest, 0, -1)]
        accepted = [*accumulate(rounds)][::-1]  # a round that accepted n did so at the first n
        return {
            **self._counts,
            "spec_decode_num_accepted_tokens_per_pos_total": {
                str(position): count for position, count in enumerate(accepted)
            },
            "spec_decode_num_discarded_draft_tokens_total": dict(self._discarded),
            "target_tokens_total": dict(self._own),
            "prompt_tokens_total": self._prompt,
        }


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker has told: until `at` it had computed so much."""

    at: float
    computed_s: float
    passes: int
    served_s: float  # for so long requests had been running, since the coordinator began


NOTHING = Beat(0.0, 0.0, 0, 0.0)


@dataclass(slots=True)
class Meter:
    """How much one worker computes, by its heartbeats."""

    busy_s: float = 0.0
    passes: int = 0
    waits: Numbers = field(default_factory=dict)  # seconds, by what it waited on
    _recent: deque[Beat] = field(default_factory=lambda: deque(maxlen=64))

    def begin(self) -> None:
        """Another worker has come, whose counts begin anew."""
        self._recent.clear()

    def take(self, beat: Beat, on: str) -> None:
        """Where it was idle while requests ran, it waited `on` this."""
        if self._recent:
            last = self._recent[-1]
            busy_s = max(0.0, beat.computed_s - last.computed_s)
            self.busy_s += busy_s
            self.passes += max(0, beat.passes - last.passes)
            idle_s = max(0.0, beat.served_s - last.served_s - busy_s)
            self.waits[on] = self.waits.get(on, 0.0) + idle_s
        self._recent.append(beat)
        while beat.at - self._recent[0].at > RECENT_S and beat.at - self._recent[1].at >= RECENT_S:
            self._recent.popleft()

    def recently(self) -> dict[str, float]:
        """The share of the last second in which it computed, and its passes per second."""
        first, last = (self._recent[0], self._recent[-1]) if self._recent else (NOTHING, NOTHING)
        elapsed_s = last.at - first.at
        if elapsed_s <= 0:
            return {"busy": 0.0, "passes_per_s": 0.0}
        busy = (last.computed_s - first.computed_s) / elapsed_s
        passes_per_s = (last.passes - first.passes) / elapsed_s
        return {"busy": min(max(0.0, busy), 1.0), "passes_per_s": max(0.0, passes_per_s)}


class Overlap:
    """For how long both workers computed, all their requests together; as `Stats.computed`.

    Of two reports, the later one counts what their intervals share. An interval is looked at no
    more once the other lane is past it, so that a report costs a microsecond.
    """

    def __init__(self) -> None:
        self.both_s = 0.0
        self._intervals: dict[Role, deque[Interval]] = {role: deque(maxlen=1024) for role in ROLES}
        self._ends = dict.fromkeys(ROLES, 0.0)

    def add(self, lane: Role, other: Role, ended: float, elapsed_s: float) -> None:
        start = max(ended - elapsed_s, self._ends[lane])
        if start >= ended:
            return
        self._ends[lane] = ended
        self._intervals[lane].append((start, ended))
        others = self._intervals[other]
        while others and others[0][1] <= start:
            others.popleft()
        for began, over in others:
            if began >= ended:
                break
            self.both_s += min(ended, over) - max(start, began)


class Metrics:
    """Told of what happens by the coordinator; `snapshot` is all of it."""

    def __init__(self, requests: Requests, roster: Roster, clock: Callable[[], float]) -> None:
        self.meters: dict[str, Meter] = {role: Meter() for role in ROLES}  # by worker's name
        self._requests, self._roster, self._clock = requests, roster, clock
        self._over = Totals()
        self._success = Counter(dict.fromkeys(SUCCESS, 0))
        self._failure = Counter({error.code: 0 for error in FAILURE})
        self._draft, self._verify, self._between = Histogram(), Histogram(), Histogram()
        self._first, self._whole = Histogram(LONG), Histogram(LONG)
        self._links = {role: Histogram() for role in ROLES}
        self._overlap = Overlap()
        self._committed: dict[int, float] = {}  # by request, when its last block was committed
        self._running, self._served_s, self._since = 0, 0.0, 0.0
        self._ping, self._pinged = 0, 0.0
        self._incarnations: dict[str, int] = {}  # by name, the worker that had it last
        self.restarts = dict.fromkeys(ROLES, 0)
        self.stale = Counter(dict.fromkeys(STALE, 0))
        self.resumed = dict.fromkeys(RESUMED, 0)

    # ---- requests -------------------------------------------------------------------------------

    def started(self) -> None:
        """A request has a session now."""
        if not self._running:
            self._since = self._clock()
        self._running += 1

    def fragment(self, request: Request, fragment: Fragment) -> None:
        """A request has committed a block."""
        if not fragment.tokens:
            return
        now, last = self._clock(), self._committed.get(request.id)
        self._committed[request.id] = now
        if last is None:
            self._first.observe(now - request.submitted)
        else:
            self._between.observe((now - last) / len(fragment.tokens), len(fragment.tokens))

    def ended(self, request: Request, last: wire.Message) -> None:
        """A request is over; `last` is its outcome."""
        now = self._clock()
        self._over.add(request, is_over=True)
        self._committed.pop(request.id, None)
        if request.session:
            self._running -= 1
            if not self._running:
                self._served_s += now - self._since
        match last:
            case wire.Finished(_, reason):
                self._success[reason] += 1
                if reason != "cancelled":
                    self._whole.observe(now - request.submitted)
            case wire.Failed(_, code):
                self._failure[code] += 1

    # ---- workers --------------------------------------------------------------------------------

    def done(self, done: Verdict | Proposal) -> None:
        """A worker has told what it has computed."""
        now = self._clock()
        if isinstance(done, Proposal):
            if done.drafted:
                self._draft.observe(done.elapsed_s / len(done.drafted), len(done.drafted))
                self._overlap.add("draft", "target", now, done.elapsed_s)
        elif done.round:  # round 0 is the prompt
            self._verify.observe(done.elapsed_s)
            self._overlap.add("target", "draft", now, done.elapsed_s)

    def joined(self, member: Member) -> None:
        """A worker was welcomed, perhaps the same one over a new connection."""
        name, incarnation = member.name, member.hello.incarnation
        self.restarts[member.role] += self._incarnations.get(name, incarnation) != incarnation
        self._incarnations[name] = incarnation
        self.meters.setdefault(name, Meter()).begin()

    def ping(self) -> wire.Ping:
        """The next one; whoever answers shows how long the way there and back takes."""
        self._ping, self._pinged = self._ping + 1, self._clock()
        return wire.Ping(self._ping)

    def beat(self, member: Member, beat: wire.Beat) -> None:
        now, role = self._clock(), member.role
        if beat.ping and beat.ping == self._ping:
            self._links[role].observe(now - self._pinged)
            member.took(now - self._pinged)
        running_s = now - self._since if self._running else 0.0
        taken = Beat(now, beat.computed_s, beat.steps, self._served_s + running_s)
        other: Role = "draft" if role == "target" else "target"
        self.meters[member.name].take(taken, other if self._roster.of(other) else "coordinator")

    # ---- for whoever asks -----------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """Each metric by its name: a value, values by label, or of a histogram its table."""
        requests, meters = self._requests, self.meters
        workers = {role: self._roster.of(role) for role in ROLES}
        return {
            **self._over.plus(list(requests.running.values())).table(),
            "request_success_total": dict(self._success),
            "request_failure_total": dict(self._failure),
            "request_resumed_total": dict(self.resumed),
            "num_requests_running": len(requests.running),
            "num_requests_waiting": len(requests.waiting),
            "stale_dropped_total": dict(self.stale),
            "lane_busy_seconds_total": {lane: meter.busy_s for lane, meter in meters.items()},
            "lane_passes_total": {lane: meter.passes for lane, meter in meters.items()},
            "lane_wait_seconds_total": {lane: dict(meter.waits) for lane, meter in meters.items()},
            "overlap_seconds_total": self._overlap.both_s,
            "draft_seconds": self._draft.table(),
            "verify_seconds": self._verify.table(),
            "link_rtt_seconds": {role: self._links[role].table() for role in ROLES},
            "time_to_first_token_seconds": self._first.table(),
            "inter_token_latency_seconds": self._between.table(),
            "e2e_request_latency_seconds": self._whole.table(),
            "worker_up": {role: len(workers[role]) for role in ROLES},
            "worker_restarts_total": dict(self.restarts),
            "info": {
                "version": outrider.__version__,
                **{role: workers[role][0].hello.model if workers[role] else "" for role in ROLES},
            },
        }
