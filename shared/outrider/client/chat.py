"""Checks of a conversation and of the tools that its answer may call.

Messages and tools have the form of OpenAI's; objects of its library are taken as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypeAlias, TypedDict

from outrider.client.hermes import ToolCall
from outrider.client.settings import listed, param_of, text, wrong
from outrider.core.values import CHAT_ROLES
from outrider.errors import BadRequest
from outrider.wire import messages as wire

MOST_TOOLS = 128
NAMES = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
IDS = re.compile(r"[a-zA-Z0-9_.:|-]{1,256}")


class TextPart(TypedDict):
    """A part of a message's content; text is the only type."""

    type: Literal["text"]
    text: str


class ChatMessage(TypedDict):
    """One message of a conversation; the parts of `content` are joined.

    An assistant's may have `tool_calls` and no content; one of the role "tool" answers such a call.
    """

    role: str
    content: NotRequired[str | Sequence[TextPart] | None]
    name: NotRequired[str]
    tool_calls: NotRequired[Sequence[ToolCall | Mapping[str, Any]] | None]
    tool_call_id: NotRequired[str]


Messages: TypeAlias = Sequence[ChatMessage | Mapping[str, str]]
Tool: TypeAlias = Mapping[str, Any]
ToolChoice: TypeAlias = Literal["none", "auto", "required"] | Mapping[str, Any]


# ---- messages -----------------------------------------------------------------------------------


def conversation(value: object) -> wire.Conversation:
    """Messages as the wire has them."""
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise wrong("messages", "must be a sequence of messages", value)
    return tuple(_message(f"messages[{n}]", one) for n, one in enumerate(value))


def _message(place: str, value: object) -> wire.Turn:
    known = ("role", "content", "name", "tool_calls", "tool_call_id")
    message = _fields(place, _plain(value), known, ("role",))
    role = text(f"{place}.role", message["role"])
    if role not in CHAT_ROLES:
        raise wrong(f"{place}.role", f"must be one of {', '.join(CHAT_ROLES)}", role)
    calls: tuple[wire.FunctionCall, ...] = ()
    if message.get("tool_calls") is not None:
        _only("assistant", role, f"{place}.tool_calls")
        calls = _calls(f"{place}.tool_calls", message["tool_calls"])
    call_id = name = ""
    if message.get("tool_call_id") is not None:
        _only("tool", role, f"{place}.tool_call_id")
        call_id = _matching(f"{place}.tool_call_id", message["tool_call_id"], IDS)
    if message.get("name") is not None and role in ("tool", "function"):
        name = _matching(f"{place}.name", message["name"], NAMES)  # else it is for the application
    return wire.Turn(role, _content(place, message, bool(calls)), calls, call_id, name)


def _content(place: str, message: Mapping[str, object], may_lack: bool) -> str:
    if may_lack and message.get("content") is None:
        return ""
    if "content" not in message:
        raise BadRequest(f"{place} has no 'content'", param_of(place))
    content = message["content"]
    if not isinstance(content, str):
        parts = listed(content)
        if not isinstance(parts, list | tuple):
            raise wrong(f"{place}.content", "must be a string or a list of parts", content)
        content = "".join(_part(f"{place}.content[{n}]", one) for n, one in enumerate(parts))
    return text(f"{place}.content", content)


def _part(place: str, value: object) -> str:
    if isinstance(value, Mapping) and value.get("type", "text") != "text":  # an image, say
        raise wrong(f"{place}.type", "must be 'text'", value["type"])
    part = _fields(place, value, ("type", "text"), ("type", "text"))
    return text(f"{place}.text", part["text"])


def _calls(place: str, value: object) -> tuple[wire.FunctionCall, ...]:
    value = listed(value)
    if not isinstance(value, list | tuple):
        raise wrong(place, "must be a sequence of calls", value)
    return tuple(_call(f"{place}[{n}]", one) for n, one in enumerate(value))


def _call(place: str, value: object) -> wire.FunctionCall:
    if isinstance(value, ToolCall):
        value = {"id": value.id, "function": {"name": value.name, "arguments": value.arguments}}
    call = _fields(place, _plain(value), ("id", "type", "function", "index"), ("function",))
    _function_type(place, call)
    known = ("name", "arguments")
    function = _fields(f"{place}.function", _plain(call["function"]), known, known)
    arguments = text(f"{place}.function.arguments", function["arguments"])
    if not isinstance(_value(arguments), dict):
        place += ".function.arguments"
        raise BadRequest(f"{place} must be the text of a JSON object", param_of(place))
    call_id = call.get("id")
    return wire.FunctionCall(
        "" if call_id is None else _matching(f"{place}.id", call_id, IDS),
        _matching(f"{place}.function.name", function["name"], NAMES),
        arguments,
    )


