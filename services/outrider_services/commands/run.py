"""`outrider run`: a prompt, or a conversation, on a pipeline of its own or one that is up."""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import shutil
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import uvloop

from outrider.client import AsyncClient, ChatMessage, Completion, Stream, connect
from outrider.client.settings import submit
from outrider.core.stats import Report
from outrider.errors import BadRequest, ConfigError
from outrider.wire.codec import check
from outrider_services.commands.interrupts import Interrupts
from outrider_services.commands.prepared import has_draft, with_files, with_some_draft
from outrider_services.commands.printing import Printer, measured
from outrider_services.options import Parser, reach
from outrider_services.pipeline.launcher import Launcher
from outrider_services.table import Settings
from outrider_services.terminal import News, tell
from outrider_services.tuning import advice, search
from outrider_services.tuning.decisions import Decision

DEFAULT_PROMPT = "The future of AI is"
DEFAULT_LENGTH = 100


def flags(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "prompt",
        nargs="?",
        help="the prompt; else -p, --file, or stdin; without any, a conversation on a terminal",
    )
    add("-p", "--prompt", "-prompt", dest="prompt_flag", metavar="TEXT", help="the prompt")
    add("-f", "--file", metavar="FILE", help="read the prompt from a file")
    add("--grammar-file", metavar="FILE", help="read the grammar from a file")
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
    request = arguments(settings, parsed)
    prompt = None if is_conversation(parsed) else read_prompt(parsed, sys.stdin)
    check(submit(0, prompt or "", None, request))  # told before anything is started
    if parsed.connect is not None:
        status, _ = uvloop.run(_run(settings, parsed, prompt, request))
        return status
    files = with_files(settings, fetch=parsed.pull)
    known = search.kept(files) is not None  # else it is explained now, before the answer
    settings = with_some_draft(search.prepared(files, tell))
    status, report = uvloop.run(_run(settings, parsed, prompt, request))
    if report and not status and parsed.output == "text" and not parsed.no_stats:
        advise(search.kept(files), report, parsed.chat and prompt == advice.QUESTION, not known)
    return status


def is_conversation(parsed: Any) -> bool:
    """Whether somebody sits at a terminal and has asked nothing yet, nor for what one answer has.

    Standard output must be the terminal, too: whoever sends it elsewhere wants one answer there.
    """
    is_asked = not (parsed.prompt is parsed.prompt_flag is parsed.file is None)
    for_one = parsed.output != "text" or parsed.baseline or parsed.trace is not None
    return not (is_asked or for_one) and all(
        stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)
    )


def advise(decision: Decision | None, report: Report, is_example: bool, explained: bool) -> None:
    """After an answer on which little was gained, tell what gains more on this machine."""
    if decision is None or is_example:
        return
    line = advice.afterwards(decision, report.speedup, own_command(), explained=explained)
    if line:
        tell(line)


def own_command() -> str:
    """How to call this program from the directory that the user is in."""
    program = sys.argv[0]
    if os.path.basename(program) != "outrider" or shutil.which("outrider"):
        return "outrider"
    return min(os.path.relpath(program), os.path.abspath(program), key=len)


def read_prompt(parsed: Any, stdin: TextIO | None) -> str:
    """The prompt from argument, `-p`, file or piped stdin, in that order. Raises OutriderError."""
    given, source = parsed.prompt, "the command line"
    if given is not None and re.fullmatch(r"\S+\.gguf", given):
        raise BadRequest(f"{given} looks like a model; say -m {given}", "prompt")
    text: str | None = parsed.prompt_flag if given is None else given
    try:
        if text is None and parsed.file is not None:
            source = parsed.file
            text = Path(source).read_bytes().decode("utf-8-sig")  # its line ends stay as they are
        elif text is None:
            source = "stdin"
            text = piped(stdin)
        text.encode()  # what is no text may come as surrogates, on the command line above all
    except OSError as exc:
        raise BadRequest(f"cannot read the prompt from {source}: {exc.strerror}") from None
    except UnicodeError:
        raise BadRequest(f"the prompt from {source} is not UTF-8 text") from None
    return text


def read_text(source: str, what: str) -> str:
    """The text of a file; its line ends stay as they are. Raises BadRequest."""
    try:
        return Path(source).read_bytes().decode("utf-8-sig")
    except OSError as exc:
        raise BadRequest(f"cannot read the {what} from {source}: {exc.strerror}", what) from None
    except UnicodeError:
        raise BadRequest(f"the {what} from {source} is not UTF-8 text", what) from None


def piped(stdin: TextIO | None) -> str:
    """What was piped in, byte for byte but for a mark of the byte order; else the default."""
    if stdin is None or stdin.isatty():
        return DEFAULT_PROMPT
    text = stdin.buffer.read().decode("utf-8-sig") if hasattr(stdin, "buffer") else stdin.read()
    if not text:
        tell(f"Standard input is empty, so the prompt is {DEFAULT_PROMPT!r}.")
    return text or DEFAULT_PROMPT


