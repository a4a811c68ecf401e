"""What the user is told of a decision, and after an answer, from figures that were measured."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from outrider.engines import processor
from outrider.engines.llama import library
from outrider_services.tuning import advice, decisions, forecasts
from outrider_services.tuning.decisions import Decision, Trial, Variant

STEP_S = 0.05
FLAT = tuple(STEP_S * (1 + 0.05 * more) for more in range(8))
STEEP = tuple(STEP_S * (1 + 0.80 * more) for more in range(8))
MIDDLING = tuple(STEP_S * (1 + 0.35 * more) for more in range(8))
TEXTS = {"code": 0.93, "explanation": 0.65, "prose": 0.55}
AVERAGE = 0.71


@pytest.fixture(autouse=True)
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "built_by_gcc", lambda: False)


def decision(
    curve_s: tuple[float, ...], draft: float, quant: str = "q4_0", *, pipelined: bool = False
) -> Decision:
    """Two drafts, of which the one as given costs twice as much; `draft` in plain steps."""
    found = []
    for kind, cost in (("off", 2 * draft), ("q4_0", draft)):
        rate = forecasts.rate(curve_s, cost * STEP_S, TEXTS.values(), pipelined)
        found.append(Variant(kind, 10**8, cost * STEP_S, AVERAGE, rate, TEXTS))
    plain = forecasts.plain_rate(curve_s)
    return Decision(quant, trials=(Trial("", "", pipelined, plain, tuple(found), curve_s),))


PAYING = decision(FLAT, 0.1)
USELESS = decision(STEEP, 0.4, "off")
FOR_CODE = decision(MIDDLING, 0.25)


def number_in(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found, text
    return float(found[1])


# ---- before the answer --------------------------------------------------------------------------


def test_a_draft_that_pays_is_one_sentence_with_what_to_expect_of_each_text() -> None:
    told = advice.described(PAYING)
    assert told.startswith("Draft: re-quantised to q4_0, 5.0 ms a token instead of 10.0; expect ")
    code, prose = (number_in(rf"{name} ([\d.]+)x", told) for name in ("code", "prose"))
    assert code > prose > 1.1
    assert "\n" not in told


def test_a_draft_that_does_not_pay_is_explained_by_what_was_measured() -> None:
    first, costs, needs = advice.described(USELESS).splitlines()
    assert (
        first
        == "Draft: used as given, no other type is faster here; expect 1.0x the target "
        + ("alone.")
    )
    assert costs.startswith("A draft does not pay on this processor. A plain step of the target ")
    for fact in ("50 ms", "over 4 rows costs 3.4", "(q4_0) 0.40", "71% of its tokens"):
        assert fact in costs
    assert number_in(r"gives ([\d.]+)x", costs) < 1
    assert "instead of 0.80" in needs


def test_a_draft_that_pays_on_code_alone_is_told_so() -> None:
    first, costs, *_ = advice.described(FOR_CODE).splitlines()
    assert number_in(r"code ([\d.]+)x", first) > number_in(r"prose ([\d.]+)x", first)
    assert costs.startswith("A draft pays on code alone on this processor.")


def test_what_it_would_take_is_enough_and_no_more() -> None:
    trial, best = FOR_CODE.chosen()
    row = forecasts.row_for(1.2, trial, best)
    draft = forecasts.draft_for(1.2, trial, best)
    accepted = forecasts.acceptance_for(1.2, trial, best)
    assert row is not None
    assert accepted is not None
    assert 0 < row < 0.35
    for found, reaches in ((0.99 * row, True), (1.05 * row, False)):
        curve_s = tuple(STEP_S * (1 + found * more) for more in range(8))
        rate = forecasts.rate(curve_s, best.draft_s, TEXTS.values(), False)
        assert (rate >= 1.2 * trial.plain_rate) is reaches
    for found, reaches in ((accepted + 0.01, True), (accepted - 0.01, False)):
        rate = forecasts.rate(trial.curve_s, best.draft_s, [found], False)
        assert (rate >= 1.2 * trial.plain_rate) is reaches
    assert draft is None or draft < 0.25


def test_where_nothing_alone_is_enough_that_is_said() -> None:
    assert "No better draft, cheaper draft or cheaper row" in advice.described(decision(STEEP, 1.5))


def test_a_device_of_its_own_is_named_only_where_it_would_help() -> None:
    apart = "With the draft on a device of its own"
    assert apart in advice.described(decision(MIDDLING, 0.4))
    assert apart not in advice.described(USELESS)
    assert apart not in advice.described(decision(STEEP, 0.4, pipelined=True))


def test_another_compiler_is_named_only_where_it_was_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    instructions = {"fpu", "avx2"}
    monkeypatch.setattr(processor, "instructions", lambda: instructions)
    assert "clang" not in advice.described(USELESS)
    monkeypatch.setattr(library, "built_by_gcc", lambda: True)
    assert "built by gcc here" in advice.described(USELESS)
    assert "clang" not in advice.described(PAYING)
    instructions.add("amx_int8")
    assert "clang" not in advice.described(USELESS)


def test_what_turns_cost_is_told_where_they_are_taken() -> None:
    trial = replace(USELESS.trials[0], turns=(1.07, 1.32))
    told = advice.turns(trial)
    assert "a pass costs 1.07 times" in told
    assert "token 1.32 times" in told
    assert "times" not in advice.turns(replace(trial, pipelined=True))


def test_the_build_that_was_measured_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    (tmp_path / "libggml-cpu.so").touch()
    monkeypatch.setattr(decisions, "version", lambda package: "1.2.3")
    unknown = "llama.cpp of llama-cpp-python 1.2.3, built by an unknown compiler"
    assert advice.build() == unknown
    (tmp_path / "built-by.txt").write_text("clang version 22.0.0\n")
    assert advice.build() == unknown.replace("an unknown compiler", "clang version 22.0.0")
    monkeypatch.setattr(decisions, "version", lambda package: "")
    assert advice.build().startswith("llama.cpp of llama-cpp-python (unknown), built by clang")


def test_without_a_trial_only_the_choice_is_told() -> None:
    assert advice.described(Decision("off")) == "Draft: used as given."


# ---- after the answer ---------------------------------------------------------------------------


def test_after_little_gain_a_text_is_named_that_gains_more() -> None:
    for found in (PAYING, FOR_CODE):
        line = advice.afterwards(found, 1.02, "bin/outrider", explained=True)
        assert line is not None
        assert f'bin/outrider run --chat "{advice.QUESTION}"' in line
        expected = forecasts.gains(*found.chosen())["code"]
        assert number_in(r"about ([\d.]+)x", line) == pytest.approx(expected, abs=0.051)
        assert expected > 1.15


def test_where_not_even_code_gains_that_is_said_once() -> None:
    line = advice.afterwards(USELESS, 0.98, "outrider", explained=False)
    assert line is not None
    assert "--chat" not in line
    assert "expect 1.00x" in line
    assert advice.afterwards(USELESS, 0.98, "outrider", explained=True) is None


@pytest.mark.parametrize("gained", [None, 1.15, 2.0], ids=["unknown", "enough", "much"])
def test_after_a_gain_nothing_is_said(gained: float | None) -> None:
    for found in (PAYING, USELESS, Decision("off")):
        assert advice.afterwards(found, gained, "outrider", explained=False) is None


def test_of_a_draft_that_was_not_measured_nothing_is_said() -> None:
    assert advice.afterwards(Decision("off"), 0.9, "outrider", explained=False) is None


# ---- the library --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "by_gcc"),
    [
        (b"\0GCC: (Debian 12.2.0-14) 12.2.0\0", True),
        (b"\0GCC: (Debian 12.2.0-14) 12.2.0\0Debian clang version 19.1.7\0", False),
        (b"\0clang version 22.0.0\0", False),
        (b"", False),
    ],
    ids=["gcc", "clang-with-start-up-code-of-gcc", "clang", "unsigned"],
)
def test_the_compiler_is_read_from_the_library(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: bytes, by_gcc: bool
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    assert not library.built_by_gcc()
    (tmp_path / "libggml-cpu.so").write_bytes(code)
    assert library.built_by_gcc() is by_gcc
