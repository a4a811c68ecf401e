"""Grammars in llama.cpp's notation, GBNF, written in Lark's, which llguidance reads.

Both have rules, alternatives, groups and repetitions, so a grammar is rewritten word by word. But
Lark cuts a text into lexemes first, each as long as it can be, and GBNF does not: `[a-z]* "end"`
allows "lend". So what is written here has lexemes of one character, and texts are split up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST_REPEATED = 2000  # as in llama.cpp

WORD = re.compile(
    r"""
    (?P<blank>   (?:[ \t\r\n]|\#[^\n]*)+ )
  | (?P<rule>    [A-Za-z0-9_-]+ (?=[ \t\r\n]*::=) )
  | (?P<name>    [A-Za-z0-9_-]+ )
  | (?P<is>      ::= )
  | (?P<text>    "(?:\\.|[^"\\])*" )
  | (?P<chars>   \[(?:\\.|[^\]\\])*\] )
  | (?P<any>     \. )
  | (?P<or>      \| )
  | (?P<open>    \( )
  | (?P<close>   \) )
  | (?P<many>    [*+?] | \{[ ]*\d{1,9}[ ]*(?:,[ ]*(?:\d{1,9})?[ ]*)?\} )
    """,
    re.VERBOSE | re.DOTALL,
)
CHARACTER = r"\\x[0-9A-Fa-f]{2}|\\u[0-9A-Fa-f]{4}|\\U[0-9A-Fa-f]{8}|\\[nrt\"\\\[\]]|[^\\]"
RANGE = re.compile(f"({CHARACTER})(?:-({CHARACTER}))?", re.DOTALL)
ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}
BEFORE_NOTHING = {"is", "or", "open"}  # what follows may be nothing at all
ENDS = {"rule", "or", "close"}


def to_lark(grammar: str) -> str:
    """The rules of `grammar`, of which `root` is the first. Raises ValueError with a reason."""
    rules, named = set[str](), set[str]()
    written: list[str] = []
    depth, last = 0, ""
    for kind, word in _words(grammar):
        if last in BEFORE_NOTHING and kind in ENDS:
            written.append('""')
        depth += {"open": 1, "close": -1}.get(kind, 0)
        _check(kind, word, last, depth)
        if kind == "rule":
            if word in rules:
                raise ValueError(f"there are two rules {word!r}")
            rules.add(word)
        elif kind == "name":
            named.add(word)
        written.append(_written(kind, word))
        last = kind
    if last in BEFORE_NOTHING:
        written.append('""')
    if depth:
        raise ValueError("a bracket is not closed")
    if missing := ({"root"} | named) - rules:
        raise ValueError(f"there is no rule {min(missing)!r:.80}")
    return f"start: {_name('root')} {' '.join(written)}\n"


def _words(grammar: str) -> Iterator[tuple[str, str]]:
    at = 0
    while at < len(grammar):
        found = WORD.match(grammar, at)
        if found is None:
            line = grammar.count("\n", 0, at) + 1
            raise ValueError(f"line {line} is not GBNF from {grammar[at : at + 20]!r} on")
        at = found.end()
        assert found.lastgroup is not None
        if found.lastgroup != "blank":
            yield found.lastgroup, found.group()


def _check(kind: str, word: str, last: str, depth: int) -> None:
    """Raise ValueError for a word that cannot stand behind one of the kind `last`."""
    expected = {"": "rule", "rule": "is"}.get(last, "")
    if kind != expected if expected else kind == "is":
        raise ValueError(f"{word!r:.80} is not where it can be: a rule is `name ::= …`")
    if depth < 0 or (kind == "rule" and depth):
        raise ValueError("a bracket is not closed, or closes nothing")
    if kind == "many" and last not in ("name", "text", "chars", "any", "close"):
        raise ValueError(f"nothing is repeated by {word!r}")


def _written(kind: str, word: str) -> str:
    match kind:
        case "rule":
            return f"\n{_name(word)}"
        case "name":
            return _name(word)
        case "is":
            return ":"
        case "text":
            return _text(word[1:-1])
        case "chars":
            return _class(word[1:-1])
        case "any":
            return "/(?s:.)/"
        case "many":
            return _counted(word)
    return word


def _counted(word: str) -> str:
    counts = [int(count) for count in re.findall(r"\d+", word)]
    if counts and (max(counts) > MOST_REPEATED or counts != sorted(counts)):
        raise ValueError(
            f"{word} is no number of repetitions: up to {MOST_REPEATED}, the least first"
        )
    return word.replace(" ", "")


def _name(name: str) -> str:
    """A name of a rule in Lark: small letters, digits and underscores, and not one of its own."""
    return "r_" + "".join(c if c.islower() or c.isdigit() else f"_{ord(c)}_" for c in name)


def _text(text: str) -> str:
    """Each character by itself: see above."""
    found = _whole(re.findall(CHARACTER, text, re.DOTALL), text)
    return f"({' '.join(f'/{_point(one)}/' for one in found)})" if found else '""'


def _class(chars: str) -> str:
    no = "^" if chars.startswith("^") else ""
    ranges = [found.groups() for found in RANGE.finditer(chars.removeprefix("^"))]
    _whole([one if last is None else f"{one}-{last}" for one, last in ranges], chars[len(no) :])
    if not ranges:
        raise ValueError(f"[{chars}] has no characters")
    parts = [
        _point(one) if last is None else f"{_point(one)}-{_point(last)}" for one, last in ranges
    ]
    if any(last is not None and _code(last) < _code(one) for one, last in ranges):
        raise ValueError(f"[{chars:.60}] has a range that ends before it begins")
    return f"/[{no}{''.join(parts)}]/"


def _whole(parts: list[str], text: str) -> list[str]:
    if "".join(parts) != text:
        raise ValueError(f"{text:.60} has a backslash that escapes nothing")
    return parts


def _code(character: str) -> int:
    """The number of a character, which may be escaped."""
    if character[0] != "\\" or len(character) == 1:
        return ord(character)
    if character[1] in "xuU":
        return int(character[2:], 16)
    return ord(ESCAPED.get(character[1], character[1]))


def _point(character: str) -> str:
    code = _code(character)
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise ValueError(f"{character} is no character")
    return f"\\u{{{code:x}}}"
