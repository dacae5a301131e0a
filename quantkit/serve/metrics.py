"""What is counted, in Prometheus' text format."""

from collections.abc import Iterable

import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from quantkit.serve.model import Served

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters of one server."""

    def __init__(self, models: Iterable[Served]) -> None:
        disable_created_metrics()  # when each counter began: a line for every line
        self.registry = CollectorRegistry()
        self.registry.register(_Now(list(models)))
        self.requests = Counter(
            "quantkit_requests",
            "Answers, by HTTP status",
            ["path", "status"],
            registry=self.registry,
        )
        self.prompt_tokens = Counter(
            "quantkit_prompt_tokens", "Tokens of prompts", ["model"], registry=self.registry
        )
        self.generation_tokens = Counter(
            "quantkit_generation_tokens", "Tokens generated", ["model"], registry=self.registry
        )
        self.first_token = Histogram(
            "quantkit_time_to_first_token_seconds",
            "From the request to its first token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.seconds = Histogram(
            "quantkit_request_seconds",
            "From the request to the end of its answer",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Now(Collector):
    """What is the case at the moment it is asked."""

    def __init__(self, models: list[Served]) -> None:
        self._models = models

    def collect(self) -> Iterable[GaugeMetricFamily]:
        memory = GaugeMetricFamily("process_resident_memory_bytes", "Memory of this process")
        memory.add_metric([], resident())
        yield memory
        for name, text in {
            "running": "Texts that are being generated",
            "waiting": "Texts that wait for room",
            "kv_used": "Tokens whose keys and values have their memory",
            "kv_room": "Tokens that there is such memory for",
        }.items():
            gauge = GaugeMetricFamily(f"quantkit_{name}", text, labels=["model"])
            for served in self._models:
                gauge.add_metric([served.name], getattr(served.engine.load(), name))
            yield gauge


def resident() -> int:
    """Bytes that this process has in memory."""
    return int(psutil.Process().memory_info().rss)
