"""What `outrider bench` asks, in which order, and what it makes of the answers."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
from argparse import Namespace
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from outrider.core.values import Span
from outrider.errors import ConfigError
from outrider_services import table
from outrider_services.bench import peers, plots, prompts, runner, suites
from outrider_services.bench import plan as plans
from outrider_services.bench import results as measures
from outrider_services.bench.plan import Arm, Prompt
from outrider_services.bench.prompts import Category
from outrider_services.bench.results import Results, Sample
from outrider_services.commands import bench as command

TRACES = Path(__file__).parents[1] / "sim" / "acceptance-traces.json"


def parsed(**changes: Any) -> Namespace:
    flags = {
        "arms": "plain,sync,pipelined,auto",
        "n_predict": 96,
        "repetitions": 5,
        "warmup": 1,
        "category": None,
        "per_category": 1,
        "prompts": None,
        "suite": None,
        "restarts": None,
        "peer_n_max": "1-12",
        "lanes": None,
        "require_speedup": None,
    }
    return Namespace(**{**flags, **changes})


# --- the plan -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("4", (4,)), ("1-4", (1, 2, 3, 4)), ("8,1-3,2", (1, 2, 3, 8)), (" 2 , 4", (2, 4))],
)
def test_a_list_of_ranges_names_numbers(text: str, numbers: tuple[int, ...]) -> None:
    assert plans.read_ranges(text) == numbers


@pytest.mark.parametrize("text", ["", ",", "0", "a", "3-", "-3", "65", "4-2", "1-2-3"])
def test_other_lists_of_ranges_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--peer-n-max"):
        plans.read_ranges(text)


def test_an_arm_is_a_mode_and_perhaps_a_length() -> None:
    assert plans.read_arm("auto") == Arm("auto", "auto")
    assert plans.read_arm("sync:4") == Arm("sync:4", "sync", 4)
    for name in ("synk", "sync:", "sync:0", "sync:65", "sync:x", "plain:2"):
        with pytest.raises(ConfigError, match=re.escape(repr(name))):
            plans.read_arm(name)
    with pytest.raises(ConfigError, match="did you mean sync"):
        plans.read_arm("synk")


def test_the_baseline_is_always_there() -> None:
    plan = plans.read_plan(parsed(arms="auto,llama-server,auto"))
    assert [arm.name for arm in plan.arms] == ["plain", "auto"]
    assert plan.peers == ("llama-server",)
    assert plan.peer_n_max == tuple(range(1, 13))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"n_predict": 1}, "--n-predict"),
        ({"repetitions": 0}, "--repetitions"),
        ({"warmup": -1}, "--warmup"),
        ({"per_category": 4}, "has 3 prompts of code, not 4"),
        ({"category": "cod"}, "did you mean code"),
        ({"prompts": "/nonexistent.toml"}, "cannot read /nonexistent.toml"),
        ({"arms": "sync", "require_speedup": 1.2}, "auto"),
        ({"require_speedup": float("nan")}, "--require-speedup"),
    ],
)
def test_what_cannot_be_measured_is_told_first(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        plans.read_plan(parsed(**changes))


def test_every_arm_answers_once_in_each_repetition_and_each_time_another_begins() -> None:
    arms = ["plain", "sync", "auto"]
    asked = [Prompt("code", 0, "a"), Prompt("code", 1, "b"), Prompt("chat", 0, "c")]
    order = list(runner.schedule(arms, asked, 2))
    groups = [order[at : at + 3] for at in range(0, len(order), 3)]
    assert all(
        len({(prompt, repetition) for prompt, repetition, _ in group}) == 1 for group in groups
    )
    assert all(sorted(arm for _, _, arm in group) == sorted(arms) for group in groups)
    assert [group[0][2] for group in groups] == [*arms, *arms]
    assert Counter(prompt.text for prompt, _, _ in order) == {"a": 6, "b": 6, "c": 6}
    assert [group[0][0].category for group in groups] == ["code"] * 4 + ["chat"] * 2


@pytest.mark.parametrize(
    ("placement", "target", "draft"),
    [
        ("shared", ("3,5,7", 3), ("3,5,7", 3)),
        ("split", ("3", 1), ("5", 1)),
        ("given", ("", 4), ("", 4)),
    ],
)
def test_workers_go_where_the_placement_says(
    placement: str, target: tuple[str, int], draft: tuple[str, int]
) -> None:
    with mock.patch.object(os, "sched_getaffinity", return_value={3, 5, 7}):
        placed = command.on_cores_of(placement, table.Settings())
    assert (placed.target.cores, placed.target.threads) == target
    assert (placed.draft.cores, placed.draft.threads) == draft


def test_one_core_cannot_be_split() -> None:
    with (
        mock.patch.object(os, "sched_getaffinity", return_value={2}),
        pytest.raises(ConfigError, match="two cores"),
    ):
        command.on_cores_of("split", table.Settings())


# --- prompts --------------------------------------------------------------------------------------


def qwen(messages: list[dict[str, str]]) -> str:
    """The template of the default pair."""
    turns = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages]
    return "".join(turns) + "<|im_start|>assistant\n"


def test_the_first_prompts_are_those_whose_acceptance_was_recorded() -> None:
    categories = {category.name: category for category in prompts.load(None, (), 3)}
    assert len(categories) >= 6
    rendered = {
        name: qwen(c.messages(c.prompts[0])) if c.chat else c.prompts[0]
        for name, c in categories.items()
    }
    recorded = json.loads(TRACES.read_text())
    assert {name: rendered[name] for name in recorded} == {
        name: trace["prompt"] for name, trace in recorded.items()
    }
    texts = [text for category in categories.values() for text in category.prompts]
    assert len(set(texts)) == 3 * len(categories)
    assert all(text == text.strip() and "\\" not in text for text in texts)


@pytest.mark.parametrize(
    "text",
    ["[a]\nchat = 1\nprompts = ['x']", "[a]\nchat = true", "[a]\nchat = true\nprompts = []",
     "[a]\nchat = true\nprompts = ['x']\nmore = 1", "a = 1", "", "[",
     "[a]\nchat = false\nsystem = 'y'\nprompts = ['x']", "[a]\nchat = true\nprompts = ['']"],
)  # fmt: skip
def test_a_file_of_prompts_must_be_as_described(text: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"mine\.toml"):
        prompts.load(str(path), (), 1)


# --- figures --------------------------------------------------------------------------------------


SPEC_BENCH = {"question_id": 81, "category": "writing", "turns": ["Write.", "Once more."]}
HUMAN_EVAL = {"task_id": "HumanEval/0", "prompt": "def f():", "canonical_solution": "..."}


@pytest.mark.parametrize("packed", [False, True])
def test_the_question_files_of_others_are_read(packed: bool, tmp_path: Path) -> None:
    lines = [SPEC_BENCH, HUMAN_EVAL, {**SPEC_BENCH, "turns": ["Sing."]}]
    text = "\n\n".join(map(json.dumps, lines)).encode()
    path = tmp_path / ("suite.jsonl.gz" if packed else "suite.jsonl")
    path.write_bytes(gzip.compress(text) if packed else text)
    writing = Category("writing", True, ("Write.",))
    tasks = Category("HumanEval", False, ("def f():",))
    assert suites.load(str(path), [], 1) == [writing, tasks]
    assert suites.load(str(path), ["writing"], 2) == [
        Category("writing", True, ("Write.", "Sing."))
    ]


@pytest.mark.parametrize(
    ("data", "wanted", "what"),
    [
        (b"", (), "has no question"),
        (b"{}", (), "line 1: a question is an object with"),
        (b"\nnot JSON", (), "line 2: a question is"),
        (b"[" * 10**5, (), "line 1: a question is"),
        (b"\xff", (), "is not UTF-8"),
        (
            json.dumps(SPEC_BENCH).encode(),
            ("writin",),
            "has no category 'writin'; did you mean writing",
        ),
        (json.dumps({**SPEC_BENCH, "turns": []}).encode(), (), "line 1: a question"),
    ],
)
def test_a_suite_that_cannot_be_asked_is_one_sentence(
    data: bytes, wanted: tuple[str, ...], what: str, tmp_path: Path
) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=what):
        suites.load(str(path), wanted, 1)


def test_neither_a_file_that_is_not_there_nor_one_with_too_few_questions(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    with pytest.raises(ConfigError, match="No such file"):
        suites.load(str(path), (), 1)
    path.write_text(json.dumps(SPEC_BENCH))
    with pytest.raises(ConfigError, match="has 1 questions of writing, not 2"):
        suites.load(str(path), (), 2)
    path.rename(tmp_path / "suite.gz")
    with pytest.raises(ConfigError, match="cannot read"):
        suites.load(str(tmp_path / "suite.gz"), (), 1)


def test_a_suite_is_asked_with_ten_restarts(tmp_path: Path) -> None:
    path = tmp_path / "suite.jsonl"
    path.write_text(json.dumps(SPEC_BENCH))
    assert plans.read_plan(parsed()).restarts == 1
    plan = plans.read_plan(parsed(suite=str(path)))
    assert (plan.restarts, plan.categories) == (10, (Category("writing", True, ("Write.",)),))
    assert plans.read_plan(parsed(suite=str(path), restarts=3)).restarts == 3


def results(**speeds: list[float]) -> Results:
    """Two categories; the second is twice as fast, which may change no ratio."""
    found = Results({"machine": "a test"}, ("plain", "auto"), ("llama-server",))
    for factor, category in ((1.0, "code"), (2.0, "chat")):
        for arm, of in speeds.items():
            name = arm.replace("_", "-")
            ids = None if name == "llama-server" else (1, 2, 3)
            for repetition, speed in enumerate(of):
                n_max = 4 if ids is None else None
                where = (category, 0, repetition, name)
                margins = (9.0,) * len(ids or ())
                sample = Sample(*where, speed * factor, 9, 0.5, 2.0, 0.9, n_max, ids, margins)
                found.samples.append(sample)
    return found


FOUND = results(plain=[10, 20, 10], auto=[15, 40, 10], llama_server=[12, 20, 10])


def test_a_ratio_is_of_one_repetition_and_the_median_of_them_counts() -> None:
    auto = next(one for one in FOUND.summaries() if one.arm == "auto")
    assert (auto.ratio, auto.low, auto.high) == (1.5, 1.0, 2.0)
    assert auto.tokens_per_s == 15
    assert (auto.acceptance_rate, auto.mean_accepted_length, auto.target_busy) == (0.5, 2.0, 0.9)
    assert FOUND.means() == pytest.approx({"plain": 1, "auto": 1.5, "llama-server": 1})


def test_ours_are_held_against_the_better_peer() -> None:
    found = results(plain=[10], auto=[15], llama_server=[12], llama_speculative_simple=[20])
    found.peers = ("llama-server", "llama-speculative-simple")
    against = found.against_peers()
    assert against["auto"] == pytest.approx({"code": 0.75, "chat": 0.75})
    assert against["plain"] == pytest.approx({"code": 0.5, "chat": 0.5})


def test_each_prompt_of_a_category_counts_alike() -> None:
    """One that is answered at other speeds than the rest must not decide by its place."""
    found = Results({}, ("plain", "auto"))
    for prompt, factor in ((0, 1.0), (1, 4.0)):
        for repetition, (plain, auto) in enumerate([(10, 20), (20, 20), (10, 20)]):
            where = ("code", prompt, repetition)
            found.samples.append(Sample(*where, "plain", plain * factor, 9))
            found.samples.append(Sample(*where, "auto", auto * factor * (prompt + 1), 9))
    summary = next(one for one in found.summaries() if one.arm == "auto")
    assert summary.ratio == pytest.approx((2 * 4) ** 0.5)
    assert (summary.low, summary.high) == (1.0, 4.0)


def test_a_peers_length_is_chosen_by_all_prompts_that_it_was_tried_on() -> None:
    assert runner.finalists({1: [9], 2: [12], 3: [11], 4: [10], 5: [8]}) == [2, 3, 4, 1]
    assert runner.finalists({1: [20], 2: [12, 4], 3: [11, 9]}) == [3, 2]


@pytest.mark.parametrize(
    ("ids", "margins", "is_near", "words"),
    [
        ((1, 2, 4), (9.0, 9.0, 0.01), True, "at near-ties that rounding decides: auto in chat"),
        ((1, 2, 4), (9.0, 0.01, 9.0), False, "Texts differ from plain: auto in chat"),
        ((1, 2), (9.0, 0.01), False, "Texts differ from plain: auto in chat"),
    ],
    ids=["a-near-tie", "a-fault", "an-answer-that-is-shorter"],
)
def test_the_first_difference_between_texts_is_named(
    ids: tuple[int, ...],
    margins: tuple[float, ...],
    is_near: bool,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert FOUND.differences() == []
    found = results(plain=[10], auto=[15])
    assert command.check_texts(found) == 0
    found.peers = ()
    sample = Sample("chat", 0, 0, "auto", 9, 3, token_ids=ids, margins=margins)
    found.samples.append(sample)
    (difference,) = found.differences()
    assert (difference.arm, difference.category, difference.at) == ("auto", "chat", 2)
    assert difference.is_near == is_near
    assert words in measures.as_markdown(found)
    assert command.check_texts(found) == (0 if is_near else command.DIFFERENT)
    told = "which is a fault: auto in chat, prompt 1, from token 2 on"
    assert (told in capsys.readouterr().err) == (not is_near)


def test_the_geometric_mean_of_a_gain_and_its_inverse_is_one() -> None:
    assert measures.geometric_mean([4, 0.25]) == pytest.approx(1)


def test_markdown_has_speed_ups_first_and_its_columns_in_line() -> None:
    text = measures.as_markdown(FOUND)
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) == 3
    for found in tables:
        assert len({len(line) for line in found.splitlines()}) == 1
    assert re.search(r"\| auto +\| +1\.50 \| +1\.50 \| +1\.50 \|", tables[0])
    assert "llama-server (n_max 4)" in tables[2]
    assert "the same token ids" in text


def test_what_differs_between_restarts_is_shown() -> None:
    """In each alone every answer is compared with those of the same processes."""
    found = results(auto=[30, 20], plain=[10, 20], llama_server=[10, 20])
    for at, sample in enumerate(found.samples):
        found.samples[at] = replace(sample, repetition=0, restart=sample.repetition)
    assert found.by_restart()["auto"] == pytest.approx([3.0, 1.0])
    assert found.by_restart()["plain"] == [1.0, 1.0]
    assert "| auto         |        2 | 1.000 |  2.000 | 3.000 |" in measures.as_markdown(found)
    assert json.loads(measures.as_json(found))["geometric_means_by_restart"].keys() == {
        "plain",
        "auto",
        "llama-server",
    }
    assert results(auto=[30, 20], plain=[10, 20]).by_restart() == {}


def test_csv_and_json_say_the_same() -> None:
    lines = measures.as_csv(FOUND).splitlines()
    assert lines[0] == "# machine: a test"
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[1:]))))
    found = json.loads(measures.as_json(FOUND))
    assert [float(row["ratio"]) for row in rows] == [one["ratio"] for one in found["results"]]
    assert found["identical"] is True
    assert found["against_best_peer"]["auto"]["categories"]["code"] == pytest.approx(15 / 12)


def test_too_little_speed_up_is_status_nine(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.check_speedup(FOUND, None) == 0
    assert command.check_speedup(FOUND, 1.5) == 0
    assert command.check_speedup(FOUND, 2.0) == 9
    assert "auto is 1.50 times as fast as plain, 25% below" in capsys.readouterr().err


# --- peers ----------------------------------------------------------------------------------------

OUTPUT = """
encoded   41 tokens in    0.512 seconds, speed:   80.078 t/s
decoded   49 tokens in    2.512 seconds, speed:   19.506 t/s

