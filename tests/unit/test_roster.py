"""Who may join, who is still there and who is asked what: in made-up time, without sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import MappingProxyType
from typing import Any

import pytest

from outrider.core.engine import Vocabulary
from outrider.core.values import Role
from outrider.errors import BadRequest, OutriderError, ProtocolError, RequestTimeout, WorkerLost
from outrider.wire import messages as wire
from outrider_services.pipeline import calls
from outrider_services.pipeline.member import SILENT_S, Member
from outrider_services.pipeline.roster import LOST_S, MOST, Roster

VOCABULARY = Vocabulary("bpe", 12, None, 1, False, False, (1,), "one")
OTHER_DIGEST = VOCABULARY.changed(digest="two")
TEXTS = tuple(f"t{n}" for n in range(VOCABULARY.size))


def hello(role: Role, incarnation: int = 1, **changes: Any) -> wire.Hello:
    said = wire.Hello(
        wire.PROTOCOL, "0", role, incarnation, role, VOCABULARY, 64, 2, "cpu", "h:0", (0.01,)
    )
    return said.changed(**changes)


class World:
    """A roster, what it told whom, and who joined and was lost."""

    def __init__(self, tokens: Mapping[Role, str] = MappingProxyType({})) -> None:
        self.now = 100.0
        self.told: list[tuple[bytes, wire.Message]] = []
        self.joined: list[Role] = []
        self.lost: list[tuple[Role, str]] = []
        self.paused: list[bool] = []
        self.roster = Roster(
            lambda peer, message: self.told.append((peer, message)),
            lambda member: self.joined.append(member.role),
            lambda member, why: self.lost.append((member.role, why)),
            lambda _, is_paused: self.paused.append(is_paused),
            lambda: self.now,
            tokens,
        )

    async def hello(self, peer: bytes, said: wire.Hello) -> None:
        self.roster.on_hello(peer, said)
        await turns()

    async def welcomed(self, peer: bytes, said: wire.Hello) -> Member:
        await self.hello(peer, said)
        assert self.to(peer)[-1] == wire.Welcome()
        return next(one for one in self.roster.members if one.peer == peer)

    def to(self, peer: bytes) -> list[wire.Message]:
        return [message for to, message in self.told if to == peer]

    def beat(self, peer: bytes, steps: int, busy: bool) -> None:
        member = self.roster.member_of(peer)
        assert member is not None
        self.roster.on_beat(member, wire.Beat(steps, busy))

    def role_of(self, peer: bytes) -> Role | None:
        member = self.roster.member_of(peer)
        return member.role if member else None

    async def answer_labels(self, texts: dict[bytes, tuple[str, ...]]) -> None:
        """Each peer tells the texts of its tokens as long as somebody asks."""
        done = 0
        while done < len(self.told):
            peer, message = self.told[done]
            done += 1
            if isinstance(message, wire.Labels) and peer in texts:
                part = texts[peer][message.start : message.start + message.count]
                assert self.roster.on_answer(peer, wire.LabelTexts(message.call, part))
            await turns()


async def turns() -> None:
    """Let whatever can go on without time passing go on."""
    for _ in range(8):
        await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.roster.close()


# ---- joining ------------------------------------------------------------------------------------


async def test_workers_are_welcomed_and_known_by_their_connections(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.welcomed(b"d", hello("draft", 2))
    assert world.joined == ["target", "draft"]
    assert [member.peer for member in world.roster.members] == [b"t", b"d"]
    assert world.role_of(b"t") == "target"
    assert world.role_of(b"d") == "draft"
    assert world.roster.target().peer == b"t"


async def test_one_that_nobody_knows_is_asked_who_it_is(world: World) -> None:
    assert world.role_of(b"x") is None
    assert world.to(b"x") == [wire.Who()]


async def test_one_that_is_being_looked_at_is_not_asked_again(world: World) -> None:
    world.roster.on_hello(b"t", hello("target"))
    assert world.role_of(b"t") is None
    world.roster.on_hello(b"t", hello("target"))
    await turns()
    assert world.to(b"t") == [wire.Welcome()]
    assert world.joined == ["target"]


async def test_a_hello_again_on_the_same_connection_changes_nothing(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"t", hello("target"))
    assert world.to(b"t") == [wire.Welcome()]
    assert (world.joined, world.lost) == (["target"], [])


@pytest.mark.parametrize(
    ("said", "code", "words"),
    [
        pytest.param(
            hello("target", protocol=wire.PROTOCOL + 1, version="9.9"),
            "protocol_error",
            f"protocol {wire.PROTOCOL + 1} (outrider 9.9)",
            id="another-protocol",
        ),
        pytest.param(
            hello("target", protocol=wire.PROTOCOL + 1, version="\x1b[2J" + "x" * 200),
            "protocol_error",
            f"(outrider \\x1b[2J{'x' * 33})",
            id="a-version-with-terminal-escapes",
        ),
        pytest.param(
            hello("target", vocabulary=None), "protocol_error", "vocabulary", id="no-vocabulary"
        ),
    ],
)
async def test_what_cannot_serve_is_refused_and_remembered(
    world: World, said: wire.Hello, code: str, words: str
) -> None:
    await world.hello(b"t", said)
    (refused,) = world.to(b"t")
    assert isinstance(refused, wire.Refused)
    assert refused.code == code
    assert words in refused.reason
    assert world.roster.of("target") == []
    assert world.roster.refusals == {"target": refused.reason}
    with pytest.raises(WorkerLost, match="no target worker is connected") as found:
        world.roster.target()
    assert refused.reason in str(found.value)


async def test_a_refusal_is_forgotten_once_another_is_welcomed(world: World) -> None:
    await world.hello(b"t", hello("target", vocabulary=None))
    await world.welcomed(b"u", hello("target", 2))
    assert world.roster.refusals == {}


@pytest.mark.parametrize("role", ["target", "draft"])
async def test_a_second_worker_of_a_role_is_refused_where_we_start_one(role: Role) -> None:
    world = World({role: "secret"})
    first = await world.welcomed(b"a", hello(role, 1, token="secret"))
    await world.hello(b"b", hello(role, 2, token="secret"))
    assert world.to(b"b") == [wire.Refused("busy", f"there is a {role} worker already")]
    assert world.roster.of(role) == [first]
    assert world.roster.refusals == {}
    assert world.lost == []


@pytest.mark.parametrize("role", ["target", "draft"])
async def test_elsewhere_many_may_join_and_each_has_a_name_of_its_own(
    world: World, role: Role
) -> None:
    members = [await world.welcomed(bytes([number]), hello(role, number)) for number in range(MOST)]
    names = [role, *(f"{role}-{number}" for number in range(2, MOST + 1))]
    assert [member.name for member in members] == names
    await world.hello(b"more", hello(role, 99))
    assert world.to(b"more") == [wire.Refused("busy", f"there are {MOST} {role} workers already")]
    world.roster.on_gone(bytes([4]))
    assert world.lost == [(role, f"the {role}-5 worker is gone")]
    assert (await world.welcomed(b"more", hello(role, 99))).name == f"{role}-5"
    assert len(world.roster.of(role)) == MOST


async def test_a_connection_speaks_for_one_worker_only(world: World) -> None:
    first = await world.welcomed(b"a", hello("draft", 1))
    await world.hello(b"a", hello("draft", 2))
    await world.hello(b"a", hello("target", 3))
    assert world.roster.members == [first]
    assert world.to(b"a") == [wire.Welcome()]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": "other"}, "its model is not that of the other target worker: other here"),
        ({"vocabulary": OTHER_DIGEST}, "its vocabulary is not that of the other target worker"),
        ({"context": 32}, "its context is not that of the other target worker: 32 here, 64 there"),
    ],
    ids=["model", "vocabulary", "context"],
)
async def test_a_second_target_has_the_model_of_the_first_for_any_may_serve(
    world: World, changes: dict[str, Any], words: str
) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"u", hello("target", 2, **changes))
    (refused,) = world.to(b"u")
    assert isinstance(refused, wire.Refused)
    assert words in refused.reason
    await world.welcomed(b"v", hello("target", 3, curve_s=(0.5,), slots=9))
    assert world.lost == []


@pytest.mark.parametrize("role", ["target", "draft"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"token": "wrong"}, {"token": "sécret"}, {"protocol": wire.PROTOCOL + 1}],
    ids=["none", "wrong", "not-ascii", "another-protocol"],
)
async def test_only_our_own_workers_join_where_we_start_them(
    role: Role, changes: dict[str, Any]
) -> None:
    world = World({role: "secret"})
    await world.hello(b"x", hello(role, 1, **changes))
    (refused,) = world.to(b"x")
    assert isinstance(refused, wire.Refused)
    assert "protocol" in changes or f"starts its {role} worker itself" in refused.reason
    assert (world.joined, world.roster.refusals) == ([], {})
    await world.welcomed(b"a", hello(role, 2, token="secret"))
    await world.hello(b"x", hello(role, 2, **changes))  # not in its name either
    assert world.role_of(b"a") == role
    assert world.lost == []
    other: Role = "draft" if role == "target" else "target"
    await world.welcomed(b"b", hello(other, 3))  # anybody, where we start none
    await world.roster.close()


async def test_a_stranger_that_is_refused_is_not_told_of_who_is_there(world: World) -> None:
    await world.welcomed(b"a", hello("draft", 1))
    await world.hello(b"x", hello("draft", 2, protocol=wire.PROTOCOL + 1))
    assert isinstance(world.to(b"x")[-1], wire.Refused)
    assert world.roster.refusals == {}


async def test_of_two_that_come_at_once_for_one_place_one_is_welcomed() -> None:
    world = World({"draft": "secret"})
    world.roster.on_hello(b"a", hello("draft", 1, token="secret"))
    world.roster.on_hello(b"b", hello("draft", 2, token="secret"))
    await turns()
    assert world.to(b"a") == [wire.Welcome()]
    assert world.to(b"b") == [wire.Refused("busy", "there is a draft worker already")]
    assert world.joined == ["draft"]


@pytest.mark.parametrize("role", ["target", "draft"])
async def test_the_same_worker_on_a_new_connection_begins_anew(world: World, role: Role) -> None:
    await world.welcomed(b"a", hello(role, 7))
    await world.welcomed(b"b", hello(role, 7))
    assert world.lost == [(role, f"the {role} worker's connection was interrupted")]
    assert world.joined == [role, role]
    assert world.role_of(b"b") == role
    assert world.role_of(b"a") is None


# ---- pairs --------------------------------------------------------------------------------------


async def test_a_draft_without_a_vocabulary_is_welcome_and_nobody_is_asked(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.welcomed(b"d", hello("draft", 2, vocabulary=None))
    assert world.to(b"t") == [wire.Welcome()]


async def test_a_target_may_join_a_draft_without_a_vocabulary(world: World) -> None:
    await world.welcomed(b"d", hello("draft", 2, vocabulary=None))
    await world.welcomed(b"t", hello("target"))
    assert world.joined == ["draft", "target"]


@pytest.mark.parametrize("order", ["target-first", "draft-first"])
async def test_another_digest_is_settled_by_the_texts(world: World, order: str) -> None:
    both = [(b"t", hello("target")), (b"d", hello("draft", 2, vocabulary=OTHER_DIGEST))]
    for peer, said in both if order == "target-first" else reversed(both):
        await world.hello(peer, said)
    await world.answer_labels({b"t": TEXTS, b"d": TEXTS})
    assert sorted(world.joined) == ["draft", "target"]
    assert world.lost == []


async def test_a_draft_that_does_not_fit_is_refused(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"d", hello("draft", 2, vocabulary=OTHER_DIGEST))
    await world.answer_labels({b"t": TEXTS, b"d": (*TEXTS[:9], "else", *TEXTS[10:])})
    refused = world.to(b"d")[-1]
    assert isinstance(refused, wire.Refused)
    assert refused.code == "incompatible_pair"
    assert "token 9 is 't9' in the target, 'else' in the draft" in refused.reason
    assert world.roster.refusals == {"draft": refused.reason}
    assert (world.joined, world.lost) == (["target"], [])


async def test_a_draft_has_to_go_for_a_target_that_it_does_not_fit(world: World) -> None:
    await world.welcomed(b"d", hello("draft", 2, vocabulary=VOCABULARY.changed(kind="spm")))
    await world.welcomed(b"t", hello("target"))
    refused = world.to(b"d")[-1]
    assert isinstance(refused, wire.Refused)
    assert refused.code == "incompatible_pair"
    assert [role for role, _ in world.lost] == ["draft"]
    assert [member.peer for member in world.roster.members] == [b"t"]


async def test_a_target_is_compared_with_each_draft_and_those_that_do_not_fit_leave(
    world: World,
) -> None:
    await world.welcomed(b"d", hello("draft", 2))
    await world.welcomed(b"e", hello("draft", 3, vocabulary=VOCABULARY.changed(kind="spm")))
    await world.welcomed(b"f", hello("draft", 4, vocabulary=None))
    await world.welcomed(b"t", hello("target"))
    assert world.lost == [("draft", world.lost[0][1])]
    assert [member.peer for member in world.roster.members] == [b"d", b"f", b"t"]
    assert isinstance(world.to(b"e")[-1], wire.Refused)
    assert world.roster.refusals == {}  # the pipeline has a draft


async def test_a_draft_is_not_refused_for_a_target_that_leaves_meanwhile(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"d", hello("draft", 2, vocabulary=OTHER_DIGEST))
    world.roster.on_gone(b"t")
    await turns()
    assert world.to(b"d")[-1] == wire.Welcome()


@pytest.mark.parametrize("texts", [TEXTS[:7], ()], ids=["too-few", "none"])
async def test_a_draft_that_cannot_tell_its_texts_does_not_fit(
    world: World, texts: tuple[str, ...]
) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"d", hello("draft", 2, vocabulary=OTHER_DIGEST))
    await world.answer_labels({b"t": TEXTS, b"d": texts})
    assert "cannot tell the texts" in world.roster.refusals["draft"]


async def test_one_that_goes_while_it_is_looked_at_does_not_join(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"d", hello("draft", 2, vocabulary=OTHER_DIGEST))
    world.roster.on_gone(b"d")
    await world.answer_labels({b"t": TEXTS})
    assert world.joined == ["target"]
    assert world.role_of(b"d") is None
    assert world.to(b"d") == [wire.Who()]  # it may come back on this connection


async def test_a_draft_is_looked_at_again_if_the_target_changed_meanwhile(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.hello(b"d", hello("draft", 2, vocabulary=OTHER_DIGEST))
    call = next(one for one in world.to(b"t") if isinstance(one, wire.Labels)).call
    assert world.roster.on_answer(b"t", wire.LabelTexts(call, TEXTS[5:]))
    await turns()
    asked = world.to(b"d")[-1]  # now only the draft's answer is wanted
    assert isinstance(asked, wire.Labels)
    world.roster.on_gone(b"t")
    await world.welcomed(b"u", hello("target", 3, vocabulary=VOCABULARY.changed(kind="spm")))
    assert world.roster.on_answer(b"d", wire.LabelTexts(asked.call, TEXTS[5:]))
    await turns()
    assert world.roster.of("draft") == []
    assert "vocabulary type is spm" in world.roster.refusals["draft"]


# ---- leaving ------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["target", "draft"])
async def test_one_that_falls_silent_is_lost_once(world: World, role: Role) -> None:
    await world.welcomed(b"w", hello(role))
    looks(world, LOST_S)
    assert world.lost == []
    looks(world, 0.5)
    world.roster.look()
    assert world.lost == [(role, f"the {role} worker has not been heard of for 10 s")]
    assert world.roster.of(role) == []


def looks(world: World, seconds: float) -> None:
    """A look every quarter of a second."""
    for _ in range(int(seconds * 4)):
        world.now += 0.25
        world.roster.look()


async def test_nobody_waits_for_a_draft_that_is_paused_and_it_comes_back(world: World) -> None:
    await world.welcomed(b"d", hello("draft"))
    looks(world, SILENT_S)
    assert (world.paused, bool(world.roster.drafts)) == ([], True)
    looks(world, 5.0)
    assert (world.paused, bool(world.roster.drafts)) == ([True], False)
    world.beat(b"d", 1, False)
    assert (world.paused, bool(world.roster.drafts)) == ([True, False], True)
    looks(world, SILENT_S)
    assert world.lost == []


async def test_a_target_that_was_paused_goes_on_where_it_stood(world: World) -> None:
    """Its evaluation has not made progress for 9 s then, and that is no wonder."""
    await world.welcomed(b"t", hello("target"))
    world.beat(b"t", 1, True)
    looks(world, 9.0)
    world.beat(b"t", 1, True)
    looks(world, 0.5)
    assert (world.lost, world.paused) == ([], [])


@pytest.mark.parametrize("pause_s", [1.5, 60.0, 86_400.0])
async def test_whoever_was_paused_reads_before_it_judges_others(
    world: World, pause_s: float
) -> None:
    await world.welcomed(b"t", hello("target"))
    await world.welcomed(b"d", hello("draft", 2))
    looks(world, 0.5)
    world.now += pause_s
    world.roster.look()
    assert (world.lost, world.paused) == ([], [])
    looks(world, LOST_S + 0.25)  # they are really gone
    assert [role for role, _ in world.lost] == ["target", "draft"]


async def test_whatever_it_says_shows_that_it_is_there(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    for _ in range(2 * int(LOST_S / SILENT_S)):
        world.now += SILENT_S
        world.beat(b"t", 1, False)
        world.roster.look()
    assert world.lost == []


def pass_time(world: World, seconds: float, steps: list[int], busy: bool) -> None:
    """A beat every half second, `steps` in turn, and a look after each."""
    for beat in range(int(seconds * 2)):
        world.now += 0.5
        if world.roster.of("target"):
            world.beat(b"t", steps[beat % len(steps)], busy)
        world.roster.look()


async def test_one_that_beats_but_does_not_progress_is_dropped(world: World) -> None:
    member = await world.welcomed(b"t", hello("target"))
    pass_time(world, 1, [3], busy=True)
    moved, stall_s = member.moved, member.stall_s()
    assert (moved, stall_s) == (100.5, 8.0)
    pass_time(world, stall_s - 0.5, [3], busy=True)
    assert world.lost == []
    pass_time(world, 0.5, [3], busy=True)
    assert world.lost == [("target", "the target worker makes no progress")]
    assert world.to(b"t")[-1] == wire.Refused("worker_unavailable", "it makes no progress")


async def test_a_slow_model_has_more_time_to_progress(world: World) -> None:
    member = await world.welcomed(b"t", hello("target", curve_s=(0.2, 0.3)))
    assert member.stall_s() == pytest.approx(40.0)
    pass_time(world, 39, [3], busy=True)
    assert world.lost == []
    pass_time(world, 3, [3], busy=True)
    assert world.lost == [("target", "the target worker makes no progress")]


async def test_one_that_has_nothing_to_do_is_never_dropped(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    pass_time(world, 200, [3], busy=False)
    assert world.lost == []


async def test_one_that_gets_to_work_after_a_long_rest_has_all_its_time(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    pass_time(world, 200, [3], busy=False)
    pass_time(world, 8, [3], busy=True)
    assert world.lost == []
    pass_time(world, 1, [3], busy=True)
    assert len(world.lost) == 1


async def test_one_that_progresses_slowly_is_kept(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    for step in range(20):
        pass_time(world, 7.5, [step], busy=True)
    assert world.lost == []


async def test_a_connection_that_ends_is_a_worker_lost(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    world.roster.on_gone(b"x")
    assert world.lost == []
    world.roster.on_gone(b"t")
    assert world.lost == [("target", "the target worker is gone")]
    with pytest.raises(WorkerLost, match="it may be loading"):
        world.roster.target()


# ---- questions ----------------------------------------------------------------------------------


class Asked:
    """A question to a target, on its way."""

    def __init__(self, world: World, member: Member) -> None:
        self.task = asyncio.ensure_future(
            world.roster.ask(member, lambda call: wire.Tokenize(call, "text", True), wire.Tokens)
        )
        self.world = world

    async def call(self) -> int:
        await turns()
        question = self.world.to(b"t")[-1]
        assert isinstance(question, wire.Tokenize)
        return question.call


async def test_an_answer_of_another_kind_is_none(world: World) -> None:
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    assert world.roster.on_answer(b"t", wire.Rendered(await asked.call(), "text"))
    with pytest.raises(ProtocolError, match="of another kind"):
        await asked.task


async def test_an_answer_reaches_whoever_asked(world: World) -> None:
    target = await world.welcomed(b"t", hello("target"))
    one, two = Asked(world, target), Asked(world, target)
    await turns()
    first, second = (m.call for m in world.to(b"t") if isinstance(m, wire.Tokenize))
    assert world.roster.on_answer(b"t", wire.Tokens(second, (2,)))
    assert world.roster.on_answer(b"t", wire.Tokens(first, (1,)))
    assert await one.task == wire.Tokens(first, (1,))
    assert await two.task == wire.Tokens(second, (2,))


async def test_a_failure_is_raised_as_the_error_that_it_was(world: World) -> None:
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    failed = wire.Failed(await asked.call(), "invalid_request", "no such template")
    assert world.roster.on_answer(b"t", failed)
    with pytest.raises(BadRequest, match="no such template"):
        await asked.task


async def test_an_answer_that_comes_twice_or_too_late_is_nothing(world: World) -> None:
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    answer = wire.Tokens(await asked.call(), (1,))
    for _ in range(2):
        assert world.roster.on_answer(b"t", answer)
    assert await asked.task == answer
    assert world.roster.on_answer(b"t", answer)


async def test_somebody_else_cannot_answer(world: World) -> None:
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    call = await asked.call()
    assert not world.roster.on_answer(b"x", wire.Tokens(call, (666,)))
    assert not world.roster.on_answer(b"x", wire.Failed(call, "busy", "no"))
    assert world.roster.on_answer(b"t", wire.Tokens(call, (1,)))
    assert (await asked.task).tokens == (1,)


async def test_no_two_coordinators_ask_under_the_same_numbers(world: World) -> None:
    """A worker may answer what an earlier one has asked, over the connection to the next."""
    other = World()
    asked = [Asked(one, await one.welcomed(b"t", hello("target"))) for one in (world, other)]
    mine, others = [await one.call() for one in asked]
    assert mine != others
    assert not world.roster.on_answer(b"t", wire.Failed(others, "busy", "no"))
    world.roster.on_answer(b"t", wire.Tokens(others, (666,)))
    world.roster.on_answer(b"t", wire.Tokens(mine, (1,)))
    assert (await asked[0].task).tokens == (1,)
    asked[1].task.cancel()
    await other.roster.close()


async def test_the_failure_of_a_request_answers_no_question(world: World) -> None:
    await world.welcomed(b"t", hello("target"))
    assert not world.roster.on_answer(b"t", wire.Failed(1 << 61, "busy", "no"))


async def test_a_question_fails_with_the_worker_that_was_asked(world: World) -> None:
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    await asked.call()
    world.roster.lose(world.roster.target(), "the target worker is gone")
    with pytest.raises(WorkerLost, match="is gone"):
        await asked.task


async def test_a_question_to_one_worker_outlives_the_other(world: World) -> None:
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    await world.welcomed(b"d", hello("draft", 2))
    call = next(m.call for m in world.to(b"t") if isinstance(m, wire.Tokenize))
    world.roster.lose(world.roster.drafts[0], "it is gone")
    assert world.roster.on_answer(b"t", wire.Tokens(call, (1,)))
    assert (await asked.task).tokens == (1,)


async def test_nobody_is_waited_for_for_long(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "ANSWER_S", 0.0)
    asked = Asked(world, await world.welcomed(b"t", hello("target")))
    with pytest.raises(RequestTimeout, match="target worker has not answered") as found:
        await asked.task
    assert isinstance(found.value, OutriderError)
