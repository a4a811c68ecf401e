"""Grammars in llama.cpp's notation mean what they mean there, whatever lexers do."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.core.constraints import Constraint
from outrider.engines.constraints import Constraints
from outrider.engines.gbnf import to_lark
from outrider.engines.toy import ToyEngine
from outrider.engines.toy_text import END
from outrider.errors import BadRequest

quiet = settings(derandomize=True, database=None, deadline=None)
TOY = Constraints(ToyEngine())
TEXTS = ["".join(text) for n in range(5) for text in itertools.product("ab", repeat=n)]

# the same expression in GBNF and as Python's regular expression
Both = tuple[str, str]
leaves: st.SearchStrategy[Both] = st.sampled_from(
    [
        ('"a"', "a"), ('"ab"', "ab"), ('"ba"', "ba"), ('""', ""), ("[ab]", "[ab]"),
        ("[^b]", "[^b]"), (".", "."), ("[a-b]", "[a-b]"), ("b", "b(?:ab)*"), ("a-b", "a?b"),
    ]
)  # fmt: skip
RULES = 'b ::= "b" ("ab")*\na-b ::= "a"? "b"\n'


def composed(inner: st.SearchStrategy[Both]) -> st.SearchStrategy[Both]:
    def joined(parts: list[Both], glue: tuple[str, str]) -> Both:
        ours, theirs = zip(*parts, strict=True)
        return f"({glue[0].join(ours)})", f"(?:{glue[1].join(theirs)})"

    def repeated(one: Both, times: str) -> Both:
        return f"({one[0]}){times}", f"(?:{one[1]}){times}"

    return st.one_of(
        st.builds(
            joined,
            st.lists(inner, min_size=1, max_size=3),
            st.sampled_from([(" ", ""), (" | ", "|")]),
        ),
        st.builds(repeated, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,}", "{0,2}"])),
    )


@pytest.mark.timeout(120)
@settings(quiet, max_examples=200)
@given(st.recursive(leaves, composed, max_leaves=6))
def test_a_grammar_allows_what_the_same_expression_matches(both: Both) -> None:
    ours, theirs = both
    try:
        matcher = TOY.matcher(Constraint("gbnf", f"root ::= {ours}\n{RULES}"))
    except BadRequest as exc:
        raise AssertionError(ours) from exc
    for text in TEXTS:
        tokens = [*text.encode(), END]
        said = matcher.legal([], tokens) == len(tokens)
        assert said == bool(re.fullmatch(theirs, text)), (ours, text)


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("", "no rule 'root'"),
        ("root", "is not where it can be"),
        ("root ::= a", "no rule 'a'"),
        ('root ::= "a"\nroot ::= "b"', "two rules 'root'"),
        ('::= "a"', "is not where it can be"),
        ("root root ::= [a]", "is not where it can be"),
        ("root ::= ::= [a]", "is not where it can be"),
        ('root ::= ("a"', "is not closed"),
        ('root ::= ("a"\nb ::= "c")', "is not closed"),
        ('root ::= "a")', "closes nothing"),
        ("root ::= * [a]", "nothing is repeated"),
        ("root ::= [a]{3,2}", "the least first"),
        ("root ::= [a]{2001}", "up to 2000"),
        ("root ::= [a]{,3}", "line 1 is not GBNF"),
        ('root ::= [a]\n<think> "x"', "line 2 is not GBNF"),
        ('root ::= "a', "line 1 is not GBNF"),
        ("root ::= []", "no characters"),
        ("root ::= [^]", "no characters"),
        ("root ::= [z-a]", "ends before it begins"),
        (r'root ::= "\q"', "escapes nothing"),
        (r"root ::= [\d]", "escapes nothing"),
        (r'root ::= "\uD800"', "is no character"),
        (r'root ::= "\U00110000"', "is no character"),
    ],
)
def test_what_is_no_grammar_is_told(grammar: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as found:
        to_lark(grammar)
    assert len(str(found.value)) < 200


def test_rules_may_be_called_anything_and_be_empty() -> None:
    grammar = (
        'root ::= Root | START-1 | start_1 # or\n | \nRoot ::= "r"\nSTART-1 ::=\nstart_1 ::= "s"'
    )
    matcher = TOY.matcher(Constraint("gbnf", grammar))
    for text in ("", "r", "s"):
        assert matcher.legal([], [*text.encode(), END]) == len(text) + 1
