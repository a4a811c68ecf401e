"""What is read once is not read again, unless the API key is another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.conftest import HTTP, Cli, Served

KEYS = ("alpha", "beta")
FILE = "".join(f"def f{n}(x):\n    return x + {n}\n\n" for n in range(20))


@pytest.fixture(scope="module")
def keyed(module_cli: Cli) -> Iterator[Served]:
    """A pipeline whose gateway knows two keys."""
    file = module_cli.directory / "keys"
    file.write_text("\n".join(KEYS))
    file.chmod(0o600)
    quick = ("--toy-step-ms=1", "--toy-draft-ms=0.1", "--toy-row-ms=0.01")
    pipeline = Served(module_cli, "keyed", *quick, *HTTP, f"--api-key-file={file}")
    yield pipeline
    assert pipeline.stop() == 143


@pytest.fixture
def people(keyed: Served) -> Iterator[list[httpx2.Client]]:
    """A client for each key."""
    headers = [{"Authorization": f"Bearer {key}"} for key in KEYS]
    alpha, beta = (httpx2.Client(base_url=keyed.url, timeout=10, headers=one) for one in headers)
    with alpha, beta:
        yield [alpha, beta]


def post(http: httpx2.Client, path: str, **body: Any) -> Any:
    answer = http.post(path, json={"temperature": 0, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def cached(http: httpx2.Client) -> float:
    """How many cached tokens the pipeline has counted."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    (found,) = (one for one in families if one.name == "outrider_prompt_tokens_cached")
    return found.samples[0].value


def test_two_keys_never_share_what_was_read(people: list[httpx2.Client]) -> None:
    prompt = "What only one of them may know is what was read for the other one before. "
    before, sum_cached, seen = cached(people[0]), 0, []
    for turn in range(3):
        for http in people:
            for path in ("/completion", "/v1/completions"):
                told = post(http, path, prompt=prompt, max_tokens=4)
                timings = told["timings"]
                assert timings["cache_n"] + timings["prompt_n"] == len(prompt)
                usage = told.get("usage")
                told_cached = (
                    usage["prompt_tokens_details"]["cached_tokens"]
                    if usage
                    else told["tokens_cached"]
                )
                assert told_cached == timings["cache_n"]
                seen.append((turn, path, timings["cache_n"] > len(prompt) // 2))
                if turn == 0 and path == "/completion":
                    assert timings["cache_n"] == 0, "something was read for another key"
                sum_cached += timings["cache_n"]
    first = [(0, "/completion", False), (0, "/v1/completions", True)]
    later = [(turn, path, True) for turn in (1, 2) for path in ("/completion", "/v1/completions")]
    assert sorted(seen) == sorted([*first, *first, *later, *later])
    assert cached(people[1]) - before == sum_cached


def test_a_conversation_is_read_on_and_not_again(people: list[httpx2.Client]) -> None:
    said = [{"role": "user", "content": "Tell me of the river, please, and of what it carries."}]
    path = "/v1/chat/completions"
    first = post(people[0], path, messages=said, max_tokens=30)
    answered = [*said, first["choices"][0]["message"], {"role": "user", "content": "And then?"}]
    for http, shares in ((people[0], True), (people[1], False)):
        usage = post(http, path, messages=answered, max_tokens=4)["usage"]
        known = first["usage"]["total_tokens"] if shares else 0
        assert known - 2 <= usage["prompt_tokens_details"]["cached_tokens"] <= known


def test_whoever_wants_no_cache_leaves_nothing_and_gets_nothing(
    people: list[httpx2.Client],
) -> None:
    prompt = "Some text that is read, and is to be forgotten once it has been answered. "
    for _ in range(2):
        told = post(people[0], "/completion", prompt=prompt, n_predict=4, cache_prompt=False)
        assert told["tokens_cached"] == 0
    assert post(people[0], "/completion", prompt=prompt, n_predict=4)["tokens_cached"] == 0
    assert post(people[0], "/completion", prompt=prompt, n_predict=4)["tokens_cached"] > 0


def test_what_an_editor_has_read_ahead_is_known_to_the_next_gap(
    people: list[httpx2.Client],
) -> None:
    half = FILE.index("def f10")
    gap = {"input_prefix": FILE[:half], "input_suffix": FILE[half:]}
    extra = {"input_extra": [{"filename": "a.py", "text": FILE}]}
    ahead = post(people[0], "/infill", **gap, **extra, prompt="", n_predict=0)
    assert (ahead["content"], ahead["tokens_predicted"], ahead["tokens_cached"]) == ("", 0, 0)
    assert ahead["tokens_evaluated"] > 1000
    told = post(people[0], "/infill", **gap, **extra, prompt="    x = ")
    assert told["tokens_evaluated"] == ahead["tokens_evaluated"] + len("    x = ")
    assert told["tokens_cached"] >= ahead["tokens_evaluated"] - 1
    assert (told["tokens_predicted"], told["stop_type"]) == (128, "limit")
    # the next gap of the same file, some lines on
    half = FILE.index("def f11")
    gap = {"input_prefix": FILE[:half], "input_suffix": FILE[half:]}
    told = post(people[0], "/infill", **gap, **extra, prompt="", n_predict=8)
    assert told["tokens_cached"] > FILE.index("def f10")
    other = post(people[1], "/infill", **gap, **extra, prompt="", n_predict=8)
    assert other["tokens_cached"] == 0
