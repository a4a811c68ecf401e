"""What the client accepts of messages with tool calls, and of tools, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider import BadRequest
from outrider.client.chat import conversation, tools_of
from outrider.client.hermes import ToolCall
from outrider.wire.messages import FunctionCall, Tools, Turn


class Dumped:
    """As the objects of OpenAI's library are."""

    def __init__(self, **fields: Any) -> None:
        self.fields = fields

    def __repr__(self) -> str:
        return f"Dumped({self.fields})"  # a name of tests: without an address

    def model_dump(self, *, exclude_none: bool) -> dict[str, Any]:
        return {k: v for k, v in self.fields.items() if not (exclude_none and v is None)}


FUNCTION = {"name": "f", "arguments": '{"a": 1}'}
CALL = {"id": "call_1", "type": "function", "function": FUNCTION}
CALLED = FunctionCall("call_1", "f", '{"a": 1}')
TOOL = {"type": "function", "function": {"name": "f"}}


def assistant(*calls: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": calls, **more}


@pytest.mark.parametrize(
    ("message", "turn"),
    [
        (assistant(CALL), Turn("assistant", "", (CALLED,))),
        (assistant(CALL, content=None), Turn("assistant", "", (CALLED,))),
        (assistant(CALL, CALL, content="Hm"), Turn("assistant", "Hm", (CALLED, CALLED))),
        (assistant(ToolCall("call_1", "f", '{"a": 1}')), Turn("assistant", "", (CALLED,))),
        (assistant({"function": FUNCTION}), Turn("assistant", "", (CALLED.changed(id=""),))),
        (assistant(Dumped(**CALL, index=0)), Turn("assistant", "", (CALLED,))),
        (Dumped(**assistant(CALL), refusal=None), Turn("assistant", "", (CALLED,))),
        (assistant(content="Hm"), Turn("assistant", "Hm")),
        ({"role": "tool", "content": "x", "tool_call_id": "call_1", "name": "f"},
         Turn("tool", "x", (), "call_1", "f")),
        ({"role": "tool", "content": "x"}, Turn("tool", "x")),
        ({"role": "user", "content": "x", "name": "Ada L."}, Turn("user", "x")),
    ],
    ids=str,
)  # fmt: skip
def test_messages_with_calls_and_answers_are_accepted(message: Any, turn: Turn) -> None:
    assert conversation([message]) == (turn,)


def called(**changed: Any) -> dict[str, Any]:
    return assistant({**CALL, "function": {**FUNCTION, **changed}})


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (assistant(), r"messages\[0\] has no 'content'"),
        ({"role": "assistant", "content": None}, r"messages\[0\].content must be"),
        (assistant() | {"tool_calls": "f"}, r"tool_calls must be a sequence"),
        (assistant() | {"tool_calls": {}}, r"tool_calls must be a sequence"),
        (assistant("f"), r"tool_calls\[0\] must be a mapping"),
        (assistant({"id": "1"}), r"tool_calls\[0\] has no 'function'"),
        (assistant({**CALL, "more": 1}), r"unknown field 'more'"),
        (assistant({**CALL, "type": "code"}), r"tool_calls\[0\].type must be 'function'"),
        (assistant({**CALL, "id": 5}), r"tool_calls\[0\].id must be a string"),
        (assistant({**CALL, "id": "<|end|>"}), r"tool_calls\[0\].id must match"),
        (assistant({**CALL, "function": "f"}), r"function must be a mapping"),
        (called(name="<|end|>"), r"function.name must match"),
        (called(name=None), r"function.name must be a string"),
        (called(arguments=None), r"function.arguments must be a string"),
        (called(arguments={"a": 1}), r"function.arguments must be a string"),
        (called(arguments="{"), r"function.arguments must be the text of a JSON object"),
        (called(arguments="[" * 99_999), r"function.arguments must be the text of a JSON object"),
        (called(arguments="5"), r"function.arguments must be the text of a JSON object"),
        ({**assistant(CALL), "role": "user"}, r"tool_calls is for the role 'assistant'"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, r"is for the role 'tool'"),
        ({"role": "tool", "content": "x", "tool_call_id": 1}, r"tool_call_id must be a string"),
        ({"role": "tool", "content": "x", "name": "a b"}, r"name must match"),
        ({"role": "tool"}, r"messages\[0\] has no 'content'"),
    ],
    ids=lambda value: f"{value!s:.60}",
)
def test_a_message_with_calls_that_is_wrong_is_one_error(message: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        conversation([message])
    assert caught.value.param == "messages"


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


@pytest.mark.parametrize(
    ("tools", "shown"),
    [
        ([TOOL], [TOOL]),
        ((TOOL, function(name="g")), [TOOL, function(name="g")]),
        (iter([TOOL]), [TOOL]),
        ([Dumped(**TOOL)], [TOOL]),
        ([function(description=None, strict=True)], [TOOL]),
        ([function(parameters={"b": 1, "a": "é"}, more=[1])],
         [function(parameters={"b": 1, "a": "é"}, more=[1])]),
    ],
    ids=["one", "two", "iterable", "an-object", "fields-of-none", "a-schema"],
)  # fmt: skip
def test_tools_are_accepted_and_keep_their_order(tools: Any, shown: Any) -> None:
    made = tools_of(tools, None)
    assert made == Tools(json.dumps(shown, ensure_ascii=False))


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, Dumped(), b"x", "\ud800"], ids=repr)
def test_a_schema_is_json(value: Any) -> None:
    with pytest.raises(BadRequest, match="tools") as caught:
        tools_of([function(parameters={"a": value})], None)
    assert caught.value.param == "tools"


