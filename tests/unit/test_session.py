"""`Session`, event by event: which text is committed, what each worker is told, what is counted."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from outrider.core import decoding
from outrider.core.draft_record import PATIENCE_S, DraftRecord, DraftState
from outrider.core.events import (
    Cancel,
    CloseDraft,
    Command,
    Commit,
    DraftLost,
    DraftReady,
    Event,
    Failure,
    Fault,
    Finish,
    OpenDraft,
    Prefill,
    Settle,
    Start,
    TargetLost,
    TargetReady,
    Task,
    Timer,
)
from outrider.core.pace import STEPS, TURN_STEPS, Pace
from outrider.core.reading import NOTHING, UNKNOWN, Held, Reading
from outrider.core.rules import FixedRule, Rule
from outrider.core.sampling import FAR
from outrider.core.session import OFFENCES, UNTOLD, UNTOLD_SILENT, Phase, Session
from outrider.core.stats import Stats
from outrider.core.values import (
    Drafted,
    Fragment,
    Mode,
    Proposal,
    Received,
    TokenId,
    TopLogprob,
    Verdict,
    Verify,
    ids_of,
)
from outrider.errors import WorkerLost

PROMPT = (90, 91, 92)
BASE = len(PROMPT)
END = 0
VOCABULARY = 100
STEP_S = 0.01  # of virtual time between two events

TASK = Task(PROMPT, None, (), frozenset({END}), 1000, VOCABULARY)
PREFILL = Prefill(PROMPT, TASK.sampling, False, begins=BASE)


def opened(lineage: int, base: int, tokens: tuple[TokenId, ...], until: int) -> OpenDraft:
    begins = len(TASK.prompt)
    return OpenDraft(
        lineage,
        base,
        tokens,
        TASK.sampling,
        VOCABULARY,
        (END,),
        until,
        begins=begins,
        foresees=True,
    )


class Near(Pace):
    """Messages take no time, whatever the clock of the test says: nothing is ordered ahead."""

    is_far = False
    passes_away = 0


class Ride:
    """A session, its clock and all that it has commanded."""

    def __init__(self, task: Task = TASK, rule: Rule | None = None, draft: bool = True) -> None:
        self.session = Session(task, rule or FixedRule("pipelined", 4), Stats())
        self.session.dispatch.pace = Near()
        self.now = 0.0
        self.commands: list[Command] = []
        self.last: list[Command] = []
        self.happens(Start(draft))

    def happens(self, event: Event) -> list[Command]:
        """What the event leads to, apart from settling."""
        commands = self.session.handle(event, self.now)
        settles = [command for command in commands if isinstance(command, Settle)]
        passes = any(isinstance(command, Verify) for command in commands)
        assert settles == [Settle()] or not passes
        assert not settles or self.session.phase is Phase.VERIFYING, "the target is not busy"
        assert not settles or commands[-1] == Settle()
        self.now += STEP_S
        self.last = [command for command in commands if not isinstance(command, Settle)]
        self.commands += self.last
        return self.last

    def verdict(self, *tokens: TokenId, accepted: int = 0, **changes: Any) -> list[Command]:
        session = self.session
        verdict = Verdict(
            accepted=accepted,
            tokens=tokens,
            round=session.dispatch.round,
            base=len(session.tokens),
            pieces=tuple(bytes((ord("a") + token % 26,)) if token else b"" for token in tokens),
            margins=(9.0,) * len(tokens),
            elapsed_s=STEP_S,
            rows=session.block + 1,
        )
        return self.happens(verdict.changed(**changes))

    def drafted(
        self,
        *tokens: TokenId,
        position: int | None = None,
        lineage: int | None = None,
        confidence: float = 0.9,
        free: bool = False,
        **changes: Any,
    ) -> list[Command]:
        session = self.session
        proposal = Proposal(
            lineage=session.stock.lineage if lineage is None else lineage,
            position=len(session.tokens) + len(session.stock) if position is None else position,
            drafted=tuple(Drafted(token, confidence, free=free) for token in tokens),
            elapsed_s=STEP_S,
        )
        return self.happens(proposal.changed(**changes))

    def timer(self) -> list[Command]:
        deadline = self.session.deadline
        assert deadline is not None
        self.now = max(self.now, deadline)
        return self.happens(Timer())

    def lost(self) -> list[Command]:
        return self.happens(DraftLost())

    def ready(self) -> list[Command]:
        return self.happens(DraftReady())

    def cancel(self) -> list[Command]:
        return self.happens(Cancel())

    @property
    def rides(self) -> bool:
        return self.session.draft.rides

    @property
    def is_over(self) -> bool:
        return self.session.phase is Phase.OVER

    # ---- what has come of it --------------------------------------------------------------------

    @property
    def answer(self) -> list[TokenId]:
        return self.session.tokens[BASE:]

    @property
    def stock(self) -> list[TokenId]:
        return list(ids_of(self.session.stock.drafted))

    @property
    def discarded(self) -> dict[str, int]:
        return dict(+self.session.stats.discarded)

    @property
    def text(self) -> str:
        return "".join(command.text for command in self.commands if isinstance(command, Fragment))

    @property
    def kinds(self) -> list[str]:
        return [
            token.kind
            for command in self.commands
            if isinstance(command, Fragment)
            for token in command.tokens
        ]

    def one(self, kind: type[Any]) -> Any:
        """The only command of that kind among the last ones."""
        (found,) = [command for command in self.last if isinstance(command, kind)]
        return found

    def one_or_none(self, kind: type[Any]) -> Any:
        return next((command for command in self.last if isinstance(command, kind)), None)

    def check_counts(self) -> None:
        """The identities that hold when a request is over."""
        stats, kinds = self.session.stats, Counter(self.kinds)
        assert stats.created == stats.verified + stats.discarded.total() + stats.hits
        assert stats.generated == len(self.answer) == kinds.total()
        assert kinds["drafted"] == stats.accepted - stats.truncated
        assert +Counter(stats.own) == kinds - Counter(drafted=kinds["drafted"])


def verifying(*block: TokenId, rule: Rule | None = None, task: Task = TASK) -> Ride:
    """A ride with `block` at the target, which is all that has been drafted."""
    ride = Ride(task, rule or FixedRule("pipelined", max(1, len(block))))
    ride.verdict(1)  # answered by a plain pass, as nothing has been drafted
    for token in (2, *block) if block else ():
        ride.drafted(token)
    ride.verdict(2)  # a hit, if anything was drafted: the block behind it is next
    assert (ride.session.phase, ride.session.block) == (Phase.VERIFYING, len(block))
    return ride


# --- the start ------------------------------------------------------------------------------------


def test_it_starts_with_prefill_and_the_draft_prefills_the_same() -> None:
    ride = Ride()
    assert ride.last == [PREFILL, opened(1, BASE, PROMPT, BASE + 10)]


def test_a_synchronous_draft_does_not_draft_during_prefill() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    assert ride.one(OpenDraft).until == BASE
    ride.verdict(1)
    assert ride.one(Commit).until == BASE + 1 + 4


@pytest.mark.parametrize(
    "rule", [FixedRule("plain"), FixedRule("sync", 0), FixedRule("pipelined", 0)]
)
def test_a_plain_request_opens_no_draft(rule: Rule) -> None:
    ride = Ride(rule=rule)
    assert ride.last == [PREFILL]
    assert ride.ready() == []


def test_without_a_draft_worker_it_is_plain_until_one_comes() -> None:
    ride = Ride(draft=False)
    assert ride.last == [PREFILL]
    assert ride.verdict(1)[0] == Verify(1, BASE + 1, (), until=BASE + 2 + STEPS)
    assert ride.ready() == [opened(1, BASE + 1, (*PROMPT, 1), BASE + 1 + 10)]
    assert ride.ready() == []


def test_the_first_token_comes_from_prefill_and_does_not_wait_for_the_draft() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    assert ride.answer == [1]
    assert ride.kinds == ["plain"]
    assert ride.one(Fragment).text == "b"


# --- the commit of n + 1 tokens -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "accepted", "tokens", "kinds"),
    [
        pytest.param((), 0, (7,), ["plain"], id="no-draft"),
        pytest.param((5,), 1, (5, 7), ["drafted", "bonus"], id="a-bonus"),
        pytest.param((5,), 0, (7,), ["corrected"], id="a-correction"),
        pytest.param((5, 6), 1, (5, 7), ["drafted", "corrected"], id="one-of-two"),
        pytest.param((5, 6), 2, (5, 6, 7), ["drafted", "drafted", "bonus"], id="two-of-two"),
        pytest.param((5, 6, 8, 9), 0, (7,), ["corrected"], id="none-of-four"),
    ],
)
def test_n_accepted_tokens_commit_one_more(
    block: tuple[TokenId, ...], accepted: int, tokens: tuple[TokenId, ...], kinds: list[str]
) -> None:
    ride = verifying(*block)
    stats = ride.session.stats
    before = stats.verified, stats.accepted, stats.rounds
    ride.verdict(*tokens, accepted=accepted)
    assert ride.answer == [1, 2, *tokens]
    assert ride.kinds == ["plain", "plain", *kinds]
    fragment = ride.one(Fragment)
    assert [(token.id, token.position) for token in fragment.tokens] == list(
        zip(tokens, range(BASE + 2, BASE + 9), strict=False)
    )
    assert ids_of(fragment.drafted) == block
    assert ride.one(Commit) == Commit(BASE + 2, tokens, ride.session.draft.until)
    after = stats.verified, stats.accepted, stats.rounds
    counted = tuple(b - a for a, b in zip(before, after, strict=True))
    assert counted == (len(block), accepted, bool(block))


def test_only_plain_steps_say_what_a_plain_step_takes() -> None:
    ride = verifying(5, 6)
    stats = ride.session.stats
    stats.step_s = 5.0
    ride.verdict(5, 6, 7, accepted=2)
    assert stats.step_s == 5.0
    ride.verdict(8)  # nothing was drafted
    assert STEP_S < stats.step_s < 5.0


def test_logprobs_go_with_their_tokens() -> None:
    ride = verifying(5)
    ride.verdict(5, 7, accepted=1, logprobs=(-0.5, -1.5))
    assert [token.logprob for token in ride.one(Fragment).tokens] == [-0.5, -1.5]


def test_top_logprobs_go_with_their_tokens() -> None:
    ride = verifying(5)
    tops = (TopLogprob(5, b"f", -0.5), TopLogprob(8, b"i", -1.0)), (TopLogprob(7, b"h", -1.5),)
    ride.verdict(5, 7, accepted=1, logprobs=(-0.5, -1.5), top_logprobs=tops)
    assert tuple(token.top_logprobs for token in ride.one(Fragment).tokens) == tops


def test_the_target_is_told_which_logprobs_are_wanted() -> None:
    ride = Ride(replace(TASK, logprobs=True, top_logprobs=3))
    assert ride.commands[0] == Prefill(PROMPT, TASK.sampling, True, top_logprobs=3, begins=BASE)


def test_the_workers_are_told_before_the_client() -> None:
    ride = verifying(5)
    assert list(map(type, ride.verdict(5, 7, accepted=1))) == [Verify, Commit, Fragment]


def test_a_pass_takes_what_was_drafted_in_order_and_no_more_than_a_block() -> None:
    ride = Ride(rule=FixedRule("pipelined", 2))
    ride.verdict(1)
    for token in (2, 3, 4, 5):
        ride.drafted(token)
    assert ride.verdict(2)[0] == Verify(2, BASE + 2, (3, 4))
    assert ride.verdict(3, 4, 5, accepted=2)[0] == Verify(3, BASE + 5, ())


def test_there_is_never_more_than_one_pass_under_way() -> None:
    ride = Ride()
    assert ride.drafted(1) == []
    assert ride.drafted(2) == []
    assert ride.lost() == []
    assert (ride.session.phase, ride.session.block) == (Phase.VERIFYING, 0)


# --- lineages -------------------------------------------------------------------------------------


def test_after_a_hit_the_lineage_goes_on() -> None:
    ride = Ride()
    ride.verdict(1)
    for token in (2, 3, 4):
        ride.drafted(token)
    ride.verdict(2)
    assert (ride.session.stock.lineage, ride.session.stats.hits) == (1, 1)
    assert ride.one(Verify).drafted == (3, 4)
    ride.drafted(5)
    ride.drafted(6)
    ride.verdict(3, 4, 5, accepted=2)
    assert (ride.session.stock.lineage, ride.session.stats.hits) == (1, 2)
    assert ride.stock == [6]


def test_a_correction_voids_all_that_was_drafted_behind_it() -> None:
    ride = verifying(3, 4)
    ride.drafted(5)
    ride.drafted(6)
    ride.verdict(3, 9, accepted=1)
    assert (ride.session.stock.lineage, ride.stock) == (2, [])
    assert ride.discarded == {"correction": 2}


def test_a_bonus_that_misses_voids_what_was_drafted_in_the_meantime() -> None:
    ride = verifying(3)
    ride.drafted(5)
    ride.drafted(6)
    ride.verdict(3, 9, accepted=1)
    assert (ride.session.stock.lineage, ride.stock) == (2, [])
    assert ride.discarded == {"miss": 2}


def test_what_a_broken_lineage_still_sends_is_counted_and_dropped() -> None:
    ride = verifying(3)
    ride.verdict(9)
    created = ride.session.stats.created
    assert ride.drafted(4, 5, lineage=1) == []
    assert ride.stock == []
    assert ride.discarded == {"stale": 2}
    assert ride.session.stats.created == created + 2
    ride.drafted(6, lineage=2)
    assert ride.stock == [6]


@pytest.mark.parametrize(
    ("tokens", "accepted"), [((9,), 0), ((3, 9), 1)], ids=["correction", "miss"]
)
def test_a_new_lineage_begins_where_the_old_one_broke(
    tokens: tuple[TokenId, ...], accepted: int
) -> None:
    ride = verifying(3)
    for token in (4, 5, 6):  # further than where it breaks
        ride.drafted(token)
    ride.verdict(*tokens, accepted=accepted)
    ride.drafted(7, position=BASE + 2 + len(tokens))
    assert ride.stock == [7]


def test_a_late_token_that_agrees_is_a_hit_and_keeps_the_lineage() -> None:
    ride = Ride()
    ride.verdict(1)
    ride.verdict(2)
    ride.drafted(1, position=BASE)
    ride.drafted(2, 3, position=BASE + 1)
    assert (ride.session.stock.lineage, ride.session.stats.hits) == (1, 2)
    assert ride.stock == [3]


def test_a_late_token_that_differs_ends_its_lineage() -> None:
    ride = Ride()
    ride.verdict(1)
    ride.verdict(2)
    ride.drafted(1, 7, 8, position=BASE)  # 7 where 2 is, and 8 behind it
    assert (ride.session.stock.lineage, ride.session.stats.hits, ride.stock) == (2, 1, [])
    assert ride.discarded == {"miss": 2}
    ride.drafted(9, lineage=1, position=BASE + 3)
    assert ride.discarded == {"miss": 2, "stale": 1}
    ride.drafted(3, lineage=2, position=BASE + 2)
    assert ride.stock == [3]


def test_several_lineages_may_end_one_after_the_other_on_their_way() -> None:
    ride = Ride()
    ride.verdict(1)
    ride.verdict(2)
    ride.verdict(3)
    ride.drafted(7, lineage=1, position=BASE)
    ride.drafted(7, lineage=2, position=BASE + 1)
    ride.drafted(7, lineage=3, position=BASE + 2)
    assert ride.session.stock.lineage == 4
    ride.drafted(4, lineage=4, position=BASE + 3)
    assert ride.stock == [4]


def test_a_draft_that_was_told_tokens_goes_on_behind_them() -> None:
    ride = Ride()
    ride.verdict(1)
    ride.verdict(2)
    ride.drafted(3, position=BASE + 2)  # its stream had neither 1 nor 2: both were appended
    assert (ride.session.stock.lineage, ride.stock) == (1, [3])


def test_a_rejected_block_that_was_all_there_was_still_ends_the_lineage() -> None:
    ride = verifying(3)
    ride.verdict(9)
    assert ride.session.stock.lineage == 2


def test_a_bonus_behind_which_nothing_was_drafted_yet_ends_none() -> None:
    ride = verifying(3)
    ride.verdict(3, 9, accepted=1)
    assert ride.session.stock.lineage == 1
    ride.drafted(8, position=BASE + 3)  # on its way when the bonus was committed
    assert ride.session.stock.lineage == 2


# --- where an answer ends -------------------------------------------------------------------------


def play(
    ride: Ride, truth: Callable[[int], TokenId], guess: Callable[[int], TokenId], passes: int = 500
) -> None:
    """Let a target that knows the text and a draft that guesses it run until the request ends.

    The draft has always drafted as far as it may, one token a message.
    """
    session = ride.session
    for _ in range(passes):
        if ride.is_over:
            return
        while session.draft.rides and not ride.is_over:
            position = len(session.tokens) + len(session.stock)
            if position >= session.draft.until or (ride.stock and ride.stock[-1] in TASK.ends):
                break
            ride.drafted(guess(position))
        verify = next(c for c in reversed(ride.commands) if isinstance(c, Verify | Prefill))
        block = verify.drafted if isinstance(verify, Verify) else ()
        base = len(session.tokens)
        choices = map(truth, range(base, base + len(block) + 1))
        verdict = decoding.verify(block, choices, TASK.ends)
        ride.verdict(*verdict.tokens, accepted=verdict.accepted)
    raise AssertionError(f"not over after {passes} passes")


def text_of(position: int) -> TokenId:
    return 1 + position * 7 % 50


GUESSES: dict[str, Callable[[int], TokenId]] = {
    "perfect": text_of,
    "always-wrong": lambda position: text_of(position) + 1,
    "every-third-wrong": lambda position: text_of(position) + (position % 3 == 0),
}


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("mode", ["plain", "sync", "pipelined"])
@pytest.mark.parametrize("n_predict", [1, 2, 17, 96])
def test_the_answer_has_exactly_as_many_tokens_as_asked_for(
    n_predict: int, mode: Mode, guess: str
) -> None:
    ride = Ride(replace(TASK, n_predict=n_predict), FixedRule(mode, 5))
    play(ride, text_of, GUESSES[guess])
    assert ride.answer == [text_of(BASE + n) for n in range(n_predict)]
    assert ride.one(Finish) == Finish("length")
    assert ride.session.stats.truncated == 0
    ride.check_counts()


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("room", [1, 2, 17])
@pytest.mark.parametrize("n_predict", [None, 500])
def test_a_full_context_ends_the_answer(n_predict: int | None, room: int, guess: str) -> None:
    ride = Ride(replace(TASK, n_predict=n_predict, context=BASE + room), FixedRule("pipelined", 5))
    play(ride, text_of, GUESSES[guess])
    assert len(ride.session.tokens) == BASE + room
    assert ride.one(Finish) == Finish("length")
    ride.check_counts()


@pytest.mark.parametrize("mode", ["sync", "pipelined"])
def test_neither_worker_is_asked_beyond_the_end_of_the_answer(mode: Mode) -> None:
    ride = Ride(replace(TASK, n_predict=9), FixedRule(mode, 5))
    play(ride, text_of, text_of)
    last = BASE + 9 - 1  # where the answer's last token stands, always the target's own
    for command in ride.commands:
        match command:
            case Verify(_, base, drafted):
                assert base + len(drafted) <= last
            case OpenDraft() | Commit():
                assert command.until <= last


def test_asked_for_no_tokens_it_still_ends() -> None:
    ride = Ride(replace(TASK, n_predict=0))
    ride.verdict(1)
    assert ride.one(Finish) == Finish("length")


def test_an_end_token_ends_the_answer_and_has_no_text() -> None:
    ride = verifying()
    ride.verdict(END, pieces=(b"<end>",))
    assert (ride.answer, ride.text) == ([1, 2, END], "bc")
    assert list(map(type, ride.last)) == [Fragment, CloseDraft, Finish]
    assert ride.one(Finish) == Finish("stop")
    ride.check_counts()


@pytest.mark.parametrize(
    ("block", "tokens", "accepted", "truncated"),
    [
        pytest.param((5, END), (5, END), 2, 0, id="accepted-as-the-last-of-a-block"),
        pytest.param((END, 5), (END,), 1, 0, id="accepted-inside-a-block"),
        pytest.param((5, 6), (5, END), 1, 0, id="as-a-correction"),
        pytest.param((5, 6), (5, 6, END), 2, 0, id="as-a-bonus"),
    ],
)
def test_an_end_token_in_a_block(
    block: tuple[TokenId, ...], tokens: tuple[TokenId, ...], accepted: int, truncated: int
) -> None:
    ride = verifying(*block)
    ride.verdict(*tokens, accepted=accepted)
    assert ride.answer == [1, 2, *tokens]
    assert ride.one(Finish) == Finish("stop")
    assert ride.session.stats.truncated == truncated
    ride.check_counts()


def test_behind_a_drafted_end_token_no_more_is_waited_for() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    assert ride.drafted(5) == []
    assert ride.drafted(END) == [Verify(1, BASE + 1, (5, END))]


def test_a_stop_string_inside_an_accepted_block_drops_what_lies_behind_it() -> None:
    ride = verifying(5, 6, 7, 8, task=replace(TASK, stop=("xy",)))
    ride.drafted(9)
    pieces = (b"a", b"x", b"yz", b"b", b"c")
    ride.verdict(5, 6, 7, 8, 11, accepted=4, pieces=pieces)
    assert ride.answer == [1, 2, 5, 6, 7]
    assert ride.text == "bca"
    assert ride.one(Finish) == Finish("stop")
    stats = ride.session.stats
    assert (stats.accepted, stats.truncated, stats.own["bonus"]) == (4, 1, 0)
    assert ride.discarded == {"stop": 1}
    ride.check_counts()


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_what_is_truncated_is_what_was_accepted_behind_the_end(stop: int) -> None:
    """The stop string is the text of the block's token number `stop`, of four and a bonus."""
    ride = verifying(5, 6, 7, 8, task=replace(TASK, stop=("!",)))
    pieces = tuple(b"!" if at == stop else b"a" for at in range(1, 6))
    ride.verdict(5, 6, 7, 8, 11, accepted=4, pieces=pieces)
    assert len(ride.answer) == 2 + stop
    assert ride.session.stats.truncated == max(0, 4 - stop)
    assert ride.session.stats.own["bonus"] == (stop == 5)
    ride.check_counts()


