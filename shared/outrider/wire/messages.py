"""The messages between client, coordinator and workers.

Orders to workers, and what they report, are values of the core (`outrider.core.values`, `.events`);
an envelope adds the request here. A message carries what its receiver needs to tell it from a stale
one. Request ids, and the numbers of questions to workers, start at random in each coordinator and
are never reused, so they stand for its incarnation. A connection belongs to one incarnation of a
worker (`Hello`), so later messages on it need not repeat that. Proposals name their lineage and
position, verdicts their round and base. All of this is compared with what is awaited: by which
worker, on which request, in which round or lineage, behind which text. What differs has no effect,
and the coordinator counts it by reason (`stale_dropped_total`).
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from outrider.core import events, values
from outrider.core.constraints import Constraint
from outrider.core.engine import Vocabulary
from outrider.core.sampling import Sampling
from outrider.core.stats import Report
from outrider.core.values import (
    AskedMode,
    Count,
    Id,
    Meta,
    Probability,
    Reason,
    Role,
    Seconds,
    Span,
    Text,
    TokenIds,
    TopCount,
    Value,
    Word,
)
from outrider.errors import BadRequest, InternalError, OutriderError

PROTOCOL = 8
FRAME_LIMIT = 1 << 20  # bytes; a prompt of 200,000 tokens fits

Line: TypeAlias = Annotated[str, Meta(max_length=4096)]
Files: TypeAlias = Annotated[tuple[tuple[Word, Text], ...], Meta(max_length=256)]
Spans: TypeAlias = Annotated[tuple[Span, ...], Meta(max_length=4096)]
Leaf: TypeAlias = bool | int | float | Line | None
Table: TypeAlias = Annotated[dict[Word, Leaf], Meta(max_length=256)]
Tables: TypeAlias = Annotated[dict[Word, Leaf | Table], Meta(max_length=256)]
State: TypeAlias = Annotated[dict[Word, Leaf | Tables], Meta(max_length=256)]
Curve: TypeAlias = Annotated[tuple[Seconds, ...], Meta(min_length=1, max_length=64)]


class FunctionCall(Value, frozen=True):
    """What the assistant has called; `arguments` is the text of a JSON object."""

    id: Word
    name: Word
    arguments: Text


class Turn(Value, frozen=True):
    """One message of a conversation."""

    role: Word
    content: Text
    tool_calls: Annotated[tuple[FunctionCall, ...], Meta(max_length=128)] = ()
    tool_call_id: Word = ""  # of the call that it answers
    name: Word = ""  # of the function that was called


class Tools(Value, frozen=True):
    """The functions that the answer may call."""

    functions: Text  # a JSON array, each as OpenAI's `tools` has it
    choice: Literal["auto", "required"] = "auto"  # whether it must call one
    name: Word = ""  # of the one that it must call


Conversation: TypeAlias = Annotated[tuple[Turn, ...], Meta(max_length=1024)]


class Tagged(Value, frozen=True, tag_field="type", tag=str.lower):
    """A message: on the wire its name stands in front of its fields."""


# ---- workers and coordinator, at any time -------------------------------------------------------


class Hello(Tagged, frozen=True):
    """A worker's first word on a connection, and its answer to `Who`.

    The first three fields are the same in every protocol: see `codec`.
    """

    protocol: Count
    version: Word
    role: Role
    incarnation: Id
    model: Word
    vocabulary: Vocabulary | None  # None: a draft that takes the target's ids as they are
    context: Count
    slots: Count
    device: Word
    cores: Word  # where it computes: "host:0,1", "host:gpu 0000:01:00.0"; "": a device of its own
    # of a target, a pass over 1, 2 … rows; of a draft, one token, and one that it only reads
    curve_s: Curve
    token: Word = ""  # what the launcher gave to the workers that it started
    # a pass over one row each of 1, 2 … requests
    crowd_s: Annotated[tuple[Seconds, ...], Meta(max_length=256)] = ()
    # for whoever asks what the pair costs: bytes of its process; what computes, and how it was
    # built; what taking back evaluated tokens takes (0: not measured)
    memory: Id = 0
    build: Word = ""
    rollback_s: Seconds = 0.0
    sides: Count = 0  # of a target: sequences for what it can verify beside a block
    follows_killed: bool = False  # the worker that it replaces was killed: no crash, no hang


class Welcome(Tagged, frozen=True):
    """The worker is taken; whatever it held for an earlier coordinator is void."""


class Refused(Tagged, frozen=True):
    """The worker is not taken, or no longer wanted; it ends with this error."""

    code: Word
    reason: Line


class Who(Tagged, frozen=True):
    """The coordinator does not know this connection: say `Hello` again."""


class Beat(Tagged, frozen=True):
    """Sent every quarter of a second; `steps` counts evaluations, so a hung model shows."""

    steps: Id
    busy: bool
    computed_s: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0  # in all, of every request
    ping: Count = 0  # the number of the one that this answers at once; 0: none


class Ping(Tagged, frozen=True):
    """Sending it tells the coordinator whether the connection still stands. A worker answers one
    that has a number, which shows how long messages take.
    """

    number: Count = 0


# ---- coordinator and workers, for a request -----------------------------------------------------


class Do(Tagged, frozen=True):
    """The worker is to do this for the request."""

    request: Id
    order: events.Prefill | values.Verify | events.OpenDraft | events.Commit


class Done(Tagged, frozen=True):
    """The worker has done this for the request."""

    request: Id
    done: values.Verdict | values.Proposal | values.Sides


class Pass(Tagged, frozen=True):
    """The target is to verify a block of each of these requests, in one pass if it can."""

    orders: Annotated[tuple[tuple[Id, values.Verify], ...], Meta(max_length=256)]


class Passed(Tagged, frozen=True):
    """What one pass of the target has brought for several requests."""

    verdicts: Annotated[tuple[tuple[Id, values.Verdict], ...], Meta(max_length=256)]


class Close(Tagged, frozen=True):
    """Forget the request, cutting short what is being computed for it."""

    request: Id


class Failed(Tagged, frozen=True):
    """The call or request `id` came to nothing."""

    id: Id
    code: Word
    message: Line
    param: Word = ""  # the argument that is wrong


def failure(id: int, exc: Exception) -> Failed:
    """The message that tells of `exc`."""
    code = exc.code if isinstance(exc, OutriderError) else InternalError.code
    param = (exc.param if isinstance(exc, BadRequest) else None) or ""
    return Failed(id, code, words(exc), param[:256])


def words(exc: Exception) -> str:
    """What `exc` says, as a message can carry it: cut, and without what UTF-8 cannot express."""
    return f"{exc!s:.1000}".encode("utf-8", "backslashreplace").decode()


# ---- questions about text: client → coordinator → target worker, and back -----------------------


class Tokenize(Tagged, frozen=True):
    call: Id
    text: Text
    special: bool


class Detokenize(Tagged, frozen=True):
    call: Id
    tokens: TokenIds


class Render(Tagged, frozen=True):
    """Apply the chat template."""

    call: Id
    messages: Conversation
    tools: Tools | None = None


class Chat(Tagged, frozen=True):
    """Ask for a conversation's token ids; markers typed in its contents count as plain text."""

    call: Id
    messages: Conversation
    tools: Tools | None = None


