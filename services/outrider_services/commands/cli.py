"""The `outrider` command: parse, call, print."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table

import outrider
from outrider.client import connect
from outrider.errors import ConfigError, ConnectionFailed, OutriderError
from outrider.wire.transport import address_of, runtime_dir
from outrider_services import options
from outrider_services.bench import runner
from outrider_services.commands import serve
from outrider_services.commands.run import run
from outrider_services.models import catalogue
from outrider_services.options import Parser, add_options
from outrider_services.pipeline import processes
from outrider_services.terminal import progress_reporter
from outrider_services.tuning import probe, search

INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        status = dispatch(arguments)
        sys.stdout.flush()
    except OutriderError as exc:
        if "--debug" in arguments:
            raise
        print(f"outrider: {exc}", file=sys.stderr)
        status = exc.exit_code
    except KeyboardInterrupt:
        status = INTERRUPTED
    except asyncio.CancelledError:
        status = TERMINATED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1
    sys.exit(status)


def dispatch(arguments: Sequence[str]) -> int:
    parser, verbs = build_parser()
    verb = verbs.get(arguments[0]) if arguments else None
    if verb and arguments[0] == "worker" and len(arguments) > 1:
        verb = verbs.get(f"worker {arguments[1]}", verb)
    (verb or parser).check_flags(arguments)
    parsed = parser.parse_args((verb or parser).with_values(arguments))
    settings = options.settings(
        {
            k: tuple(v) if isinstance(v, list) else v
            for k, v in vars(parsed).items()
            if k in options.OPTIONS
        },
        parsed.config,
    )
    logging.basicConfig(
        level=settings.log.level.upper(), format="%(levelname)s %(message)s", stream=sys.stderr
    )
    status: int = parsed.call(settings, parsed)
    return status


# ---- the verbs ----------------------------------------------------------------------------------


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    parser = Parser(prog="outrider", description=outrider.__doc__.splitlines()[0])
    parser.add_argument("--version", action="version", version=f"outrider {outrider.__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    verbs: dict[str, Parser] = {}

    def verb(
        name: str,
        call: Any,
        help: str,
        sections: Sequence[str] = (),
        without: Sequence[str] = (),
        **more: Any,
    ) -> Parser:
        added: Parser = commands.add_parser(name, help=help, description=help, **more)
        _common(added, sections, call, without)
        verbs[name] = added
        return added

    models_and_more = ("target", "draft", "pipeline", "toy", "log")
    _run_flags(verb("run", run, "generate text", (*models_and_more, "sampling")))
    server = verb(
        "serve", serve.serve, "start a pipeline and keep it up", (*models_and_more, "coordinator")
    )
    server.add_argument("--name", default="default", help="what clients call it (default: default)")
    server.add_argument(
        "--pull", action="store_true", help="fetch the default pair if it is missing"
    )
    settled = ("pipeline.mode", "target.place", "draft.place")  # by the arms, and by their purpose
    _bench_flags(verb("bench", runner.run, "measure the speed-up", models_and_more, settled))
    _worker_verbs(verb, verbs)
    pull = verb("pull", _pull, "fetch a model, or the default pair", ("pipeline",))
    pull.add_argument("model", nargs="?", help="hf://user/repo[:quant]; default: the default pair")
    tune = verb(
        "tune",
        _tune,
        "find the fastest draft and placement for this processor, and keep to it",
        ("target", "draft", "pipeline", "log"),
    )
    tune.add_argument("--json", action="store_true", help="as a JSON object")
    tune.add_argument("--pull", action="store_true", help="fetch the default pair if it is missing")
    verb("ls", _ls, "list the models in the caches")
    ps = verb("ps", _ps, "list the pipelines that are up")
    ps.add_argument("--json", action="store_true", help="as a JSON array")
    stop = verb("stop", _stop, "end a pipeline, once its requests are finished")
    stop.add_argument("name", nargs="?", default="default", help="name or address")
    child = verb(
        "coordinator", _coordinator, argparse.SUPPRESS, ("draft", "pipeline", "coordinator", "log")
    )
    child.add_argument("--name", default="default")
    child.add_argument("--parent-fd", type=int)
    measure = verb("measure", _measure, argparse.SUPPRESS, ("log",))
    measure.add_argument("job")
    measure.add_argument("--parent-fd", type=int)
    # verbs for other processes of ours alone
    hidden = ("coordinator", "measure")
    commands._choices_actions = [a for a in commands._choices_actions if a.dest not in hidden]
    return parser, verbs


def _common(
    parser: Parser, sections: Sequence[str], call: Any, without: Sequence[str] = ()
) -> None:
    add_options(parser, sections, without)
    parser.add_argument(
        "--config", metavar="FILE", help="configuration file (TOML) [OUTRIDER_CONFIG]"
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.set_defaults(call=call)


def _run_flags(parser: Parser) -> None:
    add = parser.add_argument
    add("prompt", nargs="?", help="the prompt; else -p, --file, or stdin")
    add("-p", "--prompt", "-prompt", dest="prompt_flag", metavar="TEXT", help="the prompt")
    add("-f", "--file", metavar="FILE", help="read the prompt from a file")
    add("--chat", action="store_true", help="apply the model's chat template to the prompt")
    add(
        "-v",
        "--verbose",
        "-verbose",
        nargs="?",
        const="true",
        default="false",
        metavar="BOOL",
        help="show each drafted token and its fate on stderr",
    )
    add("-o", "--output", choices=("text", "json"), default="text", help="what goes to stdout")
    add("--connect", metavar="PIPELINE", help="use a pipeline that is up: its name or address")
    add(
        "--baseline", action="store_true", help="measure the speed-up: generate again in plain mode"
    )
    add("--no-stats", action="store_true", help="no statistics on stderr")
    add("--trace", metavar="FILE", help="write when each worker computed, as Chrome trace JSON")
    add("--pull", action="store_true", help="fetch the default pair if it is missing")


def _bench_flags(parser: Parser) -> None:
    parser.description = (
        "Measure how much faster drafting is than the target alone. Every arm answers the same "
        "prompts in turn, greedily; what counts is the ratio within a turn."
    )
    add = parser.add_argument
    add(
        "--arms",
        default="plain,sync,pipelined,auto",
        metavar="LIST",
        help="plain (always), sync, pipelined, auto; sync:4 or pipelined:4 for blocks of exactly "
        "4 drafted tokens; llama-server, llama-speculative-simple (default: %(default)s)",
    )
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    add("-n", "--n-predict", default=96, help="tokens of each answer (default: 96)", **count)
    add("-r", "--repetitions", default=5, help="turns for each prompt (default: 5)", **count)
    add("--warmup", default=1, help="answers of each arm before it counts (default: 1)", **count)
    add("--category", metavar="LIST", help="kinds of prompts, such as code,chat (default: all)")
    add("--per-category", default=1, help="prompts of each category (default: 1)", **count)
    add("--prompts", metavar="FILE", help="TOML of your own: [category] chat = …, prompts = [ … ]")
    add(
        "--placement",
        choices=("shared", "split", "given"),
        default="given",
        help="shared: both workers on all cores, with a thread for each; split: one core and one "
        "thread each; given: as the flags say (default)",
    )
    add("--peers", metavar="DIR", help="where llama.cpp's programs are (scripts/build-peers)")
    add(
        "--peer-n-max",
        default="1-12",
        metavar="LIST",
        help="draft lengths that each peer may try on the first prompt of a category, the best few "
        "on all; the best one counts (default: 1-12)",
    )
    add("-o", "--output", choices=("md", "json", "csv"), default="md", help="what goes to stdout")
    add("--plot", metavar="FILE", help="picture of the speed-ups, .svg or .png")
    add("--lanes", metavar="FILE", help="picture of both workers over time, .svg or .png")
    add(
        "--require-speedup",
        type=float,
        metavar="X",
        help="end with status 9 if auto is less than X times as fast as plain",
    )
    add("--pull", action="store_true", help="fetch the default pair if it is missing")
    add(
        "--record",
        metavar="FILE",
        help="measure nothing: write where the draft agrees with the target, and how sure it is, "
        "for policies to be tried on",
    )
    add(
        "--simulate",
        action="store_true",
        help="made-up devices instead of models: passes of --toy-step-ms whatever their rows, a "
        "link of --toy-link-ms, and each pair of the next two",
    )
    add(
        "--acceptance",
        default="0.6,0.8,0.9",
        metavar="LIST",
        help="of a drafted token (%(default)s)",
    )
    add("--cost", default="0.05,0.1,0.2", metavar="LIST", help="of one, in passes (%(default)s)")


def _worker_verbs(verb: Any, verbs: dict[str, Parser]) -> None:
    worker = verb("worker", None, "run one worker here, for a coordinator elsewhere")
    roles = worker.add_subparsers(metavar="ROLE", required=True)
    for role in ("draft", "target"):
        text = f"the {role} worker; its flags mean its own model"
        added = roles.add_parser(role, help=text, description=text)
        _common(added, ("target", "pipeline", "toy", "log"), _worker)
        added.add_argument(
            "--connect", required=True, metavar="ADDRESS", help="the coordinator's address"
        )
        added.add_argument("--parent-fd", type=int, help=argparse.SUPPRESS)
        added.set_defaults(role=role)
        verbs[f"worker {role}"] = added


def _coordinator(settings: options.Settings, parsed: Any) -> int:
    processes.coordinator(settings, parsed.name, parsed.parent_fd)
    return 0


def _worker(settings: options.Settings, parsed: Any) -> int:
    settings = serve.with_paths_of_worker(settings, parsed.role)
    processes.worker(parsed.role, settings, address_of(parsed.connect), parsed.parent_fd)
    return 0


def _measure(settings: options.Settings, parsed: Any) -> int:
    return probe.answer(parsed.job, parsed.parent_fd)


def _tune(settings: options.Settings, parsed: Any) -> int:
    decision = search.tune(serve.with_paths(settings, fetch=parsed.pull))
    if parsed.json:
        print(json.dumps(asdict(decision), indent=2))
        return 0
    for trial in decision.trials:
        table = Table("", "draft", "MB", "ms/token", "acceptance", "tokens/s", "speed-up", box=None)
        chosen = search.is_chosen(decision, trial)
        for one in trial.variants:
            table.add_row(
                "*" if chosen and one.quant == decision.quant else "",
                "as given" if one.quant == "off" else one.quant,
                f"{one.bytes / 1e6:,.0f}",
                f"{1000 * one.draft_s:.1f}",
                f"{one.acceptance:.0%}",
                f"{one.rate:.1f}",
                f"{one.rate / trial.plain_rate:.2f}x",
            )
        _show(search.headline(trial))
        _show(table)
    _show("* chosen, and kept for run and serve; tokens/s are forecasts")
    return 0


def _pull(settings: options.Settings, parsed: Any) -> int:
    with progress_reporter() as progress:
        offline = settings.pipeline.offline
        if parsed.model:
            paths = [
                catalogue.resolve(parsed.model, fetch=True, offline=offline, progress=progress)
            ]
        else:
            paths = list(catalogue.default_pair(fetch=True, offline=offline, progress=progress))
    for path in paths:
        print(path)
    return 0


def _ls(settings: options.Settings, parsed: Any) -> int:
    table = Table("model", "GiB", "file", box=None)
    for model in catalogue.local_models():
        table.add_row(model.name, f"{model.bytes / 2**30:.2f}", str(model.path))
    _show(table)
    return 0


def _ps(settings: options.Settings, parsed: Any) -> int:
    found = uvloop.run(_pipelines())
    if parsed.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table("name", "status", "mode", "target", "draft", "running", "waiting", box=None)
    for one in found:
        workers, requests = one["workers"], one["requests"]
        names = [workers.get(role, {}).get("model", "-") for role in ("target", "draft")]
        counts = [str(requests["running"]), str(requests["waiting"])]
        table.add_row(one["name"], one["status"], one["mode"], *names, *counts)
    _show(table)
    return 0


def _show(table: Table | str) -> None:
    """Whole lines where a program reads them: no path is cut to a width that nobody has."""
    Console(width=None if sys.stdout.isatty() else 10_000).print(table)


async def _pipelines() -> list[dict[str, Any]]:
    async def ask(name: str) -> dict[str, Any] | None:
        try:
            async with connect(name, timeout_s=1.0) as client:
                return {"name": name, **await client.health()}
        except ConnectionFailed:
            return None  # left over from a pipeline that was killed

    names = sorted(path.stem for path in runtime_dir().glob("*.sock"))
    return [one for one in await asyncio.gather(*map(ask, names)) if one]


def _stop(settings: options.Settings, parsed: Any) -> int:
    async def stop() -> None:
        async with connect(parsed.name) as client:
            await client.stop()
        path = address_of(parsed.name).removeprefix("ipc://")
        for _ in range(600):
            if not await asyncio.to_thread(os.path.exists, path):
                return
            await asyncio.sleep(0.1)
        raise ConfigError(f"{parsed.name} is still finishing its requests")

    uvloop.run(stop())
    return 0
