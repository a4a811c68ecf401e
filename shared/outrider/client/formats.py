"""The forms that an answer can be asked to have, as constraints: see `outrider.core.constraints`.

Whether a schema or grammar can be used is for the pipeline to say; here only its place is checked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from outrider.core.constraints import Constraint
from outrider.errors import BadRequest
from outrider.wire.messages import Tools

FORMATS = ("text", "json_object", "json_schema")
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MOST_FUNCTIONS = 128
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}


def constraint_of(given: Mapping[str, Any], tools: Tools | None = None) -> Constraint | None:
    """What the settings of a request ask the answer to be, None if nothing.

    Where it must call one of `tools`, that is a form, too, and JSON leaves no room for calls.
    Raises BadRequest if more than one thing is asked for.
    """
    found = [given[name] for name in ("response_format", "json_schema", "grammar", "constraint")
             if given.get(name)]  # fmt: skip
    if len(found) > 1:
        first, second, *_ = (one.argument for one in found)
        raise BadRequest(f"{second} and {first} cannot be asked for together", second)
    asked = found[0] if found else None
    if tools is None or (asked and asked.kind == "tools"):
        return asked
    must = tools.choice == "required"
    if asked and (must or asked.kind != "gbnf"):
        raise BadRequest(
            f"{asked.argument} leaves no room for calls of tools: set tool_choice to 'none'",
            asked.argument,
        )
    return _demanded(tools) if must else asked


def _demanded(tools: Tools) -> Constraint:
    choice = {"function": {"name": tools.name}} if tools.name else "required"
    return tool_calls(json.loads(tools.functions), choice)


def response_format(name: str, value: object) -> Constraint | None:
    """OpenAI's `response_format`; a "json_object" may bring a schema, as for llama-server."""
    wanted = _mapping(name, value)
    kind = wanted.get("type")
    if kind not in FORMATS:
        raise BadRequest(f"{name}.type must be one of {', '.join(FORMATS)}, not {kind!r:.80}", name)
    if kind == "json_schema":
        wanted = _mapping(f"{name}.json_schema", wanted.get("json_schema"))
        if wanted.get("schema") is None:
            raise BadRequest(f"{name}.json_schema has no 'schema'", name)
    if kind == "text":
        return None
    schema = wanted.get("schema")
    return Constraint("json", argument=name) if schema is None else _schema(name, schema)


def json_schema(name: str, value: object) -> Constraint:
    """A JSON schema, as a mapping, or as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as exc:
            raise BadRequest(f"{name} is not JSON: {exc!s:.200}", name) from None
    return _schema(name, value)


def grammar(name: str, value: object) -> Constraint | None:
    """A grammar in llama.cpp's notation, GBNF; an empty one allows everything."""
    if not isinstance(value, str):
        raise BadRequest(f"{name} must be a string, not {type(value).__name__}", name)
    _expressible(name, value)
    return Constraint("gbnf", value, name) if value.strip() else None


def made(name: str, value: object) -> Constraint:
    """A constraint that was made beforehand, by `tool_calls` for example."""
    if not isinstance(value, Constraint):
        raise BadRequest(f"{name} must be a Constraint, not {type(value).__name__}", name)
    return value


def tool_calls(
    tools: Sequence[Mapping[str, Any]],
    choice: str | Mapping[str, Any] = "required",
    *,
    parallel: bool = True,
) -> Constraint:
    """That the answer consists of calls of `tools` in Hermes' form, and has at least one.

    `tools` are OpenAI's: {"type": "function", "function": {"name": …, "parameters": …}}. With the
    `choice` "required" there may be several calls, unless `parallel` is false. A `choice` such as
    {"type": "function", "function": {"name": "f"}} asks for one call of f. Raises BadRequest.

    A call is a line `<tool_call>`, a line with the name and the arguments as JSON, and a line
    `</tool_call>`.
    """
    if not isinstance(tools, Sequence) or not 0 < len(tools) <= MOST_FUNCTIONS:
        raise BadRequest(f"tools must be a list of 1 to {MOST_FUNCTIONS} functions", "tools")
    functions = dict(_function(f"tools[{n}]", tool) for n, tool in enumerate(tools))
    if len(functions) < len(tools):
        raise BadRequest("two of the tools have the same name", "tools")
    if choice != "required":
        wanted = _mapping("tool_choice.function", _mapping("tool_choice", choice).get("function"))
        name = wanted.get("name")
        if not isinstance(name, str) or name not in functions:
            raise BadRequest(f"tool_choice names {name!r:.80}, none of the tools", "tool_choice")
        functions, parallel = {name: functions[name]}, False
    text = _dumped("tools", {"functions": functions, "several": parallel})
    return Constraint("tools", text, "tools")


def _function(place: str, tool: object) -> tuple[str, Any]:
    """The name and the schema of the arguments of a tool."""
    described = _mapping(place, tool)
    if described.get("type", "function") != "function":
        raise BadRequest(f"{place}.type must be 'function'", "tools")
    function = _mapping(f"{place}.function", described.get("function"))
    name = function.get("name")
    if not isinstance(name, str) or not FUNCTION_NAME.fullmatch(name):
        raise BadRequest(
            f"{place}.function.name must have 1 to 64 letters, digits, dots, dashes or underscores",
            "tools",
        )
    parameters = function.get("parameters")
    if parameters is None:
        return name, NO_PARAMETERS
    return name, {"type": "object"} if parameters == {} else parameters


def _schema(name: str, value: object) -> Constraint:
    if dump := getattr(value, "model_json_schema", None):  # a model of pydantic
        value = dump()
    if not isinstance(value, Mapping | bool):
        raise BadRequest(f"{name} has no schema: it must be a mapping, or true", name)
    return Constraint("schema", _dumped(name, value), name)


def _dumped(name: str, value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=dict)
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadRequest(f"{name} cannot be written as JSON: {exc!s:.200}", name) from None
    _expressible(name, text)
    return text


def _expressible(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise BadRequest(f"{name} has text that UTF-8 cannot express", name) from None


def _mapping(place: str, value: object) -> Mapping[str, Any]:
    if dump := getattr(value, "model_dump", None):  # an object of OpenAI's library
        value = dump(exclude_none=True, by_alias=True)
    if not isinstance(value, Mapping):
        argument = re.split(r"[.\[]", place)[0]
        raise BadRequest(f"{place} must be a mapping, not {type(value).__name__}", argument)
    return value
