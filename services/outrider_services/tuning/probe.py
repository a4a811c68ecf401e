"""What one model costs and says, measured in a process of its own: `outrider measure JOB`.

The process that asks never loads a model, so a crash of llama.cpp cannot take it along. Each
measurement is made with the threads and cores that the worker would have.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outrider.core.values import TokenId
from outrider.engines.calibration import calibrate
from outrider.errors import (
    IncompatiblePair,
    InternalError,
    OutriderError,
    RequestTimeout,
    WorkerLost,
    from_code,
)
from outrider_services import options

if TYPE_CHECKING:
    from outrider.engines.llama.engine import LlamaEngine

CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Job:
    """What to do with one model: make it from `source`, if `kind` is given; load it and measure, if
    `rows` are given.
    """

    model: str
    threads: int
    cores: str = ""
    gpu_layers: int = 0
    exact: bool = False
    drafts: bool = False
    source: str = ""  # the file that `model` is made from
    kind: str = ""  # the type of `model`, such as "q4_0"
    rows: tuple[int, ...] = ()  # of the passes whose seconds are asked for
    repeats: int = 1  # of these measurements
    texts: tuple[tuple[str, str], ...] = ()  # prompts and answers to be made tokens
    # the same as tokens, and how many of them, at the end, are the answer
    sequences: tuple[tuple[tuple[TokenId, ...], int], ...] = ()
    chooses: bool = True  # whether the model is to say which tokens it would have chosen


@dataclass(frozen=True, slots=True)
class Findings:
    """What was asked for; the rest is empty."""

    curve_s: tuple[float, ...] = ()  # of a pass over 1, 2, 3 … rows
    sequences: tuple[tuple[tuple[TokenId, ...], int], ...] = ()
    choices: tuple[TokenId, ...] = ()  # the likeliest token at each place of each answer


# ---- here ---------------------------------------------------------------------------------------


def ask(job: Job, limit_s: float) -> Findings:
    """Have `job` done by a process of its own, which never outlives this call.

    Raises OutriderError; RequestTimeout after `limit_s`.
    """
    if limit_s <= 0:
        raise RequestTimeout("there was no time left to measure")
    reading, writing = os.pipe()
    command = [sys.executable, "-m", "outrider_services", "measure"]
    try:
        done = subprocess.run(
            [*command, f"--parent-fd={reading}", json.dumps(asdict(job))],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=limit_s,
            pass_fds=(reading,),
            start_new_session=True,  # Ctrl-C reaches only us, and we end it
        )
    except subprocess.TimeoutExpired:
        raise RequestTimeout(f"measuring took more than {limit_s:.0f} s") from None
    finally:
        os.close(reading)
        os.close(writing)
    return read_answer(done.stdout, done.returncode)


def read_answer(out: bytes, status: int) -> Findings:
    """What the process said in its last line. Raises OutriderError."""
    try:
        state, *rest = json.loads(out.splitlines()[-1])
        if state == "error":
            raise from_code(*rest)
        found = rest[0]
        return Findings(
            tuple(found["curve_s"]),
            tuple((tuple(tokens), answers) for tokens, answers in found["sequences"]),
            tuple(found["choices"]),
        )
    except (ValueError, LookupError, TypeError):
        raise WorkerLost(f"the measuring process ended with status {status}") from None


# ---- in the child -------------------------------------------------------------------------------


def answer(text: str, parent_fd: int | None) -> int:
    """Do the job in `text` and say what was found, as one line of JSON."""
    given = json.loads(text)
    for name in ("rows", "texts", "sequences"):
        given[name] = tuple(given[name])
    job = Job(**given)
    if parent_fd is not None:
        threading.Thread(target=_end_with, args=(parent_fd, job), daemon=True).start()
    try:
        said: list[Any] = ["done", asdict(work(job))]
    except OutriderError as exc:
        said = ["error", exc.code, str(exc)]
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


def _end_with(parent_fd: int, job: Job) -> None:
    """Wait until the parent is gone; then remove what is unfinished, and exit.

    Exit is all that there is: llama.cpp cannot be interrupted.
    """
    from outrider.engines.llama.quantise import partial

    with contextlib.suppress(OSError):
        os.read(parent_fd, 1)
    if job.kind:
        partial(Path(job.model)).unlink(missing_ok=True)
    os._exit(InternalError.exit_code)


def work(job: Job) -> Findings:
    """Make the model, load it, measure. Raises OutriderError."""
    from outrider.engines.llama.engine import LlamaEngine, LlamaSettings
    from outrider.engines.llama.quantise import requantise

    allowed = len(os.sched_getaffinity(0))
    if job.kind:
        requantise(Path(job.source), Path(job.model), job.kind, allowed)
    if not job.rows:
        return Findings()
    if cores := options.cores(job.cores):
        os.sched_setaffinity(0, cores)
    settings = LlamaSettings(
        context=CONTEXT,
        slots=1,
        threads=min(job.threads, len(os.sched_getaffinity(0))),
        gpu_layers=job.gpu_layers,
        exact=job.exact,
        drafts=job.drafts,
    )
    engine = LlamaEngine.load(Path(job.model), settings)
    try:
        # whatever disturbs a measurement makes it longer, so the shortest is the truest
        curves = [calibrate(engine, job.rows) for _ in range(job.repeats)]
        sequences = job.sequences or tuple(_tokens(engine, *text) for text in job.texts)
        choices = [_choices(engine, *one) for one in sequences] if job.chooses else []
    finally:
        engine.close()
    curve_s = tuple(map(min, zip(*curves, strict=True)))
    return Findings(curve_s, sequences, tuple(token for some in choices for token in some))


def _tokens(engine: LlamaEngine, prompt: str, answer: str) -> tuple[tuple[TokenId, ...], int]:
    """The tokens of prompt and answer, and how many of them are the answer's."""
    try:
        before = engine.render([("user", prompt)])
    except OutriderError:
        before = prompt + "\n\n"  # a model that was not made for conversations
    start = len(engine.tokenize(before, special=True))
    tokens = engine.tokenize(before + answer, special=True)[: engine.info.chunk]
    return tuple(tokens), max(len(tokens) - start, 1)


def _choices(engine: LlamaEngine, tokens: tuple[TokenId, ...], answers: int) -> list[TokenId]:
    """The token that the model finds likeliest at each place of the answer, given all before it."""
    try:
        scores = engine.extend(0, tokens[:-1], answers)
    except ValueError as exc:  # the ids are another model's
        raise IncompatiblePair(f"the draft does not speak the target's tokens: {exc}") from None
    chosen = [int(token) for token in scores.argmax(axis=1)]
    engine.rewind(0, 0)
    return chosen
