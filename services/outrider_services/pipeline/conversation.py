"""A conversation as text and as token ids: no word of it is lost, and none is obeyed.

Templates are not ours, and one may leave a message out without a word: Gemma's puts what the system
says in front of what the user says next, and drops it if nothing comes next. So each is first tried
on private-use characters in place of the contents: what comes out has its place. A quotation mark
among them tells whether the template has written a content as it is or as JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from outrider.core.engine import Engine
from outrider.core.values import CHAT_ROLES, TokenId
from outrider.errors import BadRequest
from outrider.wire.messages import Conversation, Tools, Turn

PLACE = '\ue000{}"\ue001'  # in place of the text with this number
PLACES = re.compile(r'\ue000(\d+)(\\?)"\ue001')
MARKS = frozenset("\ue000\ue001")

Message = dict[str, Any]


class Template(Protocol):
    """As `outrider_services.templates.chat_template.ChatTemplate`."""

    def check(self, tools: Tools) -> None: ...
    def render(self, messages: Sequence[Message], functions: Sequence[Any], choice: Any) -> str: ...


def text(engine: Engine, template: Template, turns: Conversation, tools: Tools | None) -> str:
    """The template applied to the conversation. Raises BadRequest if it leaves a part out."""
    return _laid_out(engine, template, turns, tools).text()


def token_ids(
    engine: Engine, template: Template, turns: Conversation, tools: Tools | None
) -> list[TokenId]:
    """The same as ids: the template's markers become control tokens, markers in contents do not."""
    layout = _laid_out(engine, template, turns, tools)
    if not layout.has_markers:
        return _stretch(engine, layout.text(), special=True, begins=True)
    tokens: list[TokenId] = []
    for stretch, is_said in layout.stretches():
        tokens += _stretch(engine, stretch, special=not is_said, begins=not tokens)
    return tokens


@dataclass(frozen=True, slots=True)
class Layout:
    """A conversation in its template: the text with stand-ins, and what they stand for."""

    standing: str
    texts: Sequence[str]
    has_markers: bool  # whether a text that was said would become a control token
    text: Callable[[], str]

    def stretches(self) -> Iterator[tuple[str, bool]]:
        """The template's own texts, and those that stand between them (True)."""
        done = 0
        for found in PLACES.finditer(self.standing):
            yield self.standing[done : found.start()], False
            said = self.texts[int(found[1])]
            yield json.dumps(said, ensure_ascii=False)[1:-1] if found[2] else said, True
            done = found.end()
        yield self.standing[done:], False


def _laid_out(
    engine: Engine, template: Template, turns: Conversation, tools: Tools | None
) -> Layout:
    """The conversation in its template; where that has no place for the system, the user says it.

    Raises BadRequest if a part of it has none either way.
    """
    if tools is not None:
        template.check(tools)
    try:
        chat = Chat(engine, turns, tools)
    except RecursionError:
        raise BadRequest("the tools, or calls of them, are nested too deeply") from None
    try:
        return chat.laid_out(template, lambda messages: messages)
    except BadRequest:
        if [turn.role for turn in turns[:2]] not in (["system", "user"], ["developer", "user"]):
            raise
        try:
            return chat.laid_out(template, _told_by_the_user)
        except BadRequest:
            pass
        raise  # the first reason is the better one


def _told_by_the_user(messages: list[Message]) -> list[Message]:
    """The system's message in front of the user's first, as llama.cpp has it for such templates."""
    system, user, *rest = messages
    return [{**user, "content": f"{system['content']}\n\n{user['content']}"}, *rest]


