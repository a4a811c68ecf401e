"""One pipeline as a replica of Ray Serve: coordinator and target here, the draft in its own bundle.

Ray places both bundles, on the same node or on two, and takes the replica for dead when its health
says so. When the draft's bundle is lost, Ray makes it anew, and meanwhile the target goes on alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from outrider.client import AsyncClient, connect
from outrider.errors import WorkerLost
from outrider_services.cluster.scaling import REQUESTS, SPEED
from outrider_services.commands.prepared import with_files
from outrider_services.options import reach
from outrider_services.pipeline.arguments import own_settings
from outrider_services.pipeline.launcher import Launcher
from outrider_services.pipeline.lone import LoneWorker
from outrider_services.table import Settings

log = logging.getLogger(__name__)

ANSWER_S = 5.0  # most that the coordinator may take to tell how it is
DRAFT_BUNDLE = 1


class DraftPlace:
    """The actor in the draft's bundle: it keeps the draft worker up."""

    async def run(self, settings: Settings, address: str) -> None:
        """Until the actor ends. Raises the worker's error where another start would not help."""
        own = own_settings("draft", bound(settings, address))
        worker = LoneWorker("draft", own, address, _report, _log)
        await worker.run(lambda: log.info("the draft worker is ready"))


class Replica:
    """The deployment's class; Serve calls what has no underscore, and `check_health`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._launcher: Launcher | None = None
        self._starting = asyncio.Lock()
        self._draft: Any = None
        self._counted = 0.0, 0.0  # when tokens were, and how many there had been

    async def lease(
        self, begins: Sequence[str] = (), lost: Sequence[str] = ()
    ) -> AsyncIterator[tuple[str, str]]:
        """Yields the replica's name and its coordinator's address, and holds the place from then.

        It is given back when whoever asked cancels. The arguments are for the router.
        """
        launcher = await self._up()
        yield self._name, launcher.addresses[0]
        await asyncio.wait([launcher.failed])

    async def check_health(self) -> None:
        """Raises what is wrong. Serve replaces a replica of which this is so again and again."""
        launcher = await self._up()
        if launcher.failed.done():
            launcher.failed.result()
            raise WorkerLost("the pipeline has ended", "coordinator")
        async with self._asked() as client:
            await client.health(timeout_s=ANSWER_S)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `scaling`: requests, and tokens a second that each of them got since it was asked."""
        async with self._asked() as client:
            requests = (await client.health(timeout_s=ANSWER_S))["requests"]
            told = await client.metrics(timeout_s=ANSWER_S)
        now, count = time.monotonic(), float(sum(told["generation_tokens_total"].values()))
        (before, had), self._counted = self._counted, (now, count)
        rate = (count - had) / (now - before) if before else 0.0
        running = float(requests["running"])
        return {
            REQUESTS: running + requests["waiting"],
            SPEED: rate / running if running else 0.0,
        }

    @asynccontextmanager
    async def _asked(self) -> AsyncIterator[AsyncClient]:
        address = (await self._up()).addresses[0]
        links = bound(self._settings, address).links
        async with connect(address, **reach(links, address)) as client:
            yield client

    async def _up(self) -> Launcher:
        """The pipeline, started when it is first needed: Serve waits for the first health check."""
        async with self._starting:
            if self._launcher is None:
                settings = placed(self._settings, ray.util.get_node_ip_address())
                draft = has_draft(settings)
                settings = await asyncio.to_thread(with_files, settings, fetch=True)
                launcher = Launcher(settings, f"ray-{self._name}", _report, _log, draft=draft)
                self._launcher = await launcher.__aenter__()
                self._draft = self._with_draft(settings, launcher.addresses[0])
            return self._launcher

    def _with_draft(self, settings: Settings, address: str) -> Any:
        """Let Ray keep the draft up in its bundle: it makes a lost actor anew, each time."""
        group = get_current_placement_group()
        if group is None or not has_draft(settings):
            return None
        actor = ray.remote(DraftPlace).options(
            **of_actor(group.bundle_specs[DRAFT_BUNDLE]),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=DRAFT_BUNDLE
            ),
            max_restarts=-1,
            max_task_retries=-1,
        )
        draft = actor.remote()
        return draft, draft.run.remote(settings, address)

    async def __del__(self) -> None:
        """Serve calls it once no lease is left, or their time is over."""
        if self._launcher is not None:
            await self._launcher.stop()


def of_actor(bundle: Mapping[str, float]) -> dict[str, Any]:
    """What a bundle takes, as options of the actor that takes the whole of it."""
    others = {name: n for name, n in bundle.items() if name not in ("CPU", "GPU", "memory")}
    return {
        "num_cpus": bundle.get("CPU", 0),
        "num_gpus": bundle.get("GPU", 0),
        "resources": others,
    }


def has_draft(settings: Settings) -> bool:
    """Whether a replica needs a bundle for it; where no model is named, it is the default pair."""
    target, draft = settings.target, settings.draft
    is_default = not (target.model or target.hf)
    return settings.pipeline.backend == "toy" or is_default or bool(draft.model or draft.hf)


def placed(settings: Settings, host: str) -> Settings:
    """The settings of a replica on this `host`, where its draft and its clients reach it."""
    address = f"tcp://{host}:0"
    is_here = ipaddress.ip_address(host).is_loopback
    is_open = bool(settings.links.insecure) and not is_here
    return replace(
        settings,
        draft=replace(settings.draft, place="remote"),
        coordinator=replace(settings.coordinator, listen=(address,)),
        links=replace(settings.links, insecure=(address,) if is_open else ()),
        server=replace(settings.server, no_gateway=True),
    )


def bound(settings: Settings, address: str) -> Settings:
    """The same once the port is known: without keys it is open, whatever address it has."""
    links = settings.links
    return replace(settings, links=replace(links, insecure=(address,) if links.insecure else ()))


def _report(role: str, state: str, share: float) -> None:
    log.debug("%s: %s %.0f %%", role, state, 100 * share)


def _log(role: str, line: str) -> None:
    log.warning("%s: %s", role, line)
