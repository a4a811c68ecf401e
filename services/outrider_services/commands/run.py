"""`outrider run`: one prompt through a pipeline of its own, or one that is already up."""

from __future__ import annotations

import asyncio
import json
import secrets
import signal
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import uvloop

from outrider.client import AsyncClient, Completion, Stream, connect
from outrider.core.sampling import Sampling
from outrider.core.stats import Report
from outrider.core.values import Fragment, Span
from outrider.errors import BadRequest, ConfigError
from outrider_services.commands.prepared import has_draft, with_files, with_some_draft
from outrider_services.options import Parser, Settings
from outrider_services.pipeline.launcher import Launcher
from outrider_services.terminal import News, tell
from outrider_services.tuning import search

DEFAULT_PROMPT = "The future of AI is"
DEFAULT_LENGTH = 100


def flags(parser: Parser) -> None:
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


def run(settings: Settings, parsed: Any) -> int:
    """Generate, print, and leave nothing behind."""
    prompt = read_prompt(parsed, sys.stdin)
    request = arguments(settings, parsed)  # wrong settings are told before anything is started
    if parsed.connect is None:
        settings = search.prepared(with_files(settings, fetch=parsed.pull), tell)
        settings = with_some_draft(settings)
    return uvloop.run(_run(settings, parsed, prompt, request))


def read_prompt(parsed: Any, stdin: TextIO) -> str:
    """The prompt from argument, `-p`, file or piped stdin, in that order. Raises OutriderError."""
    given, source = parsed.prompt, "the command line"
    if given is not None and given.endswith(".gguf"):
        raise BadRequest(f"{given} looks like a model; say -m {given}", "prompt")
    text: str | None = parsed.prompt_flag if given is None else given
    try:
        if text is None and parsed.file is not None:
            source = parsed.file
            text = Path(source).read_text("utf-8")
        elif text is None:
            source = "stdin"
            text = "" if stdin is None or stdin.isatty() else stdin.read()
            text = text or DEFAULT_PROMPT
        text.encode()  # what is no text may come as surrogates, on the command line above all
    except OSError as exc:
        raise BadRequest(f"cannot read the prompt from {source}: {exc.strerror}") from None
    except UnicodeError:
        raise BadRequest(f"the prompt from {source} is not UTF-8 text") from None
    return text


def arguments(settings: Settings, parsed: Any) -> dict[str, Any]:
    """What `AsyncClient.create_completion` is to be called with. Raises OutriderError."""
    sampling = asdict(settings.sampling)
    n_predict = sampling.pop("n_predict")
    seed = sampling.pop("seed")
    if parsed.verbose not in ("true", "false"):
        raise ConfigError(f"--verbose must be true or false, not {parsed.verbose!r}")
    bias = dict(map(read_bias, sampling["logit_bias"]))
    names = sampling.keys() & set(Sampling.__struct_fields__)
    Sampling(**{name: sampling[name] for name in names} | {"logit_bias": tuple(bias.items())})
    return {
        **sampling,
        "logit_bias": bias,
        "max_tokens": DEFAULT_LENGTH if n_predict is None else n_predict,
        "seed": secrets.randbits(31) if seed < 0 else seed,
        "mode": settings.pipeline.mode,
        "n_draft": settings.draft.n_max,
        "trace": parsed.trace is not None,
    }


def read_bias(text: str) -> tuple[int, float]:
    """`15043+1`, `15043-1.5` or `2-inf`."""
    for sign in "+-":
        token, found, bias = text.partition(sign)
        if found:
            try:
                return int(token), max(float(sign + bias), -1e6)
            except ValueError:
                break
    raise ConfigError(f"--logit-bias must be like 15043+1 or 2-inf, not {text!r}")


async def _run(settings: Settings, parsed: Any, prompt: str, request: dict[str, Any]) -> int:
    interrupts = Interrupts()
    try:
        await _answer(settings, parsed, prompt, request, interrupts)
    except asyncio.CancelledError:
        if not interrupts.status:
            raise
    return interrupts.status


async def _answer(
    settings: Settings,
    parsed: Any,
    prompt: str,
    request: dict[str, Any],
    interrupts: Interrupts,
) -> None:
    async with AsyncExitStack() as stack:
        name = parsed.connect
        if name is None:
            name = f"run-{secrets.token_hex(4)}"
            request["mode"] = settings.pipeline.mode
            await _start(stack, settings, name)
        client = await stack.enter_async_context(connect(name))
        interrupts.client = client
        printer = Printer(client, parsed)
        request.update({"messages": [{"role": "user", "content": prompt}]} if parsed.chat else {})
        result = await _generate(client, prompt, request, printer, interrupts)
        report = result.stats
        if parsed.baseline and result.choices[0].finish_reason != "cancelled":
            plain = await client.create_completion(prompt, **{**request, "mode": "plain"})
            report = measured(report, plain.stats)
        if parsed.trace:
            write_trace(parsed.trace, result.trace or ())
        printer.result(result, report)


