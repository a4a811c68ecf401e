"""What a client may ask the answer to be: each mistake names its argument."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider.client.formats import tool_calls
from outrider.client.settings import submit
from outrider.core.constraints import CONSTRAINT_LIMIT, Constraint
from outrider.errors import BadRequest

SCHEMA = {"type": "object", "properties": {"naïve": {"type": "string"}}}


def asked(**settings: Any) -> Constraint | None:
    return submit(1, "x", None, settings).constraint


def function(name: Any = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


class Dumps:
    """As OpenAI's library makes some."""

    def model_dump(self, **_: Any) -> Any:
        return {"type": "json_object"}


class Model:
    """As a class of pydantic."""

    @classmethod
    def model_json_schema(cls) -> Any:
        return SCHEMA


@pytest.mark.parametrize(
    ("settings", "kind", "argument"),
    [
        ({"response_format": {"type": "json_object"}}, "json", "response_format"),
        ({"response_format": Dumps()}, "json", "response_format"),
        (
            {"response_format": {"type": "json_object", "schema": SCHEMA}},
            "schema",
            "response_format",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
                }
            },
            "schema",
            "response_format",
        ),
        ({"json_schema": SCHEMA}, "schema", "json_schema"),
        ({"json_schema": json.dumps(SCHEMA)}, "schema", "json_schema"),
        ({"json_schema": Model}, "schema", "json_schema"),
        ({"grammar": "root ::= [a-z]+", "json_schema": None}, "gbnf", "grammar"),
    ],
)
def test_a_form_is_asked_for(settings: dict[str, Any], kind: str, argument: str) -> None:
    constraint = asked(**settings)
    assert constraint is not None
    assert (constraint.kind, constraint.argument) == (kind, argument)
    if kind == "schema":
        assert json.loads(constraint.text) == SCHEMA
        assert "ï" in constraint.text  # six bytes would count as one letter


@pytest.mark.parametrize(
    "settings",
    [{}, {"response_format": {"type": "text"}}, {"grammar": " \n"}, {"response_format": None}],
)
def test_nothing_need_be_asked_for(settings: dict[str, Any]) -> None:
    assert asked(**settings) is None


@pytest.mark.parametrize(
    ("settings", "param", "words"),
    [
        ({"response_format": "json"}, "response_format", "must be a mapping"),
        ({"response_format": {"type": "xml"}}, "response_format", "one of text, json_object"),
        ({"response_format": {"type": ["text"]}}, "response_format", "one of text, json_object"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "must be a mapping"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format",
            "no 'schema'",
        ),
        ({"json_schema": [1]}, "json_schema", "must be a mapping"),
        ({"json_schema": "{"}, "json_schema", "is not JSON"),
        ({"json_schema": "[" * 100_000}, "json_schema", "is not JSON"),
        ({"json_schema": {"enum": [float("nan")]}}, "json_schema", "cannot be written"),
        ({"json_schema": {"const": "\ud800"}}, "json_schema", "UTF-8"),
        ({"json_schema": {"const": "ï" * (CONSTRAINT_LIMIT // 2)}}, "json_schema", "bytes, more"),
        ({"grammar": "x" * (CONSTRAINT_LIMIT + 1)}, "grammar", "bytes, more"),
        ({"grammar": 7}, "grammar", "must be a string"),
        ({"grammar": "\udfff"}, "grammar", "UTF-8"),
        ({"constraint": "json"}, "constraint", "must be a Constraint"),
        ({"json_schema": True, "grammar": "root ::= [a]"}, "grammar", "together"),
    ],
)
def test_what_is_wrong_is_named(settings: dict[str, Any], param: str, words: str) -> None:
    with pytest.raises(BadRequest, match=words) as found:
        asked(**settings)
    assert found.value.param == param
    assert len(str(found.value)) < 400


# ---- calls of tools -----------------------------------------------------------------------------


def test_calls_of_any_tool_are_asked_for() -> None:
    parameters = {"type": "object", "properties": {"x": {"type": "number"}}}
    constraint = tool_calls([function("add", parameters=parameters), function("stop")])
    assert (constraint.kind, constraint.argument) == ("tools", "tools")
    said = json.loads(constraint.text)
    assert said["several"] is True
    assert said["functions"]["add"] == parameters
    assert said["functions"]["stop"]["additionalProperties"] is False
    assert asked(constraint=constraint) == constraint
    one = json.loads(tool_calls([function()], parallel=False).text)
    assert one["several"] is False


def test_one_tool_may_be_chosen() -> None:
    tools = [function("add"), function("stop")]
    constraint = tool_calls(tools, {"type": "function", "function": {"name": "stop"}})
    said = json.loads(constraint.text)
    assert list(said["functions"]) == ["stop"]
    assert said["several"] is False


@pytest.mark.parametrize(
    ("tools", "choice", "param", "words"),
    [
        ([], "required", "tools", "1 to 128"),
        ("f", "required", "tools", "must be a mapping"),
        ([function()] * 129, "required", "tools", "1 to 128"),
        ([function(), function()], "required", "tools", "the same name"),
        ([{"type": "retrieval"}], "required", "tools", "'function'"),
        ([{"type": "function"}], "required", "tools", "must be a mapping"),
        ([function("a b")], "required", "tools", "letters"),
        ([function(7)], "required", "tools", "letters"),
        ([function(parameters={"x": object()})], "required", "tools", "cannot be written"),
        ([function()], "auto", "tool_choice", "must be a mapping"),
        ([function()], {"function": {"name": "g"}}, "tool_choice", "none of the tools"),
        ([function()], {"function": {"name": ["f"]}}, "tool_choice", "none of the tools"),
    ],
)
def test_tools_that_cannot_be_called_are_named(
    tools: Any, choice: Any, param: str, words: str
) -> None:
    with pytest.raises(BadRequest, match=words) as found:
        tool_calls(tools, choice)
    assert found.value.param == param
