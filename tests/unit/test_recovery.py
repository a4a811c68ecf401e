"""A target worker is lost: its requests are kept, and the next one goes on where each stood."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from tests.unit.test_coordinator import (
    CLIENT,
    DRAFT,
    PROMPT,
    TARGET,
    Pipeline,
    gone,
    hello,
    silence,
    submit,
    turns,
)

from outrider.core import decoding
from outrider.core.events import Prefill
from outrider.core.values import Drafted, Proposal, Received, Role, Verdict, Verify
from outrider.wire import messages as wire

NEXT = b"next target"
LIMIT_S = 30.0


@pytest.fixture
async def up() -> AsyncIterator[Pipeline]:
    """With a target of two sequences, and a draft."""
    pipeline = Pipeline(resume_s=LIMIT_S)
    await pipeline.join()
    yield pipeline
    await pipeline.core.close()


@pytest.fixture
async def bare() -> AsyncIterator[Pipeline]:
    pipeline = Pipeline(resume_s=LIMIT_S)
    yield pipeline
    await pipeline.core.close()


async def interrupted(up: Pipeline, _: bytes) -> None:
    """The target is heard of on another connection."""
    await up.says(NEXT, hello("target", 1))


async def again(up: Pipeline, peer: bytes = NEXT, incarnation: int = 7, **changes: Any) -> None:
    """Another target worker comes."""
    await up.says(peer, hello("target", incarnation, **changes))


async def dies(
    up: Pipeline, peer: bytes, successor: bytes, incarnation: int, **changes: Any
) -> None:
    await gone(up, peer)
    await again(up, successor, incarnation, **changes)


def texts(up: Pipeline, peer: bytes = NEXT) -> dict[int, tuple[int, ...]]:
    """What a target was told to read, by request."""
    return {do.request: do.order.tokens for do in up.orders(peer, Prefill)}


async def says(up: Pipeline, peer: bytes, request: int, *tokens: int) -> None:
    """This target does what it was asked last for the request, and chooses these."""
    asked = [do.order for do in up.orders(peer) if do.request == request][-1]
    base = len(asked.tokens) if isinstance(asked, Prefill) else asked.base
    count = len(tokens)
    done = Verdict(count - 1, tokens, asked.round, base, (b"x",) * count, (1.0,) * count)
    await up.says(peer, wire.Done(request, done))


def said(up: Pipeline, call: int = 1) -> list[tuple[int, int]]:
    """The tokens that the client has got, each with its position."""
    progress = [one for one in up.to(CLIENT, wire.Progress) if one.call == call]
    return [(token.position, token.id) for one in progress for token in one.fragment.tokens]


# ---- it comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [silence, gone, interrupted])
async def test_what_ran_goes_on_with_the_next_token(up: Pipeline, leave: Any) -> None:
    request = await up.begin()
    await up.drafted(request, 3, 20, 21, 22)
    await up.verdict(request, 20)
    asked = up.orders(TARGET)[-1].order
    await leave(up, TARGET)
    await again(up)
    assert up.outcomes() == {}
    (order,) = [do.order for do in up.orders(NEXT, Prefill)]
    assert (order.tokens, order.begins) == ((*PROMPT, 20), len(PROMPT))
    assert order.round > asked.round
    await says(up, NEXT, request, 21)
    assert up.orders(NEXT)[-1].order == Verify(order.round + 1, 5, (22,))  # what was drafted
    await says(up, NEXT, request, 22, 23)
    assert said(up) == [(3, 20), (4, 21), (5, 22), (6, 23)]
    assert up.started() == [1]
    await up.says(CLIENT, wire.Metrics(99))
    (report,) = up.to(CLIENT, wire.MetricsReport)
    assert report.metrics["request_resumed_total"] == {"target": 1, "connection": 0}


async def test_what_the_lost_target_still_says_has_no_effect(up: Pipeline) -> None:
    request = await up.begin()
    await up.verdict(request, 20)
    asked = up.orders(TARGET)[-1].order
    late = Verdict(0, (99,), asked.round, asked.base, (b"x",), (1.0,))
    await silence(up, TARGET)
    await up.says(TARGET, wire.Done(request, late))
    await again(up, TARGET, 1)  # the same process, which had been paused
    await up.says(TARGET, wire.Done(request, late))
    await up.says(DRAFT, wire.Failed(request, "internal_error", "no"))
    assert said(up) == [(3, 20)]
    await says(up, TARGET, request, 21)
    assert said(up) == [(3, 20), (4, 21)]


async def test_what_waits_or_is_prepared_waits_on(up: Pipeline) -> None:
    for call in (1, 2, 3):
        await up.says(CLIENT, submit(call))
    await up.says(CLIENT, submit(4, prompt="text"))
    (question,) = up.to(TARGET, wire.Tokenize)
    await gone(up, TARGET)
    await up.says(CLIENT, submit(5, prompt="text"), wire.Detokenize(6, (20,)))
    assert up.outcomes() == {}
    await again(up)
    assert set(texts(up).values()) == {PROMPT}
    (question,) = up.to(NEXT, wire.Detokenize)
    await up.says(NEXT, wire.Rendered(question.call, "x"))
    questions = up.to(NEXT, wire.Tokenize)
    assert [one.text for one in questions] == ["text", "text"]
    await up.says(NEXT, *(wire.Tokens(one.call, (7, 8)) for one in questions))
    assert up.to(CLIENT, wire.Rendered) == [wire.Rendered(6, "x")]
    for _ in range(5):
        await up.says(CLIENT, wire.Cancel(up.started()[-1]))
    assert up.started() == [1, 2, 3, 4, 5]


async def test_a_question_that_two_targets_die_with_is_put_to_no_third(up: Pipeline) -> None:
    await up.says(CLIENT, submit(1, prompt="text"), wire.Tokenize(2, "other", True))
    await dies(up, TARGET, NEXT, 7)
    await dies(up, NEXT, b"third", 8)
    assert up.outcomes() == {1: ["worker_unavailable"], 2: ["worker_unavailable"]}
    assert up.to(b"third", wire.Tokenize) == []


async def test_a_request_is_cancelled_while_there_is_no_target(up: Pipeline) -> None:
    for call in (1, 2, 3):
        await up.says(CLIENT, submit(call))
    await gone(up, TARGET)
    await up.says(CLIENT, wire.Cancel(1), wire.Cancel(3))
    await again(up)
    assert up.outcomes() == {1: ["cancelled"], 3: ["cancelled"]}
    assert len(texts(up)) == 1


async def test_a_target_with_another_model_does_not_go_on(up: Pipeline) -> None:
    for call in (1, 2, 3):
        await up.says(CLIENT, submit(call))
    await gone(up, TARGET)
    await again(up, model="another")
    assert up.outcomes() == {call: ["worker_unavailable"] for call in (1, 2, 3)}
    assert texts(up) == {}


# ---- it does not --------------------------------------------------------------------------------


@pytest.mark.parametrize("leave", [silence, gone])
async def test_where_none_comes_there_is_one_error_for_each(up: Pipeline, leave: Any) -> None:
    await up.says(CLIENT, *(submit(call) for call in range(1, 5)))
    await up.says(CLIENT, submit(5, prompt="text"))
    await up.verdict(up.orders(TARGET, Prefill)[0].request, 20)
    await leave(up, TARGET)
    up.now += LIMIT_S - 0.1
    up.core.look()
    await turns()
    assert up.outcomes() == {}
    assert up.core.health()["status"] == "loading"
    up.now += 0.2
    for _ in range(2):
        up.core.look()
        await turns()
    assert up.outcomes() == {call: ["worker_unavailable"] for call in range(1, 6)}
    assert up.core.health()["requests"] == {"running": 0, "waiting": 0}
    told = {one.message for one in up.to(CLIENT, wire.Failed)}
    assert any("and no other came within 30 s" in words for words in told)
    await up.says(CLIENT, submit(6))  # now it is known: nobody has to wait any more
    assert up.outcomes()[6] == ["worker_unavailable"]
    await again(up)
    await up.says(CLIENT, submit(7))
    assert up.started()[-1] == 7


async def test_the_first_target_is_waited_for_as_well(bare: Pipeline) -> None:
    await bare.says(CLIENT, submit(1))
    bare.core.look()
    assert bare.outcomes() == {}
    bare.now += LIMIT_S
    bare.core.look()
    await turns()
    assert bare.outcomes() == {1: ["worker_unavailable"]}
    await bare.says(CLIENT, submit(2))
    assert bare.outcomes()[2] == ["worker_unavailable"]


async def test_without_a_limit_requests_end_with_their_target() -> None:
    up = Pipeline(resume_s=0)
    await up.join()
    await up.says(CLIENT, *(submit(call) for call in range(1, 4)))
    await gone(up, TARGET)
    assert up.outcomes() == {call: ["worker_unavailable"] for call in range(1, 4)}
    await up.core.close()


# ---- who kills it -------------------------------------------------------------------------------


async def test_a_request_with_which_two_targets_die_is_set_aside(up: Pipeline) -> None:
    poison, other = await up.begin(1), await up.begin(2)
    await up.verdict(poison, 20)
    await up.verdict(other, 30)
    await dies(up, TARGET, NEXT, 7)
    assert texts(up) == {poison: (*PROMPT, 20)}  # one at a time: it may have been this one
    await dies(up, NEXT, b"third", 8)
    assert up.outcomes() == {1: ["request_poisoned"]}
    assert texts(up, b"third") == {other: (*PROMPT, 30)}
    await says(up, b"third", other, 31)
    assert said(up, 2) == [(3, 30), (4, 31)]


async def test_who_is_killed_from_outside_is_no_strong_suspicion(up: Pipeline) -> None:
    """It may have been the kernel, out of memory: so there is an end to it, too."""
    await up.begin(1)
    peer = TARGET
    for number in range(10, 15):
        assert up.outcomes() == {}
        successor = b"target %d" % number
        await dies(up, peer, successor, number, follows_killed=True)
        peer = successor
    assert up.outcomes() == {1: ["request_poisoned"]}


async def test_with_whom_it_was_killed_thrice_go_on_together(up: Pipeline) -> None:
    """Eight long texts, read one after the other, had kept the last of them for 27 s."""
    one, other = await up.begin(1), await up.begin(2)
    peer = TARGET
    for number in range(10, 13):
        successor = b"target %d" % number
        await dies(up, peer, successor, number, follows_killed=True)
        assert list(texts(up, successor)) == [one, other]
        peer = successor
    await dies(up, peer, b"last", 13, follows_killed=True)
    assert list(texts(up, b"last")) == [one]  # by now, both may be what kills it
    assert up.outcomes() == {}


async def test_who_gets_past_the_place_begins_anew_with_those_who_were_killed(up: Pipeline) -> None:
    one, other = await up.begin(1), await up.begin(2)
    peer = TARGET
    for number in range(10, 15):
        successor = b"target %d" % number
        await dies(up, peer, successor, number, follows_killed=True)
        assert list(texts(up, successor)) == [one, other]
        if number % 2:  # past the place
            await says(up, successor, one, 20 + number)
            await says(up, successor, other, 20 + number)
        peer = successor
    assert up.outcomes() == {}


async def test_a_kill_is_forgotten_with_the_next_token(up: Pipeline) -> None:
    """Whatever else its pass may have reached: twenty kills in four minutes had set four aside."""
    one = await up.begin(1)
    await up.drafted(one, 3, *range(20, 28))
    peer = TARGET
    for number in range(8):
        successor = b"target %d" % number
        await dies(up, peer, successor, number, follows_killed=True)
        assert list(texts(up, successor)) == [one]
        await says(up, successor, one, 20 + number)
        peer = successor
    assert up.outcomes() == {}


async def test_a_suspect_that_gets_past_the_place_is_none_any_more(up: Pipeline) -> None:
    one, other = await up.begin(1), await up.begin(2)
    await up.drafted(one, 3, 20, 21)
    await up.verdict(one, 20)
    await up.verdict(other, 30)
    await dies(up, TARGET, NEXT, 7)
    await says(up, NEXT, one, 22)  # the block that the last one died with went further
    assert list(texts(up)) == [one]
    await says(up, NEXT, one, 23)
    assert list(texts(up)) == [one, other]
    await dies(up, NEXT, b"third", 8)  # and this was the other, or nobody
    assert list(texts(up, b"third")) == [one]
    await says(up, b"third", one, 24)
    assert up.outcomes() == {2: ["request_poisoned"]}


async def test_who_comes_later_need_not_wait_for_suspects(up: Pipeline) -> None:
    await up.begin(1)
    await dies(up, TARGET, NEXT, 7)
    await up.says(CLIENT, submit(2))
    assert up.started() == [1, 2]
    assert len(texts(up)) == 2


async def test_the_next_suspect_goes_on_when_the_first_is_over(up: Pipeline) -> None:
    one, other = await up.begin(1), await up.begin(2)
    await dies(up, TARGET, NEXT, 7)
    assert list(texts(up)) == [one]
    await up.says(CLIENT, wire.Cancel(1))
    assert list(texts(up)) == [one, other]


async def test_a_connection_that_breaks_is_no_death(up: Pipeline) -> None:
    request = await up.begin(1)
    for number in range(5):
        await again(up, b"connection %d" % number, 1)
    assert up.outcomes() == {}
    await says(up, b"connection 4", request, 20)
    assert said(up) == [(3, 20)]


async def test_deaths_with_progress_between_them_are_nobodys_fault(up: Pipeline) -> None:
    request, peer = await up.begin(1), TARGET
    for number in range(10, 20):
        successor = b"target %d" % number
        await dies(up, peer, successor, number)
        await says(up, successor, request, number)
        peer = successor
    assert up.outcomes() == {}
    assert [token for _, token in said(up)] == [*range(10, 20)]


# ---- a hung worker is ended ---------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "draft"])
async def test_a_worker_that_hangs_is_told_of(role: Role) -> None:
    hung: list[Role] = []
    up = Pipeline(on_hung=hung.append)
    await up.join()
    await silence(up, TARGET if role == "target" else DRAFT)
    assert hung == [role]
    await again(up)
    await gone(up, NEXT)
    assert hung == [role]  # one whose connection has ended is not
    await up.core.close()


async def test_a_target_that_beats_but_does_not_progress_is_given_up(up: Pipeline) -> None:
    await up.begin()
    for _ in range(300):
        up.now += 0.25
        for peer in (TARGET, DRAFT):
            if not up.to(TARGET, wire.Refused):
                await up.says(peer, wire.Beat(5, peer == TARGET))
        up.core.look()
    assert [one.reason for one in up.to(TARGET, wire.Refused)] == ["it makes no progress"]
    assert up.outcomes() == {1: ["worker_unavailable"]}
    (failed,) = up.to(CLIENT, wire.Failed)
    assert "the target worker makes no progress" in failed.message


# ---- a client that asks again -------------------------------------------------------------------

KEY = "0123456789abcdef"


def received(*tokens: int) -> tuple[Received, ...]:
    return tuple(Received(token, b"x") for token in tokens)


async def test_an_answer_goes_on_behind_what_was_received(up: Pipeline) -> None:
    request = await up.begin(1, key=KEY, received=received(20, 21))
    (prefill,) = up.orders(TARGET, Prefill)
    assert (prefill.order.tokens, prefill.order.begins) == ((*PROMPT, 20, 21), 3)
    await up.verdict(request, 22)
    assert said(up) == [(5, 22)]


async def test_one_of_which_all_was_received_ends_at_once(up: Pipeline) -> None:
    await up.says(CLIENT, submit(1, key=KEY, received=received(20, 1)))
    assert up.outcomes() == {1: ["stop"]}
    assert up.orders(TARGET) == []
    assert up.core.health()["requests"] == {"running": 0, "waiting": 0}


async def test_an_answer_that_had_begun_goes_before_those_that_have_not(up: Pipeline) -> None:
    for call in range(1, 80):
        await up.says(CLIENT, submit(call))
    assert up.outcomes() == {call: ["busy"] for call in range(65, 80)}
    await up.says(CLIENT, submit(80, key=KEY, received=received(20)))
    await up.says(CLIENT, wire.Cancel(1))
    assert up.started() == [1, 2, 80]


async def test_what_was_received_must_be_tokens_of_the_model(up: Pipeline) -> None:
    await up.says(CLIENT, submit(1, received=received(400)))
    assert up.outcomes() == {1: ["invalid_request"]}


async def test_a_request_that_is_there_is_taken_over(up: Pipeline) -> None:
    """The coordinator may hear of the new connection before it sees the end of the old one."""
    request = await up.begin(1, key=KEY)
    await up.verdict(request, 20)
    await up.says(b"client again", submit(9, key=KEY, received=received(20)))
    assert up.to(TARGET, wire.Close) == [wire.Close(request)]
    assert up.orders(TARGET, Prefill)[-1].order.tokens == (*PROMPT, 20)
    assert up.core.health()["requests"] == {"running": 1, "waiting": 0}
    up.core.on_gone(CLIENT)
    assert up.core.health()["requests"] == {"running": 1, "waiting": 0}
    await up.says(b"client again", submit(10, key=KEY, received=received(20)))  # and again
    assert up.core.health()["requests"] == {"running": 1, "waiting": 0}
    assert up.outcomes(b"client again") == {9: ["cancelled"]}


async def test_a_key_is_for_one_request(up: Pipeline) -> None:
    request = await up.begin(1, key=KEY)
    others: list[dict[str, Any]] = [{"stop": ("x",)}, {"prompt": (9, 9)}, {"count": 7}]
    for call, more in enumerate(others, 2):
        await up.says(CLIENT, submit(call, key=KEY, **more))
        assert up.outcomes()[call] == ["invalid_request"]
    await up.verdict(request, 20)
    assert said(up) == [(3, 20)]


async def test_a_prompt_may_come_back_as_the_tokens_that_it_was(up: Pipeline) -> None:
    await up.says(CLIENT, submit(1, prompt="text", key=KEY))
    (question,) = up.to(TARGET, wire.Tokenize)
    await up.says(TARGET, wire.Tokens(question.call, (7, 8)))
    await up.says(b"client again", submit(2, prompt=(7, 8), key=KEY))
    assert up.outcomes(b"client again") == {}
    assert [do.order.tokens for do in up.orders(TARGET, Prefill)] == [(7, 8), (7, 8)]


# ---- whatever happens ---------------------------------------------------------------------------


class World:
    """Targets that come and go, and clients that ask, cancel and ask again, all at random."""

    LENGTH = 8  # tokens of an answer

    def __init__(self, up: Pipeline, seed: int) -> None:
        self.up, self.chance = up, random.Random(seed)
        self.target: bytes | None = TARGET
        self.read, self.number, self.calls = 0, 10, 0
        self.orders: dict[int, Prefill | Verify] = {}  # what the target has to do, by request
        self.former: list[tuple[int, Prefill | Verify]] = []  # what others had to do
        self.texts: dict[tuple[bytes, int], list[int]] = {}  # by client and call, what came

    @staticmethod
    def token(position: int) -> int:
        return 100 + position * 7 % 50

    async def step(self) -> None:
        await self.chance.choices(
            (
                self.asks,
                self.computes,
                self.loses,
                self.comes,
                self.cancels,
                self.drafts,
                self.late,
            ),
            (3, 12, 2, 3, 1, 4, 2),
        )[0]()
        self.takes()

    async def asks(self) -> None:
        self.calls += 1
        await self.up.says(CLIENT, submit(self.calls, count=self.LENGTH, key=f"key {self.calls}"))

    async def cancels(self) -> None:
        await self.up.says(CLIENT, wire.Cancel(self.chance.randint(1, self.calls + 1)))

    async def loses(self) -> None:
        """By its end, or because it is heard of on another connection."""
        if self.target is None:
            return
        self.number += 1
        self.former += self.orders.items()
        if self.chance.random() < 0.3:
            same = self.up.core._roster.target().hello
            self.orders.clear()
            self.target = b"connection %d" % self.number
            await self.up.says(self.target, same)
        else:
            await gone(self.up, self.target)
            self.target = None
            self.orders.clear()

    async def comes(self) -> None:
        if self.target is None:
            self.number += 1
            self.target = b"target %d" % self.number
            killed = {"follows_killed": True}  # too many crashes at one place would set one aside
            await again(self.up, self.target, self.number, **killed)

    async def drafts(self) -> None:
        for request in list(self.up.core._requests.running.values()):
            session = request.session
            if session and session.draft.rides and self.chance.random() < 0.5:
                at = len(session.tokens) + len(session.stock)
                token = self.token(at) if self.chance.random() < 0.7 else 99
                proposal = Proposal(session.stock.lineage, at, (Drafted(token, 0.9),), 0.01)
                await self.up.says(DRAFT, wire.Done(request.id, proposal))

    async def late(self) -> None:
        """What a target that was lost had to say comes from the one that is there."""
        if self.former and self.target:
            request, order = self.chance.choice(self.former)
            base = len(order.tokens) if isinstance(order, Prefill) else order.base
            wrong = Verdict(0, (98,), order.round, base, (b"x",), (1.0,))
            await self.up.says(self.target, wire.Done(request, wrong))

    async def computes(self) -> None:
        if not self.orders or self.target is None:
            return
        request = self.chance.choice([*self.orders])
        order = self.orders.pop(request)
        base = len(order.tokens) if isinstance(order, Prefill) else order.base
        drafted = order.drafted if isinstance(order, Verify) else ()
        choices = (self.token(base + at) for at in range(len(drafted) + 1))
        verdict = decoding.verify(drafted, choices)
        count = len(verdict.tokens)
        done = verdict.changed(round=order.round, base=base, pieces=(b"x",) * count)
        await self.up.says(self.target, wire.Done(request, done.changed(margins=(1.0,) * count)))

    def takes(self) -> None:
        """Read what was sent: the target its orders, the clients their fragments."""
        for peer, message in self.up.sent[self.read :]:
            match message:
                case wire.Do(request, Prefill() | Verify() as order) if peer == self.target:
                    self.orders[request] = order
                case wire.Pass(orders) if peer == self.target:
                    self.orders.update(orders)
                case wire.Close(request) if peer == self.target:
                    self.orders.pop(request, None)
                case wire.Progress(call, fragment):
                    text = self.texts.setdefault((peer, call), [])
                    for token in fragment.tokens:
                        assert token.position == len(PROMPT) + len(text)
                        assert token.id == self.token(token.position)
                        text.append(token.id)
        self.read = len(self.up.sent)


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_comes_and_goes_each_request_has_its_text_and_one_end(seed: int) -> None:
    up = Pipeline(resume_s=LIMIT_S)
    await up.join()
    world = World(up, seed)
    for _ in range(80):
        await world.step()
    await world.comes()
    for _ in range(2000):
        world.takes()
        if not world.orders:
            break
        await world.computes()
    outcomes = up.outcomes()
    assert up.core.health()["requests"] == {"running": 0, "waiting": 0}
    assert set(outcomes) == set(range(1, world.calls + 1))
    for call, ends in outcomes.items():
        assert len(ends) == 1
        assert ends[0] in ("length", "cancelled", "request_poisoned")
        if ends[0] == "length":
            assert len(world.texts[CLIENT, call]) == World.LENGTH
    assert [ends for ends in outcomes.values()].count(["length"]) > 0
    await up.core.close()
