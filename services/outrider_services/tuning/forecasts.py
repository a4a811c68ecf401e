"""What may be expected of a draft, from what was measured of it and of its target.

A gain is how many times as fast as the target alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from outrider.core.estimates import Costs
from outrider.core.price import forecast
from outrider_services.tuning.decisions import Trial, Variant

LINK_S = 5e-4  # messages of a pass
BISECTIONS = 12
# of a usual request: tokens to read and to write, the cost of a drafted token, acceptances
USUAL_TOKENS, USUAL_DRAFT, USUAL_TEXTS = (100, 150), 0.25, (0.95, 0.85, 0.7)
MOST_ACCEPTED = 0.96  # a forecast takes no acceptance for higher

Curve = tuple[float, ...]  # seconds of a pass over 1, 2, 3 … rows


def plain_rate(curve_s: Curve) -> float:
    """Tokens per second of the target alone."""
    return 1 / (curve_s[0] + LINK_S)


def rate(curve_s: Curve, draft_s: float, acceptances: Iterable[float], pipelined: bool) -> float:
    """Tokens per second over texts of equal length, of which these shares are accepted."""
    costs = Costs(curve_s, draft_s, LINK_S)
    seconds = [1 / forecast(costs, acceptance, pipelined) for acceptance in acceptances]
    return len(seconds) / sum(seconds)


def usual_s(curve_s: Curve, read_s: float, pipelined: bool) -> float:
    """Seconds of a usual request, whatever the draft: what kernels are compared by."""
    usual = rate(curve_s, USUAL_DRAFT * curve_s[0], USUAL_TEXTS, pipelined)
    return USUAL_TOKENS[0] * read_s + USUAL_TOKENS[1] / usual


def gain(trial: Trial, one: Variant) -> float:
    """The gain that is expected over all texts."""
    return one.rate / trial.plain_rate


def gains(trial: Trial, one: Variant) -> dict[str, float]:
    """The gain that is expected on each text, by its name."""
    return {
        name: rate(trial.curve_s, one.draft_s, [accepted], trial.pipelined) / trial.plain_rate
        for name, accepted in one.accepted.items()
    }


def gain_apart(trial: Trial, one: Variant) -> float:
    """The gain, had the draft a device of its own that is as fast."""
    return rate(trial.curve_s, one.draft_s, one.accepted.values(), True) / trial.plain_rate


def gain_of_drafting(trial: Trial, one: Variant) -> float:
    """The gain, were tokens drafted before every pass; below 1 where plain steps are faster.

    For draft and target that take turns. Blocks are as long as suits each text best.
    """
    passes = Costs(trial.curve_s, one.draft_s, LINK_S).passes(len(trial.curve_s))
    seconds = 0.0  # of a token on each text
    for accepted in one.accepted.values():
        committed, best = 1.0, 0.0
        for drafted in range(1, len(trial.curve_s)):
            committed += accepted**drafted
            best = max(best, committed / (float(passes[drafted]) + drafted * one.draft_s))
        seconds += 1 / best
    return len(one.accepted) / seconds / trial.plain_rate


# ---- what a gain would take ---------------------------------------------------------------------


def acceptance_for(wanted: float, trial: Trial, one: Variant) -> float | None:
    """The least acceptance at which this gain is reached; None: none is enough."""

    def reaches(acceptance: float) -> bool:
        found = rate(trial.curve_s, one.draft_s, [acceptance], trial.pipelined)
        return found >= wanted * trial.plain_rate

    return _edge(reaches, MOST_ACCEPTED, 0.0)


def row_for(wanted: float, trial: Trial, one: Variant) -> float | None:
    """The most that each further row of a pass may cost, in plain steps; None: even 0 is much."""

    def reaches(row: float) -> bool:
        curve_s = tuple(trial.curve_s[0] * (1 + row * more) for more in range(len(trial.curve_s)))
        found = rate(curve_s, one.draft_s, one.accepted.values(), trial.pipelined)
        return found >= wanted * trial.plain_rate

    return _edge(reaches, 0.0, 1.0)


def draft_for(wanted: float, trial: Trial, one: Variant) -> float | None:
    """The most that a drafted token may cost, in plain steps; None: even next to 0 is much."""

    def reaches(cost: float) -> bool:
        draft_s = cost * trial.curve_s[0]
        found = rate(trial.curve_s, draft_s, one.accepted.values(), trial.pipelined)
        return found >= wanted * trial.plain_rate

    return _edge(reaches, 0.01, 1.0)


def _edge(holds: Callable[[float], bool], best: float, worst: float) -> float | None:
    """How far one may go from `best` towards `worst` while it `holds`; None: not even there."""
    if not holds(best):
        return None
    for _ in range(BISECTIONS):
        middle = (best + worst) / 2
        best, worst = (middle, worst) if holds(middle) else (best, middle)
    return best