n_draft   = 4
n_predict = 49
n_drafted = 60
n_accept  = 36
accept    = 60.000%
"""


def test_the_speed_of_a_peer_is_read_from_its_output() -> None:
    assert peers.parse(OUTPUT) == peers.Answer(49, 19.506, 0.6)
    assert peers.parse(OUTPUT.replace("60", "0")) == peers.Answer(49, 19.506, None)
    assert peers.parse("error: out of memory") is None


def test_peers_get_the_cores_and_threads_of_our_workers() -> None:
    every = {0, 1, 2, 3}
    target = table.TargetOptions(model="t.gguf", cores="0", threads=4, ctx=512)
    draft = table.DraftOptions(model="d.gguf", cores="2-3", threads=2)
    with mock.patch.object(os, "sched_getaffinity", return_value=every):
        setup = peers.Setup.of(table.Settings(target=target, draft=draft))
    flags = dict(zip(setup.flags[::2], setup.flags[1::2], strict=True))
    assert setup.cores == {0, 2, 3}
    assert [flags[name] for name in ("-m", "-md", "-t", "-tb", "-td", "-tbd", "-c")] == [
        *("t.gguf", "d.gguf", "1", "1", "2", "2", "512")
    ]


def test_a_peer_that_is_not_built_names_what_builds_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scripts/build-peers"):
        peers.find(tmp_path, "llama-server")


# --- pictures -------------------------------------------------------------------------------------

# the draft's second token is wrong: the third was verified with it, the fourth never; then a hit
TRACE: list[Span] = [
    Span("target", 0.0, 0.1, 1, 0, 10, (5,)),
    Span("draft", 0.1, 0.2, 2, 1, 11, (6, 9)),
    Span("draft", 0.2, 0.3, 1, 1, 13, (8,)),
    Span("draft", 0.3, 0.4, 1, 1, 14, (8,)),
    Span("target", 0.3, 0.5, 4, 1, 11, (6, 7)),
    Span("draft", 0.5, 0.6, 1, 2, 13, (4,)),
    Span("target", 0.5, 0.7, 1, 2, 13, (4,)),
]


def test_the_fate_of_each_drafted_token_follows_from_the_trace() -> None:
    assert list(plots.fates_of(TRACE)) == [
        *(["accepted", "rejected"], ["rejected"], ["discarded"], ["hit"])
    ]


def test_the_lanes_begin_where_prefill_ends() -> None:
    blocks = plots.blocks(TRACE)
    passes = [block for block in blocks if block.lane == "target"]
    assert [(round(b.start, 3), round(b.end, 3), b.label) for b in passes] == [
        *((0.2, 0.4, "4"), (0.4, 0.6, "1"))
    ]
    assert sum(block.lane == "draft" for block in blocks) == 5
    assert plots.blocks([]) == []


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_pictures_are_written(suffix: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bars, lanes = tmp_path / f"bars.{suffix}", tmp_path / f"lanes.{suffix}"
    plots.bars(str(bars), FOUND)
    plots.lanes(str(lanes), {"pipelined": TRACE, "sync": TRACE}, 3.0)
    for path in (bars, lanes):
        assert path.stat().st_size > 5000
    if suffix == "svg":
        assert "target idle" in lanes.read_text()
        assert "geometric" in bars.read_text()


def test_a_picture_that_cannot_be_made_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        plots.check_path("picture.pdf")
    with pytest.raises(ConfigError, match="no such directory"):
        plots.check_path(str(tmp_path / "none" / "x.svg"))
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(ConfigError, match="--extra plot"),
    ):
        plots.check_path(str(tmp_path / "x.svg"))
