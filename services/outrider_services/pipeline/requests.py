"""The requests of all clients: each is prepared, waits for a free sequence, runs, and ends once."""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

from outrider.core.engine import Vocabulary
from outrider.core.events import Task
from outrider.core.rules import MOST_DRAFTED
from outrider.core.session import Session
from outrider.core.values import MOST_SIDES, Role, TokenId
from outrider.errors import BadRequest, Overloaded, WorkerLost
from outrider.wire import messages as wire
from outrider_services.pipeline.member import Member

NEVER = -1e6  # the bias that keeps end tokens from being chosen
BRACKETS = frozenset("<[")  # every control token that a user would name has one: </s>, [INST]

# as `Questions.ask`, for one client
Ask: TypeAlias = Callable[[Callable[[int], wire.Message], type[Any]], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets where it does not say, and who may serve it."""

    mode: str = "auto"
    n_draft: int | None = None  # most drafted tokens in a block; None: by the costs
    n_min: int = 0
    p_min: float = 0.0
    queue: int = 64  # requests that may run or wait at once
    allow_grammar: bool = False  # whether a client may send a grammar of its own
    resume_s: float = 120.0  # most that a request waits for the next target
    tokens: Mapping[Role, str] = field(default_factory=dict)  # of workers that the launcher starts
    both: frozenset[Role] = frozenset()  # roles in which others may join these

    def check(self, submit: wire.Submit) -> None:
        """Raise BadRequest for what is not to be asked of this pipeline."""
        constraint = submit.constraint
        if constraint and constraint.kind == "gbnf" and not self.allow_grammar:
            raise BadRequest(
                "this pipeline takes no grammars: start it with --allow-grammar, or send a schema",
                constraint.argument,
            )


@dataclass(frozen=True, slots=True)
class Lengths:
    """How long the blocks of a request may be."""

    n_max: int
    n_min: int
    p_min: float

    @classmethod
    def of(cls, submit: wire.Submit, defaults: Defaults) -> Lengths:
        """What the client asked for, else the defaults. Raises BadRequest if they contradict."""
        n_max = defaults.n_draft if submit.n_draft is None else submit.n_draft
        n_max = MOST_DRAFTED if n_max is None else min(n_max, MOST_DRAFTED)
        if submit.n_min is not None and submit.n_min > n_max:
            raise BadRequest(f"n_min is {submit.n_min}, more than n_draft, {n_max}", "n_min")
        n_min = defaults.n_min if submit.n_min is None else submit.n_min
        p_min = defaults.p_min if submit.p_min is None else submit.p_min
        return cls(n_max, min(n_min, n_max), p_min)

    @property
    def are_fixed(self) -> bool:
        """Whether somebody has set numbers; else the costs decide on the lengths."""
        return self.n_min > 0 or self.p_min > 0


@dataclass(slots=True)
class Request:
    """A client's request: first its prompt is prepared, then it waits, then it has a session."""

    id: int
    number: int  # for people to read: the first of this coordinator is 1
    client: bytes
    submit: wire.Submit
    submitted: float
    tokens: tuple[TokenId, ...] = ()
    ends: frozenset[TokenId] = frozenset()  # besides the target's own
    preparing: asyncio.Task[None] | None = None
    session: Session | None = None
    target: Member | None = None  # the worker that serves it, and the draft that rides ahead of it
    draft: Member | None = None
    failed_drafts: set[int] = field(default_factory=set)  # incarnations that have given it up
    timer: asyncio.TimerHandle | None = None
    reported: float | None = None  # when its client was last told of its figures
    prepared: wire.Hello | None = None  # the target that it was prepared for
    blame: int = 0  # for target workers that died in its passes, until it gets past the place
    reach: int = 0  # positions before this one may have been computed in the last of them

    @property
    def key(self) -> tuple[bytes, int]:
        return self.client, self.submit.call

    def marks(self) -> dict[str, int]:
        """What marks a log record as one about this request, and about what of it."""
        session = self.session
        of_session = (
            {"round": session.dispatch.round, "lineage": session.stock.lineage} if session else {}
        )
        return {"request_id": self.number, **of_session}

    def is_asked_by(self, submit: wire.Submit) -> bool:
        """Whether `submit` asks for the same, perhaps with the prompt in tokens as it was told."""
        mine, texts = self.submit, {"call": 0, "received": ()}
        if submit.messages is None and submit.prompt == self.tokens:
            texts = {**texts, "prompt": (), "messages": None, "tools": None}
        return mine.changed(**texts) == submit.changed(**texts)

    async def prepare(self, target: wire.Hello, ask: Ask) -> None:
        """Have `target` turn the prompt into tokens, and its stop strings if they are tokens."""
        self.prepared = target
        prompt, messages, tools = self.submit.prompt, self.submit.messages, self.submit.tools
        if messages is not None:
            asked = await ask(lambda call: wire.Chat(call, messages, tools), wire.Tokens)
            self.tokens = asked.tokens
        elif isinstance(prompt, str):
            asked = await ask(lambda call: wire.Tokenize(call, prompt, True), wire.Tokens)
            self.tokens = asked.tokens
        else:
            self.tokens = prompt
        if constraint := self.submit.constraint:
            await ask(lambda call: wire.Constrain(call, constraint), wire.Constrainable)
        for stop in dict.fromkeys(self.submit.stop):
            token = await control_token(stop, target, ask) if BRACKETS & set(stop) else None
            self.ends |= set() if token is None else {token}

    def check(self, target: wire.Hello) -> None:
        """Raise BadRequest if `target` cannot serve it; its prompt must be known by now.

        Raises WorkerLost if it was prepared for another model.
        """
        if self.prepared and not alike(self.prepared, target):
            raise WorkerLost("another model is served now than the one that read the prompt")
        tokens, context, size = self.tokens, target.context, vocabulary_of(target).size
        biased = [token for token, _ in self.submit.sampling.logit_bias if token >= size]
        if biased:
            raise BadRequest(f"logit_bias names token {biased[0]} of {size}", "logit_bias")
        if not tokens:
            raise BadRequest("the prompt is empty", "prompt")
        highest = max(*tokens, *(one.id for one in self.submit.received), 0)
        if highest >= size:
            raise BadRequest(f"token {highest} is not in the target's vocabulary", "prompt")
        if len(tokens) >= context:
            raise BadRequest(
                f"the prompt has {len(tokens)} tokens, and a context of {context} leaves no room "
                "for an answer: shorten it or raise --ctx",
                "prompt",
            )

    def task(self, target: wire.Hello) -> Task:
        """What its session is to generate."""
        submit, vocabulary = self.submit, vocabulary_of(target)
        sampling = submit.sampling
        if submit.ignore_eos:
            never = tuple((end, NEVER) for end in vocabulary.ends)
            bias = (*sampling.logit_bias, *never)
            sampling = sampling.changed(logit_bias=bias)
        return Task(
            prompt=self.tokens,
            n_predict=submit.n_predict,
            stop=submit.stop,
            ends=self.ends.union(vocabulary.ends),
            context=target.context,
            vocabulary=vocabulary.size,
            sampling=sampling,
            logprobs=submit.logprobs,
            trace=submit.trace,
            cache=submit.cache,
            top_logprobs=submit.top_logprobs,
            constraint=submit.constraint,
            sides=min(target.sides, MOST_SIDES),
            received=submit.received,
        )


def alike(one: wire.Hello, other: wire.Hello) -> bool:
    """Whether two targets say the same: one model, perhaps in two processes."""
    of = attrgetter("model", "vocabulary", "context")
    return bool(of(one) == of(other))


async def control_token(stop: str, target: wire.Hello, ask: Ask) -> TokenId | None:
    """The control token that `stop` is the marker of: it has no text in which to find the stop."""
    vocabulary = vocabulary_of(target)
    tokens = (await ask(lambda call: wire.Tokenize(call, stop, True), wire.Tokens)).tokens
    if vocabulary.adds_bos and len(tokens) == 2 and tokens[0] == vocabulary.bos:
        tokens = tokens[1:]
    if len(tokens) != 1:
        return None
    text = (await ask(lambda call: wire.Detokenize(call, tokens), wire.Rendered)).text
    return None if text else tokens[0]


def vocabulary_of(target: wire.Hello) -> Vocabulary:
    assert target.vocabulary is not None  # else it was not welcomed
    return target.vocabulary


@dataclass(slots=True)
class Requests:
    """All requests that have not had their outcome yet.

    Iterating begins with the last to come: ending them in this order starts none that still waits.
    """

    most: int
    running: dict[int, Request] = field(default_factory=dict)  # by id
    waiting: deque[Request] = field(default_factory=deque)
    _all: dict[tuple[bytes, int], Request] = field(default_factory=dict)
    _named: dict[str, Request] = field(default_factory=dict)  # by the keys of those that have one
    # ids start at random, so that none was used by an earlier coordinator; questions use low ones
    _first_id: int = field(default_factory=lambda: secrets.randbits(61) + (1 << 61))
    _count: int = 0

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._all.values())[::-1])

    def __contains__(self, request: Request) -> bool:
        return self._all.get(request.key) is request

    def find(self, client: bytes, call: int) -> Request | None:
        return self._all.get((client, call))

    def named(self, key: str) -> Request | None:
        return self._named.get(key)

    def add(self, client: bytes, submit: wire.Submit, now: float) -> Request:
        self._count += 1
        request = Request(
            id=self._first_id + self._count,
            number=self._count,
            client=client,
            submit=submit,
            submitted=now,
        )
        self._all[request.key] = request
        self.name(request)
        return request

    def name(self, request: Request) -> None:
        """Let it be found by its key, unless another has it."""
        if key := request.submit.key:
            self._named.setdefault(key, request)

    def of(self, member: Member) -> list[Request]:
        """Those that this worker serves."""
        running = list(self.running.values())
        return [one for one in running if member in (one.target, one.draft)]

    def check_room(self, request: Request) -> None:
        """Raise Overloaded if one request too many is there.

        Answers that had begun have room besides: an earlier coordinator had taken them.
        """
        if len(self._all) > self.most * (2 if request.submit.received else 1):
            raise Overloaded(f"{self.most} requests are running or waiting already")

    def next(self, target: Member) -> Request:
        """Let the first that waits run on `target`, and return it."""
        request = self.waiting.popleft()
        request.target = target
        self.running[request.id] = request
        return request

    def end(self, request: Request) -> bool:
        """Forget it; False if it was over before."""
        if request not in self:
            return False
        del self._all[request.key]
        if self._named.get(request.submit.key) is request:
            del self._named[request.submit.key]
        if request.timer:
            request.timer.cancel()
        if request.preparing:
            request.preparing.cancel()  # if it is over, nothing happens
        if request in self.waiting:
            self.waiting.remove(request)
        return True
