"""Clients that people have: each asks a running gateway, in a process of its own.

They are the packages of the extra "clients".
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.integration.conftest import HTTP, Cli, Served

from outrider.engines.toy_text import END

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle

PLAIN = "<|user|>Hi<|end|><|assistant|>"  # what the toy is asked with "Hi"
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CITIES = ({"city": "Rome"}, {"city": "Oslo"})

LANGCHAIN = """
import json, sys
from typing import Literal
from langchain_core.messages import HumanMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

class Trip(BaseModel):
    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]

@tool
def ask(text: str) -> str:
    "Asks."
    return "heard " + text

bias = {sys.argv[2]: 80}
chat = ChatOpenAI(model="", base_url=sys.argv[1], api_key="any", temperature=0, max_tokens=200)
said, bound = [HumanMessage("Hi")], chat.bind_tools([ask])
made = bound.invoke(said)
pieces = None
for chunk in bound.stream(said):
    pieces = chunk if pieces is None else pieces + chunk
answered = [*said, made, ask.invoke(made.tool_calls[0])]
print(json.dumps({
    "text": chat.invoke(said, max_tokens=20).content,
    "stream": "".join(one.content for one in chat.stream(said, max_tokens=20)),
    "calls": [one["args"] for one in (made.tool_calls[0], pieces.tool_calls[0])],
    "reason": made.response_metadata["finish_reason"],
    "usage": made.usage_metadata["output_tokens"],
    "second": bound.invoke(answered, max_tokens=20).content,
    "structured": [
        chat.with_structured_output(Trip, method=how).invoke("Hi", logit_bias=bias).model_dump()
        for how in ("json_schema", "function_calling")
    ],
}))
"""

LITELLM = """
import json, sys
import litellm

def ask(messages, max_tokens=200, **more):
    return litellm.completion(
        model="openai/toy", api_base=sys.argv[1], api_key="any", messages=messages,
        temperature=0, max_tokens=max_tokens, **more,
    )

tool = {"type": "function", "function": {
    "name": "ask",
    "parameters": {"type": "object", "properties": {"text": {"type": "string"}}},
}}
said, asked = [{"role": "user", "content": "Hi"}], {"tools": [tool]}
form = {"type": "json_schema", "json_schema": {"name": "it", "schema": json.loads(sys.argv[3])}}
made = ask(said, **asked).choices[0]
stream = list(ask(said, stream=True, **asked))
pieces = litellm.stream_chunk_builder(stream, messages=said).choices[0]
call = made.message.tool_calls[0]
answered = [*said, made.message, {"role": "tool", "tool_call_id": call.id, "content": "heard Hi"}]
print(json.dumps({
    "text": ask(said, 20).choices[0].message.content,
    "stream": "".join(one.choices[0].delta.content or "" for one in ask(said, 20, stream=True)),
    "calls": [
        json.loads(one.message.tool_calls[0].function.arguments) for one in (made, pieces)
    ],
    "reason": made.finish_reason,
    "usage": ask(said, 20).usage.completion_tokens,
    "second": ask(answered, 20, **asked).choices[0].message.content,
    "structured": [json.loads(
        ask(said, response_format=form, logit_bias={sys.argv[2]: 80}).choices[0].message.content
    )],
}))
"""

TOOL = """
def ask(text: str) -> str:
    "Asks."
    return "heard " + text
"""


@pytest.fixture(scope="module")
def web(module_cli: Cli) -> Iterator[Served]:
    quick = ("--toy-step-ms=1", "--toy-draft-ms=0.1", "--toy-row-ms=0.01")
    pipeline = Served(module_cli, "clients", *quick, *HTTP)
    yield pipeline
    assert pipeline.stop() == 143


def need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed: scripts/setup --extra clients")


def run(directory: Path, *command: str, **environment: str) -> str:
    """What a client prints; it may reach nothing but this machine, and finds no settings."""
    quiet = {"HOME": str(directory), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    kept = {name: value for name, value in os.environ.items() if name.startswith(("PATH", "LANG"))}
    done = subprocess.run(
        [sys.executable, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=directory,
        env={**kept, **quiet, **environment},
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("package", "script"), [("langchain_openai", LANGCHAIN), ("litellm", LITELLM)]
)
def test_a_library_asks_for_text_tools_and_structure(
    web: Served, oracle: Oracle, tmp_path: Path, package: str, script: str
) -> None:
    need(package)
    told = run(tmp_path, "-c", script, f"{web.url}/v1", str(END), json.dumps(SCHEMA))
    found: dict[str, Any] = json.loads(told.splitlines()[-1])
    assert found["text"] == found["stream"] == oracle(PLAIN, 20).text
    assert found["calls"] == [{"text": "Hi"}] * 2
    assert found["reason"] == "tool_calls"
    assert found["usage"] >= 20
    assert found["second"]
    assert found["second"] != found["text"]
    assert all(one in CITIES for one in found["structured"])


@pytest.mark.timeout(120)
def test_the_llm_command_asks_for_text_tools_and_structure(
    web: Served, oracle: Oracle, tmp_path: Path
) -> None:
    need("llm")
    (tmp_path / "tool.py").write_text(TOOL)
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: toy\n  model_name: any\n  api_base: {web.url}/v1\n"
        "  supports_schema: true\n  supports_tools: true\n"
    )

    def llm(*arguments: str) -> str:
        command = ("-m", "llm", "-m", "toy", "Hi", "--no-log", "-o", "temperature", "0")
        keys = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "any"}
        return run(tmp_path, *command, *arguments, **keys)

    for streamed in ((), ("--no-stream",)):
        text = llm("-o", "max_tokens", "20", *streamed)
        assert text.strip() == oracle(PLAIN, 20).text.strip()
    bias = json.dumps({str(END): 80})
    assert json.loads(llm("--schema", json.dumps(SCHEMA), "-o", "logit_bias", bias)) in CITIES
    # it calls the tool, sends what came of it, and tells of both, the call on stderr
    told = llm("--functions", "tool.py", "--tools-debug", "-o", "max_tokens", "60")
    assert "ask({'text': 'Hi'})" in told
    assert "heard Hi" in told
    assert "<tool_call>" not in told
