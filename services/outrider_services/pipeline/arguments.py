"""The command lines of the processes that a launcher starts."""

from __future__ import annotations

import socket
from dataclasses import replace

from outrider_services.options import to_flags
from outrider_services.table import Settings, TargetOptions


def own_settings(role: str, settings: Settings) -> Settings:
    """The settings for a worker of `role`: its own model is their target."""
    draft = settings.draft
    if role == "draft":
        own = replace(
            TargetOptions(),
            model=draft.model,
            threads=draft.threads,
            cores=draft.cores,
            device=draft.device,
            ngl=draft.ngl,
            ctx=settings.target.ctx,
        )
        settings = replace(settings, target=own)
    return replace(settings, target=replace(settings.target, place="spawn"))


def gateway_arguments(settings: Settings, address: str, http: socket.socket) -> list[str]:
    """The arguments that make `outrider` the gateway of the coordinator at `address`."""
    flags = to_flags(settings, ("server", "log"))
    return ["gateway", f"--connect={address}", f"--fd={http.fileno()}", *flags]


def worker_arguments(role: str, settings: Settings, address: str) -> list[str]:
    """The arguments that make `outrider` a worker of `role`."""
    flags = to_flags(own_settings(role, settings), ("target", "pipeline", "toy", "log"))
    return ["worker", role, f"--connect={address}", *flags]