def test_a_stop_string_that_straddles_rounds_is_not_shown() -> None:
    ride = Ride(replace(TASK, stop=("STOP",)))
    shown = []
    for piece in (b"one S", b"T", b"O"):
        ride.verdict(1, pieces=(piece,))
        shown.append(ride.one(Fragment).text)
    assert shown == ["one ", "", ""]
    ride.verdict(1, pieces=(b"P and more",))
    assert (ride.one(Fragment).text, ride.one(Finish)) == ("", Finish("stop"))
    assert ride.text == "one "


def test_what_only_began_like_a_stop_string_is_shown_after_all() -> None:
    ride = Ride(replace(TASK, stop=("STOP",)))
    for piece in (b"S", b"T", b"!"):
        ride.verdict(1, pieces=(piece,))
    assert ride.text == "ST!"


@pytest.mark.parametrize(
    ("n_predict", "last"), [(2, 1), (9, END)], ids=["at-the-length", "at-an-end-token"]
)
def test_what_was_held_back_is_released_at_the_end(n_predict: int, last: TokenId) -> None:
    ride = Ride(replace(TASK, stop=("STOP",), n_predict=n_predict))
    ride.verdict(1, pieces=(b"ST",))
    ride.verdict(last, pieces=(b"",))
    assert ride.text == "ST"


