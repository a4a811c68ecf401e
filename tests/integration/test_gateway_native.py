"""llama.cpp's own paths, as its clients and editors send to them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Oracle, Served

GREEDY = {"temperature": 0}


@pytest.fixture
def http(web: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=web.url, timeout=10) as client:
        yield client


def post(http: httpx2.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def events(http: httpx2.Client, path: str, **body: Any) -> list[Any]:
    answer = http.post(path, json={**body, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in answer.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


# ---- /completion --------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/completion", "/completions"])
def test_a_completion_whole_and_streamed(http: httpx2.Client, oracle: Oracle, path: str) -> None:
    told = post(http, path, prompt="The river", n_predict=20, **GREEDY)
    assert told["content"] == oracle("The river", 20).text
    assert (told["stop_type"], told["tokens_predicted"], told["tokens_evaluated"]) == (
        "limit",
        20,
        9,
    )
    assert told["timings"]["prompt_n"] == 9
    *parts, last = events(http, path, prompt="The river", n_predict=20, **GREEDY)
    assert "".join(part["content"] for part in parts) == told["content"]
    assert [token for part in parts for token in part["tokens"]] == oracle(
        "The river", 20
    ).token_ids
    assert [part["stop"] for part in parts] == [False] * len(parts)
    assert (last["stop"], last["content"], last["tokens_predicted"]) == (True, "", 20)


def test_why_it_ended_is_told(http: httpx2.Client, oracle: Oracle) -> None:
    text = oracle("The river", 60).text
    word = text.split()[1]
    told = post(http, "/completion", prompt="The river", stop=["?", word], n_predict=60, **GREEDY)
    assert (told["content"], told["stop_type"]) == (text.partition(word)[0], "word")
    assert told["stopping_word"] == word
    end = {"logit_bias": [[256, 1000]]}
    told = post(http, "/completion", prompt="The river", n_predict=9, **end, **GREEDY)
    assert (told["content"], told["stop_type"], told["tokens_predicted"]) == ("", "eos", 1)
    never = {"logit_bias": {str(byte): -1e6 for byte in text.encode()[:1]}}
    told = post(http, "/completion", prompt="The river", n_predict=1, **never, **GREEDY)
    assert told["content"] != text[:1]


def test_only_the_fields_that_were_asked_for_come_back(http: httpx2.Client) -> None:
    fields = ["content", "timings/prompt_n", "timings.predicted_n", "nothing", "content/x"]
    told = post(http, "/completion", prompt="Hi", n_predict=3, response_fields=fields, **GREEDY)
    assert told.keys() == {"content", "timings/prompt_n", "timings.predicted_n"}
    assert (told["timings/prompt_n"], told["timings.predicted_n"]) == (2, 3)


def test_a_time_limit_ends_the_answer_behind_a_line(http: httpx2.Client) -> None:
    newline = {"logit_bias": [[10, 1000]]}  # nothing but line ends
    body = {"prompt": "Hi", "n_predict": 1500, "t_max_predict_ms": 1, **newline, **GREEDY}
    told = post(http, "/completion", **body)
    assert told["content"].startswith("\n")
    assert 0 < len(told["content"]) < 100
    assert told["stop_type"] == "limit"
    # without a line there is nothing to show yet
    body = {"prompt": "Hi", "n_predict": 40, "t_max_predict_ms": 1, **GREEDY}
    assert post(http, "/completion", **body)["tokens_predicted"] == 40


# ---- /infill ------------------------------------------------------------------------------------

EDITOR: dict[str, Any] = {  # what llama.vim sends
    "id_slot": 0,
    "input_prefix": "def f():\n",
    "input_suffix": "\n    return x\n",
    "input_extra": [{"filename": "a.py", "text": "x = 1\n", "time": 12}],
    "prompt": "    x",
    "n_predict": 24,
    "stop": [],
    "n_indent": 4,
    "top_k": 40,
    "top_p": 0.9,
    "stream": False,
    "samplers": ["top_k", "top_p", "infill"],
    "cache_prompt": True,
    "t_max_prompt_ms": 500,
    "t_max_predict_ms": 1000,
    **GREEDY,
}


def test_an_editor_gets_what_fills_the_gap(http: httpx2.Client, oracle: Oracle) -> None:
    told = post(http, "/infill", **EDITOR)
    prompt = (
        "<|repo_name|>myproject\n<|file_sep|>a.py\nx = 1\n<|file_sep|>filename\n"
        "<|fim_prefix|>def f():\n<|fim_suffix|>\n    return x\n<|fim_middle|>    x"
    )
    assert told["content"] == oracle(prompt, 24, top_k=40, top_p=0.9).text
    fields = ["content", "timings/prompt_n", "timings/predicted_per_second", "truncated",
              "tokens_cached"]  # fmt: skip
    few = post(http, "/infill", **EDITOR, response_fields=fields)
    assert list(few) == fields
    assert few["content"] == told["content"]


def test_reading_ahead_generates_nothing(http: httpx2.Client) -> None:
    told = post(http, "/infill", **{**EDITOR, "n_predict": 0, "t_max_prompt_ms": 1, "prompt": ""})
    assert (told["content"], told["tokens_predicted"]) == ("", 0)
    assert told["timings"]["prompt_n"] + told["timings"]["cache_n"] > 50


def test_an_editors_context_may_be_longer_than_the_models(http: httpx2.Client) -> None:
    extra = [{"filename": f"{n}.py", "text": "line\n" * 64} for n in range(16)]
    body = {**EDITOR, "input_extra": extra, "input_prefix": "x = 1\n" * 400}
    told = post(http, "/infill", **body)
    assert told["tokens_predicted"] == 24
    assert 1500 < told["tokens_evaluated"] < 2048 - 24


# ---- text ---------------------------------------------------------------------------------------


def test_text_becomes_tokens_and_back(http: httpx2.Client) -> None:
    tokens = post(http, "/tokenize", content="a<|end|>é")["tokens"]
    assert tokens == [97, 256, *"é".encode()]
    assert post(http, "/detokenize", tokens=tokens)["content"] == "aé"
    assert 256 not in post(http, "/tokenize", content="<|end|>", parse_special=False)["tokens"]
    assert post(http, "/tokenize", content="", add_special=True)["tokens"] == []


def test_the_template_is_applied(http: httpx2.Client) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    told = post(http, "/apply-template", messages=messages)
    assert told["prompt"] == "<|system|>a<|end|><|user|>b<|end|><|assistant|>"


# ---- the server ---------------------------------------------------------------------------------


def test_the_servers_state_is_told(http: httpx2.Client) -> None:
    for path in ("/health", "/v1/health"):
        health = http.get(path)
        assert (health.status_code, health.json()["status"]) == (200, "ok")
        assert health.json()["workers"].keys() == {"target", "draft"}
    props = http.get("/props").json()
    assert props["total_slots"] == 4
    assert props["default_generation_settings"]["n_ctx"] == 2048
    slots = http.get("/slots?fail_on_no_slot=1").json()
    assert [(slot["id"], slot["is_processing"]) for slot in slots] == [(n, False) for n in range(4)]


def test_slots_that_are_at_work_are_told(http: httpx2.Client) -> None:
    body = {"prompt": "Hi", "n_predict": 1900, "stream": True, "speculative.enabled": False}
    with http.stream("POST", "/completion", json=body) as answer:
        lines = answer.iter_lines()
        next(lines)
        slots = http.get("/slots").json()
    assert [slot["is_processing"] for slot in slots] == [True, False, False, False]


# ---- mistakes -----------------------------------------------------------------------------------

BODIES: dict[str, bytes] = {
    "empty": b"",
    "no-json": b"{",
    "no-object": b"[]",
    "null": b"null",
    "no-utf-8": b'{"prompt": "\xff"}',
    "half-a-surrogate": b'{"prompt": "\\ud800"}',
    "deep": b'{"prompt": ' + b"[" * 20_000 + b"]" * 20_000 + b"}",
    "long-number": b'{"prompt": "a", "seed": ' + b"9" * 9999 + b"}",
    "nan": b'{"prompt": "a", "temperature": NaN}',
    "infinite": b'{"prompt": "a", "temperature": 1e999}',
    "strange-name": b'{"prompt": [], "\\ud800\\r\\nX: y": 1}',
}
PATHS = ("/completion", "/infill", "/v1/completions", "/v1/chat/completions", "/tokenize",
         "/detokenize", "/apply-template")  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_a_body_that_is_none_is_one_sentence(http: httpx2.Client, path: str) -> None:
    for name, body in BODIES.items():
        answer = http.post(path, content=body)
        assert answer.status_code == 400, (name, answer.text)
        error = answer.json()["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert "\n" not in error["message"]


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("/tokenize", {"content": 1}, "content"),
    ("/tokenize", {"content": "a", "add_special": 1}, "add_special"),
    ("/tokenize", {"content": "a", "parse_special": "x"}, "parse_special"),
    ("/tokenize", {"content": "a", "with_pieces": True}, "with_pieces"),
    ("/detokenize", {"tokens": "a"}, "tokens"),
    ("/detokenize", {"tokens": [9999]}, "tokens"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/apply-template", {"messages": []}, "messages"),
    ("/apply-template", {"messages": [{"role": "function", "content": "a"}]}, "messages"),
    ("/apply-template", {"messages": [{"role": "tool"}]}, "messages"),
    ("/completion", {"prompt": ""}, "prompt"),
    ("/completion", {"prompt": [9999]}, "prompt"),
    ("/completion", {"prompt": "a", "logit_bias": {"9999": 1}}, "logit_bias"),
    ("/completion", {"prompt": "x" * 3000}, "prompt"),
    ("/completion", {"prompt": "a", "grammar": 'root ::= "a"'}, "grammar"),
    ("/completion", {"prompt": "a", "json_schema": {"type": "strange"}}, "json_schema"),
    ("/v1/completions", {"prompt": "a", "samplers": ["top_k", "infill"]}, "samplers"),
    ("/completion", {"prompt": "a", "speculative.n_max": 2, "speculative.n_min": 3}, "n_min"),
    ("/infill", {"prompt": "x" * 3000}, "prompt"),
    ("/v1/completions", {"prompt": []}, "prompt"),
]


def test_what_the_pipeline_finds_wrong_is_told_the_same_way(http: httpx2.Client) -> None:
    for path, body, name in WRONG:
        answer = http.post(path, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, name), (path, body)


NOWHERE = [
    ("GET", "/completion", 405),
    ("PUT", "/v1/models", 405),
    ("GET", "/nothing", 404),
    ("POST", "/v1/embeddings", 404),
    ("GET", "/slots?fail_on_no_slot=maybe", 400),
    ("DELETE", "/v1/requests/nothing", 404),
    ("GET", "/docs", 404),
]


def test_a_path_that_is_none_is_one_sentence(http: httpx2.Client) -> None:
    for method, path, status in NOWHERE:
        answer = http.request(method, path)
        assert answer.status_code == status, path
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
