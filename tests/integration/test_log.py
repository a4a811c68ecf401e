"""What `--log-level=debug` shows of a request: what was said, and nobody's text."""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Oracle

PROMPT = "amber meadow "
COUNT = 20


def until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if "Ready:" in line:
            return
    raise AssertionError("it ended")


def test_the_debug_log_has_a_line_for_each_event_of_a_request(cli: Cli, oracle: Oracle) -> None:
    flags = ("--backend=toy", "--toy-step-ms=4", "--log-level=debug")
    serving = cli.start("serve", "--name=log", *flags)
    until_ready(serving)
    request = ("--connect=log", "--mode=pipelined", "--temperature=0", "-n", str(COUNT))
    done = cli("run", *request, PROMPT)
    serving.terminate()
    _, log = serving.communicate(timeout=10)
    assert done.stdout == oracle(PROMPT, COUNT).text + "\n"
    *ours, last = [line for line in log.splitlines() if "request 1: " in line]
    assert last == f"[coordinator] INFO request 1: length, {COUNT} tokens"
    assert all(line.startswith("[coordinator] DEBUG request 1: ") for line in ours)
    events = [line.partition("request 1: ")[2].partition("(")[0] for line in ours]
    assert events[0] == "Start"
    assert events.count("Verdict") == sum("Fragment(" in line for line in ours) > 0
    assert "Proposal" in events
    assert "Finish(reason=length); OVER" in ours[-1]
    words = [word for word in (PROMPT + done.stdout).split() if len(word) > 3]
    assert not [word for word in words if word in "".join(ours)]
    assert not [line for line in ours if f"{list(PROMPT.encode())}" in line]


def test_for_programs_every_line_is_a_record_and_names_its_request(cli: Cli) -> None:
    flags = ("--backend=toy", "--toy-step-ms=4", "--log-level=debug")
    serving = cli.start("serve", "--name=log", *flags, OUTRIDER_LOG__FORMAT="auto")
    until_ready(serving)
    request = ("--connect=log", "--mode=pipelined", "--temperature=0", "-n", str(COUNT))
    done = cli("run", *request, PROMPT)
    assert done.returncode == 0, done.stderr
    assert cli("serve", "--name=log", *flags, OUTRIDER_LOG__FORMAT="json").returncode == 3
    serving.terminate()
    _, log = serving.communicate(timeout=10)
    records = [json.loads(line) for line in log.splitlines()]
    assert {"time", "level", "role", "message"} <= set.intersection(*map(set, records))
    ours = [one for one in records if one.get("request_id") == 1]
    assert {one["role"] for one in ours} == {"coordinator"}
    assert ours[-1]["round"] > 1
    assert {one["lineage"] for one in ours} >= {1, 2}
    told = [one["message"] for one in ours if one["level"] == "info"]
    assert told == [f"request 1: length, {COUNT} tokens"]
    assert not [word for word in PROMPT.split() if word in log]


def test_a_mistake_is_a_record_too_where_programs_read(cli: Cli) -> None:
    done = cli("serve", "--backend=toy", "--listen=udp://x", "--log-format=json")
    assert done.returncode == 3
    (record,) = map(json.loads, done.stderr.splitlines())
    assert record["role"] == "launcher"
    assert "udp://x" in record["message"]
