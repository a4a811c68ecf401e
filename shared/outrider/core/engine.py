"""What a worker asks of a model: one interface, kept by the engines in `outrider.engines`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, Protocol, TypeAlias

from outrider.core.sampling import Scores
from outrider.core.values import Count, Meta, TokenId, Value, Word

Ends: TypeAlias = Annotated[tuple[TokenId, ...], Meta(max_length=1024)]


class Cancelled(Exception):
    """`Engine.extend` was cut short by `cancel`; the sequence has its former length."""


class EngineFault(Exception):
    """The engine could not evaluate; the sequence it concerned is empty and may be filled again."""


class Vocabulary(Value, frozen=True):
    """The fingerprint of a vocabulary: models with equal ones mean the same text by each id."""

    kind: Word  # "bpe", "spm", ..., as the model file says
    size: Count
    bos: TokenId | None
    eos: TokenId | None
    adds_bos: bool
    adds_eos: bool
    ends: Ends  # ascending ids after which a generation is over
    digest: Word  # SHA-256 over the texts of all ids, in order, each with its length


@dataclass(frozen=True, slots=True)
class Markers:
    """The control tokens by which a model fills a gap in a text: fill-in-the-middle."""

    prefix: TokenId
    suffix: TokenId
    middle: TokenId
    repository: TokenId | None = None
    file: TokenId | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine holds, and how much of it can be used."""

    name: str
    vocabulary: Vocabulary
    context: int  # tokens that one sequence can hold
    slots: int  # sequences held at once, ids 0 … slots - 1
    chunk: int  # most tokens that one pass takes
    device: str  # "cpu, 1 thread on core 0"
    # what computes: "cpu", or what tells a GPU from the others of the machine; none: it is made up
    units: tuple[str, ...] = ()
    markers: Markers | None = None  # None: it cannot fill gaps
    # sequences behind those, ids slots … slots + spare - 1, that hold copies of them and a few
    # tokens more
    spare: int = 0


class Fork(NamedTuple):
    """What a pass evaluates beside a part: other tokens behind the part's first `length`."""

    slot: int  # a spare one; afterwards it holds these `length` tokens and those of the fork
    length: int  # at least as many as the part's sequence had before
    tokens: Sequence[TokenId]  # each gets a row of logits, behind those of the part


class Part(NamedTuple):
    """What one sequence gets of a pass; see `Engine.extend`."""

    slot: int
    tokens: Sequence[TokenId]
    rows: int
    forks: Sequence[Fork] = ()


def tokens_of(part: Part) -> int:
    """How many tokens a pass evaluates for it."""
    return len(part.tokens) + sum(len(fork.tokens) for fork in part.forks)


class Engine(Protocol):
    """One model and its KV cache.

    `extend`, `extend_all`, `rewind`, `copy` and `close` belong to one owner thread; everything else
    may be called from any thread.
    """

    info: ModelInfo

    def extend(self, slot: int, tokens: Sequence[TokenId], rows: int) -> Scores:
        """Append `tokens` to the sequence in `slot`; return the logits that follow the last ones.

        The result is float32 of shape (rows, vocabulary); its last row follows the last token.
        `rows` is from 0 to len(tokens). It is a view that the next `extend` overwrites.
        Raises `Cancelled`, `EngineFault`, or ValueError for arguments out of range (checked before
        anything is touched).
        """

    def extend_all(self, parts: Sequence[Part]) -> list[Scores]:
        """The same for several sequences in one pass; the results are in the order of `parts`.

        Each part and fork has a slot of its own, and all their tokens together are at most
        `info.chunk`. Forks are for engines with spare slots, without states of sequences.
        Where it raises `Cancelled` all have their former lengths, or longer ones where a part had
        come to be certain; an `EngineFault` empties all, and perhaps other sequences.
        """

    def rewind(self, slot: int, length: int) -> None:
        """Keep only the first `length` tokens of the sequence in `slot`; 0 frees it.

        It may keep fewer, see `length`: a memory that holds states, and not what each token added,
        goes back to the last state that it has kept. What is missing then is to be given again.
        Raises ValueError where it holds fewer, `EngineFault` where the cache cannot be cut.
        """

    def copy(self, source: int, slot: int, length: int) -> None:
        """The sequence in `slot` becomes the first `length` tokens of the one in `source`.

        Or fewer, as with `rewind`.
        Raises ValueError where that holds fewer, or is the same one.
        """

    def length(self, slot: int) -> int:
        """How many tokens the sequence in `slot` holds."""

    def cancel(self) -> None:
        """Cut short the `extend` that is running, if one is and can be; it raises `Cancelled`."""

    def tokenize(self, text: str, *, special: bool) -> list[TokenId]:
        """Token ids of `text`; with `special`, markers such as `<|im_end|>` become control tokens.

        A begin-of-text token is added where the model asks for one.
        """

    def piece(self, token: TokenId) -> bytes:
        """The bytes that `token` adds to the text, perhaps a part of a character."""

    def label(self, token: TokenId) -> str:
        """The vocabulary's own text of `token`, also of control tokens: to compare, to show."""

    def chat_template(self, name: str = "") -> str | None:
        """The model's own template, written in Jinja; None if it has none of this name."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        """(role, content) pairs as the engine itself lays them out, up to where the answer begins.

        For models without a template of their own; it knows no tools.
        """

    def close(self) -> None:
        """Free the model and its cache."""
