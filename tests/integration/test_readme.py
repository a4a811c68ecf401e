"""The README's examples, as they stand there, with the toy engine in the place of the models."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.integration.conftest import Cli, Serve

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TOY = {
    "OUTRIDER_PIPELINE__BACKEND": "toy",
    "OUTRIDER_TOY__STEP_MS": "4",
    "OUTRIDER_TOY__DRAFT_MS": "0.4",
    "OUTRIDER_TOY__ROW_MS": "0.05",
}
LASTING = {"serve", "worker"}  # commands that go on until they are ended
NOT_RUN = {"./scripts/test", "curl", "ssh"}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for tag, text in found if tag == language]


def commands(block: str) -> list[list[str]]:
    """The words of each command; `big$` and the like are a prompt."""
    found = []
    for line in block.splitlines():
        words = shlex.split(re.sub(r"^\w+\$ ", "", line), comments=True)
        parts = groupby(words, lambda word: word in {"&", ";"})
        found += [list(part) for is_separator, part in parts if not is_separator]
    return found


def arguments(words: list[str]) -> list[str]:
    """What `outrider` gets from such a command."""
    program, *rest = words
    if program == "./scripts/run":
        return ["run", "--pull", *rest]
    assert program in ("outrider", ".venv/bin/outrider"), words
    return rest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def on_this_machine(block: str) -> str:
    """With a port that is free and cores that may be used."""
    cores = sorted(os.sched_getaffinity(0))
    block = block.replace("--target-cores 0", f"--target-cores {cores[0]}")
    block = block.replace("--draft-cores 1", f"--draft-cores {cores[-1]}")
    return block.replace("5701", str(free_port()))


def shape(line: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", line)


def workers(cli: Cli) -> set[str]:
    return {role for up in json.loads(cli("ps", "--json").stdout) for role in up["workers"]}


@pytest.mark.parametrize("block", blocks("sh"), ids=lambda block: block.split("  ")[0])
def test_the_commands_run(cli: Cli, block: str) -> None:
    given = [words for words in commands(on_this_machine(block)) if words[0] not in NOT_RUN]
    lasting = []
    for words in map(arguments, given):
        if words[0] in LASTING:
            lasting.append((words[0], cli.start(*words, **TOY)))
            role = "draft" if words[0] == "worker" else "target"
            while role not in workers(cli):
                assert lasting[-1][1].poll() is None, words
        else:
            done = cli(*words, **TOY)
            assert done.returncode == 0, (words, done.stderr)
            assert done.stdout or words == ["stop"], words
    for verb, process in reversed(lasting):
        stopped = ["outrider", "stop"] in given
        if not stopped:
            process.terminate()
        process.communicate(timeout=10)
        assert process.returncode == (143 if verb == "serve" and not stopped else 0)


def test_the_python_example_prints_an_answer(
    serve: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    served = serve("default", "--toy-step-ms=4", "--toy-draft-ms=0.4")
    _, example = blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    *text, rate = capsys.readouterr().out.splitlines()
    assert "".join(text).strip()
    assert re.fullmatch(r"\d+% of the verified tokens were accepted", rate)
    assert served.stop() == 143


def test_the_algorithm_in_one_thread_runs(capsys: pytest.CaptureFixture[str]) -> None:
    algorithm, _ = blocks("python")
    exec(compile(algorithm, "README.md", "exec"), {"__name__": "__main__"})
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 9
    assert max(map(len, shown)) > len("b'x'"), "no block had more than one token"


def test_the_output_shown_is_what_is_seen(cli: Cli) -> None:
    (command,) = re.findall(r"`(\./scripts/run --backend toy [^`]*)`", README)
    (shown,) = [block for block in blocks("") if block.startswith("Mode: ")]
    done = cli(*arguments(shlex.split(command)))
    seen = iter([shape(line) for line in done.stderr.splitlines()])
    assert [line for line in map(shape, shown.splitlines()) if line not in seen] == []
