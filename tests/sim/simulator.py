"""The pipeline in one thread and in virtual time: the real `Session` between models of two workers.

A `World` says all that happens, so a run can be repeated exactly: what is asked for, how long each
evaluation and each message takes, and what goes wrong with the draft, when. The target is
`decoding.verify` over the scores of a toy engine, the draft the worker's own `Stream` over those of
another. Messages on a link keep their order, as on a ZeroMQ connection. After every event, and at
the end, the run is held against what must be true (`Simulation._look`, `Simulation.check`).
"""

from __future__ import annotations

import codecs
import copy
import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from outrider.core import decoding
from outrider.core.rules import Policy
from outrider.core.sampling import Sampling, Scores, Token, choose, propose
from outrider.core.session import (
    CloseDraft,
    Command,
    Commit,
    Drafted,
    Emit,
    Fault,
    Finish,
    OpenDraft,
    Prefill,
    RoundResult,
    Session,
    Task,
    Verify,
)
from outrider.core.stats import Stats
from outrider.engines.toy import END, SMALLEST, ToyEngine, ToySettings
from outrider_services.pipeline.draft_worker import Stream

ENDS = frozenset({END})
CONTEXT = 160  # at most, and no prompt is cut into chunks
GREEDY = Sampling(temperature=0)
PIPELINED = Policy("pipelined", 4)


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

    @property
    def tokens(self) -> tuple[Token, ...]:
        return tuple(self.prompt.encode())

    def engine(self) -> ToyEngine:
        return self._toy(ToySettings(end_probability=self.end_probability))

    def draft_engine(self, agreement: float) -> ToyEngine:
        return self._toy(ToySettings("draft", agreement=agreement))

    def _toy(self, settings: ToySettings) -> ToyEngine:
        context = self.context
        return ToyEngine(
            replace(settings, seed=self.language, context=context, chunk=context, slots=1)
        )


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
    """The draft's connection says this, relative to what would be right when it arrives."""

    at: float
    tokens: tuple[Token, ...]
    ahead: int = 0
    lineage: int = 0
    confidence: float = 0.9


@dataclass(frozen=True, slots=True)
class Cancelled:
    """The client goes away."""

    at: float


Event = Died | Hung | Lied | Cancelled


@dataclass(frozen=True, slots=True)
class World:
    asked: Asked = ASKED
    policy: Policy = PIPELINED
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
    cut_short: bool = True  # a cancelled draft step ends at once, or has just been too far
    events: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    tokens: tuple[Token, ...]
    text: str
    reason: str


def text_of(tokens: Sequence[Token]) -> str:
    """The text of `tokens` as far as it has come: half a character at the end is left out."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(
        bytes(token for token in tokens if token < 256)
    )


@cache
def plain(asked: Asked) -> Answer:
    """What the target says by itself, one token after the other: the oracle."""
    engine = asked.engine()
    tokens = list(asked.tokens)
    start, new = len(tokens), tokens
    longest = asked.context if asked.n_predict is None else start + asked.n_predict
    while True:
        row = engine.extend(0, new, 1)[0]
        new = [choose(row, asked.sampling, tokens, len(tokens))]
        tokens = tokens + new
        answer = tokens[start:]
        text = text_of(answer)
        if new[0] in ENDS:
            return Answer(tuple(answer), text, "stop")
        if found := [text.find(stop) for stop in asked.stop if stop in text]:
            return Answer(tuple(answer), text[: min(found)], "stop")
        if len(tokens) >= min(longest, asked.context):
            whole = bytes(answer).decode("utf-8", "replace")
            return Answer(tuple(answer), whole, "length")


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
    """The target worker: one pass over the last committed token and the drafted ones."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.tokens = list(asked.tokens)
        self.engine = asked.engine()
        if self.tokens[:-1]:
            self.engine.extend(0, self.tokens[:-1], 0)

    def verify(self, round_: int, base: int, drafted: tuple[Token, ...]) -> RoundResult:
        assert base == len(self.tokens), "the target is asked to verify behind another text"
        rows = self.engine.extend(0, [self.tokens[-1], *drafted], len(drafted) + 1)
        verdict = decoding.verify(drafted, self.choices(round_, drafted, rows), ENDS)
        self.rewind(base + verdict.accepted)
        self.tokens += verdict.tokens
        pieces = tuple(map(self.engine.piece, verdict.tokens))
        return RoundResult(round_, base, verdict.accepted, verdict.tokens, pieces, None, 0.0)

    def choices(self, round_: int, drafted: tuple[Token, ...], rows: Scores) -> Iterator[Token]:
        history = list(self.tokens)
        for at, row in enumerate(rows):
            yield choose(row, self.asked.sampling, history, self.position(round_, at))
            history += drafted[at : at + 1]

    def position(self, round_: int, at: int) -> int:
        """Which noise the row number `at` of a pass has."""
        return len(self.tokens) + at

    def rewind(self, length: int) -> None:
        self.engine.rewind(0, length)


