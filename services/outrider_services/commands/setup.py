"""`outrider setup`: build llama.cpp for this machine, into the environment that outrider is in."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

from outrider.errors import ConfigError
from outrider_services.building.gpus import KINDS
from outrider_services.building.library import TOLD, Environment, Library, alone
from outrider_services.options import Parser
from outrider_services.table import Settings


def flags(parser: Parser) -> None:
    parser.add_argument("--gpu", choices=["cpu", *KINDS], help="build for this kind of GPU, too")
    parser.add_argument("--again", action="store_true", help="choose the compiler and build anew")


def setup(settings: Settings, args: Any) -> int:
    """Raises ConfigError where it cannot be built or installed."""
    library = Library(Environment(Path(sys.executable)), requirement(), say)
    if library.is_current(args.gpu) and not args.again:
        print("llama.cpp is built for this processor already; --again builds it anew")
        return 0
    try:
        with alone(say):
            library.environment.log.write_text("")
            library.set_up(args.gpu, args.again)
    except TOLD as exc:
        raise ConfigError(str(exc)) from exc
    print("llama.cpp is built for this processor; `outrider run` generates with it")
    return 0


def requirement() -> str:
    """The llama-cpp-python that this outrider needs: as its metadata say."""
    extra = 'extra == "llama"'
    for line in importlib.metadata.requires("outrider") or ():
        named, _, condition = line.partition(";")
        if condition.strip().replace("'", '"') == extra:
            return named.strip()
    raise ConfigError("this outrider does not tell which llama-cpp-python it needs")


def say(text: str) -> None:
    print(f"outrider: {text}", file=sys.stderr, flush=True)
