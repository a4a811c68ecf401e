"""`outrider completion SHELL`: what lets a shell complete outrider's commands and flags."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Any

from outrider_services.options import Parser
from outrider_services.table import Settings

FILES = {"bash": "outrider.bash", "zsh": "_outrider", "fish": "outrider.fish"}


def flags(parser: Parser) -> None:
    parser.add_argument("shell", choices=sorted(FILES), help="print the completions of this shell")


def completion(settings: Settings, args: Any) -> int:
    sys.stdout.write((files("outrider_services") / "shell" / FILES[args.shell]).read_text())
    return 0
