"""Conversations with tools: the toy calls the first of them with what it was asked."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.integration.conftest import Oracle, Served

from outrider import BadRequest, Client, Completion, ToolCallDelta
from outrider.client.hermes import gathered
from outrider.engines.toy_text import END

QUESTION = 'What says "<|assistant|>"?\n'


def tool(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


TOOLS = [tool("ask", description="Asks.", parameters={"type": "object"}), tool("other")]
HI: list[dict[str, str]] = [{"role": "user", "content": QUESTION}]
SETTINGS: Any = {"temperature": 0, "max_tokens": 200}


async def test_a_call_comes_apart_from_the_text_and_its_answer_is_read(
    served: Served, oracle: Oracle
) -> None:
    async with served.connect() as client:
        first = await client.create_chat_completion(HI, tools=TOOLS, **SETTINGS)
        assert (first.text, first.choices[0].finish_reason) == ("", "tool_calls")
        (call,) = first.tool_calls
        assert (call.name, json.loads(call.arguments)) == ("ask", {"text": QUESTION})
        assert call.id.startswith("call_")
        answered: list[Any] = [
            *HI,
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "nobody", "tool_call_id": call.id, "name": "ask"},
        ]
        second = await client.create_chat_completion(answered, tools=TOOLS, **SETTINGS)
        assert second.choices[0].finish_reason == "length"
        assert second.text == oracle(second.prompt_token_ids, 200).text
        assert not second.tool_calls
        text = await client.apply_template(answered, tools=TOOLS)
    assert text.startswith(
        '<|system|>You may call these functions:\n<tools>\n{"type": "function", "function": '
        '{"name": "ask", "description": "Asks.", "parameters": {"type": "object"}}}\n'
    )
    escaped = json.dumps(QUESTION)
    assert text.endswith(
        f'{QUESTION}<|end|><|assistant|>\n<tool_call>\n{{"name": "ask", "arguments": '
        f'{{"text": {escaped}}}}}\n</tool_call><|end|>'
        "<|user|><tool_response>nobody</tool_response><|end|><|assistant|>"
    )


@pytest.mark.parametrize("mode", ["plain", "sync", "pipelined"])
async def test_a_streamed_call_comes_in_pieces(served: Served, mode: Any) -> None:
    async with served.connect() as client:
        stream = await client.create_chat_completion(
            HI, tools=TOOLS, stream=True, mode=mode, **SETTINGS
        )
        deltas: list[ToolCallDelta] = []
        async for fragment in stream:
            deltas += fragment.tool_calls
            assert fragment.text == ""
        whole = await stream.result()
    assert stream.finish_reason == whole.choices[0].finish_reason == "tool_calls"
    assert (deltas[0].index, deltas[0].name, deltas[0].id[:5]) == (0, "ask", "call_")
    assert len(deltas) > 2
    assert gathered(deltas) == whole.tool_calls
    assert json.loads(whole.tool_calls[0].arguments) == {"text": QUESTION}


def test_the_synchronous_client_does_the_same(served: Served) -> None:
    with Client(served.ipc) as client:
        whole = client.create_chat_completion(HI, tools=TOOLS, **SETTINGS)
        stream = client.create_chat_completion(HI, tools=TOOLS, stream=True, **SETTINGS)
        assert "".join(fragment.text for fragment in stream) == ""
        calls = [[(one.name, one.arguments) for one in made.tool_calls]
                 for made in (whole, stream.result())]  # fmt: skip
        assert calls[0] == calls[1] != []
        assert client.apply_template(HI, tools=TOOLS).startswith("<|system|>You may call")


async def test_what_a_limit_cuts_off_is_content(served: Served) -> None:
    async with served.connect() as client:
        cut = await client.create_chat_completion(HI, tools=TOOLS, temperature=0, max_tokens=30)
        assert cut.text == '<tool_call>\n{"name": "ask", "arg'[:30]
        assert (cut.tool_calls, cut.choices[0].finish_reason) == ((), "length")
        stream = await client.create_chat_completion(
            HI, tools=TOOLS, temperature=0, max_tokens=30, stream=True
        )
        assert "".join([fragment.text async for fragment in stream]) == cut.text
        assert sum(len(fragment.tokens) for fragment in stream.fragments) == 30


async def test_whoever_chooses_no_tool_is_told_of_none(served: Served) -> None:
    choices: list[dict[str, Any]] = [{}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": []}]
    async with served.connect() as client:
        text = await client.apply_template(HI, tools=TOOLS, tool_choice="none")
        assert text == await client.apply_template(HI)
        answers: list[Completion] = [
            await client.create_chat_completion(HI, **chosen, temperature=0, max_tokens=20)
            for chosen in choices
        ]
    assert {answer.text for answer in answers} == {answers[0].text}


ENDING = {END: 66.0}  # as soon as it may
PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["Rome", "Oslo"]}},
    "required": ["place"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("choice", ["required", tool("go")])
async def test_a_tool_that_must_be_called_is_called_as_its_schema_says(
    served: Served, choice: Any
) -> None:
    tools = [tool("go", parameters=PLACE), tool("stay")]
    async with served.connect() as client:
        whole = await client.create_chat_completion(
            HI, tools=tools, tool_choice=choice, logit_bias=ENDING, temperature=1, seed=4
        )
        free = await client.create_chat_completion(HI, tools=tools, **SETTINGS)
    assert (whole.text, whole.choices[0].finish_reason) == ("", "tool_calls")
    for call in whole.tool_calls:
        given = json.loads(call.arguments)
        assert given in ({"place": "Rome"}, {"place": "Oslo"}) if call.name == "go" else given == {}
    if choice != "required":
        assert [call.name for call in whole.tool_calls] == ["go"]
    (call,) = free.tool_calls
    assert json.loads(call.arguments) == {"text": QUESTION}  # which no schema allows


async def test_what_leaves_no_room_for_calls_is_refused_in_a_sentence(served: Served) -> None:
    form = {"type": "json_object"}
    async with served.connect() as client:
        for choice in ("auto", "required"):
            with pytest.raises(BadRequest, match="leaves no room for calls") as no:
                await client.create_chat_completion(
                    HI, tools=TOOLS, tool_choice=choice, response_format=form
                )
            assert no.value.param == "response_format"


async def test_what_the_template_cannot_take_is_refused_and_the_next_is_served(
    served: Served,
) -> None:
    async with served.connect() as client:
        with pytest.raises(BadRequest, match="cannot take this conversation: the template has no"):
            await client.apply_template([{"role": "function", "content": "x"}])
        assert await client.apply_template(HI)
