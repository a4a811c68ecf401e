"""Constraints as masks over the tokens of a vocabulary: the only module that imports llguidance.

Nothing here is taken from a tokenizer: a token is the bytes that it adds to the text, so the same
answer may be spelt in any tokens, and a model without a file has constraints, too. Tokens without
text are control tokens; no constraint allows them, but for end tokens where the answer may end.

All work is bounded by what is counted, not by a clock: what one worker refuses, every worker does.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from outrider.core.constraints import Constraint, Mask
from outrider.core.engine import Engine
from outrider.core.values import TokenId
from outrider.engines.gbnf import to_lark
from outrider.errors import BadRequest, OutriderError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

T = TypeVar("T")
_threads = threading.Lock()  # the size of stacks is set for all threads that are started

KEPT = 32  # compiled constraints

# else, where only one text can follow, it would have to be in the tokens of a tokenizer
ALL_SPELLINGS = '%llguidance {"no_forcing": true}'
# where in our own notation, which nobody has seen, the library found a mistake
PLACE = re.compile(r"^(?:at )?\d+\(\d+\): |failed to compile JSON schema: |<non-verbose/>")
DEAD_END = "there is no text by which it could go on"
STACK = 512 << 20  # bytes, of which only those in use are taken
ANY_OBJECT = '{"type": "object"}'
TAIL = "}\n</tool_call>"

# between two parts of JSON at most this: a model that likes blanks would never come to an end
BLANKS = {
    "whitespace_pattern": r"[ ]|\n{1,2}[ \t]{0,20}",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
}


class Constraints:
    """Makes matchers over the vocabulary of `engine`; any thread may ask."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._lock, self._making = threading.Lock(), threading.Lock()
        self._made: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[str, str], LLMatcher] = OrderedDict()

    def matcher(self, constraint: Constraint) -> TokenMatcher:
        """A matcher for one answer. Raises BadRequest, which names the argument.

        The first one takes up to a second. Constraints are compiled once, and kept for a while.
        """
        key = constraint.kind, constraint.text
        with self._lock:
            compiled = self._compiled.pop(key, None)
        if compiled is None:
            compiled = roomy(lambda: self._compile(constraint))
        with self._lock:
            self._compiled[key] = compiled
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return self._follower(compiled, constraint)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(max_lexer_states=10_000, verbose_errors=False)
        with failing(constraint.argument):
            made = self._tokenizer()
            compiled = LLMatcher(made, written(constraint), log_level=0, limits=limits)
            self._follower(compiled, constraint).allowed(())
        return compiled

    def _follower(self, compiled: LLMatcher, constraint: Constraint) -> TokenMatcher:
        return TokenMatcher(compiled.deep_copy(), self._engine, constraint)

    def _tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer, TokenizerWrapper

        with self._making:
            if self._made is None:
                if not self._engine.info.vocabulary.ends:
                    raise BadRequest("this model has no end token, so it cannot be held to a form")
                self._made = LLTokenizer(TokenizerWrapper(Spelling(self._engine)))
            return self._made


class TokenMatcher:
    """A `Matcher`: follows one answer through a compiled constraint."""

    def __init__(self, matcher: LLMatcher, engine: Engine, constraint: Constraint) -> None:
        self.is_slow = constraint.kind == "gbnf"  # 10 ms for 150,000 tokens, for JSON 0.1
        self._matcher, self._argument = matcher, constraint.argument
        vocabulary = engine.info.vocabulary
        self._check()
        self._size, self._ends = vocabulary.size, list(vocabulary.ends)
        self._end = self._ends[0]  # stands for all of them
        self._taken: list[TokenId] = []

    def allowed(self, answer: Sequence[TokenId]) -> Mask:
        with failing(self._argument):
            return self._allowed(answer)

    def legal(self, answer: Sequence[TokenId], drafted: Sequence[TokenId]) -> int:
        with failing(self._argument):
            return self._legal(answer, drafted)

    def _allowed(self, answer: Sequence[TokenId]) -> Mask:
        self._follow(answer)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        allowed = np.unpackbits(bits, count=self._size, bitorder="little").view(np.bool_)
        may_end = bool(allowed[self._end]) and self._matcher.is_accepting()
        allowed[self._ends] = may_end
        if not may_end and not allowed.any():
            raise refusal(self._argument, DEAD_END)
        return allowed

    def _legal(self, answer: Sequence[TokenId], drafted: Sequence[TokenId]) -> int:
        if not drafted:
            return 0
        self._follow(answer)
        if self._matcher.is_stopped():  # nothing but an end may follow
            return int(drafted[0] in self._ends)
        count: int = self._matcher.validate_tokens(self._plain(drafted))
        self._check()
        return count

    def _follow(self, answer: Sequence[TokenId]) -> None:
        """Bring the matcher behind `answer`."""
        taken, wanted = self._taken, list(answer)
        shared = len(taken)
        if taken != wanted[:shared]:
            pairs = zip(taken, wanted, strict=False)
            shared = next((n for n, (a, b) in enumerate(pairs) if a != b), len(wanted))
            self._matcher.rollback(len(taken) - shared)
        if shared < len(wanted):
            self._matcher.consume_tokens(self._plain(wanted[shared:]))
        self._taken = wanted
        self._check()

    def _plain(self, tokens: Sequence[TokenId]) -> list[TokenId]:
        """The tokens, with one end token for all."""
        return [self._end if token in self._ends else token for token in tokens]

    def _check(self) -> None:
        if self._matcher.is_error():
            error = self._matcher.get_error()
            raise refusal(self._argument, DEAD_END if "NoExtension" in error else error)


