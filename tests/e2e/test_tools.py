"""The default model's own template: what Hugging Face makes of it, and calls of tools."""

from __future__ import annotations

import json
from typing import Any

import pytest

from outrider import Client

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Name of the city"}},
            "required": ["city"],
        },
    },
}
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Paris? Use the tool."}]


@pytest.fixture(scope="module")
def pair(serve: Any, default_target: Any, default_draft: Any) -> Client:
    client: Client = serve(
        "-m", default_target, "-md", default_draft, "--ctx=1024", "--draft-quant=off"
    )
    return client


def test_a_conversation_is_laid_out_as_hugging_face_does(pair: Client) -> None:
    said = [{"role": "user", "content": " Hi\n"}, {"role": "assistant", "content": "Ho"}]
    assert pair.apply_template([*said, {"role": "user", "content": "Zoë?"}]) == (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n Hi\n<|im_end|>\n"
        "<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nZoë?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    brief = [{"role": "system", "content": "Be brief."}, *said[:1]]
    assert pair.apply_template(brief).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_tools_and_calls_are_laid_out_as_hugging_face_does(pair: Client) -> None:
    call = {"id": "1", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}}
    asked = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "sunny", "tool_call_id": "1"},
    ]
    assert pair.apply_template(asked, tools=[WEATHER]) == (
        f"<|im_start|>system\n{SYSTEM}\n\n# Tools\n\n"
        "You may call one or more functions to assist with the user query.\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{json.dumps(WEATHER)}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call><|im_end|>\n'
        f"<|im_start|>user\n{QUESTION[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>\n<|im_start|>user\n<tool_response>\nsunny\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_marker_that_is_typed_ends_nothing(pair: Client) -> None:
    marker = pair.tokenize("<|im_end|>")
    typed = [{"role": "user", "content": "Say <|im_end|> once."}]
    answer = pair.create_chat_completion(typed, max_tokens=1)
    assert answer.prompt_token_ids.count(marker[0]) == 2
    assert pair.detokenize(answer.prompt_token_ids).count("<|im_end|>") == 1


def test_the_model_calls_a_tool_and_is_told_its_answer(pair: Client) -> None:
    settings: Any = {"tools": [WEATHER], "temperature": 0, "max_tokens": 80}
    first = pair.create_chat_completion(QUESTION, **settings)
    (call,) = first.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", {"city": "Paris"})
    assert (first.text, first.choices[0].finish_reason) == ("", "tool_calls")
    stream = pair.create_chat_completion(QUESTION, stream=True, **settings)
    deltas = [delta for fragment in stream for delta in fragment.tool_calls]
    assert deltas[0].name == "get_weather"
    assert "".join(delta.arguments for delta in deltas) == call.arguments
    answered = [
        *QUESTION,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "12 degrees, rain", "tool_call_id": call.id},
    ]
    settings |= {"tool_choice": "none", "max_tokens": 10}  # else a model as small asks again
    second = pair.create_chat_completion(answered, **settings)
    assert "12 degrees, rain" in pair.detokenize(second.prompt_token_ids)
    assert second.text
    assert not second.tool_calls
