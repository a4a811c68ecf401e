"""One request as a state machine: events in, commands out; no clock, no sockets, no tasks.

The text is `tokens`: the prompt, then what the target has committed. Ahead of it lies the `stock`,
drafted tokens in order, the first of which may be under verification. Draft worker and session
follow each other without a word about it, because both apply the same rule to the same messages:

- the draft's stream is the text it was opened with, then what it drafts;
- a `Commit` that agrees with the stream changes nothing, not even where a bonus meets a token that
  was drafted in the meantime (a hit); at the first difference the stream is cut, the truth
  appended, and a new lineage begins;
- so a drafted token is good if its lineage is the current one and the text at its position, as far
  as there is any, agrees. The first that does not is where the draft will have cut its stream, or
  is about to: what it still sends of that lineage is stale.

Nothing that the draft worker sends or fails to send can change a token: it only changes how many
rows the target's next pass has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from outrider.core.rules import Pilot, Policy
from outrider.core.sampling import Token
from outrider.core.stats import Stats
from outrider.core.text import TextStream

Kind = Literal["drafted", "corrected", "bonus", "plain"]
Reason = Literal["stop", "length", "cancelled"]
Ids = tuple[Token, ...]
Role = Literal["target", "draft"]
# lane, start, end, rows; round and base, or lineage and position; what was chosen or drafted
Span = tuple[Role, float, float, int, int, int, Ids]

PATIENCE_S = (0.02, 0.5)  # least and most wait for one drafted token
BLOCK_PATIENCE_S = 2.0  # most wait for a block that is sent as a whole
UNTOLD = 256  # committed tokens that an idle draft worker may not know of
OFFENCES = 3  # malformed drafts after which a request does without its draft worker


@dataclass(frozen=True, slots=True)
class Task:
    """What is to be generated."""

    prompt: tuple[Token, ...]
    n_predict: int | None  # exact number of tokens; None: until the context is full
    stop: tuple[str, ...]
    ends: frozenset[Token]
    context: int  # most tokens of prompt and answer together
    vocabulary: int  # ids that the target knows
    trace: bool = False


@dataclass(frozen=True, slots=True)
class Drafted:
    token: Token
    confidence: float


@dataclass(frozen=True, slots=True)
class RoundResult:
    """What the target chose from position `base` on: the `accepted` first ones as drafted."""

    round: int
    base: int
    accepted: int
    tokens: tuple[Token, ...]
    pieces: tuple[bytes, ...]
    logprobs: tuple[float, ...] | None
    elapsed_s: float


# ---- commands -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prefill:
    """The target is to evaluate the prompt and choose the first token (the verdict of round 0)."""


@dataclass(frozen=True, slots=True)
class Verify:
    round: int
    base: int
    drafted: tuple[Token, ...]


@dataclass(frozen=True, slots=True)
class OpenDraft:
    lineage: int
    base: int  # what follows it in `tokens` is not committed yet
    tokens: tuple[Token, ...]
    until: int
    floors: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Commit:
    base: int
    tokens: tuple[Token, ...]
    until: int
    floors: tuple[float, ...] = ()  # see `wire.Commit`


@dataclass(frozen=True, slots=True)
class CloseDraft:
    pass


@dataclass(frozen=True, slots=True)
class CommittedToken:
    id: Token
    piece: bytes
    position: int
    kind: Kind
    logprob: float | None


@dataclass(frozen=True, slots=True)
class Emit:
    """One committed block for the client; `drafted` is what was verified to get it."""

    round: int
    text: str
    tokens: tuple[CommittedToken, ...]
    drafted: tuple[Drafted, ...]


@dataclass(frozen=True, slots=True)
class Finish:
    reason: Reason


@dataclass(frozen=True, slots=True)
class Fault:
    """The target worker broke the protocol: the request fails."""

    message: str


Command = Prefill | Verify | OpenDraft | Commit | CloseDraft | Emit | Finish | Fault


class Session:
    """The life of one request, from `start` to the command `Finish` or `Fault`."""

    def __init__(self, task: Task, policy: Policy | Pilot, stats: Stats) -> None:
        self.task, self.policy, self.stats = task, policy, stats
        self.tokens: list[Token] = list(task.prompt)
        self.stock: list[Drafted] = []
        self.round = 0
        self.verifying: int | None = 0  # length of the block at the target; None: it is idle
        self.over = False
        self.offered = False  # a draft worker is there
        self.riding = False  # it drafts for this request
        self.lineage = 0
        self.deadline: float | None = None  # when to call `on_timer`
        self.trace: list[Span] = []
        self._heard = 0  # where the current lineage's next drafted token may stand, at the earliest
        self._floors: tuple[float, ...] = ()
        self._until = 0  # the draft's leave: it may not reach this position
        self._granted = 0  # the most it ever was: a token may have been on its way
        self._read = 0  # the draft has certainly evaluated the text up to this position
        self._told = 0  # the draft knows the committed text up to this position
        self._told_at = 0.0  # when the target has last fallen idle and the draft was told
        self._sent = 0.0  # when the target was given its block
        self._next = 0.0  # when the next drafted token is expected
        self._paused = False  # the draft has stopped by its floors, until the next commit
        self._late = False  # the draft let a deadline pass and has not been heard of since
        self._gap_s = PATIENCE_S[1] / 4  # its usual time for a token
        self._offences = 0
        self._text = TextStream(task.stop)

    # ---- events ---------------------------------------------------------------------------------

    def start(self, now: float, draft: bool) -> list[Command]:
        """Begin; `draft` says whether a draft worker is there."""
        self.stats.started = now
        return [Prefill(), *(self.on_draft_ready() if draft else [])]

    def on_draft_ready(self) -> list[Command]:
        """A draft worker is there (again): let it catch up with the text, now or when needed."""
        self.offered = True
        if self.over or self.riding or not self.policy.drafts or self._offences >= OFFENCES:
            return []
        self.riding, self._late, self._paused = True, False, False
        self.lineage += 1
        # what an earlier draft worker left in stock is part of the new one's stream
        stream = (*self.tokens, *(drafted.token for drafted in self.stock))
        self._heard, self._told, self._read = len(stream), len(self.tokens), 0
        self._grant()
        return [OpenDraft(self.lineage, len(self.tokens), stream, self._until, self._floors)]

    def on_draft_lost(self, now: float) -> list[Command]:
        """It died, hung or refused: what it drafted is still good to verify."""
        self.riding = self.offered = False
        return self._advance(now)

    def on_drafted(
        self,
        lineage: int,
        position: int,
        drafted: Sequence[Drafted],
        elapsed_s: float,
        now: float,
        paused: bool = False,
    ) -> list[Command]:
        """`drafted` stand at `position` and after it; `paused`: the floors let nothing follow."""
        if self.over or not self.riding:
            return []
        ids = tuple(one.token for one in drafted)
        if lineage < self.lineage:
            self._discard(len(drafted), "stale", created=True)
            self._record("draft", now, elapsed_s, len(drafted), lineage, position, ids)
            return []
        if not self._is_possible(lineage, position, drafted):
            return self._offend(now)
        self.stats.computed(self.stats.draft, now, elapsed_s)
        self._record("draft", now, elapsed_s, len(drafted), lineage, position, ids)
        self._late, self._paused, self._read = False, paused, position
        each_s = elapsed_s / len(drafted)
        self._gap_s += 0.2 * (each_s - self._gap_s)
        self._next = now + each_s
        confidences = [one.confidence for one in drafted]
        turn_s = now - self._told_at - elapsed_s if position == len(self.tokens) else None
        self.policy.drafted(each_s, confidences, turn_s)
        self.stats.created += len(drafted)
        for at, one in enumerate(drafted):
            where = position + at
            if where >= len(self.tokens):
                self.stock.append(one)
            elif one.token == self.tokens[where]:
                self.stats.hits += 1
                self.policy.observe(True, one.confidence)
            else:
                self.policy.observe(False, one.confidence)
                self._break(len(drafted) - at, "miss", where)
                break
            self._heard = where + 1
        return self._advance(now)

    def on_verdict(self, verdict: RoundResult, now: float) -> list[Command]:
        block = self.verifying
        if self.over or block is None:
            return []
        if (verdict.round, verdict.base) != (self.round, len(self.tokens)):
            return []  # of a round that is over
        if wrong := self._contradiction(block, verdict):
            return self._end(Fault(f"the target worker broke the protocol: {wrong}"))
        self.verifying = None
        self.stats.computed(self.stats.target, now, verdict.elapsed_s)
        passed = (block + 1, verdict.round, verdict.base, verdict.tokens)
        self._record("target", now, verdict.elapsed_s, *passed)
        if self.stats.last_commit is not None:
            self.policy.verified(block + 1, verdict.elapsed_s, now - self._sent)
            self.policy.committed(len(verdict.tokens), now - self.stats.last_commit)
            if not block:  # no others: what a pass over one row takes is not seen in them
                self.stats.step_s += 0.2 * (now - self._sent - self.stats.step_s)
        self.stats.count(block, verdict.accepted, now)
        emit, reason = self._commit(block, verdict)
        if reason:
            self._discard(len(self.stock) - block, "stop")
            return [emit, *self._end(Finish(reason))]
        self._reconcile(block, verdict.accepted, now)
        self.deadline, self._told_at = None, now
        joining = self.on_draft_ready() if self.offered else []
        following, before = self._verify(now), self._until
        self._grant()
        self._paused = False
        # a draft that neither works nor is to work hears of the text later, much of it at once
        held = len(self.tokens) - self._told
        matters = self.riding and (max(before, self._until) > len(self.tokens) or held > UNTOLD)
        # the workers first: the client's fragment can wait a microsecond
        return [*joining, *following, *([self._tell()] if matters else []), emit]

    def on_timer(self, now: float) -> list[Command]:
        """`deadline` has passed."""
        if self.deadline is None or now < self.deadline:
            return []
        self._late = True
        return self._advance(now)

    def on_cancel(self) -> list[Command]:
        if self.over:
            return []
        self._discard(len(self.stock), "cancelled")
        held = self._text.end()
        last = [Emit(self.round, held, (), ())] if held else []
        return [*last, *self._end(Finish("cancelled"))]

    # ---- the text -------------------------------------------------------------------------------

    def _commit(self, block: int, verdict: RoundResult) -> tuple[Emit, Reason | None]:
        """Append what was chosen up to the end of the answer, and say why that was reached."""
        accepted = verdict.accepted
        own: Kind = "plain" if not block else "bonus" if accepted == block else "corrected"
        text, done = "", []
        reason: Reason | None = None
        for at, (token, piece) in enumerate(zip(verdict.tokens, verdict.pieces, strict=True)):
            kind: Kind = "drafted" if at < accepted else own
            logprob = verdict.logprobs[at] if verdict.logprobs is not None else None
            done.append(CommittedToken(token, piece, len(self.tokens), kind, logprob))
            self.tokens.append(token)
            if token in self.task.ends:
                reason = "stop"
            else:
                released, stopped = self._text.feed(piece)
                text += released
                reason = "stop" if stopped else "length" if self._room() <= 0 else None
            if reason:
                text += self._text.end()
                break
        self.stats.truncated += max(0, accepted - len(done))
        if len(done) > accepted:
            self.stats.own[own] += 1
        return Emit(self.round, text, tuple(done), tuple(self.stock[:block])), reason

    def _contradiction(self, block: int, verdict: RoundResult) -> str | None:
        """What makes this verdict impossible, if anything does."""
        tokens, accepted, logprobs = verdict.tokens, verdict.accepted, verdict.logprobs
        ended = bool(tokens) and accepted == len(tokens) and tokens[-1] in self.task.ends
        if accepted > block or not (ended or len(tokens) == accepted + 1):
            return f"{accepted} accepted of {block}, but {len(tokens)} tokens"
        if len(verdict.pieces) != len(tokens) or (
            logprobs is not None and len(logprobs) != len(tokens)
        ):
            return "not one text for each token"
        if any(token >= self.task.vocabulary for token in tokens):
            return "a token outside its vocabulary"
        if any(d.token != t for d, t in zip(self.stock[:accepted], tokens, strict=False)):
            return "an accepted token that was not drafted"
        if accepted < min(block, len(tokens)) and self.stock[accepted].token == tokens[accepted]:
            return "a correction that was drafted"
        return None

    def _room(self) -> int:
        """How many tokens may still be generated."""
        room = self.task.context - len(self.tokens)
        if self.task.n_predict is not None:
            generated = len(self.tokens) - len(self.task.prompt)
            room = min(room, self.task.n_predict - generated)
        return room

    # ---- the draft ------------------------------------------------------------------------------

    def _is_possible(self, lineage: int, position: int, drafted: Sequence[Drafted]) -> bool:
        """Whether a draft worker that keeps the rules could have sent this."""
        end = len(self.tokens) + len(self.stock)
        return (
            lineage == self.lineage
            and self._heard <= position <= end
            and 0 < len(drafted) <= self._granted - position
            and all(d.token < self.task.vocabulary for d in drafted)
            and all(math.isfinite(d.confidence) for d in drafted)
        )

    def _offend(self, now: float) -> list[Command]:
        self._offences += 1
        if self._offences < OFFENCES:
            return []
        return [CloseDraft(), *self.on_draft_lost(now)]

    def _reconcile(self, block: int, accepted: int, now: float) -> None:
        """Drop from the stock what the commit covers, and all of it where they differ."""
        rest = self.stock[block:]
        for one in self.stock[:accepted]:
            self.policy.observe(True, one.confidence)
        if accepted < len(self.stock):
            good = accepted == block and rest[0].token == self.tokens[-1]
            self.policy.observe(good, self.stock[accepted].confidence)
            if not good:
                self._next = now + self._gap_s  # the draft begins anew
        if accepted < block:
            self.stock = rest
            self._break(0, "correction", len(self.tokens) - 1)
        elif rest and rest[0].token != self.tokens[-1]:
            self.stock = rest
            self._break(0, "miss", len(self.tokens) - 1)
        else:
            self.stats.hits += bool(rest)
            self.stock = rest[1:]

    def _break(self, unseen: int, reason: str, where: int) -> None:
        """The draft's stream differs from the text at position `where`: its lineage ends there."""
        self._discard(len(self.stock) + unseen, reason)
        self.stock.clear()
        self.lineage += 1
        self._heard = where + 1

    def _discard(self, count: int, reason: str, *, created: bool = False) -> None:
        self.stats.discarded[reason] += count
        self.stats.created += count if created else 0

    def _grant(self) -> None:
        """Set the draft's leave as the policy wants it now."""
        lead = self.policy.lead(busy=self.verifying is not None)
        self._until = len(self.tokens) + max(0, min(lead, self._room() - 1))
        self._granted = max(self._granted, self._until)
        self._floors = self.policy.floors if lead else ()

    def _tell(self) -> Commit:
        """What the draft does not know yet of the text, and its leave."""
        base, self._told = self._told, len(self.tokens)
        return Commit(base, tuple(self.tokens[base:]), self._until, self._floors)

    # ---- the next pass --------------------------------------------------------------------------

    def _advance(self, now: float) -> list[Command]:
        """If the target is idle, give it its next block, unless the policy waits for the draft."""
        if self.over or self.verifying is not None:
            return []
        self.deadline = None
        following = self._verify(now)
        before, drafted_to = self._until, len(self.tokens) + len(self.stock)
        self._grant()
        # it is told what it would not find out: that it may run further, or is to stop
        matters = self._until > before or drafted_to < before != self._until
        if self.riding and matters and not self._ended:
            self._paused = False
            return [*following, self._tell()]
        return following

    @property
    def _ended(self) -> bool:
        """Whether the draft has come to an end of its own: it will not go on behind it."""
        return bool(self.stock) and self.stock[-1].token in self.task.ends

    def _verify(self, now: float) -> list[Command]:
        room = self._room() - 1
        silent = not self.riding or self._late or self._paused or self._ended
        more = not silent and len(self.stock) < room
        next_s = max(0.0, self._next - now) if more else None
        block = self.policy.decide([d.confidence for d in self.stock], room, next_s)
        if block is None:
            least, most = PATIENCE_S
            patience_s = min(max(4 * self._gap_s, least), most)
            block_s = self.policy.block_s(len(self.tokens) - self._read)
            self.deadline = now + min(patience_s + block_s, BLOCK_PATIENCE_S)
            return []
        self.round += 1
        self.verifying, self._sent = block, now
        drafted = tuple(d.token for d in self.stock[:block])
        return [Verify(self.round, len(self.tokens), drafted)]

    def _record(
        self, lane: Role, now: float, elapsed_s: float, rows: int, number: int, base: int, ids: Ids
    ) -> None:
        if self.task.trace:
            # a report that was delayed may not push its lane over the one that follows
            ended = next((end for lane_, _, end, *_ in reversed(self.trace) if lane_ == lane), 0.0)
            self.trace.append((lane, max(now - elapsed_s, ended), now, rows, number, base, ids))

    def _end(self, last: Command) -> list[Command]:
        self.over, self.deadline, self.verifying = True, None, None
        self.stock.clear()
        return [*([CloseDraft()] if self.riding else []), last]
