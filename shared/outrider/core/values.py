"""The values that workers, sessions and clients hand to each other, each defined once.

They are what the wire carries, too: frozen structs whose fields are bounded where they enter a
process (`outrider.wire.codec`), so nothing is copied from one form into another on its way.

| value | made by | for |
| --- | --- | --- |
| `Drafted` | a drafter | the stock of the session, and the client (`Fragment.drafted`) |
| `Proposal` | the draft worker | the session: tokens drafted one behind the other |
| `Sides` | the draft worker | the session: what it has drafted for the case that it is wrong |
| `Verify` | the session | the target worker: the block to verify |
| `Verdict` | `decoding.verify`, completed by the target worker | the session |
| `Token`, `TopLogprob`, `Fragment` | the session | the client: what was committed |
| `Span` | the session | the client: when which worker computed |
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, TypeAlias

import msgspec
from msgspec import Meta as Meta  # bounds; other modules import it from here

BLOCK_LIMIT = 1 << 10  # most tokens of a block on the wire
MOST_TOKENS = 1 << 18  # of a text on the wire
MOST_TOP_LOGPROBS = 20
MOST_SIDES, MOST_BESIDE = 16, 32  # sides of a block, and tokens of a side

Id: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenId: TypeAlias = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
TokenIds: TypeAlias = Annotated[tuple[TokenId, ...], Meta(max_length=MOST_TOKENS)]
Block: TypeAlias = Annotated[tuple[TokenId, ...], Meta(max_length=BLOCK_LIMIT)]
Pieces: TypeAlias = Annotated[tuple[bytes, ...], Meta(max_length=BLOCK_LIMIT)]
Floats: TypeAlias = Annotated[tuple[float, ...], Meta(max_length=BLOCK_LIMIT)]
Seconds: TypeAlias = Annotated[float, Meta(ge=0.0, le=1e6)]
Probability: TypeAlias = Annotated[float, Meta(ge=0.0, le=1.0)]
TopCount: TypeAlias = Annotated[int, Meta(ge=0, le=MOST_TOP_LOGPROBS)]
Word: TypeAlias = Annotated[str, Meta(max_length=256)]
Text: TypeAlias = Annotated[str, Meta(max_length=1 << 20)]

Floors: TypeAlias = Annotated[tuple[float, ...], Meta(max_length=64)]

Role: TypeAlias = Literal["target", "draft"]
Mode: TypeAlias = Literal["plain", "sync", "pipelined"]
AskedMode: TypeAlias = Literal["plain", "sync", "pipelined", "auto"]
Kind: TypeAlias = Literal["drafted", "corrected", "bonus", "plain"]
Reason: TypeAlias = Literal["stop", "length", "cancelled"]

# who may speak in a conversation: a template writes the word next to its markers, unescaped
CHAT_ROLES = ("system", "developer", "user", "assistant", "tool", "function")


class Value(msgspec.Struct, frozen=True, array_like=True, forbid_unknown_fields=True):
    """A frozen record; on the wire an array of its fields."""

    def changed(self, **fields: Any) -> Self:
        """A copy with other values in these fields."""
        return msgspec.structs.replace(self, **fields)

    def as_dict(self) -> dict[str, Any]:
        """Its fields by name."""
        return msgspec.structs.asdict(self)


class Order(Value, frozen=True, tag=str.lower):
    """A value sent to a worker, or by one: on the wire its name stands before its fields."""


class Drafted(Value, frozen=True):
    """One drafted token, and how sure the drafter is that the target will choose the same."""

    token: TokenId
    confidence: Probability
    free: bool = False  # no model has drafted it: it followed here before


Stretch: TypeAlias = Annotated[tuple[Drafted, ...], Meta(max_length=BLOCK_LIMIT)]


class Proposal(Order, frozen=True):
    """Tokens drafted in `lineage`: the first at `position`, the others in order behind it."""

    lineage: Count
    position: Count
    drafted: Stretch
    elapsed_s: Seconds  # drafting them took this long
    waited_s: Seconds = 0.0  # before that, the drafter worked for other requests
    paused: bool = False  # nothing follows before the next commit; see `events.Commit`
    recalled: Stretch = ()  # what it would have drafted in place of the text's last tokens
    requests: Count = 1  # that shared the last pass of the draft
    # drafted before, for the case that the target chooses what it then has chosen
    foreseen: bool = False

    def hindsight(self, text: Sequence[TokenId]) -> list[tuple[bool, float]]:
        """Whether each recalled token is the one in `text`, and how sure the draft was."""
        actual = text[: self.position][-len(self.recalled) :]
        pairs = zip(self.recalled, actual, strict=False)
        return [(one.token == token, one.confidence) for one, token in pairs]

    def joined(self, later: Proposal) -> Proposal:
        """This proposal and the `later` one that follows it, as one."""
        return self.changed(
            drafted=(*self.drafted, *later.drafted),
            elapsed_s=self.elapsed_s + later.elapsed_s,
            paused=later.paused,
            requests=later.requests,
        )


class Side(Value, frozen=True):
    """What may stand from `place` on instead of what was drafted there: a correction, and more.

    The confidence of the first is how likely it is the right one if the drafted token is not.
    """

    place: Count
    drafted: Annotated[tuple[Drafted, ...], Meta(min_length=1, max_length=MOST_BESIDE)]


Beside: TypeAlias = Annotated[tuple[Side, ...], Meta(max_length=MOST_SIDES)]


class Sides(Order, frozen=True):
    """The sides of `lineage` that are likeliest to be of use; those told before are void."""

    lineage: Count
    sides: Beside


class Verify(Order, frozen=True):
    """Evaluate the last token of the text and what it leaves of `drafted`, expected from `base` on.

    See `outrider.core.orders`, also for what becomes of it where the text says something else.
    """

    round: Count
    base: Count
    drafted: Block
    follows: bool = False  # it is void if the order before it is, or was not accepted whole
    until: Count = 0  # without another order, go on with plain steps up to this position
    sides: Beside = ()  # to evaluate in the same pass, for the case that the block is wrong there

    def fits(self, context: int, vocabulary: int) -> bool:
        """Whether a target with so many tokens and ids can do it, and its sides are the block's."""
        end = self.base + len(self.drafted)
        beside = [one.token for side in self.sides for one in side.drafted]
        return (
            self.until <= context
            and all(token < vocabulary for token in (*self.drafted, *beside))
            and all(self.base <= side.place < end for side in self.sides)
            and all(side.place + len(side.drafted) < context for side in self.sides)
        )

    @property
    def rows(self) -> int:
        """Of its pass, if nothing is dropped."""
        return 1 + len(self.drafted) + sum(len(side.drafted) for side in self.sides)


