"""Tool calls in the form of the Hermes models, found in a text while it comes.

A call is `<tool_call>`, a JSON object with a name and arguments, and `</tool_call>`. Small models
often write a Markdown block of JSON instead: that is a call if it has nothing but the name of a
function that was offered, and arguments. All else is content, and given on at once but for what may
yet be the beginning of a call. Nothing is lost: what begins like a call and is none is content,
too; only white space between calls is dropped. In whatever pieces a text comes, the outcome is the
same.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from outrider.core.values import ToolCallDelta

OPENS, CLOSES = "<tool_call>", "</tool_call>"
FORMS = {OPENS: CLOSES, "```json": "```"}
ANY_OPENS = re.compile("|".join(FORMS))
BLANKS = " \t\r\n"  # JSON's white space
OUTSIDE = frozenset(BLANKS + ":,+-.0123456789eEtrufalsn")  # of JSON between strings and brackets
PAIRS = {"}": "{", "]": "["}
DEEPEST = 64  # brackets within each other


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of a function; `arguments` is a JSON object, as the model has written it."""

    id: str
    name: str
    arguments: str


class Found(NamedTuple):
    """What a piece of text has brought."""

    content: str
    calls: tuple[ToolCallDelta, ...]


class NotJson(ValueError):
    """No JSON object can begin like this."""


class Parser:
    """Takes an answer piece by piece. With `in_pieces` the arguments of a call come as they do.

    Then a call of which only the arguments are broken stays one, with arguments that are no JSON;
    without, a call is whole or it is content. `names` are those of the functions that were offered.
    """

    def __init__(
        self,
        names: Collection[str] = (),
        *,
        in_pieces: bool,
        new_id: Callable[[], str] | None = None,
    ) -> None:
        self._names, self._in_pieces, self._new_id = names, in_pieces, new_id or call_id
        self._state: Literal["content", "call", "behind"] = "content"
        self._held = ""  # what came and is not decided on
        self._blank = ""  # the white space at the beginning, or behind a call
        self._is_blank = True  # whether nothing else came there
        self._opens = OPENS  # with what this call began
        self._object = Object()
        self._given: int | None = None  # how far the arguments of this call were given; None: not
        self._calls = 0
        self._content: list[str] = []
        self._deltas: list[ToolCallDelta] = []

    def feed(self, text: str) -> Found:
        """What is certain now that `text` has come, too."""
        self._held += text
        while self._step():
            pass
        return self._taken()

    def end(self) -> Found:
        """What remains when nothing more comes."""
        if self._state == "call" and self._given is None:
            self._say(self._opens + self._object.text)
        elif self._state == "content":
            self._say(self._held)
            if not self._calls:
                self._content.append(self._blank)
        self._held = self._blank = ""
        return self._taken()

    def _taken(self) -> Found:
        found = Found("".join(self._content), tuple(self._deltas))
        self._content, self._deltas = [], []
        return found

    def _step(self) -> bool:
        """Go as far as one state reaches; False if that needs more text."""
        match self._state:
            case "content":
                return self._read_content()
            case "call":
                return self._read_call()
            case "behind":
                return self._read_behind()

    def _read_content(self) -> bool:
        found = ANY_OPENS.search(self._held)
        if found is None:
            kept = max(beginning(self._held, opens) for opens in FORMS)
            self._say(self._held[: len(self._held) - kept])
            self._held = self._held[len(self._held) - kept :]
            return False
        self._say(self._held[: found.start()])
        self._state, self._held, self._opens = "call", self._held[found.end() :], found.group()
        self._object = Object(None if self._opens == OPENS else self._names)
        self._given = None
        return True

    def _say(self, text: str) -> None:
        """Give `text` on as content; white space where a call may stand has to wait."""
        if self._is_blank and not text.strip(BLANKS):
            self._blank += text
            return
        self._content.append(self._blank + text)
        self._blank, self._is_blank = "", False

    def _read_call(self) -> bool:
        try:
            taken = self._object.feed(self._held)
        except NotJson:
            self._held = self._held[self._object.taken :]
            self._give_arguments()
            self._break_off()
            return True
        self._held = self._held[taken:]
        self._give_arguments()
        if not self._object.is_whole:
            return False
        self._close()
        return True

    def _give_arguments(self) -> None:
        """In pieces: give on what came of the arguments, the name before them."""
        if not self._in_pieces:
            return
        made = self._object
        if self._given is None:
            name = made.name_so_far
            if name is None or made.arguments_from is None:
                return
            self._name(name)
            self._given = made.arguments_from
        text = made.text[self._given : made.arguments_to]
        if text:
            self._deltas.append(ToolCallDelta(self._calls - 1, arguments=text))
            self._given += len(text)

    def _name(self, name: str) -> None:
        self._deltas.append(ToolCallDelta(self._calls, self._new_id(), name))
        self._calls += 1

    def _break_off(self) -> None:
        """No object can begin like this: it is content, but for what was given on of a call."""
        if self._given is None:
            self._state = "content"
            self._say(self._opens + self._object.text)
            return
        self._held = self._object.text[self._given :] + self._held
        self._go_behind()

    def _close(self) -> None:
        """The object is whole: it is a call, or content."""
        if self._given is None:
            call = self._object.call()
            if call is None:
                self._state = "content"
                self._say(self._opens + self._object.text)
                return
            self._name(call[0])
            self._deltas.append(ToolCallDelta(self._calls - 1, arguments=call[1]))
        self._go_behind()

    def _go_behind(self) -> None:
        self._state, self._blank, self._is_blank = "behind", "", True

    def _read_behind(self) -> bool:
        rest, closes = self._held.lstrip(BLANKS), FORMS[self._opens]
        if closes.startswith(rest) and rest != closes:
            return False
        if rest.startswith(closes):
            self._held = rest[len(closes) :]
        self._state = "content"
        return True


