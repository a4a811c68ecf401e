"""What one model costs and says, measured in a process of its own: `outrider measure JOB`.

The process that asks never loads a model, so a crash of llama.cpp cannot take it along. Each
measurement is made with the threads and cores that the worker would have.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from outrider.core.values import TokenId
from outrider.engines.calibration import back_to, calibrate, calibrate_reading
from outrider.engines.llama.devices import ON_PROCESSOR, Offload
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

CONTEXT, READ = 512, 64  # tokens; so many are read at once to see what reading costs
MEASURE = (sys.executable, "-m", "outrider_services", "measure")
BLOCKS, TURN_ROUNDS, TURN_TEXT = (1, 3, 5), 2, 64  # drafted tokens in a turn; rounds; tokens before


@dataclass(frozen=True, slots=True)
class Job:
    """What to do with one model: make it from `source`, if `kind` is given; load it and measure, if
    `rows` are given.
    """

    model: str
    threads: int
    cores: str = ""
    offload: Offload = ON_PROCESSOR
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
    without: str = ""  # kernels to do without, see `options.kernels`
    turns: bool = False  # load, and then measure only what is asked for: see `in_turns`


@dataclass(frozen=True, slots=True)
class Findings:
    """What was asked for; the rest is empty."""

    curve_s: tuple[float, ...] = ()  # of a pass over 1, 2, 3 … rows
    sequences: tuple[tuple[tuple[TokenId, ...], int], ...] = ()
    choices: tuple[TokenId, ...] = ()  # the likeliest token at each place of each answer
    read_s: float = 0.0  # of a token that is only read


# ---- here ---------------------------------------------------------------------------------------


def ask(job: Job, limit_s: float) -> Findings:
    """Have `job` done by a process of its own, which never outlives this call.

    Raises OutriderError; RequestTimeout after `limit_s`.
    """
    if limit_s <= 0:
        raise RequestTimeout("there was no time left to measure")
    reading, writing = os.pipe()
    try:
        done = subprocess.run(
            [*MEASURE, f"--parent-fd={reading}", json.dumps(asdict(job))],
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


@dataclass(frozen=True, slots=True)
class Turns:
    """What working in turns on the same cores makes of costs: 1.1 for a tenth more."""

    passes: float = 1.0
    drafting: float = 1.0


def in_turns(target: Job, draft: Job, limit_s: float) -> Turns:
    """Have two processes compute in turns, as target and draft do, and alone, time after time.

    Raises OutriderError; RequestTimeout after `limit_s`.
    """
    late = threading.Event()
    with contextlib.ExitStack() as stack:
        pair = [stack.enter_context(Partner(replace(job, turns=True))) for job in (target, draft)]

        def give_up() -> None:
            late.set()
            for one in pair:
                one.process.kill()

        timer = threading.Timer(max(0.0, limit_s), give_up)
        timer.start()
        stack.callback(timer.cancel)
        try:
            return _compared(*pair)
        except (ValueError, OSError):
            pass
    if late.is_set():
        raise RequestTimeout(f"taking turns took more than {limit_s:.0f} s")
    raise WorkerLost("a process that was to take turns ended")


def _compared(target: Partner, draft: Partner) -> Turns:
    target.read(), draft.read()
    passes, drafting = [], []
    for _ in range(TURN_ROUNDS):
        for block in BLOCKS:
            drafted = [draft.took(1, block) for _ in range(2)]  # the first wakes its threads
            alone = [target.took(block + 1, 1) for _ in range(2)]
            turns = [(draft.took(1, block), target.took(block + 1, 1)) for _ in range(3)]
            drafting += [turn / drafted[1] for turn, _ in turns]
            passes += [turn / alone[1] for _, turn in turns]
    return Turns(statistics.median(passes), statistics.median(drafting))


class Ask(Protocol):
    """What measures; tests have another."""

    def __call__(self, job: Job, limit_s: float) -> Findings: ...
    def in_turns(self, target: Job, draft: Job, limit_s: float) -> Turns: ...


class Processes:
    """Measures in processes of their own: see `ask` and `in_turns`."""

    def __call__(self, job: Job, limit_s: float) -> Findings:
        return ask(job, limit_s)

    def in_turns(self, target: Job, draft: Job, limit_s: float) -> Turns:
        return in_turns(target, draft, limit_s)


PROBE = Processes()


class Partner:
    """A process that has loaded a model and measures what it is asked to."""

    def __init__(self, job: Job) -> None:
        self._reading, self._writing = os.pipe()
        self.process = subprocess.Popen(
            [*MEASURE, f"--parent-fd={self._reading}", json.dumps(asdict(job))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=(self._reading,),
            start_new_session=True,
            text=True,
        )

    def __enter__(self) -> Partner:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        os.close(self._reading)
        os.close(self._writing)

    def took(self, rows: int, passes: int) -> float:
        """Seconds of one of so many passes over so many rows.

        Raises ValueError, OSError; OutriderError if it says what went wrong.
        """
        self.ask(rows, passes)
        return self.read()

    def ask(self, rows: int, passes: int) -> None:
        """Have it begin; `read` waits for the answer. Raises OSError."""
        assert self.process.stdin
        self.process.stdin.write(f"{json.dumps([rows, passes])}\n")
        self.process.stdin.flush()

    def read(self) -> float:
        """Its next answer."""
        assert self.process.stdout
        said = json.loads(self.process.stdout.readline())
        match said:
            case ["error", str(code), str(reason)]:  # as `answer` tells it
                raise from_code(code, reason)
            case int() | float():
                return float(said)
        raise ValueError(f"not seconds: {said!r:.80}")


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
            float(found["read_s"]),
        )
    except (ValueError, LookupError, TypeError):
        raise WorkerLost(f"the measuring process ended with status {status}") from None


# ---- in the child -------------------------------------------------------------------------------


def answer(text: str, parent_fd: int | None) -> int:
    """Do the job in `text` and say what was found, as one line of JSON."""
    job = read_job(text)
    if parent_fd is not None:
        threading.Thread(target=_end_with, args=(parent_fd, job), daemon=True).start()
    try:
        said: list[Any] = ["done", asdict(work(job))]
    except OutriderError as exc:
        said = ["error", exc.code, str(exc)]
    sys.stdout.write(json.dumps(said) + "\n")
    return 0


def read_job(text: str) -> Job:
    """The job that `ask` has written."""
    given = json.loads(text)
    for name in ("rows", "texts", "sequences"):
        given[name] = tuple(given[name])
    layers, devices, split, main = given["offload"].values()
    given["offload"] = Offload(layers, tuple(devices), tuple(split), main)
    return Job(**given)


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
    if not (job.rows or job.turns):
        return Findings()
    if cores := options.cores(job.cores):
        os.sched_setaffinity(0, cores)
    without = options.kernels(job.without)
    settings = LlamaSettings(
        context=CONTEXT,
        slots=1,
        threads=min(job.threads, len(os.sched_getaffinity(0))),
        offload=job.offload,
        exact=job.exact,
        drafts=job.drafts,
        tiled="tiled" not in without,
        repack="repack" not in without,
        flash_attention="flash" not in without,
    )
    engine = LlamaEngine.load(Path(job.model), settings)
    try:
        if job.turns:
            _take_turns(engine)
            return Findings()
        # whatever disturbs a measurement makes it longer, so the shortest is the truest
        curves = [calibrate(engine, job.rows) for _ in range(job.repeats)]
        read_s = min(calibrate_reading(engine, READ, 0) for _ in range(job.repeats))
        sequences = job.sequences or tuple(_tokens(engine, *text) for text in job.texts)
        choices = [_choices(engine, *one) for one in sequences] if job.chooses else []
    finally:
        engine.close()
    curve_s = tuple(map(min, zip(*curves, strict=True)))
    chosen = tuple(token for some in choices for token in some)
    return Findings(curve_s, sequences, chosen, read_s)


def _take_turns(engine: LlamaEngine) -> None:
    """Read a text; then, as often as asked for, pass over so many rows behind it."""
    text: list[TokenId] = [min(5, engine.info.vocabulary.size - 1)] * TURN_TEXT
    engine.extend(0, text, 0)
    print(json.dumps(0), flush=True)  # noqa: T201
    for line in sys.stdin:
        rows, passes = json.loads(line)
        began = time.perf_counter()
        for _ in range(passes):
            engine.extend(0, text[:rows], rows)
        took_s = (time.perf_counter() - began) / passes
        back_to(engine, 0, text)
        print(json.dumps(took_s), flush=True)  # noqa: T201


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
