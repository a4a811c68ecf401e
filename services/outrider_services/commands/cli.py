"""The `outrider` command: find the verb, read the settings, call it, turn errors into a status."""

from __future__ import annotations

import argparse
import asyncio
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import outrider
from outrider.errors import OutriderError
from outrider_services import logs, outlet, sources
from outrider_services.commands import (
    bench,
    children,
    completion,
    descriptors,
    devices,
    doctor,
    keys,
    models,
    pipelines,
    plan,
    run,
    serve,
    setup,
    show,
    top,
    tune,
)
from outrider_services.options import Parser, add_options, given_flags
from outrider_services.table import Settings

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM
PAIR = ("target", "draft", "pipeline", "toy", "log")  # sections of the table of settings
WORKER = ("target", "pipeline", "toy", "links", "log")


@dataclass(frozen=True, slots=True)
class Verb:
    """One command: `call` does it and returns the exit status."""

    name: str
    help: str
    call: Callable[[Settings, Any], int]
    sections: tuple[str, ...] = ()  # of the table of settings, whose flags it takes
    flags: Callable[[Parser], None] | None = None  # adds those that are its own
    without: tuple[str, ...] = ()  # settings of the sections that it decides itself
    hidden: bool = False  # for other processes of ours alone
    role: str = ""  # of the process in its log; "": the verb itself
    serves: bool = False  # for hours, and perhaps nobody but a program reads its log
    connects: bool = True  # opens sockets, or has others open them


VERBS = (
    Verb(
        "run",
        "generate text, or converse",
        run.run,
        (*PAIR, "sampling", "links", "terminal"),
        run.flags,
    ),
    Verb(
        "serve",
        "start a pipeline and keep it up",
        serve.serve,
        (*PAIR, "coordinator", "hosts", "links", "server"),
        serve.flags,
        role="launcher",
        serves=True,
    ),
    Verb("bench", "measure the speed-up", bench.bench, PAIR, bench.flags, bench.DECIDED),
    Verb(
        "doctor",
        "measure the pair, predict what each mode gains, and say what to change",
        doctor.doctor,
        PAIR,
        doctor.flags,
        doctor.DECIDED,
    ),
    Verb(
        "plan",
        "tell how many pairs so many users need, by simulated devices",
        plan.plan,
        (),
        plan.flags,
    ),
    Verb("worker", "run one worker here, for a coordinator elsewhere", children.worker),
    Verb(
        "pull",
        "fetch a model, or the default pair",
        models.pull,
        ("pipeline",),
        models.pull_flags,
        connects=False,
    ),
    Verb(
        "tune",
        "find the fastest draft and placement for this processor, and keep to it",
        tune.tune,
        ("target", "draft", "pipeline", "log"),
        tune.flags,
    ),
    Verb(
        "setup",
        "build llama.cpp for this processor, and for a kind of GPU if named",
        setup.setup,
        (),
        setup.flags,
        connects=False,
    ),
    Verb(
        "completion",
        "print what lets a shell complete commands and flags",
        completion.completion,
        (),
        completion.flags,
        connects=False,
    ),
    Verb("ls", "list the models in the caches", models.ls, connects=False),
    Verb(
        "devices",
        "list what a worker can compute on here: the processor and GPUs",
        devices.devices,
        (),
        devices.flags,
        connects=False,
    ),
    Verb("ps", "list the pipelines that are up", pipelines.ps, (), pipelines.ps_flags),
    Verb("top", "watch a pipeline at work", top.top, ("links",), top.flags),
    Verb(
        "stop",
        "end a pipeline, once its requests are finished",
        pipelines.stop,
        ("links",),
        pipelines.stop_flags,
    ),
    Verb("keys", "make, show and trust the keys of links to other machines", keys.show),
    Verb(
        "show",
        "show every setting, and where it came from",
        show.show,
        show.SECTIONS,
        show.flags,
        connects=False,
    ),
    Verb(
        "coordinator",
        "",
        children.coordinator,
        ("draft", "pipeline", "coordinator", "links", "server", "log"),
        children.coordinator_flags,
        hidden=True,
    ),
    Verb(
        "gateway",
        "serve HTTP for a pipeline that is up",
        children.gateway,
        ("links", "server", "log"),
        children.gateway_flags,
        without=("server.no_gateway",),
    ),
    Verb("measure", "", children.measure, ("log",), children.measure_flags, hidden=True),
)


