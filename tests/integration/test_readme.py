"""The README's examples, as they stand there, with the toy engine in the place of the models."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from itertools import groupby
from pathlib import Path
from typing import IO, TYPE_CHECKING

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
NOT_RUN = {"./scripts/test", "curl"}


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    return [text for tag, text in found if tag == language]


def commands(block: str) -> list[list[str]]:
    """The words of each command."""
    found = []
    for line in block.splitlines():
        words = shlex.split(line, comments=True)
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
    """With cores that may be used."""
    cores = sorted(os.sched_getaffinity(0))
    block = block.replace("--target-cores 0", f"--target-cores {cores[0]}")
    block = block.replace("--draft-cores 1", f"--draft-cores {cores[-1]}")
    return block


def shape(line: str) -> str:
    return re.sub(r"\d+(\.\d+)?", "#", line)


def workers(cli: Cli) -> set[str]:
    return {role for up in json.loads(cli("ps", "--json").stdout) for role in up["workers"]}


ON_ONE_MACHINE = [block for block in blocks("sh") if not re.search(r"^\w+\$ ", block, re.MULTILINE)]


@pytest.mark.parametrize("block", ON_ONE_MACHINE, ids=lambda block: block.split("  ")[0])
def test_the_commands_run(cli: Cli, block: str) -> None:
    given = [words for words in commands(on_this_machine(block)) if words[0] not in NOT_RUN]
    lasting = []
    for words in map(arguments, given):
        if words[0] in LASTING:
            lasting.append((words[0], cli.start(*words, **TOY)))
            while "target" not in workers(cli):
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


# ---- the two machines ---------------------------------------------------------------------------


class Machine:
    """One that the README calls `NAME$`: a home of its own, and `ssh` to the others."""

    def __init__(self, name: str, cli: Cli, network: Path) -> None:
        self.name, self._cli = name, cli
        home = network / name
        runtime = cli.runtime if name == "big" else home / "run"
        self.keys = home / ".config" / "outrider" / "curve"
        self._environment = {
            "HOME": str(home),
            "XDG_RUNTIME_DIR": str(runtime),
            "PATH": f"{network / 'bin'}:{os.environ['PATH']}",
            "OUTRIDER_SERVER__NO_GATEWAY": "true",
            "OUTRIDER_LOG__FORMAT": "text",
            **TOY,
        }
        home.mkdir(mode=0o700)
        exports = "".join(f"export {k}={shlex.quote(v)}\n" for k, v in self._environment.items())
        (network / f"{name}.sh").write_text(exports)

    def start(self, line: str) -> subprocess.Popen[str]:
        """What a shell does with `line` there."""
        process = subprocess.Popen(
            ["bash", "-o", "pipefail", "-c", line],
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._cli.started.append(process)
        return process

    def run(self, line: str) -> tuple[str, str]:
        """The same to its end: what it printed on stdout and on stderr."""
        process = self.start(line)
        out, err = process.communicate(timeout=25)
        assert process.returncode == 0, (line, err)
        return out, err


def two_machines(cli: Cli, network: Path) -> dict[str, Machine]:
    (network / "bin").mkdir()
    programs = {
        "outrider": f'exec {sys.executable} -m outrider_services "$@"',
        "ssh": f'. {network}/$1.sh; shift; exec "$@"',
    }
    for name, line in programs.items():
        path = network / "bin" / name
        path.write_text(f"#!/bin/bash\n{line}\n")
        path.chmod(0o755)
    return {name: Machine(name, cli, network) for name in ("big", "small")}


def told(stream: IO[str] | None, beginning: str) -> None:
    """Wait until such a line comes."""
    assert stream
    seen = []
    for line in stream:
        seen.append(line)
        if line.startswith(beginning):
            return
    raise AssertionError(seen)


@pytest.mark.timeout(90)  # it starts nine processes, most of them one after the other
def test_two_machines_meet_by_the_commands_shown(cli: Cli, tmp_path: Path) -> None:
    """On this one's loopback, spelt as a network would be: so the link needs its keys."""
    (block,) = set(blocks("sh")) - set(ON_ONE_MACHINE)
    assert "ssh" in block
    for shown, here in (("0.0.0.0", "lo"), ("tcp://big", "tcp://127.1"), ("5701", free_port())):
        assert shown in block
        block = block.replace(shown, str(here))
    machines, lasting, answer = two_machines(cli, tmp_path), [], ("", "")
    for line in block.splitlines():
        name, command = line.split("$ ", 1)
        verb = shlex.split(command)[1]
        if verb not in LASTING:
            answer = machines[name].run(command)
            continue
        lasting.append(machines[name].start(f"exec {command}"))
        if verb == "serve":
            told(lasting[-1].stderr, "Ready: ")
        else:
            told(lasting[-1].stdout, '["ready"')
    assert answer[0].strip()
    assert "Mode: pipelined" in answer[1]
    assert not re.search(r"Draft tokens created: 0\b", answer[1])
    for machine, files in (
        ("big", ["coordinator.key"]),
        ("small", ["client.key", "draft.key"]),
    ):  # no secret has left its machine
        assert sorted(path.name for path in machines[machine].keys.glob("*.key")) == files
    for process in reversed(lasting):
        process.terminate()
        process.communicate(timeout=10)
    assert [process.returncode for process in lasting] == [143, 0]


@pytest.mark.parametrize("mode", ["auto", "plain"])
def test_the_python_example_prints_an_answer(
    serve: Serve, capsys: pytest.CaptureFixture[str], mode: str
) -> None:
    served = serve("default", "--toy-step-ms=4", "--toy-draft-ms=0.4", f"--mode={mode}")
    _, example = blocks("python")
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    *text, counts = capsys.readouterr().out.splitlines()
    assert "".join(text).strip()
    assert re.fullmatch(r"\d+ of \d+ tokens accepted", counts)
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
