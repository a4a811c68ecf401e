"""How Serve chooses a replica: by what each has read, and how busy it is (see `affinity`)."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    RequestRouter,
    RunningReplica,
)

from outrider_services.cluster.affinity import Affinity


class PrefixRouter(RequestRouter):
    """Serve's `request_router_class` for the deployment of `replica.Replica`."""

    def initialize_state(self, places: int) -> None:
        """`places`: sequences of each replica, as the application says."""
        self._affinity = Affinity(places)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        begins, lost = asked(pending_request)
        by_name = {one.replica_id.unique_id: one for one in candidate_replicas}
        there = {name: one for name, one in by_name.items() if name not in lost}
        loads = {name: self._load(one.replica_id) for name, one in there.items()}
        ranks = self._affinity.ranked(begins, loads)
        return [[there[name] for name in rank] for rank in ranks]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._affinity.routed(asked(pending_request)[0], replica_id.unique_id)

    def _load(self, replica: ReplicaID) -> int:
        """How many leases it has, as far as is known here."""
        return self.replica_queue_len_cache.get(replica) or 0


def asked(pending: PendingRequest | None) -> tuple[list[str], list[str]]:
    """The arguments of `Replica.lease`."""
    if pending is None:
        return [], []
    given = {**dict(zip(("begins", "lost"), pending.args, strict=False)), **pending.kwargs}
    return list(given.get("begins", ())), list(given.get("lost", ()))
