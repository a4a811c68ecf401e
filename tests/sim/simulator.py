"""The pipeline in one thread and in virtual time: real sessions between models of two workers.

A `World` says all that happens, so a run can be repeated exactly: what is asked for, how long each
evaluation and each message takes, and what goes wrong with the draft, when. The target is
`decoding.verify` over the scores of a toy engine, the draft the worker's own `Stream` over those of
another. Each worker computes for one request at a time. Messages on a link keep their order, as on
a ZeroMQ connection. After every event, and at the end, each run is held against what must be true
(`Run.look`, `Run.check`).
"""

from __future__ import annotations

import codecs
import copy
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal, NamedTuple

from tests.oracle import alone

from outrider.core import decoding
from outrider.core.constraints import Constraint, Matcher, constrained, propose
from outrider.core.estimates import CostModel
from outrider.core.events import (
    Cancel,
    CloseDraft,
    Command,
    Commit,
    DraftLost,
    DraftReady,
    Fault,
    Finish,
    OpenDraft,
    Prefill,
    Settle,
    Start,
    Task,
    Timer,
)
from outrider.core.events import Event as SessionEvent
from outrider.core.experience import Experience
from outrider.core.gathering import Gathering
from outrider.core.orders import Orders
from outrider.core.pace import MOST_AHEAD, MOST_STEPS
from outrider.core.priced import PricedRule
from outrider.core.rules import FixedRule, Rule
from outrider.core.sampling import FAR, Sampling, Scores, choose
from outrider.core.session import Phase, Session
from outrider.core.stats import Stats
from outrider.core.stragglers import Stragglers
from outrider.core.stream import Begun, Stream
from outrider.core.values import (
    Block,
    Drafted,
    Fragment,
    Proposal,
    Span,
    TokenId,
    Verdict,
    Verify,
    ids_of,
)
from outrider.engines.constraints import Constraints
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.engines.toy_text import END, SMALLEST

ENDS = frozenset({END})
CONTEXT = 160  # at most, and no prompt is cut into chunks
GREEDY = Sampling(temperature=0)
PIPELINED = FixedRule("pipelined", 4)


@dataclass(frozen=True, slots=True)
class Priced:
    """The priced rule, all requests sharing one experience."""

    mode: Literal["sync", "pipelined"]
    n_max: int = 64
    shares: bool = True  # where they take turns they do so on one device


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, and the language that the target speaks."""

    prompt: str = "the old river "
    n_predict: int | None = 24
    context: int = CONTEXT
    stop: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    language: int = 0
    end_probability: float = 0.0
    constraint: Constraint | None = None

    @property
    def tokens(self) -> tuple[TokenId, ...]:
        return tuple(self.prompt.encode())

    def matcher(self) -> Matcher | None:
        return all_constraints().matcher(self.constraint) if self.constraint else None

    def engine(self) -> ToyEngine:
        return self._toy(ToySettings(end_probability=self.end_probability))

    def draft_engine(self, agreement: float) -> ToyEngine:
        return self._toy(ToySettings("draft", agreement=agreement))

    def _toy(self, settings: ToySettings) -> ToyEngine:
        context = self.context
        return ToyEngine(
            replace(settings, seed=self.language, context=context, chunk=context, slots=1)
        )


@cache
def all_constraints() -> Constraints:
    return Constraints(ToyEngine())


ASKED = Asked()


@dataclass(frozen=True, slots=True)
class Died:
    """The draft worker dies; another comes `back_s` later, or never (None)."""

    at: float
    back_s: float | None


@dataclass(frozen=True, slots=True)
class Hung:
    """The draft worker stands still, for a while or for good (None); its mailbox fills."""

    at: float
    for_s: float | None


@dataclass(frozen=True, slots=True)
class Lied:
    """The draft's connection says this of the first request that is not over.

    Positions and lineages are relative to what would be right when it arrives.
    """

    at: float
    tokens: tuple[TokenId, ...]
    ahead: int = 0
    lineage: int = 0
    confidence: float = 0.9


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client of the first request goes away."""

    at: float


Event = Died | Hung | Lied | Cancelled