def test_nothing_is_shown_behind_a_stop_string_not_even_half_a_character() -> None:
    ride = Ride(replace(TASK, stop=(".",)))
    ride.verdict(1, pieces=(b"end.\xe4\xb8",))
    assert ride.text == "end"


def test_a_character_over_several_tokens_comes_whole() -> None:
    ride = verifying(5, 6, 7, rule=FixedRule("pipelined", 3))
    ride.verdict(5, 6, 7, 8, accepted=3, pieces=(b"\xf0", b"\x9f\x9a", b"\x80\xe4\xb8", b"\xad"))
    assert ride.one(Fragment).text == "🚀中"


# --- a draft that breaks the rules ----------------------------------------------------------------


def garbage(
    *tokens: TokenId, ahead: int = 0, lineage: int = 0, confidence: float = 0.9
) -> dict[str, Any]:
    return {"tokens": tokens, "ahead": ahead, "lineage": lineage, "confidence": confidence}


GARBAGE = [
    pytest.param(garbage(), id="nothing"),
    pytest.param(garbage(VOCABULARY), id="an-id-outside-the-vocabulary"),
    pytest.param(garbage(5, 2**31 - 1, 5), id="one-such-id-among-others"),
    pytest.param(garbage(*[5] * 9), id="more-than-its-lead"),
    pytest.param(garbage(5, ahead=1), id="a-gap"),
    pytest.param(garbage(5, ahead=-1), id="a-token-once-more"),
    pytest.param(garbage(5, ahead=-4), id="a-token-of-the-committed-text"),
    pytest.param(garbage(5, ahead=-BASE - 3), id="a-token-of-the-prompt"),
    pytest.param(garbage(5, ahead=2**31), id="a-position-far-off"),
    pytest.param(garbage(5, lineage=1), id="a-lineage-to-come"),
    pytest.param(garbage(5, confidence=math.nan), id="not-a-number"),
    pytest.param(garbage(5, confidence=math.inf), id="infinite-confidence"),
]


