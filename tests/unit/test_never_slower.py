"""When a cell of `scripts/never-slower` has been measured often enough, and what is kept of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.bench import never_slower


@pytest.mark.parametrize(
    ("ratios", "is_settled", "ratio"),
    [
        ([1.2], False, 1.2),
        ([0.99, 1.3], True, 0.99),  # whatever the third is, the median is not lower
        ([0.97, 1.3], False, 0.97),
        ([0.97, 1.3, 0.96], True, 0.97),
        ([0.8, 1.3, 0.94], False, 0.94),  # too low, or was the machine busy?
        ([0.8, 1.3, 0.94, 1.0, 1.0, 1.0, 1.0, 1.0], False, 1.0),  # no stopping where it pleases
        ([0.8, 1.3, 0.94, 1.0, 1.0, 1.0, 1.0, 0.9, 0.9], True, 1.0),
    ],
)
def test_a_cell_is_settled_once_its_median_is_known(
    ratios: list[float], is_settled: bool, ratio: float
) -> None:
    cell = never_slower.cells(seed=0)[0]
    cell.ratios = ratios
    assert (cell.is_settled, cell.ratio) == (is_settled, ratio)


def test_what_was_recorded_is_not_measured_again(tmp_path: Path) -> None:
    record = tmp_path / "cells.jsonl"
    some = never_slower.cells(seed=1)
    record.write_text(
        "".join(json.dumps(["auto", str(cell), [1.0, 1.1]]) + "\n" for cell in some[:5])
    )
    every = never_slower.cells(seed=2)
    assert len(every) == len({str(cell) for cell in every}) == 324
    never_slower.recalled(every, "plain", record)
    assert not any(cell.ratios for cell in every), "a control is not what it controls"
    never_slower.recalled(every, "auto", record)
    assert {str(cell) for cell in every if cell.is_settled} == {str(cell) for cell in some[:5]}
