"""`outrider bench` over the toy engine, with stand-ins for llama.cpp's programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from outrider_services.bench.replay import Replay, World

if TYPE_CHECKING:
    from tests.integration.conftest import Cli

QUICK = ("--backend=toy", "--toy-step-ms=4", "--toy-draft-ms=0.4", "--toy-row-ms=0.05")
SHORT = ("-r", "1", "--warmup", "0", "-n", "24", "--category", "code")

SPECULATIVE = """#!{python}
import sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
prompt = open(flags["-f"]).read()
assert flags["--temp"] == "0" and flags["-n"] == "24" and "merges two sorted lists" in prompt
n_max = int(flags["--spec-draft-n-max"])
speed = 100.0 - abs(n_max - 4)
print("decoded   25 tokens in    0.250 seconds, speed:", f"{{speed:8.3f}} t/s", file=sys.stderr)
print("n_drafted = 40\\nn_predict = 25\\nn_accept  = 20", file=sys.stderr)
"""

SERVER = """#!{python}
import json, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
n_max = int(flags["--spec-draft-n-max"])

class Handler(BaseHTTPRequestHandler):
    loading = True

    def answer(self, status, value):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        status, Handler.loading = 503 if Handler.loading else 200, False
        self.answer(status, {{}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and asked["cache_prompt"] is False
        count = asked["n_predict"]
        timings = {{"predicted_n": count, "predicted_per_second": 50.0 + n_max, "draft_n": 10,
                   "draft_n_accepted": 7}}
        self.answer(200, {{"content": "x", "timings": timings}})

    def log_message(self, *_):
        pass

HTTPServer(("127.0.0.1", int(flags["--port"])), Handler).serve_forever()
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A directory with stand-ins: llama-server does best with many drafts, the other with four."""
    directory = tmp_path / "peers"
    directory.mkdir()
    for name, text in (("llama-server", SERVER), ("llama-speculative-simple", SPECULATIVE)):
        write(directory / name, text)
    return directory


def write(path: Path, text: str) -> None:
    path.write_text(text.format(python=sys.executable))
    path.chmod(0o755)


def found(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    parsed: dict[str, Any] = json.loads(done.stdout)
    return parsed


def test_every_arm_is_measured_and_says_the_same(cli: Cli) -> None:
    arms = "plain,sync,pipelined,sync:3"
    report = found(cli("bench", *QUICK, *SHORT, "--arms", arms, "-o", "json"))
    assert [one["arm"] for one in report["results"]] == arms.split(",")
    assert report["geometric_means"].keys() == set(arms.split(","))
    assert report["geometric_means"]["plain"] == 1
    assert report["identical"] is True
    samples = {sample["arm"]: sample for sample in report["samples"]}
    assert {sample["tokens"] for sample in samples.values()} == {24}
    assert len({tuple(sample["token_ids"]) for sample in samples.values()}) == 1
    assert samples["plain"]["acceptance_rate"] is None
    assert 1 < samples["sync:3"]["mean_accepted_length"] <= 4
    assert {"machine", "date", "versions", "target", "draft", "command"} <= report["header"].keys()


def test_a_suite_is_asked_again_with_new_processes(cli: Cli, tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    suite.write_text('{"task_id": "Eval/0", "prompt": "def merge(left, right):"}\n')
    flags = ("-r=1", "--warmup=0", "-n=24", f"--suite={suite}", "--restarts=2", "--arms=sync")
    done = cli("bench", *QUICK, *flags, "-o", "json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert [(one["restart"], one["arm"]) for one in report["samples"]] == [
        *((0, "plain"), (0, "sync"), (1, "sync"), (1, "plain"))
    ]
    assert {len(of) for of in report["geometric_means_by_restart"].values()} == {2}


def test_peers_are_swept_first_and_measured_with_their_best_length(
    cli: Cli, programs: Path
) -> None:
    peers = ("--peers", str(programs), "--peer-n-max", "2,4-5", "-m", "t.gguf", "-md", "d.gguf")
    arms = "plain,auto,llama-server,llama-speculative-simple"
    done = cli("bench", *QUICK, *SHORT, *peers, "--arms", arms, "-o", "json")
    report = found(done)
    sweeps = report["sweeps"]["code"]
    assert sweeps["llama-server"] == {"2": [52.0], "4": [54.0], "5": [55.0]}
    assert sweeps["llama-speculative-simple"] == {"2": [98.0], "4": [100.0], "5": [99.0]}
    by_arm = {one["arm"]: one for one in report["results"]}
    assert (by_arm["llama-server"]["n_max"], by_arm["llama-server"]["acceptance_rate"]) == (5, 0.7)
    assert by_arm["llama-speculative-simple"]["n_max"] == 4
    auto = report["against_best_peer"]["auto"]
    assert auto["categories"]["code"] == pytest.approx(by_arm["auto"]["tokens_per_s"] / 100)
    assert done.stderr.count("[sweep]") == 6


def test_the_best_lengths_of_a_peer_are_tried_on_every_prompt(cli: Cli, programs: Path) -> None:
    peers = ("--peers", str(programs), "--peer-n-max", "2-7", "-m", "t.gguf", "-md", "d.gguf")
    arms = ("--arms", "plain,llama-server", "--per-category", "2")
    report = found(cli("bench", *QUICK, *SHORT, *peers, *arms, "-o", "json"))
    tried = report["sweeps"]["code"]["llama-server"]
    assert {n_max: len(speeds) for n_max, speeds in tried.items()} == {
        "2": 1, "3": 1, "4": 2, "5": 2, "6": 2, "7": 2
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("#!/bin/sh\necho cannot load >&2\nexit 3\n", "ended with status 3: cannot load"),
        ("#!/bin/sh\nexit 0\n", "ended with status 0"),
    ],
)
def test_a_peer_that_fails_is_one_sentence(cli: Cli, programs: Path, text: str, what: str) -> None:
    write(programs / "llama-server", text)
    flags = ("--peers", str(programs), "-m", "t.gguf", "-md", "d.gguf", "--arms", "llama-server")
    done = cli("bench", *QUICK, *SHORT, *flags)
    assert done.returncode == 6
    assert "Traceback" not in done.stderr
    assert f"outrider: llama-server {what}" in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind(cli: Cli, programs: Path, number: signal.Signals) -> None:
    hang = programs / "llama-speculative-simple"
    write(hang, "#!{python}\nimport time\ntime.sleep(60)\n")
    flags = ("--peers", str(programs), "-m", "t.gguf", "-md", "d.gguf")
    arms = ("--arms", "llama-speculative-simple")
    process = cli.start("bench", *QUICK, *SHORT, *flags, *arms)
    peer = started(hang)
    process.send_signal(number)
    process.communicate(timeout=15)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    with suppress(psutil.NoSuchProcess):
        peer.wait(3)
    assert not peer.is_running()


def started(program: Path) -> psutil.Process:
    """The process of this program, once it is there."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if str(program) in process.cmdline()[:2]:
                    return process
        time.sleep(0.02)
    raise AssertionError(f"{program.name} was not started")


def test_a_required_speed_up_that_is_missed_is_status_nine(cli: Cli) -> None:
    done = cli("bench", *QUICK, *SHORT, "--arms=auto", "--require-speedup=50")
    assert done.returncode == 9
    assert done.stdout.startswith("# outrider bench")
    assert "of the required" not in done.stdout
    assert "the required 50" in done.stderr.splitlines()[-1]


def test_pictures_are_made(cli: Cli) -> None:
    done = cli("bench", *QUICK, *SHORT, "--arms=auto", "--plot=bars.svg", "--lanes=lanes.png")
    assert done.returncode == 0, done.stderr
    assert (cli.directory / "bars.svg").read_text().startswith("<?xml")
    assert (cli.directory / "lanes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "status", "what"),
    [
        (("--arms", "syncc"), 3, "no arm 'syncc'; did you mean sync"),
        (("--arms", "llama-server", "--peers", "/nonexistent"), 3, "scripts/build-peers"),
        (("--n-draft", "0"), 3, "takes a draft"),
        (("--record", "x.json", "-md", "suffix"), 3, "is about a draft model"),
        (("--mode", "sync"), 3, "unknown flag --mode"),
        (("--plot", "x.pdf"), 3, ".svg or .png"),
        (("--category", "poetry"), 3, "no category 'poetry'"),
    ],
)
def test_a_mistake_is_told_before_anything_starts(
    cli: Cli, flags: tuple[str, ...], status: int, what: str
) -> None:
    done = cli.here("bench", "--backend=toy", *flags)
    assert done.returncode == status, done.stderr
    assert what in done.stderr
    assert done.stderr.count("\n") == 1
    assert os.listdir(cli.runtime) == []


def test_help_names_the_arms(cli: Cli) -> None:
    done = cli.here("bench", "--help")
    assert done.returncode == 0
    for word in ("sync:4", "llama-server", "--placement", "--require-speedup", "--peer-n-max"):
        assert word in done.stdout


def test_simulated_devices_are_compared_with_their_ideal(cli: Cli) -> None:
    flags = ("--simulate", "--acceptance=0.8", "--cost=0.1", "-n", "80", "-r", "1", "-o", "json")
    (cell,) = json.loads(cli("bench", *flags, "--toy-step-ms=20").stdout)
    assert (cell["acceptance"], cell["cost"]) == (0.8, 0.1)
    assert 1.0 < cell["pipelined"] <= 1.05 * cell["ideal"]
    assert cell["tokens_limit"] == pytest.approx(5)
    assert cell["draft_limit"] == pytest.approx(11)


def test_a_simulated_link_delays_messages_and_the_target_goes_on_meanwhile(cli: Cli) -> None:
    flags = ("--backend=toy", "--toy-step-ms=5", "--mode=plain", "-n", "40", "-o", "json")
    fast, slow = (
        json.loads(cli("run", *flags, f"--toy-link-ms={link}", "x").stdout)["stats"]
        for link in (0, 10)
    )
    there_and_back = 2 * 0.010
    assert slow["prefill_s"] >= there_and_back + 0.005
    assert slow["decode_s"] - fast["decode_s"] <= 0.75 * 39 * there_and_back


def test_recorded_traces_can_be_replayed(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "traces.json"
    found = cli("bench", *QUICK, "-n", "60", "--category", "code,chat", "--record", str(path))
    assert found.returncode == 0, found.stderr
    traces = json.loads(path.read_text())
    assert list(traces) == ["code", "chat"]
    for trace in traces.values():
        assert len(trace["match"]) == len(trace["confidence"]) == 60
        wrong = {str(at) for at, match in enumerate(trace["match"]) if not match}
        assert set(trace["off_path_confidence"]) == set(trace["rank_at_miss"]) == wrong
        assert all(rank > 1 for rank in trace["rank_at_miss"].values())
        assert 0 < trace["prompt_tokens"] <= len(trace["prompt"].encode())
        world = World((0.1,) * 65, 0.01)
        assert Replay(trace, world.rule("pipelined"), world).speedup() > 1.5
    beyond = str(tmp_path / "missing" / "traces.json")
    refused = cli("bench", *QUICK, *SHORT, "--record", beyond)
    assert refused.returncode == 3
    assert refused.stderr.count("\n") == 1, refused.stderr
    assert beyond in refused.stderr