@dataclass(frozen=True, slots=True)
class World:
    asked: Asked = ASKED
    rule: FixedRule | Priced = PIPELINED
    others: tuple[Asked, ...] = ()  # requests that run at the same time
    others_at: tuple[float, ...] = (0.0,)  # and when they begin
    agreement: float = 0.8
    draft_context: int = CONTEXT
    draft_from: float | None = 0.0  # when the draft worker first joins
    # seconds, each repeated from the start when used up
    pass_s: tuple[float, ...] = (0.01,)
    token_s: tuple[float, ...] = (0.001,)
    to_target_s: tuple[float, ...] = (0.0,)
    from_target_s: tuple[float, ...] = (0.0,)
    to_draft_s: tuple[float, ...] = (0.0,)
    from_draft_s: tuple[float, ...] = (0.0,)
    knows: bool = True  # the draft worker knows what constraints allow
    cut_short: bool = True  # a cancelled draft step ends at once, or has just been too far
    events: tuple[Event, ...] = ()

    @property
    def costs(self) -> CostModel:
        """What would have been measured at load."""
        in_turns = self.rule.mode == "sync"
        flat = (self.token_s[0],) * 2
        curve = (self.pass_s[0],) * 16
        return CostModel(curve, self.token_s[0], together_s=flat, in_turns=in_turns)


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[TokenId, ...]
    text: str
    reason: str


def text_of(tokens: Sequence[TokenId]) -> str:
    """The text of `tokens` as far as it has come: half a character at the end is left out."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(
        bytes(token for token in tokens if token < 256)
    )


@cache
def plain(asked: Asked) -> Answer:
    """What the target says by itself: the oracle."""
    answer: list[TokenId] = []
    longest = asked.context - len(asked.tokens)
    if asked.n_predict is not None:
        longest = min(longest, asked.n_predict)
    for token in alone(asked.engine(), asked.tokens, asked.sampling, asked.matcher()):
        answer.append(token)
        text = text_of(answer)
        if token in ENDS:
            return Answer(tuple(answer), text, "stop")
        if found := [text.find(stop) for stop in asked.stop if stop in text]:
            return Answer(tuple(answer), text[: min(found)], "stop")
        if len(answer) >= longest:
            break
    return Answer(tuple(answer), bytes(answer).decode("utf-8", "replace"), "length")


# --- the parts ------------------------------------------------------------------------------------

Action = Callable[[], None]


class Clock:
    """Virtual time: what is due is done in order, and at the same time in order of asking."""

    def __init__(self) -> None:
        self.now = 0.0
        self.done = 0
        self._due: list[tuple[float, int, Action]] = []
        self._asked = itertools.count()

    def at(self, when: float, action: Action) -> None:
        heapq.heappush(self._due, (max(when, self.now), next(self._asked), action))

    def run(self, most: int) -> None:
        while self._due:
            self.done += 1
            assert self.done <= most, "it goes on and on"
            self.now, _, action = heapq.heappop(self._due)
            action()


class Link:
    """Messages in one direction: each takes its time, and none overtakes another."""

    def __init__(self, clock: Clock, delays_s: tuple[float, ...]) -> None:
        self.under_way = 0
        self._clock, self._delays = clock, itertools.cycle(delays_s)
        self._last = 0.0

    def send(self, deliver: Action) -> None:
        def arrive() -> None:
            self.under_way -= 1
            deliver()

        self.under_way += 1
        self._last = max(self._last, self._clock.now + next(self._delays))
        self._clock.at(self._last, arrive)


class Target:
    """The target worker's part of a request: one pass over the last token and the drafted ones."""

    orders_type: type[Orders] = Orders

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.tokens = list(asked.tokens)
        self.engine, self.matcher = asked.engine(), asked.matcher()
        self.orders = self.orders_type()
        self.block: Block | None = None  # what it is to verify, or just verifies
        self.passes = 0
        self.closed = False
        self.seen: Counter[str] = Counter()
        if self.tokens[:-1]:
            self.engine.extend(0, self.tokens[:-1], 0)

    def take(self, order: Verify) -> bool:
        """An order has come; whether there is something to do at last."""
        assert order.round == self.orders.latest + 1
        assert order.follows or order.base <= len(self.tokens), "it is behind another text"
        assert order.until <= self.asked.context
        self.orders.make_room(self.tokens)
        assert len(self.orders.waiting) <= MOST_AHEAD
        self.orders.add(order)
        return self.block is None and self.go_on()

    def go_on(self) -> bool:
        """Whether there is something to do without waiting for a message."""
        waited = len(self.orders.waiting)
        if self.closed or (self.passes and self.tokens[-1] in ENDS):
            self.block = None
            return False
        rest = self.orders.rest(self.tokens)
        self.seen["order dropped"] += waited - len(self.orders.waiting)
        self.block = self.orders.take(self.tokens)
        self.seen["begun at once"] += bool(rest) and self.orders.round > 0
        self.seen["own step"] += rest is None and self.block is not None
        return self.block is not None

    def verify(self) -> Verdict:
        base, block = len(self.tokens), self.block
        assert block is not None
        drafted = self.legal(block)
        rows = self.engine.extend(0, [self.tokens[-1], *drafted], len(drafted) + 1)
        verdict = decoding.verify(drafted, self.choices(self.passes, drafted, rows), ENDS)
        self.passes += 1
        self.rewind(base + verdict.accepted)
        self.tokens += verdict.tokens
        self.orders.judged(verdict.accepted == len(block))
        return verdict.changed(
            round=self.orders.round,
            base=base,
            pieces=tuple(map(self.engine.piece, verdict.tokens)),
            margins=(FAR,) * len(verdict.tokens),
            forbidden=len(block) - len(drafted),
        )

    def legal(self, drafted: tuple[TokenId, ...]) -> tuple[TokenId, ...]:
        """The drafted tokens up to the first that the constraint forbids."""
        if self.matcher is None:
            return drafted
        return drafted[: self.matcher.legal(self.tokens[len(self.asked.tokens) :], drafted)]

    def choices(self, round_: int, drafted: tuple[TokenId, ...], rows: Scores) -> Iterator[TokenId]:
        history = list(self.tokens)
        for at, row in enumerate(rows):
            if self.matcher:
                row = constrained(row, self.matcher, history[len(self.asked.tokens) :])
            yield choose(row, self.asked.sampling, history, self.position(round_, at))
            history += drafted[at : at + 1]

    def position(self, round_: int, at: int) -> int:
        """Which noise the row number `at` of a pass has."""
        return len(self.tokens) + at

    def rewind(self, length: int) -> None:
        self.engine.rewind(0, length)