class Spelling:
    """The vocabulary of an engine, as llguidance asks for it."""

    def __init__(self, engine: Engine) -> None:
        vocabulary = engine.info.vocabulary
        self._engine = engine
        self.eos_token_id, self.bos_token_id = vocabulary.ends[0], vocabulary.bos
        pieces = list(map(engine.piece, range(vocabulary.size)))
        controls = {token for token, piece in enumerate(pieces) if not piece}
        self.special_token_ids = sorted(controls.union(vocabulary.ends))
        for token in self.special_token_ids:
            pieces[token] = engine.label(token).encode("utf-8", "replace")
        self.tokens = pieces

    def __call__(self, text: str | bytes) -> list[TokenId]:
        if isinstance(text, bytes):
            text = text.decode("utf-8", "replace")
        tokens = self._engine.tokenize(text, special=False)
        vocabulary = self._engine.info.vocabulary
        begins = vocabulary.adds_bos and tokens[:1] == [vocabulary.bos]
        return tokens[1:] if begins else tokens


# ---- what the library reads ---------------------------------------------------------------------


def written(constraint: Constraint) -> str:
    """The constraint in the library's own notation, Lark's."""
    text = constraint.text
    match constraint.kind:
        case "json":
            rules = f"start: {schema(ANY_OBJECT)}"
        case "schema":
            rules = f"start: {schema(text)}"
        case "tools":
            rules = hermes(**json.loads(text))
        case "gbnf":
            rules = to_lark(text)
    return f"{ALL_SPELLINGS}\n{rules}"


def schema(text: str) -> str:
    """A schema with our blanks instead of those that it may ask for."""
    found = json.loads(text)
    found = {} if found is True else found
    if not isinstance(found, dict):
        raise ValueError("the schema is neither an object nor true")
    return "%json " + json.dumps({**found, "x-guidance": BLANKS})


def hermes(functions: Mapping[str, Any], several: bool) -> str:
    """Calls of functions: each a line of JSON between two lines that mark it."""
    calls = [f"call{n}" for n in range(len(functions))]
    more = ' ("\\n" call)*' if several else ""
    rules = [f"start: call{more}", f"call: {' | '.join(calls)}"]
    for call, (name, parameters) in zip(calls, functions.items(), strict=True):
        head = '<tool_call>\n{"name": ' + json.dumps(name) + ', "arguments": '
        rules.append(f"{call}: {json.dumps(head)} {call}_arguments {json.dumps(TAIL)}")
        rules.append(f"{call}_arguments: {schema(json.dumps(parameters))}")
    return "\n".join(rules)


@contextmanager
def failing(argument: str) -> Iterator[None]:
    """Raise BadRequest for whatever goes wrong: a panic of the library must not end a worker."""
    try:
        yield
    except OutriderError:
        raise
    except BaseException as exc:
        raise refusal(argument, f"{exc}") from exc


def roomy(function: Callable[[], T]) -> T:
    """What `function` returns or raises, on a thread whose stack does not overflow.

    The library follows references of references by recursion. Half of what fits a constraint
    overflows a usual stack, which would end the process.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(function())
        except BaseException as exc:
            done.set_exception(exc)

    with _threads:
        usual = threading.stack_size(STACK)
        try:
            thread = threading.Thread(target=run, name="constraint", daemon=True)
            thread.start()
        finally:
            threading.stack_size(usual)
    return done.result()


def refusal(argument: str, reason: str) -> BadRequest:
    """The error for a constraint that cannot be used; the reason may be the library's."""
    reason = PLACE.sub("", reason.strip().partition("\n")[0])
    return BadRequest(f"{argument} cannot be followed: {reason:.300}", argument)
