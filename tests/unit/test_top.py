"""What `outrider top` makes of what a pipeline tells."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from outrider_services.commands.top import BAR, Look, bar, compare, duration, screen


def worker(role: str, model: str, busy: float, passes_per_s: float) -> dict[str, Any]:
    told = {"role": role, "model": model, "device": "cpu"}
    return {**told, "busy": busy, "passes_per_s": passes_per_s}


HEALTH: dict[str, Any] = {
    "status": "ok",
    "mode": "pipelined",
    "uptime_s": 3725.4,
    "workers": {
        "draft": worker("draft", "small", 0.5, 300.0) | {"requests": 2, "worth": 91.25},
        "draft-2": worker("draft", "small", 0.0, 0.0) | {"requests": 0, "link_s": 0.0123},
        "target": worker("target", "[red]big\x1b[2J", 1.0, 40.0),
    },
    "requests": {"running": 2, "waiting": 1},
    "slots": {
        "7": {
            "phase": "verifying",
            "prompt_tokens": 12,
            "generated_tokens": 90,
            "tokens_per_s": 45.25,
            "acceptance_rate": 0.625,
            "mode": "pipelined",
        },
        "8": {"phase": "new", "prompt_tokens": 9},
    },
}


def look(at: float, generated: int, **changes: Any) -> Look:
    metrics = {
        "generation_tokens_total": generated,
        "prompt_tokens_total": 21,
        "spec_decode_num_draft_tokens_total": 100,
        "spec_decode_num_accepted_tokens_total": 60,
    }
    return Look(at, {**HEALTH, **changes}, metrics)


def shown(picture: dict[str, Any]) -> str:
    out = io.StringIO()
    Console(file=out, width=120).print(screen(picture))
    return out.getvalue()


def test_rates_are_those_between_two_looks() -> None:
    picture = compare("here", look(10.0, 500), look(12.0, 600))
    assert (picture["tokens_per_s"], picture["acceptance_rate"]) == (50.0, 0.6)
    assert compare("here", look(10.0, 500), look(10.0, 500))["tokens_per_s"] == 0.0


def test_the_target_comes_first_and_requests_in_their_order() -> None:
    lines = [line.split() for line in shown(compare("here", look(1, 0), look(2, 80))).splitlines()]
    firsts = [line[0] for line in lines if line]
    assert firsts == ["here:", "2", "lane", "target", "draft", "draft-2", "request", "7", "8"]
    assert " ".join(lines[5]).endswith("300.0 2 91.2 tokens/s - small cpu")
    assert " ".join(lines[6]).endswith("0.0 0 - 12.3 ms small cpu")
    assert lines[-2] == ["7", "verifying", "pipelined", "12", "90", "45.2", "62%"]
    assert lines[-1] == ["8", "new", "9", "0", "-", "-"]


def test_what_a_worker_calls_itself_moves_no_cursor_and_is_no_markup() -> None:
    text = shown(compare("here", look(1, 0), look(2, 80)))
    assert "[red]big?[2J" in text
    assert "\x1b" not in text


def test_a_pipeline_without_workers_is_shown_too() -> None:
    told = look(1, 0, status="loading", workers={}, slots={}, requests={"running": 0, "waiting": 0})
    text = shown(compare("here", told, told))
    assert "here: loading" in text
    assert "target" not in text


@pytest.mark.parametrize(
    ("share", "drawn"),
    [(0.0, ""), (0.5, "█" * 10), (1.0, "█" * BAR), (1 / (8 * BAR), "▏"), (1.125 / BAR, "█▏")],
)
def test_a_bar_is_as_long_as_its_share(share: float, drawn: str) -> None:
    assert bar(share) == drawn.ljust(BAR)


def test_long_times_are_in_hours() -> None:
    assert [duration(s) for s in (0.9, 61, 3725.4, 360_000)] == [
        *["0:00:00", "0:01:01", "1:02:05", "100:00:00"]
    ]
