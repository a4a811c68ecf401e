"""`outrider devices`: what a worker can compute on, as a process of its own sees it."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from rich.table import Table

from outrider.engines.llama.devices import NO_GPU
from outrider.errors import InternalError, OutriderError, RequestTimeout, from_code
from outrider_services.options import Parser
from outrider_services.table import Settings
from outrider_services.terminal import show, tell

LIMIT_S = 60  # a driver may take its time
LOOK = (sys.executable, "-m", "outrider_services", "devices", "--look")


def flags(parser: Parser) -> None:
    parser.add_argument("--json", action="store_true", help="as a JSON array")
    parser.add_argument("--look", action="store_true", help=argparse.SUPPRESS)


def devices(settings: Settings, parsed: Any) -> int:
    if parsed.look:
        return look()
    found = ask()
    if parsed.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table("device", "description", "GiB free", "GiB", box=None)
    for one in found:
        memory = (f"{one[key] / 2**30:.2f}" for key in ("free", "total"))
        table.add_row(one["name"], one["description"], *memory)
    show(table)
    if all(one["kind"] == "cpu" for one in found):
        tell(f"{NO_GPU}.")
    return 0


def ask() -> list[dict[str, Any]]:
    """What a worker that is started here and now would see; llama.cpp is loaded there alone.

    Raises OutriderError.
    """
    try:
        done = subprocess.run(LOOK, stdin=subprocess.DEVNULL, capture_output=True, timeout=LIMIT_S)
    except subprocess.TimeoutExpired:
        raise RequestTimeout(f"looking for devices took more than {LIMIT_S} s") from None
    try:
        said = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, LookupError):
        raise InternalError(f"looking for devices ended with status {done.returncode}") from None
    match said:
        case ["error", str(code), str(reason)]:
            raise from_code(code, reason)
    found: list[dict[str, Any]] = said
    return found


def look() -> int:
    """In the child: tell what is there, as one line of JSON."""
    signal.alarm(LIMIT_S)  # in case nobody waits any more, and a driver hangs
    try:
        from outrider.engines.llama import engine

        said: list[Any] = [
            {key: value for key, value in asdict(one).items() if key != "handle"}
            for one in engine.devices()
        ]
    except OutriderError as exc:
        said = ["error", exc.code, str(exc)]
    print(json.dumps(said))
    return 0
