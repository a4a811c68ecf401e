"""The promise, on real models: draft, mode and block length change no token of the output.

Bit-exact set-up (`--exact`): a worker's logits do not depend on how many rows are evaluated at
once, so equality is a hard test.
"""

from __future__ import annotations

import json
import mmap
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outrider import Client, Completion
from outrider.core.values import Mode
from outrider.errors import ModelUnusable
from outrider_services.models import gguf

pytestmark = [pytest.mark.model, pytest.mark.timeout(300)]

COMMAND = [sys.executable, "-m", "outrider_services"]
PROMPT = "The future of AI is"
GREEDY: dict[str, Any] = {"temperature": 0.0}
SAMPLED: dict[str, Any] = {"temperature": 0.8, "seed": 7}
LENGTH = {0.0: 64, 0.8: 32}
SPLIT = (
    "--exact",
    "--target-cores=0",
    "--draft-cores=1",
    "--ctx=512",
    "--parallel=8",
    "--draft-quant=off",
)
FIXED = ("--n-draft=8", "--spec-draft-n-min=8")  # blocks are verified whether they pay or not


@pytest.fixture(scope="module")
def pair(serve: Any, default_target: Any, default_draft: Any) -> Client:
    client: Client = serve("-m", default_target, "-md", default_draft, *SPLIT, *FIXED)
    return client


def ids(completion: Completion) -> list[int]:
    return [token.id for token in completion.tokens]