@dataclass(slots=True)
class Object:
    """A JSON object that comes in pieces, and where its name and arguments stand in it.

    With `names` it has to have nothing else, and one of these names.
    """

    names: Collection[str] | None = None
    text: str = ""
    taken: int = 0  # of the last piece
    is_whole: bool = False
    arguments_from: int | None = None  # where they begin, if they are an object
    arguments_to: int | None = None  # where they end; None: not yet
    _brackets: list[str] = field(default_factory=list)
    _in_string: bool = False
    _escaped: bool = False
    _from: int = 0  # where the last string, or the last member's value, begins
    _key: str | None = None  # of the member whose value is due
    _name: tuple[int, int] | None = None  # where the value of "name" stands

    def feed(self, text: str) -> int:
        """Take `text` up to where the object ends; how much that was. Raises NotJson."""
        start = len(self.text)
        self.text += text
        for at in range(start, len(self.text)):
            try:
                self._take(self.text[at], at)
            except NotJson:
                self.text, self.taken = self.text[:at], at - start
                raise
            if self.is_whole:
                self.text, self.taken = self.text[: at + 1], at + 1 - start
                return self.taken
        self.taken = len(text)
        return self.taken

    @property
    def name_so_far(self) -> str | None:
        """The value of "name", if it has come."""
        if self._name is None:
            return None
        return _printable(_read(self.text[slice(*self._name)]))

    def call(self) -> tuple[str, str] | None:
        """The name and the arguments of the call that this whole object is; None if it is none."""
        value = _read(self.text)
        if not isinstance(value, dict) or (self.names is not None and len(value) < 2):
            return None
        name, arguments = _printable(value.get("name")), value.get("arguments", {})
        if name is None:
            return None
        if isinstance(arguments, str) and isinstance(_read(arguments), dict):
            return name, arguments  # as OpenAI's interface has them
        if not isinstance(arguments, dict):
            return None
        return name, self.text[self.arguments_from or 0 : self.arguments_to or 0] or "{}"

    def _take(self, char: str, at: int) -> None:
        if self._in_string:
            self._take_in_string(char, at)
        elif char == '"':
            self._require(bool(self._brackets))
            self._in_string = True
            if len(self._brackets) == 1:
                self._from = at
        elif char in "{[":
            self._open(char, at)
        elif char in PAIRS:
            self._shut(char, at)
        else:
            self._require(char in (OUTSIDE if self._brackets else BLANKS))
            if len(self._brackets) == 1 and char in ":,":
                self._key = _read(self.text[self._from : at]) if char == ":" else None
                self._from = at
                self._require(
                    char == "," or self.names is None or self._key in ("name", "arguments")
                )

    def _take_in_string(self, char: str, at: int) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == '"':
            self._in_string = False
            if len(self._brackets) == 1 and self._key == "name" and self._name is None:
                self._name = (self._from, at + 1)
                self._require(self.names is None or self.name_so_far in self.names)
        else:
            self._require(char >= " ")

    def _open(self, char: str, at: int) -> None:
        self._require(len(self._brackets) < DEEPEST and (char == "{" or bool(self._brackets)))
        if len(self._brackets) == 1 and self._key == "arguments" and char == "{":
            self._require(self.arguments_from is None)
            self.arguments_from = at
        self._brackets.append(char)

    def _shut(self, char: str, at: int) -> None:
        self._require(self._brackets[-1:] == [PAIRS[char]])
        self._brackets.pop()
        if len(self._brackets) == 1 and self.arguments_from and self.arguments_to is None:
            self.arguments_to = at + 1
        self.is_whole = not self._brackets

    @staticmethod
    def _require(condition: bool) -> None:
        if not condition:
            raise NotJson


def beginning(text: str, marker: str) -> int:
    """How many of the last letters of `text` may be the first of `marker`."""
    most = min(len(text), len(marker) - 1)
    return next(n for n in range(most, -1, -1) if text.endswith(marker[:n]))


def _read(text: str) -> Any:
    """The value that the JSON `text` means; None if it is no JSON, or names a key twice."""
    try:
        return json.loads(text, parse_int=float, object_pairs_hook=_once)
    except (ValueError, RecursionError):
        return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise NotJson
    return found


def _printable(value: object) -> str | None:
    return value if isinstance(value, str) and value and value.isprintable() else None


def call_id() -> str:
    """A name for a call that no other call has."""
    return f"call_{secrets.token_hex(12)}"


def gathered(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    """The calls that came in pieces, each as one."""
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.index == len(calls):
            calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        else:
            before = calls[delta.index]
            whole = before.arguments + delta.arguments
            calls[delta.index] = ToolCall(before.id, before.name, whole)
    return tuple(calls)


def parse(text: str, names: Collection[str] = ()) -> tuple[str, tuple[ToolCall, ...]]:
    """The content and the calls of a whole answer."""
    parser = Parser(names, in_pieces=False)
    found, rest = parser.feed(text), parser.end()
    return found.content + rest.content, gathered((*found.calls, *rest.calls))
