"""Where a worker computes: "host:0,1" on processor cores, "host:gpu0" on a GPU."""

from __future__ import annotations

import os
import socket

VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")
EVERY_GPU = "gpu*"


def place(device: str) -> str:
    """Where this process computes on `device`, as an engine describes it; "" for a made-up one."""
    if device.startswith("cpu"):
        units = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    elif device.startswith("gpu"):  # llama.cpp spreads a model over all that it can see
        seen = next(filter(None, map(os.environ.get, VISIBLE)), "*")
        units = ",".join(f"gpu{name.strip()}" for name in seen.split(","))
    else:
        return ""
    return f"{socket.gethostname()}:{units}"


def shared(one: str, other: str) -> bool:
    """Whether two places have a core or a GPU in common; "" is a device of its own."""
    if not one or not other:
        return False
    (host, mine), (other_host, others) = (_units(place) for place in (one, other))
    if host != other_host:
        return False
    if EVERY_GPU in mine | others:
        return all(unit.startswith("gpu") for unit in mine | others)
    return not mine.isdisjoint(others)


def _units(place: str) -> tuple[str, set[str]]:
    host, _, units = place.rpartition(":")
    return host, set(units.split(","))