def arguments(settings: Settings, parsed: Any) -> dict[str, Any]:
    """What `AsyncClient.create_completion` is to be called with. Raises OutriderError."""
    sampling = asdict(settings.sampling)
    n_predict = sampling.pop("n_predict")
    seed = sampling.pop("seed")
    if parsed.verbose not in ("true", "false"):
        raise ConfigError(f"--verbose must be true or false, not {parsed.verbose!r}")
    names, breakers = sampling["samplers"], sampling["dry_sequence_breakers"]
    if parsed.grammar_file is not None:
        sampling["grammar"] = read_text(parsed.grammar_file, "grammar")
    return {
        **sampling,
        "logit_bias": dict(map(read_bias, sampling["logit_bias"])),
        "dry_sequence_breakers": read_breakers(breakers) if breakers else None,
        "samplers": None if names is None else list(filter(None, names.split(";"))),
        "max_tokens": DEFAULT_LENGTH if n_predict is None else n_predict,
        "seed": secrets.randbits(31) if seed < 0 else seed,
        "mode": settings.pipeline.mode,
        "n_draft": settings.draft.n_max,
        # a service that is up has lengths of its own: only what was given here replaces them
        "n_min": settings.draft.n_min or None,
        "p_min": settings.draft.p_min or None,
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


def read_breakers(texts: tuple[str, ...]) -> list[str]:
    """With `\\n`, `\\t` and the like read as in llama.cpp; "none" is no breaker at all."""
    escapes = {"n": "\n", "r": "\r", "t": "\t"}
    return [
        re.sub(r"\\([nrt\\'\"])", lambda found: escapes.get(found[1], found[1]), text)
        for text in texts
        if text != "none"
    ]


async def _run(
    settings: Settings, parsed: Any, prompt: str | None, request: dict[str, Any]
) -> tuple[int, Report | None]:
    """The exit status, and the statistics of the answer if one was printed.

    Without a prompt it is a conversation.
    """
    interrupts = Interrupts()
    report = None
    try:
        async with AsyncExitStack() as stack:
            client = await _client(stack, settings, parsed, request)
            if prompt is None:
                await _converse(client, settings, parsed, request, interrupts)
            else:
                printer = Printer(client, parsed, settings.terminal)
                report = await _answer(client, parsed, prompt, request, printer, interrupts)
    except asyncio.CancelledError:
        if not interrupts.status:
            raise
    return interrupts.status, report


async def _client(
    stack: AsyncExitStack, settings: Settings, parsed: Any, request: dict[str, Any]
) -> AsyncClient:
    """A client of the pipeline that is named, else of one that lives as long as `stack`."""
    name = parsed.connect
    if name is None:
        name = f"run-{secrets.token_hex(4)}"
        request["mode"] = settings.pipeline.mode
        await _start(stack, _impatient(settings), name)
    return await stack.enter_async_context(connect(name, **reach(settings.links, name)))


def _impatient(settings: Settings) -> Settings:
    """Nobody waits longer for a target that is to come from elsewhere than for one from here."""
    if settings.target.place == "spawn":
        return settings
    wait_s = min(settings.coordinator.resume_s, settings.pipeline.ready_timeout_s)
    return replace(settings, coordinator=replace(settings.coordinator, resume_s=wait_s))


async def _converse(
    client: AsyncClient,
    settings: Settings,
    parsed: Any,
    request: dict[str, Any],
    interrupts: Interrupts,
) -> None:
    from outrider_services.commands import chat, editor  # they take a tenth of a second to load

    sampling = settings.sampling  # by default an answer is as long as it is, with a seed of its own
    seed = None if sampling.seed < 0 else sampling.seed
    request = {**request, "max_tokens": sampling.n_predict, "seed": seed}
    new_printer = partial(Printer, client, parsed, settings.terminal)
    talk = chat.Chat(client, request, new_printer, interrupts, stats=not parsed.no_stats)
    known = editor.history(keeps=settings.terminal.history)
    await talk.run(editor.reader(known, talk.commands))


async def _answer(
    client: AsyncClient,
    parsed: Any,
    prompt: str,
    request: dict[str, Any],
    printer: Printer,
    interrupts: Interrupts,
) -> Report:
    printer.legend()
    result = await _generate(client, prompt, request, parsed.chat, printer, interrupts)
    report = result.stats
    if parsed.baseline and result.choices[0].finish_reason != "cancelled":
        alone = await _ask(client, prompt, {**request, "mode": "plain"}, parsed.chat)
        report = measured(report, (await alone.result()).stats)
    if parsed.trace:
        await printer.trace(parsed.trace, result.trace or ())
    await printer.result(result, report)
    return report


async def _start(stack: AsyncExitStack, settings: Settings, name: str) -> None:
    """A private pipeline, for as long as `stack` lives; its caches hold one answer."""
    settings = replace(
        settings,
        pipeline=replace(settings.pipeline, parallel=1),
        server=replace(settings.server, allow_grammar=True),
    )
    news = News(as_json=settings.log.format == "json")
    with news:
        launcher = Launcher(settings, name, news.report, news.log, draft=has_draft(settings))
        await stack.enter_async_context(launcher)


async def _ask(client: AsyncClient, prompt: str, request: dict[str, Any], chat: bool) -> Stream:
    stream: Stream
    if chat:
        messages: list[ChatMessage] = [{"role": "user", "content": prompt}]
        stream = await client.create_chat_completion(messages, stream=True, **request)
    else:
        stream = await client.create_completion(prompt, stream=True, **request)
    return stream


async def _generate(
    client: AsyncClient,
    prompt: str,
    request: dict[str, Any],
    chat: bool,
    printer: Printer,
    interrupts: Interrupts,
) -> Completion:
    stream = await _ask(client, prompt, request, chat)
    interrupts.begin(stream, printer)
    async for fragment in stream:
        await printer.fragment(fragment)
    return await stream.result()
