"""The limit of open files: raised as far as is sensible, and one sentence where that is too low."""

from __future__ import annotations

import resource

import pytest

from outrider.errors import ConfigError
from outrider_services.commands.descriptors import LEAST, MOST, raise_limit

ANY = resource.RLIM_INFINITY


class System:
    """Has a limit, and may refuse to change it."""

    def __init__(self, soft: int, hard: int, is_strict: bool = False) -> None:
        self.limits, self.is_strict = (soft, hard), is_strict

    def getrlimit(self, kind: int) -> tuple[int, int]:
        return self.limits

    def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        if self.is_strict:
            raise ValueError("not allowed to raise maximum limit")
        self.limits = limits


@pytest.mark.parametrize(
    ("soft", "hard", "raised"),
    [
        (24, 4096, 4096),
        (1024, LEAST, LEAST),
        (1024, 10**9, MOST),
        (1024, ANY, MOST),
        (10**6, 10**9, 10**6),
        (ANY, ANY, ANY),
        (LEAST, LEAST, LEAST),
    ],
)
def test_it_is_raised_as_far_as_the_system_allows_and_is_sensible(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, raised: int
) -> None:
    system = System(min(soft, hard) if hard != ANY else soft, hard)
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    raise_limit()
    assert system.limits == (raised, hard)


@pytest.mark.parametrize(
    ("system", "found"),
    [
        (System(24, 24), 24),
        (System(20, LEAST - 1), LEAST - 1),
        (System(20, 4096, is_strict=True), 20),
    ],
)
def test_too_low_a_limit_is_one_sentence_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, system: System, found: int
) -> None:
    monkeypatch.setattr(resource, "getrlimit", system.getrlimit)
    monkeypatch.setattr(resource, "setrlimit", system.setrlimit)
    with pytest.raises(ConfigError, match=rf"hold {found} .* needs {LEAST}: .*ulimit -n"):
        raise_limit()