@pytest.fixture(scope="module", params=[GREEDY, SAMPLED], ids=["greedy", "sampled"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    return dict(request.param)


@pytest.fixture(scope="module")
def plain(pair: Client, settings: dict[str, Any]) -> Completion:
    answer = pair.create_completion(
        PROMPT, max_tokens=LENGTH[settings["temperature"]], mode="plain", **settings
    )
    assert isinstance(answer, Completion)
    return answer


def test_the_model_fills_a_gap(pair: Client) -> None:
    before, after = "def add(a, b):\n    return", "\n\nprint(add(1, 2))\n"
    prompt = pair.infill_prompt(before, after, extra=[("notes.txt", "none")])
    names = ("<|repo_name|>", "<|file_sep|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    (repository,), (file,), *gap = map(pair.tokenize, names)
    assert [prompt.count(one) for one in (repository, file)] == [1, 2]
    assert [token for token in prompt if (token,) in gap] == [token for (token,) in gap]
    answer = pair.create_completion(prompt, max_tokens=16, **GREEDY)
    assert answer.text.split("\n")[0].strip() == "a + b"


@pytest.mark.parametrize("n_draft", [1, 3, 8])
@pytest.mark.parametrize("mode", ["sync", "pipelined"])
def test_every_mode_and_block_length_says_the_same(
    pair: Client, plain: Completion, settings: dict[str, Any], mode: Mode, n_draft: int
) -> None:
    answer = pair.create_completion(
        PROMPT, max_tokens=len(plain.tokens), mode=mode, n_draft=n_draft, **settings
    )
    assert ids(answer) == ids(plain)
    assert answer.text == plain.text
    assert len(answer.tokens) == LENGTH[settings["temperature"]]
    assert answer.stats.verified_tokens > 0


def test_another_seed_says_something_else(pair: Client) -> None:
    said = {
        pair.create_completion(PROMPT, max_tokens=12, temperature=0.8, seed=seed).text
        for seed in (7, 8)
    }
    assert len(said) == 2


def test_penalties_and_filters_see_the_prefix_that_each_row_really_has(pair: Client) -> None:
    settings: dict[str, Any] = {
        "temperature": 0.7, "seed": 3, "top_k": 40, "top_p": 0.95, "min_p": 0.02,
        "repeat_penalty": 1.3, "presence_penalty": 0.2, "frequency_penalty": 0.1,
        "logit_bias": {13: -2.0}, "max_tokens": 40,
    }  # fmt: skip
    modes: tuple[Mode, ...] = ("plain", "sync", "pipelined")
    said = [ids(pair.create_completion(PROMPT, mode=mode, **settings)) for mode in modes]
    assert said[0] == said[1] == said[2]


PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "A hash table stores",
    "Once upon a time",
    "The derivative of x squared is",
    "def fibonacci(n, memo):",
    "To make tea,",
    "SELECT name FROM",
)


@pytest.fixture(scope="module")
def alone(pair: Client) -> list[list[int]]:
    """What each prompt leads to by itself; every second one is sampled."""
    return [
        ids(pair.create_completion(prompt, max_tokens=16, mode="plain", **by_turns(n)))
        for n, prompt in enumerate(PROMPTS)
    ]


def by_turns(n: int) -> dict[str, Any]:
    return (GREEDY, SAMPLED)[n % 2]


@pytest.mark.parametrize("count", [2, 4, 8])
def test_requests_at_once_get_the_texts_they_would_get_alone(
    pair: Client, alone: list[list[int]], count: int
) -> None:
    """In all modes at once, while others come, share passes, and leave."""
    modes: tuple[Mode, ...] = ("pipelined", "sync", "plain")
    streams = [
        pair.create_completion(prompt, max_tokens=16, mode=modes[n % 3], stream=True, **by_turns(n))
        for n, prompt in enumerate(PROMPTS[:count])
    ]
    leaving = pair.create_completion(PROMPTS[0], max_tokens=16, stream=True)
    next(iter(leaving))
    leaving.cancel()
    assert [ids(stream.result()) for stream in streams] == alone[:count]


def test_text_in_other_scripts_comes_in_whole_characters(pair: Client) -> None:
    stream = pair.create_completion(
        "用三句话解释什么是哈希表，并使用表情符号 🎉：", max_tokens=48, stream=True, **GREEDY
    )
    texts = [fragment.text for fragment in stream]
    answer = stream.result()
    assert "".join(texts) == answer.text
    assert "\ufffd" not in answer.text.rstrip("\ufffd")
    assert any(ord(character) > 0x3000 for character in answer.text)


def test_the_same_model_demonstration_accepts_everything(default_draft: Path) -> None:
    def run(*flags: str) -> Any:
        common = ["-m", str(default_draft), "--exact", "-t=1", "-n=32", "-o=json", f"-p={PROMPT}"]
        done = subprocess.run([*COMMAND, "run", *common, *flags], capture_output=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr.decode()

    sampling = ["--temperature=0.8", "--seed=7"]
    (alone, _), (demonstrated, told) = run("--mode=plain", *sampling), run(*sampling)
    assert demonstrated["token_ids"] == alone["token_ids"]
    assert demonstrated["mode"] == "pipelined"
    assert demonstrated["stats"]["acceptance_rate"] == 1.0
    assert demonstrated["stats"]["verified_tokens"] > 14
    assert "demonstrates" in told


def test_the_marker_of_a_control_token_stops_the_answer(pair: Client) -> None:
    marker = "<|im_start|>"
    (token,) = pair.tokenize(marker)
    answer = pair.create_completion(
        PROMPT, max_tokens=8, temperature=0, logit_bias={token: 1000}, stop=marker
    )
    assert isinstance(answer, Completion)
    assert (ids(answer), answer.text) == ([token], "")
    assert answer.choices[0].finish_reason == "stop"


@pytest.fixture(scope="module")
def nonsense(test_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test model with NaN for the weights of its last norm, so that every logit is NaN."""
    copy = tmp_path_factory.mktemp("nonsense") / "nan.gguf"
    shutil.copyfile(test_model, copy)
    with copy.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        reader = gguf._Reader(data)
        gguf._parse(reader)
        start = -(-reader.at // 32) * 32
        name = b"output_norm.weight"
        at = data.find(name) + len(name)
        dimensions, count, kind, offset = struct.unpack_from("<IQIQ", data, at)
        assert (dimensions, kind) == (1, 0)  # float32
        start += offset
        data[start : start + 4 * count] = struct.pack("<f", float("nan")) * count
    return copy


PLAIN = ("--exact", "--ctx=256", "--parallel=1", "--draft-quant=off", *FIXED)


def test_a_target_that_computes_nan_says_so(serve: Any, nonsense: Path, test_model: Path) -> None:
    client: Client = serve("-m", nonsense, "-md", test_model, *PLAIN)
    for _ in range(2):  # the worker is as good as before
        with pytest.raises(ModelUnusable, match="computed NaN where"):
            client.create_completion(PROMPT, max_tokens=8, logprobs=True)


def test_a_draft_that_computes_nan_changes_nothing(
    serve: Any, nonsense: Path, test_model: Path
) -> None:
    client: Client = serve("-m", test_model, "-md", nonsense, *PLAIN)
    settings: dict[str, Any] = {"max_tokens": 24, **SAMPLED}
    alone = client.create_completion(PROMPT, mode="plain", **settings)
    for mode in ("sync", "pipelined"):
        answer = client.create_completion(PROMPT, mode=mode, **settings)
        assert ids(answer) == ids(alone)
        assert answer.stats.verified_tokens == 0
    assert set(client.health()["workers"]) == {"target", "draft"}