def throw(ride: Ride, wrong: dict[str, Any]) -> list[Command]:
    session = ride.session
    return ride.drafted(
        *wrong["tokens"],
        position=len(session.tokens) + len(session.stock) + wrong["ahead"],
        lineage=session.stock.lineage + wrong["lineage"],
        confidence=wrong["confidence"],
    )


@pytest.mark.parametrize("wrong", GARBAGE)
def test_garbage_is_not_taken_and_the_third_piece_closes_the_draft(wrong: dict[str, Any]) -> None:
    ride = verifying(3)
    ride.drafted(4)  # its lead is four tokens, one of them verified: more than two are too many
    before = ride.stock, ride.session.stock.lineage, ride.session.stats.created
    for _ in range(OFFENCES - 1):
        assert throw(ride, wrong) == []
        assert ride.rides
    assert throw(ride, wrong) == [CloseDraft()]
    assert not ride.rides
    assert (ride.stock, ride.session.stock.lineage, ride.session.stats.created) == before
    assert ride.ready() == []  # it is not given another chance
    assert throw(ride, wrong) == []
    ride.verdict(3, 4, accepted=1)
    assert ride.answer == [1, 2, 3, 4]
    assert not any(isinstance(command, Commit) for command in ride.last)


def test_an_offence_while_the_target_waits_does_not_leave_it_waiting() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    for _ in range(OFFENCES - 1):
        ride.drafted()
        assert ride.session.deadline is not None
    step = Verify(1, BASE + 1, (), until=BASE + 2 + TURN_STEPS)
    assert ride.drafted() == [CloseDraft(), step]
    assert ride.session.deadline is None


def test_old_lineages_are_no_offence_however_many() -> None:
    ride = verifying(3)
    ride.verdict(9)
    for _ in range(2 * OFFENCES):
        ride.drafted(VOCABULARY + 1, lineage=1, position=10**6)
    assert ride.rides


def test_just_as_far_as_its_lead_a_draft_may_go() -> None:
    ride = Ride()
    ride.verdict(1)
    ride.drafted(*[5] * 10)
    assert len(ride.stock) == 10
    ride.drafted(5)
    assert len(ride.stock) == 10


# --- a draft that is lost, comes back, or is late -------------------------------------------------


def test_what_a_lost_draft_has_drafted_is_still_verified() -> None:
    ride = Ride(rule=FixedRule("pipelined", 2))
    ride.verdict(1)
    for token in (2, 3, 4, 5, 6):
        ride.drafted(token)
    ride.lost()
    assert ride.verdict(2) == [Verify(2, BASE + 2, (3, 4)), ride.one(Fragment)]
    last = Verify(3, BASE + 5, (6,), until=BASE + 7 + STEPS)
    assert ride.verdict(3, 4, 5, accepted=2)[0] == last
    assert ride.drafted(9) == []
    assert ride.stock == [6]


def test_a_lost_draft_is_not_waited_for() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    ride.drafted(2)
    assert ride.session.deadline is not None
    assert ride.lost() == [Verify(1, BASE + 1, (2,), until=BASE + 3 + STEPS)]
    assert ride.session.deadline is None
    assert ride.lost() == []


