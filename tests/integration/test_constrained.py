"""Answers held to a form, by a pipeline of processes with the toy engine."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
from tests.oracle import alone

from outrider import BadRequest, Completion, tool_calls
from outrider.core.constraints import Constraint
from outrider.core.sampling import Sampling
from outrider.engines.constraints import Constraints
from outrider.engines.toy import ToyEngine
from outrider.engines.toy_text import END

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Pipeline, Served

PROMPT = "Quiet rain over"
BLOCKS: dict[str, Any] = {"n_draft": 4, "n_min": 4}  # are verified whether they pay here or not
MODES = ("plain", "sync", "pipelined")
SONG = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 40},
        "verses": {
            "type": "array",
            "items": {"type": "string", "minLength": 10, "maxLength": 30},
            "minItems": 2,
            "maxItems": 3,
        },
    },
    "required": ["title", "verses"],
    "additionalProperties": False,
}
CLOSING = {ord("]"): 21.0, ord("}"): 21.0, ord('"'): 16.0, END: 66.0}
SETTINGS: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 1.0, "seed": 5}]
LINES = 'root ::= ("- " [a-z ]+ "\\n"){2,}'

Start = Callable[..., AbstractAsyncContextManager["Pipeline"]]


def expected(constraint: Constraint, settings: dict[str, Any]) -> list[int]:
    """What a target alone says, in this process."""
    engine = ToyEngine()
    sampling = Sampling(logit_bias=tuple(sorted(CLOSING.items())), **settings)
    matcher = Constraints(engine).matcher(constraint)
    return list(alone(engine, list(PROMPT.encode()), sampling, matcher))


def ids(answer: Completion) -> list[int]:
    return [token.id for token in answer.tokens]


@pytest.mark.parametrize("settings", SETTINGS, ids=["greedy", "sampled"])
@pytest.mark.parametrize("mode", MODES)
async def test_every_mode_gives_the_same_json_of_the_schema(
    served: Served, mode: Any, settings: dict[str, Any]
) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "song", "schema": SONG}}
    async with served.connect() as client:
        answer = await client.create_completion(
            PROMPT, response_format=form, logit_bias=CLOSING, mode=mode, **BLOCKS, **settings
        )
    assert ids(answer) == expected(Constraint("schema", json.dumps(SONG)), settings)
    assert answer.choices[0].finish_reason == "stop"
    song = json.loads(answer.text)
    jsonschema.validate(song, SONG)
    assert len(song["verses"]) >= 2
    if mode != "plain":
        assert answer.stats.verified_tokens > 20
        assert answer.stats.acceptance_rate is not None
        assert answer.stats.acceptance_rate > 0.5  # 0.8 is the draft's own


async def test_any_object_and_calls_of_tools_are_forms_too(served: Served) -> None:
    tools = [{"type": "function", "function": {"name": "sing", "parameters": SONG}}]
    async with served.connect() as client:
        plain: dict[str, Any] = {"temperature": 0.0, "logit_bias": CLOSING}
        answer = await client.create_completion(
            PROMPT, response_format={"type": "json_object"}, **plain
        )
        call = await client.create_completion(
            PROMPT, constraint=tool_calls(tools, parallel=False), **plain
        )
        several = await client.create_completion(
            PROMPT, constraint=tool_calls(tools), max_tokens=300, **plain
        )
    assert isinstance(json.loads(answer.text), dict)
    first, said, last = call.text.split("\n")
    assert (first, last) == ("<tool_call>", "</tool_call>")
    assert json.loads(said)["name"] == "sing"
    jsonschema.validate(json.loads(said)["arguments"], SONG)
    assert several.text.startswith(call.text)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"json_schema": {"type": "thing"}}, "json_schema"),
        ({"json_schema": {"$ref": "#"}}, "json_schema"),
        ({"response_format": {"type": "json_object", "schema": {"enum": []}}}, "response_format"),
        ({"grammar": LINES}, "grammar"),
        ({"constraint": tool_calls([{"function": {"name": "f", "parameters": 7}}])}, "tools"),
    ],
)
async def test_a_form_that_cannot_be_is_told_before_anything_runs(
    served: Served, settings: dict[str, Any], param: str
) -> None:
    async with served.connect() as client:
        stream = await client.create_completion(PROMPT, stream=True, max_tokens=5, **settings)
        with pytest.raises(BadRequest) as found:
            await anext(stream)
        assert found.value.param == param
        assert stream.stats is None
        answer = await client.create_completion(PROMPT, max_tokens=5)
        assert answer.choices[0].finish_reason == "length"


async def test_a_grammar_that_comes_to_nothing_ends_with_one_error(pipeline: Start) -> None:
    endless = 'root ::= "a" [b-c] nothing\nnothing ::= "d" nothing | nothing "e"'
    async with pipeline(server__allow_grammar=True) as up, up.connect() as client:
        with pytest.raises(BadRequest) as found:
            await client.create_completion(PROMPT, grammar="root ::= root")
        assert found.value.param == "grammar"
        answer = await client.create_completion(PROMPT, grammar=endless, max_tokens=30)
        assert answer.text.startswith(("abd", "acd"))
        lines = await client.create_completion(
            PROMPT, grammar=LINES, max_tokens=60, logit_bias={10: 18}, temperature=1.0, seed=3
        )
        assert all(line.startswith("- ") for line in lines.text.splitlines()[:-1])
        assert "\n" in lines.text
        await up.idle(client)


async def test_who_reads_a_heavy_schema_does_not_keep_others_waiting(served: Served) -> None:
    links = {f"{n}": {"items": {"$ref": f"#/$defs/{n + 1}"}} for n in range(1500)}
    heavy = {"$ref": "#/$defs/0", "$defs": {**links, "1500": {}}}

    async def compile_it(n: int) -> None:
        async with served.connect() as client:
            schema = {**heavy, "title": str(n)}
            await client.create_completion(PROMPT, json_schema=schema, max_tokens=2)

    async with served.connect() as client:
        waiting = [asyncio.ensure_future(compile_it(n)) for n in range(3)]
        await asyncio.sleep(0.1)
        slowest = 0.0
        for _ in range(10):
            began = time.monotonic()
            await client.tokenize(PROMPT)
            slowest = max(slowest, time.monotonic() - began)
        assert not all(task.done() for task in waiting)
        await asyncio.gather(*waiting)
    assert slowest < 1.0


@pytest.mark.timeout(90)
def test_the_command_holds_its_answer_to_a_form(cli: Cli, tmp_path: Path) -> None:
    own = ("run", "--backend=toy", "--toy-step-ms=1", "--no-stats", "-n=30")
    held = cli(*own, "-j", '{"const": "a song"}', PROMPT)
    assert (held.returncode, held.stdout.strip()) == (0, '"a song"'), held.stderr
    (tmp_path / "song.gbnf").write_text('root ::= "la"{3} "!"')
    held = cli(*own, "--grammar-file=song.gbnf", PROMPT)
    assert (held.returncode, held.stdout.strip()) == (0, "lalala!"), held.stderr
    refused = cli(*own, "-j", '{"enum": []}', PROMPT)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "json_schema cannot be followed" in refused.stderr
