"""`outrider bench`: measure on this machine, or on made-up devices, or record what models say."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvloop

from outrider.errors import ConfigError
from outrider_services.bench import peers, plots, simulated, traces
from outrider_services.bench.plan import read_plan
from outrider_services.bench.results import Results, as_csv, as_json, as_markdown
from outrider_services.bench.runner import Bench
from outrider_services.commands.prepared import has_draft, with_files, with_some_draft
from outrider_services.commands.signals import until_signalled
from outrider_services.options import Parser
from outrider_services.table import Settings
from outrider_services.terminal import tell
from outrider_services.tuning import search

# settings that follow from the arms, and from what a benchmark is for
DECIDED = ("pipeline.mode", "target.place", "draft.place")
FAILED_CHECK = 9  # the exit status where the speed-up is not what was required
DIFFERENT = 10  # … where an arm says something else than plain, at a choice that was not near
LANES_S = 3.0  # how much of an answer the picture of the lanes shows


def flags(parser: Parser) -> None:
    parser.description = (
        "Measure how much faster drafting is than the target alone. In each repetition every arm "
        "answers the same prompt, greedily; what counts is the ratio within a repetition."
    )
    _flags_of_questions(parser)
    _flags_of_arms(parser)
    _flags_of_results(parser)
    _flags_of_made_up_devices(parser)


def _flags_of_questions(parser: Parser) -> None:
    add = parser.add_argument
    count: dict[str, Any] = {"type": int, "metavar": "N"}
    add("-n", "--n-predict", default=96, help="tokens of each answer (default: 96)", **count)
    add("-r", "--repetitions", default=5, help="repetitions of each prompt (default: 5)", **count)
    add("--warmup", default=1, help="answers of each arm before it counts (default: 1)", **count)
    add("--category", metavar="LIST", help="kinds of prompts, such as code,chat (default: all)")
    add("--per-category", default=1, help="prompts of each category (default: 1)", **count)
    sources = parser.add_mutually_exclusive_group()
    sources.add_argument(
        "--prompts", metavar="FILE", help="TOML of your own: [category] chat = …, prompts = [ … ]"
    )
    sources.add_argument(
        "--suite",
        metavar="FILE",
        help="questions in the form of Spec-Bench or HumanEval: JSON lines, perhaps gzipped",
    )
    add(
        "--restarts",
        help="all of it so many times, each with new processes and the arms in another order; how "
        "much the speed-up differs between them is shown (default: 10 with --suite, else 1)",
        **count,
    )


def _flags_of_arms(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--arms",
        default="plain,sync,pipelined,auto",
        metavar="LIST",
        help="plain (always), sync, pipelined, auto; sync:4 or pipelined:4 for blocks of exactly "
        "4 drafted tokens; llama-server, llama-speculative-simple (default: %(default)s)",
    )
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
    add("--pull", action="store_true", help="fetch the default pair if it is missing")


def _flags_of_results(parser: Parser) -> None:
    add = parser.add_argument
    add("-o", "--output", choices=("md", "json", "csv"), default="md", help="what goes to stdout")
    add("--plot", metavar="FILE", help="picture of the speed-ups, .svg or .png")
    add("--lanes", metavar="FILE", help="picture of both workers over time, .svg or .png")
    add(
        "--require-speedup",
        type=float,
        metavar="X",
        help="end with status 9 if auto is less than X times as fast as plain",
    )
    add(
        "--record",
        metavar="FILE",
        help="measure nothing: write where the draft agrees with the target, and how sure it is, "
        "for policies to be tried on",
    )


def _flags_of_made_up_devices(parser: Parser) -> None:
    add = parser.add_argument
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


def bench(settings: Settings, parsed: Any) -> int:
    """Measure, write what was found, and say whether it was enough."""
    if parsed.simulate:
        return uvloop.run(until_signalled(simulated.simulate(settings, parsed)))
    plan = read_plan(parsed)
    for path in filter(None, (parsed.plot, parsed.lanes)):
        plots.check_path(path)
    settings = with_both_models(settings, parsed)
    if parsed.record:
        traces.write(parsed.record, settings, plan.categories, plan.count)
        return 0
    directory = Path(parsed.peers) if parsed.peers else peers.default_directory()
    programs = {name: peers.find(directory, name) for name in plan.peers}
    measured = Bench(plan, settings, programs)
    if stopped := uvloop.run(until_signalled(measured.run())):
        return stopped
    results = measured.results
    sys.stdout.write({"md": as_markdown, "json": as_json, "csv": as_csv}[parsed.output](results))
    if parsed.plot:
        plots.bars(parsed.plot, results)
    if parsed.lanes:
        plots.lanes(parsed.lanes, measured.lanes, LANES_S)
    return check_texts(results) or check_speedup(results, parsed.require_speedup)


def with_both_models(settings: Settings, parsed: Any) -> Settings:
    """The settings of the one pipeline that answers for all arms. Raises OutriderError."""
    settings = on_cores_of(parsed.placement, settings)
    settings = search.prepared(with_files(settings, fetch=parsed.pull), tell)
    settings = with_some_draft(replace(settings, pipeline=replace(settings.pipeline, mode="auto")))
    if not has_draft(settings) or settings.draft.place != "spawn":
        raise ConfigError("both workers are started here: it takes a draft, and --n-draft above 0")
    return settings


def on_cores_of(placement: str, settings: Settings) -> Settings:
    """The settings with the cores and threads that `--placement` means. Raises ConfigError."""
    target, draft = settings.target, settings.draft
    if placement == "given":
        return settings
    allowed = sorted(os.sched_getaffinity(0))
    if placement == "shared":
        every, threads = ",".join(map(str, allowed)), len(allowed)
        target = replace(target, cores=every, threads=threads)
        draft = replace(draft, cores=every, threads=threads)
    elif len(allowed) < 2:
        raise ConfigError("--placement split needs two cores, and this process may use only one")
    else:
        target = replace(target, cores=str(allowed[0]), threads=1)
        draft = replace(draft, cores=str(allowed[1]), threads=1)
    return replace(settings, target=target, draft=draft)


def check_texts(results: Results) -> int:
    """The exit status: arms may differ only where rounding decides between two tokens."""
    wrong = [str(one) for one in results.differences() if not one.is_near]
    if not wrong:
        return 0
    tell(f"outrider: texts differ where no choice was near, which is a fault: {'; '.join(wrong)}")
    return DIFFERENT


def check_speedup(results: Results, required: float | None) -> int:
    """The exit status: whether `auto` gains what was required."""
    if required is None:
        return 0
    gained = results.means()["auto"]
    if gained >= required:
        tell(f"auto is {gained:.2f} times as fast as plain; {required:g} was required.")
        return 0
    tell(
        f"outrider: auto is {gained:.2f} times as fast as plain, {1 - gained / required:.0%} below "
        f"the required {required:g}"
    )
    return FAILED_CHECK
