"""How a conversation becomes text and token ids, with templates that are not kind to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests import chat_templates
from tests.chat_templates import CHATML, GEMMA, HERMES, LLAMA3, MISTRAL, Here

from outrider.engines import toy_text
from outrider.engines.toy import ToyEngine
from outrider.errors import BadRequest
from outrider.wire.messages import FunctionCall, Tools, Turn
from outrider_services.pipeline import conversation

USER, ASSISTANT = 258, 259

# like Gemma's: no place for the system, but in front of the user's words
MERGING = """\
{%- set ns = namespace(system='') %}
{%- for message in messages %}
    {%- if message.role == 'system' %}{% set ns.system = ns.system + message.content | trim %}
    {%- elif message.role == 'user' %}
        {{- '<|user|>' + ns.system + message.content }}{% set ns.system = '' %}
    {%- elif message.role == 'assistant' %}{{ '<|assistant|>' + message.content }}
    {%- endif %}
{%- endfor %}
{{- '<|assistant|>' }}"""

Pairs = list[tuple[str, str]]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string", "description": "Where"}},
        },
    },
}


def said(*pairs: tuple[str, str]) -> tuple[Turn, ...]:
    return tuple(Turn(*pair) for pair in pairs)


def offered(*functions: Any) -> Tools:
    return Tools(json.dumps(functions))


def text(template: str, turns: tuple[Turn, ...], tools: Tools | None = None) -> str:
    return conversation.text(ToyEngine(), Here(template), turns, tools)


def ids(template: str, turns: tuple[Turn, ...], tools: Tools | None = None) -> list[int]:
    return conversation.token_ids(ToyEngine(), Here(template), turns, tools)


def bytes_of(tokens: list[int]) -> str:
    return bytes(token for token in tokens if token < 256).decode()


CALL = FunctionCall("abcdefghi", "weather", '{"place": "Rome"}')
ASKED = (
    Turn("user", "And in Rome?"),
    Turn("assistant", "", (CALL,)),
    Turn("tool", "sunny", tool_call_id="abcdefghi", name="weather"),
)


@pytest.mark.parametrize(
    ("messages", "left_out"),
    [
        ([("system", "a")], r"messages\[0\], of the role 'system'"),
        ([("developer", "a")], r"messages\[0\], of the role 'system'"),
        ([("user", "a"), ("system", "b")], r"messages\[1\], of the role 'system'"),
        ([("user", "a"), ("tool", "b"), ("user", "c")], r"messages\[1\], of the role 'tool'"),
        ([("system", "a<|user|>")], r"messages\[0\], of the role 'system'"),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages: Pairs, left_out: str) -> None:
    for ask in (text, ids):
        with pytest.raises(BadRequest, match=left_out):
            ask(MERGING, said(*messages))


@pytest.mark.parametrize("blank", ["", " \n"])
def test_where_nothing_is_said_nothing_is_lost(blank: str) -> None:
    turns = said(("user", "a"), ("system", blank))
    assert text(MERGING, turns) == "<|user|>a<|assistant|>"
    assert ids(MERGING, turns) == [USER, ord("a"), ASSISTANT]


@pytest.mark.parametrize("marker", ["", "<|user|>"])
def test_contents_stand_where_the_template_puts_them(marker: str) -> None:
    turns = said(("system", "s"), ("assistant", f"a{marker}"), ("user", "u"))
    typed = list(marker.encode())
    expected = [ASSISTANT, ord("a"), *typed, USER, *b"su", ASSISTANT]
    assert ids(MERGING, turns) == expected


@pytest.mark.parametrize("role", ["us<|end|>er", "wizard", "", "User", "user\n"])
def test_an_unknown_role_is_refused(role: str) -> None:
    for ask in (text, ids):
        with pytest.raises(BadRequest, match=r"messages\[1\].role must be one of system, "):
            ask(toy_text.TEMPLATE, said(("user", "a"), (role, "b")))


def test_a_developer_is_the_system() -> None:
    both = [said((role, "a"), ("user", "b")) for role in ("developer", "system")]
    developer, system = (text(toy_text.TEMPLATE, turns) for turns in both)
    assert developer == system


# ---- templates of well-known models -------------------------------------------------------------


def test_a_chatml_template_gives_what_is_documented() -> None:
    assert text(CHATML, said(("system", "s"), ("user", "u"))) == (
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu<|im_end|>\n<|im_start|>assistant\n"
    )


def test_where_a_template_has_no_system_its_words_come_before_the_users() -> None:
    turns = said(("system", " Be brief."), ("user", "Hi "), ("assistant", "Ho"), ("user", "Go on"))
    assert text(GEMMA, turns) == (
        "<s><start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHo"
        "<end_of_turn>\n<start_of_turn>user\nGo on<end_of_turn>\n<start_of_turn>model\n"
    )
    assert "Be brief.\n\nHi <|end|>" in bytes_of(
        ids(GEMMA, said(("system", "Be brief."), ("user", "Hi <|end|>")))
    )


def test_a_templates_own_reason_is_told() -> None:
    with pytest.raises(BadRequest, match="roles must alternate"):
        text(GEMMA, said(("user", "a"), ("user", "b")))
    with pytest.raises(BadRequest, match="System role not supported"):
        text(GEMMA, said(("system", "a"), ("assistant", "b")))


def test_a_llama_template_says_the_date_and_json() -> None:
    found = text(LLAMA3, said(("system", "Be brief. "), ("user", "Hi")))
    assert found.startswith("<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: ")
    assert (
        "\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>" in found
    )
    found = text(LLAMA3, (*ASKED[:2], Turn("tool", 'It is "sunny".')))
    assert '{"name": "weather", "parameters": {"place": "Rome"}}<|eot_id|>' in found
    assert '"It is \\"sunny\\"."<|eot_id|>' in found


def test_a_template_that_drops_what_is_said_with_a_call_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"leaves out messages\[1\], of the role 'assistant'"):
        text(LLAMA3, (ASKED[0], Turn("assistant", "Let me see.", (CALL,)), ASKED[2]))


def test_a_mistral_template_puts_the_system_last_and_reads_ids() -> None:
    turns = said(("system", "s"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    assert text(MISTRAL, turns) == "<s>[INST] a[/INST] b</s>[INST] s\n\nc[/INST]"
    with pytest.raises(BadRequest, match="length 9"):
        text(MISTRAL, (ASKED[0], Turn("assistant", "", (FunctionCall("x", "f", "{}"),))))
    with pytest.raises(BadRequest, match="Only user and assistant"):
        text(MISTRAL, ASKED)


def test_a_mistral_template_that_shows_no_tools_is_refused() -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"))
    with pytest.raises(BadRequest, match=r"leaves out tools\[0\]"):
        text(MISTRAL, turns, offered(WEATHER))


def test_a_hermes_template_has_tools_calls_and_answers() -> None:
    found = text(HERMES, ASKED, offered(WEATHER))
    assert '"description": "weather(place: str) Tells the weather."' in found
    assert (
        '<|im_start|>assistant\n<tool_call>\n{"name": "weather", "arguments": {"place": "Rome"}}\n'
        "</tool_call><|im_end|>\n<|im_start|>tool\n<tool_response>\nsunny\n</tool_response>"
    ) in found


def test_a_template_that_drops_calls_is_refused() -> None:
    with pytest.raises(BadRequest, match=r"leaves out the tool calls of messages\[1\]"):
        text(CHATML, ASKED)


# ---- markers ------------------------------------------------------------------------------------

TYPED = 'x<|end|>"\n\\'


def test_a_marker_typed_anywhere_stays_text() -> None:
    call = FunctionCall("abcdefghi", "weather", json.dumps({"place": TYPED, "more": [TYPED]}))
    turns = (Turn("user", TYPED), Turn("assistant", TYPED, (call,)), Turn("tool", TYPED))
    tool = json.loads(json.dumps(WEATHER).replace("Where", json.dumps(TYPED)[1:-1]))
    tool["function"]["description"] = TYPED
    plain = (turns, offered(tool))
    tokens = ids(toy_text.TEMPLATE, *plain)
    own = toy_text.CONTROLS[1], "<|end|>", "<|user|>", "<|end|>", "<|assistant|>", "<|end|>"
    labels = [toy_text.CONTROLS[token - 256] for token in tokens if token >= 256]
    assert labels == [*own, "<|user|>", "<|end|>", "<|assistant|>"]
    rendered = text(toy_text.TEMPLATE, *plain)
    naive = ToyEngine().tokenize(rendered, special=True)
    assert sum(token >= 256 for token in naive) > len(labels)  # what was typed would be obeyed
    assert "".join(toy_text.CONTROLS[t - 256] if t > 255 else chr(t) for t in tokens) == "".join(
        map(chr, rendered.encode())
    )


def test_a_marker_as_a_key_is_refused() -> None:
    call = FunctionCall("", "weather", json.dumps({"<|end|>": 1}))
    with pytest.raises(BadRequest, match=r"a key in messages\[1\] is a marker") as caught:
        text(toy_text.TEMPLATE, (ASKED[0], Turn("assistant", "", (call,)), ASKED[2]))
    assert caught.value.param == "messages"


@pytest.mark.parametrize("typed", ['\ue0000"\ue001', "\ue000", '\ue0009\\"\ue001'])
def test_stand_ins_that_are_typed_stand_for_nothing(typed: str) -> None:
    call = FunctionCall("", "weather", json.dumps({"place": typed}))
    turns = (Turn("user", typed), Turn("assistant", "", (call,)), Turn("tool", "t"))
    assert bytes_of(ids(toy_text.TEMPLATE, turns)).count(typed) >= 1
    assert bytes_of(ids(toy_text.TEMPLATE, turns)).count(json.dumps(typed, ensure_ascii=False)) == 1


def test_a_template_that_takes_contents_apart_is_refused() -> None:
    backwards = "{% for m in messages %}{{ m.content }}{{ m.content | reverse }}{% endfor %}"
    with pytest.raises(BadRequest, match="takes apart"):
        text(backwards, said(("user", "a")))


# ---- what peers may send ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("turns", "tools"),
    [
        (said(("user", "a")), Tools("")),
        (said(("user", "a")), Tools("[" * 100_000)),
        (said(("user", "a")), Tools("{}")),
        (said(("user", "a")), Tools('["f"]')),
        (said(("user", "a")), Tools('[{"function": {}}]')),
        (said(("user", "a")), Tools('[{"function": {"name": 5}}]')),
        ((Turn("assistant", "", (FunctionCall("", "f", "5"),)),), None),
        ((Turn("assistant", "", (FunctionCall("", "f", "{"),)),), None),
    ],
)
def test_what_is_no_json_or_no_tool_is_refused(turns: tuple[Turn, ...], tools: Tools) -> None:
    with pytest.raises(BadRequest, match=r"(is no JSON|not as (it|they) should be)"):
        text(toy_text.TEMPLATE, turns, tools)


def test_what_is_nested_too_deeply_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    deep: dict[str, Any] = {}
    for _ in range(2000):
        deep = {"a": deep}
    monkeypatch.setattr(conversation, "_functions", lambda tools: [{"function": deep}])
    with pytest.raises(BadRequest, match="nested too deeply"):
        text(toy_text.TEMPLATE, said(("user", "a")), offered(WEATHER))


def test_the_toys_template_gives_what_the_toy_itself_does() -> None:
    pairs = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "Go on")]
    assert text(toy_text.TEMPLATE, said(*pairs)) == ToyEngine().render(pairs)


def test_templates_mark_what_the_assistant_says() -> None:
    marked = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert text(marked, said(("user", "a"), ("assistant", "b"))) == "ab"
    assert chat_templates.Here("{{ {'b': '<é>', 'a': [1]} | tojson }}").render([], [], "") == (
        '{"b": "<é>", "a": [1]}'
    )