@dataclass(slots=True)
class Ride:
    """A request that the draft worker drafts for."""

    run: Run
    engine: ToyEngine
    stream: Stream
    asked: float  # when there was something to draft
    skip: int  # tokens at the beginning that are not read: the engine's position 0 is behind them
    matcher: Matcher | None
    unsent: Proposal | None = None


class Part(NamedTuple):
    """What a step brings for one of its riders."""

    ride: Ride
    begun: Begun
    drafted: Drafted
    waited_s: float


@dataclass(slots=True)
class Step:
    """The draft worker evaluates; the outcome is known to the engines, and to nobody else yet."""

    began: float
    parts: list[Part]

    def only(self, ride: Ride) -> Part | None:
        """The part of `ride`, if it does not share the step."""
        return self.parts[0] if [part.ride for part in self.parts] == [ride] else None


class Draft:
    """One life of the draft worker: `DraftWorker` without its threads and sockets."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.rides: deque[Ride] = deque()  # whose turn is next comes first
        self.step: Step | None = None
        self.alive, self.hung = True, False
        self.mailbox: list[Action] = []

    def take(self, action: Action) -> None:
        if self.hung:
            self.mailbox.append(action)
        elif self.alive:
            action()
            self._work()

    def resume(self) -> None:
        self.hung = False
        waiting, self.mailbox = self.mailbox, []
        for action in waiting:
            self.take(action)

    def of(self, run: Run) -> Ride | None:
        return next((ride for ride in self.rides if ride.run is run), None)

    def open(self, run: Run, order: OpenDraft) -> None:
        world = self.sim.world
        assert self.of(run) is None
        if len(order.tokens) >= world.draft_context:
            self.sim.refuse(run)
            return
        engine = run.asked.draft_engine(world.agreement)
        stream = Stream.opened(order, world.draft_context)
        assert (order.constraint, order.begins) == (run.asked.constraint, len(run.asked.tokens))
        matcher = run.asked.matcher() if world.knows else None
        ride = Ride(run, engine, stream, self.sim.clock.now, order.skip, matcher)
        if order.recall:
            self._recall(ride, order.recall)
        self.rides.append(ride)

    def _recall(self, ride: Ride, count: int) -> None:
        """Read the text and say what would have been drafted for its last tokens."""
        run, engine, stream = ride.run, ride.engine, ride.stream
        text, start = stream.tokens, stream.read
        rows = engine.extend(0, text[start:-1], count)
        ends, stream.read = range(len(text) - count, len(text)), len(text) - 1
        recalled = tuple(
            self._propose(ride, row, text[:end]) for end, row in zip(ends, rows, strict=True)
        )
        proposal = Proposal(stream.lineage, len(text), (), 0.001, recalled=recalled)
        self.sim.send_drafted(self, run, proposal)

    @staticmethod
    def _propose(ride: Ride, row: Scores, text: Sequence[TokenId]) -> Drafted:
        asked = ride.run.asked
        return propose(row, asked.sampling, text, ride.matcher, len(asked.tokens), SMALLEST)

    def commit(self, run: Run, order: Commit) -> None:
        ride = self.of(run)
        if ride is None:
            return
        stream = ride.stream
        assert stream.committed == order.base, "a commit that does not follow the last one"
        had_work = stream.has_work
        cut = stream.commit(order, self.sim.world.draft_context)
        if not had_work:
            ride.asked = self.sim.clock.now
        part = self.step.only(ride) if self.step else None
        if cut and part and self.step and self.sim.world.cut_short:
            read = part.begun.read - ride.skip
            ride.engine.rewind(0, min(read, ride.engine.length(0)))
            self.sim.drafting.append((self.step.began, self.sim.clock.now))
            self.step = None
        if cut or not stream.has_work:
            self._send(ride)

    def close(self, run: Run) -> None:
        if ride := self.of(run):
            self.rides.remove(ride)
            if self.step:
                self.step.parts = [part for part in self.step.parts if part.ride is not ride]
                self.step = self.step if self.step.parts else None

    def _work(self) -> None:
        """Begin to evaluate what the next tokens need, if there are any to draft."""
        riders = [ride for ride in self.rides if ride.stream.has_work]
        if not riders or self.step:
            return
        now = self.sim.clock.now
        step = self.step = Step(now, [self._evaluated(ride, now) for ride in riders])
        done = now + next(self.sim.token_s)
        self.sim.clock.at(done, lambda: self.take(lambda: self._finish(step)))

    def _evaluated(self, ride: Ride, now: float) -> Part:
        begun = ride.stream.begin()
        text, start = begun.tokens, min(begun.read, len(begun.tokens) - 1)
        if ride.engine.length(0) > start - ride.skip:
            ride.engine.rewind(0, start - ride.skip)
        row = ride.engine.extend(0, text[start:], 1)[0]
        return Part(ride, begun, self._propose(ride, row, text), now - ride.asked)

    def _finish(self, step: Step) -> None:
        if self.step is not step:
            return
        self.step = None
        now = self.sim.clock.now
        self.sim.drafting.append((step.began, now))
        for ride, begun, drafted, waited_s in step.parts:
            position, stream = len(begun.tokens), ride.stream
            taken = stream.took(begun, position, (drafted,))
            ride.asked = now
            if taken:
                assert position < ride.run.allowed, "drafted beyond what was allowed"
                new = Proposal(
                    lineage=begun.lineage,
                    position=position,
                    drafted=taken,
                    elapsed_s=now - step.began,
                    waited_s=waited_s,
                    paused=stream.is_paused,
                    requests=len(step.parts),
                )
                ride.unsent = ride.unsent.joined(new) if ride.unsent else new
            if not (stream.has_work and stream.floors):
                self._send(ride)

    def _send(self, ride: Ride) -> None:
        """Where draft and target take turns, what was drafted is sent together."""
        if ride.unsent:
            self.sim.send_drafted(self, ride.run, ride.unsent)
            ride.unsent = None


# --- the whole ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Pass:
    """One round as the target saw it; in steps of its own, `round` is that of the last order."""

    round: int
    drafted: int
    began: float
    ended: float


@dataclass(slots=True, eq=False)
class Run:
    """One request on its way through the pipeline, and what must be true of it."""

    sim: Simulation
    asked: Asked
    session: Session
    target: Target
    passes: list[Pass] = field(default_factory=list)
    emitted: list[Fragment] = field(default_factory=list)
    ends: list[Finish | Fault] = field(default_factory=list)
    allowed: int = 0  # the furthest `until` so far
    lied: bool = False  # somebody spoke in the draft's name
    alarm: object = None

    @property
    def answer(self) -> tuple[TokenId, ...]:
        return tuple(self.session.tokens[len(self.asked.tokens) :])

    def happens(self, event: SessionEvent) -> None:
        """Give the session an event and carry out its commands, as the coordinator does."""
        over = bool(self.ends)
        self.sim.seen["rested"] += not self.session.rule.drafts
        commands = self.session.handle(event, self.sim.clock.now)
        assert not (over and commands), "something was commanded after the end"
        for command in commands:
            self._execute(command)
        self.alarm = alarm = object()
        if self.session.deadline is not None:
            self.sim.clock.at(self.session.deadline, lambda: self._on_timer(alarm))
        self.sim.release()
        self.look()

    def _on_timer(self, alarm: object) -> None:
        if alarm is self.alarm:
            self.sim.seen["deadline"] += 1
            self.happens(Timer())

    # ---- what the coordinator sends -------------------------------------------------------------

    def _execute(self, command: Command) -> None:
        assert not self.ends, "something was commanded after the end"
        match command:
            case Prefill(tokens):
                self.sim.ask_target(self, Verify(command.round, len(tokens), ()))
            case Verify():
                self.sim.ask_target(self, command)
            case OpenDraft():
                self._allow(command.until)
                self.sim.tell_draft(lambda draft: draft.open(self, command))
            case Commit():
                self._allow(command.until)
                self.sim.tell_draft(lambda draft: draft.commit(self, command))
            case CloseDraft():
                self.sim.tell_draft(lambda draft: draft.close(self))
            case Fragment():
                self.emitted.append(command)
            case Settle():
                assert self.session.phase is Phase.VERIFYING, "settling, although the target waits"
                self.session.rule.settle()
            case Finish() | Fault():
                self.ends.append(command)
                self.sim.close(self)

    def _allow(self, until: int) -> None:
        """The last token of an answer is never drafted, nor what lies beyond the lead."""
        asked = self.asked
        longest = len(asked.tokens) + asked.n_predict if asked.n_predict else asked.context
        assert until <= min(longest, asked.context) - 1
        lead = max(self.session.dispatch.lead(busy) for busy in (False, True))
        assert until <= len(self.session.tokens) + lead
        self.allowed = max(self.allowed, until)

    # ---- what must be true ----------------------------------------------------------------------

    def look(self) -> None:
        """After every event: the text is the target's, and nobody's idea of the other is wrong."""
        session, expected = self.session, plain(self.asked).tokens
        assert self.answer == expected[: len(self.answer)], "not what the target says alone"
        for drafted in session.stock.drafted:
            assert 0 <= drafted.token < SMALLEST
        assert session.phase is not Phase.WAITING or session.deadline is not None, (
            "the target is idle, and nobody is waited for"
        )
        self._look_at_the_target()
        sim = self.sim
        draft = sim.draft
        ride = draft.of(self) if draft else None
        if (
            draft is not sim.member
            or draft is None
            or ride is None
            or draft.hung
            or ride.unsent
            or sim.to_draft.under_way
            or sim.from_draft.under_way
            or self.lied
            or not session.draft.rides
        ):
            return
        sim.seen["agreement"] += 1
        stream, told = copy.deepcopy(ride.stream), session.draft.told
        stream.follow(told, tuple(session.tokens[told:]))  # what an idle draft has yet to hear
        sim.seen["untold"] += told < len(session.tokens)
        assert stream.lineage == session.stock.lineage, "each has a lineage of its own"
        stock = [*session.tokens, *ids_of(session.stock.drafted)]
        assert stream.tokens == stock, "each has a stream of its own"

    def _look_at_the_target(self) -> None:
        """If nothing is on its way, session and target agree on what the target has to do.

        It may still be at a step of its own that an order, which came too late, would have stopped.
        """
        sim, session, target = self.sim, self.session, self.target
        if sim.to_target.under_way or sim.from_target.under_way or sim.holds_back or self.ends:
            return
        if session.phase not in (Phase.VERIFYING, Phase.WAITING):
            return
        is_busy, believed = target.block is not None, session.phase is Phase.VERIFYING
        assert is_busy or not believed, "the session waits for a target that waits for it"
        assert believed or not is_busy or session.rule.mode == "pipelined"
        sim.seen["step too many"] += is_busy and not believed
        assert session.dispatch.orders.until == target.orders.until

    def check(self) -> None:
        """At the end: the answer is whole, it ended once, and the figures add up."""
        session, stats, expected = self.session, self.session.stats, plain(self.asked)
        assert [type(end) for end in self.ends] == [Finish], f"it ended with {self.ends}"
        end = self.ends[0]
        assert isinstance(end, Finish)
        assert session.phase is Phase.OVER
        assert session.deadline is None
        text = "".join(fragment.text for fragment in self.emitted)
        if end.reason == "cancelled":
            assert text == bytes(t for t in self.answer if t < 256).decode("utf-8", "replace")
        else:
            assert Answer(self.answer, text, end.reason) == expected
        committed = [token for fragment in self.emitted for token in fragment.tokens]
        assert tuple(token.id for token in committed) == self.answer
        first = len(self.asked.tokens)
        assert [t.position for t in committed] == list(range(first, first + len(committed)))
        self._check_figures(Counter(token.kind for token in committed), end.reason)
        draft = self.sim.draft
        if draft and not draft.hung:
            # it was told, unless that was on its way to one that has died
            assert draft is not self.sim.member or draft.of(self) is None
        assert stats.hits <= stats.own["bonus"] + stats.own["plain"] or self.lied

    def _check_figures(self, kinds: Counter[str], reason: str) -> None:
        stats = self.session.stats
        assert stats.created == stats.verified + stats.discarded.total() + stats.hits
        assert stats.generated == len(self.answer) == kinds.total()
        assert kinds["drafted"] == stats.accepted - stats.truncated
        for kind in ("corrected", "bonus", "plain"):
            assert kinds[kind] == stats.own[kind]
        reasons = {"correction", "miss", "stop", "cancelled", "stale", "dismissed"}
        if self.asked.constraint and (self.lied or not self.sim.world.knows):
            reasons.add("grammar")
        assert set(+stats.discarded) <= reasons
        assert stats.discarded["cancelled"] == 0 or reason == "cancelled"
        # one pass a round, and little work that nobody wants before the target hears of the end
        commits, rounds = self.session.commits, [one.round for one in self.passes]
        assert rounds == sorted(rounds)
        assert 0 <= len(self.passes) - commits <= MOST_STEPS + MOST_AHEAD
        self.sim.seen["unwanted pass"] += len(self.passes) - commits
        drafted = [one.drafted for one in self.passes[:commits] if one.drafted]
        assert (stats.rounds, stats.verified) == (len(drafted), sum(drafted))
        if reason != "cancelled":
            assert len(self.emitted) == commits
        report = stats.report()
        for share in (report.acceptance_rate, report.overlap, report.target_busy):
            assert share is None or 0 <= share <= 1 + 1e-9


@dataclass(slots=True)
class Simulation:
    world: World
    make_session: Callable[[Task, Rule, Stats], Session] = Session
    make_target: Callable[[Asked], Target] = Target

    clock: Clock = field(init=False, default_factory=Clock)
    runs: list[Run] = field(init=False, default_factory=list)
    draft: Draft | None = field(init=False, default=None)
    member: Draft | None = field(init=False, default=None)  # whom the coordinator knows
    experience: Experience = field(init=False)
    drafting: list[tuple[float, float]] = field(init=False, default_factory=list)
    seen: Counter[str] = field(init=False, default_factory=Counter)  # what has happened
    spans: list[Span] = field(init=False, default_factory=list)  # the first request's
    pass_s: Iterator[float] = field(init=False)
    token_s: Iterator[float] = field(init=False)
    to_target: Link = field(init=False)
    from_target: Link = field(init=False)
    to_draft: Link = field(init=False)
    from_draft: Link = field(init=False)
    _queue: deque[tuple[Run, float]] = field(init=False, default_factory=deque)
    _passing: bool = field(init=False, default=False)
    _stragglers: Stragglers[int] = field(init=False, default_factory=Stragglers)
    _gathered: Gathering[Run] = field(init=False, default_factory=Gathering)
    _several: bool = field(init=False, default=False)  # sessions hear of a pass that they shared

    def __post_init__(self) -> None:
        world = self.world
        self.experience = Experience(world.costs)
        self.pass_s, self.token_s = itertools.cycle(world.pass_s), itertools.cycle(world.token_s)
        self.to_target = Link(self.clock, world.to_target_s)
        self.from_target = Link(self.clock, world.from_target_s)
        self.to_draft = Link(self.clock, world.to_draft_s)
        self.from_draft = Link(self.clock, world.from_draft_s)

    # ---- of the first request -------------------------------------------------------------------

    @property
    def session(self) -> Session:
        return self.runs[0].session

    @property
    def passes(self) -> list[Pass]:
        return self.runs[0].passes

    @property
    def answer(self) -> tuple[TokenId, ...]:
        return self.runs[0].answer

    # ---- from the first event to the last -------------------------------------------------------

    def run(self) -> Simulation:
        """Everything, until nothing is left to happen; raises AssertionError for what must not."""
        world = self.world
        if world.draft_from == 0.0:
            self.draft = self.member = Draft(self)
        elif world.draft_from is not None:
            self.clock.at(world.draft_from, self._join)
        for event in world.events:
            self.clock.at(event.at, lambda event=event: self._happen(event))  # type: ignore[misc]
        self._begin(world.asked)
        for asked, at in zip(world.others, itertools.cycle(world.others_at), strict=False):
            self.clock.at(at, lambda asked=asked: self._begin(asked))  # type: ignore[misc]
        # a token costs a pass, a few messages, and a drafted token or two of its own
        tokens = sum(len(plain(asked).tokens) for asked in (world.asked, *world.others))
        most = 200 * (1 + len(world.others)) + 40 * tokens + 10 * len(world.events)
        self.clock.run(most if isinstance(world.rule, FixedRule) else 3 * most)
        for run in self.runs:
            run.check()
            self.seen.update(run.target.seen)
        return self

    def _begin(self, asked: Asked) -> None:
        rule = self.world.rule
        task = Task(
            prompt=asked.tokens,
            n_predict=asked.n_predict,
            stop=asked.stop,
            ends=ENDS,
            context=asked.context,
            vocabulary=SMALLEST,
            sampling=asked.sampling,
            trace=True,
            constraint=asked.constraint,
        )
        made: Rule = rule if isinstance(rule, FixedRule) else self._priced(rule)
        session = self.make_session(task, made, Stats(rule.mode, asked.sampling.seed))
        run = Run(self, asked, session, self.make_target(asked))
        self.runs.append(run)
        self._count()
        run.happens(Start(draft=self.member is not None))

    def _count(self) -> None:
        """Costs depend on how many requests run, and so does what the target may do by itself."""
        running = [run for run in self.runs if not run.ends]
        self.experience.costs.crowd = max(1, len(running))
        for run in running:
            run.session.dispatch.together = [one.session for one in running]

    def _priced(self, rule: Priced) -> PricedRule:
        return PricedRule(rule.mode, rule.n_max, self.experience, rule.shares)

    def _tell(self, event: SessionEvent) -> None:
        """All requests that are not over."""
        for run in self.runs:
            if not run.ends:
                run.happens(event)

    # ---- what goes wrong ------------------------------------------------------------------------

    def _happen(self, event: Event) -> None:
        draft = self.draft
        match event:
            case Died(_, back_s) if draft:
                self.seen["death"] += 1
                draft.alive, self.draft = False, None
                self.from_draft.send(self._on_lost)
                if back_s is not None:
                    self.clock.at(self.clock.now + back_s, self._join)
            case Hung(_, for_s) if draft and not draft.hung:
                self.seen["hang"] += 1
                draft.hung = True
                if for_s is not None:
                    self.clock.at(self.clock.now + for_s, draft.resume)
            case Lied():
                self.seen["lie"] += 1
                self.from_draft.send(lambda: self._on_lie(event))
            case Cancelled():
                self.runs[0].happens(Cancel())
            case _:
                pass

    def _join(self) -> None:
        if self.draft is None:
            self.draft = draft = Draft(self)
            self.from_draft.send(lambda: self._on_joined(draft))

    # ---- what reaches the coordinator -----------------------------------------------------------

    def _on_lost(self) -> None:
        self.member = None
        self.seen["lost with stock"] += any(run.session.stock.drafted for run in self.runs)
        self._tell(DraftLost())

    def _on_joined(self, draft: Draft) -> None:
        self.member = draft
        self.seen["joined with stock"] += any(run.session.stock.drafted for run in self.runs)
        self._tell(DraftReady())

    def _on_lie(self, lie: Lied) -> None:
        run = next((run for run in self.runs if not run.ends), None)
        if self.member is None or run is None:
            return
        run.lied = True
        session = run.session
        position = max(0, len(session.tokens) + len(session.stock) + lie.ahead)
        drafted = tuple(Drafted(token, lie.confidence) for token in lie.tokens)
        lineage = max(0, session.stock.lineage + lie.lineage)
        run.happens(Proposal(lineage, position, drafted, 0.001))

    def send_drafted(self, draft: Draft, run: Run, proposal: Proposal) -> None:
        def arrive() -> None:
            assert self.member in (draft, None)  # what a dead one still sent comes before the news
            session = run.session
            hits, broken = session.stats.hits, session.stats.discarded["miss"]
            offences = session.draft.offences
            run.happens(proposal)
            self.seen["late hit"] += session.stats.hits - hits
            self.seen["late miss"] += session.stats.discarded["miss"] > broken
            honest = session.draft.offences == offences
            assert run.lied or honest, "an honest draft was blamed"

        self.seen["paused"] += proposal.paused
        self.from_draft.send(arrive)

    def refuse(self, run: Run) -> None:
        """The draft worker has no room for the request; it stays there for others."""
        self.seen["draft full"] += 1
        self.from_draft.send(lambda: run.happens(DraftLost()))

    def tell_draft(self, message: Callable[[Draft], None]) -> None:
        draft = self.member
        if draft is not None:
            self.to_draft.send(lambda: draft.take(lambda: message(draft)))

    # ---- the target worker ----------------------------------------------------------------------

    @property
    def holds_back(self) -> bool:
        """Whether there are orders that others are waited for with."""
        return bool(self._gathered._orders)

    def close(self, run: Run) -> None:
        """It is over: the target is told."""
        self._count()
        self._gathered.drop(run)
        self.to_target.send(lambda: setattr(run.target, "closed", True))

    def ask_target(self, run: Run, order: Verify) -> None:
        if order.round:
            self._gathered.add(run, order, self.clock.now)
        else:
            self.to_target.send(lambda: self._take([(run, order)]))

    def release(self) -> None:
        """After every event: what sessions ask for together is one message."""
        if self._several:
            return
        orders = self._gathered.release(
            {run: run.session for run in self.runs if not run.ends}, self.clock.now
        )
        if orders:
            self.to_target.send(lambda: self._take(orders))

    def _take(self, orders: Sequence[tuple[Run, Verify]]) -> None:
        now = self.clock.now
        for run, order in orders:
            if not run.target.closed and run.target.take(order):
                self._queue.append((run, now))
                self._stragglers.asked(id(run), now)
        self._next_pass()

    def _next_pass(self) -> None:
        """One pass at a time, for all who have asked."""
        if self._passing or not self._queue:
            return
        for run in self.runs:
            if run.target.closed:
                self._stragglers.gone(id(run))
        if wait_s := self._stragglers.expected(self.clock.now):
            self.clock.at(self.clock.now + wait_s, self._next_pass)
            return
        shares = [share for share in self._queue if not share[0].target.closed]
        self._queue.clear()
        if not shares:
            return
        began, elapsed_s = self.clock.now, next(self.pass_s)
        self._passing = True
        found = [run.target.verify() for run, _ in shares]
        drafted = [
            len(run.target.block or ()) - one.forbidden
            for (run, _), one in zip(shares, found, strict=True)
        ]
        reads = any(one.round == 0 for one in found)
        rows = 0 if reads else sum(drafted) + len(shares)
        verdicts: list[tuple[Run, Verdict]] = []
        for (run, asked), verdict in zip(shares, found, strict=True):
            self.seen["waited for a pass"] += began > asked
            told = verdict.changed(
                elapsed_s=elapsed_s, waited_s=began - asked, rows=rows, requests=len(shares)
            )
            verdicts.append((run, told))
        self.seen["shared a pass"] += len(shares) > 1

        def end() -> None:
            self._passing = False
            self._stragglers.passed(elapsed_s)
            for (run, _), one, count in zip(shares, found, drafted, strict=True):
                run.passes.append(Pass(one.round, count, began, self.clock.now))
                if run.target.go_on():
                    self._queue.append((run, self.clock.now))
                else:
                    self._stragglers.answered(id(run), self.clock.now)
            self.from_target.send(lambda: self._deliver(verdicts))
            self._next_pass()

        self.clock.at(began + elapsed_s, end)

    def _deliver(self, verdicts: Sequence[tuple[Run, Verdict]]) -> None:
        self._several = True
        for run, verdict in verdicts:
            run.happens(verdict)
        self._several = False
        self.release()
