"""What Prometheus is told; names begin with ``madformer_``."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)


class Metrics:
    """Of one server: each has a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        # memory and processor time of the process
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"madformer_{name}_seconds", text, buckets=SECONDS, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"madformer_{name}", text, labels, registry=registry)

        self.wait = histogram("wait", "from a request until its image has a slot")
        self.first_block = histogram("first_block", "from a request until the picture of an image's first block")
        self.image = histogram("image", "from a request until an image is finished")
        self.images = counter("images", "images finished")
        self.failures = counter("image_failures", "images that failed", "code")
        self.refused = counter("refused", "requests answered 429", "reason")
        self.ended = counter("requests_ended_early", "requests that ended without being done", "code")
        self.answers = counter("http_answers", "answers by route and status", "method", "route", "status")

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """One that is looked up when it is asked for."""
        Gauge(f"madformer_{name}", text, registry=self.registry).set_function(value)

    def page(self) -> bytes:
        """In Prometheus's text format."""
        return generate_latest(self.registry)