def test_a_draft_that_comes_back_goes_on_behind_what_is_in_stock() -> None:
    ride = Ride(rule=FixedRule("pipelined", 2))
    ride.verdict(1)
    for token in (2, 3, 4, 5):
        ride.drafted(token)
    ride.verdict(2)  # 3 and 4 are at the target now, 5 is in stock
    ride.lost()
    stream = (*PROMPT, 1, 2, 3, 4, 5)
    assert ride.ready() == [opened(2, BASE + 2, stream, BASE + 2 + 6)]
    ride.drafted(5, lineage=1, position=len(stream))
    assert ride.discarded == {"stale": 1}
    ride.drafted(6, lineage=2, position=len(stream))
    assert ride.stock == [3, 4, 5, 6]
    ride.verdict(3, 4, 5, accepted=2)
    assert ride.one(Commit).base == BASE + 2
    assert (ride.session.stock.lineage, ride.stock) == (2, [6])


def test_a_draft_that_came_back_may_not_repeat_what_is_in_stock() -> None:
    ride = verifying(3, 4)
    ride.lost()
    ride.ready()
    for position in (BASE + 2, BASE + 3):
        ride.drafted(3, position=position)
    assert ride.stock == [3, 4]


def test_a_correction_of_the_old_stock_breaks_the_new_drafts_lineage_too() -> None:
    ride = verifying(3, 4)
    ride.lost()
    ride.ready()
    ride.drafted(5)
    ride.verdict(9)
    assert (ride.session.stock.lineage, ride.stock) == (3, [])


def test_a_draft_that_came_during_prefill_has_the_prompt_only() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.lost()
    assert ride.ready() == [opened(2, BASE, PROMPT, BASE).changed(foresees=False)]


def test_a_late_draft_is_waited_for_until_the_deadline_and_not_again() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    ride.drafted(2)
    assert ride.session.deadline is not None
    assert ride.session.handle(Timer(), ride.session.deadline - 1e-6) == []
    stop = Commit(BASE + 1, (), until=BASE + 1)
    assert ride.timer() == [Verify(1, BASE + 1, (2,)), stop]
    assert ride.session.deadline is None
    ride.verdict(2, 3, accepted=1)
    assert ride.one(Verify) == Verify(2, BASE + 3, ())  # at once
    ride.drafted(3, position=BASE + 2)  # heard of again
    ride.verdict(4)
    assert ride.session.deadline is not None


class Sleepy(FixedRule):
    """Lets the draft rest until it is woken."""

    awake: ClassVar[bool] = False

    def lead(self, busy: bool) -> int:
        return super().lead(busy) if self.awake else 0


class Absent(Sleepy):
    """Does not even open it."""

    @property
    def drafts(self) -> bool:
        return self.awake


def test_an_idle_draft_hears_of_the_text_when_it_is_to_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ride = Ride(rule=Sleepy("pipelined", 4))
    for token in (1, 2, 3):
        ride.verdict(token)
    assert not [command for command in ride.commands if isinstance(command, Commit)]
    monkeypatch.setattr(Sleepy, "awake", True)
    ride.verdict(4)
    assert ride.one(Commit) == Commit(BASE, (1, 2, 3, 4), BASE + 4 + 10)
    ride.verdict(5)
    assert ride.one(Commit) == Commit(BASE + 4, (5,), BASE + 5 + 10)


def test_what_an_idle_draft_has_not_heard_is_bounded() -> None:
    ride = Ride(rule=Sleepy("pipelined", 4))
    for _ in range(3 * UNTOLD):
        ride.verdict(1)
    told = [command for command in ride.commands if isinstance(command, Commit)]
    assert [len(command.tokens) for command in told] == [UNTOLD + 1] * 2
    assert [command.base for command in told] == [BASE, BASE + UNTOLD + 1]


def test_a_draft_that_rests_from_the_start_is_opened_when_it_is_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ride = Ride(rule=Absent("pipelined", 4))
    ride.verdict(1)
    assert not ride.rides
    monkeypatch.setattr(Sleepy, "awake", True)
    ride.verdict(2)
    assert ride.one(OpenDraft).tokens == (*PROMPT, 1, 2)
    ride.drafted(3)
    assert ride.session.stats.created == 1


def test_each_drafted_token_puts_the_deadline_off() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    first = ride.session.deadline
    ride.drafted(2)
    second = ride.session.deadline
    assert first is not None
    assert second is not None
    assert second > ride.now


@pytest.mark.parametrize("elapsed_s", [0.0, 1e-3, 0.01, 1.0, 1e6])
def test_patience_has_its_bounds_however_slow_the_draft(elapsed_s: float) -> None:
    ride = Ride(rule=FixedRule("sync", 40))
    ride.verdict(1)
    for _ in range(30):
        at, session = ride.now, ride.session
        position = len(session.tokens) + len(session.stock)
        drafted = (Drafted(5, 0.9),)
        session.handle(Proposal(session.stock.lineage, position, drafted, elapsed_s), at)
        assert session.deadline is not None
        waited = session.deadline - at
        assert PATIENCE_S[0] - 1e-9 <= waited <= PATIENCE_S[1] + 1e-9
    usual = min(max(4 * elapsed_s, PATIENCE_S[0]), PATIENCE_S[1])
    assert waited == pytest.approx(usual, rel=0.1)


def test_without_a_deadline_the_timer_does_nothing() -> None:
    ride = Ride()
    assert ride.session.deadline is None
    assert ride.session.handle(Timer(), 1e9) == []


# --- cancelling -----------------------------------------------------------------------------------


def test_cancelling_ends_at_once_and_once_only() -> None:
    ride = verifying(3, 4)
    ride.drafted(5)
    assert ride.cancel() == [CloseDraft(), Finish("cancelled")]
    assert ride.discarded == {"cancelled": 3}
    ride.check_counts()
    assert ride.cancel() == []


def test_what_was_held_back_is_shown_before_the_cancellation() -> None:
    ride = Ride(replace(TASK, stop=("STOP",)), draft=False)
    ride.verdict(1, pieces=(b"ST",))
    assert ride.cancel() == [Fragment(1, "ST", (), ()), Finish("cancelled")]


def test_once_over_nothing_that_still_comes_has_an_effect() -> None:
    ride = verifying(3)
    late = Verdict(1, (3, 4), ride.session.dispatch.round, BASE + 2, (b"d", b"e"), (9.0, 9.0))
    ride.cancel()
    created = ride.session.stats.created
    assert ride.happens(late) == []
    assert ride.drafted(5) == []
    assert ride.lost() == []
    assert ride.ready() == []
    assert ride.session.handle(Timer(), 1e9) == []
    assert (ride.answer, ride.session.stats.created) == ([1, 2], created)


# --- verdicts that come late or cannot be ---------------------------------------------------------


@pytest.mark.parametrize("changes", [{"round": 1}, {"round": 3}, {"base": BASE + 1}], ids=repr)
def test_a_verdict_of_another_round_or_base_is_ignored(changes: dict[str, int]) -> None:
    ride = verifying(3)
    assert ride.session.dispatch.round == 2
    assert ride.verdict(3, 4, accepted=1, **changes) == []
    assert (ride.answer, ride.session.phase) == ([1, 2], Phase.VERIFYING)
    assert ride.verdict(3, 4, accepted=1) != []