async def _start(stack: AsyncExitStack, settings: Settings, name: str) -> None:
    """A private pipeline, for as long as `stack` lives."""
    news = News()
    with news:
        launcher = Launcher(settings, name, news.report, news.log, draft=has_draft(settings))
        await stack.enter_async_context(launcher)


async def _generate(
    client: AsyncClient,
    prompt: str,
    request: dict[str, Any],
    printer: Printer,
    interrupts: Interrupts,
) -> Completion:
    stream: Stream = await client.create_completion(prompt, **request, stream=True)
    interrupts.stream = stream
    async for fragment in stream:
        await printer.fragment(fragment)
    return await stream.result()


class Interrupts:
    """The first Ctrl-C ends the answer and shows what there is; the second, and SIGTERM, quit."""

    def __init__(self) -> None:
        self.status = 0
        self.client: AsyncClient | None = None
        self.stream: Stream | None = None
        self._task = asyncio.current_task()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, self._on, number)

    def _on(self, number: int) -> None:
        first, self.status = self.status == 0, 128 + number
        if first and number == signal.SIGINT and self.stream is not None:
            self._cancelling = asyncio.ensure_future(self.stream.cancel())
        elif self._task:
            self._task.cancel()


class Printer:
    """Generated text, or one JSON object, to stdout; everything else to stderr."""

    def __init__(self, client: AsyncClient, parsed: Any) -> None:
        self._client, self._verbose = client, parsed.verbose == "true"
        self._json, self._stats = parsed.output == "json", not parsed.no_stats
        self._texts: dict[int, str] = {}

    async def fragment(self, fragment: Fragment) -> None:
        if not self._json:
            sys.stdout.write(fragment.text)
            sys.stdout.flush()
        if self._verbose:
            for line in await self._fates(fragment):
                tell(line)

    async def _fates(self, fragment: Fragment) -> list[str]:
        """Each drafted token of the round and what became of it."""
        lines, tokens, number = [], fragment.tokens, fragment.round
        drafted = [(d.token, await self._text(d.token), d.confidence) for d in fragment.drafted]
        lines += [f"[DRAFT] {number}.{i} {d} {t} p={p:.2f}" for i, (d, t, p) in enumerate(drafted)]
        for i, (id_, text, _) in enumerate(drafted):
            if i >= len(tokens):
                break  # behind the end of the answer, or of what was read
            own = tokens[i]
            shown = await self._text(own.id)
            lines.append(f"[VERIFY] {number}.{i} {id_} {text} target={own.id} {shown}")
            if own.kind == "corrected":
                lines.append(f"[REJECT] {number}.{i} target={own.id} {shown}")
                break
            lines.append(f"[ACCEPT] {number}.{i}")
        if tokens and tokens[-1].kind in ("bonus", "plain"):
            last = tokens[-1]
            lines.append(f"[{last.kind.upper()}] {number} {last.id} {await self._text(last.id)}")
        return lines

    async def _text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = json.dumps(
                await self._client.detokenize([token]), ensure_ascii=False
            )
        return self._texts[token]

    def result(self, result: Completion, report: Report) -> None:
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
            sys.stdout.write(json.dumps(shown, ensure_ascii=False) + "\n")
        else:
            sys.stdout.write("\n")
        sys.stdout.flush()
        if self._stats:
            tell("\n" + statistics(report))


def measured(report: Report, plain: Report) -> Report:
    """The report with the speed-up over the plain run that was just made."""
    if not (report.tokens_per_s and plain.tokens_per_s):
        return report
    speedup = report.tokens_per_s / plain.tokens_per_s
    return report.changed(speedup=speedup, speedup_kind="measured")


def statistics(r: Report) -> str:
    """The block that ends a run."""

    def show(value: float | None, form: str) -> str:
        return "n/a" if value is None else format(value, form)

    sign = "~" if r.speedup_kind == "estimate" else ""
    kind = f" ({r.speedup_kind})" if r.speedup_kind else ""
    accepted = r.accepted_tokens - r.truncated_tokens
    return "\n".join(
        (
            f"Mode: {r.mode}",
            f"Seed: {r.seed}",
            f"Total tokens generated: {r.generated_tokens} ({accepted} accepted, "
            f"{r.corrections} corrected, {r.bonuses} bonus, {r.plain_tokens} plain)",
            f"Draft tokens created: {r.drafted_tokens}",
            f"Draft tokens verified: {r.verified_tokens}",
            f"Draft tokens accepted: {r.accepted_tokens}",
            f"Draft tokens discarded: {r.discarded_tokens} (plus {r.hits} hits)",
            f"Acceptance rate: {show(r.acceptance_rate, '.2%')} (accepted / verified)",
            f"Mean accepted length: {show(r.mean_accepted_length, '.2f')}",
            f"Overlap: {show(r.overlap, '.0%')} of draft compute",
            f"Generation time: {show(r.decode_s, '.2f')}s "
            f"(prefill {show(r.prefill_s, '.2f')}s apart)",
            f"Tokens per second: {show(r.tokens_per_s, '.2f')}",
            f"Speed-up vs target alone: {sign}{show(r.speedup, '.2f')}x{kind}",
        )
    )


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
            "args": {"rows": span.rows},
        }
        for span in lanes
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}
