"""A conversation as text and as token ids: no word of it is lost, and none is obeyed.

Templates are not ours, and one may leave a message out without a word: Gemma's puts what the system
says in front of what the user says next, and drops it if nothing comes next. So each is first tried
on private-use characters in place of the contents: what comes out has its place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from outrider.core.engine import Engine
from outrider.core.values import CHAT_ROLES, TokenId
from outrider.errors import BadRequest

PLACE = "\ue000{}\ue001"  # in place of the content of the message with this number
PLACES = re.compile(PLACE.format(r"(\d+)"))

Messages = Sequence[tuple[str, str]]  # (role, content)


def text(engine: Engine, messages: Messages) -> str:
    """The template applied to the messages. Raises BadRequest if it leaves one of them out."""
    _laid_out(engine, messages)
    return engine.render(_known(messages))


def token_ids(engine: Engine, messages: Messages) -> list[TokenId]:
    """The same as ids: the template's markers become control tokens, markers in contents do not."""
    parts = _laid_out(engine, messages)
    contents = [content for _, content in messages]
    if all(engine.tokenize(c, special=True) == engine.tokenize(c, special=False) for c in contents):
        return _stretch(engine, engine.render(_known(messages)), special=True, begins=True)
    tokens: list[TokenId] = []
    for n, part in enumerate(parts):  # the odd ones are numbers of messages
        stretch = contents[int(part)] if n % 2 else part
        tokens += _stretch(engine, stretch, special=not n % 2, begins=not tokens)
    return tokens


def _known(messages: Messages) -> Messages:
    """The messages, if their roles are known ones: any other would be text of the template.

    A developer is what newer interfaces call the system, and templates do not know the word.
    """
    for n, (role, _) in enumerate(messages):
        if role not in CHAT_ROLES:
            raise BadRequest(
                f"messages[{n}].role must be one of {', '.join(CHAT_ROLES)}, not {role!r:.80}",
                "messages",
            )
    return [("system" if role == "developer" else role, content) for role, content in messages]


def _laid_out(engine: Engine, messages: Messages) -> list[str]:
    """The template's own texts and, between them, the numbers of the messages that stand there."""
    said = [bool(content.strip()) for _, content in messages]
    stand_ins = [
        (role, PLACE.format(n) if said[n] else content)
        for n, (role, content) in enumerate(_known(messages))
    ]
    parts = PLACES.split(engine.render(stand_ins))
    for n, (role, _) in enumerate(messages):
        if said[n] and str(n) not in parts[1::2]:
            raise BadRequest(
                f"the model's chat template leaves out messages[{n}], of the role {role!r}; "
                "say it in a message of the user",
                "messages",
            )
    return parts


def _stretch(engine: Engine, text: str, *, special: bool, begins: bool) -> list[TokenId]:
    """Token ids of a part of a text, with a begin-of-text token where it `begins`, and once."""
    tokens = engine.tokenize(text, special=special) if text else []
    vocabulary = engine.info.vocabulary
    if vocabulary.adds_bos and tokens[:1] == [vocabulary.bos]:
        is_doubled = tokens[1:2] == [vocabulary.bos]  # the template has it, too
        return tokens[1:] if is_doubled or not begins else tokens
    return tokens
