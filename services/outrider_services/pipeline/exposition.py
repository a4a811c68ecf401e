"""A coordinator's metrics as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from outrider_services.pipeline.families import FAMILIES, Family

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OURS, THEIRS = "outrider_", "vllm:"
# by vLLM's name, these mean the same there
SHARED = (
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "spec_decode_num_accepted_tokens_per_pos_total",
)


def exposition(snapshot: Mapping[str, Any], compat: Literal["none", "vllm"] = "none") -> str:
    """The text of `/metrics`; `snapshot` is what `client.metrics()` has returned.

    With `compat` "vllm" what that counts, too, is told once more by its names there.
    """
    registry = CollectorRegistry()
    registry.register(_Snapshot(snapshot, SHARED if compat == "vllm" else ()))
    return generate_latest(registry).decode()


class _Snapshot(Collector):
    def __init__(self, values: Mapping[str, Any], repeated: tuple[str, ...]) -> None:
        self._values, self._repeated = values, repeated

    def collect(self) -> Iterator[Metric]:
        for name, family in FAMILIES.items():
            if name in self._values:
                yield _metric(OURS + name, family, self._values[name])
        for name in self._repeated:
            if name in self._values:
                yield _metric(THEIRS + name, FAMILIES[name], self._values[name])


def _metric(name: str, family: Family, value: Any) -> Metric:
    if family.kind == "info":
        info = GaugeMetricFamily(name, family.help, labels=family.labels)
        info.add_metric([str(value.get(label, "")) for label in family.labels], 1)
        return info
    depth = len(family.labels)
    if family.kind == "histogram":
        histogram = HistogramMetricFamily(name, family.help, labels=family.labels)
        for labels, table in _leaves(value, depth):
            buckets = [(bound, count) for bound, count in table.items() if bound != "sum"]
            histogram.add_metric(labels, buckets, table["sum"])
        return histogram
    kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
    metric = kind(name, family.help, labels=family.labels)
    for labels, number in _leaves(value, depth):
        metric.add_metric(labels, number)
    return metric


def _leaves(value: Any, depth: int) -> Iterator[tuple[list[str], Any]]:
    """What lies so many labels deep in `value`, with the labels that lead there."""
    if not depth:
        yield [], value
        return
    for label, inner in value.items():
        for labels, leaf in _leaves(inner, depth - 1):
            yield [label, *labels], leaf