# ---- tools --------------------------------------------------------------------------------------


def tools_of(tools: object, choice: object) -> wire.Tools | None:
    """The tools that an answer may call, as the wire has them; None: none."""
    tools = None if tools is None else listed(tools)
    if tools is not None and not isinstance(tools, list | tuple):
        raise wrong("tools", "must be a sequence of tools", tools)
    if tools is not None and len(tools) > MOST_TOOLS:
        raise BadRequest(f"tools has {len(tools)} tools, more than {MOST_TOOLS}", "tools")
    found = [_tool(f"tools[{n}]", one) for n, one in enumerate(tools or ())]
    names = [tool["function"]["name"] for tool in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BadRequest(f"tools has two functions named {min(twice)!r}", "tools")
    how, name = _choice(choice, names)
    if not found or how == "none":
        return None
    return wire.Tools(_json("tools", found), "auto" if how == "auto" else "required", name)


def names_of(tools: wire.Tools) -> frozenset[str]:
    """The names of the functions in `tools`."""
    return frozenset(tool["function"]["name"] for tool in json.loads(tools.functions))


def _tool(place: str, value: object) -> dict[str, Any]:
    tool = _fields(place, _plain(value), ("type", "function"), ("type", "function"))
    _function_type(place, tool)
    function = _plain(tool["function"])
    if not isinstance(function, Mapping):
        raise wrong(f"{place}.function", "must be a mapping", function)
    _matching(f"{place}.function.name", function.get("name"), NAMES)
    if function.get("description") is not None:
        text(f"{place}.function.description", function["description"])
    if not isinstance(function.get("parameters") or {}, Mapping):
        place += ".function.parameters"
        raise wrong(place, "must be a JSON schema", function["parameters"])
    said = {k: v for k, v in function.items() if k != "strict" and v is not None}
    return {"type": "function", "function": said}


def _choice(value: object, names: Sequence[str]) -> tuple[str, str]:
    """How to choose, and the name of the function that is to be called."""
    if value is None:
        return "auto", ""
    if isinstance(value, str):
        if value not in ("none", "auto", "required"):
            raise wrong("tool_choice", "must be none, auto, required or a function", value)
        how, name = str(value), ""
    else:
        choice = _fields("tool_choice", _plain(value), ("type", "function"), ("type", "function"))
        _function_type("tool_choice", choice)
        function = _plain(choice["function"])
        function = _fields("tool_choice.function", function, ("name",), ("name",))
        how, name = "required", text("tool_choice.function.name", function["name"])
        if name not in names:
            raise BadRequest(f"tool_choice names {name!r:.80}, not one of tools", "tool_choice")
    if how == "required" and not names:
        raise BadRequest("tool_choice asks for a call, and there are no tools", "tool_choice")
    return how, name


# ---- parts of both ------------------------------------------------------------------------------


def _plain(value: object) -> object:
    """An object of OpenAI's library as a mapping."""
    dump = getattr(value, "model_dump", None)
    return dump(exclude_none=True) if dump else value


def _fields(
    place: str, value: object, known: tuple[str, ...], needed: tuple[str, ...]
) -> Mapping[str, object]:
    """`value`, if it has these fields and all others are None, as OpenAI's objects have some."""
    if not isinstance(value, Mapping):
        raise wrong(place, "must be a mapping", value)
    for name in needed:
        if name not in value:
            raise BadRequest(f"{place} has no {name!r}", param_of(place))
    for name in value:
        if name not in known and value[name] is not None:
            raise BadRequest(f"{place} has an unknown field {name!r:.80}", param_of(place))
    return value


def _only(role: str, found: str, place: str) -> None:
    if found != role:
        raise BadRequest(f"{place} is for the role {role!r}, not {found!r}", param_of(place))


def _function_type(place: str, value: Mapping[str, object]) -> None:
    if (kind := value.get("type", "function")) != "function":
        raise wrong(f"{place}.type", "must be 'function'", kind)


def _matching(place: str, value: object, rule: re.Pattern[str]) -> str:
    found = text(place, value)
    if not rule.fullmatch(found):
        raise wrong(place, f"must match {rule.pattern}", found)
    return found


def _json(place: str, value: object) -> str:
    """`value` as JSON text."""
    try:
        return text(place, json.dumps(value, ensure_ascii=False, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as exc:
        raise BadRequest(f"{place} cannot be written as JSON: {exc!s:.200}", place) from None


def _value(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value
