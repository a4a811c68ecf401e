"""What an answer may say: JSON, JSON of a schema, tool calls, or the texts of a grammar.

The target chooses among the allowed tokens only, before its settings' filters and noise see any
other. So an answer depends on prompt, settings, seed and constraint alone, and the draft, held to
the same constraint, agrees more often. `outrider.engines.constraints` makes the matchers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from outrider.core.sampling import Scores
from outrider.core.values import Meta, TokenId, Value, Word
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

    def allowed(self, answer: Sequence[TokenId]) -> Mask:
        """Which tokens may follow `answer`; end tokens where it may end.

        Raises BadRequest if none may, or if finding out would take too long.
        """

    def legal(self, answer: Sequence[TokenId], drafted: Sequence[TokenId]) -> int:
        """How many of the `drafted` tokens are allowed behind `answer`, one behind the other."""


def constrained(row: Scores, matcher: Matcher | None, answer: Sequence[TokenId]) -> Scores:
    """The logits of `row`, at minus infinity for tokens that may not follow `answer`."""
    if matcher is None:
        return row
    scores: Scores = np.where(matcher.allowed(answer)[: row.size], row, np.float32(-np.inf))
    return scores
