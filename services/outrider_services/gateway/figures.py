"""What answers say of how they were made: timings as llama.cpp names them, and our own figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from outrider.core.stats import Report
from outrider.core.values import Fragment, Span


def timings(report: Report, prompt_tokens: int) -> dict[str, Any]:
    """llama.cpp's `timings`: of the prompt, only what was read; drafted is what was verified."""
    found: dict[str, Any] = {
        "cache_n": report.cached_tokens,
        **_pace("prompt", prompt_tokens - report.cached_tokens, report.prefill_s),
        **_pace("predicted", report.generated_tokens, report.decode_s),
    }
    if report.verified_tokens:
        found["draft_n"] = report.verified_tokens
        found["draft_n_accepted"] = report.accepted_tokens
    return found


def _pace(name: str, count: int, seconds: float | None) -> dict[str, Any]:
    took_ms = 1000 * (seconds or 0.0)
    return {
        f"{name}_n": count,
        f"{name}_ms": took_ms,
        f"{name}_per_token_ms": took_ms / count if count else 0.0,
        f"{name}_per_second": 1000 * count / took_ms if took_ms else 0.0,
    }


def provenance(
    fragment: Fragment | None, spans: Sequence[Span], report: Report | None
) -> dict[str, Any]:
    """Where the tokens of a fragment come from, and what the workers did since the last one.

    Seconds are on the coordinator's clock; `number` is a round of the target's, a lineage of the
    draft's.
    """
    tokens = fragment.tokens if fragment else ()
    return {
        "tokens": [{"text": token.text, "kind": token.kind} for token in tokens],
        "spans": [
            {
                "lane": one.lane,
                "start": round(one.start, 6),
                "end": round(one.end, 6),
                "rows": one.rows,
                "number": one.number,
                "base": one.base,
            }
            for one in spans
        ],
        "stats": report.as_dict() if report else None,
    }
