"""The coordinator between a client, a target and a draft that are nothing but their messages.

No socket, and no time passes unless a test says so.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from outrider.core.constraints import Constraint
from outrider.core.engine import Vocabulary
from outrider.core.events import Commit, OpenDraft, Prefill
from outrider.core.rules import FixedRule
from outrider.core.sampling import Sampling
from outrider.core.values import Drafted, Proposal, Role, Verdict, Verify
from outrider.errors import BadRequest, ProtocolError
from outrider.wire import messages as wire
from outrider.wire.transport import PeerGone
from outrider_services.pipeline.coordinator import Coordinator, Defaults
from outrider_services.pipeline.roster import LOST_S

VOCABULARY = Vocabulary("bpe", 400, None, 1, False, False, (1,), "digest")
PROMPT = (10, 11, 12)
CLIENT, TARGET, DRAFT = b"client", b"target", b"draft"


def hello(role: Role, incarnation: int = 1, **changes: Any) -> wire.Hello:
    curve_s = (0.1,) * 8 if role == "target" else (0.01,)
    said = wire.Hello(
        wire.PROTOCOL, "0", role, incarnation, role, VOCABULARY, 512, 2, "cpu", f"{role}:0", curve_s
    )
    return said.changed(**changes)


def submit(call: int = 1, prompt: Any = PROMPT, count: int | None = 50, **more: Any) -> wire.Submit:
    sampling = Sampling(temperature=0.0)
    said = wire.Submit(
        call, prompt, None, sampling, count, (), False, False, "pipelined", None, False, None, 0.01
    )  # with a `p_min` blocks are as long as what was drafted, whatever things cost
    return said.changed(**more)


class Pipeline:
    """A coordinator, and all that it has sent."""

    def __init__(
        self, *, on_hung: Callable[[Role], None] = lambda _: None, **defaults: Any
    ) -> None:
        self.now = 50.0
        self.sent: list[tuple[bytes, wire.Message]] = []
        self.gone: set[bytes] = set()
        self.too_long: tuple[type, ...] = ()
        self.core = Coordinator(self.send, Defaults(**defaults), lambda: self.now, on_hung)

    def send(self, peer: bytes, message: wire.Message) -> None:
        if peer in self.gone:
            raise PeerGone("gone")
        if isinstance(message.order if isinstance(message, wire.Do) else message, self.too_long):
            raise BadRequest("a message of 9 bytes exceeds the limit of 8")
        self.sent.append((peer, message))

    async def says(self, peer: bytes, *messages: wire.Message) -> None:
        for message in messages:
            self.core.on_message(peer, message)
        await turns()

    async def join(self, draft: bool = True, **changes: Any) -> None:
        await self.says(TARGET, hello("target", **changes))
        if draft:
            await self.says(DRAFT, hello("draft", 2))

    async def begin(self, call: int = 1, **more: Any) -> int:
        """Submit a request that starts at once: its id."""
        await self.says(CLIENT, submit(call, **more))
        prefill: wire.Do = self.orders(TARGET, Prefill)[-1]
        return prefill.request

    async def verdict(self, request: int, *tokens: int, **changes: Any) -> None:
        """The target has done what it was asked last, and committed these."""
        await self.verdict_of(TARGET, request, *tokens, **changes)

    async def verdict_of(
        self,
        target: bytes,
        request: int,
        *tokens: int,
        accepted: int | None = None,
        **changes: Any,
    ) -> None:
        """The same of this target."""
        asked: Any = [do.order for do in self.orders(target) if do.request == request][-1]
        first, running = isinstance(asked, Prefill), self.core._requests.running.get(request)
        text = running.session.tokens if running and running.session else []
        done = Verdict(
            accepted=len(tokens) - 1 if accepted is None else accepted,
            tokens=tokens,
            round=0 if first else asked.round,
            base=len(text),
            pieces=(b"x",) * len(tokens),
            margins=(1.0,) * len(tokens),
            elapsed_s=0.1,
        )
        await self.says(target, wire.Done(request, done.changed(**changes)))

    async def drafted(self, request: int, position: int, *tokens: int) -> None:
        opened = [do.order for do in self.orders(DRAFT, OpenDraft) if do.request == request]
        lineage = opened[-1].lineage
        proposal = Proposal(lineage, position, tuple(Drafted(t, 0.9) for t in tokens), 0.01)
        await self.says(DRAFT, wire.Done(request, proposal))

    def to(self, peer: bytes, *kinds: type) -> list[Any]:
        return [
            one for to, one in self.sent if to == peer and (not kinds or isinstance(one, kinds))
        ]

    def orders(self, peer: bytes, *kinds: type) -> list[Any]:
        return [do for do in self.to(peer, wire.Do) if not kinds or isinstance(do.order, kinds)]

    def started(self) -> list[int]:
        return [one.call for one in self.to(CLIENT, wire.Started)]

    def outcomes(self, peer: bytes = CLIENT) -> dict[int, list[str]]:
        """By call, how it ended; each list is to have one entry."""
        found: dict[int, list[str]] = {}
        for to, one in self.sent:
            if to == peer and isinstance(one, wire.Finished):
                found.setdefault(one.call, []).append(one.reason)
            elif to == peer and isinstance(one, wire.Failed):
                found.setdefault(one.id, []).append(one.code)
        return found


async def turns() -> None:
    """Let whatever can go on without time passing go on."""
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.fixture
async def up() -> AsyncIterator[Pipeline]:
    """With a target of two sequences, and a draft."""
    pipeline = Pipeline()
    await pipeline.join()
    yield pipeline
    await pipeline.core.close()


@pytest.fixture
async def bare() -> AsyncIterator[Pipeline]:
    """No workers yet, and room for three requests."""
    pipeline = Pipeline(queue=3)
    yield pipeline
    await pipeline.core.close()


# ---- admission ----------------------------------------------------------------------------------


async def test_a_request_begins_with_the_prompt_for_both_workers(up: Pipeline) -> None:
    request = await up.begin()
    assert up.to(CLIENT) == [wire.Started(1, "target", "pipelined", PROMPT)]
    (prefill,), (opened,) = up.orders(TARGET), up.orders(DRAFT)
    assert (prefill.request, prefill.order.tokens) == (request, PROMPT)
    assert (opened.request, opened.order.tokens) == (request, PROMPT)


async def test_text_is_turned_into_tokens_by_the_target_first(up: Pipeline) -> None:
    await up.says(CLIENT, submit(prompt="the river"))
    (question,) = up.to(TARGET, wire.Tokenize)
    assert (question.text, question.special) == ("the river", True)
    assert up.started() == []
    await up.says(TARGET, wire.Tokens(question.call, (7, 8)))
    assert up.orders(TARGET)[-1].order.tokens == (7, 8)


@pytest.mark.parametrize(
    ("tokens", "text", "outcomes"),
    [
        ((7,), "", {1: ["stop"]}),
        ((6, 7), "", {1: ["stop"]}),
        ((7,), "<", {}),  # a token like any other: its text is looked for
        ((7, 8), None, {}),
        ((), None, {}),
    ],
    ids=["control", "behind-a-begin-token", "text", "several-tokens", "nothing"],
)
async def test_a_stop_string_that_marks_a_control_token_is_an_end(
    bare: Pipeline, tokens: tuple[int, ...], text: str | None, outcomes: dict[int, list[str]]
) -> None:
    await bare.join(vocabulary=VOCABULARY.changed(bos=6, adds_bos=True), draft=False)
    await bare.says(CLIENT, submit(stop=("<x>", "plain")))
    (question,) = bare.to(TARGET, wire.Tokenize)  # of the other stop nothing need be asked
    assert (question.text, question.special) == ("<x>", True)
    await bare.says(TARGET, wire.Tokens(question.call, tokens))
    if text is not None:
        (question,) = bare.to(TARGET, wire.Detokenize)
        assert question.tokens == (7,)
        await bare.says(TARGET, wire.Rendered(question.call, text))
    (prefill,) = bare.orders(TARGET, Prefill)
    await bare.verdict(prefill.request, 7)
    assert bare.outcomes() == outcomes


async def test_what_waits_starts_in_order_when_a_sequence_is_free(up: Pipeline) -> None:
    await up.says(CLIENT, *(submit(call) for call in range(1, 6)))
    assert up.started() == [1, 2]
    assert up.core.health()["requests"] == {"running": 2, "waiting": 3}
    await up.says(CLIENT, wire.Cancel(2))
    assert up.started() == [1, 2, 3]
    first = up.orders(TARGET, Prefill)[0].request
    await up.verdict(first, 1)  # an end token
    assert up.outcomes() == {1: ["stop"], 2: ["cancelled"]}
    assert up.started() == [1, 2, 3, 4]
    await up.says(CLIENT, wire.Cancel(3), wire.Cancel(4))
    assert up.started() == [1, 2, 3, 4, 5]


async def test_a_finished_request_is_closed_at_both_workers(up: Pipeline) -> None:
    request = await up.begin()
    await up.verdict(request, 1)
    assert up.to(TARGET, wire.Close) == up.to(DRAFT, wire.Close) == [wire.Close(request)]


async def test_more_than_the_queue_holds_is_busy(bare: Pipeline) -> None:
    await bare.join()
    for call in range(1, 6):
        await bare.says(CLIENT, submit(call))
    assert bare.outcomes() == {4: ["busy"], 5: ["busy"]}
    await bare.says(CLIENT, wire.Cancel(3), submit(6))
    assert bare.core.health()["requests"] == {"running": 2, "waiting": 1}
    assert 6 not in bare.outcomes()


async def test_of_a_burst_those_that_came_last_are_too_many(bare: Pipeline) -> None:
    await bare.join()
    await bare.says(CLIENT, *(submit(call) for call in range(1, 6)))
    assert bare.outcomes() == {4: ["busy"], 5: ["busy"]}
    assert bare.started() == [1, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param({"prompt": ()}, id="empty-prompt"),
        pytest.param({"prompt": (400,)}, id="token-beyond-the-vocabulary"),
        pytest.param({"prompt": tuple(range(2, 10)) * 64}, id="prompt-fills-the-context"),
        pytest.param({"n_draft": 2, "n_min": 3}, id="n-min-above-n-draft"),
        pytest.param(
            {"sampling": Sampling(logit_bias=((400, 1.0),))}, id="bias-beyond-the-vocabulary"
        ),
    ],
)
async def test_what_cannot_be_served_fails_before_it_starts(
    up: Pipeline, wrong: dict[str, Any]
) -> None:
    await up.says(CLIENT, submit(**wrong))
    assert up.outcomes() == {1: ["invalid_request"]}
    assert up.orders(TARGET) == []
    assert up.core.health()["requests"] == {"running": 0, "waiting": 0}


ANY_OBJECT = Constraint("json")
GRAMMAR = Constraint("gbnf", "root ::= [a-z]+", "grammar")


async def test_the_target_says_first_whether_it_can_hold_an_answer_to_a_form(up: Pipeline) -> None:
    await up.says(CLIENT, submit(1, constraint=ANY_OBJECT), submit(2, constraint=ANY_OBJECT))
    first, second = up.to(TARGET, wire.Constrain)
    assert (first.constraint, up.started()) == (ANY_OBJECT, [])
    wrong = wire.Failed(second.call, "invalid_request", "no such form", "json_schema")
    await up.says(TARGET, wire.Constrainable(first.call), wrong)
    assert up.started() == [1]
    assert up.outcomes() == {2: ["invalid_request"]}
    (prefill,) = up.orders(TARGET, Prefill)
    (opened,) = up.orders(DRAFT, OpenDraft)
    assert prefill.order.constraint == opened.order.constraint == ANY_OBJECT
    assert opened.order.begins == len(PROMPT)


async def test_a_grammar_is_taken_where_it_is_allowed(up: Pipeline) -> None:
    await up.says(CLIENT, submit(constraint=GRAMMAR))
    (failed,) = up.to(CLIENT, wire.Failed)
    assert (failed.code, failed.param) == ("invalid_request", "grammar")
    assert "--allow-grammar" in failed.message
    assert up.to(TARGET, wire.Constrain) == []
    up.core._defaults = Defaults(allow_grammar=True)
    await up.says(CLIENT, submit(2, constraint=GRAMMAR))
    assert len(up.to(TARGET, wire.Constrain)) == 1


async def test_a_call_that_is_submitted_twice_runs_once(up: Pipeline) -> None:
    await up.says(CLIENT, submit(), submit())
    await up.says(CLIENT, submit())
    assert up.started() == [1]
    assert up.outcomes() == {}


async def test_two_clients_may_use_the_same_number(up: Pipeline) -> None:
    await up.says(CLIENT, submit())
    await up.says(b"other", submit())
    assert len(up.to(CLIENT, wire.Started)) == len(up.to(b"other", wire.Started)) == 1
    await up.says(CLIENT, wire.Cancel(1))
    assert (up.outcomes(), up.outcomes(b"other")) == ({1: ["cancelled"]}, {})


# ---- rounds -------------------------------------------------------------------------------------


async def test_what_was_drafted_is_verified_and_committed(up: Pipeline) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21, 22)
    await up.verdict(request, 20)
    assert up.orders(TARGET)[-1].order.drafted == (21, 22)
    await up.verdict(request, 21, 22, 23)
    told = [commit for do in up.orders(DRAFT, Commit) for commit in do.order.tokens]
    assert told == [20, 21, 22, 23]
    progress = up.to(CLIENT, wire.Progress)
    assert [token.id for one in progress for token in one.fragment.tokens] == told
    assert [one.fragment.text for one in progress] == ["x", "xxx"]


async def test_the_target_has_its_next_block_before_the_client_its_text(up: Pipeline) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21)
    before = len(up.sent)
    await up.verdict(request, 20)
    assert [(peer, type(one).__name__) for peer, one in up.sent[before:]] == [
        (TARGET, "Do"),
        (DRAFT, "Do"),
        (CLIENT, "Progress"),
    ]


async def test_settling_comes_when_all_messages_are_on_their_way(
    up: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent_before: list[int] = []
    monkeypatch.setattr(FixedRule, "settle", lambda self: sent_before.append(len(up.sent)))
    request = await up.begin()
    await up.drafted(request, 3, 20, 21)
    assert sent_before == []
    await up.verdict(request, 20)
    assert sent_before == [len(up.sent)]
    assert isinstance(up.orders(TARGET)[-1].order, Verify)


async def test_what_comes_twice_or_late_counts_once(up: Pipeline) -> None:
    request = await up.begin(count=2)
    first = Verdict(0, (20,), 0, 3, (b"x",), (1.0,))
    await up.says(TARGET, wire.Done(request, first), wire.Done(request, first))
    assert len(up.to(CLIENT, wire.Progress)) == 1
    asked = up.orders(TARGET)[-1].order
    second = Verdict(0, (21,), asked.round, asked.base, (b"x",), (1.0,))
    await up.says(TARGET, wire.Done(request, second), wire.Done(request, second))
    await up.says(TARGET, wire.Failed(request, "internal_error", "it broke"))
    await up.says(DRAFT, wire.Failed(request, "internal_error", "it broke"))
    await up.says(CLIENT, wire.Cancel(1), wire.Cancel(1))
    up.core.ping()
    await up.says(TARGET, wire.Done(request + 99, second))
    assert up.outcomes() == {1: ["length"]}
    assert len(up.to(CLIENT, wire.Progress)) == 2
    assert len(up.to(TARGET, wire.Close)) == 1


async def test_a_target_that_contradicts_itself_fails_the_request_alone(up: Pipeline) -> None:
    one, two = await up.begin(1), await up.begin(2)
    await up.verdict(one, 20, 21, accepted=1)
    assert up.outcomes() == {1: ["protocol_error"]}
    await up.verdict(two, 20)
    assert len(up.to(CLIENT, wire.Progress)) == 1


async def test_a_request_goes_on_when_the_draft_has_let_its_deadline_pass(up: Pipeline) -> None:
    request = await up.begin(n_draft=2, n_min=2)
    await up.verdict(request, 20)
    waiting = next(iter(up.core._requests.running.values()))
    assert waiting.timer is not None
    assert up.orders(TARGET, Verify) == []
    up.now += 60
    waiting.timer._run()  # as the event loop will
    assert up.orders(TARGET)[-1].order.changed(until=0) == Verify(1, 4, ())
    assert waiting.timer is None


# ---- what does not fit a message ----------------------------------------------------------------


@pytest.mark.parametrize(
    "kind", [wire.Started, Prefill, OpenDraft, wire.Progress, Verify, wire.Finished]
)
async def test_a_request_whose_message_is_too_long_fails_and_holds_nothing(
    up: Pipeline, kind: type
) -> None:
    up.too_long = (kind,)
    await up.says(CLIENT, submit(count=2))
    for prefill in up.orders(TARGET, Prefill):
        await up.verdict(prefill.request, 20)
    for verify in up.orders(TARGET, Verify):
        await up.verdict(verify.request, 21)
    assert up.outcomes() == {1: ["invalid_request"]}
    assert up.core.health()["requests"] == {"running": 0, "waiting": 0}
    up.too_long = ()
    await up.begin(2)


async def test_a_trace_comes_in_pieces(up: Pipeline) -> None:
    request = await up.begin(trace=True, mode="plain", count=None)
    for _ in range(400):
        await up.verdict(request, 20)
    await up.says(CLIENT, wire.Cancel(1))
    pieces = [one.spans for one in up.to(CLIENT, wire.Progress, wire.Finished)]
    assert [span.number for spans in pieces for span in spans] == [*range(400)]
    assert max(map(len, pieces)) == 1


async def test_questions_are_bounded_for_each_client_and_for_all(up: Pipeline) -> None:
    clients = [b"client %d" % n for n in range(10)]
    for client in clients:
        await up.says(client, *(wire.Tokenize(call, "text", True) for call in range(100)))
    refused = [up.outcomes(client) for client in clients]
    assert [len(one) for one in refused] == [36] * 8 + [100] * 2
    assert [*up.core._questions._places] == clients[:8]  # of those refused nothing is kept
    assert all(codes == ["busy"] for one in refused for codes in one.values())


async def test_a_client_with_many_questions_does_not_keep_others_waiting(up: Pipeline) -> None:
    await up.says(b"eager", *(wire.Tokenize(call, "many", True) for call in range(60)))
    await up.says(CLIENT, wire.Tokenize(1, "one", True))
    first = up.to(TARGET, wire.Tokenize)
    assert [one.text for one in first] == ["many", "many", "one"]
    for _ in range(100):
        await up.says(TARGET, *(wire.Tokens(one.call, (1,)) for one in first))
        first = up.to(TARGET, wire.Tokenize)[-2:]
    assert len(up.to(CLIENT, wire.Tokens)) == 1
    assert [one.call for one in up.to(b"eager", wire.Tokens)] == [*range(60)]


async def test_what_a_client_that_has_gone_asked_is_not_put(up: Pipeline) -> None:
    await up.says(CLIENT, *(wire.Tokenize(call, "text", True) for call in range(60)))
    up.core.on_gone(CLIENT)
    for one in up.to(TARGET, wire.Tokenize):
        await up.says(TARGET, wire.Tokens(one.call, (1,)))
    assert len(up.to(TARGET, wire.Tokenize)) == 2
    await up.says(b"other", wire.Tokenize(1, "text", True))
    assert len(up.to(TARGET, wire.Tokenize)) == 3


async def test_requests_that_are_cancelled_at_once_leave_no_questions(up: Pipeline) -> None:
    stops = tuple(f"<{n}>" for n in range(16))
    for call in range(1000):
        up.core.on_message(CLIENT, submit(call, prompt="text", stop=stops))
        up.core.on_message(CLIENT, wire.Cancel(call))
        if call % 10 == 0:
            await turns()
    await turns()
    assert len(up.to(TARGET, wire.Tokenize)) <= 2  # as none is answered, no other is put
    for _ in range(10):
        for one in up.to(TARGET, wire.Tokenize):
            await up.says(TARGET, wire.Tokens(one.call, (1,)))
    assert len(up.to(TARGET, wire.Tokenize)) <= 2
    await up.begin(5000)
    assert not up.core._questions._places


async def test_the_text_of_all_that_is_to_be_read_is_bounded(up: Pipeline) -> None:
    long = "x" * 1_000_000
    await up.says(CLIENT, *(submit(call, prompt=long) for call in range(20)))
    assert list(up.outcomes().values()) == [["busy"]] * 12
    await up.says(b"other", wire.Tokenize(50, "short", True))
    assert up.to(TARGET, wire.Tokenize)[-1].text == "short"


async def test_an_answer_of_another_kind_fails_what_waits_for_it(up: Pipeline) -> None:
    await up.says(CLIENT, submit(prompt="text"), wire.Tokenize(2, "text", True))
    for one in up.to(TARGET, wire.Tokenize):
        await up.says(TARGET, wire.Rendered(one.call, "text"))
    assert up.outcomes() == {1: ["protocol_error"], 2: ["protocol_error"]}


# ---- workers that are lost, and come ------------------------------------------------------------


async def silence(up: Pipeline, peer: bytes) -> None:
    """Everybody else beats, `peer` does not, and is missed."""
    for _ in range(int(4 * LOST_S) + 1):
        up.now += 0.25
        for other in {TARGET, DRAFT} - {peer}:
            await up.says(other, wire.Beat(1, False))
        up.core.look()


async def gone(up: Pipeline, peer: bytes) -> None:
    up.gone.add(peer)
    up.core.ping()
    await turns()


@pytest.mark.parametrize("leave", [silence, gone], ids=["silent", "disconnected"])
async def test_when_the_draft_is_lost_the_requests_go_on(up: Pipeline, leave: Any) -> None:
    one, two = await up.begin(1), await up.begin(2)
    await up.drafted(one, 3, 20, 21)
    await leave(up, DRAFT)
    assert up.outcomes() == {}
    await up.verdict(one, 20)
    await up.verdict(two, 30)
    # what it had drafted is still good
    blocks = [do.order.drafted for do in up.orders(TARGET, Verify)]
    assert blocks == [(21,), ()]


async def test_a_draft_that_comes_later_rides_with_what_runs(bare: Pipeline) -> None:
    await bare.join(draft=False)
    one, two = await bare.begin(1), await bare.begin(2)
    await bare.verdict(one, 20)
    await bare.says(DRAFT, hello("draft", 2))
    opened = {do.request: do.order.tokens for do in bare.orders(DRAFT, OpenDraft)}
    assert opened == {one: (*PROMPT, 20), two: PROMPT}
    await bare.drafted(two, 3, 30, 31)
    await bare.verdict(two, 30)
    assert bare.orders(TARGET)[-1].order.drafted == (31,)


async def test_a_draft_that_comes_back_goes_on_from_the_text(up: Pipeline) -> None:
    request = await up.begin()
    await gone(up, DRAFT)
    await up.verdict(request, 20)
    await up.says(b"draft2", hello("draft", 3))
    (opened,) = up.orders(b"draft2")
    assert opened.order.tokens == (*PROMPT, 20)
    assert opened.order.lineage > up.orders(DRAFT, OpenDraft)[-1].order.lineage


async def test_a_request_that_the_draft_gives_up_goes_on_without_it(up: Pipeline) -> None:
    one, two = await up.begin(1), await up.begin(2)
    await up.says(DRAFT, wire.Failed(one, "internal_error", "the cache is broken"))
    await up.drafted(one, 3, 20, 21)
    await up.drafted(two, 3, 20, 21)
    await up.verdict(one, 20)
    await up.verdict(two, 20)
    assert [do.order.drafted for do in up.orders(TARGET, Verify)] == [(), (21,)]
    assert up.outcomes() == {}


async def test_a_request_that_the_target_gives_up_fails_alone(up: Pipeline) -> None:
    one, two = await up.begin(1), await up.begin(2)
    await up.says(TARGET, wire.Failed(one, "internal_error", "no logits"))
    assert up.outcomes() == {1: ["internal_error"]}
    await up.verdict(two, 20)
    assert len(up.to(CLIENT, wire.Progress)) == 1


# ---- cancellations ------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["asking", "waiting", "prefilling", "running"])
async def test_a_request_is_cancelled_wherever_it_is(up: Pipeline, at: str) -> None:
    if at == "waiting":
        await up.begin(2)
        await up.begin(3)
    await up.says(CLIENT, submit(prompt="text" if at == "asking" else PROMPT))
    if at == "running":
        await up.verdict(up.orders(TARGET, Prefill)[-1].request, 20)
    await up.says(CLIENT, wire.Cancel(1), wire.Cancel(1))
    for question in up.to(TARGET, wire.Tokenize):
        await up.says(TARGET, wire.Tokens(question.call, (7, 8)))
    assert up.outcomes() == {1: ["cancelled"]}
    closed = [one.request for one in up.to(TARGET, wire.Close)]
    ran = at in ("prefilling", "running")
    assert closed == ([up.orders(TARGET, Prefill)[-1].request] if ran else [])
    assert (1 in up.started()) == ran


async def test_a_prompt_that_fails_after_a_cancellation_is_no_second_outcome(up: Pipeline) -> None:
    await up.says(CLIENT, submit(prompt="text"))
    await up.says(CLIENT, wire.Cancel(1))
    (question,) = up.to(TARGET, wire.Tokenize)
    await up.says(TARGET, wire.Failed(question.call, "internal_error", "it broke"))
    assert up.outcomes() == {1: ["cancelled"]}


async def test_who_cancels_what_is_not_theirs_changes_nothing(up: Pipeline) -> None:
    await up.begin()
    await up.says(b"other", wire.Cancel(1))
    assert up.outcomes() == up.outcomes(b"other") == {}


async def test_a_client_that_is_gone_does_not_want_its_requests(up: Pipeline) -> None:
    await up.says(CLIENT, *(submit(call) for call in (1, 2, 3)))
    await up.says(b"other", submit(1))
    await gone(up, CLIENT)
    assert up.core.health()["requests"] == {"running": 1, "waiting": 0}
    assert len(up.to(b"other", wire.Started)) == 1
    assert len(up.to(TARGET, wire.Close)) == 2


# ---- nonsense -----------------------------------------------------------------------------------

PROPOSAL = Proposal(1, 3, (Drafted(20, 0.9),), 0.01)
VERDICT = Verdict(0, (66,), 0, 3, (b"x",), (1.0,))


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        pytest.param(TARGET, wire.Done(1, PROPOSAL), id="a-proposal-from-the-target"),
        pytest.param(DRAFT, wire.Done(1, VERDICT), id="a-verdict-from-the-draft"),
        pytest.param(CLIENT, wire.Welcome(), id="a-welcome-from-a-client"),
        pytest.param(CLIENT, wire.Started(1, "m", "plain", ()), id="a-start-from-a-client"),
        pytest.param(DRAFT, wire.Do(1, Verify(1, 3, ())), id="an-order-from-the-draft"),
    ],
)
async def test_what_is_not_a_peers_to_say_is_a_bad_frame_and_changes_nothing(
    up: Pipeline, peer: bytes, message: wire.Message
) -> None:
    request = await up.begin()
    if isinstance(message, wire.Done):
        message = message.changed(request=request)
    with pytest.raises(ProtocolError):
        await up.says(peer, message)
    assert up.outcomes() == {}
    assert up.to(CLIENT, wire.Progress) == []
    assert up.core.health()["requests"]["running"] == 1
    assert set(up.core.health()["workers"]) == {"target", "draft"}


async def test_one_that_nobody_knows_changes_nothing_and_is_asked_who_it_is(up: Pipeline) -> None:
    request = await up.begin()
    await up.says(b"x", wire.Done(request, VERDICT), wire.Failed(request, "busy", "no"))
    assert set(map(type, up.to(b"x"))) == {wire.Who}
    assert up.to(CLIENT, wire.Progress) == []
    assert up.outcomes() == {}


# ---- questions, health, the end -----------------------------------------------------------------


async def test_the_target_answers_what_a_client_asks(up: Pipeline) -> None:
    await up.says(CLIENT, wire.Detokenize(77, (20, 21)))
    (question,) = up.to(TARGET, wire.Detokenize)
    assert question.tokens == (20, 21)
    await up.says(TARGET, wire.Rendered(question.call, "ab"))
    assert up.to(CLIENT) == [wire.Rendered(77, "ab")]


async def test_a_question_that_fails_is_answered_so(up: Pipeline) -> None:
    await up.says(CLIENT, wire.Render(77, (wire.Turn("judge", "x"),)))
    (question,) = up.to(TARGET, wire.Render)
    await up.says(TARGET, wire.Failed(question.call, "invalid_request", "no role judge"))
    await up.says(b"other", wire.Tokenize(5, "x", True))
    await gone(up, TARGET)
    up.now += 600
    up.core.look()
    await turns()
    assert up.to(CLIENT, wire.Failed) == [wire.Failed(77, "invalid_request", "no role judge")]
    assert up.outcomes(b"other") == {5: ["worker_unavailable"]}


async def test_health_tells_what_is_there(bare: Pipeline) -> None:
    assert bare.core.health()["status"] == "loading"
    await bare.says(DRAFT, hello("draft", 2, protocol=99))
    assert "protocol 99" in bare.core.health()["refused"]["draft"]
    bare.now += 5
    await bare.join()
    await bare.says(CLIENT, *(submit(call) for call in (1, 2, 3)), wire.Health(8))
    (report,) = bare.to(CLIENT, wire.HealthReport)
    assert report.call == 8
    health = report.report
    assert health["status"] == "ok"
    assert health["refused"] == {}
    assert health["uptime_s"] == 5.0
    assert health["workers"]["target"] == {
        "role": "target",
        "model": "target",
        "device": "cpu",
        "context": 512,
        "slots": 2,
        "step_s": 0.1,
        "link_s": None,
        "silent": False,
        "requests": 0,
        "cores": "0",
        "here": False,
        "memory": 0,
        "build": "",
        "rollback_s": 0.0,
        "busy": 0.0,
        "passes_per_s": 0.0,
    }
    assert health["mode"] == "pipelined"
    assert bare.core.health()["requests"] == {"running": 2, "waiting": 1}


@pytest.mark.parametrize(
    ("cores", "mode"),
    [
        pytest.param("host:0", "pipelined", id="cores-of-their-own"),
        pytest.param("host:1", "sync", id="the-same-core"),
    ],
)
async def test_what_is_best_depends_on_whether_the_workers_share_a_device(
    bare: Pipeline, cores: str, mode: str
) -> None:
    await bare.says(TARGET, hello("target", cores="host:1"))
    await bare.says(DRAFT, hello("draft", 2, cores=cores))
    await bare.says(CLIENT, submit(mode=None))
    assert [one.mode for one in bare.to(CLIENT, wire.Started)] == [mode]


async def test_stop_lets_everything_that_was_asked_for_finish(
    up: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    later: list[Any] = []  # than the last messages
    loop = asyncio.get_running_loop()
    monkeypatch.setattr(loop, "call_later", lambda _, callback, *args: later.append(callback))
    await up.says(CLIENT, submit(1), submit(2), submit(3), wire.Stop(9), submit(4))
    assert up.outcomes() == {4: ["busy"]}
    assert [one.call for one in up.to(CLIENT, wire.HealthReport)] == [9]
    for _ in range(2):
        await up.verdict(up.orders(TARGET, Prefill)[-1].request, 1)
    assert later == []
    (left,) = up.core._requests.running
    await up.verdict(left, 1)
    assert up.outcomes() == {4: ["busy"], 2: ["stop"], 3: ["stop"], 1: ["stop"]}
    assert later == [up.core.stopped.set]


async def test_stop_ends_what_is_idle(up: Pipeline) -> None:
    await up.says(CLIENT, wire.Stop(9))
    async with asyncio.timeout(5):
        await up.core.run()


async def test_closing_ends_each_request_with_one_error(up: Pipeline) -> None:
    await up.says(CLIENT, submit(1), submit(2), submit(3), submit(4, prompt="text"))
    running = list(up.core._requests.running)
    await up.core.close()
    assert up.outcomes() == {call: ["worker_unavailable"] for call in (1, 2, 3, 4)}
    assert up.started() == [1, 2]  # nothing was started to no end
    await up.says(TARGET, wire.Done(running[0], VERDICT))
    assert up.to(CLIENT, wire.Progress) == []


async def test_while_it_runs_the_silent_are_missed_without_a_message(
    up: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outrider_services.pipeline.coordinator.LOOK_S", 0.0)
    await up.begin()
    running = asyncio.ensure_future(up.core.run())
    await turns()
    for _ in range(int(4 * (LOST_S + Defaults().resume_s)) + 4):
        up.now += 0.25
        await turns()
    assert up.outcomes() == {1: ["worker_unavailable"]}
    up.core.stopped.set()
    await running
    assert up.to(CLIENT, wire.Ping)  # and who has left is found out


async def test_the_figures_come_at_once_and_then_ten_times_a_second(up: Pipeline) -> None:
    one = await up.begin(mode="plain")
    for _ in range(5):
        await up.verdict(one, 20)
        up.now += 0.06
    told = [
        progress.stats and progress.stats.generated_tokens
        for progress in up.to(CLIENT, wire.Progress)
    ]
    assert told == [1, None, 3, None, 5]
    await up.says(CLIENT, wire.Cancel(1))
    (finished,) = up.to(CLIENT, wire.Finished)
    assert finished.stats.generated_tokens == 5


async def test_another_draft_worker_is_not_believed_to_know_what_the_last_one_read(
    up: Pipeline,
) -> None:
    prompt = tuple(range(10, 60))
    for call, draft in enumerate((2, 2, 3), 1):
        if draft == 3:
            await up.says(DRAFT, hello("draft", 3))
            up.core.on_gone(DRAFT)
            await up.says(DRAFT, hello("draft", 3))
        one = await up.begin(call, prompt=prompt, cache="")
        session = up.core._requests.running[one].session
        assert session is not None
        assert bool(session.task.held.end) == (call == 2)
        await up.verdict(one, 20)
        await up.drafted(one, len(prompt), 20, 21)
        await up.says(CLIENT, wire.Cancel(call))


async def test_a_mistake_in_one_session_ends_its_request_and_no_other(
    up: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = await up.begin(1, mode="plain"), await up.begin(2, mode="plain")
    session = up.core._requests.running[one].session
    assert session is not None

    def mistaken(*_: Any) -> None:
        raise ZeroDivisionError("nothing is left")

    monkeypatch.setattr(session.stock, "commit", mistaken)
    verdict = Verdict(
        accepted=0, tokens=(20,), round=0, base=3, pieces=(b"x",), margins=(1.0,), elapsed_s=0.1
    )
    await up.says(TARGET, wire.Passed(((one, verdict), (other, verdict))))
    assert up.outcomes() == {1: ["internal_error"]}
    assert [do.request for do in up.orders(TARGET, Verify)] == [other]
