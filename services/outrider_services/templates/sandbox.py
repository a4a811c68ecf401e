"""The process in which chat templates run: a template comes with a model, and nobody has read it.

Each line on stdin is a question, each on stdout its answer, both JSON. No template gets at anything
but what the question gives it. One that takes more time or memory than it may have ends the
process; so do the end of stdin and of whoever started it. It imports Jinja and nothing of ours.

The environment is the one of Hugging Face's `apply_chat_template`, for which templates are written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Environment, Template, TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 1.0  # of computing that a question may take
MEMORY = 64 << 20  # bytes that the process may grow by
LONGEST = 1 << 20  # letters of a template
PR_SET_PDEATHSIG = 1


class Refusal(TemplateError):
    """What the template itself says of a conversation that it cannot take."""


class Generation(Extension):
    """`{% generation %}` marks what the assistant says, for training: here it does nothing."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: object) -> None:
    raise Refusal(str(message))


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for a page of HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)  # fmt: skip


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def environment() -> Environment:
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    made.filters["tojson"] = tojson
    made.globals.update(raise_exception=refuse, strftime_now=strftime_now)
    return made


ENVIRONMENT = environment()


@functools.lru_cache(maxsize=4)
def compiled(source: str) -> Template:
    if len(source) > LONGEST:
        raise Refusal(f"it has {len(source)} letters, more than {LONGEST}")
    return ENVIRONMENT.from_string(source)


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """The text, none without variables if the template compiles; or an error.

    `most` is how many letters the text may have.
    """
    try:
        template = compiled(question["source"])
        if question["variables"] is None:
            return {"text": ""}
        parts, room = [], question["most"]
        for part in template.generate(**question["variables"]):
            room -= len(part)
            if room < 0:
                raise Refusal(f"the text would have more than {question['most']} letters")
            parts.append(part)
        return {"text": "".join(parts)}
    except Refusal as exc:
        return {"error": f"{exc!s:.300}"}
    except MemoryError:
        return {"error": f"it takes more than {MEMORY >> 20} MiB"}
    except Exception as exc:  # whatever a template brings about
        return {"error": f"{type(exc).__name__}: {exc!s:.300}"}


def bound() -> None:
    """Let the kernel end this process where a template goes too far, or nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asks
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main() -> None:
    bound()
    for line in sys.stdin.buffer:
        # its signal ends the process, even in the midst of a long multiplication
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        said = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(said + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # nobody waits for the answer any more
        main()
