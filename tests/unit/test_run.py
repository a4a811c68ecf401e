"""`outrider run` without a pipeline: its prompt, its statistics, and the line behind them."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from outrider.client.settings import submit
from outrider.core.stats import Report, Stats
from outrider.core.values import Span
from outrider.errors import BadRequest, ConfigError
from outrider_services.commands import run
from outrider_services.commands.printing import chrome_trace, measured, statistics, write_trace
from outrider_services.table import DraftOptions, PipelineOptions, SamplingOptions, Settings
from outrider_services.tuning import advice
from outrider_services.tuning.decisions import Decision


def flags(**given: Any) -> Namespace:
    return Namespace(**{"prompt": None, "prompt_flag": None, "file": None, **given})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


# ---- the prompt ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "stdin", "expected"),
    [
        ({"prompt": "a", "prompt_flag": "b"}, io.StringIO("c"), "a"),
        ({"prompt_flag": "b"}, io.StringIO("c"), "b"),
        ({"prompt_flag": ""}, io.StringIO("c"), ""),
        ({}, io.StringIO("c"), "c"),
        ({}, io.StringIO(""), run.DEFAULT_PROMPT),
        ({}, Terminal("never read"), run.DEFAULT_PROMPT),
        ({}, None, run.DEFAULT_PROMPT),
    ],
    ids=["argument", "flag", "empty-flag", "stdin", "empty-stdin", "terminal", "no-stdin"],
)
def test_where_the_prompt_is_taken_from(given: dict[str, str], stdin: Any, expected: str) -> None:
    assert run.read_prompt(flags(**given), stdin) == expected


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"one\r\ntwo\n", "one\r\ntwo\n"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("\ufeff caf\xe9 \ufeff".encode(), " caf\xe9 \ufeff"),
    ],
    ids=["line-ends", "a-byte-order-mark", "only-the-first-mark"],
)
def test_a_prompt_from_a_file_or_a_pipe_is_taken_byte_for_byte(
    data: bytes, expected: str, tmp_path: Path
) -> None:
    (tmp_path / "prompt").write_bytes(data)
    assert run.read_prompt(flags(file=str(tmp_path / "prompt")), None) == expected
    assert run.read_prompt(flags(), io.TextIOWrapper(io.BytesIO(data))) == expected


@pytest.mark.parametrize(
    ("given", "stdin", "stdout", "expected"),
    [
        ({}, Terminal(), Terminal(), True),
        ({"prompt": ""}, Terminal(), Terminal(), False),
        ({"prompt_flag": ""}, Terminal(), Terminal(), False),
        ({"file": "f"}, Terminal(), Terminal(), False),
        ({"output": "json"}, Terminal(), Terminal(), False),
        ({"baseline": True}, Terminal(), Terminal(), False),
        ({"trace": "t"}, Terminal(), Terminal(), False),
        ({}, io.StringIO(), Terminal(), False),
        ({}, Terminal(), io.StringIO(), False),
        ({}, None, Terminal(), False),
    ],
)
def test_without_a_prompt_a_terminal_opens_a_conversation(
    given: dict[str, Any], stdin: Any, stdout: Any, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", stdin)
    monkeypatch.setattr("sys.stdout", stdout)
    one = {"output": "text", "baseline": False, "trace": None, **given}
    assert run.is_conversation(flags(**one)) is expected


def test_an_empty_standard_input_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.read_prompt(flags(), io.TextIOWrapper(io.BytesIO())) == run.DEFAULT_PROMPT
    assert f"Standard input is empty, so the prompt is {run.DEFAULT_PROMPT!r}." in (
        capsys.readouterr().err
    )


def test_a_sentence_about_a_model_file_is_a_prompt() -> None:
    sentence = "What is inside of model.gguf"
    assert run.read_prompt(flags(prompt=sentence), None) == sentence


def test_a_prompt_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for given, what in (
        ({"prompt": "model.gguf"}, "-m model.gguf"),
        ({"file": str(tmp_path / "none")}, "none: No such file"),
        ({"file": str(tmp_path / "latin")}, "latin is not UTF-8"),
        ({"prompt": "\udce9"}, "the command line is not UTF-8"),
    ):
        with pytest.raises(BadRequest, match=what):
            run.read_prompt(flags(**given), io.StringIO())


@pytest.mark.parametrize(
    ("text", "bias"),
    [("15043+1", (15043, 1.0)), ("15043-1.5", (15043, -1.5)), ("2-inf", (2, -1e6))],
)
def test_a_bias_is_a_token_and_what_is_added(text: str, bias: tuple[int, float]) -> None:
    assert run.read_bias(text) == bias
    for wrong in ("", "15043", "a+1", "1+a", "+1"):
        with pytest.raises(ConfigError, match="--logit-bias"):
            run.read_bias(wrong)


# ---- the statistics -----------------------------------------------------------------------------


def report(**values: Any) -> Report:
    return Stats("pipelined").report().changed(**values)


def test_the_block_tells_each_figure_and_what_is_unknown() -> None:
    found = report(
        seed=7,
        generated_tokens=60,
        accepted_tokens=38,
        truncated_tokens=2,
        corrections=7,
        bonuses=5,
        plain_tokens=12,
        acceptance_rate=0.63158,
        decode_s=0.514,
        speedup=2.339,
        speedup_kind="estimate",
    )
    lines = statistics(found).splitlines()
    assert lines[:3] == [
        "Mode: pipelined",
        "Seed: 7",
        "Total tokens generated: 60 (36 accepted, 7 corrected, 5 bonus, 12 plain)",
    ]
    assert "Acceptance rate: 63.16% (accepted / verified)" in lines
    assert "Mean accepted length: n/a" in lines
    assert "Generation time: 0.51s (prefill n/as apart)" in lines
    assert lines[-1] == "Speed-up vs target alone: ~2.34x (estimate)"


def test_a_measured_speed_up_replaces_the_estimate() -> None:
    found = measured(report(tokens_per_s=30.0, speedup=9.0), report(tokens_per_s=20.0))
    assert (found.speedup, found.speedup_kind) == (1.5, "measured")
    assert statistics(found).endswith("Speed-up vs target alone: 1.50x (measured)")
    unknown = report(tokens_per_s=30.0)
    assert measured(unknown, report(tokens_per_s=None)) is unknown


def test_a_trace_has_a_lane_for_each_worker_from_time_zero_in_microseconds(tmp_path: Path) -> None:
    target = Span("target", 5.0, 5.1, 4, 1, 11, (6, 7))
    draft = Span("draft", 5.05, 5.07, 1, 1, 11, (6,))
    events = chrome_trace((target, draft))["traceEvents"]
    assert [event["args"] for event in events[:2]] == [
        {"name": "target compute"},
        {"name": "draft compute"},
    ]
    assert [(e["tid"], e["name"], e["ts"], e["dur"]) for e in events[2:]] == [
        (1, "verify 4", 0.0, 100000.0),
        (2, "draft 1", 50000.0, 20000.0),
    ]
    with pytest.raises(ConfigError, match="cannot write the trace"):
        write_trace(str(tmp_path / "none" / "trace.json"), ())


# ---- the line behind them -----------------------------------------------------------------------


def test_the_program_is_called_as_it_can_be_from_here(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / ".venv" / "bin" / "outrider"
    monkeypatch.setattr("sys.argv", [str(program)])
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run.own_command() == ".venv/bin/outrider"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    assert run.own_command() == "outrider"
    monkeypatch.setattr("sys.argv", ["/somewhere/__main__.py"])
    assert run.own_command() == "outrider"


def test_the_line_is_told_unless_its_own_question_was_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def line(decision: Decision, gained: float | None, command: str, *, explained: bool) -> str:
        return f"{decision.quant} {gained} {command} {explained}"

    monkeypatch.setattr(advice, "afterwards", line)
    found = report(speedup=1.0)
    run.advise(Decision("q4_0"), found, is_example=False, explained=True)
    assert capsys.readouterr().err == "q4_0 1.0 outrider True\n"
    run.advise(Decision("q4_0"), found, is_example=True, explained=True)
    run.advise(None, found, is_example=False, explained=True)
    assert capsys.readouterr().err == ""


def test_only_lengths_that_are_given_replace_those_of_a_service() -> None:
    parsed = Namespace(verbose="false", trace=None, grammar_file=None)
    given = DraftOptions(n_max=8, n_min=2, p_min=0.5)
    for draft, expected in ((DraftOptions(), (None, None, None)), (given, (8, 2, 0.5))):
        asked = submit(0, "x", None, run.arguments(Settings(draft=draft), parsed))
        assert (asked.n_draft, asked.n_min, asked.p_min) == expected


# ---- the form of its answer ---------------------------------------------------------------------


def form(tmp_path: Path, **sampling: Any) -> Any:
    """What the answer has to be, by settings and a file with a grammar, if there is one."""
    file = tmp_path / "song.gbnf"
    parsed = Namespace(
        verbose="false", trace=None, grammar_file=str(file) if file.exists() else None
    )
    asked = run.arguments(Settings(sampling=SamplingOptions(**sampling)), parsed)
    return submit(0, "x", None, asked).constraint


def test_an_answer_may_be_held_to_a_schema_or_to_a_grammar(tmp_path: Path) -> None:
    assert form(tmp_path) is None
    assert form(tmp_path, json_schema='{"const": 1}').text == '{"const": 1}'
    assert form(tmp_path, grammar="root ::= [a]").text == "root ::= [a]"
    (tmp_path / "song.gbnf").write_text('root ::= "la"')
    assert form(tmp_path).text == 'root ::= "la"'
    with pytest.raises(BadRequest, match="cannot be asked for together"):
        form(tmp_path, json_schema="true")
    (tmp_path / "song.gbnf").write_bytes(b"\xff")
    with pytest.raises(BadRequest, match="is not UTF-8 text"):
        form(tmp_path)


def test_a_grammar_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"cannot read the grammar from .*none") as found:
        run.read_text(str(tmp_path / "none"), "grammar")
    assert found.value.param == "grammar"


# ---- its pipeline -------------------------------------------------------------------------------


async def test_its_pipeline_has_caches_for_one_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Settings] = []

    @asynccontextmanager
    async def launch(settings: Settings, *_: object, draft: bool) -> AsyncIterator[None]:
        started.append(settings)
        yield

    monkeypatch.setattr(run, "Launcher", launch)
    given = Settings(pipeline=PipelineOptions(backend="toy", mode="sync"))
    async with AsyncExitStack() as stack:
        await run._start(stack, given, "mine")
    assert given.pipeline.parallel > 1
    server = replace(given.server, allow_grammar=True)  # it is the user's own
    assert started == [replace(given, pipeline=replace(given.pipeline, parallel=1), server=server)]
