"""Prometheus exposition of the metrics: names, types, labels and help texts."""

import os
import platform
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path

import numpy as np
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from service.errors import NotAcceptable
from service.metrics.counters import (
    BUCKET_BOUNDS_S,
    BUCKET_COUNT,
    CELLS_PER_ROW,
    FIRST_COUNTER_CELL,
    FIRST_GAUGE_CELL,
    GAUGE_NAMES,
    PID_CELL,
    Metrics,
    Row,
)
from service.negotiation import negotiate_format

METRICS_MEDIA_TYPES = ("text/plain", "application/openmetrics-text")

BUCKET_LABELS = [*map(floatToGoString, BUCKET_BOUNDS_S), "+Inf"]

METRIC_HELP: Mapping[str, str] = {
    "requests": "completed requests",
    "request_seconds": "time from the headers of a request to the end of its response",
    "phase_seconds": "time per request phase, of requests with that phase; inline computations have no wait phase",
    "refused": "rejected requests by problem type, the last part of its URN",
    "engine": "computations by engine, and fits by method",
    "received_bytes": "received bytes of request bodies, before decompression",
    "sent_bytes": "sent bytes of response bodies, after compression",
    "log_lines_dropped": "log lines that were not written because the reader of stderr fell behind or writing failed",
    "worker_restarts": "workers started to replace others",
    "workers_ready": "workers that can compute: after a successful warm-up and before shutdown",
    "requests_in_progress": "requests whose response has not been sent yet, including the request for these metrics",
    "connections": "open connections",
    "computations": "running computations",
    "queue_depth": "computations that wait in the queue",
    "queue_limit": "maximum number of computations that wait in the queue",
    "memory_used_bytes": "estimated memory that requests hold",
    "memory_limit_bytes": "maximum memory of all requests together",
    "workers": "running worker processes",
    "resident_memory_bytes": "resident memory of the worker processes; shared pages are counted for each of them",
    "start_time_seconds": "start time of the service, since the Unix epoch",
    "build": "versions of corr2d and Python",
}


class MetricsCollector(Collector):
    """Collector of all metrics: counters include workers that have ended, gauges are those of running workers."""

    def __init__(self, metrics: Metrics, version: str) -> None:
        self._metrics = metrics
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        metrics, table = self._metrics, self._metrics.table
        counts = _sum_rows(table.rows())
        live_rows = table.live_rows()
        states = _sum_rows(live_rows)

        requests = _make_counter("requests", "route", "status")
        for route, statuses in metrics.requests.items():
            for status, offset in statuses.items():
                requests.add_metric([route, str(status)], counts[offset])
        yield requests
        yield _make_histogram("request_seconds", "route", metrics.seconds, counts)
        yield _make_histogram("phase_seconds", "phase", metrics.phase_ms, counts, unit=0.001)
        for name, label, offsets in (("refused", "reason", metrics.rejections), ("engine", "engine", metrics.engines)):
            counter = _make_counter(name, label)
            for value, offset in offsets.items():
                counter.add_metric([value], counts[offset])
            yield counter
        for name, offset in (
            ("received_bytes", metrics.received_bytes),
            ("sent_bytes", metrics.sent_bytes),
            ("log_lines_dropped", metrics.dropped_lines),
        ):
            yield _make_counter(name, value=counts[offset])
        yield _make_counter("worker_restarts", value=table.restarts)

        for name, state in zip(GAUGE_NAMES, states[FIRST_GAUGE_CELL:FIRST_COUNTER_CELL], strict=True):
            yield _make_gauge(name, state)
        yield _make_gauge("workers", len(live_rows))
        if resident := [size for row in live_rows if (size := _read_resident_bytes(int(row[PID_CELL]))) is not None]:
            yield _make_gauge("resident_memory_bytes", sum(resident))
        yield _make_gauge("start_time_seconds", table.started)
        yield InfoMetricFamily(
            "corr2d_build", METRIC_HELP["build"], {"version": self._version, "python": platform.python_version()}
        )


class LabelledCollector(Collector):
    """Collector that adds a label to every series of another one."""

    def __init__(self, collector: Collector, name: str, value: str) -> None:
        self._collector = collector
        self._label = {name: value}

    def collect(self) -> Iterator[Metric]:
        """Yield the metric families."""
        for family in self._collector.collect():
            family.samples = [sample._replace(labels={**sample.labels, **self._label}) for sample in family.samples]
            yield family


def render_metrics(
    metrics: Metrics, version: str, accept: bytes | None, *, replica: str | None = None
) -> tuple[bytes, str]:
    """Return the text and its media type: OpenMetrics if Accept prefers it, else the Prometheus text format.

    `replica` is the label of that name on every series; None: no such label.
    """
    registry = CollectorRegistry(auto_describe=False)
    collector: Collector = MetricsCollector(metrics, version)
    registry.register(collector if replica is None else LabelledCollector(collector, "replica", replica))
    try:
        preferred = negotiate_format(accept, METRICS_MEDIA_TYPES)
    except NotAcceptable:
        preferred = METRICS_MEDIA_TYPES[0]
    # Not the Accept header itself: choose_encoder accepts unknown versions, and fails if one is not a number.
    encode, media_type = choose_encoder(preferred)
    return encode(registry), media_type


def _sum_rows(rows: list[Row]) -> list[float]:
    added: list[float] = np.array(rows, float).reshape(-1, CELLS_PER_ROW).sum(axis=0).tolist()
    return added


def _make_counter(name: str, *labels: str, value: float | None = None) -> CounterMetricFamily:
    return CounterMetricFamily(f"corr2d_{name}", METRIC_HELP[name], value, labels or None)


def _make_gauge(name: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"corr2d_{name}", METRIC_HELP[name], value)


def _make_histogram(
    name: str, label: str, offsets: Mapping[str, int], counts: list[float], unit: float = 1.0
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(f"corr2d_{name}", METRIC_HELP[name], labels=[label])
    for value, offset in offsets.items():
        buckets = accumulate(counts[offset : offset + BUCKET_COUNT])
        family.add_metric([value], list(zip(BUCKET_LABELS, buckets, strict=True)), counts[offset + BUCKET_COUNT] * unit)
    return family


def _read_resident_bytes(pid: int) -> int | None:
    """Return the resident memory of a process in bytes; None without /proc, or if the process has ended."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