KEYS = tuple(
    Verb(name, help, call, ("links",), flags, ("links.insecure",), connects=False)
    for name, help, call, flags in (
        ("new", "make secret keys", keys.new, keys.new_flags),
        ("show", "print public keys", keys.show, keys.show_flags),
        ("trust", "trust public keys", keys.trust, keys.trust_flags),
    )
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an answer may have what its encoding has not
            stream.reconfigure(errors="replace")
    try:
        status = dispatch(arguments)
        sys.stdout.flush()
    except OutriderError as exc:
        if "--debug" in arguments:
            raise
        print(f"outrider: {exc}", file=sys.stderr)
        status = exc.exit_code
    except KeyboardInterrupt:
        status = unread(INTERRUPTED)
    except asyncio.CancelledError:
        status = unread(TERMINATED)
    except BrokenPipeError:
        status = unread(1)
    sys.exit(status)


def unread(status: int) -> int:
    """The same status; what nobody has read on stdout does not keep Python from ending."""
    if sys.__stdout__ and sys.stdout is sys.__stdout__:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno())
    return status


def dispatch(arguments: Sequence[str]) -> int:
    """Parse, read the settings from all their sources, and call the verb. Raises OutriderError."""
    parser, parsers = build_parser()
    chosen = parsers.get(arguments[0]) if arguments else None
    chosen = parsers.get(" ".join(arguments[:2]), chosen)  # such as `worker draft`
    (chosen or parser).check_flags(arguments)
    parsed = parser.parse_args((chosen or parser).with_values(arguments))
    settings = sources.settings(given_flags(parsed), parsed.config)
    settings = start_log(settings, parsed)
    if parsed.connects:
        descriptors.raise_limit()
    status: int = parsed.call(settings, parsed)
    return status


def start_log(settings: Settings, parsed: Any) -> Settings:
    """Send log records to stderr; the settings with the format that `auto` stands for."""
    log = settings.log
    if log.format == "auto":
        is_read = sys.stderr.isatty() or not parsed.serves
        log = replace(log, format="text" if is_read else "json")
    formatter = logging.Formatter("%(levelname)s %(message)s")
    if log.format == "json":
        logs.record_stderr(parsed.role)
        formatter = logs.JsonFormatter(parsed.role)
    shown = logging.StreamHandler(sys.stderr)
    shown.addFilter(outlet.Few())
    shown.setFormatter(formatter)
    logging.basicConfig(level=log.level.upper(), handlers=[shown])
    return replace(settings, log=log)


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of everything, and that of each verb."""
    parser = Parser(prog="outrider", description=outrider.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"outrider {outrider.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    parsers: dict[str, Parser] = {}
    for verb in VERBS:
        parsers[verb.name] = _add(commands, verb)
    roles = parsers["worker"].add_subparsers(metavar="ROLE", required=True)
    for role in ("draft", "target"):
        help = f"the {role} worker; its flags mean its own model"
        verb = Verb(role, help, children.worker, WORKER, children.worker_flags, serves=True)
        parsers[f"worker {role}"] = _add(roles, verb)
    actions = parsers["keys"].add_subparsers(metavar="ACTION", required=True)
    for verb in KEYS:
        parsers[f"keys {verb.name}"] = _add(actions, verb)
    hidden = {verb.name for verb in VERBS if verb.hidden}
    commands._choices_actions = [a for a in commands._choices_actions if a.dest not in hidden]
    return parser, parsers


def _add(commands: Any, verb: Verb) -> Parser:
    """A parser for `verb`, with its flags."""
    text = argparse.SUPPRESS if verb.hidden else verb.help
    parser: Parser = commands.add_parser(verb.name, help=text, description=text)
    add_options(parser, verb.sections, verb.without)
    spelt = ("-f", "--config") if verb.name == "serve" else ("--config",)
    parser.add_argument(*spelt, metavar="FILE", help="configuration file (TOML) [OUTRIDER_CONFIG]")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(call=verb.call, connects=verb.connects, serves=verb.serves)
    parser.set_defaults(role=verb.role or verb.name)
    if verb.flags:
        verb.flags(parser)
    return parser
