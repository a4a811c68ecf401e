"""Tool calls in a text: found in whatever pieces it comes, and nothing of it is lost."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.client.hermes import CLOSES, OPENS, Parser, ToolCall, gathered, parse

quiet = settings(derandomize=True, database=None, deadline=None, max_examples=100)


def call(name: str = "f", arguments: str = '{"a": 1}') -> str:
    return f'{OPENS}\n{{"name": "{name}", "arguments": {arguments}}}\n{CLOSES}'


def block(name: str = "g", more: str = "") -> str:
    return f'```json\n{{"name": "{name}", "arguments": {{"a": 1}}{more}}}\n```'


def fed(pieces: Sequence[str], *, in_pieces: bool) -> tuple[str, tuple[ToolCall, ...]]:
    ids = map(str, itertools.count())
    parser = Parser({"f", "g"}, in_pieces=in_pieces, new_id=lambda: next(ids))
    found = [*map(parser.feed, pieces), parser.end()]
    content = "".join(one.content for one in found)
    return content, gathered(delta for one in found for delta in one.calls)


def plain(calls: Sequence[ToolCall]) -> list[tuple[str, str]]:
    return [(one.name, one.arguments) for one in calls]


def split(text: str, cuts: Sequence[int]) -> list[str]:
    places = sorted(cut % (len(text) + 1) for cut in cuts)
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


# what may stand in an answer: calls, what is nearly one, and text
piece = st.sampled_from(
    [
        OPENS, CLOSES, "<tool_", "call>", "</tool", "<", "{", "}", "[", "]", '"', "\\", ",", ":",
        "\n", " ", "1", "true", "tru", "é", "🚀", "Hello ", '"name"', '"arguments"', '{"name": "f"',
        call(), call("g", "{}"), call("h", '{"s": "a\\"}</tool_call>b", "t": [{"u": null}]}'),
        call("i", '"{\\"a\\": 2}"'), call("j", "[1]"), call("k", '{"a": tru}'),
        block(), block("other"), "```json", "``", "`",
        f'{OPENS}{{"arguments": {{"a": 1}}, "name": "late"}}{CLOSES}', f'{OPENS}{{"name": "bare"}}',
    ]
)  # fmt: skip
answers = st.lists(piece, max_size=12).map("".join)
cuts = st.lists(st.integers(0, 1000), max_size=12)


@quiet
@given(answers, cuts, st.booleans())
def test_however_a_text_is_split_the_outcome_is_the_same(
    text: str, places: list[int], in_pieces: bool
) -> None:
    whole = fed([text], in_pieces=in_pieces)
    assert fed(split(text, places), in_pieces=in_pieces) == whole
    assert fed(list(text), in_pieces=in_pieces) == whole


@quiet
@given(
    answers.filter(lambda text: OPENS not in text and "```" not in text) | st.text(),
    cuts,
    st.booleans(),
)
def test_a_text_without_calls_is_passed_through(
    text: str, places: list[int], in_pieces: bool
) -> None:
    assert fed(split(text, places), in_pieces=in_pieces) == (text, ())


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@quiet
@given(
    st.lists(st.dictionaries(st.text(), values, max_size=4), min_size=1, max_size=3),
    st.booleans(), st.booleans(), cuts,
)  # fmt: skip
def test_whatever_json_the_arguments_are_they_arrive(
    arguments: list[dict[str, object]], in_pieces: bool, ascii_only: bool, places: list[int]
) -> None:
    texts = [json.dumps(one, ensure_ascii=ascii_only) for one in arguments]
    text = "\n".join(call(f"f{n}", one) for n, one in enumerate(texts))
    content, calls = fed(split(text, places), in_pieces=in_pieces)
    assert content == ""
    assert plain(calls) == [(f"f{n}", one) for n, one in enumerate(texts)]


@quiet
@given(answers)
def test_nothing_is_lost_but_white_space_and_marks(text: str) -> None:
    """Every letter is in the content or in a call, in the order in which it came."""
    content, calls = parse(text)
    if not calls:
        assert content == text
    said = "".join(content.split())
    rest = iter("".join(text.split()))
    assert all(letter in rest for letter in said)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        (call(), "", [("f", '{"a": 1}')]),
        (f" \n{call()}", "", [("f", '{"a": 1}')]),
        (f"Let me see.\n{call()}", "Let me see.\n", [("f", '{"a": 1}')]),
        (f"{call()}\n{call('g')}\n", "", [("f", '{"a": 1}'), ("g", '{"a": 1}')]),
        (f"{call()} and", " and", [("f", '{"a": 1}')]),
        (call().removesuffix(CLOSES), "", [("f", '{"a": 1}')]),
        (f"{OPENS}{{\"name\": \"now\"}}{CLOSES}", "", [("now", "{}")]),
        (call("i", '"{\\"a\\": 2}"'), "", [("i", '{"a": 2}')]),
        (f'{OPENS}{{"arguments": {{}}, "name": "f"}}{CLOSES}', "", [("f", "{}")]),
        (block(), "", [("g", '{"a": 1}')]),
        (f"So: {block()}\n{call()}\nDone", "So: \nDone", [("g", '{"a": 1}'), ("f", '{"a": 1}')]),
        (f'{OPENS}{{"n\\u0061me": "f", "arguments": {{}}}}{CLOSES}', "", [("f", "{}")]),
    ],
)  # fmt: skip
def test_calls_are_found(text: str, content: str, calls: list[tuple[str, str]]) -> None:
    for in_pieces in (False, True):
        found, made = fed([text], in_pieces=in_pieces)
        assert (found, plain(made)) == (content, calls)


@pytest.mark.parametrize(
    "text",
    [
        OPENS,
        f"{OPENS}f(1){CLOSES}",
        f"{OPENS}[]{CLOSES}",
        f'{OPENS}{{"name": 5, "arguments": {{}}}}{CLOSES}',
        f'{OPENS}{{"name": "", "arguments": {{}}}}{CLOSES}',
        f'{OPENS}{{"name": "\\ud800", "arguments": {{}}}}{CLOSES}',
        f'{OPENS}{{"arguments": {{}}}}{CLOSES}',
        call("f", "[1]"),
        call("f", "5"),
        f'{OPENS}{{"name": "f", "name": "g", "arguments": {{}}, "name": "h"}}',
        f"{OPENS}{'{' * 100}",
        f'{OPENS}{{"name" "f"}}{CLOSES}',
        f'{OPENS}{{"name": "f", "arguments": {{"a": "x}}}}{CLOSES}',
        f"  {OPENS}{{{CLOSES}",
        block("other"),
        block(more=', "type": "person"'),
        '```json\n{"name": "f"}\n```',
        '```json\n{"users": [{"name": "f", "arguments": {}}]}\n```',
        "```json\n[1, 2]\n```",
        "```jsonc\n{}\n```",
    ],
)
def test_what_begins_like_a_call_and_is_none_is_content(text: str) -> None:
    assert fed([text], in_pieces=False) == (text, ())


def test_behind_a_broken_call_the_next_is_found() -> None:
    broken = call("f", '{"a": "x}')
    assert broken.count('"') % 2  # a string that never ends
    content, calls = parse(f"{broken}\n{call('g')}")
    assert (content, plain(calls)) == (f"{broken}\n", [("g", '{"a": 1}')])


def test_what_cannot_be_a_call_is_given_on_at_once() -> None:
    parser = Parser(in_pieces=True)
    assert parser.feed("a <b> <tool").content == "a <b> "
    assert parser.feed("_box>").content == "<tool_box>"
    assert parser.feed("```js\n").content == "```js\n"
    assert parser.feed("```json\n{").content == ""
    assert parser.feed('"user":').content == '```json\n{"user":'
    assert parser.feed("<tool_call>").content == ""
    assert parser.feed("no").content == "<tool_call>no"


def test_the_arguments_come_as_the_model_writes_them() -> None:
    parser = Parser(in_pieces=True, new_id=lambda: "id")
    text = call("f", '{"path": "a.py"}')
    found = [parser.feed(letter) for letter in text]
    deltas = [delta for one in found for delta in one.calls]
    assert (deltas[0].index, deltas[0].id, deltas[0].name) == (0, "id", "f")
    assert "".join(delta.arguments for delta in deltas) == '{"path": "a.py"}'
    assert len(deltas) > len('{"path": "a.py"}')
    assert all(not delta.id and not delta.name and delta.index == 0 for delta in deltas[1:])


def test_arguments_that_break_off_stay_arguments_where_they_were_given_on() -> None:
    cut = call("f", '{"a": "xyz"}')[:-18]
    content, calls = fed(list(cut), in_pieces=True)
    assert (content, plain(calls)) == ("", [("f", '{"a": "x')])
    content, calls = fed([f'{OPENS}{{"name": "f", "arguments": {{"a": <b> c'], in_pieces=True)
    assert (content, plain(calls)) == ("<b> c", [("f", '{"a": ')])


def test_a_brace_too_few_is_forgiven_where_the_arguments_were_given_on() -> None:
    text = call().replace("}}", "}") + " Done."
    assert fed(list(text), in_pieces=True)[0] == " Done."


def test_each_call_has_a_name_of_its_own() -> None:
    _, calls = parse(call() + call())
    assert calls[0].id != calls[1].id
    assert calls[0].id.startswith("call_")


def test_a_text_that_is_all_beginnings_takes_no_longer_than_any_other() -> None:
    text = f'{OPENS}{{"a": "' + (OPENS + '{\\"') * 5000
    assert parse(text) == (text, ())
