"""Answers held to a form by real models: valid, the same in all modes, and drafted better."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from outrider import Client, Completion, tool_calls

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

FLAGS = (
    "--exact", "--target-cores=0", "--draft-cores=1", "--ctx=768", "--parallel=1",
    "--draft-quant=off", "--n-draft=6", "--spec-draft-n-min=6", "--allow-grammar",
)  # fmt: skip
SCIENTIST = {
    "type": "object",
    "properties": {
        "full_name": {"type": "string", "maxLength": 40},
        "field_of_research": {"enum": ["physics", "mathematics", "biology"]},
        "year_of_birth": {"type": "integer", "minimum": 1500, "maximum": 2000},
        "is_alive": {"type": "boolean"},
        "received_a_nobel_prize": {"type": "boolean"},
    },
    "required": [
        "full_name", "field_of_research", "year_of_birth", "is_alive", "received_a_nobel_prize",
    ],
    "additionalProperties": False,
}  # fmt: skip
CHAT = [{"role": "user", "content": "Tell me about a famous scientist."}]
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7}
MODES: tuple[Any, ...] = ("plain", "pipelined")


@pytest.fixture(scope="module")
def pair(serve: Any, default_target: Any, default_draft: Any) -> Client:
    client: Client = serve("-m", default_target, "-md", default_draft, *FLAGS)
    return client


def ids(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


def answers(pair: Client, **settings: Any) -> dict[str, Completion]:
    return {mode: pair.create_chat_completion(CHAT, mode=mode, **settings) for mode in MODES}


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_json_of_a_schema_is_valid_and_drafted_at_least_as_well_as_free_text(
    pair: Client, settings: dict[str, Any]
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "one", "schema": SCIENTIST}}
    held = answers(pair, response_format=form, max_tokens=100, **settings)
    one = held["pipelined"]
    assert ids(one) == ids(held["plain"])
    assert one.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(one.text), SCIENTIST)
    free = pair.create_chat_completion(
        CHAT, mode="pipelined", max_tokens=len(one.tokens), **settings
    )
    assert one.stats.acceptance_rate is not None
    assert free.stats.acceptance_rate is not None
    assert one.stats.acceptance_rate >= free.stats.acceptance_rate


def test_a_grammar_and_calls_of_tools_are_followed(pair: Client) -> None:
    lines = 'root ::= ("- " [A-Z] [^\\n]{1,30} "\\n"){2}'
    held = answers(pair, grammar=lines, max_tokens=40, **GREEDY)
    assert ids(held["plain"]) == ids(held["pipelined"])
    said = held["plain"].text.splitlines()
    assert len(said) == 2
    assert all(line.startswith("- ") for line in said)
    tools = [{"type": "function", "function": {"name": "store", "parameters": SCIENTIST}}]
    held = answers(pair, constraint=tool_calls(tools, parallel=False), max_tokens=100, **GREEDY)
    assert ids(held["plain"]) == ids(held["pipelined"])
    first, call, last = held["plain"].text.split("\n")
    assert (first, last) == ("<tool_call>", "</tool_call>")
    assert json.loads(call)["name"] == "store"
    jsonschema.validate(json.loads(call)["arguments"], SCIENTIST)