@dataclass(slots=True)
class Step:
    """The draft worker evaluates; the outcome is known to the engine, and to nobody else yet."""

    start: int
    end: int
    lineage: int
    token: Token
    confidence: float
    began: float


class Draft:
    """One life of the draft worker: `DraftWorker` without its threads and sockets."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self.engine = sim.world.asked.draft_engine(sim.world.agreement)
        self.stream: Stream | None = None
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

    def open(self, command: OpenDraft) -> None:
        sampling, context = self.sim.world.asked.sampling, self.sim.world.draft_context
        assert self.stream is None
        if len(command.tokens) >= context:
            self.sim.refuse()
            return
        self.engine.rewind(0, 0)
        self.stream = Stream(
            slot=0,
            tokens=list(command.tokens),
            sampling=sampling,
            lineage=command.lineage,
            until=min(command.until, context),
            vocabulary=SMALLEST,
            committed=command.base,
        )

    def commit(self, command: Commit) -> None:
        if self.stream is None:
            return
        assert self.stream.committed == command.base, "a commit that does not follow the last one"
        self.stream.until = min(command.until, self.sim.world.draft_context)
        cut = self.stream.follow(command.base, command.tokens)
        if cut and self.step and self.sim.world.cut_short:
            self.engine.rewind(0, self.step.start)
            self.sim.drafting.append((self.step.began, self.sim.clock.now))
            self.step = None

    def close(self) -> None:
        self.stream = self.step = None

    def _work(self) -> None:
        """Begin to evaluate what the next token needs, if there is one to draft."""
        stream = self.stream
        if stream is None or self.step or len(stream.tokens) >= stream.until:
            return
        if len(stream.tokens) > stream.committed and stream.tokens[-1] in ENDS:
            return
        start, tokens = stream.evaluated, list(stream.tokens)
        if self.engine.length(0) > start:
            self.engine.rewind(0, start)
        row = self.engine.extend(0, tokens[start:], 1)[0]
        choice = propose(row, stream.sampling, tokens, len(tokens), n_vocab=stream.vocabulary)
        now = self.sim.clock.now
        step = Step(start, len(tokens), stream.lineage, choice.token, choice.confidence, now)
        self.step = step
        done = now + next(self.sim.token_s)
        self.sim.clock.at(done, lambda: self.take(lambda: self._finish(step)))

    def _finish(self, step: Step) -> None:
        stream = self.stream
        if self.step is not step or stream is None:
            return
        self.step = None
        self.sim.drafting.append((step.began, self.sim.clock.now))
        if step.lineage == stream.lineage:
            stream.evaluated = step.end
        if step.lineage != stream.lineage or step.end != len(stream.tokens):
            return
        stream.tokens.append(step.token)
        assert step.end < self.sim.allowed, "drafted beyond what was allowed"
        self.sim.send_drafted(self, step)


# --- the whole ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Pass:
    """One verify round as the target saw it."""

    round: int
    drafted: int
    began: float
    ended: float


@dataclass(slots=True)
class Simulation:
    world: World
    make_session: Callable[[Task, Policy, Stats], Session] = Session
    make_target: Callable[[Asked], Target] = Target

    clock: Clock = field(init=False, default_factory=Clock)
    session: Session = field(init=False)
    target: Target = field(init=False)
    draft: Draft | None = field(init=False, default=None)
    member: Draft | None = field(init=False, default=None)  # whom the coordinator knows
    passes: list[Pass] = field(init=False, default_factory=list)
    drafting: list[tuple[float, float]] = field(init=False, default_factory=list)
    emitted: list[Emit] = field(init=False, default_factory=list)
    ends: list[Finish | Fault] = field(init=False, default_factory=list)
    seen: Counter[str] = field(init=False, default_factory=Counter)  # what has happened
    allowed: int = field(init=False, default=0)  # the furthest `until` so far
    pass_s: Iterator[float] = field(init=False)
    token_s: Iterator[float] = field(init=False)
    to_target: Link = field(init=False)
    from_target: Link = field(init=False)
    to_draft: Link = field(init=False)
    from_draft: Link = field(init=False)
    _asked: list[int] = field(init=False, default_factory=list)  # rounds without a verdict
    _alarm: object = field(init=False, default=None)

    def __post_init__(self) -> None:
        world, asked = self.world, self.world.asked
        task = Task(
            asked.tokens, asked.n_predict, asked.stop, ENDS, asked.context, SMALLEST, trace=True
        )
        stats = Stats(world.policy.mode, asked.sampling.seed)
        self.session = self.make_session(task, world.policy, stats)
        self.target = self.make_target(asked)
        self.pass_s, self.token_s = itertools.cycle(world.pass_s), itertools.cycle(world.token_s)
        self.to_target = Link(self.clock, world.to_target_s)
        self.from_target = Link(self.clock, world.from_target_s)
        self.to_draft = Link(self.clock, world.to_draft_s)
        self.from_draft = Link(self.clock, world.from_draft_s)

    def run(self) -> Simulation:
        """Everything, until nothing is left to happen; raises AssertionError for what must not."""
        world = self.world
        if world.draft_from == 0.0:
            self.draft = self.member = Draft(self)
        elif world.draft_from is not None:
            self.clock.at(world.draft_from, self._join)
        for event in world.events:
            self.clock.at(event.at, lambda event=event: self._happen(event))  # type: ignore[misc]
        there = self.member is not None
        self._tell(lambda: self.session.start(self.clock.now, there))
        # a token costs a pass, a few messages, and a drafted token or two of its own
        self.clock.run(200 + 40 * len(plain(world.asked).tokens) + 10 * len(world.events))
        self.check()
        return self

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
                self._tell(self.session.on_cancel)
            case _:
                pass

    def _join(self) -> None:
        if self.draft is None:
            self.draft = draft = Draft(self)
            self.from_draft.send(lambda: self._on_joined(draft))

    # ---- what reaches the coordinator -----------------------------------------------------------

    def _on_lost(self) -> None:
        self.member = None
        self.seen["lost with stock"] += bool(self.session.stock)
        self._tell(lambda: self.session.on_draft_lost(self.clock.now))

    def _on_joined(self, draft: Draft) -> None:
        self.member = draft
        self.seen["joined with stock"] += bool(self.session.stock)
        self._tell(self.session.on_draft_ready)

    def _on_lie(self, lie: Lied) -> None:
        if self.member is None:
            return
        session = self.session
        position = max(0, len(session.tokens) + len(session.stock) + lie.ahead)
        drafted = [Drafted(token, lie.confidence) for token in lie.tokens]
        lineage = max(0, session.lineage + lie.lineage)
        self._tell(lambda: session.on_drafted(lineage, position, drafted, 0.001, self.clock.now))

    def send_drafted(self, draft: Draft, step: Step) -> None:
        elapsed_s = self.clock.now - step.began

        def arrive() -> None:
            assert self.member in (draft, None)  # what a dead one still sent comes before the news
            session, drafted = self.session, [Drafted(step.token, step.confidence)]
            hits, broken = session.stats.hits, session.stats.discarded["miss"]
            offences = session._offences
            self._tell(
                lambda: session.on_drafted(
                    step.lineage, step.end, drafted, elapsed_s, self.clock.now
                )
            )
            self.seen["late hit"] += session.stats.hits - hits
            self.seen["late miss"] += session.stats.discarded["miss"] > broken
            assert self._lied or session._offences == offences, "an honest draft was blamed"

        self.from_draft.send(arrive)

    def refuse(self) -> None:
        """The draft worker has no room for the request; it stays there for others."""
        self.seen["draft full"] += 1
        self.from_draft.send(lambda: self._tell(lambda: self.session.on_draft_lost(self.clock.now)))

    @property
    def _lied(self) -> bool:
        return self.seen["lie"] > 0

    def _on_timer(self, alarm: object) -> None:
        if alarm is self._alarm:
            self.seen["deadline"] += 1
            self._tell(lambda: self.session.on_timer(self.clock.now))

    def _tell(self, event: Callable[[], list[Command]]) -> None:
        """Give the session an event and carry out its commands, as the coordinator does."""
        over = bool(self.ends)
        commands = event()
        assert not (over and commands), "something was commanded after the end"
        for command in commands:
            self._execute(command)
        self._alarm = alarm = object()
        if self.session.deadline is not None:
            self.clock.at(self.session.deadline, lambda: self._on_timer(alarm))
        self._look()

    # ---- what the coordinator sends -------------------------------------------------------------

    def _execute(self, command: Command) -> None:
        assert not self.ends, "something was commanded after the end"
        match command:
            case Prefill():
                self._ask_target(0, len(self.session.tokens), ())
            case Verify(round_, base, drafted):
                self._ask_target(round_, base, drafted)
            case OpenDraft():
                self._allow(command.until)
                self._tell_draft(lambda draft: draft.open(command))
            case Commit():
                self._allow(command.until)
                self._tell_draft(lambda draft: draft.commit(command))
            case CloseDraft():
                self._tell_draft(lambda draft: draft.close())
            case Emit():
                self.emitted.append(command)
            case Finish() | Fault():
                self.ends.append(command)

    def _allow(self, until: int) -> None:
        """The last token of an answer is never drafted, nor what lies beyond the lead."""
        world, asked = self.world, self.world.asked
        longest = len(asked.tokens) + asked.n_predict if asked.n_predict else asked.context
        assert until <= min(longest, asked.context) - 1
        lead = max(world.policy.lead(busy) for busy in (False, True))
        assert until <= len(self.session.tokens) + lead
        self.allowed = max(self.allowed, until)

    def _tell_draft(self, message: Callable[[Draft], None]) -> None:
        draft = self.member
        if draft is not None:
            self.to_draft.send(lambda: draft.take(lambda: message(draft)))

    def _ask_target(self, round_: int, base: int, drafted: tuple[Token, ...]) -> None:
        assert not self._asked, "a second pass while one is under way"
        self._asked.append(round_)
        self.to_target.send(lambda: self._begin_pass(round_, base, drafted))

    def _begin_pass(self, round_: int, base: int, drafted: tuple[Token, ...]) -> None:
        if self.session.over:
            return  # closed before it began
        began = self.clock.now
        elapsed_s = next(self.pass_s)
        result = self.target.verify(round_, base, drafted)

        def end() -> None:
            self.passes.append(Pass(round_, len(drafted), began, self.clock.now))
            self.from_target.send(lambda: self._on_verdict(result, elapsed_s))

        self.clock.at(began + elapsed_s, end)

    def _on_verdict(self, result: RoundResult, elapsed_s: float) -> None:
        self._asked.remove(result.round)
        timed = replace(result, elapsed_s=elapsed_s)
        self._tell(lambda: self.session.on_verdict(timed, self.clock.now))

    # ---- what must be true ----------------------------------------------------------------------

    @property
    def answer(self) -> tuple[Token, ...]:
        return tuple(self.session.tokens[len(self.world.asked.tokens) :])

    def _look(self) -> None:
        """After every event: the text is the target's, and nobody's idea of the other is wrong."""
        session, expected = self.session, plain(self.world.asked).tokens
        assert self.answer == expected[: len(self.answer)], "not what the target says alone"
        for drafted in session.stock:
            assert 0 <= drafted.token < SMALLEST
        assert session.over or session.verifying is not None or session.deadline is not None, (
            "the target is idle, and nobody is waited for"
        )
        draft = self.draft
        if (
            draft is None
            or draft is not self.member
            or draft.hung
            or draft.stream is None
            or self.to_draft.under_way
            or self.from_draft.under_way
            or self._lied
            or not session.riding
        ):
            return
        self.seen["agreement"] += 1
        stream, told = copy.deepcopy(draft.stream), session._told
        stream.follow(told, tuple(session.tokens[told:]))  # what an idle draft has yet to hear
        self.seen["untold"] += told < len(session.tokens)
        assert stream.lineage == session.lineage, "each has a lineage of its own"
        stock = [drafted.token for drafted in session.stock]
        assert stream.tokens == session.tokens + stock, "each has a stream of its own"

    def check(self) -> None:
        """At the end: the answer is whole, it ended once, and the figures add up."""
        session, stats, expected = self.session, self.session.stats, plain(self.world.asked)
        assert [type(end) for end in self.ends] == [Finish], f"it ended with {self.ends}"
        end = self.ends[0]
        assert isinstance(end, Finish)
        assert session.over
        assert session.deadline is None
        text = "".join(emit.text for emit in self.emitted)
        if end.reason == "cancelled":
            assert text == bytes(t for t in self.answer if t < 256).decode("utf-8", "replace")
        else:
            assert Answer(self.answer, text, end.reason) == expected
        committed = [token for emit in self.emitted for token in emit.tokens]
        assert tuple(token.id for token in committed) == self.answer
        first = len(self.world.asked.tokens)
        assert [t.position for t in committed] == list(range(first, first + len(committed)))
        self._check_figures(Counter(token.kind for token in committed), end.reason)
        if self.draft and not self.draft.hung:
            # it was told, unless that was on its way to one that has died
            assert self.draft is not self.member or self.draft.stream is None
        assert stats.hits <= stats.own["bonus"] + stats.own["plain"] or self._lied

    def _check_figures(self, kinds: Counter[str], reason: str) -> None:
        stats = self.session.stats
        assert stats.created == stats.verified + stats.discarded.total() + stats.hits
        assert stats.generated == len(self.answer) == kinds.total()
        assert kinds["drafted"] == stats.accepted - stats.truncated
        for kind in ("corrected", "bonus", "plain"):
            assert kinds[kind] == stats.own[kind]
        assert set(+stats.discarded) <= {"correction", "miss", "stop", "cancelled", "stale"}
        assert stats.discarded["cancelled"] == 0 or reason == "cancelled"
        # one pass a round, no round twice; the last one's verdict may have come too late
        assert [one.round for one in self.passes] == list(range(len(self.passes)))
        assert len(self.passes) - (reason == "cancelled") <= self.session.round + 1
        counted = self.passes if reason != "cancelled" else self.passes[: len(self.emitted)]
        drafted = [one.drafted for one in counted if one.drafted]
        if reason != "cancelled":
            assert (stats.rounds, stats.verified) == (len(drafted), sum(drafted))
            assert len(self.passes) == len(self.emitted) == self.session.round + 1
        report = stats.report()
        for share in (report.acceptance_rate, report.overlap, report.target_busy):
            assert share is None or 0 <= share <= 1 + 1e-9