class Received(Value, frozen=True):
    """A committed token that a client has, and the bytes that it adds to the text."""

    id: TokenId
    piece: bytes


class TopLogprob(Value, frozen=True):
    """One of the tokens that the target found likeliest at a position, chosen or not."""

    id: TokenId
    piece: bytes  # what it would add to the text
    logprob: float

    @property
    def text(self) -> str:
        """Its bytes as text; a part of a character shows as U+FFFD."""
        return self.piece.decode("utf-8", "replace")


TopLogprobs: TypeAlias = Annotated[tuple[TopLogprob, ...], Meta(max_length=MOST_TOP_LOGPROBS)]


class Verdict(Order, frozen=True):
    """The outcome of a round: the `tokens` to commit, the first `accepted` of them as drafted.

    Behind those comes one token of the target's own: a correction, or a bonus if the whole block
    was accepted. Only an accepted end token has nothing behind it. `decoding.verify` sets
    `accepted` and `tokens`; the target worker sets the other fields. `round` is that of the latest
    order that the target has begun or dropped: a plain step of its own has no other.
    """

    accepted: Count
    tokens: Block
    round: Count = 0
    base: Count = 0  # position of the first of `tokens`
    pieces: Pieces = ()  # the bytes of each token
    margins: Floats = ()  # see `sampling.decide`
    logprobs: Floats | None = None
    elapsed_s: Seconds = 0.0  # the pass took this long
    waited_s: Seconds = 0.0  # before that, the target worked for other requests
    # drafted tokens at the end of the block that were not evaluated: the constraint forbids the
    # first of them
    forbidden: Count = 0
    rows: Count = 0  # of the pass, for all the requests that shared it; 0: it also read text
    requests: Count = 1  # that shared the pass
    cached: Count = 0  # in round 0: tokens of the prompt that need not be read
    top_logprobs: Annotated[tuple[TopLogprobs, ...], Meta(max_length=BLOCK_LIMIT)] | None = None
    beside: Count = 0  # tokens of sides that were evaluated, too
    side: Count = 0  # the block was wrong, and this side of the order right, counted from 1

    def told(self, block: int) -> Iterator[Token]:
        """Its tokens as the client is told of them; `block` drafted ones were verified."""
        own: Kind = "plain" if not block else "bonus" if self.accepted == block else "corrected"
        count = len(self.tokens)
        logprobs = self.logprobs or (None,) * count
        tops = self.top_logprobs or ((),) * count
        rows = zip(self.tokens, self.pieces, self.margins, logprobs, tops, strict=True)
        for at, (token, piece, margin, logprob, top) in enumerate(rows):
            kind: Kind = "drafted" if at < self.accepted else own
            yield Token(token, piece, self.base + at, kind, margin, logprob, top)


class Token(Value, frozen=True):
    """A committed token."""

    id: TokenId
    piece: bytes  # what it adds to the text, perhaps only part of a character
    position: Count
    kind: Kind
    margin: float  # by how much it won, in logits; see `sampling.decide`
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()  # as many as were asked for, the likeliest first

    @property
    def text(self) -> str:
        """Its bytes as text; a part of a character shows as U+FFFD."""
        return self.piece.decode("utf-8", "replace")


class ToolCallDelta(Value, frozen=True):
    """More of the call of a tool: `id` and `name` come first, then `arguments` in pieces."""

    index: Count  # of the call in the answer
    id: Word = ""
    name: Text = ""
    arguments: Text = ""


class Fragment(Value, frozen=True):
    """What one round committed. `text` has whole characters only, so it may lag behind `tokens`.

    `drafted` is the block that was verified in that round. `tool_calls` is the client's finding:
    what stands in there is not in `text`.
    """

    round: Count
    text: Text
    tokens: Annotated[tuple[Token, ...], Meta(max_length=BLOCK_LIMIT)]
    drafted: Stretch
    tool_calls: Annotated[tuple[ToolCallDelta, ...], Meta(max_length=BLOCK_LIMIT)] = ()


class Span(Value, frozen=True):
    """When a worker computed for a request, on the coordinator's clock."""

    lane: Role
    start: float
    end: float
    rows: Count  # of the pass; or how many tokens were drafted
    number: Count  # the round, or the lineage
    base: Count  # where `tokens` begin
    tokens: Block  # what was chosen or drafted
    confidences: Floats = ()  # of drafted ones: how sure the draft was of each
    free: Count = 0  # and how many of them no model has drafted
    foreseen: bool = False  # they were drafted before, for the case that this comes before them
    beside: Count = 0  # how many of the rows were of sides


def ids_of(drafted: Sequence[Drafted]) -> tuple[TokenId, ...]:
    """The token ids alone."""
    return tuple(one.token for one in drafted)
