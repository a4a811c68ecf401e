"""What HTTP requests ask the pipeline for, and which are refused: without sockets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from outrider.client.chat import conversation, tools_of
from outrider.client.settings import submit
from outrider.core.constraints import Constraint
from outrider.errors import BadRequest
from outrider.wire.codec import check
from outrider.wire.messages import FunctionCall, Submit, Tools, Turn
from outrider_services.gateway.answering import listed
from outrider_services.gateway.asking import Ask, Gap
from outrider_services.gateway.handlers import from_validation
from outrider_services.gateway.llama_requests import InfillRequest, NativeRequest
from outrider_services.gateway.openai_requests import ChatRequest, CompletionRequest

SAID: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
SAMPLERS: dict[str, Any] = {
    "typical_p": 0.9,
    "top_n_sigma": 2.0,
    "dynatemp_range": 0.5,
    "dynatemp_exponent": 1.5,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.2,
    "dry_multiplier": 0.8,
    "dry_base": 1.5,
    "dry_allowed_length": 3,
    "dry_penalty_last_n": -1,
    "dry_sequence_breakers": ["."],
    "samplers": "edskypmxt",
}
CHAT, PROMPT = {"model": "m", **SAID}, {"prompt": "Hi"}


def sent(ask: Ask) -> Submit:
    """What the library makes of it."""
    turns = None if ask.messages is None else conversation(ask.messages)
    message = submit(1, "", turns, ask.settings, tools_of(ask.tools, ask.tool_choice))
    check(message)
    return message


def refusal(kind: type[BaseModel], body: object) -> BadRequest:
    """The sentence about a body that is wrong, wherever that is noticed."""
    try:
        made: Any = kind.model_validate(body)
    except ValidationError as exc:
        return from_validation([{**one, "loc": ("body", *one["loc"])} for one in exc.errors()])
    try:
        made.ignored()
        sent(made.ask())
    except BadRequest as exc:
        return exc
    raise AssertionError(f"it is taken: {body}")


# ---- what is asked for --------------------------------------------------------------------------


def test_every_setting_reaches_the_library() -> None:
    body = {
        **CHAT,
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
        "repeat_last_n": 32,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "logit_bias": {"5": -1.5},
        "seed": 7,
        "stop": ["a", "b"],
        "max_completion_tokens": 9,
        "logprobs": True,
        "ignore_eos": True,
        "top_logprobs": 3,
        "cache_prompt": False,
        "return_provenance": True,
        "speculative.enabled": False,
        "speculative.n_max": 6,
        "speculative.n_min": 2,
        "speculative.p_min": 0.25,
        **SAMPLERS,
    }
    ask = ChatRequest.model_validate(body).ask()
    assert ask.messages == SAID["messages"]
    assert {name: value for name, value in ask.settings.items() if value is not None} == {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repeat_penalty": 1.1,
        "repeat_last_n": 32,
        "presence_penalty": 0.1,
        "frequency_penalty": -0.1,
        "logit_bias": {"5": -1.5},
        "seed": 7,
        "stop": ["a", "b"],
        "max_tokens": 9,
        "logprobs": True,
        "top_logprobs": 3,
        "ignore_eos": True,
        "cache_prompt": False,
        "trace": True,
        "mode": "plain",
        "n_draft": 6,
        "n_min": 2,
        "p_min": 0.25,
        **SAMPLERS,
    }
    asked = sent(ask)
    assert (asked.n_predict, asked.top_logprobs, asked.cache) == (9, 3, None)
    told = asked.sampling.as_dict()
    assert {name: told[name] for name in SAMPLERS if name != "samplers"} == {
        **{name: value for name, value in SAMPLERS.items() if name != "samplers"},
        "dry_sequence_breakers": (".",),
    }


def test_a_form_reaches_the_library_by_each_of_its_names() -> None:
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    text = '{"type": "object", "properties": {"a": {"const": null}}}'
    named = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    loose = {"type": "json_object", "schema": schema}
    wanted: list[tuple[dict[str, Any], Constraint | None]] = [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Constraint("json")),
        ({"response_format": named}, Constraint("schema", text)),
        ({"response_format": loose}, Constraint("schema", text)),
        ({"json_schema": schema}, Constraint("schema", text, "json_schema")),
        ({"grammar": 'root ::= "a"'}, Constraint("gbnf", 'root ::= "a"', "grammar")),
        ({"grammar": ""}, None),
    ]
    for body, constraint in wanted:
        for kind, good in (
            (ChatRequest, CHAT),
            (CompletionRequest, PROMPT),
            (NativeRequest, PROMPT),
        ):
            ask: Ask = kind.model_validate({**good, **body}).ask()
            assert sent(ask).constraint == constraint


def test_tools_and_what_became_of_them_reach_the_library() -> None:
    parameters = {"type": "object", "properties": {"a": {"const": None}}}
    function = {"name": "f", "description": "d", "parameters": parameters}
    tools = [{"type": "function", "function": {**function, "strict": True}}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *SAID["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"},
    ]
    body = {"messages": messages, "tools": tools}
    found = sent(ChatRequest.model_validate(body).ask())
    assert found.messages == (
        Turn("user", "Hi"),
        Turn("assistant", "", (FunctionCall("c1", "f", "{}"),)),
        Turn("tool", "r", (), "c1", "f"),
    )
    told = Tools(json.dumps([{"type": "function", "function": function}]))
    assert (found.tools, found.constraint) == (told, None)
    named = {"type": "function", "function": {"name": "f"}}
    for choice, tells in (("required", told.changed(choice="required")),
                          (named, told.changed(choice="required", name="f"))):  # fmt: skip
        for several in (None, True, False):
            chosen = {**body, "tool_choice": choice, "parallel_tool_calls": several}
            found = sent(ChatRequest.model_validate(chosen).ask())
            assert (found.tools, found.constraint and found.constraint.kind) == (tells, "tools")
            assert found.constraint
            is_one = choice == named or several is False
            assert json.loads(found.constraint.text)["several"] is not is_one
    none = {**body, "tool_choice": "none", "parallel_tool_calls": False}
    assert sent(ChatRequest.model_validate(none).ask()).tools is None


@pytest.mark.parametrize("samplers", [["top_k", "top_p", "infill"], "kpi"])
def test_an_editors_list_of_samplers_with_infill_is_as_none(samplers: object) -> None:
    plain = InfillRequest.model_validate({})
    asked = InfillRequest.model_validate({"samplers": samplers})
    assert (asked.ask(), plain.ignored()) == (plain.ask(), [])
    assert asked.ignored() == ["samplers"]
    kept = InfillRequest.model_validate({"samplers": ["top_k"]})
    assert (kept.ask().settings["samplers"], kept.ignored()) == (["top_k"], [])
    native = NativeRequest.model_validate({**PROMPT, "samplers": samplers})
    with pytest.raises(BadRequest, match="samplers has 'i"):
        sent(native.ask())


def test_what_is_not_said_is_left_to_the_library() -> None:
    ask = CompletionRequest.model_validate({"prompt": "x"}).ask()
    assert submit(1, "x", None, {**ask.settings, "seed": 1}) == submit(1, "x", None, {"seed": 1})


@pytest.mark.parametrize(
    ("body", "most"),
    [
        ({}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 5}, 5),
        ({"max_completion_tokens": 6}, 6),
        ({"max_tokens": 5, "max_completion_tokens": 6}, 6),
    ],
)
def test_the_newer_name_of_the_length_wins(body: dict[str, Any], most: int | None) -> None:
    assert ChatRequest.model_validate({**CHAT, **body}).ask().settings["max_tokens"] == most


def test_parts_of_text_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = {"messages": [{"role": "user", "content": parts, "name": "me"}]}
    assert ChatRequest.model_validate(body).ask().messages == [{"role": "user", "content": "ab"}]


@pytest.mark.parametrize("prompt", ["Hi", ["Hi"]])
def test_a_list_of_prompts_may_have_one(prompt: object) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).ask().prompt == "Hi"
    assert NativeRequest.model_validate({"prompt": prompt}).ask().prompt == "Hi"


@pytest.mark.parametrize("prompt", [[1, 2], [[1, 2]]])
def test_a_prompt_may_be_token_ids(prompt: object) -> None:
    assert CompletionRequest.model_validate({"prompt": prompt}).ask().prompt == [1, 2]


def test_a_bias_may_be_told_in_pairs_and_as_false() -> None:
    body = {"prompt": [1], "logit_bias": [[5, -1.5], [6, False]]}
    ask = NativeRequest.model_validate(body).ask()
    assert ask.prompt == [1]
    assert ask.settings["logit_bias"] == {"5": -1.5, "6": -1e6}


def test_a_gap_has_room_for_its_answer_and_reading_ahead_generates_one_token() -> None:
    body = {
        "input_prefix": "a",
        "input_suffix": "b",
        "input_extra": [{"filename": "f", "text": "t"}, {"text": "u"}],
        "prompt": "c",
        "samplers": ["top_k", "top_p", "infill"],
        "t_max_prompt_ms": 1,
        "t_max_predict_ms": 1000,
        "n_indent": 4,
    }
    ask = InfillRequest.model_validate(body).ask()
    assert ask.prompt == Gap("a", "b", "c", (("f", "t"), ("tmp", "u")), 128)
    assert (ask.reads_only, ask.predict_ms, ask.settings["max_tokens"]) == (False, 1000, 128)
    ahead = InfillRequest.model_validate({**body, "n_predict": 0}).ask()
    assert (ahead.reads_only, ahead.settings["max_tokens"]) == (True, 1)


def test_what_changes_nothing_is_listed_and_cannot_break_a_header() -> None:
    body = {**CHAT, "user": "me", "n": 1, "min_keep": 0, "x\r\ny: \u20ac": 2, "store": None}
    ignored = ChatRequest.model_validate(body).ignored()
    assert sorted(ignored) == ["store", "user", "x\r\ny: \u20ac"]
    assert listed(ignored) == {"X-Outrider-Ignored": "store, user, x??y???"}
    assert listed([]) == {}
    assert len(listed([f"{'n' * 999}{n}" for n in range(999)])["X-Outrider-Ignored"]) < 4096


# ---- mistakes -----------------------------------------------------------------------------------

NUMBERS: dict[str, tuple[Any, ...]] = {
    "temperature": (-0.1, 101, "1", True, float("nan"), float("inf"), [1]),
    "top_k": (-2, 1 << 31, 1.5, "1"),
    "top_p": (-0.1, 1.1, "1"),
    "min_p": (-0.1, 1.1, {}),
    "repeat_penalty": (0, 101, "1"),
    "repeat_last_n": (-2, 1 << 31, 0.5),
    "presence_penalty": (-101, 101, "1"),
    "frequency_penalty": (-101, 101, "1"),
    "seed": (1 << 63, -(1 << 64), 0.5, "1"),
    "max_tokens": (-2, 0, 1 << 31, "1", 1.5, True),
    "logit_bias": (
        {"x": 1},
        {"1": "1"},
        {"a" * 999: "1"},
        {"1": 1e7},
        {"99999999999": 1},
        [1],
        [[1]],
        "1",
    ),
    "stop": (1, ["a"] * 17, "a" * 257, [1]),
    "stream": (1, "true"),
    "ignore_eos": (1, "yes"),
    "return_provenance": ("yes",),
    "speculative.enabled": (2,),
    "speculative.n_max": (-1, 1.5),
    "speculative.n_min": (-1, "x"),
    "speculative.p_min": (-0.1, 1.1),
    "model": (1, "m" * 257),
    "cache_prompt": (1, "true"),
    "typical_p": (1.1, "1"),
    "top_n_sigma": (-2, 1001),
    "dynatemp_range": (-1, "1"),
    "dynatemp_exponent": (-1, 101),
    "xtc_probability": (-0.1, 1.1),
    "xtc_threshold": (-0.1, "1"),
    "dry_multiplier": (-1, "1"),
    "dry_base": (0.5, 101),
    "dry_allowed_length": (-1, 1025, 1.5),
    "dry_penalty_last_n": (-2, 1.5),
    "dry_sequence_breakers": ("a", ["a"] * 17, ["a" * 41], [1]),
    "samplers": (1, [1], ["mirostat"], ["top_p", "top_k"], ["top_k", "top_k"], "kz"),
    "grammar": (1, "a" * 65537),
    "json_schema": (1, [1], {"a": "b" * 65536}),
}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f"}}
OF_OPENAI: dict[str, tuple[Any, ...]] = {
    "stream_options": (1, {"include_usage": 2}),
    "n": (2, 0),
    "response_format": (
        1,
        {},
        {"type": "xml"},
        {"type": "json_schema"},
        {"type": "json_schema", "json_schema": {"name": "a"}},
        {"type": "json_schema", "json_schema": {"name": "a", "schema": [1]}},
        {"type": "json_object", "schema": 1},
    ),
}
OF_CHAT: dict[str, tuple[Any, ...]] = {
    "messages": (None, [], "Hi", [1], [{}], [{"role": "user"}], [{"role": "x", "content": "a"}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
                 [{"role": "user", "content": 1}], [{"role": "tool"}],
                 [{"role": "user", "content": "a", "tool_calls": [CALL]}],
                 [{"role": "assistant", "tool_calls": [{}]}],
                 [{"role": "assistant", "tool_calls": []}],
                 [{"role": "assistant", "tool_calls": [{**CALL, "id": "a b"}]}],
                 [{"role": "assistant", "tool_calls": [{**CALL, "function": {
                     "name": "f", "arguments": "[1]"}}]}],
                 [{"role": "tool", "content": "a", "tool_call_id": ""}]),
    "max_completion_tokens": (-2, 0, "1"),
    "logprobs": (1, "true"),
    "top_logprobs": (1, 21, -1),
    "tools": (1, [{}], [{"type": "custom", "custom": {"name": "f"}}], [TOOL, TOOL], [TOOL] * 129,
              [{"type": "function", "function": {"name": "a b"}}],
              [{"type": "function", "function": {"name": "a", "parameters": [1]}}]),
    "tool_choice": ("required", "x", TOOL),
    "parallel_tool_calls": (1,),
    "functions": ([{"name": "f"}],),
    "audio": ({},),
    "modalities": (["audio"],),
    "reasoning_effort": ("high",),
}  # fmt: skip
OF_COMPLETION: dict[str, tuple[Any, ...]] = {
    "prompt": (None, 1, ["a", "b"], [-1], [1.5], [[1], [2]], [True], {"a": 1}),
    "logprobs": (-1, 21, True),
    "echo": (True,),
    "suffix": ("x",),
    "best_of": (2,),
}
OF_NATIVE: dict[str, tuple[Any, ...]] = {
    "prompt": (None, 1, {}, ["a", 1], [-1]),
    "n_predict": (-2, "1", 1.5),
    "t_max_predict_ms": (-2, "1"),
    "response_fields": ("content", [1], ["a"] * 65),
    "n_probs": (21, -1),
    "mirostat": (1,),
    "lora": ([{"id": 0}],),
}
OF_INFILL: dict[str, tuple[Any, ...]] = {
    "input_prefix": (1, None),
    "input_suffix": (1,),
    "input_extra": (1, [1], [{"text": 1}], [{}] * 257),
}


def cases() -> list[Any]:
    chat = {**NUMBERS, **OF_OPENAI, **OF_CHAT}
    completion = {**NUMBERS, **OF_OPENAI, **OF_COMPLETION}
    lengths = {"max_tokens": NUMBERS["max_tokens"][:1]}  # 0 is to read only
    native = {**NUMBERS, **OF_NATIVE, **lengths}
    infill = {**native, **OF_INFILL, "prompt": (1,)}
    return [
        pytest.param(kind, {**good, name: value}, name, id=f"{kind.__name__}-{name}-{n}")
        for kind, good, wrong in (
            (ChatRequest, CHAT, chat),
            (CompletionRequest, PROMPT, completion),
            (NativeRequest, PROMPT, native),
            (InfillRequest, {}, infill),
        )
        for name, values in wrong.items()
        for n, value in enumerate(values)
    ]


@pytest.mark.parametrize(("kind", "body", "name"), cases())
def test_a_wrong_field_is_one_sentence_that_names_it(
    kind: type[BaseModel], body: dict[str, Any], name: str
) -> None:
    error = refusal(kind, body)
    library = {"speculative.n_max": "n_draft"}.get(name, name)
    assert error.param in (name, library, name.rpartition(".")[2])
    assert str(error.param) in str(error)
    assert "\n" not in str(error)
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("more", "name", "words"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format", "no room for calls"),
        ({"json_schema": {}, "tool_choice": "required"}, "json_schema", "no room for calls"),
        ({"grammar": "root ::= .", "tool_choice": "required"}, "grammar", "no room for calls"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "where tool_choice asks for"),
        ({"tool_choice": {**TOOL, "function": {"name": "g"}}}, "tool_choice", "names 'g'"),
    ],
)
def test_what_does_not_go_with_tools_is_said(more: dict[str, Any], name: str, words: str) -> None:
    error = refusal(ChatRequest, {**CHAT, "tools": [TOOL], **more})
    assert (error.param, words in str(error)) == (name, True)
    assert "together" in str(refusal(NativeRequest, {**PROMPT, "grammar": "x", "json_schema": {}}))


def test_a_mistake_in_a_message_says_where() -> None:
    part = {"type": "text", "text": "a"}
    wrong = {"messages": [{"role": "user", "content": [part, {"type": "image_url"}]}]}
    assert str(refusal(ChatRequest, wrong)).startswith("messages[0].content[1].")
    assert str(refusal(ChatRequest, [])) == "the body must be a JSON object"
