"""Whether two workers compute in the same place, so that one must wait for the other.

A place is written "host:0,1" for processor cores and "host:gpu 0000:c1:00.0" for a GPU.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

from outrider.engines import suffix
from outrider_services.options import cores, offload
from outrider_services.table import DraftOptions, Settings, TargetOptions

EVERY = "every GPU"
# they change which GPU is meant by a name
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GGML_VK_VISIBLE_DEVICES")


def place(units: Sequence[str]) -> str:
    """The place of this process, given its engine's `units`; "" for a made-up device."""
    parts: list[str] = []
    for unit in units:
        on_processor = unit == "cpu"
        parts += map(str, sorted(os.sched_getaffinity(0))) if on_processor else [f"gpu {unit}"]
    return f"{socket.gethostname()}:{','.join(parts)}" if parts else ""


def shared(one: str, other: str) -> bool:
    """Whether two places have a core or a GPU in common; "" shares nothing."""
    if not one or not other:
        return False
    (host, mine), (other_host, others) = (_units(place) for place in (one, other))
    return host == other_host and not mine.isdisjoint(others)


def share_cores(settings: Settings) -> bool:
    """Whether target and draft, both started here, may use a processor core or a GPU in common.

    As far as the settings tell: only the workers know which devices there are.
    """
    if settings.pipeline.backend == "toy" or settings.draft.model == suffix.NAME:
        return False
    mine, others = _asked(settings.target), _asked(settings.draft)
    for one, other in ((mine, others), (others, mine)):
        if EVERY in one and any(not unit.isdigit() for unit in other):
            return True
    return not mine.isdisjoint(others)


def _asked(worker: TargetOptions | DraftOptions) -> set[str]:
    """The cores and the names of the GPUs that a worker is to use."""
    asked, found = offload(worker), set[str]()
    if asked.layers >= 0:  # perhaps not all
        found |= {str(core) for core in cores(worker.cores) or os.sched_getaffinity(0)}
    if asked.layers:
        found |= {name.lower() for name in asked.devices} or {EVERY}
    return found


def _units(place: str) -> tuple[str, set[str]]:
    host, _, units = place.partition(":")
    return host, set(units.split(","))
