"""What a coordinator tells of itself: for `outrider ps` and `top`, and whoever watches over it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import outrider
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.pairs import Pairs
from outrider_services.pipeline.requests import Request, Requests
from outrider_services.pipeline.roster import Roster

MOST_SLOTS = 64  # requests that are told one by one


def report(
    roster: Roster,
    requests: Requests,
    metrics: Metrics,
    pairs: Pairs,
    *,
    stopping: bool,
    **more: Any,
) -> dict[str, Any]:
    """Its state, with `more`; the "status" is "ok" while requests can be served."""
    first = [next(iter(roster.of(role)), None) for role in ("target", "draft")]
    return {
        "status": "stopping" if stopping else "ok" if first[0] else "loading",
        "version": outrider.__version__,
        "mode": pairs.mode(None, *first),
        "auto": pairs.mode("auto", *first),
        **more,
        "workers": {
            name: {**told, **metrics.meters[name].recently()}
            for name, told in _workers(roster, requests, pairs).items()
        },
        "costs": roster.costs(),
        "restarts": dict(metrics.restarts),
        "refused": dict(roster.refusals),
        "requests": {"running": len(requests.running), "waiting": len(requests.waiting)},
        "slots": {
            str(request.number): _slot(request)
            for request in islice(requests.running.values(), MOST_SLOTS)
        },
    }


def _workers(roster: Roster, requests: Requests, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """The workers by name, with what they have to do; of a draft also what it is worth."""
    told = roster.report()
    for member in roster.members:
        told[member.name]["requests"] = len(requests.of(member))
        if member.role == "draft":
            told[member.name]["worth"] = pairs.worth(member)
    return told


def _slot(request: Request) -> dict[str, Any]:
    """A running request, without anybody's text."""
    session = request.session
    if session is None:
        return {"phase": "new", "prompt_tokens": len(request.tokens), **_served_by(request)}
    report = session.stats.report()
    is_reading = session.stats.prefilled is None
    return {
        "phase": "reading" if is_reading else session.phase.name.lower(),
        "prompt_tokens": len(request.tokens),
        "generated_tokens": report.generated_tokens,
        "tokens_per_s": report.tokens_per_s,
        "acceptance_rate": report.acceptance_rate,
        "mode": report.mode,
        **_served_by(request),
    }


def _served_by(request: Request) -> dict[str, str | None]:
    """The names of its workers."""
    members = {"target": request.target, "draft": request.draft}
    return {role: member.name if member else None for role, member in members.items()}
