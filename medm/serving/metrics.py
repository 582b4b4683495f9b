"""Figures of the server in Prometheus' format. They hold counts and times, no content."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters of one server. Several servers of a process have their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "medm_requests",
            "Requests by route and status; 499: the client left.",
            ["route", "status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "medm_request_seconds",
            "Seconds from the headers of a request to the end of its response.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "medm_first_token_seconds",
            "Seconds from the headers of a chat request to the first text of its reply.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter(
            "medm_tokens", "Tokens of prompts and of replies.", ["part"], registry=self.registry
        )
        self.jobs = Counter(
            "medm_jobs",
            "Jobs by task and final status.",
            ["task", "status"],
            registry=self.registry,
        )

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Add a figure that is read when it is asked for."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        """Return all figures."""
        return generate_latest(self.registry)
