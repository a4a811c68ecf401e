"""Constraints as masks: what they allow, where an answer may end, and what is refused in time."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.oracle import Held, alone
from tests.unit.schemas import schemas

from outrider.client.formats import tool_calls
from outrider.core.constraints import Constraint
from outrider.core.drafter import Opening
from outrider.core.reference import generate
from outrider.core.sampling import Sampling
from outrider.core.values import TokenId
from outrider.engines.constraints import Constraints, TokenMatcher
from outrider.engines.drafter import ModelDrafter
from outrider.engines.toy import ToyEngine, ToySettings
from outrider.engines.toy_text import END, SMALLEST
from outrider.errors import BadRequest

quiet = settings(derandomize=True, database=None, deadline=None)
TOY = Constraints(ToyEngine())


def matcher(kind: Any, text: str = "") -> TokenMatcher:
    return TOY.matcher(Constraint(kind, text))


def says(matcher: TokenMatcher, text: str) -> bool:
    """Whether the whole text is allowed, byte by byte, and may end there."""
    tokens = [*text.encode(), END]
    legal = matcher.legal([], tokens) == len(tokens)
    walked = all(matcher.allowed(tokens[:n])[tokens[n]] for n in range(matcher.legal([], tokens)))
    assert walked, "the mask and the check of drafted tokens disagree"
    return legal


# ---- what is allowed ----------------------------------------------------------------------------


def test_an_object_begins_with_its_bracket_and_ends_with_it() -> None:
    one = matcher("json")
    assert np.flatnonzero(one.allowed([])).tolist() == [ord("{")]
    assert not one.allowed([ord("{")])[END]
    assert np.flatnonzero(one.allowed(list(b"{}"))).tolist() == [END]


@pytest.mark.parametrize("text", ["{}", '{"a": [1, null]}', '{\n  "a": {\n    "b": "ü"\n  }\n}'])
def test_usual_json_is_allowed(text: str) -> None:
    assert says(matcher("json"), text)


@pytest.mark.parametrize("text", ["[]", " {}", "{} ", '{"a"}', "{,}", '{"a":  1}', "{\n\n\n}"])
def test_other_texts_are_not_nor_endless_blanks(text: str) -> None:
    assert not says(matcher("json"), text)


def test_a_schema_decides_on_its_blanks_as_little_as_on_ours() -> None:
    schema = {"x-guidance": {"whitespace_flexible": True, "item_separator": "x"}, "type": "array"}
    one = matcher("schema", json.dumps(schema))
    assert says(one, "[1, 2]")
    assert not says(one, "[1    ,2]")
    assert not says(one, "[1x2]")


def test_all_end_tokens_are_allowed_where_one_is() -> None:
    engine = ToyEngine()
    vocabulary = engine.info.vocabulary.changed(ends=(END, END + 2))
    engine.info = replace(engine.info, vocabulary=vocabulary)
    one = Constraints(engine).matcher(Constraint("json"))
    assert np.flatnonzero(one.allowed(list(b"{}"))).tolist() == [END, END + 2]
    assert one.legal(list(b"{}"), [END + 2]) == 1
    assert one.legal(list(b"{"), [END + 2]) == 0


def test_a_model_without_end_tokens_is_refused() -> None:
    engine = ToyEngine()
    engine.info = replace(engine.info, vocabulary=engine.info.vocabulary.changed(ends=()))
    with pytest.raises(BadRequest, match="no end token"):
        Constraints(engine).matcher(Constraint("json"))


def test_control_tokens_are_never_allowed() -> None:
    one = matcher("gbnf", 'root ::= [^"]*')
    for text in ("", "a", "<|user|"):
        controls = one.allowed(list(text.encode()))[256:]
        assert controls.tolist() == [True, *[False] * (SMALLEST - 257)]  # the end may follow


answers = st.lists(st.sampled_from([b'{"a"', b": ", b"[1", b", 2", b"]", b"}", b"\n"]), max_size=7)


@quiet
@given(st.lists(answers, min_size=2, max_size=6))
def test_it_does_not_matter_what_was_asked_before(asked: list[list[bytes]]) -> None:
    used = matcher("json")
    for parts in asked:
        answer: Sequence[TokenId] = list(b"".join(parts))
        fresh = matcher("json")
        answer = answer[: fresh.legal([], answer)]
        assert np.array_equal(used.allowed(answer), matcher("json").allowed(answer))
        assert used.legal(answer, list(b"}}")) == matcher("json").legal(answer, list(b"}}"))


def test_matchers_of_one_constraint_do_not_disturb_each_other() -> None:
    one, other = matcher("json"), matcher("json")
    one.allowed(list(b'{"a'))
    assert np.flatnonzero(other.allowed([])).tolist() == [ord("{")]


def test_what_has_been_compiled_is_kept_for_a_while() -> None:
    constraints = Constraints(ToyEngine())
    for n in range(40):
        constraints.matcher(Constraint("schema", json.dumps({"const": n})))
    assert len(constraints._compiled) == 32
    assert ("schema", '{"const": 39}') in constraints._compiled


# ---- grammars in llama.cpp's notation -----------------------------------------------------------

ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+   # llama.cpp's example
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
LIST = 'root ::= item+\nitem ::= "- " [^\\r\\n\\x0b\\x0c\\x85\\u2028\\u2029]+ "\\n"'
NESTED = 'root ::= "(" root ")" | ""'


@pytest.mark.parametrize(
    ("grammar", "yes", "no"),
    [
        (ARITHMETIC, ["1=2\n", "a+(3*b)= c\n", "x =y\nz=1\n"], ["1=2", "1+=2\n", "=1\n", "A=1\n"]),
        (LIST, ["- a\n", "- one\n- zwölf\n"], ["-a\n", "- \n", "- a", "a\n"]),
        (NESTED, ["", "()", "((()))"], ["(", "(()", "())"]),
        ('root ::= "ab"{2,3} [x-z]{1}', ["ababx", "abababz"], ["abx", "abababab", "abab"]),
        ('root ::= ("a" | "b")* "end"', ["end", "abend"], ["aben", "ende", "cend"]),
        ('root ::= [a-z]* "end"', ["end", "enend", "lend", "endend"], ["", "lendx", "en"]),
        ('root ::= "\\x41\\u00e9" | "\\"" .', ["Aé", '"q', '"ü'], ["A", '"', "é"]),
    ],
    ids=["arithmetic", "list", "nested", "counted", "alternatives", "ambiguous", "escaped"],
)
def test_a_grammar_means_what_llama_cpp_takes_it_for(
    grammar: str, yes: list[str], no: list[str]
) -> None:
    one = matcher("gbnf", grammar)
    assert [text for text in yes if not says(one, text)] == []
    assert [text for text in no if says(one, text)] == []


# ---- calls of tools -----------------------------------------------------------------------------

WEATHER = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string", "maxLength": 20}},
}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "get_weather_2", "description": "x"}},
]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
OTHER = '<tool_call>\n{"name": "get_weather_2", "arguments": {}}\n</tool_call>'


def test_calls_of_tools_have_hermes_form() -> None:
    one = TOY.matcher(tool_calls(TOOLS))
    for text in (CALL, OTHER, f"{CALL}\n{OTHER}", f"{OTHER}\n{OTHER}\n{CALL}"):
        assert says(one, text), text
    for text in ("", CALL[:-1], f"{CALL}\n", f"{CALL} {CALL}", CALL.replace("Oslo", "x" * 21)):
        assert not says(one, text), text
    assert not says(one, CALL.replace("city", "town"))
    assert not says(one, CALL.replace("get_weather", "get"))


def test_one_call_may_be_all() -> None:
    one = TOY.matcher(tool_calls(TOOLS, parallel=False))
    assert says(one, CALL)
    assert not says(one, f"{CALL}\n{CALL}")
    chosen = TOY.matcher(tool_calls(TOOLS, {"function": {"name": "get_weather_2"}}))
    assert says(chosen, OTHER)
    assert not says(chosen, CALL)


# ---- what is refused, and how soon --------------------------------------------------------------


def nested(opening: str, closing: str, depth: int) -> str:
    return opening * depth + closing * depth


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("schema", "{"),
        ("schema", "false"),
        ("schema", "[]"),
        ("schema", '{"type": "thing"}'),
        ("schema", '{"enum": []}'),
        ("schema", '{"allOf": [{"type": "string"}, {"type": "number"}]}'),
        ("schema", '{"$ref": "#/$defs/none"}'),
        ("schema", '{"$ref": "https://example.org/schema"}'),
        ("schema", '{"$ref": "#"}'),
        ("schema", '{"not": {"type": "string"}}'),
        ("schema", '{"type": "string", "pattern": "("}'),
        ("schema", '{"type": "string", "format": "no such"}'),
        ("schema", nested('{"items":', "}", 10_000).replace(":}", ":{}}", 1)),
        ("schema", nested('{"anyOf":[', "]}", 300).replace("[]", "[{}]", 1)),
        ("gbnf", "root ::= other"),
        ("gbnf", "start ::= [a]"),
        ("gbnf", 'root ::= "a'),
        ("gbnf", "root ::= ["),
        ("gbnf", "root ::= [z-a]"),
        ("gbnf", "root ::= root"),
        ("gbnf", "nonsense"),
        ("gbnf", "root ::= " + nested("(", ")", 20_000)),
        ("gbnf", "%llguidance {}\nstart: /a/"),
        ("tools", "{}"),
    ],
)
def test_what_cannot_be_followed_is_refused_by_name(kind: Any, text: str) -> None:
    began = time.process_time()
    with pytest.raises(BadRequest) as found:
        TOY.matcher(Constraint(kind, text, "the_argument"))
    assert found.value.param == "the_argument"
    assert "the_argument" in str(found.value)
    assert len(str(found.value)) < 400
    assert time.process_time() - began < 2.0


def test_a_long_chain_of_references_does_not_end_the_process() -> None:
    """It is followed by recursion, which overflows a usual stack."""
    rules = [f"r{n} ::= r{n + 1}" for n in range(4000)]
    one = matcher("gbnf", "\n".join(("root ::= r0", *rules, 'r4000 ::= "a"')))
    assert says(one, "a")
    links = {f"{n}": {"items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(1500)}
    one = matcher("schema", json.dumps({"$ref": "#/$defs/0", "$defs": {**links, "1500": {}}}))
    assert says(one, "[[[]]]")


BOUNDED = 2.0  # seconds of computing


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^(a|b|ab)*(c{1,300}){1,300}$"},
        {"type": "string", "pattern": "^(.*a.{20}){3}$"},
        {"type": "string", "pattern": "^" + "(a?){50}" * 20 + "$"},
        {"type": "string", "maxLength": 60_000},
        {"type": "array", "items": {"type": "array", "maxItems": 900}, "maxItems": 900},
        {"enum": [f"{n}" * 9 for n in range(4000)]},
        {"type": "object", "properties": {f"p{n}": {"type": "integer"} for n in range(1500)}},
        {"anyOf": [{"properties": {f"p{n}": {"const": n}}} for n in range(1000)]},
        {"type": "integer", "multipleOf": 982451653},
    ],
    ids=range(9),
)
def test_a_schema_that_costs_much_is_used_or_refused_in_time(schema: dict[str, Any]) -> None:
    began = time.process_time()
    answer: list[TokenId] = []
    try:
        one = matcher("schema", json.dumps(schema))
        for _ in range(20):
            answer.append(int(np.flatnonzero(one.allowed(answer))[-1]))
            if answer[-1] == END:
                break
    except BadRequest:
        pass
    assert time.process_time() - began < BOUNDED


# ---- whole answers ------------------------------------------------------------------------------

# the toy speaks of rivers; with these it comes to the point where JSON has to
LEANING = {
    **dict.fromkeys(b"0123456789", 17.0),
    **dict.fromkeys(b"]}", 21.0),
    **{ord('"'): 24.0, ord(","): 17.0, END: 80.0},
}
BIAS = tuple(sorted(LEANING.items()))
GREEDY = Sampling(temperature=0.0, logit_bias=BIAS)


PROMPT = b"Say it: "


def warm(seed: int) -> Sampling:
    return Sampling(temperature=1.5, logit_bias=BIAS, seed=seed)


def answer_of(sampling: Sampling, constraint: Constraint) -> list[TokenId]:
    engine = ToyEngine()
    return list(alone(engine, list(PROMPT), sampling, TOY.matcher(constraint)))


def drafted_answer(sampling: Sampling, constraint: Constraint, knows: bool) -> list[TokenId]:
    """The same through the reference, with a draft that knows the constraint or does not."""
    prompt, answer = list(PROMPT), list[TokenId]()
    target: Any = Held(ToyEngine(), TOY.matcher(constraint), len(prompt))
    DRAFTER.known = constraint if knows else None
    for block in generate(target, DRAFTER, prompt, sampling, 4):
        answer += block
    return answer


class Knowing(ModelDrafter):
    """A drafter that the test tells of the constraint: the reference does not."""

    known: Constraint | None = None

    def open(self, slot: int, opening: Opening) -> None:
        super().open(slot, opening._replace(constraint=self.known, begins=len(PROMPT)))


DRAFTER = Knowing(ToyEngine(ToySettings("draft", agreement=0.8)))


@pytest.mark.timeout(180)
@settings(quiet, max_examples=200)
@given(schemas, st.integers(0, 3))
def test_answers_fit_their_schema_and_do_not_depend_on_the_draft(schema: Any, seed: int) -> None:
    constraint = Constraint("schema", json.dumps(schema))
    for sampling in (GREEDY, warm(seed)):
        answer = answer_of(sampling, constraint)
        assert answer[-1] == END, bytes(answer)
        jsonschema.validate(json.loads(bytes(answer[:-1])), schema)
        for knows in (True, False):
            assert drafted_answer(sampling, constraint, knows) == answer


class Panic(BaseException):
    """What the library's own mistakes are raised as: no Exception."""


class Panicking:
    """In the place of the library's matcher."""

    def __getattr__(self, name: str) -> Any:
        raise Panic("index out of bounds")


def test_a_mistake_of_the_library_is_an_error_of_the_request() -> None:
    one = matcher("json")
    one._matcher = Panicking()  # type: ignore[assignment]
    with pytest.raises(BadRequest, match="index out of bounds"):
        one.allowed([])
    with pytest.raises(BadRequest, match="index out of bounds"):
        one.legal([], [1])
