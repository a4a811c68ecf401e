"""Whether two workers compute in the same place, so that one must wait for the other.

A place is written "host:0,1" for processor cores and "host:gpu0" for a GPU.
"""

from __future__ import annotations

import os
import socket

from outrider_services.options import Settings, cores

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
EVERY_GPU = "gpu*"


def place(device: str) -> str:
    """The place of this process, given its engine's `device`; "" for a made-up device."""
    if device.startswith("cpu"):
        units = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    elif device.startswith("gpu"):  # llama.cpp spreads a model over all GPUs that it sees
        seen = next(filter(None, map(os.environ.get, VISIBLE)), "*")
        units = ",".join(f"gpu{name.strip()}" for name in seen.split(","))
    else:
        return ""
    return f"{socket.gethostname()}:{units}"


def shared(one: str, other: str) -> bool:
    """Whether two places have a core or a GPU in common; "" shares nothing."""
    if not one or not other:
        return False
    (host, mine), (other_host, others) = (_units(place) for place in (one, other))
    if host != other_host:
        return False
    if EVERY_GPU in mine | others:
        return all(unit.startswith("gpu") for unit in mine | others)
    return not mine.isdisjoint(others)


def share_cores(settings: Settings) -> bool:
    """Whether target and draft, both started here, may use a processor core in common."""
    if settings.pipeline.backend == "toy":
        return False
    allowed = os.sched_getaffinity(0)
    mine, others = (cores(one.cores) or allowed for one in (settings.target, settings.draft))
    return not mine.isdisjoint(others)


def _units(place: str) -> tuple[str, set[str]]:
    host, _, units = place.rpartition(":")
    return host, set(units.split(","))
