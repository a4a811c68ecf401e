"""Tools, forms, samplers and the likeliest tokens over HTTP, mostly as OpenAI's library asks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import httpx2
import jsonschema
import openai
import pydantic
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.integration.conftest import HTTP, Cli, Served
from tests.unit.schemas import schemas

from outrider.engines.toy_text import END

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle

QUESTION = 'What says "<|assistant|>"?\n'
SAID: Any = [{"role": "user", "content": QUESTION}]
ASK: Any = {
    "type": "function",
    "function": {"name": "ask", "description": "Asks.", "parameters": {"type": "object"}},
}
PLACE = {
    "type": "object",
    "properties": {"place": {"enum": ["Rome", "Oslo"]}},
    "required": ["place"],
    "additionalProperties": False,
}
GO: Any = {"type": "function", "function": {"name": "go", "parameters": PLACE}}
# the toy speaks of rivers; with these it comes to the point where JSON has to
LEANING: Any = {
    **{str(digit): 17.0 for digit in b"0123456789"},
    **{str(bracket): 21.0 for bracket in b"]}"},
    **{str(ord('"')): 24.0, str(ord(",")): 17.0, str(END): 80.0},
}


@pytest.fixture(scope="module")
def web(module_cli: Cli) -> Iterator[Served]:
    """A pipeline that takes grammars, too."""
    quick = ("--toy-step-ms=1", "--toy-draft-ms=0.1", "--toy-row-ms=0.01")
    pipeline = Served(module_cli, "forms", *quick, *HTTP, "--allow-grammar")
    yield pipeline
    assert pipeline.stop() == 143


@pytest.fixture
def client(web: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{web.url}/v1", api_key="any", max_retries=0) as found:
        yield found


@pytest.fixture
def http(web: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=web.url, timeout=10) as found:
        yield found


def post(http: httpx2.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


# ---- tools --------------------------------------------------------------------------------------


def test_a_tool_is_called_and_its_answer_is_read(client: openai.OpenAI, oracle: Oracle) -> None:
    asked: Any = {"model": "", "tools": [ASK], "temperature": 0, "max_tokens": 200}
    (choice,) = client.chat.completions.create(messages=SAID, **asked).choices
    message = choice.message
    assert (choice.finish_reason, message.content) == ("tool_calls", None)
    call: Any
    (call,) = message.tool_calls or [None]
    assert (call.function.name, json.loads(call.function.arguments)) == ("ask", {"text": QUESTION})
    answered: Any = [
        *SAID,
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "nobody"},
    ]
    second = client.chat.completions.create(messages=answered, **asked).choices[0]
    assert second.finish_reason == "length"
    assert second.message.tool_calls is None
    with httpx2.Client(base_url=str(client.base_url).removesuffix("/v1/")) as http:
        plain = [SAID[0], message.to_dict(), answered[2]]
        text = post(http, "/apply-template", messages=plain, tools=[ASK])["prompt"]
    assert "<tool_response>nobody</tool_response>" in text
    tokens = post_tokens(client, text, QUESTION)
    assert second.message.content == oracle(tokens, 200).text


def post_tokens(client: openai.OpenAI, text: str, said: str) -> list[int]:
    """Ids of a laid-out text in which `said` has no control tokens, as JSON and as it is."""
    with httpx2.Client(base_url=str(client.base_url).removesuffix("/v1/")) as http:
        found: list[int] = []
        rest = text
        inner = json.dumps(said)[1:-1]
        while rest:
            at, word = min(
                ((rest.find(one), one) for one in (said, inner) if one in rest),
                default=(len(rest), ""),
            )
            found += post(http, "/tokenize", content=rest[:at])["tokens"]
            found += word.encode()
            rest = rest[at + len(word) :]
    return found


def test_a_streamed_call_comes_in_pieces_that_add_up(client: openai.OpenAI) -> None:
    asked: Any = {"model": "", "messages": SAID, "temperature": 0, "max_tokens": 200}
    chunks = list(client.chat.completions.create(tools=[ASK], stream=True, **asked))
    deltas = [one for chunk in chunks for one in chunk.choices[0].delta.tool_calls or ()]
    assert len(deltas) > 2
    assert {one.index for one in deltas} == {0}
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(tools=[ASK], **asked) as stream:  # which adds them up
        whole: Any = stream.get_final_completion().choices[0]
    (call,) = whole.message.tool_calls
    assert (call.type, call.function.name) == ("function", "ask")
    assert json.loads(call.function.arguments) == {"text": QUESTION}
    assert "".join(one.function.arguments for one in deltas if one.function) == (
        call.function.arguments
    )


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "go"}}])
def test_a_tool_that_must_be_called_is_called_as_its_schema_says(
    client: openai.OpenAI, choice: Any, streamed: bool
) -> None:
    asked: Any = {
        "model": "",
        "messages": SAID,
        "tools": [ASK, GO],
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "logit_bias": LEANING,
        "max_tokens": 400,
    }
    if streamed:
        with client.chat.completions.stream(**asked) as stream:
            answer: Any = stream.get_final_completion()
    else:
        answer = client.chat.completions.create(**asked)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    arguments = json.loads(call.function.arguments)
    if choice != "required" or call.function.name == "go":
        assert (call.function.name, arguments["place"]) in (("go", "Rome"), ("go", "Oslo"))
    assert isinstance(arguments, dict)


def test_whoever_chooses_no_tool_is_told_of_none(client: openai.OpenAI) -> None:
    asked: Any = {"model": "", "messages": SAID, "temperature": 0, "max_tokens": 20}
    choices: list[Any] = [{}, {"tools": [ASK], "tool_choice": "none"}]
    texts = {
        client.chat.completions.create(**asked, **chosen).choices[0].message.content
        for chosen in choices
    }
    assert len(texts) == 1


# ---- forms --------------------------------------------------------------------------------------


class Trip(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    place: Literal["Rome", "Oslo"]
    days: int


def test_structured_output_is_what_the_librarys_own_parser_takes(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="", messages=SAID, response_format=Trip, logit_bias=LEANING, max_tokens=100
    )
    assert isinstance(answer.choices[0].message.parsed, Trip)
    with client.chat.completions.stream(
        model="", messages=SAID, response_format=Trip, logit_bias=LEANING, max_tokens=100
    ) as stream:
        parsed = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(parsed, Trip)


def test_any_object_and_a_grammar_are_forms_too(http: httpx2.Client, client: openai.OpenAI) -> None:
    form: Any = {"type": "json_object"}
    answer = client.chat.completions.create(
        model="", messages=SAID, response_format=form, logit_bias=LEANING, max_tokens=200
    )
    assert isinstance(json.loads(answer.choices[0].message.content or ""), dict)
    grammar = 'root ::= ("ab" | "cd")+ "."'
    for path in ("/completion", "/v1/completions"):
        told = post(http, path, prompt="a", grammar=grammar, max_tokens=40, temperature=1, seed=3)
        text = told["content"] if "content" in told else told["choices"][0]["text"]
        assert text
        assert not text.replace("ab", "").replace("cd", "").strip(".")
    refused = http.post("/completion", json={"prompt": "a", "grammar": "root ::= nothing"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "grammar")


@pytest.mark.timeout(120)
def test_answers_fit_whatever_schema_is_sent(http: httpx2.Client) -> None:
    whole: list[bool] = []

    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(schemas, st.integers(0, 3), st.sampled_from(["/completion", "/v1/chat/completions"]))
    def ask(schema: Any, seed: int, path: str) -> None:
        body = {"seed": seed, "temperature": 1, "logit_bias": LEANING, "max_tokens": 1200}
        if path == "/completion":
            told = post(http, path, prompt="Say it: ", json_schema=schema, **body)
            text, ended = told["content"], told["stop_type"] == "eos"
        else:
            form = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
            told = post(http, path, messages=SAID, response_format=form, **body)
            (choice,) = told["choices"]
            text, ended = choice["message"]["content"], choice["finish_reason"] == "stop"
        whole.append(ended)
        assert ended, text
        jsonschema.validate(json.loads(text), schema)

    ask()
    assert len(whole) == 30


# ---- settings -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampler",
    [
        {"typical_p": 0.4},
        {"top_n_sigma": 0.5},
        {"dynatemp_range": 0.9, "dynatemp_exponent": 2.0},
        {"xtc_probability": 0.9, "xtc_threshold": 0.05},
        {"dry_multiplier": 5.0, "dry_base": 2.0, "dry_allowed_length": 1},
    ],
    ids=lambda one: next(iter(one)),
)
def test_each_sampler_changes_the_answer_as_alone(
    http: httpx2.Client, oracle: Oracle, sampler: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"temperature": 3, "seed": 9}
    prompt, count = "The river runs. The river runs", 60
    wanted = oracle(prompt, count, **common, **sampler).text
    assert wanted != oracle(prompt, count, **common).text
    told = post(http, "/completion", prompt=prompt, n_predict=count, **common, **sampler)
    assert told["content"] == wanted
    only = {"samplers": ["temperature"], **sampler}
    without = post(http, "/completion", prompt=prompt, n_predict=count, **common, **only)
    if "dynatemp_range" not in sampler:  # which is the temperature's own
        assert without["content"] == oracle(prompt, count, **common).text


def test_the_likeliest_tokens_are_told_with_the_chosen_one(
    client: openai.OpenAI, http: httpx2.Client
) -> None:
    asked: Any = {"model": "", "messages": SAID, "temperature": 0, "max_tokens": 6}
    answer = client.chat.completions.create(logprobs=True, top_logprobs=3, **asked)
    logprobs = answer.choices[0].logprobs
    assert logprobs
    content = logprobs.content or []
    assert [len(one.top_logprobs) for one in content] == [3] * 6
    assert [one.top_logprobs[0].token for one in content] == [one.token for one in content]
    text = client.completions.create(
        model="", prompt="Hi", temperature=0, max_tokens=6, logprobs=2
    ).choices[0]
    assert text.logprobs
    assert [len(one) for one in text.logprobs.top_logprobs or ()] == [2] * 6
    told = post(http, "/completion", prompt="Hi", temperature=0, n_predict=6, n_probs=2)
    known = told["completion_probabilities"]
    assert "".join(one["token"] for one in known) == told["content"] == text.text
    assert [one["top_logprobs"][0]["id"] for one in known] == [one["id"] for one in known]
