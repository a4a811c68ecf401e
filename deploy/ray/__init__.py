"""`serve run deploy.ray:app target.model=big.gguf draft.model=small.gguf replicas=2`."""

from outrider_services.cluster.application import app

__all__ = ["app"]
