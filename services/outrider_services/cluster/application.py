"""The Serve application: `serve run deploy.ray:app` makes it from these arguments.

They are the settings of `outrider serve` by their keys (`target.model=big.gguf`), a file of them
(`config=outrider.toml`), and those of `Shape`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.handle import DeploymentHandle

from outrider.errors import ConfigError
from outrider_services import sources
from outrider_services.cluster.replica import Replica, has_draft, of_actor
from outrider_services.cluster.upstream import Lease, Replicas
from outrider_services.gateway.access import Rules
from outrider_services.gateway.answering import Gateway
from outrider_services.gateway.app import application
from outrider_services.options import OPTIONS, nearest
from outrider_services.table import Settings

GATEWAY_REQUESTS = 1000  # at once, of one gateway: it waits for most of them


@dataclass(frozen=True)
class Shape:
    """How many replicas there are, and what each takes; all is text, as a command line has it."""

    replicas: str = "1"  # or a range, as "1-4": see `scaling`
    gateways: str = "1"  # that take HTTP
    routing: str = "prefix"  # to who has read most of a text; "default": as Serve does it
    strategy: str = "PACK"  # of the two bundles: on one node if it has room; SPREAD: on two
    target: str = '{"CPU": 1}'  # what the bundle of coordinator and target takes, in JSON
    draft: str = '{"CPU": 1}'
    gateway: str = '{"CPU": 1}'  # what each gateway takes
    waiting: str = "4"  # requests that may wait at a replica, for a cache that they know
    tokens_per_s: str = "0"  # that each request is to get where there is a range; 0: whatever comes
    upscale_s: str = "10"  # for so long it must be too little …
    downscale_s: str = "300"  # … or too much

    @property
    def least_most(self) -> tuple[int, int]:
        least, _, most = self.replicas.partition("-")
        return int(least), int(most or least)


def app(args: Mapping[str, Any]) -> serve.Application:
    """Raises ConfigError for an argument that is wrong."""
    shape, settings = read(args)
    places = settings.pipeline.parallel
    bundles = [bundle(shape.target), bundle(shape.draft)]
    replica = serve.deployment(
        Replica,
        name="pipeline",
        max_ongoing_requests=places + int(shape.waiting),
        placement_group_bundles=bundles if has_draft(settings) else bundles[:1],
        placement_group_strategy=shape.strategy,
        ray_actor_options=of_actor(bundles[0]),
        graceful_shutdown_timeout_s=settings.coordinator.drain_s,
        health_check_period_s=5,
        health_check_timeout_s=30,
        **routed(shape, places),
        **scaled(shape, places),
    ).bind(settings)
    gateway = serve.deployment(
        Ingress,
        name="gateway",
        num_replicas=int(shape.gateways),
        ray_actor_options=of_actor(bundle(shape.gateway)),
        max_ongoing_requests=GATEWAY_REQUESTS,
        graceful_shutdown_timeout_s=settings.coordinator.drain_s,
    )
    return gateway.bind(replica, settings)


def routed(shape: Shape, places: int) -> dict[str, Any]:
    """How Serve is to choose a replica, each of which has so many `places`."""
    if shape.routing != "prefix":
        return {}
    config = RequestRouterConfig(
        request_router_class="outrider_services.cluster.routing:PrefixRouter",
        request_router_kwargs={"places": places},
    )
    return {"request_router_config": config}


def scaled(shape: Shape, places: int) -> dict[str, Any]:
    """How many replicas Serve is to keep, each of which has so many `places`."""
    least, most = shape.least_most
    if most == least:
        return {"num_replicas": least}
    policy = AutoscalingPolicy(
        policy_function="outrider_services.cluster.scaling:Policy",
        policy_kwargs={"places": places, "tokens_per_s": float(shape.tokens_per_s)},
    )
    config = AutoscalingConfig(
        min_replicas=least,
        max_replicas=most,
        upscale_delay_s=float(shape.upscale_s),
        downscale_delay_s=float(shape.downscale_s),
        policy=policy,
    )
    return {"autoscaling_config": config}


def read(args: Mapping[str, Any]) -> tuple[Shape, Settings]:
    """The arguments, taken apart. Raises ConfigError."""
    rest = {**args}
    shape = Shape(**{f.name: str(rest.pop(f.name)) for f in fields(Shape) if f.name in rest})
    config = rest.pop("config", None)
    values = {}
    for key, value in rest.items():
        option = OPTIONS.get(key)
        if option is None:
            known = [*OPTIONS, *(f.name for f in fields(Shape)), "config"]
            raise ConfigError(f"unknown argument {key}{nearest(key, known)}")
        try:
            texts = value if isinstance(value, list) else [value]
            found = [option.read(str(one)) for one in texts]
        except ValueError as exc:
            raise ConfigError(f"{key} must be {exc}, not {value!r}") from None
        values[key] = tuple(found) if option.repeats else found[0]
    try:
        least, most = shape.least_most
        numbers = int(shape.gateways), int(shape.waiting), least, most - least + 1
        ranges = float(shape.tokens_per_s), float(shape.upscale_s), float(shape.downscale_s)
        bundle(shape.target), bundle(shape.draft), bundle(shape.gateway)
    except ValueError as exc:
        raise ConfigError(f"an argument of the application is wrong: {exc}") from None
    if min(numbers[0], *numbers[2:]) < 1 or min(numbers[1], *ranges) < 0:
        raise ConfigError("replicas and gateways must be 1 or more, and the times 0 or more")
    if shape.routing not in ("prefix", "default"):
        raise ConfigError(f"routing must be prefix or default, not {shape.routing!r:.50}")
    return shape, sources.settings(values, str(config) if config else None)


def bundle(text: str) -> dict[str, float]:
    """The resources that a bundle takes. Raises ValueError."""
    found = json.loads(text)
    if not isinstance(found, dict) or not found:
        raise ValueError(f"{text!r:.100} is no table of resources")
    return {str(name): float(amount) for name, amount in found.items()}


# ---- HTTP ---------------------------------------------------------------------------------------


class Held(Lease):
    """A lease by Serve: a stream that ends when it is cancelled, or the replica does."""

    def __init__(self, name: str, address: str, response: Any) -> None:
        self.name, self.address, self._response = name, address, response

    def close(self) -> None:
        self._response.cancel()


class Forward:
    """The application in ASGI that Serve takes: that of the gateway in whose process it is."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for kind in ("startup", "shutdown"):
                await receive()
                await send({"type": f"lifespan.{kind}.complete"})
            return
        await serve.get_replica_context().servable_object.http(scope, receive, send)


@serve.ingress(Forward())
class Ingress:
    """The deployment's class that takes HTTP: outrider's gateway, in front of all replicas."""

    def __init__(self, replicas: DeploymentHandle, settings: Settings) -> None:
        self._lease = replicas.options(method_name="lease", stream=True)
        is_open = bool(settings.links.insecure)
        upstream = Replicas(self._find, keys=settings.links.keys or None, insecure=is_open)
        self.http = application(Gateway(upstream, settings.server), Rules.of(settings.server))

    async def _find(self, begins: Sequence[str], lost: Sequence[str]) -> Lease:
        response = self._lease.remote(list(begins), list(lost))
        try:
            found: AsyncIterator[tuple[str, str]] = response
            return Held(*await anext(found), response)
        except BaseException:
            response.cancel()
            raise
