"""What a coordinator tells of itself: for `outrider ps` and `top`, and whoever watches over it."""

from __future__ import annotations

from itertools import islice
from typing import Any

import outrider
from outrider_services.pipeline.metrics import Metrics
from outrider_services.pipeline.requests import Request, Requests
from outrider_services.pipeline.roster import Roster

MOST_SLOTS = 64  # requests that are told one by one


def report(
    roster: Roster, requests: Requests, metrics: Metrics, *, stopping: bool, **more: Any
) -> dict[str, Any]:
    """Its state, with `more`; the "status" is "ok" while requests can be served."""
    workers = roster.report()
    return {
        "status": "stopping" if stopping else "ok" if "target" in workers else "loading",
        "version": outrider.__version__,
        **more,
        "workers": {
            role: {**told, **metrics.meters[role].recently()} for role, told in workers.items()
        },
        "restarts": dict(metrics.restarts),
        "refused": dict(roster.refusals),
        "requests": {"running": len(requests.running), "waiting": len(requests.waiting)},
        "slots": {
            str(request.number): _slot(request)
            for request in islice(requests.running.values(), MOST_SLOTS)
        },
    }


def _slot(request: Request) -> dict[str, Any]:
    """A running request, without anybody's text."""
    session = request.session
    if session is None:
        return {"phase": "new", "prompt_tokens": len(request.tokens)}
    report = session.stats.report()
    is_reading = session.stats.prefilled is None
    return {
        "phase": "reading" if is_reading else session.phase.name.lower(),
        "prompt_tokens": len(request.tokens),
        "generated_tokens": report.generated_tokens,
        "tokens_per_s": report.tokens_per_s,
        "acceptance_rate": report.acceptance_rate,
        "mode": report.mode,
    }
