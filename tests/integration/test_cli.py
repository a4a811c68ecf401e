"""The `outrider` command as somebody types it: streams, statuses, a sentence for each mistake."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import shlex
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import uvloop

from outrider.core.stats import Report
from outrider.engines.toy_text import SMALLEST
from outrider_services.options import OPTIONS
from outrider_services.tuning import advice, search
from outrider_services.tuning.decisions import Decision, Kernels, Trial, Variant

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle, Serve, Served

PROMPT = "The river runs"
QUICK = ("--backend=toy", "--toy-step-ms=2", "--toy-draft-ms=0.2", "--toy-row-ms=0.02")
GREEDY = ("--temperature", "0")
BLOCKS = ("--n-draft=4", "--spec-draft-n-min=4")  # are verified whether they pay here or not
HELP = {
    "run": ("target", "draft", "sampling", "pipeline", "toy", "links", "log", "terminal"),
    "serve": (
        "target", "draft", "pipeline", "coordinator", "hosts", "links", "server", "toy", "log",
    ),
    "worker draft": ("target", "pipeline", "toy", "links", "log"),
    "worker target": ("target", "pipeline", "toy", "links", "log"),
    "pull": ("pipeline",),
    "tune": ("target", "draft", "pipeline", "log"),
    "ls": (),
    "devices": (),
    "ps": (),
    "top": ("links",),
    "stop": ("links",),
    "show": tuple(dict.fromkeys(key.split(".")[0] for key in OPTIONS)),
}  # fmt: skip


def parsed(done: CompletedProcess[str]) -> dict[str, Any]:
    """The one object on stdout."""
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def sentence(done: CompletedProcess[str], status: int) -> str:
    """The one line that tells what went wrong."""
    assert "Traceback" not in done.stderr
    assert done.returncode == status, done.stderr
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("outrider: ")]
    assert len(lines) == 1, done.stderr
    assert done.stderr.splitlines() == lines
    return lines[0]


# ---- the text is the target's -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "sampling", "settings"),
    [
        (QUICK, ("--temperature", "0"), {"temperature": 0.0}),
        (
            ("--connect=shared",),
            ("--temperature", "0.8", "--seed", "7"),
            {"temperature": 0.8, "seed": 7},
        ),
    ],
    ids=["greedy-on-its-own-pipeline", "sampled-on-a-shared-one"],
)
def test_every_mode_and_draft_length_says_what_the_target_says_alone(
    served: Served,
    oracle: Oracle,
    place: tuple[str, ...],
    sampling: tuple[str, ...],
    settings: dict[str, Any],
) -> None:
    ways = [("plain", 5), *((mode, n) for mode in ("sync", "pipelined") for n in (1, 3, 8))]

    def run(way: tuple[str, int]) -> dict[str, Any]:
        # drafted tokens are verified whether they pay here or not
        blocks = (f"--n-draft={way[1]}", f"--spec-draft-n-min={way[1]}")
        flags = ("--mode", way[0], *blocks, "-n", "96", "-o", "json")
        for _ in range(3):  # on a busy machine a draft may join when all has been said
            result = parsed(served.cli("run", *place, *sampling, *flags, "-p", PROMPT))
            if way[0] == "plain" or result["stats"]["accepted_tokens"]:
                break
        return result

    with ThreadPoolExecutor(2) as pool:
        results = dict(zip(ways, pool.map(run, ways), strict=True))
    expected = oracle(PROMPT, 96, **settings)
    for way, result in results.items():
        assert result["token_ids"] == expected.token_ids, way
        assert result["text"] == expected.text
        assert result["mode"] == way[0]
        assert (result["stats"]["accepted_tokens"] > 0) == (way[0] != "plain")


@pytest.mark.parametrize("limit", ["-Sn 24", "-n 256"], ids=["soft", "least"])
def test_few_files_may_be_open_and_that_is_enough(cli: Cli, oracle: Oracle, limit: str) -> None:
    cli.prefix = ("sh", "-c", f'ulimit {limit}; exec "$@"', "sh")
    done = cli("run", *QUICK, *GREEDY, "-n", "24", PROMPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == oracle(PROMPT, 24).text + "\n"


@pytest.mark.parametrize("verb", ["run --connect=x hi", "serve", "worker draft --connect=x", "ps"])
def test_too_few_open_files_is_one_sentence(cli: Cli, verb: str) -> None:
    cli.prefix = ("sh", "-c", 'ulimit -n 24; exec "$@"', "sh")
    said = sentence(cli(*verb.split(), *(["--backend=toy"] if "ps" not in verb else [])), 3)
    assert "may hold 24 files open at once, and needs 256" in said
    assert "ulimit -n" in said
    for harmless in (["ls"], ["--help"], ["run", "--help"]):
        assert cli(*harmless).returncode == 0


@pytest.mark.parametrize("count", [1, 2, 17, 96])
def test_the_number_of_tokens_is_exact(served: Served, oracle: Oracle, count: int) -> None:
    for mode in ("sync", "pipelined"):
        flags = ("--mode", mode, "-n", str(count), "-o", "json")
        result = parsed(served.cli("run", "--connect=shared", *GREEDY, *flags, PROMPT))
        assert result["token_ids"] == oracle(PROMPT, count).token_ids
        assert result["stats"]["generated_tokens"] == count
        assert result["finish_reason"] == "length"


def test_a_pipeline_that_is_up_is_reached_by_name_and_by_address(
    served: Served, oracle: Oracle
) -> None:
    for pipeline in ("shared", served.ipc, served.tcp):
        done = served.cli("run", "--connect", pipeline, *GREEDY, "-n", "24", PROMPT)
        assert done.returncode == 0, done.stderr
        assert done.stdout == oracle(PROMPT, 24).text + "\n"


def test_a_draft_length_of_zero_is_plain(cli: Cli, oracle: Oracle) -> None:
    result = parsed(cli("run", *QUICK, *GREEDY, "-n-draft", "0", "-n", "9", "-o", "json", PROMPT))
    assert result["token_ids"] == oracle(PROMPT, 9).token_ids
    assert (result["mode"], result["stats"]["drafted_tokens"]) == ("plain", 0)


def test_a_random_seed_is_told_and_gives_the_same_text_again(
    served: Served, oracle: Oracle
) -> None:
    flags = ("--connect=shared", "--temperature=0.9", "-n", "20", "-o", "json")
    first = parsed(served.cli("run", *flags, PROMPT))
    second = parsed(served.cli("run", *flags, "--seed", "-1", PROMPT))
    assert first["seed"] != second["seed"]
    for result in (first, second):
        expected = oracle(PROMPT, 20, temperature=0.9, seed=result["seed"])
        assert result["token_ids"] == expected.token_ids


# ---- the prompt ---------------------------------------------------------------------------------


def test_the_prompt_comes_from_argument_flag_file_and_stdin_in_this_order(served: Served) -> None:
    (served.cli.directory / "prompt.txt").write_text("from a file é")
    argument, flag, file = ["from an argument"], ["-p", "from a flag"], ["--file", "prompt.txt"]

    def prompt(*arguments: str, stdin: str = "from stdin") -> str:
        flags = ("--connect=shared", "-n", "1", "-o", "json")
        result = parsed(served.cli("run", *flags, *arguments, stdin=stdin))
        return bytes(result["prompt_token_ids"]).decode()

    assert prompt(*flag, *file, *argument) == "from an argument"
    assert prompt(*file, *flag) == "from a flag"
    assert prompt(*file) == "from a file é"
    assert prompt() == "from stdin"
    assert prompt(stdin="") == "The future of AI is"
    assert prompt(stdin="one\r\ntwo\n") == "one\r\ntwo\n"


def test_a_prompt_that_cannot_be_read_is_one_sentence(cli: Cli) -> None:
    (cli.directory / "latin").write_bytes(b"caf\xe9")
    assert "missing.txt" in sentence(cli("run", *QUICK, "--file", "missing.txt"), 2)
    assert "latin is not UTF-8" in sentence(cli("run", *QUICK, "--file", "latin"), 2)
    assert "stdin is not UTF-8" in sentence(cli("run", *QUICK, stdin=b"\xff\xfe"), 2)
    assert "line is not UTF-8" in sentence(cli("run", *QUICK, os.fsdecode(b"caf\xe9")), 2)
    assert "-m model.gguf" in sentence(cli("run", *QUICK, "model.gguf"), 2)


def test_a_prompt_longer_than_the_context_is_one_sentence(served: Served) -> None:
    done = served.cli("run", "--connect=shared", "-p", "a" * 2048)
    assert "2048 tokens, and a context of 2048" in sentence(done, 2)
    done = served.cli("run", "--connect=shared", *GREEDY, "-o", "json", "-p", "a" * 2044)
    result = parsed(done)
    assert (len(result["token_ids"]), result["finish_reason"]) == (4, "length")


# ---- what is printed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "mode"), [("-v", "pipelined"), ("--verbose", "sync"), ("-verbose=true", "sync")]
)
def test_verbose_tells_each_drafted_tokens_fate_on_stderr(
    served: Served, oracle: Oracle, flag: str, mode: str
) -> None:
    flags = ("--connect=shared", *GREEDY, "-n", "60", *BLOCKS, "--mode", mode, flag)
    for _ in range(3):  # on a busy machine a draft may join when all has been said
        done = served.cli("run", *flags, "-p", PROMPT)
        figures = statistics(done.stderr)
        if figures["corrected"] > 0:
            break
    assert done.stdout == oracle(PROMPT, 60).text + "\n"
    lines = [line for line in done.stderr.splitlines() if line.startswith("[")]
    place = r"\d+\.\d+"
    text = r'"([^"\\]|\\.)*"'
    forms = {
        "DRAFT": rf"\[DRAFT\] {place} \d+ {text} p=[01]\.\d\d",
        "VERIFY": rf"\[VERIFY\] {place} \d+ {text} target=\d+ {text}",
        "ACCEPT": rf"\[ACCEPT\] {place}",
        "REJECT": rf"\[REJECT\] {place} target=\d+ {text}",
        "BONUS": rf"\[BONUS\] \d+ \d+ {text}",
        "PLAIN": rf"\[PLAIN\] \d+ \d+ {text}",
    }
    tags = [re.match(r"\[(\w+)\]", line) for line in lines]
    counts = {tag: sum(m is not None and m[1] == tag for m in tags) for tag in forms}
    for line, tag in zip(lines, tags, strict=True):
        assert tag is not None
        assert re.fullmatch(forms[tag[1]], line), line
    if figures["beside"]:  # what a block has behind a miss is not shown, but what was right there
        assert figures["accepted"] <= counts["DRAFT"] <= figures["verified"]
    else:
        assert counts["DRAFT"] == figures["verified"]
    assert counts["ACCEPT"] == figures["accepted"]
    assert counts["REJECT"] == figures["corrected"]
    assert mode == "pipelined" or figures["corrected"] > 0
    assert counts["VERIFY"] == counts["ACCEPT"] + counts["REJECT"]
    assert counts["BONUS"] == figures["bonus"]
    assert counts["PLAIN"] == figures["plain"]


def test_a_switch_does_not_swallow_the_prompt_behind_it(served: Served) -> None:
    for switch in ("-v", "-verbose", "--ignore-eos"):
        done = served.cli("run", "--connect=shared", "-n", "1", "-o", "json", switch, PROMPT)
        assert bytes(parsed(done)["prompt_token_ids"]).decode() == PROMPT
    for off in ("-verbose=false", "--verbose=false"):
        done = served.cli("run", "--connect=shared", "-n", "1", off, PROMPT)
        assert done.returncode == 0
        assert "[" not in done.stderr


def statistics(text: str) -> dict[str, int]:
    """The whole numbers of the block, which must be there line by line."""
    number, ratio = r"\d+", r"(\d+\.\d+|n/a)"
    lines = (
        r"Mode: (plain|sync|pipelined)( \(auto\))?",
        rf"Seed: {number}",
        rf"Total tokens generated: (?P<total>{number}) \((?P<kept>{number}) accepted, "
        rf"(?P<corrected>{number}) corrected, (?P<bonus>{number}) bonus, "
        rf"(?P<plain>{number}) plain\)",
        rf"Draft tokens created: (?P<created>{number})",
        rf"Draft tokens verified: (?P<verified>{number})"
        rf"( \(plus (?P<beside>{number}) beside blocks, right at {number} misses\))?",
        rf"Draft tokens accepted: (?P<accepted>{number})",
        rf"Draft tokens discarded: (?P<discarded>{number}) \(plus (?P<hits>{number}) hits\)"
        rf"(; {number} misses foreseen)?",
        rf"Acceptance rate: ({ratio}%|n/a) \(accepted / verified\)",
        rf"Mean accepted length: {ratio}",
        rf"Overlap: ({number}%|n/a) of draft compute",
        rf"Near-ties: {number} \(tokens that won by less than 1.0 logits"
        rf"(, the closest by {ratio})?\)",
        rf"Generation time: {ratio}s \(prefill {ratio}s apart\)",
        rf"Tokens per second: {ratio}",
        rf"Speed-up vs target alone: ~?{ratio}x( \((measured|estimate)\))?",
    )
    found = re.search("\n".join(lines) + "\n", text)
    assert found, text
    return {name: int(value or 0) for name, value in found.groupdict().items()}


@pytest.mark.parametrize("mode", ["plain", "sync", "pipelined"])
def test_the_statistics_add_up(served: Served, mode: str) -> None:
    done = served.cli("run", "--connect=shared", *GREEDY, "-n", "50", "--mode", mode, PROMPT)
    n = statistics(done.stderr)
    assert n["total"] == n["kept"] + n["corrected"] + n["bonus"] + n["plain"] == 50
    assert n["created"] == n["verified"] + n["discarded"] + n["hits"]
    quiet = served.cli("run", "--connect=shared", "-n", "5", "--no-stats", PROMPT)
    assert quiet.stderr == ""


def test_json_is_one_object_with_the_documented_names(served: Served) -> None:
    result = parsed(served.cli("run", "--connect=shared", "-n", "12", "-o", "json", PROMPT))
    names = "text token_ids prompt_token_ids finish_reason seed mode stats"
    assert list(result) == names.split()
    assert set(result["stats"]) == set(Report.__struct_fields__)
    documented = (
        "generated_tokens drafted_tokens verified_tokens accepted_tokens discarded_tokens "
        "truncated_tokens corrections bonuses plain_tokens hits verify_rounds acceptance_rate "
        "mean_accepted_length overlap target_busy draft_busy time_to_first_token_s prefill_s "
        "decode_s tokens_per_s speedup speedup_kind mode seed"
    )
    assert set(documented.split()) <= set(result["stats"])
    assert bytes(result["prompt_token_ids"]).decode() == PROMPT


def test_baseline_measures_the_speed_up_against_the_target_alone(cli: Cli, oracle: Oracle) -> None:
    flags = ("--backend=toy", *GREEDY, "--toy-step-ms=10", "--toy-draft-ms=0.5", "-n", "80")
    result = parsed(cli("run", *flags, "--baseline", "-o", "json", "--mode=pipelined", PROMPT))
    assert result["token_ids"] == oracle(PROMPT, 80).token_ids
    assert result["stats"]["speedup_kind"] == "measured"
    assert result["stats"]["speedup"] > 1.2


def test_a_trace_shows_both_lanes_and_that_they_overlap(cli: Cli) -> None:
    flags = ("--backend=toy", *GREEDY, "--mode=pipelined", "-n", "40", "--trace", "trace.json")
    assert cli("run", *flags, PROMPT).returncode == 0
    trace = json.loads((cli.directory / "trace.json").read_text())
    events = trace["traceEvents"]
    lanes = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert set(lanes.values()) == {"target compute", "draft compute"}
    slices: dict[str, list[tuple[float, float]]] = {name: [] for name in lanes.values()}
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            slices[lanes[event["tid"]]].append((event["ts"], event["ts"] + event["dur"]))
    for intervals in slices.values():
        assert len(intervals) > 5
        ordered = sorted(intervals)
        assert all(b <= c + 1 for (_, b), (c, _) in pairwise(ordered))  # microseconds
    shared = sum(
        max(0.0, min(b, d) - max(a, c))
        for a, b in slices["draft compute"]
        for c, d in slices["target compute"]
    )
    assert shared > 0.5 * sum(b - a for a, b in slices["draft compute"])
    done = cli("run", *QUICK, "-n", "1", "--trace", "/nonexistent/trace.json", PROMPT)
    assert done.returncode == 3
    assert "/nonexistent/trace.json" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="session")
def pipe_of_signals() -> None:
    """The first loop that handles signals opens a pipe that libuv keeps as long as we live."""

    async def handle() -> None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, lambda: None)

    uvloop.run(handle())


@pytest.mark.usefixtures("pipe_of_signals")
def test_after_little_gain_a_command_is_named_that_gains_more(cli: Cli) -> None:
    curve_s, texts = tuple(0.05 + 0.001 * more for more in range(8)), {"code": 0.95, "prose": 0.1}
    drafts = (Variant("off", 1, 0.001, 0.6, 21.0, texts),)
    decision = Decision("off", trials=(Trial("", "", False, 20.0, drafts, curve_s),))
    useless = ("--backend=toy", "--toy-agreement=0", "--toy-step-ms=20", "-n", "20")
    kept = mock.patch.object(search, "kept", return_value=decision)
    with kept, mock.patch.object(advice, "LITTLE", 2.0):  # estimates vary on a busy machine
        told, quiet, fast = (
            cli.here("run", *useless, *more, PROMPT).stderr
            for more in ((), ("-o", "json"), ("--toy-agreement=1", "--toy-draft-ms=0.2"))
        )
        own = cli.here("run", *useless, "--chat", advice.QUESTION).stderr
    line = f'code gains more here: outrider run --chat "{advice.QUESTION}" (expect about '
    assert line in told.splitlines()[-1]
    assert line not in quiet + fast + own


def test_tune_shows_the_build_the_kernels_and_what_turns_cost(cli: Cli) -> None:
    curve_s = tuple(0.05 + 0.01 * more for more in range(8))
    drafts = (Variant("off", 1, 0.001, 0.6, 21.0, {"code": 0.95}),)
    tried = (
        Kernels("", 4, tuple(2 * cost for cost in curve_s), 0.0123, 10.0),
        Kernels("tiled", 4, curve_s, 0.0045, 5.0),
    )
    shared = Trial("", "", False, 20.0, drafts, curve_s, tried, (1.07, 1.32))
    split = Trial("0", "1", True, 20.0, drafts, curve_s, tried[:1])
    decision = Decision("off", without="tiled", threads=4, trials=(shared, split))
    pair = ("--backend=toy", "-m", "a.gguf", "-md", "b.gguf")
    with mock.patch.object(search, "tune", return_value=decision):
        told, as_json = (cli.here("tune", *pair, *more) for more in ((), ("--json",)))
    assert (told.returncode, told.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in told.stdout.splitlines()]
    assert lines[0] == advice.build()
    assert [advice.headline(one) in lines for one in (shared, split)] == [True, True]
    assert "target threads ms/token read 1 row 2 rows 4 rows 8 rows" in lines
    as_built = "as built 4 12.3 100 120 160 240"
    assert [line for line in lines if line.endswith(as_built)] == [as_built, f"* {as_built}"]
    assert "* without tiled 4 4.5 50 60 80 120" in lines
    assert [advice.turns(one) in lines for one in (shared, split)] == [True, True]
    assert [line[:6] for line in lines if "as given" in line][:2] == ["* as g", "as giv"]
    assert parsed(as_json)["trials"][0]["kernels"][1]["without"] == "tiled"


# ---- the other verbs ----------------------------------------------------------------------------


def test_ps_lists_what_is_up(served: Served) -> None:
    (one,) = json.loads(served.cli("ps", "--json").stdout)
    assert (one["name"], one["status"]) == ("shared", "ok")
    assert {role: worker["model"] for role, worker in one["workers"].items()} == {
        "target": "toy-target",
        "draft": "toy-draft",
    }
    assert one["requests"] == {"running": 0, "waiting": 0}
    table = served.cli("ps").stdout.splitlines()
    assert table[0].split() == [
        *["name", "status", "mode", "target", "draft", "running", "waiting"]
    ]
    words = ["shared", "ok", one["mode"], "toy-target", "toy-draft", "0", "0"]
    assert table[1].split() == words


def test_ps_lists_nothing_where_nothing_is_up(cli: Cli) -> None:
    assert json.loads(cli("ps", "--json").stdout) == []
    assert len(cli("ps").stdout.splitlines()) == 1


def test_stop_lets_requests_finish_and_leaves_nothing(cli: Cli, serve: Serve) -> None:
    served = serve("here")
    running = cli.start("run", "--connect=here", *GREEDY, "-n", "150", "-o", "json", PROMPT)
    while not json.loads(cli("ps", "--json").stdout)[0]["requests"]["running"]:
        assert running.poll() is None
    stopped = cli("stop", "here")
    assert stopped.returncode == 0, stopped.stderr
    out, err = running.communicate(timeout=10)
    assert running.returncode == 0, err
    assert len(json.loads(out)["token_ids"]) == 150
    assert served.process.wait(timeout=5) == 0
    assert json.loads(cli("ps", "--json").stdout) == []


def test_ls_lists_the_models_in_the_caches(cli: Cli) -> None:
    ours = cli.directory / "cache/outrider/models/small.gguf"
    folder = "cache/huggingface/hub/models--some--repo/snapshots/abc/big-Q4_K_M.gguf"
    hub = cli.directory / folder
    for path in (ours, hub):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(1 << 20))
    done = cli("ls", HOME=str(cli.directory))
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head.split() == ["model", "GiB", "file"]
    assert [row.split() for row in rows] == [
        [str(ours), "0.00", str(ours)],
        ["hf://some/repo", "big-Q4_K_M.gguf", "0.00", str(hub)],
    ]


@pytest.mark.parametrize("verb", HELP)
def test_help_names_the_variable_of_every_option(cli: Cli, verb: str) -> None:
    done = cli.here(*verb.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    shown = set(re.findall(r"\[(OUTRIDER_\w+)\]", done.stdout))
    wanted = {o.variable for o in OPTIONS.values() if o.key.split(".")[0] in HELP[verb]}
    assert shown == wanted | {"OUTRIDER_CONFIG"}
    for option in OPTIONS.values():
        if option.variable in wanted:
            for flag in option.flags:
                assert re.search(rf"(^|[\s,]){re.escape(flag)}\b", done.stdout), flag


def test_help_names_every_verb_but_the_launchers_own(cli: Cli) -> None:
    done = cli("--help")
    assert done.returncode == 0
    names = re.findall(r"^    (\w+)\b", done.stdout, re.MULTILINE)
    assert names == [
        "run",
        "serve",
        "bench",
        "doctor",
        "plan",
        "worker",
        "pull",
        "tune",
        "setup",
        "completion",
        "ls",
        "devices",
        "ps",
        "top",
        "stop",
        "keys",
        "show",
        "gateway",
    ]


# ---- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "-modle", "x"), ("-modle", "-model?")),
        (("run", "--n-drft=3"), ("--n-drft", "--n-draft?")),
        (("run", "-n3"), ("-n3",)),
        (("serve", "--lisen", "x"), ("--lisen", "--listen?")),
        (("worker", "draft", "--conect", "x"), ("--conect", "--connect?")),
        (("run", "-n", "many"), ("--n-predict", "whole number", "'many'")),
        (("run", "-n", "0"), ("--n-predict", "from 1")),
        (("run", "-n-draft", "65"), ("--n-draft", "64")),
        (("run", "--mode", "fast"), ("--mode", "plain, sync, pipelined, auto", "'fast'")),
        (("run", "--target-cores", "4096"), ("4096",)),
        (("run", "--draft-cores", "a-b"), ("a-b",)),
        (("run", "--without-kernels", "x"), ("'x'", "kernels tiled, repack, flash")),
        (("run", "--logit-bias", "five"), ("--logit-bias", "five")),
        (("run", "-verbose=perhaps", "x"), ("--verbose", "perhaps")),
        (("walk",), ("walk", "run")),
        ((), ("COMMAND",)),
        (("worker", "draft"), ("--connect",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_flag_is_one_sentence(
    cli: Cli, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    toy = QUICK if arguments[:1] in (("run",), ("serve",)) else ()
    told = sentence(cli.here(*arguments, *toy), 3)
    for word in words:
        assert word in told


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--top-p", "1.5"), "top_p"),
        (("--repeat-penalty", "0"), "repeat_penalty"),
        (("--typical", "2"), "typical_p"),
        (("--top-n-sigma", "-2"), "top_n_sigma"),
        (("--dynatemp-range", "-1"), "dynatemp_range"),
        (("--dynatemp-exp", "-1"), "dynatemp_exponent"),
        (("--xtc-probability", "1.1"), "xtc_probability"),
        (("--xtc-threshold", "-0.1"), "xtc_threshold"),
        (("--dry-multiplier", "-1"), "dry_multiplier"),
        (("--dry-base", "0"), "dry_base"),
        (("--dry-allowed-length", "-1"), "dry_allowed_length"),
        (("--dry-penalty-last-n", "-2"), "dry_penalty_last_n"),
        (("--dry-sequence-breaker", "x" * 41), "dry_sequence_breakers"),
        (("--repeat-last-n", "-2"), "repeat_last_n"),
        (("--samplers", "top_k;infill"), "samplers"),
        (("--samplers", "temperature;top_k"), "samplers"),
    ],
)
def test_a_sampling_setting_out_of_range_is_one_sentence(
    cli: Cli, arguments: tuple[str, ...], word: str
) -> None:
    assert word in sentence(cli.here("run", *QUICK, *arguments, PROMPT), 2)


def test_negative_numbers_are_values(served: Served) -> None:
    flags = ("-s", "-1", "--presence-penalty", "-0.5", "--frequency-penalty", "-.5", "-n", "2")
    done = served.cli("run", "--connect=shared", *flags, PROMPT)
    assert done.returncode == 0, done.stderr


def test_the_ten_names_work_with_one_dash_or_two_and_equals_or_space(served: Served) -> None:
    values = {
        "n-predict": "6",
        "n-draft": "2",
        "threads": "1",
        "ctx": "256",
        "temperature": "0",
        "seed": "3",
        "verbose": "false",
        "model": "a.gguf",
        "draft-model": "b.gguf",
        "prompt": PROMPT,
    }
    for dashes in ("-", "--"):
        for form in ("{}={}", "{} {}"):
            flags = [
                part
                for name, value in values.items()
                for part in form.format(dashes + name, value).split(" ", form.count(" "))
            ]
            done = served.cli("run", "--connect=shared", "-o", "json", *flags)
            result = parsed(done)
            assert (len(result["token_ids"]), result["seed"]) == (6, 3)


def test_all_wrong_keys_of_a_configuration_are_told_at_once(cli: Cli) -> None:
    file = cli.directory / "mine.toml"
    file.write_text('[draft]\nn_mx = 5\n[target]\nthreads = "four"\n[tagret]\nctx = 1\n')
    told = sentence(cli("run", *QUICK, "--config", "mine.toml"), 3)
    for word in ("draft.n_mx", "draft.n_max?", "target.threads", "'four'", "tagret.ctx"):
        assert word in told
    file.write_text("[draft\n")
    assert "mine.toml is not TOML" in sentence(cli("run", *QUICK, OUTRIDER_CONFIG="mine.toml"), 3)
    assert "missing.toml" in sentence(cli("run", *QUICK, "--config", "missing.toml"), 3)


def test_a_wrong_variable_is_one_sentence_with_the_nearest_name(cli: Cli) -> None:
    told = sentence(cli("ps", OUTRIDER_DRAFT__N_MX="5"), 3)
    assert "OUTRIDER_DRAFT__N_MX" in told
    assert "OUTRIDER_DRAFT__N_MAX?" in told
    told = sentence(cli("run", *QUICK, OUTRIDER_TARGET__THREADS="four"), 3)
    assert "OUTRIDER_TARGET__THREADS" in told


def test_flags_go_before_variables_and_these_before_the_file(served: Served) -> None:
    (served.cli.directory / "few.toml").write_text("[sampling]\nn_predict = 2\ntemperature = 0\n")

    def length(*flags: str, **environment: str) -> int:
        flags = ("--connect=shared", "-o", "json", "--config=few.toml", *flags)
        done = served.cli("run", *flags, PROMPT, **environment)
        return len(parsed(done)["token_ids"])

    assert length() == 2
    assert length(OUTRIDER_SAMPLING__N_PREDICT="3") == 3
    assert length("-n", "4", OUTRIDER_SAMPLING__N_PREDICT="3") == 4


def test_a_port_in_use_is_one_sentence(cli: Cli) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        told = sentence(cli("serve", *QUICK, "--listen", address), 3)
    assert address in told
    assert "in use" in told


def test_a_name_in_use_is_one_sentence(served: Served) -> None:
    told = sentence(served.cli("serve", *QUICK, "--name=shared"), 3)
    assert "shared" in told
    assert "outrider stop" in told


def test_a_directory_in_the_sockets_place_is_one_sentence(cli: Cli) -> None:
    path = cli.runtime / "outrider" / "odd.sock"
    path.mkdir(parents=True)
    path.parent.chmod(0o700)
    told = sentence(cli("serve", *QUICK, "--name=odd"), 3)
    path.rmdir()
    assert f"cannot use the socket {path}: Is a directory" in told


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no ::1")
def test_it_listens_on_an_address_of_ipv6_too(serve: Serve) -> None:
    served = serve("six", "--listen=tcp://[::1]:0")
    assert served.tcp.startswith("tcp://[::1]:")
    done = served.cli("run", f"--connect={served.tcp}", "-n", "3", "-o", "json", PROMPT)
    assert len(parsed(done)["token_ids"]) == 3
    assert served.stop() == 143


def test_a_service_of_kubernetes_of_our_name_changes_nothing(served: Served) -> None:
    names = {"OUTRIDER_SERVICE_HOST": "10.0.0.7", "OUTRIDER_PORT": "tcp://10.0.0.7:5700"}
    assert parsed(served.cli("run", "--connect=shared", "-n", "2", "-o", "json", PROMPT, **names))


def test_an_answer_that_the_terminal_cannot_show_is_shown_with_substitutes(served: Served) -> None:
    flags = ("--connect=shared", "-n", "300", "--temperature=0", "--ignore-eos")
    done = served.cli("run", *flags, PROMPT, PYTHONIOENCODING="ascii")
    whole = served.cli("run", *flags, PROMPT)
    assert (done.returncode, whole.returncode) == (0, 0), done.stderr
    assert not whole.stdout.isascii()
    assert done.stdout == whole.stdout.encode("ascii", "replace").decode()


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:0", "tcp://192.0.2.1:5701"])
def test_listening_beyond_this_machine_is_refused(cli: Cli, address: str) -> None:
    told = sentence(cli("serve", *QUICK, "--listen", address), 3)
    assert address in told
    assert "--insecure" in told


@pytest.mark.parametrize("address", ["tcp://nonsense", "udp://127.0.0.1:1", "127.0.0.1:5701"])
def test_an_address_that_is_none_is_one_sentence(cli: Cli, address: str) -> None:
    assert address in sentence(cli("serve", *QUICK, "--listen", address), 3)


def test_a_coordinator_that_is_not_running_is_one_sentence(cli: Cli) -> None:
    def told(*arguments: str) -> str:
        return sentence(cli(*arguments), 7)

    commands = (
        ("run", "--connect=nobody", PROMPT),
        ("run", "--connect=tcp://127.0.0.1:9", PROMPT),
        ("stop", "nobody"),
    )
    with ThreadPoolExecutor(len(commands)) as pool:
        for line in pool.map(lambda command: told(*command), commands):
            assert "outrider serve" in line
            assert "nobody" in line or "tcp://127.0.0.1:9" in line


def test_a_pipeline_that_did_not_get_ready_is_one_sentence(cli: Cli) -> None:
    done = cli("run", *QUICK, "--target-place=remote", "--ready-timeout=5", PROMPT)
    told = sentence(done, 6)
    assert "target" in told


@pytest.mark.parametrize("role", ["-m", "-md"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no model file"),
        (b"", "not a GGUF file"),
        (b"#!/bin/sh\necho not a model\n" * 99, "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 3), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 10**12, 10**12), ""),
        (b"GGUF" + struct.pack("<IQQ", 77, 0, 0), "version 77"),
    ],
    ids=["missing", "empty", "garbage", "truncated", "absurd", "other-version"],
)
def test_a_wrong_model_file_is_one_sentence(
    cli: Cli, role: str, content: bytes | None, words: str
) -> None:
    path = cli.directory / "wrong.gguf"
    if content is not None:
        path.write_bytes(content)
    told = sentence(cli.here("run", role, str(path), PROMPT), 4)
    assert str(path) in told
    assert words in told


def test_a_file_that_the_engine_cannot_load_is_one_sentence(cli: Cli) -> None:
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    path = cli.directory / "hollow.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(4096))
    done = cli("run", "-m", str(path), PROMPT)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("outrider: ")]
    assert str(path) in told


def test_a_draft_of_another_vocabulary_is_refused_with_the_first_difference(
    cli: Cli, serve: Serve, oracle: Oracle
) -> None:
    served = serve("misfit", "--draft-place=remote")
    worker = ("worker", "draft", "--backend=toy", "--toy-variant=1", "--connect=misfit")
    told = sentence(cli(*worker), 5)
    last = "is '<|file_sep|>' in the target, '<|variant_1|>' in the draft"
    assert f"token {SMALLEST - 1} {last}" in told
    # serving goes on without it, and a draft that fits is taken
    (one,) = json.loads(cli("ps", "--json").stdout)
    assert f"token {SMALLEST - 1}" in one["refused"]["draft"]
    cli.start("worker", "draft", "--backend=toy", "--connect=misfit")
    while "draft" not in json.loads(cli("ps", "--json").stdout)[0]["workers"]:
        pass
    done = cli("run", "--connect=misfit", *GREEDY, "-n", "30", "-o", "json", PROMPT)
    result = parsed(done)
    assert result["token_ids"] == oracle(PROMPT, 30).token_ids
    assert result["stats"]["accepted_tokens"] > 0
    assert served.stop() == 143


def test_a_draft_worker_ends_at_once_though_it_has_leave_to_draft_on(
    cli: Cli, serve: Serve
) -> None:
    slow = ("--toy-step-ms=200", "--toy-draft-ms=150")
    served = serve("slow", "--draft-place=remote", "--drain=0", *slow)
    worker = cli.start("worker", "draft", "--backend=toy", "--connect=slow", *slow)
    while "draft" not in json.loads(cli("ps", "--json").stdout)[0]["workers"]:
        pass
    cli.start("run", "--connect=slow", "--mode=pipelined", "-n", "200", PROMPT)
    time.sleep(2.0)
    began = time.monotonic()
    worker.terminate()
    worker.wait(timeout=10)
    assert time.monotonic() - began < 1.0
    assert served.stop() == 143


def test_a_reader_that_goes_away_is_no_traceback(served: Served) -> None:
    running = served.cli.start("run", "--connect=shared", "-n", "200", PROMPT)
    assert running.stdout is not None
    running.stdout.read(1)
    running.stdout.close()
    assert running.stderr is not None
    with running.stderr as stderr:
        assert "Traceback" not in stderr.read()
    assert running.wait(timeout=10) == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_reason_to_fail(cli: Cli, closed: str) -> None:
    command = shlex.join([sys.executable, "-m", "outrider_services", "run", "--backend=toy"])
    done = subprocess.run(
        ["sh", "-c", f"{command} -n 3 hello {closed}"],
        env=cli._environment({}),
        capture_output=True,
        timeout=25,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"Assertion" not in done.stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--stop", "x" * 300), "stop must be of 256 letters at most, not 300"),
        (("--temp", "nan"), "temperature"),
        (("-p", "x" * 1_100_000), "prompt is not as it should be"),
    ],
    ids=["stop", "temperature", "prompt"],
)
def test_what_no_request_can_have_is_told_before_anything_is_started(
    cli: Cli, flags: tuple[str, ...], words: str
) -> None:
    (cli.directory / "prompt").write_text(flags[1])
    given = ("-f", "prompt") if flags[0] == "-p" else (*flags, "hello")
    done = cli("run", "-m", "no-such-model.gguf", "--backend=toy", *given)
    assert done.returncode == 2
    assert words in done.stderr
    assert "target" not in done.stderr
