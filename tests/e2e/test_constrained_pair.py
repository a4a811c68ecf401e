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
PEOPLE = {
    "type": "object",
    "properties": {
        "scientists": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "full_name": {"type": "string"},
                    "field_of_research": {"enum": ["physics", "mathematics", "biology"]},
                    "year_of_birth": {"type": "integer", "minimum": 1500, "maximum": 2000},
                    "known_for": {"type": "string"},
                },
                "required": ["full_name", "field_of_research", "year_of_birth", "known_for"],
                "additionalProperties": False,
            },
            "minItems": 2,
            "maxItems": 2,
        }
    },
    "required": ["scientists"],
    "additionalProperties": False,
}
CHAT = [{"role": "user", "content": "Tell me about two famous scientists. Answer in JSON."}]
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7}
MODES: tuple[Any, ...] = ("plain", "sync", "pipelined")


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
    form = {"type": "json_schema", "json_schema": {"name": "people", "schema": PEOPLE}}
    held = answers(pair, response_format=form, max_tokens=300, **settings)
    assert ids(held["plain"]) == ids(held["sync"]) == ids(held["pipelined"])
    one = held["sync"]
    assert one.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(one.text), PEOPLE)
    free = pair.create_chat_completion(CHAT, mode="sync", max_tokens=len(one.tokens), **settings)
    assert one.stats.acceptance_rate is not None
    assert free.stats.acceptance_rate is not None
    print(f"\nacceptance: {one.stats.acceptance_rate:.3f} held, {free.stats.acceptance_rate:.3f}"
          f" free, of {one.stats.verified_tokens} and {free.stats.verified_tokens}")  # fmt: skip
    assert one.stats.acceptance_rate >= free.stats.acceptance_rate


def test_a_grammar_and_calls_of_tools_are_followed(pair: Client) -> None:
    lines = 'root ::= ("- " [A-Z] [^\\n]+ "\\n"){3}'
    held = answers(pair, grammar=lines, max_tokens=120, **GREEDY)
    assert ids(held["plain"]) == ids(held["sync"]) == ids(held["pipelined"])
    said = held["sync"].text.splitlines()
    assert len(said) == 3
    assert all(line.startswith("- ") for line in said)
    schema = PEOPLE["properties"]["scientists"]["items"]  # type: ignore[index]
    tools = [{"type": "function", "function": {"name": "store", "parameters": schema}}]
    form = tool_calls(tools, parallel=False)
    held = answers(pair, constraint=form, max_tokens=200, **GREEDY)
    assert ids(held["plain"]) == ids(held["sync"]) == ids(held["pipelined"])
    first, call, last = held["sync"].text.split("\n")
    assert (first, last) == ("<tool_call>", "</tool_call>")
    assert json.loads(call)["name"] == "store"
    jsonschema.validate(json.loads(call)["arguments"], schema)