def test_a_schema_has_an_end() -> None:
    schema: dict[str, Any] = {}
    schema["again"] = schema
    with pytest.raises(BadRequest, match="cannot be written as JSON"):
        tools_of([function(parameters=schema)], None)


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ("f", "tools must be a sequence"),
        ({"type": "function"}, "tools must be a sequence"),
        (5, "tools must be a sequence"),
        (["f"], r"tools\[0\] must be a mapping"),
        ([{"type": "function"}], r"tools\[0\] has no 'function'"),
        ([{"function": {"name": "f"}}], r"tools\[0\] has no 'type'"),
        ([{"type": "web_search", "function": {}}], r"tools\[0\].type must be 'function'"),
        ([{"type": "function", "function": "f"}], r"tools\[0\].function must be a mapping"),
        ([{"type": "function", "function": {}}], r"function.name must be a string"),
        ([{**TOOL, "more": 1}], "unknown field 'more'"),
        ([function(name="a b")], "function.name must match"),
        ([function(name="x" * 65)], "function.name must match"),
        ([function(description=5)], "function.description must be a string"),
        ([function(parameters="x")], "function.parameters must be a JSON schema"),
        ([function(parameters=[1])], "function.parameters must be a JSON schema"),
        ([TOOL, TOOL], "two functions named 'f'"),
        ([function(name=f"f{n}") for n in range(129)], "129 tools, more than 128"),
    ],
    ids=lambda value: f"{value!s:.50}",
)
def test_a_tool_that_is_wrong_is_one_error_that_says_where(tools: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        tools_of(tools, None)
    assert caught.value.param == "tools"


@pytest.mark.parametrize(
    ("tools", "choice", "made"),
    [
        (None, None, None),
        ([], None, None),
        (None, "auto", None),
        (None, "none", None),
        ([TOOL], "none", None),
        ([TOOL], "auto", ("auto", "")),
        ([TOOL], "required", ("required", "")),
        ([TOOL], TOOL, ("required", "f")),
        ([TOOL], Dumped(**TOOL), ("required", "f")),
    ],
    ids=str,
)
def test_how_to_choose(tools: Any, choice: Any, made: tuple[str, str] | None) -> None:
    found = tools_of(tools, choice)
    assert (found and (found.choice, found.name)) == made


@pytest.mark.parametrize(
    ("tools", "choice", "words"),
    [
        ([TOOL], "maybe", "tool_choice must be none, auto, required or a function"),
        ([TOOL], 5, "tool_choice must be a mapping"),
        ([TOOL], {"type": "function"}, "tool_choice has no 'function'"),
        ([TOOL], {"type": "x", "function": {"name": "f"}}, "tool_choice.type must be"),
        ([TOOL], function(name="g"), "tool_choice names 'g', not one of tools"),
        ([TOOL], function(name=5), "tool_choice.function.name must be a string"),
        (None, "required", "there are no tools"),
        (None, TOOL, "tool_choice names 'f'"),
    ],
    ids=str,
)
def test_a_choice_that_is_wrong_is_one_error(tools: Any, choice: Any, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as caught:
        tools_of(tools, choice)
    assert caught.value.param == "tool_choice"
