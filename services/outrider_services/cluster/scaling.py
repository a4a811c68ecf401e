"""How many replicas there should be: by what waits, and by how fast answers come.

Serve calls `wanted` as its autoscaling policy, and applies its own bounds and delays to the result.
"""

from __future__ import annotations

import math
from typing import Any

REQUESTS, SPEED = "outrider_requests", "outrider_tokens_per_s"  # what each replica tells


class Policy:
    """Made by Serve, in its controller, from the arguments that the application gives."""

    def __init__(self, places: int, tokens_per_s: float = 0.0) -> None:
        """`places`: requests that a replica is to have; `tokens_per_s`: that each is to get."""
        self._places, self._tokens_per_s = places, tokens_per_s

    def __call__(self, ctx: Any) -> tuple[int, dict[str, Any]]:
        told = ctx.aggregated_metrics or {}
        # leases, and what waits for one; or what the pipelines know, if others ask them, too
        requests = max(float(ctx.total_num_requests), sum(told.get(REQUESTS, {}).values()))
        speeds = [one for one in told.get(SPEED, {}).values() if one > 0]
        speed = sum(speeds) / len(speeds) if speeds else 0.0
        return wanted(
            ctx.current_num_replicas, requests, self._places, speed, self._tokens_per_s
        ), {}


def wanted(
    replicas: int, requests: float, places: int, speed: float = 0.0, least_speed: float = 0.0
) -> int:
    """Replicas for so many requests, of which each has `places`.

    Where requests get `speed` tokens a second and should get `least_speed`, each replica is to have
    fewer of them: what they share, they share in proportion.
    """
    if least_speed > 0 and speed > 0 and replicas > 0:
        each = max(1.0, requests / replicas)
        places = min(places, max(1, math.floor(each * speed / least_speed)))
    return math.ceil(requests / places)
