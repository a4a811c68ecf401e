"""The house stays one that can be read: no file and no function is long, and fits can be redone."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from outrider.core.estimates import CAME_TRUE

ROOT = Path(__file__).parents[2]
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 400, 45


def sources() -> Iterator[Path]:
    for room in ("shared", "services", "scripts"):
        for path in (ROOT / room).rglob("*"):
            if (path.is_file() and b"python" in path.read_bytes()[:30]) or path.suffix == ".py":
                yield path


def test_no_file_and_no_function_is_too_long_to_be_read() -> None:
    long: list[str] = []
    for path in sources():
        text, name = path.read_text(), str(path.relative_to(ROOT))
        if (lines := text.count("\n")) > MOST_LINES_OF_A_FILE:
            long.append(f"{name}: {lines}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long.append(f"{name}, {node.name}: {lines}")
    assert long == []


def test_the_fitted_acceptances_can_be_fitted_again(tmp_path: Path) -> None:
    """What is in use lies near what the recorded answers say of it now."""
    traces = ROOT / "tests/sim/acceptance-traces.json"
    refit = [sys.executable, str(ROOT / "scripts/refit"), str(traces)]
    told = subprocess.run(refit, capture_output=True, text=True, check=True).stdout
    first, found, used = told.splitlines()
    tokens = sum(len(trace["match"]) for trace in json.loads(traces.read_text()).values())
    assert first.startswith(f"{tokens} recorded tokens")

    def table(line: str) -> list[float]:
        return [float(share) for share in line[line.index("(") + 1 : line.index(")")].split(", ")]

    assert table(used) == list(CAME_TRUE)
    for ours, theirs in zip(table(used), table(found), strict=True):
        assert abs(ours - theirs) < 0.1


def test_a_command_loads_no_library_that_only_the_gateway_or_a_conversation_needs() -> None:
    """Every process of a pipeline begins as a command; what one loads in vain, each waits for."""
    needless = ("fastapi", "uvicorn", "jinja2", "llguidance", "prometheus_client", "prompt_toolkit")
    program = (
        "import sys, outrider_services.commands.cli\n"
        f"print([name for name in {needless} if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert told.stdout == "[]\n"
