"""`outrider doctor`: examine a pair where it is placed, and say what pays and what to change."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any

import uvloop
from rich.table import Table
from rich.text import Text

from outrider.client import connect
from outrider.core.rules import MOST_DRAFTED
from outrider.core.sampling import NEAR
from outrider.errors import ConfigError
from outrider_services.bench import prompts
from outrider_services.commands import bench
from outrider_services.commands.signals import until_signalled
from outrider_services.commands.top import printable
from outrider_services.doctor.advice import Advice, advise, ms
from outrider_services.doctor.examination import LEAST, Examination
from outrider_services.doctor.findings import Curve, Findings, Worker
from outrider_services.doctor.forecast import DRAFTING, PLACED, Forecast, forecasts
from outrider_services.options import Parser
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News, show, tell

DECIDED = bench.DECIDED
COUNT, LIMIT_S = 64, 60.0
ROWS = (1, 2, 4, 8, 16)  # of the passes whose cost is shown


@dataclass(frozen=True, slots=True)
class Report:
    """What was found, what is to be expected, and what to do."""

    found: Findings
    forecasts: dict[str, Forecast]
    advice: list[Advice]


def flags(parser: Parser) -> None:
    parser.description = (
        "Measure draft and target where they are, predict how many times as fast as the target "
        "alone each mode is, and say what to change. It starts the pair, or examines one that is "
        "up, best while nobody else uses it. With the default pair it takes about a minute."
    )
    add = parser.add_argument
    add("--connect", metavar="PIPELINE", help="examine one that is up: its name or address")
    add(
        "--limit",
        type=float,
        default=LIMIT_S,
        metavar="S",
        help="most seconds of measuring, once the models are loaded (default: %(default)g)",
    )
    add(
        "-n",
        "--n-predict",
        type=int,
        default=COUNT,
        metavar="N",
        help="tokens of each answer that shows how often the draft is right (default: %(default)s)",
    )
    add("--category", metavar="LIST", help="kinds of prompts, such as code,chat (default: all)")
    add("--per-category", type=int, default=1, metavar="N", help="prompts of each (default: 1)")
    add("--prompts", metavar="FILE", help="prompts of your own, as for bench")
    add("--placement", choices=("shared", "split", "given"), default="given", help="as for bench")
    add("--pull", action="store_true", help="fetch the default pair if it is missing")
    add("-o", "--output", choices=("text", "json"), default="text", help="what goes to stdout")


def doctor(settings: Settings, parsed: Any) -> int:
    """Examine, and print what was found. Raises OutriderError."""
    if parsed.n_predict < LEAST:
        raise ConfigError(f"--n-predict must be at least {LEAST}, not {parsed.n_predict}")
    if not 1 <= parsed.limit <= 3600:
        raise ConfigError(f"--limit must be from 1 to 3600 seconds, not {parsed.limit:g}")
    chosen = [name.strip() for name in (parsed.category or "").split(",") if name.strip()]
    categories = tuple(prompts.load(parsed.prompts, chosen, parsed.per_category))
    if parsed.connect is None:
        settings = bench.with_both_models(settings, parsed)
    found: list[Findings] = []

    async def examine() -> None:
        found.append(await _examined(settings, parsed, categories))

    if stopped := uvloop.run(until_signalled(examine())):
        return stopped
    n_max = MOST_DRAFTED if settings.draft.n_max is None else settings.draft.n_max
    told = forecasts(found[0], n_max)
    report = Report(found[0], told, advise(found[0], told))
    if parsed.output == "json":
        print(json.dumps(as_json(report), indent=2))
    else:
        write(report)
    return 0


async def _examined(
    settings: Settings, parsed: Any, categories: tuple[prompts.Category, ...]
) -> Findings:
    async with AsyncExitStack() as stack:
        name = parsed.connect
        if name is None:
            name = f"doctor-{secrets.token_hex(4)}"
            with News() as news:
                launcher = Launcher(settings, name, news.report, news.log)
                await stack.enter_async_context(launcher)
        client = await stack.enter_async_context(connect(name))
        tell(f"Measuring, for at most about {parsed.limit:g} s ...")
        return await Examination(client, categories, parsed.n_predict, parsed.limit, tell).run()


# ---- what is told -------------------------------------------------------------------------------


def as_json(report: Report) -> dict[str, Any]:
    """Everything, for programs; times are seconds."""
    found = report.found
    worlds = {mode: found.world(mode) for mode in DRAFTING}
    return {
        "target": asdict(found.target),
        "draft": asdict(found.draft),
        "auto": "sync" if found.shares else "pipelined",
        "costs": {
            "pass_s": found.pass_s,
            "load_curve_s": found.curve_s,
            "target_reads_s": found.prefill_s,
            "draft_reads_s": found.read_s,
            **{
                mode: {"curve_s": world.verify_s[: len(found.curve_s)], "draft_s": world.draft_s}
                for mode, world in worlds.items()
            },
        },
        "acceptance": {
            "overall": found.accepted,
            "texts": [
                {
                    "category": text.category,
                    "prompt_tokens": text.prompt_tokens,
                    "tokens": len(text.trace["match"]),
                    "accepted": text.accepted,
                }
                for text in found.texts
            ],
        },
        "text": {
            "tokens": found.tokens,
            "near_ties": found.near_ties,
            "identical": not found.differences,
            "differences": found.differences,
            "near_ties_only": found.differ_near,
        },
        "forecasts": {name: asdict(one) for name, one in report.forecasts.items()},
        "advice": [asdict(one) for one in report.advice],
    }


def write(report: Report) -> None:
    """The same for people, what matters most first."""
    found, now = report.found, report.forecasts[PLACED]
    auto = "sync" if found.shares else "pipelined"
    show(f"As placed, expect {now.auto:.2f}x the target alone (auto: {auto}).")
    for one in report.advice:
        then = f"; expect {one.then:.2f}x instead of {one.now:.2f}x" if one.then else ""
        show(Text(f"- {one.what}: {one.because}{then}."))
    show("")
    show(expected(report.forecasts))
    show("")
    show(costs(found))
    show("")
    for line in lines(found):
        show(Text(line))


def expected(told: dict[str, Forecast]) -> Table:
    """Times as fast as the target alone as it is placed."""
    table = Table("expected", "plain", "sync", "pipelined", "auto", box=None)
    for name, one in told.items():
        figures = (one.plain, one.sync, one.pipelined, one.auto)
        table.add_row(name, *(f"{figure:.2f}x" for figure in figures))
    return table


def costs(found: Findings) -> Table:
    """What was measured, in milliseconds."""
    rows = [n for n in ROWS if n <= len(found.curve_s)]
    titles = ("ms", *(f"{n} rows" if n > 1 else "1 row" for n in rows), "drafted token")
    table = Table(*titles, "token read", box=None)
    for mode in DRAFTING:
        world = found.world(mode)
        name = "in turns" if mode == "sync" else "while both compute"
        passes = (f"{1000 * world.verify_s[n - 1]:.1f}" for n in rows)
        read = f"{1000 * found.prefill_s:.1f}, draft {1000 * found.read_s:.1f}"
        table.add_row(name, *passes, f"{1000 * world.draft_s:.1f}", read)
    return table


def lines(found: Findings) -> list[str]:
    """The workers, the texts, and whether all modes said the same."""
    by_text = ", ".join(f"{text.category} {text.accepted:.0%}" for text in found.texts)
    ties = f"{found.near_ties} of {found.tokens} tokens won by less than {NEAR} logits"
    said = "every mode said the same"
    if found.differences:
        where = "; ".join(found.differences)
        fault = "at near-ties, which rounding decides" if found.differ_near else "which is a FAULT"
        said = f"texts differ, {fault}: {where}"
    return [
        f"target: {about(found.target)}",
        f"draft: {about(found.draft)}",
        f"drafted right: {found.accepted:.0%} ({by_text})",
        f"text: {said}; {ties}",
    ]


def about(one: Worker) -> str:
    """A worker in one line."""
    parts = [f"{printable(one.model)} on {printable(one.device)}", printable(one.build)]
    parts.append(f"{one.memory / 1e9:.2f} GB")
    parts.append(f"round trip {ms(2 * one.link_s)}")
    if one.rollback_s:
        parts.append(f"rollback {ms(one.rollback_s)}")
    if len(one.crowd_s) > 1:
        parts.append(f"a token each for {len(one.crowd_s)} requests {in_all(one.crowd_s)}")
    return "; ".join(filter(None, parts))


def in_all(crowd_s: Curve | Sequence[float]) -> str:
    """What a pass for all takes, and how many passes for one that is."""
    return f"{ms(crowd_s[-1])}, {crowd_s[-1] / max(crowd_s[0], 1e-9):.1f} times one"
