"""Made-up devices: the ideal that virtual time gives, and what is asked for."""

from __future__ import annotations

from dataclasses import replace

import pytest

from outrider.errors import ConfigError
from outrider_services.bench.simulated import ideal, read_numbers
from outrider_services.table import Settings, ToyOptions


def test_the_ideal_stays_within_its_limits_and_grows_with_the_draft() -> None:
    found = []
    for agreement in (0.5, 0.8, 0.95):
        toy = ToyOptions(agreement=agreement, step_ms=20.0, draft_ms=2.0)
        found.append(ideal(replace(Settings(), toy=toy), 200))
        assert 1.0 <= found[-1] <= min(1 / (1 - agreement) * 1.3, 20 / 2 + 1)
    assert found == sorted(found)


@pytest.mark.parametrize("text", ["", "a", "0", "1", "0.5,,0.6", "0.5,nan", "-0.1"])
def test_numbers_that_cannot_be_simulated_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--acceptance"):
        read_numbers("--acceptance", text, 1)
    assert read_numbers("--acceptance", "0.5,0.9", 1) == (0.5, 0.9)