def test_behind_a_verdict_that_did_not_come_the_target_reads_anew() -> None:
    """It has gone on by itself, so the next one tells. If that goes on, somebody lies."""
    ride, answer = verifying(3), [1, 2]
    for token in range(10, 10 + OFFENCES):
        (order,) = ride.verdict(9, base=BASE + len(answer) + 1)
        assert isinstance(order, Prefill)
        assert order.tokens == PROMPT + tuple(answer)
        assert ride.verdict(9, base=BASE + len(answer) + 1) == [], "it reads already"
        assert ride.verdict(token) != []
        answer.append(token)
        assert ride.answer == answer
    end = ride.verdict(9, base=BASE + len(answer) + 1)[-1]
    assert isinstance(end, Fault)
    assert "out of order" in str(end.error)


def test_a_verdict_counts_once() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    verdict = Verdict(0, (1,), 0, BASE, (b"b",), (9.0,))
    assert ride.happens(verdict) != []
    assert ride.session.phase is Phase.WAITING  # for the draft
    assert ride.happens(verdict) == []
    assert ride.answer == [1]


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        pytest.param((), {}, id="no-token"),
        pytest.param((3, 4, 5, 6), {"accepted": 3}, id="more-accepted-than-drafted"),
        pytest.param((3, 4), {"accepted": 2}, id="no-token-of-its-own"),
        pytest.param((3, 4, 5), {"accepted": 1}, id="two-tokens-of-its-own"),
        pytest.param((3, END), {"accepted": 2}, id="an-end-token-that-was-not-drafted"),
        pytest.param((8, 5), {"accepted": 1}, id="accepted-but-not-drafted"),
        pytest.param((3, 8, 5), {"accepted": 2}, id="the-second-of-them-not-drafted"),
        pytest.param((3,), {}, id="a-correction-that-was-drafted"),
        pytest.param((3, 4), {"accepted": 1}, id="a-second-correction-that-was-drafted"),
        pytest.param((VOCABULARY,), {}, id="a-token-outside-the-vocabulary"),
        pytest.param((9,), {"pieces": ()}, id="a-token-without-text"),
        pytest.param((9,), {"pieces": (b"a", b"b")}, id="a-text-without-token"),
        pytest.param((9,), {"margins": ()}, id="a-token-without-margin"),
        pytest.param((9,), {"logprobs": ()}, id="a-token-without-logprob"),
        pytest.param((9,), {"logprobs": (-1.0, -2.0)}, id="a-logprob-without-token"),
        pytest.param((9,), {"top_logprobs": ()}, id="a-token-without-top-logprobs"),
        pytest.param((9,), {"top_logprobs": ((), ())}, id="top-logprobs-without-token"),
    ],
)
def test_an_impossible_verdict_fails_the_request(
    tokens: tuple[TokenId, ...], changes: dict[str, Any]
) -> None:
    ride = verifying(3, 4)
    ride.verdict(*tokens, **changes)
    assert list(map(type, ride.last)) == [CloseDraft, Fault]
    assert "target worker broke the protocol" in str(ride.one(Fault).error)
    assert (ride.answer, ride.is_over) == ([1, 2], True)
    assert ride.verdict(9) == []


def test_while_the_target_is_idle_no_verdict_counts() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    assert ride.session.phase is Phase.WAITING
    assert ride.verdict(2) == []
    assert ride.answer == [1]


# --- times ----------------------------------------------------------------------------------------


def test_the_trace_has_every_pass_and_drafted_token_if_asked_for() -> None:
    ride = verifying(3, task=replace(TASK, trace=True))
    trace = ride.session.lessons.trace.take()
    assert [(span.lane, span.rows) for span in trace] == [
        *(("target", 1), ("draft", 1), ("draft", 1), ("target", 1))
    ]
    assert all(span.end - span.start == pytest.approx(STEP_S) for span in trace)
    assert verifying(3).session.lessons.trace.take() == ()


def all_of(commands: Iterable[Command], kind: type[Command]) -> Sequence[Command]:
    return [command for command in commands if isinstance(command, kind)]


@pytest.mark.parametrize("guess", GUESSES)
@pytest.mark.parametrize("mode", ["plain", "sync", "pipelined"])
def test_there_is_one_end_and_each_round_is_numbered(mode: Mode, guess: str) -> None:
    ride = Ride(replace(TASK, n_predict=40), FixedRule(mode, 3))
    play(ride, text_of, GUESSES[guess])
    assert len(all_of(ride.commands, Finish)) == 1
    assert isinstance(ride.commands[-1], Finish)
    rounds = [command.round for command in ride.commands if isinstance(command, Verify)]
    assert rounds == list(range(1, len(rounds) + 1))
    fragments = [c.round for c in ride.commands if isinstance(c, Fragment)]
    assert fragments == list(range(len(fragments)))
    if mode != "plain":  # else the target takes most steps by itself
        assert fragments == [0, *rounds]


# --- several requests ----------------------------------------------------------------------------


class Noted(FixedRule):
    """Keeps what it is told of times."""

    def __init__(self, mode: Mode, n_max: int) -> None:
        super().__init__(mode, n_max)
        self.round_trips: list[float] = []
        self.spent: list[float | None] = []
        self.turns: list[float | None] = []
        self.each: list[float | None] = []

    def verified(
        self,
        rows: int,
        elapsed_s: float,
        round_trip_s: float,
        requests: int = 1,
        beside: float = 0.0,
    ) -> None:
        self.round_trips.append(round_trip_s)

    def committed(self, tokens: int, spent_s: float | None) -> None:
        self.spent.append(spent_s)

    def drafted(
        self,
        each_s: float | None,
        confidences: Sequence[float],
        turn_s: float | None,
        requests: int = 1,
    ) -> None:
        self.turns.append(turn_s)
        self.each.append(each_s)


def test_waiting_behind_other_requests_is_nobodys_cost() -> None:
    rule = Noted("sync", 1)
    ride = Ride(rule=rule)
    ride.verdict(1)
    ride.now += 5.0  # the draft worker drafted for others first
    ride.drafted(2, waited_s=5.0)
    assert rule.turns == [pytest.approx(0.0, abs=2 * STEP_S)]
    ride.now += 7.0  # and so did the target
    ride.verdict(2, 3, accepted=1, waited_s=7.0)
    assert rule.round_trips == [pytest.approx(STEP_S)]
    assert rule.spent == [pytest.approx(2 * STEP_S)]
    ride.drafted(4)
    ride.verdict(4, 5, accepted=1)
    assert rule.spent[-1] == pytest.approx(2 * STEP_S), "what was waited counts once"


def test_what_a_draft_waits_while_the_target_computes_costs_nothing_anyway() -> None:
    rule = Noted("pipelined", 1)
    ride = Ride(rule=rule)
    ride.verdict(1)
    ride.now += 3.0
    ride.drafted(2, waited_s=3.0)  # during a plain step that took as long by itself
    ride.verdict(2)
    assert rule.spent == [pytest.approx(3.0 + 2 * STEP_S)]


def test_tokens_that_cost_nothing_teach_nothing_of_what_a_model_takes() -> None:
    """Nor do the model's next ones: it reads before them what it has left out."""
    rule = Noted("pipelined", 4)
    ride = Ride(rule=rule)
    ride.verdict(1)
    for token, free in enumerate((False, True, True, False, False), 2):
        ride.drafted(token, free=free)
    assert [each_s is None for each_s in rule.each] == [False, True, True, True, False]


# --- near-ties -----------------------------------------------------------------------------------


