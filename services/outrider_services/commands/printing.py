"""What `outrider run` prints: the answer on stdout; statistics and drafted tokens on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from rich.console import Console

from outrider.client import AsyncClient, Completion
from outrider.core.sampling import NEAR
from outrider.core.stats import Report
from outrider.core.values import Fragment, Span
from outrider.errors import ConfigError
from outrider_services.commands.tokens import Colours, Fates, legend
from outrider_services.outlet import in_thread, put
from outrider_services.table import TerminalOptions
from outrider_services.terminal import note, tell


class Printer:
    """Generated text, or one JSON object, to stdout; everything else to stderr."""

    def __init__(self, client: AsyncClient, parsed: Any, terminal: TerminalOptions) -> None:
        self._json, self._stats = parsed.output == "json", not parsed.no_stats
        self._fates = Fates(client) if parsed.verbose == "true" else None
        is_coloured = terminal.color_tokens and not self._json
        self._colours = Colours(Console()) if is_coloured else None
        self._waits_since: float | None = None

    def legend(self) -> None:
        """Tell what the colours mean, if there will be any."""
        if self._colours and self._colours.shown:
            note(legend())

    @property
    def waited_s(self) -> float:
        """For how long nobody has taken what is to be written."""
        return 0.0 if self._waits_since is None else time.monotonic() - self._waits_since

    async def _patiently(self, writing: Awaitable[object]) -> None:
        self._waits_since = time.monotonic()
        await writing
        self._waits_since = None

    async def fragment(self, fragment: Fragment) -> None:
        if not self._json:
            text = self._colours(fragment) if self._colours else fragment.text
            await self._patiently(put(text))
        if self._fates:
            for line in await self._fates.lines(fragment):
                tell(line)

    async def trace(self, path: str, lanes: tuple[Span, ...]) -> None:
        await self._patiently(in_thread(lambda: write_trace(path, lanes)))  # it may be a pipe

    async def result(self, result: Completion, report: Report) -> None:
        if self._json:
            shown = {
                "text": result.text,
                "token_ids": [token.id for token in result.tokens],
                "prompt_token_ids": list(result.prompt_token_ids),
                "finish_reason": result.choices[0].finish_reason,
                "seed": report.seed,
                "mode": report.mode,
                "stats": report.as_dict(),
            }
            await self._patiently(put(json.dumps(shown, ensure_ascii=False) + "\n"))
        else:
            await self._patiently(put("\n"))
        if self._stats:
            tell("\n" + statistics(report))


def measured(report: Report, plain: Report) -> Report:
    """The report with the speed-up over the plain run that was just made."""
    if not (report.tokens_per_s and plain.tokens_per_s):
        return report
    speedup = report.tokens_per_s / plain.tokens_per_s
    return report.changed(speedup=speedup, speedup_kind="measured")


def show(value: float | None, form: str) -> str:
    """A figure, if it is defined."""
    return "n/a" if value is None else format(value, form)


def statistics(r: Report) -> str:
    """The block that ends a run."""
    sign = "~" if r.speedup_kind == "estimate" else ""
    kind = f" ({r.speedup_kind})" if r.speedup_kind else ""
    accepted = r.accepted_tokens - r.truncated_tokens
    return "\n".join(
        (
            f"Mode: {r.mode}",
            f"Seed: {r.seed}",
            f"Total tokens generated: {r.generated_tokens} ({accepted} accepted, "
            f"{r.corrections} corrected, {r.bonuses} bonus, {r.plain_tokens} plain"
            + (f", {r.resumed_tokens} before a coordinator was lost)" if r.resumed_tokens else ")"),
            f"Draft tokens created: {r.drafted_tokens}",
            f"Draft tokens verified: {r.verified_tokens}"
            + (
                f" (plus {r.beside_tokens} beside blocks, right at {r.beside_misses} misses)"
                if r.beside_tokens
                else ""
            ),
            f"Draft tokens accepted: {r.accepted_tokens}"
            + (f" ({r.repeated_tokens} without a model)" if r.repeated_tokens else ""),
            f"Draft tokens discarded: {r.discarded_tokens} (plus {r.hits} hits)"
            + (f"; {r.foreseen_misses} misses foreseen" if r.foreseen_misses else ""),
            f"Acceptance rate: {show(r.acceptance_rate, '.2%')} (accepted / verified)",
            f"Mean accepted length: {show(r.mean_accepted_length, '.2f')}",
            f"Overlap: {show(r.overlap, '.0%')} of draft compute",
            f"Near-ties: {near_ties(r)}",
            f"Generation time: {show(r.decode_s, '.2f')}s "
            f"(prefill {show(r.prefill_s, '.2f')}s apart)",
            f"Tokens per second: {show(r.tokens_per_s, '.2f')}",
            f"Speed-up vs target alone: {sign}{show(r.speedup, '.2f')}x{kind}",
        )
    )


def figures(r: Report) -> str:
    """The line behind an answer of a conversation."""
    found = [f"{r.generated_tokens} token{'s' * (r.generated_tokens != 1)}"]
    if r.tokens_per_s is not None:
        found.append(f"{r.tokens_per_s:.1f}/s")
    if r.speedup is not None and r.verified_tokens:
        found.append(f"~{r.speedup:.2f}x the target alone")
    if r.acceptance_rate is not None:
        found.append(f"{r.acceptance_rate:.0%} accepted")
    return ", ".join(found)


def near_ties(r: Report) -> str:
    """How many tokens another rounding might have chosen otherwise; see `sampling.decide`."""
    closest = "" if r.smallest_margin is None else f", the closest by {r.smallest_margin:.3f}"
    return f"{r.near_ties} (tokens that won by less than {NEAR} logits{closest})"


def write_trace(path: str, lanes: tuple[Span, ...]) -> None:
    try:
        Path(path).write_text(json.dumps(chrome_trace(lanes)))
    except OSError as exc:
        raise ConfigError(f"cannot write the trace to {path}: {exc.strerror}") from None


def chrome_trace(lanes: tuple[Span, ...]) -> dict[str, Any]:
    """Both lanes in the trace event format that Perfetto and chrome://tracing read."""
    start = min((span.start for span in lanes), default=0.0)
    threads = {"target": 1, "draft": 2}
    events: list[dict[str, Any]] = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": 1,
            "tid": tid,
            "args": {"name": f"{lane} compute"},
        }
        for lane, tid in threads.items()
    ]
    events += [
        {
            "ph": "X",
            "name": f"{'verify' if span.lane == 'target' else 'draft'} {span.rows}",
            "pid": 1,
            "tid": threads[span.lane],
            "ts": round((span.start - start) * 1e6, 1),
            "dur": round((span.end - span.start) * 1e6, 1),
            "args": {
                "rows": span.rows,
                "without a model": span.free,
                "foreseen": span.foreseen,
                "beside the block": span.beside,
            },
        }
        for span in lanes
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