class Chat:
    """The messages and tools as templates know them, once real and once with stand-ins.

    What was said and the names of functions always get one; other texts where they would become
    control tokens, so that a template sees what it may look at, such as the types in a schema.
    """

    def __init__(self, engine: Engine, turns: Conversation, tools: Tools | None) -> None:
        self._engine = engine
        self._texts: list[str] = []
        self._owners: list[tuple[int, str]] = []  # stand-ins that must stand, and whose they are
        self._marked: dict[str, bool] = {}  # schemas use few words, and those often
        self._messages = [_message(n, turn) for n, turn in enumerate(turns)]
        self._functions = _functions(tools) if tools else []
        self._choice: Any = "auto" if tools is None else tools.choice
        if tools and tools.name:
            self._choice = {"type": "function", "function": {"name": tools.name}}
        self._standing = [self._stand_in(*one) for one in enumerate(self._messages)]
        self._standing_functions = [self._tool(*one) for one in enumerate(self._functions)]

    def laid_out(
        self, template: Template, form: Callable[[list[Message]], list[Message]]
    ) -> Layout:
        """The layout with the messages brought into a `form`. Raises BadRequest."""
        standing = template.render(form(self._standing), self._standing_functions, self._choice)
        found = {int(number) for number, _ in PLACES.findall(standing)}
        for number, owner in self._owners:
            if number not in found:
                raise BadRequest(f"the model's chat template leaves out {owner}", "messages")
        if MARKS & set(PLACES.sub("", standing)):
            raise BadRequest("the model's chat template takes apart what is said", "messages")

        def text() -> str:
            return template.render(form(self._messages), self._functions, self._choice)

        return Layout(standing, self._texts, any(self._marked.values()), text)

    def _stand_in(self, n: int, message: Message) -> Message:
        owner = f"messages[{n}], of the role {message['role']!r}; say it in a message of the user"
        content = message["content"]
        said = self._standing_for(content, owner) if content.strip() else content
        rest: Message = self._guarded({**message, "content": ""}, f"messages[{n}]")
        for call, guarded in zip(
            message.get("tool_calls", ()), rest.get("tool_calls", ()), strict=True
        ):
            owner = f"the tool calls of messages[{n}]"
            guarded["function"]["name"] = self._standing_for(call["function"]["name"], owner)
        return {**rest, "content": said}

    def _tool(self, n: int, tool: Message) -> Message:
        guarded: Message = self._guarded(tool, f"tools[{n}]")
        name = self._standing_for(tool["function"]["name"], f"tools[{n}]")
        return {**guarded, "function": {**guarded["function"], "name": name}}

    def _standing_for(self, text: str, owner: str = "") -> str:
        """A stand-in for `text`; with an `owner` it must have its place."""
        self._is_marked(text)
        self._texts.append(text)
        number = len(self._texts) - 1
        if owner:
            self._owners.append((number, owner))
        return PLACE.format(number)

    def _guarded(self, value: Any, place: str) -> Any:
        """The JSON value with stand-ins for texts that would become control tokens."""
        if isinstance(value, dict):
            if any(self._is_marked(key) for key in value):
                raise BadRequest(f"a key in {place} is a marker of this model", place.split("[")[0])
            return {key: self._guarded(one, place) for key, one in value.items()}
        if isinstance(value, list):
            return [self._guarded(one, place) for one in value]
        if isinstance(value, str) and self._is_marked(value):
            return self._standing_for(value)
        return value

    def _is_marked(self, text: str) -> bool:
        if text not in self._marked:
            tokenize = self._engine.tokenize
            self._marked[text] = bool(MARKS & set(text)) or (
                tokenize(text, special=True) != tokenize(text, special=False)
            )
        return self._marked[text]


def _message(n: int, turn: Turn) -> Message:
    """The message as templates know it, if its role is a known one: any other would be their text.

    A developer is what newer interfaces call the system, and templates do not know the word.
    """
    if turn.role not in CHAT_ROLES:
        raise BadRequest(
            f"messages[{n}].role must be one of {', '.join(CHAT_ROLES)}, not {turn.role!r:.80}",
            "messages",
        )
    role = "system" if turn.role == "developer" else turn.role
    message: Message = {"role": role, "content": turn.content}
    if turn.tool_calls:
        place = f"messages[{n}].tool_calls"
        message["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": _read(call.arguments, dict, place)},
            }
            for call in turn.tool_calls
        ]
    if turn.tool_call_id:
        message["tool_call_id"] = turn.tool_call_id
    if turn.name:
        message["name"] = turn.name
    return message


def _functions(tools: Tools) -> list[Message]:
    functions: list[Message] = _read(tools.functions, list, "tools")
    for tool in functions:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRequest("tools are not as they should be: one has no function", "tools")
    return functions


def _read(text: str, kind: type, place: str) -> Any:
    """The JSON value, if it is of this kind. Raises BadRequest."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as exc:
        raise BadRequest(f"{place} is no JSON: {exc!s:.100}", place.split("[")[0]) from None
    if not isinstance(value, kind):
        raise BadRequest(f"{place} is not as it should be", place.split("[")[0])
    return value


def _stretch(engine: Engine, text: str, *, special: bool, begins: bool) -> list[TokenId]:
    """Token ids of a part of a text, with a begin-of-text token where it `begins`, and once."""
    tokens = engine.tokenize(text, special=special) if text else []
    vocabulary = engine.info.vocabulary
    if vocabulary.adds_bos and tokens[:1] == [vocabulary.bos]:
        is_doubled = tokens[1:2] == [vocabulary.bos]  # the template has it, too
        return tokens[1:] if is_doubled or not begins else tokens
    return tokens