def test_close_choices_are_counted_up_to_the_end_of_the_answer() -> None:
    ride = verifying(3, 4, task=replace(TASK, stop=("!",)))
    ride.verdict(3, 4, 5, accepted=2, margins=(0.3, 2.0, 0.01), pieces=(b"a", b"!", b"b"))
    report = ride.session.stats.report()
    assert (report.near_ties, report.smallest_margin) == (1, 0.3)
    assert [token.margin for token in ride.one(Fragment).tokens] == [0.3, 2.0]


def test_an_answer_without_rivals_has_no_smallest_margin() -> None:
    ride = Ride(replace(TASK, n_predict=1))
    ride.verdict(1, margins=(FAR,))
    report = ride.session.stats.report()
    assert (report.near_ties, report.smallest_margin) == (0, None)


# --- a target that is lost ------------------------------------------------------------------------


def test_a_target_that_is_lost_is_no_loss_to_the_text() -> None:
    ride = verifying(3, 4)
    round_ = ride.session.dispatch.round
    assert ride.happens(TargetLost()) == []
    assert (ride.session.phase, ride.session.deadline) == (Phase.LOST, None)
    assert ride.stock == [3, 4]  # as good as before
    (order,) = ride.happens(TargetReady())
    assert order == PREFILL.changed(tokens=(*PROMPT, 1, 2), round=round_ + 1)
    assert ride.happens(TargetReady()) == []
    ride.verdict(3)
    assert ride.one(Verify).drafted == (4,)
    assert (ride.answer, ride.text) == ([1, 2, 3], "bcd")
    ride.verdict(END)
    assert ride.one(Finish) == Finish("stop")
    ride.check_counts()


def test_what_a_lost_target_says_late_is_stale() -> None:
    ride = verifying(3)
    late = Verdict(1, (3, 4), ride.session.dispatch.round, BASE + 2, (b"d", b"e"), (9.0, 9.0))
    for _ in range(2):
        ride.happens(TargetLost())
        assert ride.happens(late) == []
        ride.happens(TargetReady())
        assert ride.happens(late) == []
    assert ride.answer == [1, 2]
    ride.verdict(3)
    assert ride.answer == [1, 2, 3]


def test_a_draft_may_come_and_go_and_draft_while_there_is_no_target() -> None:
    ride = verifying(3)
    ride.happens(TargetLost())
    ride.drafted(4)
    assert ride.stock == [3, 4]
    assert ride.lost() == []
    assert ride.one_or_none(OpenDraft) is None
    ride.ready()
    assert ride.one(OpenDraft).tokens == (*PROMPT, 1, 2, 3, 4)
    ride.happens(TargetReady())
    ride.verdict(9)
    assert ride.stock == []


def test_a_request_without_a_target_is_cancelled_and_fails_as_any_other() -> None:
    error = WorkerLost("it is gone", "target")
    for event, last in ((Cancel(), Finish("cancelled")), (Failure(error), Fault(error))):
        ride = verifying(3)
        ride.happens(TargetLost())
        assert ride.happens(event) == [CloseDraft(), last]
        assert ride.happens(TargetReady()) == []


def test_the_time_without_a_target_is_no_part_of_what_passes_cost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(FixedRule, "committed", lambda self, *seconds: seen.append(seconds))
    ride = verifying(3)
    ride.happens(TargetLost())
    ride.now += 60
    ride.happens(TargetReady())
    seen.clear()
    ride.verdict(3, rows=0)
    assert seen == []
    ride.verdict(4)
    assert [tokens for tokens, _ in seen] == [1]


# --- an answer that was begun before --------------------------------------------------------------


def received(*tokens: TokenId) -> tuple[Received, ...]:
    return tuple(Received(token, bytes((ord("a") + token,))) for token in tokens)


def test_an_answer_that_was_begun_goes_on_with_the_next_token() -> None:
    ride = Ride(replace(TASK, received=received(1, 2), n_predict=4))
    opening = ride.one(OpenDraft)
    assert ride.one(Prefill) == PREFILL.changed(tokens=(*PROMPT, 1, 2))
    assert (opening.tokens, opening.begins) == ((*PROMPT, 1, 2), BASE)
    ride.verdict(3)
    assert ride.text == "d"  # what was received is not said again
    ride.verdict(4)
    assert ride.one(Finish) == Finish("length")
    report = ride.session.stats.report()
    assert (report.generated_tokens, report.resumed_tokens) == (4, 2)


def test_text_that_was_held_back_of_what_was_received_is_said() -> None:
    """Of a stop string, and of a character."""
    ride = Ride(replace(TASK, received=received(1, 2), stop=("cx",)))
    ride.verdict(3)
    assert ride.text == "cd"
    half = (Received(1, "é".encode()[:1]),)
    ride = Ride(replace(TASK, received=half))
    ride.verdict(2, pieces=("é".encode()[1:],))
    assert ride.text == "é"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"received": received(1, END)}, "stop"),
        ({"received": received(1, 2), "stop": ("bc",)}, "stop"),
        ({"received": received(1, 2), "n_predict": 2}, "length"),
        ({"received": received(1, 2), "context": BASE + 2}, "length"),
    ],
    ids=["end-token", "stop-string", "length", "context"],
)
def test_an_answer_of_which_all_was_received_ends_at_once(
    changes: dict[str, Any], reason: str
) -> None:
    ride = Ride(replace(TASK, **changes))
    assert ride.last == [Finish(reason)]  # type: ignore[arg-type]
    assert ride.session.stats.report().generated_tokens == 2


# --- states --------------------------------------------------------------------------------------


def test_a_request_that_cannot_go_on_ends_with_its_error() -> None:
    ride = verifying(3)
    error = WorkerLost("it is gone", "target")
    assert ride.happens(Failure(error)) == [CloseDraft(), Fault(error)]
    assert ride.is_over
    assert ride.happens(Failure(error)) == []


def test_the_draft_is_always_in_one_of_its_states() -> None:
    ride = Ride(rule=FixedRule("pipelined", 2, n_min=2), draft=False)
    states = [ride.session.draft.state]
    for happens in (
        ride.ready,
        lambda: ride.drafted(1, paused=True),
        lambda: ride.verdict(1),  # nothing more was to come, so the next pass is plain
        lambda: ride.verdict(2),  # now the draft is waited for
        ride.timer,
        lambda: ride.drafted(2),
        ride.lost,
    ):
        happens()
        states.append(ride.session.draft.state)
    assert states == [
        DraftState.ABSENT,
        DraftState.DRAFTING,
        DraftState.PAUSED,
        DraftState.DRAFTING,
        DraftState.DRAFTING,
        DraftState.LATE,
        DraftState.DRAFTING,
        DraftState.ABSENT,
    ]


def test_a_draft_without_an_idea_says_so_and_is_not_waited_for() -> None:
    ride = Ride(rule=FixedRule("sync", 4))
    ride.verdict(1)
    assert ride.session.deadline is not None
    assert ride.drafted(paused=True)[0] == Verify(1, BASE + 1, ())
    assert ride.session.draft.offences == 0


def test_what_a_draft_that_hangs_costs_is_counted_once() -> None:
    rule = Noted("sync", 4)
    ride = Ride(rule=rule)
    ride.verdict(1)
    ride.timer()  # nothing has come
    for token in (2, 3, 4):
        ride.verdict(token)
    waited_s, *others = rule.spent
    assert waited_s is not None
    assert waited_s > PATIENCE_S[0]
    assert others == [None, None]
    ride.drafted(5)  # it is back
    ride.verdict(6)
    assert rule.spent[-1] is not None


