"""How a conversation becomes text and token ids, with templates that are not kind to it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from outrider.engines.toy import ToyEngine
from outrider.errors import BadRequest
from outrider_services.pipeline import conversation
from outrider_services.pipeline.conversation import Messages

USER, ASSISTANT = 258, 259


class Merging(ToyEngine):
    """Its template is like Gemma's: no place for the system, but in front of the user's words."""

    def render(self, messages: Sequence[tuple[str, str]]) -> str:
        text = system = ""
        for role, content in messages:
            if role == "system":
                system += content.strip()
            elif role == "user":
                text += f"<|user|>{system}{content}"
                system = ""
            elif role == "assistant":
                text += f"<|assistant|>{content}"
        return text + "<|assistant|>"


@pytest.mark.parametrize(
    ("messages", "left_out"),
    [
        ([("system", "a")], r"messages\[0\], of the role 'system'"),
        ([("developer", "a")], r"messages\[0\], of the role 'developer'"),
        ([("user", "a"), ("system", "b")], r"messages\[1\], of the role 'system'"),
        ([("user", "a"), ("tool", "b"), ("user", "c")], r"messages\[1\], of the role 'tool'"),
        ([("system", "a<|user|>")], r"messages\[0\], of the role 'system'"),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages: Messages, left_out: str) -> None:
    for ask in (conversation.text, conversation.token_ids):
        with pytest.raises(BadRequest, match=left_out):
            ask(Merging(), messages)


@pytest.mark.parametrize("blank", ["", " \n"])
def test_where_nothing_is_said_nothing_is_lost(blank: str) -> None:
    messages = [("user", "a"), ("system", blank)]
    assert conversation.text(Merging(), messages) == "<|user|>a<|assistant|>"
    assert conversation.token_ids(Merging(), messages) == [USER, ord("a"), ASSISTANT]


@pytest.mark.parametrize("marker", ["", "<|user|>"])
def test_contents_stand_where_the_template_puts_them(marker: str) -> None:
    messages = [("system", "s"), ("assistant", f"a{marker}"), ("user", "u")]
    tokens = conversation.token_ids(Merging(), messages)
    typed = list(marker.encode())
    assert tokens == [ASSISTANT, ord("a"), *typed, USER, *b"su", ASSISTANT]


@pytest.mark.parametrize("role", ["us<|end|>er", "wizard", "", "User", "user\n"])
def test_an_unknown_role_is_refused(role: str) -> None:
    for ask in (conversation.text, conversation.token_ids):
        with pytest.raises(BadRequest, match=r"messages\[1\].role must be one of system, "):
            ask(ToyEngine(), [("user", "a"), (role, "b")])


def test_a_developer_is_the_system() -> None:
    said = [[(role, "a"), ("user", "b")] for role in ("developer", "system")]
    developer, system = (conversation.text(ToyEngine(), messages) for messages in said)
    assert developer == system
