"""What an answer may say: JSON, JSON of a schema, tool calls, or the texts of a grammar.

The target chooses among the allowed tokens only, before its settings' filters and noise see any
other. So an answer depends on prompt, settings, seed and constraint alone, and the draft, held to
the same constraint, agrees more often. `outrider.engines.constraints` makes the matchers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.core import sampling as sampling_
from outrider.core.penalties import NO_BREAKERS, Breakers
from outrider.core.sampling import Sampling, Scores
from outrider.core.values import Drafted, Meta, TokenId, Value, Word
from outrider.errors import BadRequest

CONSTRAINT_LIMIT = 1 << 16  # bytes of a schema or a grammar

ConstraintKind: TypeAlias = Literal["json", "schema", "tools", "gbnf"]
Mask: TypeAlias = NDArray[np.bool_]  # of each token, whether it is allowed


class Constraint(Value, frozen=True):
    """What the answer has to be, as the client asks for it; BadRequest if it is too long.

    `text` is a JSON schema, functions as `outrider.client.formats.tool_calls` writes them, or a
    grammar in llama.cpp's notation; for any JSON object it is empty.
    """

    kind: ConstraintKind
    text: Annotated[str, Meta(max_length=CONSTRAINT_LIMIT)] = ""
    argument: Word = "response_format"  # the argument that it came from, to be named in errors

    def __post_init__(self) -> None:
        size = len(self.text.encode("utf-8", "replace"))
        if size > CONSTRAINT_LIMIT:
            raise BadRequest(
                f"{self.argument} has {size} bytes, more than {CONSTRAINT_LIMIT}", self.argument
            )


class Matcher(Protocol):
    """Says what a constraint allows behind an answer; one thread at a time may ask.

    Answers may be asked about in any order, but it is quick only for one that shares all but its
    last tokens with the one before.
    """

    is_slow: bool  # to say what is allowed takes much longer than to say whether one token is

    def allowed(self, answer: Sequence[TokenId]) -> Mask:
        """Which tokens may follow `answer`; end tokens where it may end.

        Raises BadRequest if none may, or if finding out would take too long.
        """

    def legal(self, answer: Sequence[TokenId], drafted: Sequence[TokenId]) -> int:
        """How many of the `drafted` tokens are allowed behind `answer`, one behind the other."""


def constrained(row: Scores, matcher: Matcher, answer: Sequence[TokenId]) -> Scores:
    """The logits of `row`, at minus infinity for tokens that may not follow `answer`."""
    scores: Scores = np.where(matcher.allowed(answer)[: row.size], row, np.float32(-np.inf))
    return scores


def decide(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    matcher: Matcher | None,
    begins: int,
    breakers: Breakers = NO_BREAKERS,
) -> tuple[TokenId, float]:
    """As `sampling.decide`, among what may follow the answer, which begins at `begins`.

    Where rivals were not asked about, the margin counts those that are not allowed, too.
    """
    if matcher is None:
        return sampling_.decide(row, sampling, history, len(history), breakers)
    answer = history[begins:]
    if _may_be_asked_afterwards(matcher, sampling):
        token, margin = sampling_.decide(row, sampling, history, len(history), breakers)
        if matcher.legal(answer, (token,)):
            return token, margin
    row = constrained(row, matcher, answer)
    return sampling_.decide(row, sampling, history, len(history), breakers)


def propose(
    row: Scores,
    sampling: Sampling,
    history: Sequence[TokenId],
    matcher: Matcher | None,
    begins: int,
    n_vocab: int,
    breakers: Breakers = NO_BREAKERS,
) -> Drafted:
    """As `sampling.propose`, in the way of `decide`; nothing is forbidden before `begins`."""
    plain = partial(
        sampling_.propose,
        sampling=sampling,
        history=history,
        position=len(history),
        n_vocab=n_vocab,
        breakers=breakers,
    )
    if matcher is None or len(history) < begins:
        return plain(row)
    answer = history[begins:]
    if _may_be_asked_afterwards(matcher, sampling):
        drafted = plain(row)
        if matcher.legal(answer, (drafted.token,)):
            return drafted
    return plain(constrained(row, matcher, answer))


def _may_be_asked_afterwards(matcher: Matcher, sampling: Sampling) -> bool:
    """Whether to choose first, and to ask what is allowed only if the choice is not.

    The likeliest token of all is the likeliest of the allowed ones, if it is allowed. But filters
    judge a token by all others.
    """
    return matcher.is_slow and sampling.changed(**_OF_ONE_TOKEN) == Sampling()


# what changes the score of a token whatever those of others are
_OF_ONE_TOKEN: dict[str, Any] = {
    name: getattr(Sampling(), name)
    for name in (
        "temperature",
        "seed",
        "logit_bias",
        "repeat_penalty",
        "repeat_last_n",
        "presence_penalty",
        "frequency_penalty",
    )
}