class Hurries(FixedRule):
    """Takes plain steps as long as the draft reads the text."""

    awaits_reading = False


def test_a_draft_that_still_reads_is_not_waited_for() -> None:
    ride = Ride(rule=Hurries("pipelined", 2))
    assert ride.verdict(1)[0] == Verify(1, BASE + 1, (), until=BASE + 2 + STEPS)
    assert ride.session.deadline is None
    usual_s = ride.session.draft.gap_s
    lineage = ride.session.stock.lineage
    ride.happens(Proposal(lineage, BASE, (Drafted(1, 1.0),), 2.0))  # with the text
    assert ride.session.draft.state is DraftState.DRAFTING
    assert ride.session.draft.gap_s == usual_s
    assert ride.session.draft.next_at <= ride.now + usual_s


def test_what_was_foreseen_shows_no_time_of_a_late_draft_either() -> None:
    record = DraftRecord(state=DraftState.LATE)
    assert record.heard(Proposal(1, BASE, (Drafted(1, 1.0),), 2.0, foreseen=True), 0.0) is None


# ---- what the draft reads -----------------------------------------------------------------------


class Reads(FixedRule):
    """Lets the draft read as told, once the target is idle; remembers what it was told."""

    def __init__(self, reading: Reading) -> None:
        super().__init__("sync", 4)
        self.reading, self.dismissing = reading, False
        self.asked: list[tuple[int, int, int, bool]] = []
        self.heard: list[tuple[bool, float]] = []
        self.lengths: list[int] = []

    def reads(
        self, text: int, written: int, room: int, busy: bool, held: Held = UNKNOWN
    ) -> Reading:
        self.asked.append((text, written, room, busy))
        return NOTHING if busy else self.reading

    def recalled(self, choices: Sequence[tuple[bool, float]], elapsed_s: float) -> None:
        self.heard += choices

    @property
    def dismisses(self) -> bool:
        return self.dismissing

    def ended(self, written: int) -> None:
        self.lengths.append(written)


def test_the_draft_reads_what_the_rule_allows_when_it_allows_it() -> None:
    rule = Reads(Reading(2, 1))
    ride = Ride(replace(TASK, n_predict=9), rule)
    assert rule.asked == [(BASE, 0, 9, True)]
    (order, *_) = ride.verdict(7)
    assert isinstance(order, OpenDraft)
    assert (order.tokens, order.skip, order.recall) == ((*PROMPT, 7), 2, 1)
    assert rule.asked[1:] == [(BASE + 1, 1, 8, False)]


def test_what_the_draft_recalls_is_compared_with_the_text() -> None:
    rule = Reads(Reading(3, 2))
    ride = Ride(rule=rule)
    ride.verdict(7)
    recalled = (Drafted(92, 0.75), Drafted(8, 0.25))
    ride.drafted(position=BASE + 1, recalled=recalled)
    assert rule.heard == [(True, 0.75), (False, 0.25)]
    assert ride.session.draft.offences == 0


def test_a_draft_that_is_dismissed_may_come_back() -> None:
    rule = Reads(Reading(3))
    ride = Ride(rule=rule)
    ride.verdict(7)
    ride.drafted(10, 11, 12, 13)
    rule.dismissing = True
    assert CloseDraft() in ride.verdict(9)
    assert ride.session.draft.state is DraftState.IDLE
    rule.dismissing = False
    for _ in range(TURN_STEPS):  # of its own: the draft must not read meanwhile
        assert not all_of(ride.verdict(8), OpenDraft)
    assert all_of(ride.verdict(8), OpenDraft)


def test_the_rule_hears_how_long_the_answer_was() -> None:
    rule = Reads(NOTHING)
    ride = Ride(replace(TASK, n_predict=2), rule)
    ride.verdict(7)
    assert rule.lengths == []
    ride.verdict(8)
    assert rule.lengths == [2]


def test_what_the_draft_recalls_must_be_numbers() -> None:
    rule = Reads(Reading(3, 1))
    ride = Ride(rule=rule)
    ride.verdict(7)
    ride.drafted(position=BASE + 1, recalled=(Drafted(7, math.nan),))
    assert (rule.heard, ride.session.draft.offences) == ([], 1)


def test_a_recall_that_waited_behind_other_requests_is_not_charged_for_it() -> None:
    spent: list[float] = []

    class Notes(Reads):
        def committed(self, tokens: int, spent_s: float | None) -> None:
            spent.append(spent_s or 0.0)

    def committed_after(waited_s: float) -> float:
        ride = Ride(rule=Notes(Reading(3, 1)))
        ride.verdict(7)
        ride.now += waited_s
        ride.drafted(position=BASE + 1, recalled=(Drafted(7, 0.5),), waited_s=waited_s)
        ride.drafted(8, 9, 10, 11)
        ride.verdict(8, 9, 10, 11, 12, accepted=4)
        return spent[-1]

    assert committed_after(0.5) == pytest.approx(committed_after(0.0))


def test_the_speed_up_of_an_answer_without_drafts_is_none() -> None:
    """Whatever a step took at load, and however the last ones differed."""
    ride = Ride(replace(TASK, n_predict=40), FixedRule("plain"), draft=False)
    ride.session.stats.step_s = 9 * STEP_S
    for at in range(40):
        ride.now += STEP_S if at > 30 else 0.0
        ride.verdict(5)
    report = ride.session.stats.report()
    assert report.speedup == pytest.approx(1.0, abs=0.2)


def test_what_the_draft_knows_from_before_is_told_to_the_rule_and_not_read_again() -> None:
    rule = Remembers(Reading(5, 0, 3))
    ride = Ride(replace(TASK, held=Held(1, 4)), rule)
    ride.verdict(1)
    assert rule.held[-1] == Held(1, 4)
    opened = ride.one(OpenDraft)
    assert (len(opened.tokens), opened.skip) == (BASE + 1, BASE + 1 - 5)
    assert ride.session.draft.held == Held(BASE + 1 - 5, BASE + 1 - 2)


class Remembers(Reads):
    """And remembers what was held."""

    def __init__(self, reading: Reading) -> None:
        super().__init__(reading)
        self.held: list[Held] = []

    def reads(
        self, text: int, written: int, room: int, busy: bool, held: Held = UNKNOWN
    ) -> Reading:
        self.held.append(held)
        return super().reads(text, written, room, busy, held)


class Silent(FixedRule):
    """Its draft hardly ever has an idea."""

    is_silent = True


def test_a_target_goes_on_beside_a_silent_draft_which_is_told_every_few_tokens() -> None:
    ride = Ride(rule=Silent("pipelined", 4))
    assert ride.verdict(1)[0] == Verify(1, BASE + 1, (), until=BASE + 2 + STEPS)
    rest = range(2, UNTOLD_SILENT + 2)
    told = [[one for one in ride.verdict(n) if isinstance(one, Commit)] for n in rest]
    assert not any(told[:-1])
    assert told[-1][0].tokens == (1, *rest)
    assert ride.session.phase is Phase.VERIFYING
    # what comes after all stands behind the step that the target is in
    ride.drafted(51, 52, 53)
    (order,) = ride.timer() if ride.session.deadline else ride.last
    assert isinstance(order, Verify)
    assert (order.base, order.drafted) == (BASE + 1 + len(rest), (51, 52, 53))
