"""Many pipelines as replicas of a Ray Serve application: placed, scaled and replaced by Ray.

A request asks Serve for a place, which is a *lease* on a replica for as long as the answer takes.
So Serve counts, queues, routes, drains and scales as it does for anything else. The answer itself
comes over outrider's own link to that replica's coordinator, so Ray has no share in its fragments;
and if the replica is lost, it goes on with another, behind the tokens that have come.
"""
