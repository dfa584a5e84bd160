"""What the gateway tells Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from scepsy.deployment.backends import Backend, Pool

_SECONDS: Final = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class GatewayMetrics:
    """The gateway's own counts."""

    def __init__(self, pools: Mapping[str, Pool]) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "scepsy_gateway_requests", "Requests answered.", ("llm", "replica", "status"), registry=registry
        )
        self._seconds = Histogram(
            "scepsy_gateway_request_seconds", "Arrival to last byte.", ("llm",), registry=registry, buckets=_SECONDS
        )
        self._first = Histogram(
            "scepsy_gateway_first_byte_seconds", "Arrival to first byte.", ("llm",), registry=registry, buckets=_SECONDS
        )
        self._outstanding = Gauge(
            "scepsy_gateway_outstanding", "Requests being answered.", ("llm", "replica"), registry=registry
        )
        self._waiting = Gauge(
            "scepsy_gateway_waiting", "Requests that wait for a replica.", ("llm",), registry=registry
        )
        self._pools = pools
        self._ready = Gauge("scepsy_gateway_ready", "1 if the replica is ready.", ("llm", "replica"), registry=registry)
        # Children are looked up once per combination: a lookup by labels costs as much as all else here.
        self._counters: dict[tuple[str, str, int], Counter] = {}
        self._timed: dict[str, Histogram] = {}
        self._firsts: dict[str, Histogram] = {}
        for pool in pools.values():
            for backend in pool.backends:
                self.watch(backend)

    def watch(self, backend: Backend) -> None:
        """Show a replica."""
        self._timed[backend.llm] = self._seconds.labels(backend.llm)
        self._firsts[backend.llm] = self._first.labels(backend.llm)
        self._outstanding.labels(backend.llm, backend.id).set_function(lambda: backend.outstanding)
        self._ready.labels(backend.llm, backend.id).set_function(lambda: float(backend.ready))

    def forget(self, backend: Backend) -> None:
        """Show a replica no more."""
        self._outstanding.remove(backend.llm, backend.id)
        self._ready.remove(backend.llm, backend.id)

    def first_byte(self, llm: str, started_s: float) -> None:
        """An answer has begun."""
        self._firsts[llm].observe(time.perf_counter() - started_s)

    def done(self, llm: str, replica: str, status: int, started_s: float) -> None:
        """A replica, or with an empty name none, has answered."""
        key = (llm, replica, status)
        counter = self._counters.get(key)
        if counter is None:
            counter = self._counters[key] = self._requests.labels(llm, replica, str(status))
        counter.inc()
        self._timed[llm].observe(time.perf_counter() - started_s)

    def text(self) -> bytes:
        """All of it, in Prometheus' format."""
        self._waiting.clear()
        for llm, pool in self._pools.items():
            self._waiting.labels(llm).set(pool.waiting)
        return generate_latest(self._registry)