class Infill(Tagged, frozen=True):
    """Ask for the token ids by which the model fills the gap between `prefix` and `suffix`.

    They begin with the `extra` files, as (name, text), and end with `start`, where the answer
    begins. What would leave no `room` for it is left out, the farthest from the gap first.
    """

    call: Id
    prefix: Text
    suffix: Text
    start: Text
    extra: Files
    room: Count


class Constrain(Tagged, frozen=True):
    """Ask whether answers can be held to this: it is read and compiled, and kept for a while."""

    call: Id
    constraint: Constraint


class Labels(Tagged, frozen=True):
    """Ask for the vocabulary's texts of ids start … start + count - 1."""

    call: Id
    start: Count
    count: Annotated[int, Meta(ge=1, le=4096)]


class Tokens(Tagged, frozen=True):
    """The answer to `Tokenize`, `Chat` and `Infill`."""

    call: Id
    tokens: TokenIds


class Rendered(Tagged, frozen=True):
    """The answer to `Detokenize` and `Render`."""

    call: Id
    text: Text


class Constrainable(Tagged, frozen=True):
    """The answer to `Constrain`, if it is yes."""

    call: Id


class LabelTexts(Tagged, frozen=True):
    """The answer to `Labels`."""

    call: Id
    texts: Annotated[tuple[Text, ...], Meta(max_length=4096)]


# ---- client and coordinator ---------------------------------------------------------------------


class Submit(Tagged, frozen=True):
    """Generate after `prompt` (text, token ids, or chat messages), and what was `received` of it.

    With the key of a request that is there, it is that request, asked for over a new connection.
    """

    call: Id
    prompt: Text | TokenIds
    messages: Conversation | None
    sampling: Sampling
    n_predict: Annotated[int, Meta(ge=1, le=(1 << 31) - 1)] | None
    stop: Annotated[tuple[Word, ...], Meta(max_length=16)]
    ignore_eos: bool
    logprobs: bool
    mode: AskedMode | None
    n_draft: Count | None
    trace: bool
    n_min: Count | None = None
    p_min: Probability | None = None
    top_logprobs: TopCount = 0
    cache: Word | None = ""  # texts of the same name may share what was read; None: with no other
    tools: Tools | None = None
    constraint: Constraint | None = None
    key: Word = ""  # nobody else's request has it; "": it cannot be resumed
    # of the answer, what an earlier coordinator, or this one over another connection, has said
    received: Annotated[tuple[values.Received, ...], Meta(max_length=values.MOST_TOKENS)] = ()


class Cancel(Tagged, frozen=True):
    call: Id


class Health(Tagged, frozen=True):
    call: Id


class Metrics(Tagged, frozen=True):
    """What has the coordinator counted so far?"""

    call: Id


class Stop(Tagged, frozen=True):
    """Finish what runs, then end the pipeline."""

    call: Id


class Started(Tagged, frozen=True):
    call: Id
    model: Word
    mode: Word
    prompt_tokens: TokenIds


class Progress(Tagged, frozen=True):
    """One committed block, and now and then the figures so far."""

    call: Id
    fragment: values.Fragment
    stats: Report | None  # with the first, the last, and some every 0.1 s
    spans: Spans = ()  # if a trace was asked for: those since the last message


class Finished(Tagged, frozen=True):
    call: Id
    reason: Reason
    stats: Report
    spans: Spans = ()


class HealthReport(Tagged, frozen=True):
    """The answer to `Health` and `Stop`."""

    call: Id
    report: State


class MetricsReport(Tagged, frozen=True):
    """The answer to `Metrics`: values by name, and where there are labels, by those."""

    call: Id
    metrics: State


Message: TypeAlias = (
    Hello | Welcome | Refused | Who | Beat | Ping
    | Do | Done | Pass | Passed | Close | Failed
    | Tokenize | Detokenize | Render | Chat | Infill | Constrain | Labels
    | Tokens | Rendered | Constrainable | LabelTexts
    | Submit | Cancel | Health | Metrics | Stop
    | Started | Progress | Finished | HealthReport | MetricsReport
)  # fmt: skip
